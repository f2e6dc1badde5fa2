"""What is kept between runs in the folder --token_store: built by one run, found by the others.

It is built beside its place and renamed, so that no run finds half of it. Of several runs at once one builds while the
others wait for its lock, <place>.lock, which the kernel releases when the process ends, in whatever way. The lock's
file stays: if it were removed, a run waiting on it and a later one would each hold a lock."""

import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlm.errors import UserError, one_line
from mlm.files import no_locks

log = logging.getLogger(__name__)

# Seconds to wait for a run that builds the same, after which this one builds without the lock.
LOCK_TIMEOUT = 3600.0
ABANDONED = 24 * 3600  # seconds after its last write from which a build counts as dead


def key(identity: Any) -> str:
    """A name for what is built from the sources that `identity`, a JSON value, describes."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def build_once(
    place: Path, find: Callable[[], Any], build: Callable[[Path], None], overwrite: bool = False, wait: bool = True
) -> Any:
    """What `find()` gives, which is false where nothing valid is there: then, and with `overwrite` even so, one run of
    several has `build(path)` put a file or folder at `place`, for all. Without `wait` None is returned where another
    run is building it. Raises UserError where the folder cannot be written."""
    if not overwrite and (found := find()):
        return found
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(place, wait) as alone:
            if alone is None:
                return None
            if overwrite or not find():
                name = f"{place.name}.building.{socket.gethostname()}" if alone else f"{place.name}.building"
                _remove_abandoned(place, name if alone else None)
                with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=place.parent) as workspace:
                    built = Path(workspace, "store")  # others may read it, unlike the folder around it
                    build(built)
                    if overwrite or not find():
                        with suppress(FileNotFoundError):
                            place.rename(Path(workspace, "replaced"))
                        built.rename(place)
            found = find()  # before the next run may replace it
    except (OSError, UserError) as error:
        if overwrite or not (found := find()):  # else a run without the lock was quicker, and tidied up
            if isinstance(error, UserError):
                raise
            raise UserError(f"--token_store {place.parent}: cannot write there ({error.strerror})") from None
    if not found:
        raise UserError(f"--token_store {place}: removed by another program during the build; run again")
    return found


@contextmanager
def _one_builder(place: Path, wait: bool) -> Iterator[bool | None]:
    """Admits one run at a time. Yields False where others may be building as well: the holder kept the lock for
    LOCK_TIMEOUT seconds, or locking is not permitted; and without `wait` None where another run is building."""
    path, alone = Path(f"{place}.lock"), False

    def sign(descriptor: int) -> None:
        with suppress(OSError):  # on a full disk, waiting runs do not learn the holder's name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    lock = FileLock(path, preserve_lock_file=True, on_acquired=sign)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait:
                holder = "another run"
                with suppress(OSError):
                    holder = one_line(path.read_text(errors="replace"), 80) or holder
                log.info("%s is building %s: waiting, up to %g s", holder, place, LOCK_TIMEOUT)
                lock.acquire(timeout=LOCK_TIMEOUT, poll_interval=0.2)  # a try asks the server of a shared folder
        alone = lock.is_locked or None
    except Timeout:
        log.warning("%s has held %s for %g s: building without it", holder, path, LOCK_TIMEOUT)
    except (OSError, NotImplementedError) as error:  # building will show whether the place can be written at all
        if wait and no_locks(error):
            log.warning("no locks where %s is (%s): building without one", path, error)
    try:
        yield alone
    finally:
        lock.release()


def _remove_abandoned(place: Path, holders: str | None) -> None:
    """Removes what killed builds left: those of the lock's earlier holders on this machine, `<holders>.*`, if this
    process holds it (None: it does not), and others by age, as not every shared folder locks across machines."""
    for leftover in place.parent.glob(f"{place.name}.building.*"):
        times = []
        with suppress(OSError):  # a build that ends meanwhile takes its folder along
            times = [path.stat().st_mtime for path in (leftover, *leftover.rglob("*"))]
        dead = leftover.name.rpartition(".")[0] == holders
        if dead or (times and time.time() - max(times) > ABANDONED):
            shutil.rmtree(leftover, ignore_errors=True)
