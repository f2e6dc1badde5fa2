"""How large a micro-batch is: a matter of memory, not of the result.

    micro-batches of a step and process = ceil(ceil(global batch / processes) / micro-batch)

Unlike accelerate's `find_executable_batch_size`, which halves and retries in one process while the others wait in
a reduction, `smaller` halves for all of them, when they have agreed on how a step went (update.py).
"""

from typing import Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size

from mlm.errors import UserError

AUTO_ON_CPU = 2048  # tokens; larger micro-batches leave the caches: at 8,192 a small BERT was 1.4 times as slow
# What CUDA's libraries say where the memory that they need for themselves is not there.
LIBRARIES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED")


def first_micro_batch(per_device: int | Literal["auto"], share: int, length: int, device: torch.device) -> int:
    """The micro-batch to begin with, in chunks of `length` tokens.

    per_device: the flag's value; `auto`: the process's `share`, and on a CPU, whose memory ends in a kill and not in
        an error, AUTO_ON_CPU tokens
    """
    if per_device != "auto":
        return per_device
    return min(share, max(AUTO_ON_CPU // length, 1)) if device.type == "cpu" else share


def smaller(micro_batch: int, per_device: int | Literal["auto"], length: int) -> int:
    """The micro-batch to try next; raises UserError where it cannot be made smaller, or is not to be."""
    if micro_batch == 1:
        advice = "use --gradient_checkpointing true or a shorter --max_seq_length"
        raise UserError(f"out of memory with one chunk of {length} tokens; {advice}")
    if per_device != "auto":
        advice = "`auto` finds what fits and, with --train_batch_size, the result stays the same"
        raise UserError(f"out of memory with --per_device_train_batch_size {per_device}; {advice}")
    return micro_batch // 2


def out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no memory left, in the words of any of torch's backends."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error):
        return True
    return any(words in str(error) for words in LIBRARIES)
