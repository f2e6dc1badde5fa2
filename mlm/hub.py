"""Whether the Hub can be reached, checked once per process."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from transformers.utils import logging

PATIENCE = 5.0  # seconds to wait for the Hub to answer


def local_files_only(name: str) -> bool:
    """Whether `from_pretrained` is to look in the cache alone, as it would ask an unreachable Hub for 47 s."""
    return not Path(name).is_dir() and not _answers()


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers shows no progress bars inside, and does afterwards what it did before."""
    had = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had:
            logging.enable_progress_bar()


@lru_cache
def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # the transport, and so its exceptions, changes from version to version; offline mode
        return False
    return True
