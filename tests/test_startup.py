"""Claims about what scripts do before torch is there: garbage collection, help, OpenMP."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = ("demo", "evaluate", "fill_mask", "prepare", "report", "train")
FORKS = REPOSITORY / "scripts" / "forks"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_torch_without_collecting_garbage_and_then_collects_again(name):
    program = f"""
import gc, runpy, sys
collections = []
sys.path.insert(0, "scripts")
gc.callbacks.append(lambda phase, info: collections.append(phase))
runpy.run_path("scripts/{name}.py", run_name="imported")
assert "torch" in sys.modules
print(len(collections), gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    count, enabled, frozen = printed.split()
    assert int(count) < 50  # some thousand without
    assert enabled == frozen == "True"


QUICK = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'scripts')!r}); from startup import quick_imports\n"
OPENMP = f"""
import os
{QUICK}
with quick_imports():
    pass
print(os.environ.get("OMP_NUM_THREADS"), os.environ["OMP_WAIT_POLICY"])
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "user", "threads"),
    [
        (LAUNCH, {}, "None"),
        pytest.param(LAUNCH, {"OMP_NUM_THREADS": "1"}, "1", marks=pytest.mark.torture),
        pytest.param([*LAUNCH, "--num_cpu_threads_per_process=1"], {}, "1", marks=pytest.mark.torture),
        ([sys.executable], {"OMP_NUM_THREADS": "1"}, "1"),
        ([sys.executable], {}, "None"),
    ],
    ids=["launcher", "launcher, variable", "launcher, flag", "variable", "nothing"],
)
def test_one_process_has_all_cores_unless_its_user_says_otherwise(command, user, threads, tmp_path):
    """accelerate launch gives it one thread, if it is not told that there is no GPU."""
    (tmp_path / "program.py").write_text(OPENMP)
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ACCELERATE_USE_CPU"):
        environment.pop(name, None)
    run = subprocess.run(
        [*command, str(tmp_path / "program.py")], env=environment | user, capture_output=True, text=True
    )
    assert run.stdout == f"{threads} passive\n"


def test_an_interrupt_while_libraries_are_imported_ends_without_a_traceback():
    program = QUICK + "with quick_imports():\n    raise KeyboardInterrupt"
    run = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (130, "")


def test_the_wait_policy_that_a_user_has_chosen_stays():
    environment = {**os.environ, "OMP_WAIT_POLICY": "active"}
    command = [sys.executable, "-c", OPENMP]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.stdout.split()[1] == "active"


def without_home(program, tmp_path):
    """The program, as run by a user whose home is not there, and whose caches nobody named."""
    environment = {**os.environ, "HOME": "/nowhere", "TMPDIR": str(tmp_path)}
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_the_package_finds_a_home_before_any_library_looks_for_it(tmp_path):
    program = "import sys, mlm; before = {*sys.modules}; from huggingface_hub import constants\n"
    program += "from mlm.startup import HEAVY; print(constants.HF_HOME, HEAVY & before)"
    assert without_home(program, tmp_path).stdout == f"{tmp_path}/home-{os.getuid()}/.cache/huggingface set()\n"


def test_libraries_that_looked_for_a_home_before_the_package_are_told_of_the_one_it_finds(tmp_path):
    """As they do where mlm/train.py or a copy of it is launched."""
    program = "import accelerate; from transformers.utils import hub; from huggingface_hub import constants\n"
    program += "print(constants.HF_HUB_CACHE); import mlm; print(constants.HF_HUB_CACHE, hub.HF_MODULES_CACHE)"
    cache = f"{tmp_path}/home-{os.getuid()}/.cache/huggingface"
    printed = without_home(program, tmp_path)
    assert printed.stdout == f"/nowhere/.cache/huggingface/hub\n{cache}/hub {cache}/modules\n"
    assert printed.stderr == ""


def test_help_as_a_sentence_after_two_dashes_needs_the_libraries():
    program = QUICK + "with quick_imports():\n import torch\nprint(torch.ones(2))"
    command = [sys.executable, "-c", program, "--", "--help"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert printed == "tensor([1., 1.])\n"
