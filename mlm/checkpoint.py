"""Checkpoints from which a run goes on as if it had never stopped.

    <output_dir>/checkpoints/step_N/model.safetensors    parameters and buffers
                                    state.pt             optimizer, schedule, scaler; loads with weights_only
                                    progress.json        step, sums of the records

The order of chunks, their masks and dropout's draws are functions of (seed, step): no generator is saved.
A checkpoint is written beside its place and renamed, so that a folder named step_N is always whole.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlm.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    checkpointing_steps: int | Literal["epoch"] | None = (
        None  # write a checkpoint every so many steps, or each epoch
    )
    resume_from_checkpoint: str | None = None  # `latest`, or the folder of a checkpoint, to go on from

    def __post_init__(self) -> None:
        if isinstance(self.checkpointing_steps, int) and self.checkpointing_steps < 1:
            raise UserError(f"--checkpointing_steps {self.checkpointing_steps}: at least 1")


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Each parameter and buffer once, by name, tied ones under their first name."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def save(
    folder: Path,
    model: torch.nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler | None,
    progress: dict[str, Any],
) -> None:
    """Writes a checkpoint into `folder`, whole or not at all. progress: what JSON takes."""
    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    with _whole(folder) as partial:
        _save_tensors(partial, model)
        torch.save(state, partial / "state.pt")
        (partial / "progress.json").write_text(json.dumps(progress, indent=1))


def save_weights(folder: Path, model: torch.nn.Module) -> None:
    """Writes the parameters alone, whole or not at all."""
    with _whole(folder) as partial:
        _save_tensors(partial, model)


def find(config: CheckpointConfig, checkpoints: Path) -> Path | None:
    """The checkpoint to go on from; None where none is asked for. Raises UserError where it is not there."""
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        steps = [p for p in checkpoints.glob("step_*") if p.name.removeprefix("step_").isdigit()]
        if not steps:
            raise UserError(f"--resume_from_checkpoint latest: no checkpoint in {checkpoints}")
        return max(steps, key=lambda p: int(p.name.removeprefix("step_")))
    folder = Path(config.resume_from_checkpoint)
    if not all((folder / name).is_file() for name in ("model.safetensors", "state.pt", "progress.json")):
        raise UserError(f"--resume_from_checkpoint {folder}: no whole checkpoint there")
    return folder


def load(
    folder: Path,
    model: torch.nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler | None,
) -> dict[str, Any]:
    """Puts everything back in place as `save` took it; returns the progress."""
    load_weights(folder, model)
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    return json.loads((folder / "progress.json").read_text())


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Puts saved parameters into `model`, in place. Raises UserError where they are another model's."""
    saved = load_file(folder / "model.safetensors")
    own = tensors(model)
    if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
        raise UserError(f"the checkpoint {folder} holds another model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


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
