"""A run from outside: what it prints, what it leaves when its end fails, and that it can be run again."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForMaskedLM

from mlm.engine.checkpoint import CheckpointConfig, damaged, snapshot
from mlm.engine.signals import Stopped, StopSignals
from mlm.errors import UserError
from mlm.report.run_directory import RunConfig
from mlm.train import train
from tests.runs import TWO, assert_same_bits, metrics, run, steps_taken, weights


def test_a_resumed_run_says_from_which_step_and_a_finished_one_that_it_is(toy, tmp_path, capsys):
    config = toy.config(tmp_path / "run", checkpointing_steps=5)
    whole = train(config)
    latest = dataclasses.replace(config, checkpoint=CheckpointConfig(5, resume_from_checkpoint="latest"))
    capsys.readouterr()
    written = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    again = train(latest)
    assert "is finished: 12 steps, held-out perplexity" in capsys.readouterr().out
    assert again.results == whole.results
    assert_same_bits(again.model.state_dict(), whole.model.state_dict())
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == written

    (tmp_path / "run" / "all_results.json").unlink()
    train(latest)
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / 'step_10'}, after step 10" in capsys.readouterr().out


def test_a_finished_run_of_another_experiment_is_not_replaced(toy, tmp_path):
    train(toy.config(tmp_path / "run"))
    before = weights(tmp_path / "run")
    with pytest.raises(UserError, match=r"finished run of another experiment, with learning_rate 0.1 "):
        train(toy.config(tmp_path / "run", learning_rate=0.1, resume_from_checkpoint="latest"))
    assert_same_bits(weights(tmp_path / "run"), before)


@pytest.mark.parametrize("where", ["mlm.report.summary.conclude", "mlm.report.summary.model_card"])
def test_a_failure_after_the_last_step_leaves_the_trained_model(toy, tmp_path, monkeypatch, where):
    whole = train(toy.config(tmp_path / "whole"))

    def fails(*_, **__):
        raise ZeroDivisionError("of a bug in the analysis")

    monkeypatch.setattr(where, fails)
    with pytest.raises(UserError, match="ZeroDivisionError: of a bug in the analysis") as stopped:
        train(toy.config(tmp_path / "run"))
    assert f"scripts/evaluate.py --model_name_or_path {tmp_path / 'run'} --compare" in str(stopped.value)
    assert_same_bits(weights(tmp_path / "run"), whole.model.state_dict())
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_the_model_and_the_checkpoint_of_its_step_share_their_weights(toy, tmp_path):
    train(toy.config(tmp_path / "run", checkpointing_steps=6))
    saved = tmp_path / "run" / "model.safetensors"
    last, earlier = (tmp_path / "run" / "checkpoints" / f"step_{n}" for n in (12, 6))
    assert saved.samefile(last / "model.safetensors")
    assert not saved.samefile(earlier / "model.safetensors")
    assert damaged(last) is None


def test_tracker_files_of_an_overwritten_run_go_with_it(toy, tmp_path):
    tracked = RunConfig(str(tmp_path / "run"), with_tracking=True, report_to="tensorboard")
    train(toy.config(modules={"run": tracked}))
    first = set((tmp_path / "run").rglob("events.out.tfevents.*"))
    (tmp_path / "run" / "mlm" / "notes.txt").write_text("of mine")
    train(toy.config(modules={"run": dataclasses.replace(tracked, overwrite_output_dir=True)}))
    assert first
    assert not first & set((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "mlm" / "notes.txt").exists()


def test_a_state_that_is_neither_tensors_nor_json_is_refused_by_name():
    class Fork:
        def state_dict(self):
            return {"teacher": {"table": [torch.ones(1), object()]}}

    with pytest.raises(UserError, match=r"fork\.teacher\.table\.1 cannot be in a checkpoint: object is neither"):
        snapshot(torch.nn.Linear(1, 1), {"fork": Fork()}, {})


def test_run_json_says_when_on_what_and_with_which_functions(toy, tmp_path):
    train(toy.config(tmp_path / "run"))
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["started"].startswith("20")
    assert about["data"]["train"]["documents"] == 400
    assert about["data"]["held_out"]["documents"] == 60
    assert about["experiment"]["loss function"].startswith("objective ")
    [[kind, schedule, _]] = about["experiment"]["optimizers"]
    assert (kind, schedule) == ("AdamW", "LambdaLR")


@pytest.mark.slow
def test_train_can_be_called_again_and_again_by_several_processes(toy, tmp_path):
    """It makes no process group but the first, and destroys none that it did not make. No thread of the group is left
    when Python ends: under load, one in a few hundred aborted the process."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import atexit, glob, sys
import torch.distributed as dist

def thread(task):
    try:
        return open(task).read()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return ""

