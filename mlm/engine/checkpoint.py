"""Checkpoints from which a run resumes as if it had never stopped.

    <output_dir>/checkpoints/step_N/model.safetensors  parameters and buffers
                                    state.safetensors  all other tensors: optimizers, progress, what a fork adds
                                    state.json         the rest of these states
                                    experiment.json    the settings that the result depends on
                                    manifest.json      size and SHA-256 of each of these files
                              best_N/                  weights of the lowest evaluation loss, if asked for

No file can execute code. No generator's state is saved: order, masks and dropout are functions of (seed, step).
The loop waits for a copy to host memory only. A thread writes it beside its place, syncs and renames it, so that a
folder named step_N is whole; the manifest shows later damage."""

import contextlib
import filecmp
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mlm.engine.distributed import broadcast, on_main
from mlm.engine.experiment import differences
from mlm.errors import UserError, at_least, one_line
from mlm.files import sync, write_json

Files = dict[str, Any]  # name of a file: its tensors by name for .safetensors, a JSON value for .json
PARTIAL = ".partial"  # ends the name of a folder that is being written, or removed
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # another OSError says nothing about a checkpoint
LOOP = {"update", "progress", "before"}  # the loop's own states
COPIES = 2  # in host memory at most: a checkpoint, and the best weights of the same step


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which one a run resumes from."""

    checkpointing_steps: int | Literal["epoch"] | None = None  # Write one every so many steps or each epoch.
    save_total_limit: int | None = None  # Keep only this many of the newest checkpoints (default: all).
    on_save_error: Literal["stop", "continue"] = "stop"  # Choose what a run does when it cannot write one.
    resume_from_checkpoint: str | None = None  # Resume from `latest`, a run or a checkpoint.

    def __post_init__(self) -> None:
        at_least(self, 1, "checkpointing_steps", "save_total_limit")


class Stateful(Protocol):
    """An optimizer, an average of weights, …: its state is tensors and JSON values in dicts, lists and tuples."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each parameter and persistent buffer once, by name, tied ones under their first name."""
    persistent = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in persistent}


def snapshot(model: torch.nn.Module, states: dict[str, Stateful], experiment: dict[str, Any]) -> Files:
    """A copy in host memory of all that a checkpoint holds. The device synchronises here. Raises what `pack` does."""
    stored: dict[str, torch.Tensor] = {}
    packed = {name: pack(state.state_dict(), name, stored) for name, state in states.items()}
    on_host = {"model.safetensors": _on_host(tensors(model)), "state.safetensors": _on_host(stored)}
    return {**on_host, "state.json": packed, "experiment.json": experiment}


