"""The Hub, asked once whether it is there."""

from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

PATIENCE = 5.0  # seconds to wait for the Hub to answer


def local_files_only(name: str) -> bool:
    """What `from_pretrained` is to be told under this name: whether the Hub's cache is all there is to ask.

    The libraries ask an unreachable Hub six times for a file, 47 s in all. Told so, they take a model from
    the cache where it is there, and fail at once where it is not.
    """
    return not Path(name).is_dir() and not _answers()


@lru_cache
def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # the transport, and so its exceptions, changes from version to version; offline mode
        return False
    return True
