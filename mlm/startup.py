"""What has to be known of a process's surroundings before torch is there. Nothing heavy is imported here."""

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

HEAVY = {"accelerate", "datasets", "huggingface_hub", "plotly", "pyarrow"}
HEAVY |= {"safetensors", "tokenizers", "torch", "transformers"}


def find_home() -> None:
    """Gives a user without one, as a container's arbitrary uid is, a home in the temporary folder. Libraries would
    make one called `~` in the working directory, or fail. Another user's folder is not taken."""
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
