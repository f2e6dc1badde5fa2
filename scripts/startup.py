"""What a script does before torch is there. Nothing heavy is imported here.

Importing torch and transformers makes some million objects that stay: collecting garbage would take a fifth of the
time. To print --help, nothing of them is needed at all.
"""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from mlm.startup import HEAVY, set_by_accelerate_launch


@contextmanager
def quick_imports() -> Iterator[None]:
    """A context to import the libraries in, without collecting garbage, and with OpenMP set up.

    Where the command line asks for help, stand-ins take the libraries' place; the process must end after printing it.
    """
    _check_working_directory()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # four times as fast where others use the cores
    # For one process `accelerate launch` sets one thread if nobody asked for another number.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and os.environ.get("OMP_NUM_THREADS") == "1" and set_by_accelerate_launch("OMP_NUM_THREADS"):
        del os.environ["OMP_NUM_THREADS"]
    words = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    if {"--help", "-h"} & set(words):
        sys.meta_path.insert(0, _StandIns())
    gc.disable()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        gc.freeze()
        gc.enable()


def _check_working_directory() -> None:
    """Without one, the first import would fail."""
    try:
        os.getcwd()
    except OSError:
        print("error: the working directory has been removed; change to another one", file=sys.stderr)
        sys.exit(2)


class _StandIns(MetaPathFinder, Loader):
    """Gives for each heavy library and its submodules a module that has every attribute."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from unittest.mock import MagicMock

        return MagicMock(name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
