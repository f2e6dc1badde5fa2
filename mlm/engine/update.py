"""One exact optimizer step, on any number of processes.

    micro-batches     forward and backward, in the pieces that memory takes
    reduction         gradients are summed over the processes, while the last backward pass still makes the next ones
    agreement         all learn how many tokens were masked, and whether one of them ran out of memory: then they drop
                      the sum, halve, and try again
    clipping, guard   gradients that are not finite move no weight
    optimizers        each followed by its schedule; under fp16, an overflow is tried again at a lower scale

The gradient is that of the mean loss over all masked tokens of the global batch, however it is cut. One process can
divide its loss by their number. Several count their own alone, and divide by a power of two near the number until the
gradients are added up: it keeps every bit, and fp16's range as it is in one process. Where nothing goes wrong, the
host waits for the device only under fp16 and with optimizers that are not fused."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import release_memory
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler

from mlm.data.batches import Batch, Batches
from mlm.data.masking import DROPOUT, stream_key
from mlm.engine.distributed import GradientSum, agree, host_group
from mlm.engine.memory import first_micro_batch, out_of_memory
from mlm.errors import TrainingFailed, UserError, at_least, at_most
from mlm.model.sparse_head import SparseMaskedLM

log = logging.getLogger(__name__)

RESERVED = {"event", "step", "seconds", "tokens", "loss", "learning_rate", "mask_rate", "tokens_per_second"}
MASKED = "masked tokens of "  # begins the name of the number that goes with a source's loss
MOST = 2**20  # chunks in a step

Objective = Callable[[SparseMaskedLM, Batch], torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""The losses [M] of a micro-batch's masked tokens, or their sum []; or these and {name: a sum []} to be logged."""


