"""The Accelerator that the launcher and the flags ask for, or one line on why there is none."""

import atexit
import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from mlm.engine.distributed import host_group, leave_group
from mlm.engine.watch import watch
from mlm.errors import UserError, one_line
from mlm.startup import set_by_accelerate_launch

log = logging.getLogger(__name__)

DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
MPI = {"PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}  # variables that an MPI launcher sets
AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # by which torchrun keeps one store for all starts of a run
WHY = "without, processes that are started anew may look for those before them (torch 2.13), and wait or fail"

# Answers to `accelerate config` that this loop would pass over, and what to do instead.
WHOLE = "here each process holds the whole model; for memory, --gradient_checkpointing true and --mixed_precision bf16"
REFUSED = {f"ACCELERATE_USE_{kind}": WHOLE for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")}
REFUSED["ACCELERATE_DYNAMO_BACKEND"] = "nothing is compiled here, which was slower on some models; configure `no`"


@dataclass(frozen=True)
class DeviceConfig:
    """Precision and determinism."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # The default is accelerate's setting.
    deterministic: bool = False  # Use deterministic kernels only, so that a GPU repeats a run bit for bit.
    tf32: bool = False  # Round the factors of fp32 matrix products to TF32, which is faster on GPUs that have it.


def make_accelerator(
    mixed_precision: str | None = None, deterministic: bool = False, tf32: bool = False, report_to: str | None = None
) -> Accelerator:
    """Sets up the device, the processes, the precision and the trackers.

    mixed_precision: None: what accelerate was configured or launched with
    report_to: trackers, `all` for every one that is installed; None: none

    A process group that is made here is destroyed at exit. Raises UserError for what the device, the installed
    trackers or this loop cannot do."""
    # On the CPU, `accelerate launch --num_processes 2` sets an address to meet at and starts one process.
    if "RANK" not in os.environ and set_by_accelerate_launch("MASTER_PORT") and not MPI & os.environ.keys():
        reason = "accelerate launch starts one process on a CPU, whatever --num_processes or its configuration say"
        raise UserError(f"{reason}; use torchrun --nproc_per_node N, or --num_processes 1")
    for variable, instead in REFUSED.items():
        if os.environ.get(variable, "no").lower() not in ("no", "false"):
            raise UserError(f"{variable}={os.environ[variable]}, of accelerate's configuration: {instead}")
    if (mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "")).lower() == "fp8":
        raise UserError("--mixed_precision fp8 is not done here; use bf16")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate would not connect the processes otherwise
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
        torch.use_deterministic_algorithms(True)
    if tf32 and not (torch.cuda.is_available() and torch.cuda.is_tf32_supported()):
        raise UserError("--tf32 needs an NVIDIA GPU, Ampere or later; leave it out")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # of convolutions; by default torch allows it
    had_group = dist.is_initialized()
    AcceleratorState._reset_state()  # accelerate keeps the first precision of a process: each run has its own
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=report_to,
            project_dir=report_to and ".",  # trackers want a folder now; the run names its own before they write
            # The loop sums its micro-batches itself: accelerate would divide by its own count of them.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        )
    except ValueError as error:  # accelerate's own words on a precision or a tracker that it does not know
        raise UserError(one_line(error)) from error
    if dist.is_initialized() and not had_group:
        atexit.register(leave_group)
        if accelerator.num_processes > 1:
            watch(accelerator)
            dist.barrier(host_group(accelerator))  # one that ended at once would close what another is connecting to
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(AGENTS_STORE) == "True":
            log.warning("torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it; %s", WHY)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU, use bf16 or no")
    if report_to is not None and not accelerator.log_with:
        raise UserError(f"--with_tracking: no tracker is installed for --report_to {report_to}; pip install one")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        alone = accelerator.num_processes == 1 and torch.get_num_threads() == 1
        if alone and set_by_accelerate_launch("OMP_NUM_THREADS"):  # to one, without being asked to
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    if accelerator.distributed_type not in DATA_PARALLEL:
        kind = accelerator.distributed_type.value
        raise UserError(f"accelerate is configured for {kind}, and this loop is data-parallel: accelerate config")
    return accelerator


def keep_freed_memory(mallopt: Callable[[int, int], int] | None = None) -> None:
    """Has glibc keep the memory of freed tensors for the next ones: a quarter of a small BERT's step on a CPU.

    By default a large tensor is a mapping of its own, and the kernel zeroes every page of the next one. mallopt(3): an
    older glibc refuses an M_MMAP_THRESHOLD above 32 MiB (0), and M_TRIM_THRESHOLD alone would fix it at 128 KiB."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    mallopt = mallopt or getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and mallopt(M_MMAP_THRESHOLD, 2**30):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
