"""Where a run took place: versions, hardware, commit, memory."""

import hashlib
import os
import platform
import re
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    device, cpus = accelerator.device, Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else None
    return {
        **versions(),
        "platform": platform.platform(),
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "mixed_precision": accelerator.mixed_precision,
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """Of Python, the packages that a result may depend on, and this one's code."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    own = {"python": platform.python_version(), "mlm": hashlib.sha256(code).hexdigest()[:12]}
    return own | {name: version(name) for name in PACKAGES}


def peak_memory_mib(device: torch.device) -> float:
    """The most memory so far: of the device where it has its own, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":  # where ru_maxrss begins at the peak of the process that started this one
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if peak is not None:  # a sandbox may leave it out
            return int(peak[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS gives bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _commit() -> str | None:
    """The commit of the checkout that this file is part of, with a + where its files differ from it."""
    command = ("git", "-C", Path(__file__).parent, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*")
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
