"""How large a micro-batch is: a matter of memory, not of the result.

    micro-batches of a step and process = ceil(ceil(global batch / processes) / micro-batch)

Where memory runs out, update.py halves it for all processes, when they have agreed on how a step went; accelerate's
`find_executable_batch_size` halves and retries in one process while the others wait in a reduction."""

from typing import Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size

AUTO_ON_CPU = 2048  # tokens; larger micro-batches leave the caches: at 8,192 a small BERT was 1.4 times as slow
# What CUDA's libraries say where the memory that they need for themselves is not there.
LIBRARIES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED")


def first_micro_batch(per_device: int | Literal["auto"], share: int, length: int, device: torch.device) -> int:
    """The micro-batch to begin with, in chunks of `length` tokens; auto: a process's `share` of a step's chunks."""
    if per_device != "auto":
        return per_device
    # A CPU's memory ends in a kill and not in an error.
    return min(share, max(AUTO_ON_CPU // length, 1)) if device.type == "cpu" else share


def out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no memory left, in the words of any of torch's backends."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)
    return known or any(words in str(error) for words in LIBRARIES)
