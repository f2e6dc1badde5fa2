"""What is wrong with a file of text, and on which line: what no library says, or says without the line."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# File extension (also followed by .gz): the datasets library's reader.
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

# Text is packed to a third or a tenth, and deflate cannot do better than 1 : 1032 (https://zlib.net/zlib_tech.html).
MOST_UNPACKED, LARGE = 200, 1 << 28  # times the size of the file, where that is more than so many bytes
LONGEST_ROW = 200  # lines that a JSON value may be spread over
KINDS = {bool: "bool", int: "int64", float: "double", str: "string", list: "a list", dict: "an object"}
LIST = re.compile(r"\s*\[")


def reader_of(file: str) -> str | None:
    """The datasets library's reader for a file, by its extension; None where it is unknown."""
    return READERS.get(Path(file.lower().removesuffix(".gz")).suffix)


def find_bomb(file: str) -> str | None:
    """Whether a .gz file unpacks to more than text does; for others None. Unpacks it without keeping anything."""
    if not file.lower().endswith(".gz"):
        return None
    most, size = max(MOST_UNPACKED * Path(file).stat().st_size, LARGE), 0
    try:
        with gzip.open(file) as unpacked:
            while block := unpacked.read(1 << 20):
                if (size := size + len(block)) > most:
                    return f"unpacks to more than {MOST_UNPACKED} times its size, as no text does"
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return "not a whole gzip file"
    return None


def find_bad_row(file: str, column: str | None, unread: bool = False) -> str | None:
    """What is wrong with a row of a JSON file, be the JSON sound: its text is no string, it is no Unicode, has a name
    twice or is nested too deeply. Readers guess or convert there, or crash.

    unread: the datasets library could not read the file, so that it may also be that the JSON is broken, a row no
        object, or a column's type another one than in the rows before"""
    where, kinds = None, {}
    try:
        for where, row in _rows(file) if reader_of(file) == "json" else ():
            if fault := isinstance(row, Row) and _row_fault(row, column):
                return f"{where}{fault}"
            if unread and not isinstance(row, Row):
                return f"{where} is JSON, but no object"
            for name, value in row.items() if unread else ():
                first, there = kinds.setdefault(name, (_kind(value), where)) if value is not None else (None, "")
                if first not in (None, _kind(value)) and {first, _kind(value)} != {"int64", "double"}:
                    return f"{where}: column {name!r} holds {_kind(value)}, but {first} on {there}"
    except RecursionError as error:
        return str(error)
    except (Broken, ValueError, EOFError, OSError, zlib.error) as error:  # for the datasets library to read
        return str(error) if unread else None
    return "holds no document" if unread and not where else None


def find_fault(file: str) -> str | None:
    """What is wrong with a file that the datasets library could not read, found by reading it by line."""
    reader, filled, offset = reader_of(file), 0, 0
    if reader in (None, "parquet"):
        return None
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    filled += bool(line.decode().removeprefix("\ufeff").strip())
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{line[error.start]:02x} at offset {offset + error.start}"
                    return f"line {number} is not UTF-8 ({byte}): convert the file to UTF-8"
                offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return "not a whole gzip file"
    if reader == "json":
        return find_bad_row(file, None, unread=True)
    return "holds no document" if filled <= (reader == "csv") else None  # a .csv file has a header


class Row(dict):
    """An object, and a name that stands in it twice."""

    twice: str | None = None


class Broken(Exception):
    """The line, and what is wrong with its JSON."""


def _opened(file: str) -> BinaryIO:
    return (gzip.open if file.lower().endswith(".gz") else open)(file, "rb")


def _row(pairs: list[tuple[str, Any]]) -> Row:
    row = Row(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        row.twice = next(name for name in names if names.count(name) > 1)
    return row


def _rows(file: str) -> Iterator[tuple[str, Any]]:
    """The values in a JSON file, each after its place: one on each line, or spread over a few, or all in one list.
    Raises Broken, and RecursionError, which names the line too, where it is nested too deeply."""
    pending, begin, broken, is_first = "", 1, None, True
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            begin = begin if pending else number
            pending += line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not pending.strip():
                pending = ""
                continue
            if is_first and LIST.match(pending):
                pending += lines.read().decode()
            is_first = False
            try:
                value = json.loads(pending, object_pairs_hook=_row)
            except RecursionError:
                raise RecursionError(f"line {begin} is nested too deeply") from None
            except json.JSONDecodeError as error:
                at = f"line {begin + error.lineno - 1} is broken JSON ({error.msg}, column {error.colno})"
                broken = broken or Broken(at)
                if number - begin < LONGEST_ROW:
                    continue
                raise broken from None
            pending, broken = "", None
            if isinstance(value, list):
                yield from ((f"row {row} of the list", value) for row, value in enumerate(value, start=1))
            else:
                yield f"line {begin}", value
    if broken:
        raise broken


def _row_fault(row: Row, column: str | None) -> str | None:
    if row.twice:
        return f" has the column {row.twice!r} twice"
    if not isinstance(row.get(column, ""), str | None):
        return f": column {column!r} holds {_kind(row[column])}, no text: choose with --text_column"
    for name, text in row.items():
        try:
            str(text).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):x}"
            return f": column {name!r} holds half of a surrogate pair, {half}, which is no character"
    return None


def _kind(value: Any) -> str:
    """A JSON value's type, in the words of Parquet."""
    return next((name for kind, name in KINDS.items() if isinstance(value, kind)), "null")
