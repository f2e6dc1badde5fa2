"""AdamW and its schedule, as masked-LM training has them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from mlm.errors import UserError, at_least, one_line

Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 5e-5  # The learning rate peaks at this value.
    weight_decay: float = 0.0  # Decay weights at this rate, but not biases and norms.
    lr_scheduler_type: Schedule = "linear"  # The learning rate follows this schedule; linear ends at 0.
    num_warmup_steps: int = 0  # The learning rate rises to its peak in this many steps.
    adam_beta1: float = 0.9  # Average gradients with this decay a step.
    adam_beta2: float = 0.999  # Average their squares with this decay.
    adam_epsilon: float = 1e-8  # Add this to the root of those.

    def __post_init__(self) -> None:
        at_least(self, 0, *vars(self))
        if max(self.adam_beta1, self.adam_beta2) >= 1:
            raise UserError(f"--adam_beta1 {self.adam_beta1}, --adam_beta2 {self.adam_beta2}: below 1")


def make_optimizer(parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient, without decay on biases and on what has one dimension."""
    decayed, plain = [], []
    for name, p in parameters:
        if p.requires_grad:
            (plain if p.ndim < 2 or name.endswith("bias") else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # One kernel for all parameters, which update.py can tell to leave the weights alone from the device.
    betas = config.adam_beta1, config.adam_beta2
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, config: OptimizerConfig, steps: int) -> LRScheduler:
    """The learning rate over `steps` updates. Raises UserError for a schedule that cannot be."""
    warmup, name, steps = config.num_warmup_steps, config.lr_scheduler_type, max(steps, 1)
    if warmup >= steps:
        raise UserError(f"--num_warmup_steps {warmup}: the run has {steps} steps only")
    try:
        return get_scheduler(name, optimizer, warmup, steps)
    except ValueError as error:  # polynomial's end lies above a tiny --learning_rate
        raise UserError(f"--lr_scheduler_type {name}: {one_line(error)}") from error