def threads():
    return [task for task in glob.glob("/proc/self/task/*/comm") if "gloo" in thread(task)]

atexit.register(lambda: print("left:", threads(), flush=True))  # the last to be called
from mlm import cli
from mlm.config import Config
from mlm.train import train

for name in "ab":
    flags = {toy.flags(tmp_path, max_train_steps=3)!r} + ["--output_dir={tmp_path}/" + name]
    train(cli.parse_config(Config, flags))
finished = train(cli.parse_config(Config, flags + ["--resume_from_checkpoint=latest"]))
print("weights:", sum(p.double().sum().item() for p in finished.model.parameters()), flush=True)
assert dist.is_initialized() and dist.get_world_size() == 2
assert threads() or sys.platform != "linux"
""")
    status, output, errors = run(TWO, [], str(program))
    assert status == 0, errors
    assert output.count("left: []") == 2
    sums = [float(line.split()[1]) for line in output.splitlines() if line.startswith("weights: ")]
    parameters = AutoModelForMaskedLM.from_pretrained(tmp_path / "b").parameters()
    assert sums == 2 * [sum(p.double().sum().item() for p in parameters)], "both have the weights that were saved"
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert len(metrics(tmp_path / "b", "end")) == 1


@pytest.mark.slow
def test_processes_agree_on_the_folder_that_nobody_named(toy, tmp_path):
    flags = [flag for flag in toy.flags(tmp_path, max_train_steps=2) if "output_dir" not in flag]
    flags += ["--resume_from_checkpoint=latest"]
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, shutil, time
from types import SimpleNamespace
from mlm import cli
from mlm.config import Config
from mlm.report.run_directory import RunDirectory
from mlm.train import train
os.chdir({str(tmp_path)!r})
clock = time.strftime
late = "-late" if os.environ["RANK"] == "1" else ""
time.strftime = lambda form, *t: clock(form, *t) + (late if "runs/" in form else "")
if late:  # its own disk is full, and its own view of the folder another
    shutil.disk_usage = lambda _: SimpleNamespace(total=1, free=0)
    RunDirectory.finished = lambda *_: 1 / 0
print("folder", train(cli.parse_config(Config, {flags!r})).output_dir, flush=True)
""")
    status, output, errors = run(TWO, [], str(program))
    assert status == 0, errors
    named = {line for line in output.splitlines() if line.startswith("folder")}
    assert len(named) == 1
    assert "late" not in named.pop()


def test_without_hard_links_the_model_is_saved_all_the_same(toy, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    result = train(toy.config(tmp_path / "run", checkpointing_steps=6))
    assert_same_bits(weights(tmp_path / "run"), result.model.state_dict())


@pytest.mark.parametrize("stop_in", [6, 5])
def test_the_last_weights_can_be_the_best_though_a_signal_stops_the_run_right_then(
    toy, tmp_path, monkeypatch, stop_in
):
    settings = {"max_train_steps": 6, "eval_steps": 2, "load_best_model_at_end": True}
    whole = train(toy.config(tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        asked = StopSignals.asked
        patch.setattr(
            StopSignals, "asked", lambda self: 15 if steps_taken(tmp_path / "run") >= stop_in else asked(self)
        )
        with pytest.raises(Stopped):
            train(toy.config(tmp_path / "run", logging_steps=1, **settings))
    again = toy.config(tmp_path / "run", logging_steps=1, resume_from_checkpoint="latest", **settings)
    assert_same_bits(train(again).model.state_dict(), whole.model.state_dict())
    assert [line["step"] for line in metrics(tmp_path / "run", "eval")] == [0, 2, 4, 6]


@pytest.mark.slow
def test_an_empty_share_logs_named_scalars_too_and_a_failure_on_another_rank_is_printed(toy, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import os, sys
from mlm import cli
from mlm import train as loop
from mlm.config import Config
plain = loop.objective
loop.objective = lambda model, batch: (plain(model, batch), {"agreement": plain(model, batch).detach().sum()})
if "fails" in sys.argv[-1]:
    def fails(*_, **__):
        raise ZeroDivisionError("on rank 1")
    if os.environ["RANK"] == "1":
        loop.conclude_run = fails
cli.run(lambda argv: loop.train(cli.parse_config(Config, argv)).results)
""")
    flags = {"train_batch_size": 1, "max_train_steps": 3}
    status, _, errors = run(TWO, toy.flags(tmp_path / "fine", **flags), str(program))
    assert status == 0, errors
    assert all(line["agreement"] == pytest.approx(line["loss"]) for line in metrics(tmp_path / "fine", "train"))
    _, _, errors = run(TWO, toy.flags(tmp_path / "fails", **flags), str(program))
    assert "the trained model is saved in" in errors
    assert "ZeroDivisionError: on rank 1" in errors
