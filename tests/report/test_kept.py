"""What was trained is kept: on the disk before it is said to be, and not silently without its best or last part."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlm.engine import checkpoint
from mlm.engine.checkpoint import CheckpointConfig, steps
from mlm.errors import UserError
from mlm.train import train
from tests.report.test_run_directory import contents
from tests.runs import ONE, assert_same_bits, metrics, own_disk, run, weights


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 400 kB: room for the toy's model (112 kB), and not for a checkpoint (340 kB) as well."""
    with own_disk(tmp_path / "disk", "400k") as place:
        yield place


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(toy, tiny_disk):
    flags = toy.flags(tiny_disk / "run", max_train_steps=2)
    status, _, errors = run(ONE, flags)
    assert status == 2
    assert errors.startswith(
        f"error: --output_dir {tiny_disk / 'run'}: a checkpoint and the model take 0.4 MB, and 0."
    )
    assert len(errors.splitlines()) == 1
    assert not contents(tiny_disk)
    status, output, errors = run(ONE, [*flags, "--on_save_error=continue"])
    assert status == 0, errors
    assert "a checkpoint and the model take" in output
    assert weights(tiny_disk / "run")


def test_the_model_and_the_results_are_on_the_disk_before_the_run_says_so(toy, tmp_path, monkeypatch):
    synced, said, fsync, folder = [], {}, os.fsync, tmp_path / "run"

    def recorded(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def printed(_, text):
        if "saved to" in (text or ""):
            said.update({path.name: path.stat().st_ino for path in [folder, *folder.iterdir()]})
            said["synced"] = list(synced)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr("mlm.report.metrics.Log.print", printed)
    train(toy.config(folder, max_train_steps=2))
    names = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "run.json"}
    for name in names | {"README.md", "documents.parquet", "comparison.json", "all_results.json"}:
        assert said[name] in said["synced"], name
    last = {inode: place for place, inode in enumerate(said["synced"])}
    assert last[said["run"]] > last[said["all_results.json"]], "the folder's entries come after its files"


def test_a_model_that_cannot_be_saved_leaves_a_checkpoint_of_the_last_step(toy, tmp_path, monkeypatch):
    whole = train(toy.config(tmp_path / "whole"))
    folder = tmp_path / "run"
    train(toy.config(folder, max_train_steps=1))
    (folder / "model.partial").write_text("a file of the user, in the way")
    with pytest.raises(UserError, match="the model could not be saved") as stopped:
        train(toy.config(folder, overwrite_output_dir=True))
    assert "--resume_from_checkpoint latest resumes from the last checkpoint" in str(stopped.value)
    assert list(steps(folder / "checkpoints")) == [12]
    (folder / "model.partial").unlink()
    with monkeypatch.context() as patch:  # room for the model, which is all that is missing
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=150_000))
        resumed = train(toy.config(folder, resume_from_checkpoint="latest"))
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())
    assert [line["step"] for line in metrics(folder, "start")] == [0, 12]


@contextlib.contextmanager
def full_for(monkeypatch, *names):
    """A disk that has no room for checkpoints of these names."""
    write = checkpoint.write

    def refuse(place, files):
        if place.name in names:
            raise OSError(28, "No space left on device")
        write(place, files)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", refuse)
        yield


def test_resuming_is_advised_only_where_there_is_a_checkpoint(toy, tmp_path, monkeypatch):
    train(toy.config(tmp_path / "run", max_train_steps=1))
    (tmp_path / "run" / "model.partial").write_text("in the way")
    with full_for(monkeypatch, "step_12"), pytest.raises(UserError, match=r"could not be saved \(.*\)$"):
        train(toy.config(tmp_path / "run", overwrite_output_dir=True))
    with full_for(monkeypatch, "step_3"), pytest.raises(UserError, match=r"step_3 could.*there is no earlier one"):
        train(toy.config(tmp_path / "none", checkpointing_steps=3))
    with full_for(monkeypatch, "step_6"), pytest.raises(UserError, match=r"step_6 could.*earlier ones are intact"):
        train(toy.config(tmp_path / "one", checkpointing_steps=3))


