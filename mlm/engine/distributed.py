"""What the processes of a run do together: agree on what happened, and add up their gradients.

A reduction ends only when every process has entered it. So each of them enters all of a step, whatever has happened to
it, and then they agree, in host memory, on whether all had their gradients: one that ran out of memory and tried again
alone would leave the others waiting."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from mlm.errors import UserError, one_line

# The others wait, in the host's group alone, for one process that tokenises or analyses, as long as that takes. If it
# dies its machine closes its connections, which ends their wait; watch.py does where a machine or its network is lost.
PATIENCE = timedelta(days=30)
BUCKET = 2**20  # gradients that travel together: the first ones early, and few left when the backward pass ends
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
    """A context that one process of each machine goes through before the others, who wait for PATIENCE. Gives `config`
    (a mlm.config.Config) as this process has to take it: only the first builds a token store anew."""
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
    the last reference to the group: torch's, ours, and those of objects that refer to each other."""
    _gloo.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def agree(largest: Sequence[int], group: dist.ProcessGroup | None, added: Sequence[int] = ()) -> list[int]:
    """The largest of each of `largest`, then the sum of each of `added`, over all processes, to all of them."""
    if group is None:
        return [*largest, *added]
    mine = torch.tensor([*largest, *added], dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group)
    to_compare, to_add = torch.stack(everyone).split([len(largest), len(added)], dim=1)
    return to_compare.amax(dim=0).tolist() + to_add.sum(dim=0).tolist()


def check_same(mine: dict[str, Any], accelerator: Accelerator) -> None:
    """Raises UserError, on every process, where a value is another one on another process, and says whose is which.

    Each process gives its own values: what has been sent to it would not show that its files or packages differ. So
    each also finds its token store by its own files: under a name sent by the main process, another machine would
    build or find one of other text. The hash of the documents, in a store's header, is what is compared."""
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
            dist.broadcast(tensor, 0, host_group(accelerator) if tensor.device.type == "cpu" else None)


def from_main(value: Any, accelerator: Accelerator) -> Any:
    """The main process's `value`, which pickle has to take, on every process; a UserError is raised on every one."""
    box = [value]
    if accelerator.num_processes > 1:  # in host memory, where the others may wait for long
        dist.broadcast_object_list(box, src=0, group=host_group(accelerator))
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def on_main(find: Callable[[], Any], accelerator: Accelerator) -> Any:
    """What `find()` gives on the main process, on every process; a UserError that it raises there, on every one."""
    try:
        found = find() if accelerator.is_main_process else None
    except UserError as error:
        found = error
    return from_main(found, accelerator)


def gather_on_main(value: Any, accelerator: Accelerator) -> list[Any]:
    """Every process's `value`, which pickle has to take, on the main process, in host memory; [] on the others."""
    if accelerator.num_processes == 1:
        return [value]
    everyone = [None] * accelerator.num_processes if accelerator.is_main_process else None
    dist.gather_object(value, everyone, dst=0, group=host_group(accelerator))
    return everyone or []


@dataclass
class Bucket:
    """Parameters whose gradients travel together."""

    gradients: torch.Tensor  # [N]
    views: dict[torch.nn.Parameter, torch.Tensor]  # of `gradients`, each parameter's .grad
    message: torch.Tensor  # [N] what travels: the gradients themselves, or a copy in another type
    missing: set[torch.nn.Parameter] = field(default_factory=set)  # those whose gradient is not complete
    work: dist.Work | None = None  # the reduction, where this process has entered it


class GradientSum:
    """Adds up gradients over all processes, in buckets, while the last backward pass of a step makes the next ones.

    A step: `begin`, `backward` of each micro-batch, `enter`, `finish`. Every process enters each bucket once, the last
    parameters first, with whatever it has for it. DistributedDataParallel does the like, but a process may have
    several micro-batches, or none, or run out of memory amid one: so all buffers are made once, beforehand."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], processes: int, dtype: torch.dtype | None) -> None:
        """dtype: in which gradients are sent and added up; None: their own"""
        self.buckets: list[Bucket] = []
        self.last = False
        backwards = parameters[::-1] if processes > 1 else []
        starts = accumulate((p.numel() for p in backwards), initial=0)
        for _, group in groupby(zip(starts, backwards, strict=False), lambda pair: (pair[0] // BUCKET, pair[1].dtype)):
            held = [p for _, p in group]
            sizes = [p.numel() for p in held]
            gradients = torch.zeros(sum(sizes), dtype=held[0].dtype, device=held[0].device)
            views = {p: view.view_as(p) for p, view in zip(held, gradients.split(sizes), strict=True)}
            self.buckets.append(Bucket(gradients, views, gradients.to(dtype or gradients.dtype)))
            for p in held:
                p.register_post_accumulate_grad_hook(partial(_completed, weakref.ref(self), len(self.buckets) - 1))

    def begin(self) -> None:
        """Zero gradients. (In one process they are autograd's own, and `backward` alone does anything.)"""
        for bucket in self.buckets:
            bucket.gradients.zero_()
            bucket.missing = set(bucket.views)
            for p, view in bucket.views.items():
                p.grad = view

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """loss.backward(); in the last pass of a step each bucket is entered as soon as its gradients are complete."""
        self.last = last
        loss.backward()

    def _complete(self, number: int, p: torch.nn.Parameter) -> None:
        bucket = self.buckets[number]
        if self.last and bucket.work is not None:
            raise RuntimeError("a parameter got a second gradient in one backward pass, after the first was sent")
        if self.last:
            bucket.missing.discard(p)
            self.enter(complete=True)

    def enter(self, complete: bool = False) -> None:
        """Enters the buckets that are left: of parameters not reached, an empty share, a pass that memory cut short.

        complete: stop at the first that lacks gradients"""
        self.last = complete
        for bucket in self.buckets:
            if bucket.work is None:
                if complete and bucket.missing:
                    return
                bucket.message.copy_(bucket.gradients)  # which, of a tensor to itself, does nothing
                bucket.work = dist.all_reduce(bucket.message, async_op=True)

    def finish(self, factor: float) -> None:
        """Waits for the sums, on the device where they are, and multiplies them by `factor`."""
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.work = None  # a reference to the group, whose threads would live on
            bucket.gradients.copy_(bucket.message).mul_(factor)


def _completed(gradients: "weakref.ref[GradientSum]", number: int, p: torch.nn.Parameter) -> None:
    """A parameter's hook. It refers to the sum weakly: Python does not see through hooks of torch, and would free
    neither the sum nor the parameters after a run."""
    if (own := gradients()) is not None:
        own._complete(number, p)


def lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run has died."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
