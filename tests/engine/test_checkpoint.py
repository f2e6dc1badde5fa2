"""Checkpoints: whole or not there, exact, found again, and never another experiment's (invariant 4)."""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from mlm.data import order
from mlm.data.masking import MaskingConfig
from mlm.engine import checkpoint
from mlm.engine.checkpoint import (
    CheckpointConfig,
    Writer,
    damaged,
    find,
    load,
    outdated,
    remove,
    snapshot,
    steps,
    tensors,
    write,
)
from mlm.errors import UserError
from mlm.report.metrics import Progress
from mlm.train import train
from tests.runs import (
    ONE,
    TWO,
    assert_each_step_once,
    assert_same_bits,
    assert_same_weights,
    finish,
    half_precision,
    metrics,
    own_disk,
    run,
    start,
    steps_taken,
    wait_for,
    weights,
)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_run_ends_in_the_bits_of_the_uninterrupted_one(toy, tmp_path, dropout):
    whole = train(toy.config(tmp_path / "whole", dropout=dropout, eval_steps=4))
    config = toy.config(tmp_path / "cut", dropout=dropout, eval_steps=4)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(checkpointing_steps=5))
    train(config)
    (tmp_path / "cut" / "checkpoints" / "step_10").rename(tmp_path / "out_of_the_way")
    (tmp_path / "cut" / "all_results.json").unlink()
    resumed = train(dataclasses.replace(config, checkpoint=CheckpointConfig(5, resume_from_checkpoint="latest")))
    assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())
    assert resumed.results["train_loss"] == whole.results["train_loss"]
    assert_each_step_once(tmp_path / "cut")


def test_a_resumed_run_goes_on_with_the_loss_scale_of_fp16(toy, tmp_path):
    """Else it would skip again the steps that it took to find it."""
    config = dataclasses.replace(toy.config(tmp_path / "run"), checkpoint=CheckpointConfig(5))
    whole = train(config, half_precision(2.0**40))
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_10")
    (tmp_path / "run" / "all_results.json").unlink()
    latest = CheckpointConfig(resume_from_checkpoint="latest")
    resumed = train(dataclasses.replace(config, checkpoint=latest), half_precision(2.0**40))
    assert resumed.results["skipped_steps"] == whole.results["skipped_steps"] > 5
    assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())


def interrupted(toy, folder, at=5, **loop):
    """A run of 12 steps whose end was killed; the configuration that resumes it from its latest checkpoint.

    It left a checkpoint every `at` steps.
    """
    config = dataclasses.replace(toy.config(folder, **loop), checkpoint=CheckpointConfig(checkpointing_steps=at))
    train(config)
    (folder / "all_results.json").unlink()
    return dataclasses.replace(config, checkpoint=CheckpointConfig(at, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7}, "seed 7 (the checkpoint: 42)"),
        ({"train_batch_size": 4}, "train_batch_size 4 (the checkpoint: 8)"),
        ({"learning_rate": 1.0}, "learning_rate 1.0"),
        ({"max_train_steps": 20}, "steps 20 (the checkpoint: 12)"),
        ({"max_train_samples": 30}, "chunks 30"),
        ({"remainder": "pad"}, "remainder pad (the checkpoint: drop)"),
    ],
)
def test_another_experiment_is_not_resumed(toy, tmp_path, change, words):
    config = interrupted(toy, tmp_path / "run")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match=re.escape(words)):
        train(dataclasses.replace(toy.config(tmp_path / "run", **change), checkpoint=config.checkpoint))
    assert before == {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}


