"""A signal ends a run in order: step finished, checkpoint written, the way to go on said."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mlm.engine.signals import ASKING, StopSignals
from mlm.train import train
from tests.conftest import REPOSITORY
from tests.runs import (
    ACCELERATE,
    ONE,
    PYTHON,
    TORCHRUN,
    TWO,
    assert_each_step_once,
    assert_same_bits,
    finish,
    metrics,
    run,
    start,
    steps_taken,
    wait_for,
    weights,
    workers,
)

pytestmark = pytest.mark.slow
STEPS = 300
QUIET = {"eval_on_start": False, "eval_steps": 100_000}


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The weights of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(toy.config(folder, max_train_steps=STEPS, **QUIET)).model.state_dict()


def flags(toy, folder, **more):
    return toy.flags(folder, **{"max_train_steps": STEPS, **QUIET, **more})


def under_way(folder, step=20):
    return lambda: steps_taken(folder) >= step


def check_it_goes_on(toy, folder, launcher, whole):
    """No step is lost or taken twice, and the weights are those of the uninterrupted run. It goes on without a
    launcher, in as many processes."""
    processes = ONE if launcher in (ONE, ACCELERATE) else TWO
    [stopped_at] = [line["step"] for line in metrics(folder, "checkpoint")]
    assert 20 <= stopped_at < STEPS
    status, _, errors = run(processes, [*flags(toy, folder), "--resume_from_checkpoint=latest"])
    assert status == 0, errors
    assert [line["step"] for line in metrics(folder, "start")] == [0, stopped_at]
    assert_each_step_once(folder)
    if processes == ONE:  # two processes add up in another order than one
        assert_same_bits(weights(folder), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.torture)])
def test_a_signalled_run_writes_a_checkpoint_says_how_to_go_on_and_exits_with_it(toy, tmp_path, whole, number, tally):
    folder = tmp_path / "run"
    process = start(ONE, flags(toy, folder))
    wait_for(under_way(folder), process)
    process.send_signal(number)
    status, _, errors = finish(process)
    assert status == 128 + number
    assert f"stopped by {number.name} after step" in errors
    assert f"--output_dir {folder} --resume_from_checkpoint latest" in errors
    assert "Traceback" not in errors
    check_it_goes_on(toy, folder, ONE, whole)
    tally("SIGTERM or SIGHUP", 1, "step finished, checkpoint, 128 + signal; same bits")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_each_signal_that_schedulers_and_people_send_asks_for_a_stop(name):
    number = signal.Signals[name]
    assert number in ASKING, "else it would end the tests"
    with StopSignals() as stop:
        assert not stop.asked()
        os.kill(os.getpid(), number)
        end = time.monotonic() + 10
        while not stop.asked() and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.asked() == number


def test_a_second_signal_stops_at_once(toy, tmp_path):
    """Here the first one waits for a step of the size of an epoch."""
    folder = tmp_path / "run"
    process = start(ONE, flags(toy, folder, train_batch_size=200_000, per_device_train_batch_size=8))
    wait_for((folder / "metrics.jsonl").exists, process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    status, _, _ = finish(process, seconds=30)  # the step would take many times that
    assert status == 128 + signal.SIGTERM
    assert not (folder / "checkpoints").exists()


def test_a_second_signal_ends_a_process_that_is_not_in_python_code():
    """Here in minutes of hashing; in a collective that waits for a process which is gone, say."""
    program = """
import hashlib
from mlm.engine.signals import ASKING, StopSignals
with StopSignals():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        time.sleep(1.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()


def test_a_signal_right_after_the_launcher_has_gone_is_the_same_request():
    """The step is finished and the checkpoint written all the same."""
    program = """
import os, time
from mlm.engine.signals import ASKING, StopSignals
with StopSignals() as stop:
    print(os.getpid(), flush=True)
    while not stop.asked():
        time.sleep(0.01)
    os.kill(os.getpid(), 15)
    time.sleep(0.5)
    print("in order", stop.asked(), flush=True)
"""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", launcher],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "x"},
    ) as process:
        assert int(process.stdout.readline()) > 0
        process.kill()
        assert process.stdout.readline() == f"in order {int(signal.SIGTERM)}\n"


