"""While a run goes on: a bar on a terminal, lines elsewhere, the same events in TensorBoard."""

import fcntl
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlm.report.metrics import Log, Progress
from mlm.report.run_directory import RunConfig
from mlm.train import train
from tests.conftest import REPOSITORY
from tests.runs import ONE, PYTHON, SCRIPT, assert_same_bits, metrics, own_disk, run, weights

EVALUATION = re.compile(r"step (\d+): held-out loss \d+\.\d{4}, perplexity [\d.]+")
LINE = re.compile(r"\d\d:\d\d:\d\d step (\d+)/12: loss [\d.]+, lr [\d.]+e[+-]\d+, [\d,]+ tokens/s, \d+:\d\d:\d\d left")
BAR = re.compile(r"(\d+)/12 .* \d\d:\d\d left, loss [\d.]+, lr [\d.]+e[+-]\d+, [\d,]+ tokens/s")


def on_a_terminal(command: list[str], columns: int) -> tuple[int, str]:
    """Exit status, and all that a process writes to a terminal of so many columns."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, cwd=REPOSITORY, env=environment)
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(mine, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(mine)
    return process.wait(), written.decode()


def screen(written: str) -> list[str]:
    """The lines that stand on a terminal in the end: a carriage return goes back, what follows overwrites."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown: list[str] = []
        for part in line.split("\r"):
            shown[: len(part)] = part
        lines.append("".join(shown).rstrip())
    return lines


@pytest.mark.slow
def test_a_terminal_shows_one_bar_and_whole_lines_above_it(toy, tmp_path):
    flags = toy.flags(tmp_path / "run", eval_steps=4, logging_steps=2)
    status, written = on_a_terminal([*PYTHON, SCRIPT, *flags, "--json"], columns=120)
    assert status == 0, written
    lines = screen(written)
    assert "\x1b[A" not in written, "no second bar above the first"
    assert [int(m[1]) for m in map(EVALUATION.fullmatch, lines) if m] == [0, 4, 8, 12]
    assert not [line for line in lines if LINE.search(line)], "the bar says it"
    bars = [line for line in lines if "left" in line and "/12" in line]
    assert [int(BAR.fullmatch(bar)[1]) for bar in bars] == [12]
    drawn = [int(m[1]) for m in map(BAR.match, re.split(r"[\r\n]", written)) if m]
    assert drawn == sorted(drawn)
    assert set(drawn) >= {2, 4, 6, 8, 10, 12}
    assert max(len(line) for line in re.split(r"[\r\n]", written) if "left" in line) <= 120
    assert json.loads(lines[-2])["steps"] == 12


@pytest.mark.slow
def test_a_file_gets_a_line_every_logging_steps_and_no_bar(toy, tmp_path):
    status, output, errors = run(ONE, toy.flags(tmp_path / "run", eval_steps=6, logging_steps=5))
    assert status == 0, errors
    assert "\r" not in output + errors
    assert "left" not in errors
    lines = output.splitlines()
    assert [int(m[1]) for m in map(LINE.fullmatch, lines) if m] == [5, 6, 10, 12]  # an evaluation ends a line
    assert [int(m[1]) for m in map(EVALUATION.fullmatch, lines) if m] == [0, 6, 12]


