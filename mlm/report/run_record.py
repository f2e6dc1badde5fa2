"""What a run directory holds, read without torch: a run that has ended, or is under way."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm.errors import UserError, one_line

Rows = list[dict[str, Any]]

ABOUT = ("configuration", "experiment", "environment")  # objects in a run.json


@dataclass(frozen=True)
class RunRecord:
    """A run directory. A run that has not ended has no results and no comparison."""

    folder: Path
    name: str
    number: int  # its place on the page, and so its colour
    about: dict[str, Any]  # run.json
    results: dict[str, Any]  # all_results.json
    comparison: dict[str, Any]  # comparison.json
    train: Rows  # events of metrics.jsonl
    evaluations: Rows
    seconds: float | None  # from the start to the last event, all training of a resumed run included
    examples: Rows | None  # of fill_mask.json; None: it has none, or those of other results


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Reads run directories, and names them so that they can be told apart. Raises UserError where one holds no run, a
    file of it is damaged, or it is named twice."""
    runs = []
    for folder, name in zip(folders, _names(folders), strict=True):
        with files_of(folder):
            runs.append(_read(folder, name, len(runs)))
    return runs


@contextmanager
def files_of(*folders: Path) -> Iterator[None]:
    """A context in which JSON that is not what a run has written raises UserError, whatever it leads to."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        named, reason = ", ".join(map(str, folders)), one_line(f"{type(error).__name__}: {error}", 150)
        raise UserError(f"{named}: files of a run that are altered, or of another version ({reason})") from error


def _read(folder: Path, name: str, number: int) -> RunRecord:
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} holds no run.json; name the --output_dir of a training run")
    about = _read_about(folder / "run.json")
    files = ("all_results", "comparison", "fill_mask")
    all_results, comparison, kept = (read_object(folder / f"{file}.json") for file in files)
    results = {n: v for n, v in all_results.items() if v is None or isinstance(v, int | float)}
    events = read_events(folder / "metrics.jsonl")
    train, evaluations = ([e for e in events if e["event"] == kind] for kind in ("train", "eval"))
    clocks = [e["seconds"] for e in events if "seconds" in e][-1:]
    seconds = max([*clocks, *filter(None, [results.get("train_seconds")])], default=None)
    examples = kept["sentences"] if kept.get("results") == results else None
    return RunRecord(folder, name, number, about, results, comparison, train, evaluations, seconds, examples)


def _read_about(path: Path) -> dict[str, Any]:
    """What run.json holds. Raises UserError where it is none that this program writes."""
    about = read_object(path)
    lacks = [part for part in ABOUT if not isinstance(about.get(part), dict)]
    lacks = lacks or [part for part in ("model", "corpus") if part not in about["configuration"]]
    if lacks:
        raise UserError(f"{path} is damaged, or of another version or program: it lacks {', '.join(lacks)}")
    return about


def holds_run(folder: Path) -> bool:
    """Whether a folder has a run.json, and it is one that this program writes."""
    with suppress(UserError):
        return bool(_read_about(folder / "run.json"))
    return False


def recorded_files(folder: Path) -> list[str]:
    """The names, without folders, of the files of the model that a run has saved, as its run.json has them."""
    names = read_object(folder / "run.json").get("files", [])
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and name == Path(name).name]


def read_events(path: Path) -> Rows:
    """The lines of metrics.jsonl, each with an "event" and a "step", without those that are damaged."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):  # the line that a running, or killed, run was writing
            events.append(json.loads(line))
    return [e for e in events if isinstance(e, dict) and "event" in e and isinstance(e.get("step"), int)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("a run is named twice")
    names = [path.name for path in paths]
    common = os.path.commonpath(paths)
    return names if len(set(names)) == len(names) else [os.path.relpath(path, common) for path in paths]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return value
