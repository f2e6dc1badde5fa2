"""Scripts import the libraries without the garbage collector, and have it back afterwards."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = ("demo", "evaluate", "fill_mask", "prepare", "report", "train")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_torch_without_collecting_garbage_and_then_collects_again(name):
    program = f"""
import gc, runpy, sys
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
runpy.run_path("scripts/{name}.py", run_name="imported")
assert "torch" in sys.modules
print(len(collections), gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    count, enabled, frozen = said.split()
    assert int(count) < 50  # some thousand without
    assert enabled == frozen == "True"
