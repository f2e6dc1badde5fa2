"""The benchmarks of several processes run, and their pages can be written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import load_script

REPOSITORY = Path(__file__).parents[1]
results = load_script("results")


@pytest.mark.torture
@pytest.mark.parametrize(("name", "rows"), [("overlap", 2), ("host_work", 3)])
def test_what_several_processes_cost_is_measured_and_shown(tmp_path, monkeypatch, name, rows):
    command = [sys.executable, f"benchmarks/{name}.py", "--n", "1", "--out", str(tmp_path / f"{name}.json")]
    output = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    if output.startswith("nothing is measured"):
        pytest.skip(output.strip())
    monkeypatch.setattr(results, "_stored", lambda name: json.loads((tmp_path / f"{name}.json").read_text()))
    page = getattr(results, name)()
    assert sum(line.startswith(("| step, ", "| the batches ")) for line in page.splitlines()) == rows
