"""What a script does before torch is there. Nothing heavy is imported here.

Importing torch and transformers makes some million objects that stay: collecting garbage would take a fifth of the
time. To print --help, nothing of them is needed at all.
"""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

HEAVY = {"accelerate", "datasets", "huggingface_hub", "plotly", "pyarrow"}
HEAVY |= {"safetensors", "tokenizers", "torch", "transformers"}


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


def find_home() -> None:
    """Gives a user without one, as a container's arbitrary uid is, a home in the temporary folder.

    Libraries would make one called `~` in the working directory, or fail. Another user's folder is not taken.
    """
    home = os.path.expanduser("~")
    if os.path.isabs(home) and os.path.isdir(home) and (home != "/" or os.access(home, os.W_OK)):
        return
    place = Path(tempfile.gettempdir(), f"home-{os.getuid()}")
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    own = not place.is_symlink() and place.stat().st_uid == os.getuid()
    os.environ["HOME"] = str(place) if own else tempfile.mkdtemp()
    # Libraries that were imported first, as in mlm/train.py, have chosen their caches already.
    old, new = (os.path.join(where, ".cache") for where in (home, os.environ["HOME"]))
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] in HEAVY]:
        paths = {name: value for name, value in vars(module).items() if type(value) is str and value.startswith(old)}
        vars(module).update({name: new + path.removeprefix(old) for name, path in paths.items()})


def set_by_accelerate_launch(variable: str) -> bool:
    """Whether `accelerate launch`, the parent process, and not its user set this variable: Linux alone can tell."""
    try:
        environment, command = (Path(f"/proc/{os.getppid()}/{name}").read_bytes() for name in ("environ", "cmdline"))
    except OSError:
        return False
    if variable == "OMP_NUM_THREADS" and b"cpu_threads_per_process" in command.replace(b"-", b"_"):
        return False
    inherited = {entry.partition(b"=")[0].decode(errors="replace") for entry in environment.split(b"\0")}
    return {variable, "ACCELERATE_DYNAMO_BACKEND"} <= os.environ.keys() - inherited


class _StandIns(MetaPathFinder, Loader):
    """Gives for each heavy library and its submodules a module that has every attribute."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from unittest.mock import MagicMock

        return MagicMock(name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
