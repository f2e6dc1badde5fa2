"""Files that are there whole or not at all, and the lock by which one process at a time builds something."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlm.errors import one_line

log = logging.getLogger(__name__)

# Seconds to wait for a run that builds the same: half of what the processes of one run wait for each other
# (PATIENCE in processes.py), so that the other half is left to build what did not come.
LOCK_TIMEOUT = 3600.0
POLL = 0.2  # seconds between two tries, each of which the server of a shared folder has to answer


def write_text(path: Path, text: str) -> None:
    """Replaces a file, whole or not at all. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by a JSON text, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def sync(path: Path) -> None:
    """Has the disk keep what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def one_builder(place: Path) -> Iterator[bool]:
    """Lets the runs that are about to build `place` in one by one; each looks first whether it is there now.

    Yields True where this run holds the lock. False: LOCK_TIMEOUT seconds went by and the holder, stopped or
    slow, still had it, or there is no locking here (a file system without it, a lock file of another user).
    Then others may be building as well: build beside the place, and rename.

    The lock is the kernel's, on the file `<place>.lock`. It ends with the process that holds it, however that
    ends, so that the file of a killed run is no lock and costs no wait. The file itself is left: were it
    removed, a run that waits on it and one that comes later would each hold a lock of their own.
    """
    path = Path(f"{place}.lock")

    def sign(descriptor: int) -> None:
        with contextlib.suppress(OSError):  # on a full disk those who wait do without the name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    # Preserved also means: no lock by the mere existence of a file, which would outlive a killed process.
    lock = FileLock(path, preserve_lock_file=True, on_acquired=sign)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s is building %s: waiting, up to %g s", _holder(path), place, LOCK_TIMEOUT)
            lock.acquire(timeout=LOCK_TIMEOUT, poll_interval=POLL)
    except Timeout:
        log.warning("%s has held %s for %g s: building without it", _holder(path), path, LOCK_TIMEOUT)
    except OSError:
        pass  # whether the place can be written at all, building shows
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return one_line(path.read_text(errors="replace"), 80) or "another run"
    return "another run"