@pytest.mark.parametrize("name", ["step_12", "best_12"])
def test_a_last_checkpoint_or_best_weights_that_are_lost_stop_the_run_too(toy, tmp_path, monkeypatch, name):
    best = name.startswith("best")
    settings = {"checkpointing_steps": 6, "eval_steps": 6, "load_best_model_at_end": best}
    whole = train(toy.config(tmp_path / "whole", **settings))
    with full_for(monkeypatch, name), pytest.raises(UserError, match=f"{name} could not be written: No space"):
        train(toy.config(tmp_path / "run", **settings))
    assert_same_bits(weights(tmp_path / "run"), whole.model.state_dict())
    assert not (tmp_path / "run" / "all_results.json").exists()
    with full_for(monkeypatch, name):
        result = train(toy.config(tmp_path / "goes on", on_save_error="continue", **settings))
    assert_same_bits(result.model.state_dict(), whole.model.state_dict())


@contextlib.contextmanager
def damage_to(monkeypatch, name):
    """A disk that keeps other weights under this name than were written."""
    write = checkpoint.write

    def alter(place, files):
        write(place, files)
        if place.name == name:
            (place / "model.safetensors").write_bytes(b"\0" * (place / "model.safetensors").stat().st_size)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", alter)
        yield


# The fourth of six steps is the best: the learning rate is too high, and kept.
RUINS = {"learning_rate": 0.1, "num_warmup_steps": 1, "lr_scheduler_type": "constant_with_warmup"}
RUINS |= {"eval_steps": 2, "load_best_model_at_end": True, "max_train_steps": 6}


@pytest.mark.parametrize(("fault", "instead"), [(full_for, 2), (damage_to, 6)])
def test_whose_weights_a_model_has_is_said_where_the_best_are_lost(toy, tmp_path, monkeypatch, capsys, fault, instead):
    """By choice a run goes on without the best; else it ends in an error."""
    lost = rf"the best weights, of held-out loss \d\.\d+, are lost: the model has those of step {instead}"
    train(toy.config(tmp_path / "whole", **RUINS))
    assert (tmp_path / "whole" / "checkpoints" / "best_4").is_dir()
    assert "are lost" not in capsys.readouterr().out
    losses = {line["step"]: line["eval_loss"] for line in metrics(tmp_path / "whole", "eval")}
    with fault(monkeypatch, "best_4"):
        ended = train(toy.config(tmp_path / "goes on", on_save_error="continue", **RUINS))
        assert ended.results["eval_loss"] == pytest.approx(losses[instead])
        assert re.search(f"^warning: .*; {lost}$", capsys.readouterr().out, re.M)
        with pytest.raises(UserError, match="could not be written" if fault is full_for else lost):
            train(toy.config(tmp_path / "stops", **RUINS))


def test_a_run_that_lost_its_best_weights_and_is_resumed_ends_with_them(toy, tmp_path, monkeypatch):
    """No checkpoint may stand that takes the best as kept."""
    settings = {**RUINS, "checkpointing_steps": 2}
    whole = train(toy.config(tmp_path / "whole", **settings))
    losses = [line["eval_loss"] for line in metrics(tmp_path / "whole", "eval")]
    best = 2 * losses.index(min(losses))
    assert 0 < best < 6
    with full_for(monkeypatch, f"best_{best}"), pytest.raises(UserError, match=f"best_{best} could not be written"):
        train(toy.config(tmp_path / "run", **settings))
    latest = CheckpointConfig(2, resume_from_checkpoint="latest")
    resumed = train(dataclasses.replace(toy.config(tmp_path / "run", **settings), checkpoint=latest))
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())
    assert Path(tmp_path / "run" / "checkpoints" / f"best_{best}").is_dir()
