"""What a run stands on: standard output, the terminal, the locale, a home, a working directory."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY
from tests.runs import ONE, PYTHON, SCRIPT, assert_same_bits, finish, metrics, start, wait_for, weights

pytestmark = pytest.mark.slow


def launch(flags, stdout, stderr=subprocess.PIPE, **more):
    environment = {**os.environ, **more.pop("environment", {})}
    command = [*PYTHON, SCRIPT, *flags]
    return subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True, env=environment, cwd=REPOSITORY, **more)


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The weights of a run that could say all that it had to say."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(ONE, toy.flags(folder, logging_steps=1))
    assert finish(process)[0] == 0
    return weights(folder)


def check_it_is_whole(folder, whole):
    assert json.loads((folder / "all_results.json").read_text())["steps"] == 12
    assert_same_bits(weights(folder), whole)


def test_a_full_disk_under_standard_output_costs_nothing_else(toy, tmp_path, whole, tally):
    with open("/dev/full", "w") as full:
        status, _, errors = finish(launch(toy.flags(tmp_path / "run", logging_steps=1), full))
    assert (status, errors) == (0, "")
    check_it_is_whole(tmp_path / "run", whole)
    tally("a full disk under standard output", 1, "training goes on, exit status 0")


@pytest.mark.torture
def test_a_reader_that_is_gone_costs_nothing_else(toy, tmp_path, whole, tally):
    reading, writing = os.pipe()
    process = launch(toy.flags(tmp_path / "run", logging_steps=1), writing)
    os.close(writing)
    os.close(reading)
    status, _, errors = finish(process)
    assert (status, errors) == (0, "")
    check_it_is_whole(tmp_path / "run", whole)
    tally("a closed pipe under standard output", 1, "training goes on, exit status 0")


@pytest.mark.torture
def test_closed_standard_streams_cost_nothing_else(toy, tmp_path, whole):
    command = " ".join(f"'{word}'" for word in [*PYTHON, SCRIPT, *toy.flags(tmp_path / "run", logging_steps=1)])
    done = subprocess.run(["bash", "-c", f"{command} >&- 2>&-"], cwd=REPOSITORY)
    assert done.returncode == 0
    check_it_is_whole(tmp_path / "run", whole)


def test_a_terminal_that_is_gone_costs_nothing_else(toy, tmp_path, whole, tally):
    """One that sends no SIGHUP, as the run is in another session."""
    screen, terminal = pty.openpty()
    flags = toy.flags(tmp_path / "run", logging_steps=1)
    process = launch(flags, terminal, terminal, start_new_session=True)
    os.close(terminal)
    wait_for((tmp_path / "run" / "run.json").exists, process)
    os.close(screen)
    assert process.wait(240) == 0
    check_it_is_whole(tmp_path / "run", whole)
    tally("a terminal that is closed", 1, "training goes on, exit status 0")


def test_a_run_whose_terminal_is_closed_stops_with_a_checkpoint(toy, tmp_path, tally):
    folder = tmp_path / "run"
    flags = toy.flags(folder, max_train_steps=100_000, eval_on_start="false", eval_steps=10**6)
    child, screen = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execve(sys.executable, [*PYTHON, SCRIPT, *flags], os.environ)
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not metrics(folder, "train"):
        assert time.monotonic() < end
        os.set_blocking(screen, False)
        try:
            os.read(screen, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(screen)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert len(metrics(folder, "checkpoint")) == 1
    tally("a terminal that is closed, with SIGHUP", 1, "step finished, checkpoint, 128 + signal")


ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.torture
def test_output_in_ascii_costs_nothing_else(toy, tmp_path, whole, tally):
    """The run says where it is saved: in escapes."""
    folder = tmp_path / "Läufe ×2"
    environment = {"PYTHONIOENCODING": "ascii"}
    process = launch(toy.flags(folder, logging_steps=1), subprocess.PIPE, environment=environment)
    status, output, errors = finish(process)
    assert (status, errors) == (0, "")
    assert "saved to " in output and r"L\xe4ufe \xd72" in output
    check_it_is_whole(folder, whole)
    tally("standard output in ASCII", 1, "training goes on, exit status 0")


@pytest.mark.torture
def test_a_name_that_libraries_cannot_write_is_refused_before_training(toy, tmp_path):
    """One that is not UTF-8 to Python: tokenizers would fail to save it when training is over."""
    process = launch(toy.flags(tmp_path / "Läufe"), subprocess.PIPE, environment=ASCII)
    status, _, errors = finish(process)
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: --output_dir ") and "UTF-8" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torture
def test_a_figure_that_standard_output_cannot_take_is_a_mistake_where_it_stands_nowhere_else(toy):
    flags = [
        f"--model_name_or_path={toy.checkpoint}",
        f"--validation_file={toy.validation_file}",
        "--max_seq_length=16",
        "--allow_leaks",
    ]
    flags += [f"--train_file={toy.train_file}", f"--token_store={toy.checkpoint.parent / 'stores'}"]
    command = [*PYTHON, str(REPOSITORY / "scripts" / "evaluate.py"), *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ") and "No space left on device" in done.stderr


@pytest.fixture
def unknown():
    """A command that runs another one under a uid that the machine does not know, as containers on OpenShift do."""
    command = ["unshare", "--user", "--map-user=54321"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine has no user namespaces")
    return command


@pytest.mark.torture
@pytest.mark.parametrize("home", [None, "nowhere"], ids=["no home", "a home that is not there"])
def test_a_uid_that_the_machine_does_not_know_can_train(toy, tmp_path, home, unknown, tally):
    unset = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "USER", "LOGNAME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"TMPDIR": str(tmp_path)} | ({"HOME": str(tmp_path / home)} if home else {})
    (tmp_path / "work").mkdir()
    flags = [flag for flag in toy.flags("run") if not flag.startswith("--token_store")]
    command = [*unknown, *PYTHON, SCRIPT, *flags]
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["run"]
    assert (tmp_path / "home-54321" / ".cache" / "mlm").is_dir()
    assert not (tmp_path / "nowhere").exists()
    tally("no home, and a uid without an entry", 1, "trains; caches in the temporary folder")


def test_a_working_directory_that_is_gone_is_a_mistake_in_one_line(toy, tmp_path):
    (tmp_path / "gone").mkdir()
    command = " ".join(f"'{word}'" for word in [*PYTHON, SCRIPT, *toy.flags(tmp_path / "run")])
    shell = f"cd '{tmp_path}/gone' && rmdir '{tmp_path}/gone' && {command}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the working directory has been removed; change to another one\n"


def test_a_world_that_is_no_number_is_a_mistake_in_one_line(toy, tmp_path):
    process = launch(toy.flags(tmp_path / "run"), subprocess.PIPE, environment={"WORLD_SIZE": "two"})
    status, _, errors = finish(process)
    assert status == 2
    assert errors == "error: the environment variable WORLD_SIZE is 'two' and no number; unset it\n"
