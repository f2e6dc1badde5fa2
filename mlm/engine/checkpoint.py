"""Checkpoints from which a run resumes as if it had never stopped.

    <output_dir>/checkpoints/step_N/model.safetensors      parameters and buffers
                                    state.safetensors      tensors of all else: optimizers, progress, the
                                                           evaluations at the start, what a fork adds
                                    state.json             the rest of it
                                    experiment.json        the settings that the result depends on
                                    manifest.json          size and SHA-256 of each of these files
                              best_N/                      weights of the lowest evaluation loss, if asked for

No file can execute code. The order of chunks, their masks and dropout's draws are functions of (seed, step), so
that no generator's state is saved. The loop waits for a copy to host memory (and where two are still being written,
for the first of them); a thread writes it beside its place, syncs and renames it, so that a folder named step_N is
whole. Its manifest shows later damage.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mlm.engine.distributed import from_main
from mlm.engine.experiment import differences
from mlm.errors import UserError, at_least, one_line
from mlm.files import sync, write_json

Files = dict[str, Any]  # name of a file: its tensors by name for .safetensors, a JSON value for .json
PARTIAL = ".partial"  # ends the name of a folder that is being written, or removed
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
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
    """What a checkpoint can hold beside the weights: an optimizer, an average of weights, a generator, …"""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values, nested in dicts, lists and tuples."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Puts back what `state_dict` gave."""


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each parameter and persistent buffer once, by name, tied ones under their first name."""
    persistent = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in persistent}


def snapshot(model: torch.nn.Module, states: dict[str, Stateful], experiment: dict[str, Any]) -> Files:
    """A copy in host memory of all that a checkpoint holds. The device synchronises here.

    experiment: every setting that the result depends on, as `load` compares it: a JSON value

    Raises UserError where a state is neither tensors nor JSON.
    """
    found: dict[str, torch.Tensor] = {}
    packed = {name: _pack(state.state_dict(), name, found) for name, state in states.items()}
    return {
        "model.safetensors": _on_host(tensors(model)),
        "state.safetensors": _on_host(found),
        "state.json": packed,
        "experiment.json": experiment,
    }


def load(folder: Path, model: torch.nn.Module, states: dict[str, Stateful], experiment: dict[str, Any]) -> None:
    """Puts everything back in place as `snapshot` took it.

    Raises UserError where the checkpoint is another experiment's, with the list of differences.
    """
    try:
        saved = _read_json(folder / "experiment.json")
        if changed := differences(saved, json.loads(json.dumps(experiment))):
            raise UserError(
                f"--resume_from_checkpoint {folder}: another experiment, with {', '.join(changed)}; give "
                "it its settings back, or another --output_dir"
            )
        load_weights(folder, model)
        packed, found = _read_json(folder / "state.json"), load_file(folder / "state.safetensors")
        for name, state in states.items():
            state.load_state_dict(_unpack(packed[name], found))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:  # of another version
        reason = one_line(f"{type(error).__name__}: {error}", 120)
        raise UserError(f"the checkpoint {folder} cannot be resumed ({reason})") from error


def _pack(value: Any, name: str, found: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `found` under dotted names; `_unpack` is the way back.

    {"step": 3, 0: (tensor, 0.9)} -> {"dict": [["step", 3], [0, {"tuple": [{"tensor": "name.0.0"}, 0.9]}]]}
    """
    if isinstance(value, torch.Tensor):
        found[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}.{key}", found)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(item, f"{name}.{i}", found) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{name} cannot be in a checkpoint: {type(value).__name__} is neither a tensor nor JSON")


