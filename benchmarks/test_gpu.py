"""The GPU's benchmark runs where there is none, and says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests.processes import server
from tests.scripts import load_script

REPOSITORY = Path(__file__).parents[1]
results = load_script("results")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_nothing_is_measured():
    output, _ = server().start(["benchmarks/gpu.py"]).communicate()
    assert output.startswith("no GPU here: nothing is measured")


@pytest.mark.torture
def test_the_gpus_benchmark_runs_on_a_cpu_with_toys(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--self_test", "--out", str(tmp_path / "gpu.json")]
    output = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert "invariants 1, 2, 8 and 9 hold on the device" in output
    assert sum(line.startswith("toy 128 ") for line in output.splitlines()) == 5
    page = results.gpu(json.loads((tmp_path / "gpu.json").read_text()))
    assert sum(line.startswith("| toy, 128 tokens, ") for line in page.splitlines()) == 5


@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("name", gpu.sizes(self_test=False))
def test_the_models_it_measures_can_be_built_and_take_its_batches(name, length):
    with torch.device("meta"):
        model = gpu.sizes(self_test=False)[name].model(length)
        ids = torch.zeros(2, length, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(input_ids=ids, labels=ids).loss.shape == ()
    assert model.config.vocab_size >= gpu.VOCABULARY
    # an encoder of that size, and a head: 2 FLOPs a weight and token, and attention
    assert 8e7 < gpu.forward_flops(model, 2, length, length // 7) / (2 * length) < 4e8
