"""The GPU's benchmark runs where there is none, and says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_nothing_is_measured():
    command = [sys.executable, "benchmarks/gpu.py"]
    said = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert said.startswith("no GPU here: nothing is measured")


def test_the_gpus_benchmark_runs_on_a_cpu_with_toys():
    command = [sys.executable, "benchmarks/gpu.py", "--self_test"]
    said = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert "laws 1, 2, 8 and 9 hold on the device" in said
    assert sum(line.startswith("toy 128 ") for line in said.splitlines()) == 4
