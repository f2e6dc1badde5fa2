"""How large a micro-batch is: a matter of memory, not of the result.

    micro-batches of a step and process = ceil(ceil(global batch / processes) / micro-batch)

accelerate's `find_executable_batch_size` halves and retries in one process alone, while the others wait for
it in a reduction. Here all processes agree on how a step went (update.py), and `smaller` halves for all.
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

    per_device: what the flag says; `auto`: all of the process's share, and on a CPU, whose memory ends in a
        kill and not in an error, AUTO_ON_CPU tokens.
    """
    if per_device != "auto":
        return per_device
    return min(share, max(AUTO_ON_CPU // length, 1)) if device.type == "cpu" else share


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
    said = any(words in str(error) for words in LIBRARIES)
    return isinstance(error, kinds) or said or should_reduce_batch_size(error)
