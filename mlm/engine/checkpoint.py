"""Checkpoints from which a run goes on as if it had never stopped.

    <output_dir>/checkpoints/step_N/model.safetensors      parameters and buffers
                                    optimizer.safetensors  its moments
                                    state.json             the rest of it, the schedule, fp16's scaler
                                    experiment.json        the settings that the result depends on
                                    before.safetensors     the predictions of before the first step, if any
                                    progress.json          the step, sums of the records
                                    manifest.json          size and SHA-256 of each of these files
                              best_N/                      weights of the lowest evaluation loss, if asked for

No file can execute code. The order of chunks, their masks and dropout's draws are functions of (seed, step),
both in it: that is all the state that generators have here.

The loop waits for a copy to host memory (and where two are still being written, for the first of them); a
thread writes it beside its place, syncs it and renames it, so that a folder named step_N is whole, whatever
happens. What happens to it later, its manifest tells.
"""

import hashlib
import json
import math
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlm.errors import UserError, at_least, one_line
from mlm.evaluation.evaluate import Evaluation
from mlm.files import sync

Files = dict[str, Any]  # name of a file: its tensors by name for .safetensors, a JSON value for .json
PARTIAL = ".partial"  # ends the name of a folder that is being written, or removed
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
COPIES = 2  # in host memory at most: a checkpoint, and the best weights of the same step


@dataclass(frozen=True)
class CheckpointConfig:
    checkpointing_steps: int | Literal["epoch"] | None = None  # steps between checkpoints (default: none)
    save_total_limit: int | None = None  # keep the newest checkpoints only, this many (default: all)
    on_save_error: Literal["stop", "continue"] = "stop"  # what a run does when it cannot write one
    resume_from_checkpoint: str | None = None  # `latest`, a run directory or a checkpoint, to go on from

    def __post_init__(self) -> None:
        at_least(self, 1, "checkpointing_steps", "save_total_limit")


