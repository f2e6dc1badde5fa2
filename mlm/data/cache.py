"""What is kept between runs in the folder --token_store: built by one run, found by the others.

It is built beside its place and renamed, so that no run finds half of it. Of several runs at once one builds while the
others wait for its lock, <place>.lock; that file stays (`one_builder` says why) and may be removed when no run builds.
"""

import hashlib
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mlm.errors import UserError
from mlm.files import one_builder

ABANDONED = 24 * 3600  # seconds after its last write from which a build counts as dead
Found = TypeVar("Found")


def key(identity: Any) -> str:
    """A name for what is built from the sources that `identity`, a JSON value, describes."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def build_once(
    place: Path, find: Callable[[], Found], build: Callable[[Path], None], overwrite: bool = False
) -> Found:
    """Has `build(path)` put a file or folder at `place`, unless another run did meanwhile. Returns what `find()` does.

    find:      is false where nothing valid is at `place`
    overwrite: build even so

    Raises UserError where the folder cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with one_builder(place) as alone:
            if overwrite or not find():
                name = f"{place.name}.building.{socket.gethostname()}" if alone else f"{place.name}.building"
                _remove_abandoned(place, name if alone else None)
                with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=place.parent) as workspace:
                    built = Path(workspace, "store")  # others may read it, unlike the folder around it
                    build(built)
                    if overwrite or not find():
                        with suppress(FileNotFoundError):
                            place.rename(Path(workspace, "replaced"))
                        try:
                            built.rename(place)
                        except OSError:
                            if not find():  # else a run without the lock was quicker
                                raise
            found = find()  # before the next run may replace it
    except OSError as error:
        raise UserError(f"--token_store {place.parent}: cannot write there ({error.strerror})") from None
    if not found:
        raise UserError(f"--token_store {place}: removed by another program during the build; run again")
    return found


def _remove_abandoned(place: Path, holders: str | None) -> None:
    """Removes what killed builds left.

    holders: the name, up to its last dot, of builds by the lock's earlier holders on this machine, which are dead if
        this process holds it; None if it does not. Builds without the lock, and those of other machines (not every
        shared folder locks across machines), are judged by age.
    """
    for leftover in place.parent.glob(f"{place.name}.building.*"):
        times = []
        with suppress(OSError):  # a build that ends meanwhile takes its folder along
            times = [path.stat().st_mtime for path in (leftover, *leftover.rglob("*"))]
        dead = leftover.name.rpartition(".")[0] == holders
        if dead or (times and time.time() - max(times) > ABANDONED):
            shutil.rmtree(leftover, ignore_errors=True)
