"""How a script imports the libraries: without searching them for garbage. It imports nothing heavy itself."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """A context to import torch and transformers in.

    They make some million objects, nearly all of which stay, and the collector goes through them again and
    again while their number grows: a fifth of the time that the imports take. After it they are frozen, so
    that later collections pass over them too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
