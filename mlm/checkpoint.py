"""Checkpoints from which a run goes on as if it had never stopped.

    <output_dir>/checkpoints/step_N/model.safetensors    parameters and buffers
                                    state.pt             optimizer, schedule, scaler; loads with weights_only
                                    experiment.json      the settings that the result depends on
                                    progress.json        step, sums of the records
                              best/                      weights of the lowest evaluation loss, if asked for

The order of chunks, their masks and dropout's draws are functions of (seed, step): no generator is saved.
A checkpoint is written beside its place and renamed, so that a folder named step_N is always whole.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlm.errors import UserError, at_least, one_line

FILES = ("model.safetensors", "state.pt", "experiment.json", "progress.json")


@dataclass(frozen=True)
class CheckpointConfig:
    checkpointing_steps: int | Literal["epoch"] | None = (
        None  # steps between two checkpoints; none: no checkpoint
    )
    resume_from_checkpoint: str | None = None  # `latest`, or the folder of a checkpoint, to go on from

    def __post_init__(self) -> None:
        at_least(self, 1, "checkpointing_steps")


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each parameter and buffer once, by name, tied ones under their first name."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def save(
    folder: Path,
    model: torch.nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler | None,
    experiment: dict[str, Any],
    progress: dict[str, Any],
) -> None:
    """Writes a checkpoint into `folder`, whole or not at all.

    experiment: every setting that the result depends on, as `load` compares it. It and progress are JSON.
    """
    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    with _whole(folder) as partial:
        _save_tensors(partial, model)
        torch.save(state, partial / "state.pt")
        (partial / "experiment.json").write_text(json.dumps(experiment, indent=1))
        (partial / "progress.json").write_text(json.dumps(progress, indent=1))


def find(config: CheckpointConfig, checkpoints: Path) -> Path | None:
    """The checkpoint to go on from; None where none is asked for. Raises UserError where it is not there."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        numbered = steps(checkpoints)
        if not numbered:
            raise UserError(f"--resume_from_checkpoint latest: no checkpoint in {checkpoints}")
        return numbered[max(numbered)]
    folder = Path(config.resume_from_checkpoint)
    if not _has_all(folder):
        raise UserError(f"--resume_from_checkpoint {folder}: no whole checkpoint there")
    return folder


def steps(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints in a folder, by their step; one that lacks a file is none."""
    named = {path.name.removeprefix("step_"): path for path in checkpoints.glob("step_*")}
    return {int(number): path for number, path in named.items() if number.isdigit() and _has_all(path)}


def load(
    folder: Path,
    model: torch.nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler | None,
    experiment: dict[str, Any],
) -> dict[str, Any]:
    """Puts everything back in place as `save` took it; returns the progress.

    Raises UserError where the checkpoint is damaged, or, with the list of differences, another experiment's.
    """
    with _readable(folder):
        saved = json.loads((folder / "experiment.json").read_text())
        differences = [
            f"{name} {experiment.get(name)} (the checkpoint: {saved.get(name)})"
            for name in sorted(saved.keys() | experiment.keys())
            if saved.get(name) != experiment.get(name)
        ]
        if differences:
            raise UserError(
                f"--resume_from_checkpoint {folder}: another experiment, with {', '.join(differences)}"
            )
        load_weights(folder, model)
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        return json.loads((folder / "progress.json").read_text())


def save_best(folder: Path, model: torch.nn.Module, evaluation: dict[str, float]) -> None:
    """Keeps the weights that an evaluation found better than those in `folder`, if it did."""
    if not math.isfinite(evaluation["eval_loss"]) or evaluation["eval_loss"] >= best_loss(folder):
        return
    with _whole(folder) as partial:
        _save_tensors(partial, model)
        (partial / "evaluation.json").write_text(json.dumps(evaluation, indent=1))


def load_best(folder: Path, model: torch.nn.Module, accelerator: Accelerator) -> dict[str, float] | None:
    """Gives every process the kept weights, which the main one reads; returns their evaluation, if any."""
    found: list[Any] = [None]
    with _readable(folder):
        if accelerator.is_main_process and math.isfinite(best_loss(folder)):
            load_weights(folder, model)
            found = [json.loads((folder / "evaluation.json").read_text())]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
        for tensor in tensors(model).values() if found[0] else ():
            torch.distributed.broadcast(tensor, 0)
    return found[0]


def best_loss(folder: Path) -> float:
    """The evaluation loss of the weights kept in `folder`; infinite where there are none."""
    path = folder / "evaluation.json"
    return json.loads(path.read_text())["eval_loss"] if path.is_file() else math.inf


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Puts saved parameters into `model`, in place. Raises UserError where they are another model's."""
    saved = load_file(folder / "model.safetensors")
    own = tensors(model)
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        raise UserError(f"the checkpoint {folder} holds another model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _has_all(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What the libraries raise on a file that is cut or altered becomes one line naming the checkpoint."""
    damage = (OSError, ValueError, KeyError, TypeError, RuntimeError, UnpicklingError, SafetensorError)
    try:
        yield
    except damage as error:
        reason = one_line(f"{type(error).__name__}: {error}", 120)
        raise UserError(f"the checkpoint {folder} is damaged ({reason}); give an earlier one") from error


def _save_tensors(folder: Path, model: torch.nn.Module) -> None:
    save_file({name: t.contiguous() for name, t in tensors(model).items()}, folder / "model.safetensors")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once everything in it is on the disk."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in [*partial.iterdir(), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
