"""What a script does before torch is there. Nothing heavy is imported here.

Importing torch and transformers makes some million objects, nearly all of which stay. The garbage collector
would go through them again and again while their number grows, for a fifth of the time; and to print --help
nothing of them is needed at all.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

HEAVY = {"accelerate", "datasets", "huggingface_hub", "plotly", "pyarrow", "safetensors", "tokenizers"}
HEAVY |= {"torch", "transformers"}


@contextmanager
def quick_imports() -> Iterator[None]:
    """A context to import the libraries in: with OpenMP set up, without collecting garbage.

    Afterwards the objects are frozen, so that later collections skip them. Where the command line asks for
    help, stand-ins take the libraries' place; the process must end after printing it.
    """
    set_up_openmp()
    words = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    if {"--help", "-h"} & set(words):
        sys.meta_path.insert(0, _StandIns())
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def set_up_openmp() -> None:
    """Threads that wait sleep (four times as fast where other programs use the cores), and one process alone
    has all cores, although `accelerate launch` gives it one thread if nobody asked for another number."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and os.environ.get("OMP_NUM_THREADS") == "1" and set_by_accelerate_launch("OMP_NUM_THREADS"):
        del os.environ["OMP_NUM_THREADS"]


def set_by_accelerate_launch(variable: str) -> bool:
    """Whether this environment variable comes from `accelerate launch` and not from its user.

    Linux shows the environment and the command line that the launcher, the parent process, was started with.
    """
    launcher = Path(f"/proc/{os.getppid()}")
    try:
        environment, command = ((launcher / name).read_bytes() for name in ("environ", "cmdline"))
    except OSError:
        return False
    inherited = {entry.partition(b"=")[0].decode(errors="replace") for entry in environment.split(b"\0")}
    if variable == "OMP_NUM_THREADS" and b"cpu_threads_per_process" in command.replace(b"-", b"_"):
        return False
    return {variable, "ACCELERATE_DYNAMO_BACKEND"} <= os.environ.keys() - inherited


class _StandIns(MetaPathFinder, Loader):
    """Finds, for each of the heavy libraries and their submodules, a module with every attribute there is."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from unittest.mock import MagicMock

        return MagicMock(name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
