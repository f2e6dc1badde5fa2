"""How a global batch is cut into passes through the model: a matter of memory, not of the result.

    passes of a process = ceil(ceil(global batch / processes) / micro-batch)

accelerate's `find_executable_batch_size` halves and tries again in one process alone, while the others wait
for it in a reduction. Here the loop tries, all processes agree on how it went, and `smaller` halves for all.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size

from mlm.errors import UserError, at_least


@dataclass(frozen=True)
class UpdateConfig:
    """One optimizer step: its global batch, and how that is cut."""

    train_batch_size: int | None = None  # chunks a step (default: the next two flags × processes)
    per_device_train_batch_size: int | Literal["auto"] = 8  # chunks in a micro-batch; auto: as many as fit
    gradient_accumulation_steps: int = 1  # micro-batches a step, where --train_batch_size is not given
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it; 0: never

    def __post_init__(self) -> None:
        at_least(self, 1, "train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        at_least(self, 0, "max_grad_norm")


AUTO_ON_CPU = 2048  # tokens; larger passes leave the caches: at 8,192 a small BERT was 1.4 times as slow


def global_batch(
    train_batch_size: int | None, per_device: int | str, accumulation: int, processes: int
) -> int:
    """Chunks a step: what the experiment says, or what the old flags come to on this many processes."""
    if train_batch_size:
        return train_batch_size
    if per_device == "auto":
        raise UserError("--per_device_train_batch_size auto: give the batch itself with --train_batch_size")
    return per_device * accumulation * processes


def first(
    per_device: int | Literal["auto"], found: int | None, share: int, length: int, device: torch.device
) -> int:
    """The micro-batch to begin with, in chunks of `length` tokens.

    per_device: what the flag says; `auto`: `found`, what an earlier part of the run has come to, else all of
        the process's share. On a CPU, whose memory ends in a kill and not in an error, AUTO_ON_CPU tokens.
    """
    if per_device != "auto":
        return per_device
    return found or (min(share, max(AUTO_ON_CPU // length, 1)) if device.type == "cpu" else share)


def smaller(micro_batch: int, per_device: int | Literal["auto"], length: int) -> int:
    """The micro-batch to try after this one, of chunks of `length` tokens, did not fit into memory.

    Raises UserError where it cannot be made smaller, or is not to be.
    """
    if micro_batch == 1:
        raise UserError(
            f"out of memory with one chunk of {length} tokens; use --gradient_checkpointing true or a "
            "shorter --max_seq_length"
        )
    if per_device != "auto":
        raise UserError(
            f"out of memory with --per_device_train_batch_size {per_device}; `auto` finds what fits "
            "and, with --train_batch_size, the result stays the same"
        )
    return micro_batch // 2


def out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no memory left, in the words of any of torch's backends."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or should_reduce_batch_size(error)
