"""What the processes of a run do together: agree on what happened, and add up their gradients.

A reduction ends only when every process has entered it. So before it they agree, in host memory, that all of them have
a gradient: one that ran out of memory and tried again alone would leave the others waiting.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from mlm.errors import UserError, one_line

# So long the others wait, in the host's group alone, while one process tokenises; what takes longer is for prepare.py.
PATIENCE = timedelta(hours=2)
# What gloo and NCCL say when a process is gone and its machine has closed its sockets.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited")


@lru_cache(maxsize=1)
def _gloo(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """All processes, for messages in host memory, so that no device is waited for; None for one alone."""
    return _gloo(dist.group.WORLD) if accelerator.num_processes > 1 else None


@contextmanager
def local_main_process_first(accelerator: Accelerator, config: Any) -> Iterator[Any]:
    """A context that one process of each machine goes through before the others, who wait for PATIENCE.

    Gives `config` (a mlm.config.Config) as this process has to take it: only the first builds a token store anew.
    """
    group, first = host_group(accelerator), accelerator.is_local_main_process
    if not first:
        dist.barrier(group)
        config = replace(config, token_store=replace(config.token_store, overwrite_cache=False))
    yield config
    if first and group is not None:
        dist.barrier(group)


def leave_group() -> None:
    """Destroys this process's group, and ends its threads while Python still runs.

    A thread of gloo may hold the tensor of the last message for a moment. To drop it, it needs Python's lock, and if
    Python ends meanwhile the process is aborted: "terminate called without an active exception". The threads end with
    the last reference to the group: torch's, ours, and those of objects that refer to each other.
    """
    _gloo.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def agree(values: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """The largest of each value over all processes, the same on each of them."""
    if group is None:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return largest.tolist()


def check_same(mine: dict[str, Any], accelerator: Accelerator) -> None:
    """Raises UserError, on every process, where a value is another one on another process, and says whose is which.

    Each process gives its own values: what has been sent to it would not show that its files or packages differ. So
    each also finds its token store by its own files: under a name sent by the main process, another machine would
    build or find one of other text. The hash of the documents, in a store's header, is what is compared.
    """
    if accelerator.num_processes == 1:
        return
    everyone: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(everyone, {name: str(value) for name, value in mine.items()}, host_group(accelerator))
    differing = []
    for name in sorted({name for values in everyone for name in values}):
        ranks: dict[Any, list[int]] = {}
        for rank, values in enumerate(everyone):
            ranks.setdefault(values.get(name), []).append(rank)
        if len(ranks) > 1:
            whose = (f"{one_line(value, 80)} on process {one_line(str(on)[1:-1], 20)}" for value, on in ranks.items())
            differing.append(f"{name} is {', '.join(whose)}")
    if differing:
        reason = f"the processes of this run would not do the same: {'; '.join(differing)}"
        raise UserError(f"{reason}; start all of them with one command, and the same files and packages")


def broadcast(tensors: Iterable[torch.Tensor], accelerator: Accelerator) -> None:
    """Gives every process the main process's values, in place. All have to have tensors of the same shapes."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def from_main(value: Any, accelerator: Accelerator) -> Any:
    """The main process's `value`, which pickle has to take, on every process; a UserError is raised on every one."""
    box = [value]
    if accelerator.num_processes > 1:  # in host memory, where the others may wait for long
        dist.broadcast_object_list(box, src=0, group=host_group(accelerator))
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


class GradientSum:
    """Adds up gradients over all processes, in place, in flat pieces of about `piece` elements.

    DistributedDataParallel does so during backward, but a process may have several micro-batches, or none. The buffer
    is made once: no process can run out of memory for it while the others are in the reduction.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], processes: int, piece: int = 2**24) -> None:
        starts = accumulate((p.numel() for p in parameters), initial=0)
        grouped = groupby(zip(starts, parameters, strict=False), lambda pair: pair[0] // piece)
        self.pieces = [[p for _, p in group] for _, group in grouped] if processes > 1 else []
        largest = max((sum(p.numel() for p in part) for part in self.pieces), default=0)
        self.buffer = torch.empty(largest, dtype=parameters[0].dtype, device=parameters[0].device)

    def __call__(self, sums: torch.Tensor) -> None:
        """Adds up each parameter's .grad, which all have, and `sums` [K] float32."""
        if self.pieces:
            dist.all_reduce(sums)
        for parameters in self.pieces:
            sizes = [p.numel() for p in parameters]
            flat = self.buffer[: sum(sizes)]
            torch.cat([p.grad.reshape(-1) for p in parameters], out=flat)
            dist.all_reduce(flat)
            for p, total in zip(parameters, flat.split(sizes), strict=True):
                p.grad.copy_(total.view_as(p.grad))


def lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run has died."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
