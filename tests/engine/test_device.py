"""What a CPU run asks of the C library."""

import ctypes
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PROGRAM = """
import resource, sys, torch
from mlm.engine.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    torch.ones(1 << 24) * 2  # two tensors of 64 MiB

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
before = page_faults()
for _ in range(10):
    step()
print(page_faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_a_step_finds_the_memory_that_the_step_before_has_freed():
    faults = {}
    for what in ("keep", "return"):
        command = [sys.executable, "-c", PROGRAM, what]
        faults[what] = int(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout)
    assert faults["keep"] < faults["return"] / 5


def test_peak_memory_is_that_of_the_process_not_of_the_one_that_started_it():
    """A notebook, say, that has had gigabytes; Linux hands its peak on to what it starts."""
    child = "import torch; from mlm.report.run_directory import peak_memory_mib as peak; print(peak(torch.device('cpu')))"
    parent = f"""
import subprocess, sys
b"x" * (1 << 30)
print(subprocess.run([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True).stdout)
"""
    said = subprocess.run(
        [sys.executable, "-c", parent], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    assert 100 < float(said) < 1000
