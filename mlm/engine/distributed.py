"""What the processes of a run do together: agree on what happened, and add up their gradients.

A reduction ends only when every process has entered it. So before each reduction of gradients the processes
tell each other, in host memory, whether all of them have a gradient: one that ran out of memory and tried
again alone would leave the others waiting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator

# The others wait while one process tokenises the corpus; what takes longer is for scripts/prepare.py. They do
# so in the host's group alone: a device's reduction that waits so long has lost a process.
PATIENCE = timedelta(hours=2)
# What gloo and NCCL say of a process that is gone, whose sockets its machine has closed.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited")


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """All processes, for messages in host memory, so that no device is waited for; None for one alone."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if accelerator.num_processes > 1 else None


@contextmanager
def local_main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """A context that one process of each machine goes through before the others, who wait for PATIENCE."""
    group = host_group(accelerator)
    if group is not None and not accelerator.is_local_main_process:
        dist.barrier(group)
    yield
    if group is not None and accelerator.is_local_main_process:
        dist.barrier(group)


def agree(values: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """The largest of each value over all processes, the same on each of them."""
    if group is None:
        return values
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return largest.tolist()


def sum_gradients(
    parameters: list[torch.nn.Parameter], nats: torch.Tensor, processes: int, piece: int = 2**24
) -> None:
    """Adds up the gradients, and `nats` [] float32, over all processes, in place.

    In flat pieces of about `piece` elements: one explicit reduction a step, in place of
    DistributedDataParallel's during backward, as a process may have had several passes through the model, or
    none. It costs the overlap of the two.
    """
    if processes == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    summands = [nats, *(p.grad for p in parameters)]
    start = 0
    while start < len(summands):
        end, elements = start, 0
        while end < len(summands) and (end == start or elements + summands[end].numel() <= piece):
            elements += summands[end].numel()
            end += 1
        parts = summands[start:end]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))
        start = end


def lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run has died."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