@dataclass(frozen=True)
class UpdateConfig:
    """One optimizer step: its global batch, and how that is cut."""

    train_batch_size: int | None = None  # A step has this many chunks (default: the next two, times the processes).
    per_device_train_batch_size: int | Literal["auto"] = 8  # Set a micro-batch's chunks (auto: what fits).
    gradient_accumulation_steps: int = 1  # A step has this many micro-batches (or use --train_batch_size).
    max_grad_norm: float = 1.0  # Scale gradients of a larger norm down to this one (0: never).
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # Processes send gradients in this type (bf16: half the traffic).

    def __post_init__(self) -> None:
        at_least(self, 1, "train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        at_least(self, 0, "max_grad_norm")
        at_most(self, MOST, "train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")

    def global_batch(self, processes: int) -> int:
        """Chunks a step: what the experiment says, or what run_mlm's flags come to on this many processes."""
        if self.train_batch_size:
            return self.train_batch_size
        if self.per_device_train_batch_size == "auto":
            raise UserError("--per_device_train_batch_size auto: give the batch itself with --train_batch_size")
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        if batch > MOST:
            raise UserError(f"--gradient_accumulation_steps: steps of {batch:,} chunks; at most {MOST:,}")
        return batch


class Step(NamedTuple):
    """An optimizer step that was applied, over all processes."""

    sums: torch.Tensor  # [1 + S] float32, on the device: the loss and the named scalars, over the masked tokens
    nonfinite: torch.Tensor  # [] float32, on the device; 1: this step, or one before it, moved no weight
    masked: int  # masked tokens
    tokens: int  # tokens, padding not counted
    overflows: int  # times that fp16's scale was lowered and the step taken again
    requests: list[int]  # the largest of each request over all processes


class Update:
    """`update(step)` takes a step with any optimizers that hold each parameter at most once; each has a scheduler."""

    def __init__(
        self,
        model: SparseMaskedLM,
        objective: Objective,
        batches: Batches,
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[LRScheduler],
        accelerator: Accelerator,
        config: UpdateConfig,
    ) -> None:
        self.model, self.objective, self.batches = model, objective, batches
        self.optimizers, self.schedulers = optimizers, schedulers
        self.accelerator, self.scaler, self.config = accelerator, accelerator.scaler, config
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        if len(schedulers) != len(optimizers) or len({id(p) for p in held}) < len(held):
            raise ValueError("each optimizer needs a schedule of its own, and each parameter one optimizer")
        place = {id(p): number for number, p in enumerate(model.parameters())}  # those beside the model come last
        self.parameters = sorted((p for p in held if p.requires_grad), key=lambda p: place.get(id(p), len(place)))
        self.smallest = min(self.parameters, key=torch.numel)
        narrow = torch.bfloat16 if config.reduce_dtype == "bf16" else None
        self.gradients = GradientSum(self.parameters, batches.world, narrow)
        self.group = host_group(accelerator)
        # Fused kernels read a flag on the device, and leave the weights alone where it is set.
        self.fused = all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)
        self.nonfinite = torch.zeros((), device=accelerator.device)
        self.scalars: tuple[str, ...] | None = None  # names of what the objective returns beside its loss
        per_device, share = config.per_device_train_batch_size, -(-batches.global_batch // batches.world)
        self.micro_batch = first_micro_batch(per_device, share, batches.chunks.chunk_size, accelerator.device)

    def __call__(self, step: int, requests: Sequence[int] = ()) -> Step:
        """Applies optimizer step `step`, counted from 0. All processes learn of the `requests` of each, as a signal.
        Raises UserError where one chunk or the optimizer's state is too much memory, TrainingFailed where any fp16
        scale overflows."""
        overflows = 0
        while True:
            self.gradients.begin()
            try:
                sums, divisor, counts = self._forward_backward(step)
                ran_out = False
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                ran_out, divisor, counts = True, 1, [0, 0]
            self.gradients.enter()  # each process enters all, as the others wait there; then they learn of one another
            told = [ran_out, len(self.scalars or ()), *requests]
            ran_out, S, *agreed, masked, tokens = agree(told, self.group, counts)
            self.gradients.finish(divisor / max(masked, 1))
            if ran_out:
                self._halve_micro_batches(step)
                continue
            sums = torch.nn.functional.pad(sums, (0, 1 + S - len(sums)))  # of an empty share, zeros
            if self.batches.world > 1:
                dist.all_reduce(sums)
            applied = self._apply(sums)
            self._zero_grad()
            if applied:
                for scheduler in self.schedulers:
                    scheduler.step()
                return Step(sums, self.nonfinite, masked, tokens, overflows, agreed)
            overflows += 1
            scale = self.scaler.get_scale()
            if scale < torch.finfo(torch.float16).tiny:  # where ordinary gradients vanish in fp16
                reason = f"the loss or its gradients overflow at any fp16 loss scale (now {scale:.1e})"
                advice = "use --mixed_precision bf16, or a lower --learning_rate"
                raise TrainingFailed(f"step {step + 1}: {reason}; {advice}")

    def _forward_backward(self, step: int) -> tuple[torch.Tensor, int, list[int]]:
        """Adds this process's part to each .grad. Gives its sums [1 + S], what they were divided by for that, and how
        many tokens it has: masked, and all."""
        share, masked = self.batches.load(step, self.micro_batch)
        divisor = max(masked, 1) if self.batches.world == 1 else self.batches.expected(step)
        torch.manual_seed(stream_key(self.batches.seed, step, DROPOUT + self.batches.rank))
        sums = torch.zeros(1, device=self.accelerator.device)
        for number, batch in enumerate(share, start=1):
            loss, scalars = self.loss(batch)
            if taken := RESERVED & scalars.keys():
                raise ValueError(f"the objective returned {taken.pop()!r} beside its loss, a name that the log has")
            if self.scalars not in (None, tuple(scalars)):
                raise ValueError(f"the objective returned {self.scalars} beside its loss, and now {tuple(scalars)}")
            self.scalars = tuple(scalars)
            mean = loss / divisor
            self.gradients.backward(mean if self.scaler is None else self.scaler.scale(mean), number == len(share))
            found = torch.stack([loss.detach(), *(value.detach() for value in scalars.values())]).float()
            sums = sums + found  # [1] + [1 + S], the first time
        if self.scaler is not None and not share:
            self.scaler.scale(sums)  # its first use, which `backward` would have been, sets it up
        for p in self.parameters:  # of an empty share, or a parameter that this batch does not reach
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return sums, divisor, [masked, sum(batch.tokens for batch in share)]

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss [] of a micro-batch, and sums to log: the objective's, and each source's loss and masked tokens."""
        batch = batch.to(self.accelerator.device)
        with self.accelerator.autocast():
            returned = self.objective(self.model, batch)
        loss, scalars = returned if isinstance(returned, tuple) else (returned, {})
        if not (isinstance(loss, torch.Tensor) and loss.ndim < 2 and loss.requires_grad):
            raise TypeError("the objective has to return its losses [M] or their sum [], a tensor that has a gradient")
        if batch.sources is not None and loss.shape == batch.sources.shape:
            for number, name in enumerate(("domain", *self.batches.shares)):
                own = batch.sources == number  # [M]
                scalars = scalars | {f"loss_{name}": loss.where(own, 0).sum(), f"{MASKED}loss_{name}": own.sum()}
        return loss.sum(), scalars

    def _zero_grad(self) -> None:
        for p in (*self.model.parameters(), *self.parameters):  # these may lie beside the model
            p.grad = None

    def _halve_micro_batches(self, step: int) -> None:
        """Raises UserError where they cannot be smaller, or are not to be."""
        per_device = self.config.per_device_train_batch_size
        if self.micro_batch == 1:
            advice = "use --gradient_checkpointing true or a shorter --max_seq_length"
            raise UserError(f"out of memory with one chunk of {self.batches.chunks.chunk_size} tokens; {advice}")
        if per_device != "auto":
            advice = "`auto` finds what fits and, with --train_batch_size, the result stays the same"
            raise UserError(f"out of memory with --per_device_train_batch_size {per_device}; {advice}")
        self.micro_batch //= 2
        self._zero_grad()
        release_memory()
        log.warning("step %d: out of memory; from here on micro-batches of %d chunks", step + 1, self.micro_batch)

    def _apply(self, sums: torch.Tensor) -> bool:
        """Steps the optimizers, where the gradient is finite. False: fp16 overflowed, take the step again."""
        self.smallest.grad += sums[0] * 0  # so that a loss that is not finite has no finite gradient
        for optimizer in self.optimizers if self.scaler is not None else ():
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        if self.scaler is not None:
            finite = bool(norm.isfinite())  # the host waits for the device here
            if finite:
                self._step_optimizers()
            self.scaler.update()
            return finite
        self.nonfinite = torch.maximum(self.nonfinite, (~norm.isfinite()).float())
        if self.fused:  # decided on the device, and read with the next line of the log
            for optimizer in self.optimizers:
                optimizer.found_inf = self.nonfinite
            self._step_optimizers()
        elif not self.nonfinite:  # the host waits for the device here
            self._step_optimizers()
        return True

    def _step_optimizers(self) -> None:
        try:
            for optimizer in self.optimizers:
                optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            kinds = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            reason = f"out of memory for the state of {kinds}, which smaller micro-batches do not shrink"
            raise UserError(f"{reason}; use a smaller model, or a device with more memory") from error

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler and self.scaler.state_dict(),
            "micro_batch": [self.batches.world, self.micro_batch],
        }

    @property
    def step(self) -> int:
        """The updates that were applied, by the schedule."""
        scheduler = self.schedulers[0]
        while isinstance(scheduler, ChainedScheduler):  # which does not count; all of its own do
            scheduler = scheduler._schedulers[0]
        return scheduler.last_epoch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave. Raises ValueError for moments or learning rates that cannot be."""
        all_peaks = [getattr(scheduler, "base_lrs", None) for scheduler in self.schedulers]
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            _check_moments(optimizer, saved["state"], self.step)
            optimizer.load_state_dict(saved)
        for optimizer, scheduler, peaks in zip(self.optimizers, self.schedulers, all_peaks, strict=True):
            if isinstance(scheduler, LambdaLR):  # whose rule is known
                _check_rates(optimizer, scheduler, peaks, self.step)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        world, micro_batch = state["micro_batch"]
        if self.config.per_device_train_batch_size == "auto" and world == self.batches.world:
            self.micro_batch = micro_batch


def _check_moments(optimizer: Optimizer, saved: dict[int, dict[str, Any]], step: int) -> None:
    """Raises ValueError where torch's Adam or AdamW has moments that do not fit its parameters. The fused kernel would
    read past their end. Other optimizers may keep what they like."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        moments = saved.get(number, {})
        if p.requires_grad and step > 0 and not moments.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"parameter {number} lacks moments")
        for name, moment in moments.items():
            fits = moment.shape == () and 0 < moment <= step if name == "step" else moment.shape == p.shape
            if not fits or moment.dtype != (torch.float32 if name == "step" else p.dtype):
                raise ValueError(f"{name} of parameter {number} does not fit it")


def _check_rates(optimizer: Optimizer, scheduler: LambdaLR, peaks: list[float], step: int) -> None:
    """Raises ValueError where the learning rates are not those that the schedule gives at a step."""
    rates = [group["lr"] for group in optimizer.param_groups]
    by_schedule = [peak * rule(step) for peak, rule in zip(peaks, scheduler.lr_lambdas, strict=True)]
    if (scheduler.last_epoch, scheduler.base_lrs) != (step, peaks) or not all(map(math.isclose, rates, by_schedule)):
        has = f"learning rates {rates} of peaks {scheduler.base_lrs} after step {scheduler.last_epoch}"
        raise ValueError(f"{has}, by the schedule {by_schedule} of {peaks} after step {step}")
