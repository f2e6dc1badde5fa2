"""Files that are written completely or not at all."""

import errno
import json
import os
from pathlib import Path
from typing import Any


def no_locks(error: Exception) -> bool:
    """Whether this is the answer of a file system that has no locks, or has lost them, to `FileLock.acquire`. With
    preserve_lock_file=True there is such an answer. Otherwise filelock makes do with a file that a killed run leaves
    behind and that keeps out all later ones."""
    answers = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ESTALE
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in answers


def write_text(path: Path, text: str) -> None:
    """Replaces a file completely or not at all. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by a JSON text, completely or not at all. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def stamp(path: str | Path) -> list[int]:
    """Changes when a file is written or replaced: size in bytes, time of modification in ns, inode, time of change in
    ns, which no program can set."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def sync(path: Path) -> None:
    """Flushes a file's data, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