def load(
    folder: Path,
    model: torch.nn.Module,
    states: dict[str, Stateful],
    experiment: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Puts everything back as `snapshot` took it, if what is there fits. The main process alone reads it. Raises
    UserError for another experiment's, with the differences, and for states that this run cannot have written."""
    stored: dict[str, torch.Tensor] = {}

    @_resuming(folder)
    def read() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        saved = json.loads((folder / "experiment.json").read_bytes())
        if changed := differences(saved, json.loads(json.dumps(experiment))):
            reason = f"another experiment, with {', '.join(changed)}"
            advice = "give it its settings back, or another --output_dir"
            raise UserError(f"--resume_from_checkpoint {folder}: {reason}; {advice}")
        load_weights(folder, model)
        stored.update(load_file(folder / "state.safetensors"))
        return json.loads((folder / "state.json").read_bytes()), {name: t.to("meta") for name, t in stored.items()}

    packed, forms = on_main(read, accelerator)
    stored = stored or {name: torch.empty_like(form, device="cpu") for name, form in forms.items()}
    broadcast([*tensors(model).values(), *stored.values()], accelerator)
    with _resuming(folder):
        for name, state in states.items():
            saved = _unpack(packed[name], stored)
            if name in LOOP:  # what a fork adds may take any form
                _check_form(saved, state.state_dict(), name)
            state.load_state_dict(saved)
        for name in {"update", "progress"} & states.keys():
            if folder.name != f"step_{states[name].step}":
                raise ValueError(f"{name} is that of step {states[name].step}")


@contextlib.contextmanager
def _resuming(folder: Path) -> Iterator[None]:
    """A context in which a checkpoint of another version, or an altered one, is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise UserError(f"the checkpoint {folder} cannot be resumed ({reason})") from error


def pack(value: Any, name: str, stored: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `stored` under dotted names. Raises UserError for what is neither.
    {"step": 3, 0: (tensor, 0.9)} -> {"dict": [["step", 3], [0, {"tuple": [{"tensor": "name.0.0"}, 0.9]}]]}"""
    if isinstance(value, torch.Tensor):
        name += f" {len(stored)}" * (name in stored)  # keys 0 and "0"
        stored[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, pack(item, f"{name}.{key}", stored)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(item, f"{name}.{i}", stored) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{name} cannot be in a checkpoint: {type(value).__name__} is neither a tensor nor JSON")


def _unpack(packed: Any, stored: dict[str, torch.Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    [(kind, value)] = packed.items()
    if kind == "tensor":
        return stored[value]
    if kind == "dict":
        return {key: _unpack(item, stored) for key, item in value}
    return {"list": list, "tuple": tuple}[kind](_unpack(item, stored) for item in value)


def _check_form(saved: Any, own: Any, name: str) -> None:
    """Raises ValueError where a state has not the keys, shapes, dtypes and kinds of the one that it is to replace.
    What is None or empty before the first step may become anything."""
    if isinstance(own, torch.Tensor):
        if not isinstance(saved, torch.Tensor) or (saved.shape, saved.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{name} is no {own.dtype} {list(own.shape)}")
    elif isinstance(own, dict) and own:
        if saved.keys() != own.keys():
            raise ValueError(f"{name} does not hold just {', '.join(map(str, own))}")
        for key, value in own.items():
            _check_form(saved[key], value, f"{name}.{key}")
    elif isinstance(own, list | tuple):
        for number, pair in enumerate(zip(saved, own, strict=False)):
            _check_form(*pair, f"{name}.{number}")
    elif own is not None:
        kinds = (int, float) if isinstance(own, int | float) and not isinstance(own, bool) else type(own)
        if not isinstance(saved, kinds) or isinstance(saved, bool) != isinstance(own, bool):
            raise ValueError(f"{name} is {saved!r}")


def find(wanted: str | None, checkpoints: Path, accelerator: Accelerator) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, as the main process finds it, and a line for each damaged newer one.

    wanted: None: none; `latest`: the newest in `checkpoints`, or none where there is not one yet, so that one command
        serves a job's first start and all others; a run: its newest; a checkpoint: that one, or the intact one before

    Raises UserError where all are damaged, or a path holds none."""

    def found() -> tuple[Path | None, list[str]]:
        try:
            return (None, []) if wanted is None else _find(wanted, checkpoints)
        except UserError as error:
            raise UserError(f"--resume_from_checkpoint {wanted}: {error}") from error

    return on_main(found, accelerator)


def _find(wanted: str, checkpoints: Path) -> tuple[Path | None, list[str]]:
    last = math.inf
    if wanted != "latest":
        folder = Path(os.path.realpath(wanted))  # of a loop of links too
        if not folder.is_dir():
            raise UserError("no such folder")
        checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        if folder in steps(folder.parent).values():
            checkpoints, last = folder.parent, int(folder.name[5:])
    passed_over = []
    for _, path in sorted((step, path) for step, path in steps(checkpoints).items() if step <= last)[::-1]:
        if not (damage := damaged(path)):
            return path, [f"{line}, so it is passed over" for line in passed_over]
        passed_over.append(f"the checkpoint {path} is damaged ({damage})")
    if passed_over:
        raise UserError(f"no intact checkpoint; {passed_over[0]}")
    if wanted != "latest":
        raise UserError(f"no checkpoint in {checkpoints}")
    return None, []


def steps(checkpoints: Path, kind: Literal["step", "best"] = "step") -> dict[int, Path]:
    """The checkpoints in a folder, or the best weights, by their step, whole or not."""
    folders = [path for path in checkpoints.glob(f"{kind}_*") if path.is_dir()]
    return {int(path.name[5:]): path for path in folders if re.fullmatch(rf"{kind}_[0-9]+", path.name)}


def damaged(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, by its manifest; None: nothing. Raises UserError if that is unknown."""
    try:
        for name, written in json.loads((folder / "manifest.json").read_bytes()).items():
            if (folder / name).stat().st_size != written["bytes"]:
                return f"{name} has another size"
            if _digest(folder / name) != written["sha256"]:
                return f"{name} is altered"
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, GONE):
            raise UserError(f"the checkpoint {folder} cannot be read ({error.strerror})") from error
        return one_line(f"{type(error).__name__}: {error}", 120)
    return None


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Puts saved parameters into `model`, in place. Raises UserError where they are another model's."""
    saved, own = load_file(folder / "model.safetensors"), tensors(model)
    form = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
    if form != {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}:
        raise UserError(f"the checkpoint {folder} holds another model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


class Writer:
    """Writes checkpoints to `folder`, one at a time, in a thread, and keeps the newest `keep` of them (None: all).

    stops: nothing is written after a failure, so that a checkpoint is there only with the best weights before it"""

    def __init__(self, folder: Path, keep: int | None = None, stops: bool = False) -> None:
        self.folder, self.keep, self.stops = folder, keep, stops
        self.failure: str | None = None  # why a checkpoint could not be written
        self._failed = False
        self.best_loss, self.best_step = math.inf, -1  # of the weights that `save_best` had to keep last
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future] = deque(maxlen=COPIES)

    def save(self, step: int, take: Callable[[], Files]) -> None:
        """Writes what `take` copies to host memory, as soon as there is memory for it."""
        self._submit(f"step_{step}", take)

    def save_best(self, step: int, model: torch.nn.Module, evaluation: dict[str, float]) -> None:
        """Keeps the weights if their `eval_loss` is lower than all before."""
        if evaluation["eval_loss"] < self.best_loss:
            self.best_loss, self.best_step = evaluation["eval_loss"], step
            best = {"evaluation.json": evaluation}
            self._submit(f"best_{step}", lambda: best | {"model.safetensors": _on_host(tensors(model))})

    def remember_best(self, checkpoints: Path) -> None:
        """Takes over the best weights of the run that is resumed, to another directory too."""
        if best := find_best(checkpoints):
            self.best_loss = best[1]["eval_loss"]
            files = {"model.safetensors": load_file(best[0] / "model.safetensors"), "evaluation.json": best[1]}
            self._submit(best[0].name, lambda: files)

    def wait(self) -> str | None:
        """What `take_failure` returns, when nothing is being written any more."""
        for pending in self._pending:
            pending.result()
        return self.take_failure()

    def take_failure(self) -> str | None:
        """Why a checkpoint could not be written, once; None: none has failed since the last call."""
        failure, self.failure = self.failure, None
        return failure

    def _submit(self, name: str, take: Callable[[], Files]) -> None:
        if len(self._pending) == COPIES:
            self._pending[0].result()
        self._pending.append(self._thread.submit(self._write, self.folder / name, take()))

    def _write(self, place: Path, files: Files) -> None:
        if self._failed and self.stops:
            return
        try:
            write(place, files)
            if place.name.startswith("best_"):
                remove(*(best for best in steps(self.folder, "best").values() if best != place))
            elif self.keep is not None:
                remove(*(path for _, path in sorted(steps(self.folder).items())[: -self.keep]))
        except (OSError, SafetensorError) as error:
            self._failed = True
            self.failure = f"{place} could not be written: {one_line(getattr(error, 'strerror', None) or error)}"

    def close(self) -> None:
        """Returns when a checkpoint that has been begun is finished, whatever ends the run."""
        self._thread.shutdown()


def not_written(failure: str | None, checkpoints: Path) -> UserError:
    """The end of a run that cannot write a checkpoint; None on the processes that do not write."""
    earlier = "earlier ones are intact" if steps(checkpoints) else "there is no earlier one"
    return UserError(f"{failure or 'a checkpoint could not be written'}; {earlier}")


def write(place: Path, files: Files) -> None:
    """Writes a folder and its manifest, whole or not at all. Raises OSError, or SafetensorError for one."""
    # A run that is stopped right after it was resumed has the same to write: a kill while replacing would leave none.
    if place.is_dir() and not damaged(place):
        return
    partial = place.with_name(f"{place.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in files.items():
            if name.endswith(".json"):
                write_json(partial / name, content)
            else:
                save_file(content, partial / name, metadata={"format": "pt"})  # as save_pretrained does
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in partial.iterdir()}
        write_json(partial / "manifest.json", manifest)
        for path in [*partial.iterdir(), partial]:
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what it has taken of a full disk
        raise
    remove(place)
    partial.rename(place)
    sync(place.parent)


def share_weights(folder: Path, model: Path) -> None:
    """Makes a checkpoint's weights and a saved model's one file, where they are the same to the byte."""
    mine, saved = folder / "model.safetensors", model / "model.safetensors"
    with contextlib.suppress(OSError):  # no such checkpoint; a file system without hard links
        if filecmp.cmp(mine, saved, shallow=False):
            beside = model / "linked"
            os.link(mine, beside)
            beside.replace(saved)  # neither changes through the other: no file is written in place


def outdated(checkpoints: Path, after: int = -1) -> list[Path]:
    """The checkpoints of steps later than `after`, and what killed writers left; all by default."""
    partial = re.compile(rf"(step|best)_[0-9]+(\.(old|partial))*{re.escape(PARTIAL)}")
    left = [path for path in checkpoints.glob(f"*{PARTIAL}") if partial.fullmatch(path.name)]
    later = [path for step, path in steps(checkpoints).items() if step > after]
    return [*later, *left, *(steps(checkpoints, "best").values() if after < 0 else ())]


def find_best(checkpoints: Path) -> tuple[Path, dict[str, float]] | None:
    """The intact weights of the lowest evaluation loss, and that evaluation; of two, where a kill came between."""
    intact = [path for path in steps(checkpoints, "best").values() if not damaged(path)]
    evaluated = [(path, json.loads((path / "evaluation.json").read_bytes())) for path in intact]
    return min(evaluated, key=lambda kept: kept[1]["eval_loss"], default=None)


def _on_host(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in named.items()}


def remove(*folders: Path) -> None:
    """Removes folders so that none is ever half-removed under its name."""
    for folder in folders:
        doomed = folder if folder.suffix == PARTIAL else folder.with_name(f"{folder.name}.old{PARTIAL}")
        shutil.rmtree(doomed, ignore_errors=True)
        if folder.is_dir():
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