def test_the_time_left_is_estimated_once_there_is_a_step_to_estimate_it_from(toy, tmp_path, capsys):
    train(toy.config(tmp_path / "run", logging_steps=1, max_train_steps=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert [" left" in line for line in lines] == [False, True, True]


def test_events_count_the_tokens_seen(toy, tmp_path):
    modules = {"run": RunConfig(output_dir=str(tmp_path / "run"), logging_steps=5)}
    train(toy.config(modules=modules, eval_steps=4))
    step = 8 * 16  # chunks of 16 tokens, none of them padding
    for event, steps in (("train", [4, 5, 8, 10, 12]), ("eval", [0, 4, 8, 12])):
        told = [(line["step"], line["tokens"]) for line in metrics(tmp_path / "run", event)]
        assert told == [(s, s * step) for s in steps]


def test_tensorboard_reads_back_what_the_run_measured(toy, tmp_path):
    record = RunConfig(output_dir=str(tmp_path / "run"), logging_steps=5, with_tracking=True, report_to="tensorboard")
    results = train(toy.config(modules={"run": record}, eval_steps=4)).results
    [folder] = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*") if path.parent.name == "mlm"}
    events = EventAccumulator(str(folder))
    events.Reload()
    told = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for event, names in (
        ("train", ("loss", "learning_rate", "tokens_per_second", "tokens")),
        ("eval", ("perplexity", "eval_loss", "accuracy")),
    ):
        for name in names:
            expected = [(line["step"], line[name]) for line in metrics(tmp_path / "run", event)]
            assert told[f"{event}/{name}"] == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected], name
    for name in ("perplexity", "perplexity_before", "gain", "gain_low", "gain_high", "train_loss"):
        assert told[f"end/{name}"] == [(12, pytest.approx(results[name], rel=1e-6))]


@pytest.fixture
def tracked(toy, tmp_path):
    """The flags of a run with TensorBoard, in a folder that holds an earlier run."""
    train(toy.config(tmp_path / "run", max_train_steps=1))
    more = {"overwrite_output_dir": "true", "with_tracking": "true", "report_to": "tensorboard", "logging_steps": 1}
    return toy.flags(tmp_path / "run", **more)


def test_a_tracker_that_cannot_be_started_costs_its_curves_alone(tracked, toy, tmp_path):
    (tmp_path / "run" / "mlm").write_text("a file where TensorBoard's folder has to be")
    status, output, errors = run(ONE, tracked)
    assert (status, errors) == (0, "")
    assert "no more metrics for --report_to: FileExistsError" in output
    assert_same_bits(weights(tmp_path / "run"), train(toy.config(tmp_path / "plain")).model.state_dict())


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_tracker_costs_its_curves_alone(tracked, toy, tmp_path):
    with own_disk(tmp_path / "run" / "mlm", "16k"):
        status, output, _ = run(ONE, [*tracked, "--max_train_steps=100"])
    assert status == 0
    assert output.count("no more metrics for --report_to: OSError") == 1
    assert json.loads(output.splitlines()[-1])["steps"] == 100
    assert len(metrics(tmp_path / "run", "train")) == 100


@pytest.mark.slow
@pytest.mark.parametrize("stream", [pytest.param("stdout", marks=pytest.mark.torture), "stderr"])
def test_a_full_disk_under_what_is_printed_costs_no_training(toy, tmp_path, stream):
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        command = [*PYTHON, SCRIPT, *toy.flags(tmp_path / "run")]
        subprocess.run(command, cwd=REPOSITORY, timeout=240, **streams)
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["steps"] == 12
    assert [line["event"] for line in metrics(tmp_path / "run", "end")] == ["end"]


def test_escapes_in_names_are_shown_and_not_sent(toy, tmp_path, capsys):
    """A checkpoint's folder may have any name: a title of the terminal, colours, lines that go back."""
    base = tmp_path / "\x1b]0;owned\x07\x1b[2J"
    shutil.copytree(toy.checkpoint, base)
    train(toy.config(tmp_path / "\x1b[31mred", max_train_steps=1, model_name_or_path=str(base)))
    printed = capsys.readouterr()
    assert "\\x1b]0;owned" in printed.out
    assert "\\x1b[31mred" in printed.out
    assert "\x1b" not in printed.out + printed.err


def test_an_escape_in_the_name_of_a_forks_scalar_is_shown_on_the_bar_and_not_sent(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    log, progress = Log(tmp_path, Accelerator(cpu=True)), Progress()
    progress.step = 1
    log.advance(1, 12)
    log.training(progress, {"\x1b[31mred": 1.0, "tokens_per_second": 1.0}, [1e-3])
    log.close()
    assert "\\x1b[31mred 1.000" in terminal.getvalue()
    assert "\x1b[31m" not in terminal.getvalue()


def test_a_line_of_the_log_that_a_full_disk_cannot_take_costs_no_training_and_is_named(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    Log(tmp_path, Accelerator(cpu=True)).event("eval", 3, eval_loss=1.0)
    assert capsys.readouterr().out == "metrics.jsonl lacks a line, eval of step 3: No space left on device\n"