def test_signals_that_come_together_are_one_request():
    """Ctrl-C reaches a worker from the terminal, and again from its launcher."""
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # a thread hears them
        assert stop.asked() == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_the_limit_of_processor_time_is_one_request_however_often_the_kernel_repeats_it():
    """Once a second, up to the hard limit."""
    with StopSignals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGXCPU)
            time.sleep(1.2)  # a second request of another kind would end this process
        assert stop.asked() == signal.SIGXCPU


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)  # a thread hears them
            assert stop.asked() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_an_evaluation_gives_it_up_and_it_is_made_up_for(toy, tmp_path):
    folder = tmp_path / "run"
    more = {"eval_steps": 20, "max_train_steps": 40, "per_device_eval_batch_size": 1}
    long_text = tmp_path / "long.txt"
    long_text.write_text(toy.validation_file.read_text() * 20)
    more["validation_file"] = long_text
    process = start(ONE, flags(toy, folder, **more))
    wait_for(under_way(folder), process)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGTERM
    assert "after step 20" in errors
    assert metrics(folder, "eval") == []
    more["per_device_eval_batch_size"] = 64  # nothing is interrupted any more
    status, _, errors = run(ONE, [*flags(toy, folder, **more), "--resume_from_checkpoint=latest"])
    assert status == 0, errors
    assert [line["step"] for line in metrics(folder, "eval")] == [20, 40]
    assert_each_step_once(folder)


@pytest.mark.parametrize(
    "launcher",
    [TWO, *(pytest.param(launcher, marks=pytest.mark.torture) for launcher in (ACCELERATE, TORCHRUN))],
    ids=["two processes", "accelerate launch", "torchrun"],
)
def test_a_worker_that_is_signalled_stops_the_run_whoever_launched_it(toy, tmp_path, whole, launcher, tally):
    """Of two processes the second is signalled, and both stop at the same step."""
    folder = tmp_path / "run"
    process = start(launcher, flags(toy, folder))
    wait_for(under_way(folder), process)
    workers(process)[-1].send_signal(signal.SIGUSR1)
    status, _, errors = finish(process)
    assert status != 0
    assert errors.count("stopped by SIGUSR1 after step") == 1
    check_it_goes_on(toy, folder, launcher, whole)
    tally("the same to one worker of a launcher", 1, "all stop at one step; resumed, no step lost")


@pytest.mark.torture
def test_torchrun_passes_sigterm_on(toy, tmp_path, whole):
    folder = tmp_path / "run"
    process = start(TORCHRUN, flags(toy, folder))
    wait_for(under_way(folder), process)
    process.terminate()
    _, _, errors = finish(process)
    assert errors.count("stopped by SIGTERM after step") == 1
    check_it_goes_on(toy, folder, TORCHRUN, whole)


@pytest.mark.parametrize(
    "launcher", [ACCELERATE, pytest.param(TORCHRUN, marks=pytest.mark.torture)], ids=["accelerate launch", "torchrun"]
)
def test_a_worker_whose_launcher_is_gone_stops_in_order(toy, tmp_path, whole, launcher, tally):
    folder = tmp_path / "run"
    process = start(launcher, flags(toy, folder))
    wait_for(under_way(folder), process)
    orphans = workers(process)
    process.kill()
    _, errors = process.communicate()  # ends when the last worker has closed its end
    assert psutil.wait_procs(orphans, timeout=30)[1] == []
    assert errors.count("stopped by SIGTERM after step") == 1
    check_it_goes_on(toy, folder, launcher, whole)
    tally("`kill -9` of the launcher", 1, "its workers stop at one step; resumed, no step lost")


@pytest.mark.torture
def test_a_launcher_that_goes_while_the_run_starts_is_noticed(toy, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import time
from pathlib import Path
from mlm import cli
from mlm import train as loop
load = loop.load_model
def slowly(*arguments):
    Path({str(tmp_path / "loading")!r}).touch()
    time.sleep(3)
    return load(*arguments)
loop.load_model = slowly
cli.run(lambda argv: loop.train(cli.parse_config(loop.Config, argv)).results)
""")
    process = start(ACCELERATE, flags(toy, tmp_path / "run", max_train_steps=10**6), str(program))
    wait_for((tmp_path / "loading").exists, process)
    orphans = workers(process)
    process.kill()
    _, errors = process.communicate()
    assert psutil.wait_procs(orphans, timeout=60)[1] == []
    assert errors.count("stopped by SIGTERM after step 1;") == 1


@pytest.mark.torture
def test_a_run_started_with_nohup_outlives_its_shell(toy, tmp_path):
    """Only where a launcher was is a parent that is gone a reason to stop."""
    folder = tmp_path / "run"
    command = [*PYTHON, "scripts/train.py", *flags(toy, folder)]
    shell = "nohup " + " ".join(f"'{word}'" for word in command) + " >/dev/null 2>&1 & wait"
    with subprocess.Popen(["bash", "-c", shell]) as process:
        wait_for(under_way(folder), process)
        process.kill()
    end = time.monotonic() + 60
    while not (folder / "all_results.json").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert (folder / "all_results.json").exists()
