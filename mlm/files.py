"""Files that are written completely or not at all, and the lock by which one process builds for all."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlm.errors import UserError, one_line

log = logging.getLogger(__name__)

# Seconds to wait for a run that builds the same: half of what the processes of one run wait for each other (PATIENCE
# in engine/distributed.py), so that time is left to build without the lock.
LOCK_TIMEOUT = 3600.0


def write_text(path: Path, text: str) -> None:
    """Replaces a file completely or not at all. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by a JSON text, completely or not at all. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def sync(path: Path) -> None:
    """Flushes a file's data, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_sentences(path: str) -> dict[int, str]:
    """The non-blank lines of a UTF-8 text file (`-`: standard input): {line number from 1: sentence}.

    Raises UserError where the file cannot be read, or holds none.
    """
    name, source = ("standard input", 0) if path == "-" else (path, path)
    try:
        # utf-8-sig: editors on Windows write a byte order mark
        with open(source, encoding="utf-8-sig", closefd=path != "-") as file:
            sentences = {number: line.rstrip("\n") for number, line in enumerate(file, 1) if line.strip()}
    except OSError as error:
        raise UserError(f"{name}: cannot read the sentences ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({one_line(error)})") from None
    if not sentences:
        raise UserError(f"{name}: no sentence in it; write one on each line")
    return sentences


@contextlib.contextmanager
def one_builder(place: Path) -> Iterator[bool]:
    """Admits one run at a time to build `place`; each should check first whether it exists by now.

    Yields True where this run holds the lock, and False where it could not be had: the holder, stopped or slow, kept
    it for LOCK_TIMEOUT seconds, or locking is not permitted. Then others may be building as well, so build beside the
    place and rename. The kernel releases the lock on `<place>.lock` when the process ends, in whatever way. The file
    stays: if it were removed, a run waiting on it and a later one would each hold a lock.
    """
    path = Path(f"{place}.lock")

    def sign(descriptor: int) -> None:
        with contextlib.suppress(OSError):  # on a full disk, waiting runs do not learn the holder's name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    # Preserving the file also rules out filelock's soft locks, which outlive a killed process.
    lock = FileLock(path, preserve_lock_file=True, on_acquired=sign)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s is building %s: waiting, up to %g s", _holder(path), place, LOCK_TIMEOUT)
            lock.acquire(timeout=LOCK_TIMEOUT, poll_interval=0.2)  # a try asks the server of a shared folder
    except Timeout:
        log.warning("%s has held %s for %g s: building without it", _holder(path), path, LOCK_TIMEOUT)
    except OSError:
        pass  # building will show whether the place can be written at all
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return one_line(path.read_text(errors="replace"), 80) or "another run"
    return "another run"
