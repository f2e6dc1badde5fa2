"""What is checked before a token store is believed: its files against their checksums, its arrays against its header.

To read a large store takes its time, so it is read once a machine and boot, unless a file changes meanwhile:
<split>/verified.json keeps, for the machines that did so last, the stamps of the files that were read."""

import hashlib
import json
import mmap
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mlm.errors import UserError
from mlm.files import stamp, write_json

MACHINES = 16  # that are remembered
PART = 2**20  # document offsets that are looked at together


def checksum(path: Path) -> str:
    """XXH3 of a file's bytes, which memory is the limit of. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def find_fault(folder: Path, header: dict[str, Any], arrays: dict[str, np.ndarray], again: bool = False) -> str | None:
    """What is wrong with the store of a split, whose `arrays` are mapped from `folder`; None: nothing. With `again`
    even if this machine has looked, since it started, and no file has changed since. Raises OSError where a file
    cannot be read, and KeyError for a header that lacks something."""
    record, machine = folder / "verified.json", _machine()
    stamps = {name: stamp(folder / name) for name in ("header.json", *(f"{name}.npy" for name in arrays))}
    verified = {}
    with suppress(OSError, ValueError, TypeError):
        verified = dict(json.loads(record.read_text()))
    if not again and verified.get(machine) == stamps:
        return None
    if verified.pop(machine, None):  # nobody believes the store meanwhile, nor after a fault
        with suppress(OSError):
            write_json(record, verified)
    for name, expected in header["checksums"].items():
        if checksum(folder / f"{name}.npy") != expected:
            return f"{name}.npy is not what was written"
    ids, word_starts, offsets, token_counts, document_lengths, _ = arrays.values()
    found = len(ids), len(word_starts), token_counts.sum(), len(token_counts), len(offsets) - 1, document_lengths.sum()
    tokens, vocabulary, documents = (header[name] for name in ("tokens", "vocabulary_size", "documents"))
    if found != (tokens, tokens, tokens, vocabulary, documents, documents):
        return "the arrays' lengths or counts are not those of the header"
    if ids.max(initial=0) >= header["vocabulary_size"]:
        return f"ids.npy holds an id beyond the vocabulary of {header['vocabulary_size']}"
    parts = (offsets[first : first + PART + 1] for first in range(0, len(offsets), PART))  # so that memory is bounded
    if offsets[0] != 0 or offsets[-1] != len(ids) or any((part[1:] <= part[:-1]).any() for part in parts):
        return f"document_offsets.npy does not rise from 0 to {len(ids)}"
    with suppress(OSError):  # of a store that this user cannot write to, each run reads everything
        write_json(record, dict([*verified.items()][1 - MACHINES :]) | {machine: stamps})
    return None


def check_mapped(array: np.ndarray) -> None:
    """Raises UserError where the file that `array` is mapped from has been cut short: reading would end in SIGBUS."""
    if isinstance(array.base, mmap.mmap) and array.base.size() < len(array.base):  # one fstat
        raise UserError(f"{array.filename} was cut short while in use; run again, which builds the token store anew")


def _machine() -> str:
    """A name for this machine, another one after each start."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = round(time.time() - time.monotonic(), -2)  # on macOS the monotonic clock counts from the start
    return f"{socket.gethostname()} {started}"