class State(NamedTuple):
    """What changes with each step, besides the step itself."""

    model: torch.nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler | None


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides weights and optimizer."""

    step: int = 0  # updates that were applied
    nats: float = 0.0  # training loss, summed over the masked tokens of all steps
    masked: int = 0  # ... and their number
    tokens: int = 0  # that went through the model, padding not counted
    seconds: float = 0.0  # spent in training steps
    saving: float = 0.0  # seconds in which the loop stood still for checkpoints
    skipped: int = 0  # steps that fp16's scaler made us take again
    micro_batch: dict[str, int] = field(default_factory=dict)  # what `auto` has found, by number of processes
    evaluated: bool = False  # whether the current weights have been evaluated


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each parameter and buffer once, by name, tied ones under their first name."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def snapshot(
    state: State,
    experiment: dict[str, Any],
    progress: dict[str, Any],
    before: dict[str, Evaluation] | None = None,
) -> Files:
    """A copy in host memory of all that a checkpoint holds. The device synchronises here.

    experiment: every setting that the result depends on, as `load` compares it. It and progress are JSON.
    before: the evaluations before the first step, by text, which a resumed run compares its own with
    """
    optimizer = state.optimizer.state_dict()
    moments, rest = {}, {}
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            (moments if isinstance(value, torch.Tensor) else rest)[f"{index}.{name}"] = value
    predictions = {
        f"{text}.{column}": torch.from_numpy(values)
        for text, evaluation in (before or {}).items()
        for column, values in evaluation._asdict().items()
    }
    return {
        **({"before.safetensors": predictions} if predictions else {}),
        "model.safetensors": _on_host(tensors(state.model)),
        "optimizer.safetensors": _on_host(moments),
        "state.json": {
            "optimizer": {"state": rest, "param_groups": optimizer["param_groups"]},
            "scheduler": state.scheduler.state_dict(),
            "scaler": state.scaler and state.scaler.state_dict(),
        },
        "experiment.json": experiment,
        "progress.json": progress,
    }


def load(folder: Path, state: State, experiment: dict[str, Any]) -> Progress:
    """Puts everything back in place as `snapshot` took it; returns the progress.

    Raises UserError where the checkpoint is another experiment's, with the list of differences.
    """
    with _readable(folder):
        saved = _read_json(folder / "experiment.json")
        differences = [
            f"{name} {experiment.get(name)} (the checkpoint: {saved.get(name)})"
            for name in sorted(saved.keys() | experiment.keys())
            if saved.get(name) != experiment.get(name)
        ]
        if differences:
            raise UserError(
                f"--resume_from_checkpoint {folder}: another experiment, with {', '.join(differences)}; give "
                "it its settings back, or another --output_dir"
            )
        load_weights(folder, state.model)
        described = _read_json(folder / "state.json")
        optimizer: dict[str, Any] = {**described["optimizer"], "state": {}}
        moments = load_file(folder / "optimizer.safetensors")
        for key, value in {**moments, **described["optimizer"]["state"]}.items():
            index, name = key.split(".", 1)
            optimizer["state"].setdefault(int(index), {})[name] = value
        state.optimizer.load_state_dict(optimizer)
        state.scheduler.load_state_dict(described["scheduler"])
        if state.scaler is not None and described["scaler"] is not None:
            state.scaler.load_state_dict(described["scaler"])
        return Progress(**_read_json(folder / "progress.json"))


def load_before(folder: Path) -> dict[str, Evaluation]:
    """The evaluations before the first step, by text, that `snapshot` was given."""
    if not (folder / "before.safetensors").exists():
        return {}
    with _readable(folder):
        saved = {name: tensor.numpy() for name, tensor in load_file(folder / "before.safetensors").items()}
        texts = {name.rpartition(".")[0] for name in saved}
        return {t: Evaluation(*(saved[f"{t}.{column}"] for column in Evaluation._fields)) for t in texts}


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
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    folder, passed_over, mistake = found
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
        self._submit(self.folder / f"step_{step}", take, self._remove_old)

    def save_best(self, step: int, model: torch.nn.Module, evaluation: dict[str, float]) -> None:
        """Keeps the weights that an evaluation found better than all before, if it did."""
        if not evaluation["eval_loss"] < self.best_loss:
            return
        self.best_loss = evaluation["eval_loss"]
        self._submit_best(
            f"best_{step}",
            lambda: {"model.safetensors": _on_host(tensors(model)), "evaluation.json": evaluation},
        )

    def remember_best(self, checkpoints: Path) -> None:
        """What the run that is gone on with has kept counts; it comes along to another directory."""
        if best := find_best(checkpoints):
            folder, evaluation = best
            self.best_loss = evaluation["eval_loss"]
            if checkpoints.resolve() != self.folder.resolve():
                weights = load_file(folder / "model.safetensors")
                self._submit_best(
                    folder.name, lambda: {"model.safetensors": weights, "evaluation.json": evaluation}
                )

    def wait(self) -> str | None:
        """Returns when nothing is being written any more, as `take_failure` does."""
        self._wait_for_all_but(0)
        return self.take_failure()

    def take_failure(self) -> str | None:
        """Why a checkpoint could not be written, told once; None: none has failed since the last time."""
        failure, self._failure = self._failure, None
        return failure

    def _submit_best(self, name: str, take: Callable[[], Files]) -> None:
        def remove_others() -> None:
            _remove(*(best for best in bests(self.folder) if best.name != name))

        self._submit(self.folder / name, take, remove_others)

    def _submit(self, place: Path, take: Callable[[], Files], afterwards: Callable[[], None]) -> None:
        self._wait_for_all_but(COPIES - 1)
        self._pending.append(self._thread.submit(self._write, place, take(), afterwards))

    def _wait_for_all_but(self, few: int) -> None:
        while len(self._pending) > few:
            self._pending.popleft().result()

    def _write(self, place: Path, files: Files, afterwards: Callable[[], None]) -> None:
        try:
            write(place, files)
            afterwards()
        except (OSError, SafetensorError) as error:
            self._failure = (
                f"{place} could not be written: {one_line(getattr(error, 'strerror', None) or error)}"
            )

    def _remove_old(self) -> None:
        if self.keep is not None:
            numbered = steps(self.folder)
            _remove(*(numbered[step] for step in sorted(numbered)[: -self.keep]))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # a checkpoint that has been begun is finished, whatever ends the run


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
            save_file(content, path) if path.suffix == ".safetensors" else _write_json(path, content)
            manifest[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        _write_json(partial / "manifest.json", manifest)
        for path in [*partial.iterdir(), partial]:
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what it has taken of a full disk
        raise
    _remove(place)
    partial.rename(place)
    sync(place.parent)


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


def load_best(checkpoints: Path, model: torch.nn.Module, accelerator: Accelerator) -> dict[str, float] | None:
    """Gives every process the kept weights, which the main one reads; returns their evaluation, if any."""
    found: list[Any] = [None]
    if accelerator.is_main_process and (best := find_best(checkpoints)):
        load_weights(best[0], model)
        found = [best[1]]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
        for tensor in tensors(model).values() if found[0] else ():
            torch.distributed.broadcast(tensor, 0)
    return found[0]


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What the libraries raise on files that fit their manifest and no run: those of another version, say."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = one_line(f"{type(error).__name__}: {error}", 120)
        raise UserError(f"the checkpoint {folder} cannot be gone on from ({reason})") from error


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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
