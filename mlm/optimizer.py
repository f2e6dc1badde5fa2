"""AdamW and its schedule, as masked-LM training has them."""

from typing import Literal

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from mlm.errors import UserError, one_line

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, fused: bool
) -> torch.optim.AdamW:
    """AdamW without decay on biases and norms: what is named a bias, or has one dimension.

    fused: one kernel for all parameters, which leaves them alone where its `found_inf` is 1; not under fp16,
    where a scaler would use the same switch without saying so.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in trained if p.ndim < 2 or name.endswith("bias")}
    groups = [
        {"params": [p for name, p in trained if name not in plain], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def make_scheduler(optimizer: torch.optim.Optimizer, name: str, warmup: int, steps: int) -> LRScheduler:
    """The learning rate over `steps` updates. Raises UserError for a schedule that cannot be."""
    if warmup >= max(steps, 1):
        raise UserError(f"--num_warmup_steps {warmup}: the run has {steps} steps only")
    try:
        return get_scheduler(name, optimizer, warmup, max(steps, 1))
    except ValueError as error:  # polynomial's end lies above a tiny --learning_rate
        raise UserError(f"--lr_scheduler_type {name}: {one_line(error)}") from error