def test_other_masks_or_other_text_are_another_experiment(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run")
    with pytest.raises(UserError, match="masks"):
        train(dataclasses.replace(config, masking=MaskingConfig(mlm_probability=0.3)))
    other = dataclasses.replace(config.corpus, train_file=str(toy.validation_file))
    with pytest.raises(UserError, match="train corpus"):
        train(dataclasses.replace(config, corpus=other))


def test_other_evaluation_masks_are_another_experiment(toy, tmp_path):
    """Else the perplexity before and the one after would be of different tokens."""
    config = interrupted(toy, tmp_path / "run")
    other = dataclasses.replace(config.evaluate, eval_mask_seed=7)
    with pytest.raises(UserError, match=re.escape("eval_mask_seed 7 (the checkpoint: 0)")):
        train(dataclasses.replace(config, evaluate=other))
    larger = dataclasses.replace(config.evaluate, per_device_eval_batch_size=3)
    assert train(dataclasses.replace(config, evaluate=larger)).results["steps"] == 12


def test_another_order_of_chunks_is_another_experiment(toy, tmp_path, monkeypatch):
    """That of an earlier version: chunks would be seen twice, others not at all."""
    monkeypatch.setattr(order, "VERSION", 1)
    config = interrupted(toy, tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(UserError, match=re.escape("order of chunks 2 (the checkpoint: 1)")):
        train(config)


def test_another_tokenizer_is_another_experiment(toy, tmp_path):
    """Here one that gives two words each other's ids."""
    config = interrupted(toy, tmp_path / "run")
    shutil.copytree(toy.checkpoint, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    described = json.loads(path.read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    path.write_text(json.dumps(described))
    model = dataclasses.replace(config.model, tokenizer_name=str(tmp_path / "other"))
    with pytest.raises(UserError, match="another experiment, with tokenizer"):
        train(dataclasses.replace(config, model=model))


def test_what_does_not_change_the_result_may_change(toy, tmp_path):
    whole = train(toy.config(tmp_path / "whole"))
    config = interrupted(toy, tmp_path / "run", at=7)
    other = toy.config(tmp_path / "run", per_device_train_batch_size=3, eval_steps=2, eval_on_start=False)
    resumed = train(dataclasses.replace(other, checkpoint=config.checkpoint))
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(toy, tmp_path):
    whole = train(toy.config(tmp_path / "whole"))
    interrupted(toy, tmp_path / "run", at=7)
    flags = toy.flags(tmp_path / "run", resume_from_checkpoint="latest")
    status, _, errors = run(TWO, flags)
    assert status == 0, errors
    assert_same_weights(whole.model.state_dict(), weights(tmp_path / "run"))


def test_checkpoints_after_the_one_resumed_from_are_dropped(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run", at=4)
    earlier = CheckpointConfig(None, resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step_4"))
    train(dataclasses.replace(config, checkpoint=earlier))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_4"]


def test_resuming_into_another_run_is_not_a_licence_to_replace_it(toy, tmp_path):
    interrupted(toy, tmp_path / "one")
    train(toy.config(tmp_path / "other"))
    source = CheckpointConfig(resume_from_checkpoint=str(tmp_path / "one" / "checkpoints" / "step_5"))
    with pytest.raises(UserError, match="is not empty"):
        train(dataclasses.replace(toy.config(tmp_path / "other"), checkpoint=source))
    assert train(dataclasses.replace(toy.config(tmp_path / "new"), checkpoint=source)).results["steps"] == 12


def test_the_line_that_a_killed_run_was_writing_is_dropped(toy, tmp_path):
    """Here it is the line of the very checkpoint that is resumed from."""
    config = interrupted(toy, tmp_path / "run", at=10)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().partition('{"event": "checkpoint"')[0] + '{"event": "checkp')
    train(config)
    assert [line["step"] for line in metrics(tmp_path / "run", "train")] == [10, 12]
    assert [line["step"] for line in metrics(tmp_path / "run", "end")] == [12]


def test_what_others_have_left_in_a_run_directory_is_passed_over(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as metrics_file:
        metrics_file.write(b'5\n[]\n{"step": "one"}\n\xff\n')
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_²").mkdir()
    (checkpoints / "step_99").write_text("no checkpoint")
    latest = CheckpointConfig(4, save_total_limit=1, resume_from_checkpoint="latest")
    train(dataclasses.replace(config, checkpoint=latest))
    assert_each_step_once(tmp_path / "run")
    assert list(steps(checkpoints)) == [12]


def test_a_run_that_goes_on_has_not_ended(toy, tmp_path, monkeypatch):
    """A report of it, should it be killed, must not show the results of before."""
    config = interrupted(toy, tmp_path / "run")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlm.report.metrics.Log.event", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"all_results.json", "comparison.json", "documents.parquet"}


def test_a_finished_run_that_is_resumed_writes_nothing_twice(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run", at=6)
    result = train(config)
    assert train(config).results["perplexity"] == result.results["perplexity"]
    assert_each_step_once(tmp_path / "run")


# After which no weights are better than those that it begins with.
DIVERGING = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "eval_steps": 1, "load_best_model_at_end": True}


def test_the_best_weights_survive_a_resume(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run", at=5, **DIVERGING)
    resumed = train(config)
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run", "eval")]
    assert resumed.results["eval_loss"] == min(losses) < losses[-1]
    untouched = weights(toy.checkpoint)
    assert_same_bits(weights(tmp_path / "run"), untouched)


def test_the_best_weights_come_along_to_another_directory(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run", at=5, **DIVERGING)
    source = CheckpointConfig(resume_from_checkpoint=str(tmp_path / "run"))
    elsewhere = dataclasses.replace(config.run, output_dir=str(tmp_path / "elsewhere"))
    train(dataclasses.replace(config, checkpoint=source, run=elsewhere))
    assert_same_bits(weights(tmp_path / "elsewhere"), weights(toy.checkpoint))


# What is on the disk


@pytest.fixture(scope="module")
def written(toy, tmp_path_factory) -> Path:
    """The checkpoints of a finished run, of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("written") / "run"
    interrupted(toy, folder, at=4)
    return folder / "checkpoints"


def test_a_checkpoint_is_tensors_and_json_and_nothing_that_could_execute_code(written, toy, monkeypatch):
    files = sorted(path.name for path in written.glob("*/*"))
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle is read")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("torch.load", refuse)
    config = toy.config(written.parent)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(resume_from_checkpoint="latest"))
    assert train(config).results["steps"] == 12


def test_the_manifest_lists_every_other_file_with_its_size_and_hash(written):
    for folder in steps(written).values():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert sorted(manifest) == sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
        assert all(len(entry["sha256"]) == 64 for entry in manifest.values())
        assert damaged(folder) is None


def damage(folder: Path, rng: random.Random) -> str:
    """Cuts a random file of a checkpoint short, or flips a random bit of it; says what was done."""
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if rng.random() < 0.5:
        data = data[:place]
    else:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name} at byte {place}"


def test_damage_at_random_places_is_detected_or_harmless(written, tmp_path, tally):
    """200 cases. Harmless is what leaves the contents as they were: white space of the manifest, say."""
    rng, detected = random.Random(0), 0
    contents = {path.name: path.read_bytes() for path in (written / "step_8").iterdir()}
    for case in range(200):
        victim = tmp_path / str(case)
        shutil.copytree(written / "step_8", victim)
        what = damage(victim, rng)
        if damaged(victim):
            detected += 1
        else:
            manifest = json.loads((victim / "manifest.json").read_text())
            assert manifest == json.loads(contents["manifest.json"]), what
            for name in manifest:
                assert (victim / name).read_bytes() == contents[name], what
        shutil.rmtree(victim)
    assert detected > 150
    tally("a file of a checkpoint cut short, or a bit flipped", 200, f"{detected} detected, {200 - detected} harmless")


def test_damaged_checkpoints_are_named_and_passed_over(toy, tmp_path, capsys):
    whole = train(toy.config(tmp_path / "whole"))
    config = interrupted(toy, tmp_path / "run", at=4)
    checkpoints = tmp_path / "run" / "checkpoints"
    truncated, altered = (checkpoints / "step_12" / "state.safetensors", checkpoints / "step_8" / "state.json")
    truncated.write_bytes(truncated.read_bytes()[:-1])
    altered.write_bytes(re.sub(rb'"step",\s*8', lambda m: m[0].replace(b"8", b"9"), altered.read_bytes()))
    capsys.readouterr()
    resumed = train(config)
    told = capsys.readouterr().out
    assert "step_12 is damaged (state.safetensors has another size), so it is passed over" in told
    assert "step_8 is damaged (state.json is altered), so it is passed over" in told
    assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())
    assert_each_step_once(tmp_path / "run")


def test_where_every_checkpoint_is_damaged_nothing_is_begun_again(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run", at=6)
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        path.unlink()
    kept = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match=r"no intact checkpoint; the checkpoint .*step_12 is damaged"):
        train(config)
    assert sorted((tmp_path / "run").rglob("*")) == kept


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_damaged(toy, tmp_path, monkeypatch):
    """A server of files that is away for a minute must not cost the checkpoints on it."""
    config = interrupted(toy, tmp_path / "run", at=6)
    kept = sorted((tmp_path / "run").rglob("*"))
    with monkeypatch.context() as patch:

        def away(path):
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(checkpoint, "_digest", away)
        with pytest.raises(UserError, match=r"step_12 cannot be read \(Input/output error\)"):
            train(config)
    assert sorted((tmp_path / "run").rglob("*")) == kept
    assert train(config).results["steps"] == 12


def test_an_intact_checkpoint_is_not_written_again(tmp_path):
    """A kill in the middle of that would leave none."""
    place = tmp_path / "step_1"
    write(place, {"progress.json": {"step": 1}})
    first = place.stat().st_ino
    write(place, {"progress.json": {"step": 1}})
    assert place.stat().st_ino == first
    (place / "progress.json").write_text("{}")
    write(place, {"progress.json": {"step": 1}})
    assert damaged(place) is None


def test_latest_goes_on_where_the_end_of_a_run_was_killed(toy, tmp_path):
    """In the middle of saving its model, that is, without a checkpoint."""
    config = toy.config(tmp_path / "run")
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(resume_from_checkpoint="latest"))
    whole = train(config)
    (tmp_path / "run" / "all_results.json").unlink()
    assert_same_bits(train(config).model.state_dict(), whole.model.state_dict())


def test_latest_where_there_is_no_checkpoint_yet_starts_at_the_beginning(toy, tmp_path):
    """So that one command serves a job's first start and each later one."""
    whole = train(toy.config(tmp_path / "whole"))
    latest = CheckpointConfig(5, resume_from_checkpoint="latest")
    config = dataclasses.replace(toy.config(tmp_path / "run"), checkpoint=latest)
    assert_same_bits(whole.model.state_dict(), train(config).model.state_dict())


@pytest.mark.parametrize("wanted", ["run", "run/checkpoints", "run/checkpoints/step_9"])
def test_a_path_is_a_run_its_checkpoints_or_one_of_them(toy, tmp_path, wanted):
    interrupted(toy, tmp_path / "run", at=3)
    folder, _ = find(str(tmp_path / wanted), tmp_path / "elsewhere", Accelerator(cpu=True))
    assert folder.name == ("step_9" if "step" in wanted else "step_12")


@pytest.mark.parametrize("wanted", ["nowhere", "empty", "empty/step_7"])
def test_a_path_without_a_checkpoint_is_a_mistake(tmp_path, wanted):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such folder|no checkpoint in"):
        find(str(tmp_path / wanted), tmp_path / "elsewhere", Accelerator(cpu=True))


# What is in it, where its manifest agrees


def forge(folder: Path, name: str, change) -> None:
    """Changes a checkpoint's file by `change`, from its contents to others, and its manifest with it."""
    path = folder / name
    if path.suffix == ".json":
        changed = change(json.loads(path.read_text()))
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    else:
        save_file(change(load_file(path)), path)
    described = json.loads((folder / "manifest.json").read_text())
    described[name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(described))


def moments(change):
    """Forges the first parameter's exp_avg."""
    name = "update.optimizers.0.state.0.exp_avg"
    return "state.safetensors", lambda stored: {**stored, name: change(stored[name])}


def text(old, new):
    """Forges state.json by another text."""

    def change(state):
        before = json.dumps(state)
        after = re.sub(old, new, before)
        assert after != before
        return json.loads(after)

    return "state.json", change


FORGED = {
    "moments of one element": (moments(lambda t: t.flatten()[:1].clone()), "exp_avg of parameter 0 does not fit"),
    "moments that are scalars": (moments(lambda t: t.flatten()[0].clone()), "exp_avg of parameter 0 does not fit"),
    "moments transposed": (moments(lambda t: t.T.contiguous()), "exp_avg of parameter 0 does not fit"),
    "moments in half precision": (moments(lambda t: t.half()), "exp_avg of parameter 0 does not fit"),
    "moments under another name": (text('"exp_avg"', '"average"'), "parameter 0 lacks moments"),
    "the moments of a parameter left out": (
        text(r'\[0, \{"dict": \[\["step"', '[99, {"dict": [["step"'),
        "lacks moments",
    ),
    "Adam's steps": (
        ("state.safetensors", lambda stored: {n: t * (1 - n.endswith(".step")) for n, t in stored.items()}),
        "step of parameter 0 does not fit",
    ),
    "the step of progress": (text(r'\["step", 8\]', '["step", 7]'), "progress is that of step 7"),
    "no step": (text(r'\["step", 8\], ', ""), "progress does not hold just step, sums"),
    "a step in words": (text(r'\["step", 8\]', '["step", "8"]'), "progress.step is '8'"),
    "a truth that is a number": (text(r'\["evaluated", \w+\]', '["evaluated", 1]'), "progress.evaluated is 1"),
    "an attribute more": (text(r'\["step", 8\]', '["step", 8], ["read", 1]'), "progress does not hold just"),
    "the schedule's step": (text(r'\["last_epoch", 8\]', '["last_epoch", 9]'), "by the schedule"),
    "the learning rate": (text(r'\["lr", [\d.e-]+\]', '["lr", 0.5]'), "learning rates [0.5, 0.5] of peaks [0.005,"),
    "its peak": (text(r'\["base_lrs", \{"list": \[0.005', '["base_lrs", {"list": [0.5'), "of peaks [0.5, 0.005]"),
    "no schedule": (text('"schedulers"', '"timetables"'), "update does not hold just"),
    "no update": (text(r'"update": ', '"updates": '), "KeyError"),
    "weights in half precision": (
        ("model.safetensors", lambda stored: {name: tensor.half() for name, tensor in stored.items()}),
        "holds another model",
    ),
    "a file nested beyond reason": (("state.json", lambda _: "[" * 10**5 + "]" * 10**5), "RecursionError"),
}


@pytest.mark.parametrize(("forgery", "words"), FORGED.values(), ids=FORGED)
def test_a_checkpoint_that_this_run_cannot_have_written_is_not_believed(toy, tmp_path, forgery, words, tally):
    """Moments of one element would be read past their end."""
    config = interrupted(toy, tmp_path / "run", at=8)
    forge(tmp_path / "run" / "checkpoints" / "step_8", *forgery)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_12", ignore_errors=True)
    with pytest.raises(UserError, match=r"the checkpoint .*step_8 (cannot be resumed|holds another model)") as raised:
        train(config)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    tally("a checkpoint altered together with its manifest", 1, "refused in one line, with what does not fit")


def test_a_checkpoint_under_the_number_of_another_step_is_not_believed(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run", at=6)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_12")
    (checkpoints / "step_6").rename(checkpoints / "step_9")
    with pytest.raises(
        UserError, match=r"step_9 cannot be resumed \(ValueError: (progress|update) is that of step 6\)"
    ):
        train(config)


# How it gets there


def test_a_checkpoint_is_a_copy_that_later_steps_do_not_reach(toy, tmp_path):
    """The thread writes while the loop goes on: here everything changes before it has begun."""
    model = AutoModelForMaskedLM.from_pretrained(toy.checkpoint)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    states = {"optimizer": optimizer, "progress": Progress()}
    states["progress"].step = 1

    def everything():
        moments = {
            f"{index}.{name}": value
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return {**tensors(model), **moments}

    before = {name: tensor.clone() for name, tensor in everything().items()}
    with contextlib.closing(Writer(tmp_path)) as writer:
        writer.save(1, lambda: snapshot(model, states, {}))
        with torch.no_grad():
            for tensor in everything().values():
                tensor.add_(1)
            states["progress"].step = 2
    load(tmp_path / "step_1", model, states, {}, Accelerator(cpu=True))
    assert states["progress"].step == 1
    assert_same_bits(before, everything())


def test_a_removal_that_was_killed_is_finished_by_the_next(tmp_path, monkeypatch):
    for name in ("step_5.partial", "step_6.partial.old.partial"):  # the second: as an earlier version left it
        (tmp_path / name).mkdir()
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        remove(*outdated(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_5.partial", "step_6.partial.old.partial"]
    remove(*outdated(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_a_fork_adds_may_change_its_form(tmp_path):
    saved = {"seen": torch.ones(3), "by kind": {"noun": 1, "verb": 2}, "best": None}
    model, state = torch.nn.Linear(2, 2), collections.UserDict(saved)
    state.state_dict, state.load_state_dict = lambda: state.data, state.update
    write(tmp_path / "step_1", snapshot(model, {"mine": state}, {}))
    state.data = {"seen": torch.ones(0), "by kind": {"noun": 0}, "best": 0}
    load(tmp_path / "step_1", model, {"mine": state}, {}, Accelerator(cpu=True))
    assert state["seen"].tolist() == [1, 1, 1]
    assert (state["by kind"], state["best"]) == (saved["by kind"], None)


def test_only_the_newest_checkpoints_are_kept(toy, tmp_path):
    config = toy.config(tmp_path / "run")
    train(dataclasses.replace(config, checkpoint=CheckpointConfig(2, save_total_limit=3)))
    assert sorted(steps(tmp_path / "run" / "checkpoints")) == [8, 10, 12]


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes_away(toy, tmp_path):
    config = interrupted(toy, tmp_path / "run", at=6)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_9.partial").mkdir()
    (checkpoints / "step_9.partial" / "model.safetensors").write_text("half")
    assert sorted(steps(checkpoints)) == [6, 12]
    train(config)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_12", "step_6"]


def test_the_best_weights_are_those_of_one_evaluation_and_a_damaged_copy_is_not_used(toy, tmp_path):
    loop = {"eval_steps": 3, "load_best_model_at_end": True}
    config = interrupted(toy, tmp_path / "run", at=6, **loop)
    [best] = steps(tmp_path / "run" / "checkpoints", "best").values()
    assert best.name == "best_12"
    (best / "model.safetensors").write_bytes(b"")
    last = train(config)  # the last weights are there all the same
    assert last.results["eval_loss"] == pytest.approx(metrics(tmp_path / "run", "eval")[-1]["eval_loss"])


def test_two_runs_do_not_share_a_run_directory(toy, tmp_path):
    flags = toy.flags(tmp_path / "run", max_train_steps=100_000, eval_on_start="false")
    first = start(ONE, flags)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, first)
    latest = CheckpointConfig(resume_from_checkpoint="latest")
    config = dataclasses.replace(toy.config(tmp_path / "run"), checkpoint=latest)
    with pytest.raises(UserError, match="another run is at work in it"):
        train(config)
    first.kill()
    finish(first)
    assert train(config).results["steps"] == 12  # the lock of a killed run is nobody's


def test_the_directory_is_the_runs_own_before_it_looks_for_a_checkpoint(toy, tmp_path, monkeypatch):
    """Else a job that is queued again could miss, and then remove, what its predecessor wrote last."""
    config = interrupted(toy, tmp_path / "run")
    look = checkpoint.find

    def find_and_check(*where):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "run" / ".lock", timeout=0).acquire()
        return look(*where)

    monkeypatch.setattr(checkpoint, "find", find_and_check)
    assert train(config).results["steps"] == 12


# A disk that fills up


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB."""
    with own_disk(tmp_path / "disk", "20m") as place:
        yield place


def test_a_full_disk_stops_the_run_and_leaves_earlier_checkpoints_intact(toy, tmp_path, small_disk, tally):
    """A checkpoint a step fills it long before the last step."""
    flags = toy.flags(small_disk / "run", max_train_steps=150, checkpointing_steps=1, eval_on_start="false",
                      eval_steps=1000)  # fmt: skip
    status, _, errors = run(ONE, flags)
    assert status == 2
    assert errors.strip().splitlines()[-1].startswith("error: ")
    assert "No space left on device" in errors
    assert "Traceback" not in errors
    left = steps(small_disk / "run" / "checkpoints")
    assert len(left) > 10
    assert all(damaged(folder) is None for folder in left.values())

    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    status, _, errors = run(ONE, [*flags, "--resume_from_checkpoint=latest"])
    assert status == 0, errors
    whole = train(toy.config(tmp_path / "whole", max_train_steps=150, eval_on_start=False))
    assert_same_bits(weights(small_disk / "run"), whole.model.state_dict())
    tally("a disk of 20 MB fills up", 1, "says so, earlier checkpoints intact; resumed to the same bits")


def test_a_signalled_run_that_cannot_write_its_checkpoint_does_not_say_that_it_has(toy, small_disk):
    folder = small_disk / "run"
    process = start(ONE, toy.flags(folder, max_train_steps=100_000, eval_on_start="false", eval_steps=10**6))
    wait_for(lambda: steps_taken(folder) > 10, process)
    fill(small_disk)
    process.terminate()
    status, _, errors = finish(process)
    assert status == 2
    assert "could not be written: " in errors
    assert "to resume" not in errors


def fill(disk: Path) -> Path:
    """A file that takes all that is left of a file system."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(1 << 14))
    return ballast


@pytest.mark.torture
def test_a_run_goes_on_without_the_checkpoints_that_a_full_disk_costs(toy, tmp_path, small_disk, tally):
    flags = toy.flags(small_disk / "run", max_train_steps=900, checkpointing_steps=5, save_total_limit=2,
                      on_save_error="continue", eval_on_start="false", eval_steps=10_000)  # fmt: skip
    process = start(ONE, flags)
    checkpoints = small_disk / "run" / "checkpoints"
    wait_for(lambda: len(steps(checkpoints)) == 2, process)
    ballast = fill(small_disk)
    for line in process.stdout:
        if "could not be written: " in line:
            break
    left = steps(checkpoints)
    assert left
    assert all(damaged(folder) is None for folder in left.values())
    ballast.unlink()
    status, output, errors = finish(process)
    assert status == 0, errors
    assert json.loads(output.splitlines()[-1])["steps"] == 900
    assert max(steps(checkpoints)) == 900
    whole = train(toy.config(tmp_path / "whole", max_train_steps=900, eval_on_start=False, eval_steps=10_000))
    assert_same_bits(weights(small_disk / "run"), whole.model.state_dict())
    tally("the same, `--on_save_error continue`", 1, "says so and goes on; the same bits")
