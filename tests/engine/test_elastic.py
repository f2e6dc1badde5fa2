"""torchrun starts a run anew with the processes that are left, and it goes on as if nothing had been."""

import random
import subprocess
import sys
import time

import psutil
import pytest

from mlm.engine.checkpoint import steps
from mlm.train import train
from tests.machines import link
from tests.runs import (
    TORCHRUN,
    TWO,
    assert_each_step_once,
    assert_same_bits,
    assert_same_weights,
    finish,
    kill_all,
    metrics,
    run,
    start,
    steps_taken,
    wait_for,
    weights,
    workers,
)

# Steps that take long enough to be interrupted.
SLOWLY = """
import time
from mlm import cli
from mlm import train as loop
from mlm.engine.update import Update
take = Update.__call__
def slowly(*arguments):
    time.sleep(0.2)
    return take(*arguments)
Update.__call__ = slowly
cli.run(lambda argv: loop.train(cli.parse_config(loop.Config, argv)).results)
"""
EVERY = 4  # steps


@pytest.fixture(autouse=True)
def a_store_for_each_start(monkeypatch):
    """torch 2.13 else keeps one for all starts, where processes find the addresses of those before them."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def flags(toy, folder, last_step):
    return toy.flags(
        folder,
        max_train_steps=last_step,
        checkpointing_steps=EVERY,
        logging_steps=1,
        eval_steps=1000,
        resume_from_checkpoint="latest",
        learning_rate=1e-3,
    )


def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(SLOWLY)
    return str(path)


def assert_nothing_is_lost(folder, last_step, had):
    """had: the steps whose checkpoints were there when a process was lost, in turn"""
    assert [line["step"] for line in metrics(folder, "train")] == list(range(1, last_step + 1))
    assert_each_step_once(folder)
    resumed = [line["step"] for line in metrics(folder, "start")]
    # A start that was killed before it wrote a line is not there: the n-th that is has lost n processes or more.
    assert all(step >= there for step, there in zip(resumed[1:], had, strict=False)), (resumed, had)
    assert resumed[-1] >= had[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.torture)])
def test_a_run_of_which_one_of_two_processes_is_killed_goes_on_by_itself(toy, tmp_path, kills, tally):
    rng, folder, last_step, had = random.Random(kills), tmp_path / "run", 30 * kills, []
    process = start([*TORCHRUN, f"--max-restarts={kills}"], flags(toy, folder, last_step), program(tmp_path))
    wait_for(lambda: steps_taken(folder) > EVERY, process)
    for kill in range(kills):
        if kill:
            wait_for(lambda: len(workers(process)) == 2, process)
        time.sleep(rng.uniform(0, 15 if kill else 2))  # while it starts, or is at work
        had.append(max(steps(folder / "checkpoints"), default=0))
        rng.choice(workers(process)).kill()
        time.sleep(1)
    status, _, errors = finish(process)
    assert status == 0, errors
    assert_says_little(errors, kills)
    assert_nothing_is_lost(folder, last_step, had)
    assert run(TWO, flags(toy, tmp_path / "whole", last_step))[0] == 0
    assert_same_bits(weights(folder), weights(tmp_path / "whole"))
    tally("`kill -9` of one of two processes, under torchrun --max-restarts", kills, "started anew, to the same bits")


def assert_says_little(errors, times):
    """A line of this project for each process that was lost, and one of torchrun's for each that has failed."""
    assert errors.count("ends because") <= times, errors
    assert len(errors.splitlines()) <= 5 * times, errors
    assert "Traceback" not in errors
    assert "frame #" not in errors


def torchrun(machine, endpoint, toy, folder, tmp_path, last_step):
    """On one of one or two machines."""
    elastic = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=run"]
    # So that the test waits for less: by default 5 and 30 seconds.
    elastic += [f"--rdzv_endpoint={endpoint}:29400", "--rdzv_conf=keep_alive_interval=1,last_call_timeout=8"]
    started = [sys.executable, "-m", "torch.distributed.run", *elastic, program(tmp_path)]
    return subprocess.Popen(
        [*machine.prefix, *started, *flags(toy, folder, last_step)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.torture
def test_a_run_outlives_a_machine_and_takes_it_back(machines, toy, tmp_path, tally):
    """Its link is silent before its processes are killed: none of its connections is closed."""
    folder, last_step, (one, other) = tmp_path / "run", 200, machines
    arguments = one.name, toy, folder, tmp_path, last_step
    stays, goes = torchrun(one, *arguments), torchrun(other, *arguments)
    try:
        wait_for(lambda: steps(folder / "checkpoints"), stays)
        link(other.name, "down")
        for p in [*psutil.Process(goes.pid).children(recursive=True), psutil.Process(goes.pid)]:
            p.kill()
        began, had = time.monotonic(), max(steps(folder / "checkpoints"))
        [worker] = workers(stays)
        wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, stays)
        left = time.monotonic() - began
        wait_for(lambda: len(metrics(folder, "start")) == 2, stays)
        link(other.name, "up")
        comes_back = torchrun(other, *arguments)
        wait_for(lambda: len(metrics(folder, "start")) == 3, stays)
        status, output, errors = finish(stays)
        assert (status, finish(comes_back)[0]) == (0, 0), errors
    finally:
        link(other.name, "up")
        kill_all(stays)
        kill_all(goes)
    assert 5 < left < 30
    assert [line.split()[5] for line in output.splitlines() if line.startswith("batch ")] == ["2", "1", "2"]
    assert errors.count("ends because process 1 or its machine is not there any more") == 1
    assert_says_little(errors, 2)
    assert_nothing_is_lost(folder, last_step, [had])
    whole = train(toy.config(tmp_path / "whole", max_train_steps=last_step, learning_rate=1e-3))
    assert_same_weights(weights(folder), whole.model.state_dict())
    tally("a machine of two is lost, its link silent", 1, f"the other leaves ({left:.0f} s), goes on, takes it back")
