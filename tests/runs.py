"""Runs as tests start them, in this process and in others, and how their results are compared."""

import dataclasses
import difflib
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForMaskedLM

from mlm.engine.checkpoint import CheckpointConfig
from tests.conftest import REPOSITORY
from tests.processes import Forked, server

ONE, TWO = 1, 2  # processes of a run, forked from one that has imported torch: without a launcher, and sooner
PYTHON = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
SCRIPT = str(REPOSITORY / "scripts" / "train.py")

log = logging.getLogger(__name__)  # pytest shows it under a test that failed


def half_precision(init_scale):
    """fp16 with a real scaler, on the CPU, where accelerate itself would offer none."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return accelerator


def start(launcher: list[str] | int, flags: list[str], program: str = SCRIPT) -> subprocess.Popen | Forked:
    """A training process, or a launcher with its own, at work in the background."""
    if isinstance(launcher, int):
        return server().start([program, *flags], processes=launcher)
    return subprocess.Popen(
        [*launcher, program, *flags], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen | Forked, seconds: float = 240) -> tuple[int, str, str]:
    """Its exit status, standard output and standard error. An overdue one is killed, and the test fails."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    log.warning("exit status %s\n%s\n%s", process.returncode, output, errors)
    return process.returncode, output, errors


def run(launcher: list[str] | int, flags: list[str], program: str = SCRIPT) -> tuple[int, str, str]:
    return finish(start(launcher, flags, program))


def workers(process: subprocess.Popen | Forked) -> list[psutil.Process]:
    """The training processes themselves: the last in the chain of parents and children."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        trains = [p for p in family if any(word.endswith(".py") for word in p.cmdline()[1:2])]
        return trains or [p for p in family if not p.children()]
    except psutil.NoSuchProcess:
        return []


def kill_all(process: subprocess.Popen | Forked) -> None:
    """SIGKILL to a process and all that it started, so that none runs on beside the next test."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        if member.is_running():
            member.kill()
    process.communicate()


def wait_for(event: Callable[[], object], process: subprocess.Popen | Forked, seconds: float = 120) -> None:
    """Returns once `event()` is true. Fails where the process ends, or the time is up, before."""
    end = time.monotonic() + seconds
    while not event():
        if process.poll() is not None or time.monotonic() > end:
            kill_all(process)
            raise AssertionError(f"waited in vain; the process has ended with {process.returncode}")
        time.sleep(0.002)


@contextmanager
def own_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes (`400k`) at `place`. Skips the test where none can be mounted."""
    place.mkdir(exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this test has to mount a file system of its own, which takes root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def metrics(folder: Path, event: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def steps_taken(folder: Path) -> int:
    """How far a run has come, by its metrics; 0 while there are none, or the last line is being written."""
    try:
        return max((line["step"] for line in metrics(folder, "train")), default=0)
    except (OSError, ValueError):
        return 0


def assert_each_step_once(folder: Path) -> None:
    for event in ("start", "train", "eval", "checkpoint", "end"):
        steps = [line["step"] for line in metrics(folder, event)]
        assert steps == sorted(set(steps)), event


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForMaskedLM.from_pretrained(folder).state_dict()


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{name}: up to {(tensor - other[name]).abs().max()} apart"


def changed_lines(fork: str) -> int:
    """In how many lines a file, named from the repository's root, differs from mlm/train.py."""
    texts = [(REPOSITORY / path).read_text().splitlines() for path in ("mlm/train.py", fork)]
    changes = difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes()
    return sum(max(end - start, to - since) for kind, start, end, since, to in changes if kind != "equal")


def cut_and_resumed(train: Callable[[Any], Any], config: Any) -> dict[str, torch.Tensor]:
    """The weights of a run of 12 steps that was killed at its end and resumed from its last checkpoint, step 10."""
    train(config)
    folder = Path(config.run.output_dir)
    (folder / "all_results.json").unlink()  # as a kill at the end leaves it
    latest = CheckpointConfig(resume_from_checkpoint="latest")
    resumed = train(dataclasses.replace(config, checkpoint=latest)).model.state_dict()
    assert [line["step"] for line in metrics(folder, "start")] == [0, 10]
    return resumed


def assert_same_weights(one, other, rtol=1e-3, atol=5e-5) -> None:
    """To what rounding leaves, where weights move by 0.1. A key's bias shifts all scores of a row alike: its
    gradient is the rounding of zero, which Adam turns into steps, and it changes nothing."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(
                tensor, other[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )
