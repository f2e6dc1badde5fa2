"""Claims about the processes and the memory of a run on the CPU."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from mlm.engine.device import keep_freed_memory, make_accelerator
from mlm.errors import UserError
from tests.conftest import REPOSITORY

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ON_THE_CPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")

PROCESSES = """
from mlm import cli
from mlm.engine.device import make_accelerator

def body(argv):
    accelerator = make_accelerator()
    return {"processes": accelerator.num_processes, "device": accelerator.device.type}

cli.run(body)
"""

# Each way out of a script, in a process of its own that has a process group.
WAYS_OUT = """
import atexit, os, signal, socket, sys
import torch.distributed as dist
from mlm import cli
from mlm.engine.device import make_accelerator
from mlm.engine.signals import Stopped
from mlm.errors import UserError

os.environ.update(ACCELERATE_USE_CPU="true", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
os.environ["MASTER_ADDR"] = "127.0.0.1"
errors = UserError("x"), Stopped(15, "x"), ValueError("x"), SystemExit(3), KeyboardInterrupt("x")

def leave(how):
    if how == "makes its own group":
        dist.init_process_group("gloo")
    make_accelerator()
    assert dist.is_initialized()
    if isinstance(how, BaseException):
        raise how
    return {}

for how in ("returns", "makes its own group", *errors):
    if os.fork() == 0:
        atexit.register(lambda: print(how, dist.is_initialized(), flush=True))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        cli.run(lambda argv: leave(how))
        sys.exit()
    print("status", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

# Two processes that connect and end at once, many times over.
CONNECTS = """
import os, socket
from mlm.engine.device import make_accelerator
from mlm.engine.distributed import leave_group

os.environ.update(ACCELERATE_USE_CPU="true", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
for number in range(100):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    for rank in range(2):
        if os.fork() == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            make_accelerator()
            leave_group()
            os._exit(0)
    print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)], flush=True)
"""

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


def start(launcher, program, tmp_path):
    """The program under the launcher, neither of which is told that there is no GPU."""
    path = tmp_path / "program.py"
    path.write_text(program)
    environment = dict(os.environ)
    environment.pop("ACCELERATE_USE_CPU", None)
    return subprocess.run([*launcher, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True)


@ON_THE_CPU
@pytest.mark.slow
def test_two_processes_under_torchrun_are_one_run_without_being_told_that_there_is_no_gpu(tmp_path):
    run = start([*TORCHRUN, "--nproc_per_node", "2"], PROCESSES, tmp_path)
    assert (run.returncode, run.stdout) == (0, '{"processes": 2, "device": "cpu"}\n')


@ON_THE_CPU
@pytest.mark.slow
@pytest.mark.parametrize("configured", [False, pytest.param(True, marks=pytest.mark.torture)])
def test_several_cpu_processes_of_accelerate_launch_are_refused_as_it_starts_one(configured, tmp_path):
    flags = ["--cpu", "--num_processes", "2"]
    if configured:
        (tmp_path / "accelerate.yaml").write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n"
            "num_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\n"
        )
        flags = ["--config_file", str(tmp_path / "accelerate.yaml")]
    run = start([*LAUNCH, *flags], PROCESSES, tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    *_, mistake = run.stderr.splitlines()
    assert mistake.startswith("error: accelerate launch starts one process on a CPU")
    assert "torchrun --nproc_per_node" in mistake


@ON_THE_CPU
@pytest.mark.torture
def test_processes_that_end_as_soon_as_they_are_connected_leave_no_other_one_half_connected(tmp_path):
    run = start([sys.executable], CONNECTS, tmp_path)
    assert run.stdout.splitlines() == ["[0, 0]"] * 100, run.stderr[-1000:]


CONFIGURED = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_MIXED_PRECISION": "fp8",
}


@pytest.mark.parametrize("variable", CONFIGURED)
def test_what_accelerate_is_configured_for_and_this_loop_passes_over_is_refused(variable, monkeypatch):
    """As the launcher tells it; on a CPU accelerate itself would drop FSDP without a word."""
    monkeypatch.setenv(variable, CONFIGURED[variable])
    with pytest.raises(UserError, match=r"bf16|configure `no`") as refused:
        make_accelerator()
    assert CONFIGURED[variable] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_answers_that_ask_for_nothing_are_taken(monkeypatch):
    for variable in CONFIGURED:
        monkeypatch.setenv(variable, "no" if variable.startswith("ACCELERATE_DYN") else "false")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator().mixed_precision == "bf16"


@pytest.mark.torture
@pytest.mark.parametrize(
    ("flag", "mistake"),
    [("--use_fsdp", "ACCELERATE_USE_FSDP=true"), ("--dynamo_backend=inductor", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR")],
)
def test_what_the_launcher_is_asked_for_and_this_loop_passes_over_is_one_line(flag, mistake, tmp_path):
    run = start([*LAUNCH, "--num_processes", "1", flag], PROCESSES, tmp_path)
    assert run.stdout == ""
    assert [line.split(",")[0] for line in run.stderr.splitlines() if "rror: ACC" in line] == [f"error: {mistake}"]


def test_tf32_is_off_unless_asked_for_and_takes_a_gpu_that_has_it(monkeypatch):
    make_accelerator()
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--tf32 needs an NVIDIA GPU"):
            make_accelerator(tf32=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # nothing else is asked of it here
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    try:
        make_accelerator(tf32=True)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        monkeypatch.undo()
        make_accelerator()  # off again
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)


def test_a_script_destroys_the_process_group_that_it_made_on_every_way_out(tmp_path):
    run = start([sys.executable], WAYS_OUT, tmp_path)
    lines = [line for line in run.stdout.splitlines() if not line.startswith("{")]
    assert lines == [
        *("returns False", "status 0"),
        *("makes its own group True", "status 0"),
        *("x False", "status 2"),
        *("x False", "status 143"),
        *("x False", "status 1"),
        *("3 False", "status 3"),
        *("x False", "status 130"),
    ]


@pytest.mark.parametrize(("accepted", "calls"), [(1, [(-3, 2**30), (-1, 2**31 - 1)]), (0, [(-3, 2**30)])])
def test_malloc_keeps_its_thresholds_where_it_refuses_the_first(accepted, calls):
    """As an older C library does. The second alone would make a mapping of each tensor above 128 KiB."""
    asked = []

    def mallopt(option, value):
        asked.append((option, value))
        return accepted

    keep_freed_memory(mallopt)
    assert asked == calls


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_a_step_finds_the_memory_that_the_step_before_has_freed():
    faults = {}
    for what in ("keep", "return"):
        command = [sys.executable, "-c", PROGRAM, what]
        faults[what] = int(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout)
    assert faults["keep"] < faults["return"] / 5


def test_peak_memory_is_that_of_the_process_not_of_the_one_that_started_it():
    """A notebook, say, that has had gigabytes; Linux hands its peak on to what it starts."""
    child = (
        "import torch; from mlm.report.environment import peak_memory_mib; print(peak_memory_mib(torch.device('cpu')))"
    )
    parent = f"""
import subprocess, sys
b"x" * (1 << 30)
print(subprocess.run([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True).stdout)
"""
    printed = subprocess.run(
        [sys.executable, "-c", parent], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    assert 100 < float(printed) < 1000
