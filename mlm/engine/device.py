"""The Accelerator that the launcher and the flags ask for, or one line on why it cannot be had."""

import ctypes
import os
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from mlm.errors import UserError, one_line

DATA_PARALLEL = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
)


@dataclass(frozen=True)
class DeviceConfig:
    """Precision and determinism."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # The default is accelerate's setting.
    deterministic: bool = False  # Use deterministic kernels only, so that a GPU repeats a run bit for bit.


def make_accelerator(
    mixed_precision: str | None = None,
    deterministic: bool = False,
    report_to: str | None = None,
) -> Accelerator:
    """Sets up the device, the processes, the precision and the trackers.

    mixed_precision: no, fp16 or bf16; None: what accelerate was configured or launched with
    report_to: the trackers to send metrics to, `all` for every one that is installed; None: to none

    Raises UserError where the device lacks the precision, a tracker is not installed, or accelerate is set up
    for something else than data parallelism.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
        torch.use_deterministic_algorithms(True)
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=report_to,
            # Trackers that write files want a folder now; the run names its own before they write.
            project_dir=report_to and ".",
            # The loop sums its micro-batches itself: accelerate would divide by its own count of them.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        )
    except ValueError as error:  # accelerate's own words on a precision or a tracker that it does not know
        raise UserError(one_line(error)) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU, use bf16 or no")
    if report_to is not None and not accelerator.log_with:
        raise UserError(
            f"--with_tracking: no tracker is installed for --report_to {report_to}; pip install one"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.distributed_type not in DATA_PARALLEL:
        kind = accelerator.distributed_type.value
        raise UserError(
            f"accelerate is configured for {kind}, and this loop is data-parallel: accelerate config"
        )
    return accelerator


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed tensors for the next ones; with another C library, nothing happens.

    By default a large tensor is a mapping of its own that goes back to the kernel with it, and the kernel
    zeroes every page of the next one: on a CPU, a quarter of the time of a small BERT's step.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