def _unpack(packed: Any, found: dict[str, torch.Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    [(kind, value)] = packed.items()
    if kind == "tensor":
        return found[value]
    if kind == "dict":
        return {key: _unpack(item, found) for key, item in value}
    items = [_unpack(item, found) for item in value]
    return items if kind == "list" else tuple(items)


def find(wanted: str | None, checkpoints: Path, accelerator: Accelerator) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a line for each newer one that is passed over because it is damaged.

    wanted: `latest` is the newest in `checkpoints`, or none where there is not one yet, so that one command
        serves a job's first start and all others; a run directory is its newest; a checkpoint is that one.
        Where it is damaged, it is the intact one before it. None: no checkpoint.

    The main process looks, and tells the others. Raises UserError where all are damaged, or `wanted` is none.
    """
    found: list[Any] = [None, [], None]
    if wanted is not None and accelerator.is_main_process:
        try:
            found = _find(wanted, checkpoints)
        except UserError as error:
            found = [None, [], str(error)]
    folder, passed_over, mistake = from_main(found, accelerator)
    if mistake:
        raise UserError(f"--resume_from_checkpoint {wanted}: {mistake}")
    return folder, passed_over


def _find(wanted: str, checkpoints: Path) -> list[Any]:
    last = math.inf
    if wanted != "latest":
        folder = Path(wanted).resolve()
        if not folder.is_dir():
            return [None, [], "no such folder"]
        if (step := _number(folder)) is not None:
            checkpoints, last = folder.parent, step
        else:
            checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    candidates = {step: path for step, path in steps(checkpoints).items() if step <= last}
    passed_over = []
    for step in sorted(candidates, reverse=True):
        damage = damaged(candidates[step])
        if not damage:
            return [candidates[step], passed_over, None]
        passed_over.append(f"the checkpoint {candidates[step]} is damaged ({damage}), so it is passed over")
    if passed_over:
        return [None, [], f"no intact checkpoint; {passed_over[0].removesuffix(', so it is passed over')}"]
    return [None, [], None if wanted == "latest" else f"no checkpoint in {checkpoints}"]


def _number(folder: Path) -> int | None:
    """7 for a folder named step_7."""
    named = re.fullmatch(r"step_(\d+)", folder.name, re.ASCII)
    return int(named[1]) if named else None


def steps(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints in a folder, by their step, whole or not."""
    named = ((_number(path), path) for path in checkpoints.glob("step_*") if path.is_dir())
    return {step: path for step, path in named if step is not None}


def damaged(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, by its manifest; None where they are as they were written.

    Raises UserError where they cannot be read just now, which says nothing about them.
    """
    try:
        manifest = _read_json(folder / "manifest.json")
        for name, written in manifest.items():
            if (folder / name).stat().st_size != written["bytes"]:
                return f"{name} has another size"
        for name, written in manifest.items():
            if _digest(folder / name) != written["sha256"]:
                return f"{name} is altered"
    except (*MISSING, ValueError, KeyError, TypeError, AttributeError) as error:
        return one_line(f"{type(error).__name__}: {error}", 120)
    except OSError as error:
        raise UserError(f"the checkpoint {folder} cannot be read ({error.strerror})") from error
    return None


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Puts saved parameters into `model`, in place. Raises UserError where they are another model's."""
    saved = load_file(folder / "model.safetensors")
    own = tensors(model)
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        raise UserError(f"the checkpoint {folder} holds another model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


class Writer:
    """Writes checkpoints, one at a time, in a thread of the process that has them to write.

    folder: <output_dir>/checkpoints
    keep: checkpoints of steps that are kept, the newest ones; None: all
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder, self.keep = folder, keep
        self._failure: str | None = None
        self.best_loss = math.inf  # of the weights that `save_best` has kept
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future] = deque()

    def save(self, step: int, take: Callable[[], Files]) -> None:
        """Has a checkpoint written that `take` copies to host memory, as soon as there is room for it."""
        self._submit(f"step_{step}", take)

    def save_best(self, step: int, model: torch.nn.Module, evaluation: dict[str, float]) -> None:
        """Keeps the weights that an evaluation found better than all before, if it did."""
        if not evaluation["eval_loss"] < self.best_loss:
            return
        self.best_loss = evaluation["eval_loss"]
        self._submit(
            f"best_{step}", lambda: {"model.safetensors": _on_host(tensors(model)), "evaluation.json": evaluation}
        )

    def remember_best(self, checkpoints: Path) -> None:
        """Takes over the best weights of the run that is resumed, to another directory too."""
        if best := find_best(checkpoints):
            folder, evaluation = best
            self.best_loss = evaluation["eval_loss"]
            if checkpoints.resolve() != self.folder.resolve():
                weights = load_file(folder / "model.safetensors")
                self._submit(folder.name, lambda: {"model.safetensors": weights, "evaluation.json": evaluation})

    def wait(self) -> str | None:
        """Returns when nothing is being written any more, as `take_failure` does."""
        self._wait_for_all_but(0)
        return self.take_failure()

    def take_failure(self) -> str | None:
        """Why a checkpoint could not be written, told once; None: none has failed since the last time."""
        failure, self._failure = self._failure, None
        return failure

    def _submit(self, name: str, take: Callable[[], Files]) -> None:
        self._wait_for_all_but(COPIES - 1)
        self._pending.append(self._thread.submit(self._write, self.folder / name, take()))

    def _wait_for_all_but(self, few: int) -> None:
        while len(self._pending) > few:
            self._pending.popleft().result()

    def _write(self, place: Path, files: Files) -> None:
        try:
            write(place, files)
            if _number(place) is None:  # the best weights
                _remove(*(best for best in bests(self.folder) if best != place))
            elif self.keep is not None:
                numbered = steps(self.folder)
                _remove(*(numbered[step] for step in sorted(numbered)[: -self.keep]))
        except (OSError, SafetensorError) as error:
            self._failure = f"{place} could not be written: {one_line(getattr(error, 'strerror', None) or error)}"

    def close(self) -> None:
        """Returns when a checkpoint that has been begun is finished, whatever ends the run."""
        self._thread.shutdown()


def not_written(failure: str | None) -> UserError:
    """The end of a run that cannot write a checkpoint; None on the processes that do not write."""
    return UserError(f"{failure or 'a checkpoint could not be written'}; earlier ones are intact")


def write(place: Path, files: Files) -> None:
    """Writes a folder and its manifest, whole or not at all.

    An intact one of that name stays: a run that was resumed from it and is stopped before its next step has
    the same to write, and a kill between removing and renaming would leave none. Raises OSError, or
    SafetensorError where its library meets one.
    """
    if place.is_dir() and not damaged(place):
        return
    partial = place.with_name(f"{place.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = {}
        for name, content in files.items():
            path = partial / name
            if path.suffix == ".json":
                write_json(path, content)
            else:
                save_file(content, path, metadata={"format": "pt"})  # as save_pretrained does
            manifest[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        write_json(partial / "manifest.json", manifest)
        for path in [*partial.iterdir(), partial]:
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what it has taken of a full disk
        raise
    _remove(place)
    partial.rename(place)
    sync(place.parent)


def share_weights(folder: Path, model: Path) -> None:
    """Makes a checkpoint's weights and a saved model's one file, where they are the same to the byte.

    Nothing here writes into a file under its name, so that neither can change through the other.
    """
    mine, saved = folder / "model.safetensors", model / "model.safetensors"
    with contextlib.suppress(OSError):  # no such checkpoint; a file system without hard links
        if mine.stat().st_size == saved.stat().st_size and _digest(mine) == _digest(saved):
            saved.unlink()
            os.link(mine, saved)


def clear(checkpoints: Path, after: int = -1) -> None:
    """Removes the checkpoints of steps later than `after`, and what killed writers left; all by default."""
    _remove(*(path for step, path in steps(checkpoints).items() if step > after))
    _remove(*(checkpoints.glob(f"*{PARTIAL}")), *(bests(checkpoints) if after < 0 else ()))


def bests(checkpoints: Path) -> list[Path]:
    """Where weights of the lowest evaluation loss are kept: one folder, or two where a kill came between."""
    return [path for path in checkpoints.glob("best_*") if not path.name.endswith(PARTIAL)]


def find_best(checkpoints: Path) -> tuple[Path, dict[str, float]] | None:
    """The intact weights of the lowest evaluation loss, and that evaluation."""
    intact = [path for path in bests(checkpoints) if not damaged(path)]
    found = [(path, _read_json(path / "evaluation.json")) for path in intact]
    return min(found, key=lambda kept: kept[1]["eval_loss"], default=None)


def load_best(checkpoints: Path, model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Gives every process the weights of the lowest evaluation loss, if they were kept: the main one reads them."""
    best = find_best(checkpoints) if accelerator.is_main_process else None
    if best:
        load_weights(best[0], model)
    if from_main(bool(best), accelerator) and accelerator.num_processes > 1:
        for tensor in tensors(model).values():
            torch.distributed.broadcast(tensor, 0)


def _on_host(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in named.items()}


def _remove(*folders: Path) -> None:
    """Removes folders so that none is ever found half-removed under its name."""
    for folder in folders:
        if folder.name.endswith(PARTIAL):
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            doomed = folder.with_name(f"{folder.name}.old{PARTIAL}")
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
