"""The worked forks: small, whole, and resumed as exactly as the file that they are copies of."""

import dataclasses
import importlib.util
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from mlm.engine.checkpoint import CheckpointConfig
from mlm.errors import UserError
from mlm.train import train as original
from tests.conftest import REPOSITORY
from tests.runs import ONE, assert_same_bits, changed_lines, cut_and_resumed, metrics, run, weights
from tests.tokenizers_for_tests import wordpiece

FORKS = sorted(path.stem for path in (REPOSITORY / "scripts" / "forks").glob("*.py"))


def load_fork(name):
    path = REPOSITORY / "scripts" / "forks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_fork", path)
    fork = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    return fork


@pytest.fixture(scope="module", autouse=True)
def teacher(toy):
    """What the fork for distillation learns from; it stands beside the toy's checkpoint."""
    original(toy.config(toy.checkpoint.parent / "teacher"))


def configured(fork, toy, folder, **settings):
    """The toy's configuration as the fork's own class has it, with its own flags at work."""
    config = toy.config(folder, **settings)
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    if fork.__name__ == "distillation_fork":
        parts["distillation"] = fork.TeacherConfig(teacher=str(toy.checkpoint.parent / "teacher"))
    return fork.Config(**parts)


def test_there_are_five_forks():
    assert len(FORKS) == 5


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_changes_at_most_thirty_lines(name):
    assert 0 < changed_lines(f"scripts/forks/{name}.py") <= 30


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_trains_another_model_and_resumes_it_to_the_bit(toy, tmp_path, name):
    fork = load_fork(name)
    whole = fork.train(configured(fork, toy, tmp_path / "whole")).model.state_dict()
    plain = original(toy.config(tmp_path / "plain")).model.state_dict()
    assert any(not torch.equal(whole[key], plain[key]) for key in whole), "it does what the original does"

    assert_same_bits(
        whole, cut_and_resumed(fork.train, configured(fork, toy, tmp_path / "cut", checkpointing_steps=5))
    )


@pytest.mark.parametrize("name", FORKS)
def test_a_checkpoint_of_the_original_is_not_resumed_by_a_fork(toy, tmp_path, name):
    """Its objective, its mask selection, its optimizers or what it keeps are others."""
    fork = load_fork(name)
    original(toy.config(tmp_path / "run", checkpointing_steps=5))
    config = configured(fork, toy, tmp_path / "run", resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="another experiment"):
        fork.train(config)


def test_what_an_objective_returns_beside_its_loss_is_logged(toy, tmp_path, capsys):
    fork = load_fork("distillation")
    results = fork.train(configured(fork, toy, tmp_path / "run")).results
    lines = metrics(tmp_path / "run", "train")
    assert all(line["cross_entropy"] > line["loss"] > 0 for line in lines), "the teacher is nearer than the text"
    assert results["train_cross_entropy"] > results["train_loss"]
    printed = capsys.readouterr().out
    assert "cross_entropy" in printed
    assert "perplexity" not in "".join(line for line in printed.splitlines() if "tokens/s" in line)


def test_spans_are_spans_and_meet_the_mask_rate():
    fork = load_fork("span_masking")
    draws = np.random.default_rng(0).integers(0, 2**64, (400, 128), dtype=np.uint64)
    everything = np.ones(draws.shape, bool)
    selected = fork.select(everything, draws, 0.15, everything, None)
    assert abs(selected.mean() - 0.15) < 0.01
    runs = (selected[:, 1:] > selected[:, :-1]).sum() + selected[:, 0].sum()
    assert 3 < selected.sum() / runs < 5.5  # SpanBERT's mean is 3.8; spans that meet become one
    assert fork.select(everything, draws, 1.0, everything, None).all()
    assert fork.select(everything[:, :3], draws[:, :3], 0.5, everything[:, :3], None).any(), "shorter than a span"


def test_no_span_runs_into_the_next_document():
    fork = load_fork("span_masking")
    maskable = np.array([[True, True, False, True, True]])
    # A draw of zero begins a span, as long as they come.
    draws = np.array([[2**64 - 1, 0, 2**64 - 1, 2**64 - 1, 2**64 - 1]], np.uint64)
    assert fork.select(maskable, draws, 0.2, maskable, None).tolist() == [[False, True, False, False, False]]
    maskable[:, 2] = True
    assert fork.select(maskable, draws, 0.2, maskable, None).tolist() == [[False, True, True, True, True]]


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("averaged_weights", {"load_best_model_at_end": True}, "the average of a run is saved, not the best"),
        ("span_masking", {"whole_word_mask": True}, "spans are of tokens here"),
    ],
)
def test_a_flag_that_a_fork_cannot_obey_is_refused(toy, tmp_path, name, settings, reason):
    fork = load_fork(name)
    with pytest.raises(UserError, match=reason):
        fork.train(configured(fork, toy, tmp_path / "run", **settings))


def test_a_teacher_that_was_trained_anew_in_its_folder_is_another_experiment(toy, tmp_path):
    fork = load_fork("distillation")
    shutil.copytree(toy.checkpoint.parent / "teacher", tmp_path / "teacher")
    config = configured(fork, toy, tmp_path / "run", checkpointing_steps=6)
    config = dataclasses.replace(config, distillation=fork.TeacherConfig(str(tmp_path / "teacher")))
    fork.train(config)
    (tmp_path / "run" / "all_results.json").unlink()
    shutil.copy(toy.checkpoint / "model.safetensors", tmp_path / "teacher")
    latest = dataclasses.replace(config, checkpoint=CheckpointConfig(6, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="another experiment, with teacher "):
        fork.train(latest)


def test_a_teacher_with_another_vocabulary_is_refused(toy, tmp_path):
    fork = load_fork("distillation")
    wordpiece(["nothing in common"], 40).save_pretrained(tmp_path / "teacher")
    config = configured(fork, toy, tmp_path / "run")
    config = dataclasses.replace(config, distillation=fork.TeacherConfig(str(tmp_path / "teacher")))
    with pytest.raises(UserError, match="another vocabulary"):
        fork.train(config)


def test_another_decay_is_another_experiment(toy, tmp_path, monkeypatch):
    fork = load_fork("averaged_weights")
    fork.train(configured(fork, toy, tmp_path / "run", checkpointing_steps=5))
    monkeypatch.setattr(fork, "DECAY", 0.5)
    with pytest.raises(UserError, match="another experiment, with decay"):
        fork.train(configured(fork, toy, tmp_path / "run", resume_from_checkpoint="latest"))


@pytest.mark.slow
def test_a_copy_is_launched_as_the_original_is(toy, tmp_path):
    copy = tmp_path / "my_train.py"
    copy.write_text((REPOSITORY / "mlm" / "train.py").read_text())
    status, output, errors = run(ONE, toy.flags(tmp_path / "run"), str(copy))
    assert status == 0, errors
    assert '"perplexity"' in output.splitlines()[-1]
    assert_same_bits(weights(tmp_path / "run"), original(toy.config(tmp_path / "one")).model.state_dict())


@pytest.mark.parametrize(("name", "value"), [("MUON_RATE", 0.5), ("MUON_RATE", 0.02 + 1e-9)])
def test_other_settings_of_a_forks_optimizer_are_another_experiment(toy, tmp_path, monkeypatch, name, value):
    fork = load_fork("two_optimizers")
    fork.train(configured(fork, toy, tmp_path / "run", checkpointing_steps=5))
    monkeypatch.setattr(fork, name, value)
    with pytest.raises(UserError, match="another experiment, with optimizers"):
        fork.train(configured(fork, toy, tmp_path / "run", resume_from_checkpoint="latest"))


def test_another_schedule_is_another_experiment_even_where_no_flag_says_so(toy, tmp_path, monkeypatch):
    fork = load_fork("falling_mask_rate")
    fork.train(configured(fork, toy, tmp_path / "run", checkpointing_steps=5))
    constant = torch.optim.lr_scheduler.ConstantLR
    monkeypatch.setattr(fork, "make_scheduler", lambda optimizer, *_: constant(optimizer, 0.1))
    with pytest.raises(UserError, match="another experiment, with optimizers"):
        fork.train(configured(fork, toy, tmp_path / "run", resume_from_checkpoint="latest"))


def test_each_line_of_the_log_has_the_share_that_was_masked_and_every_learning_rate(toy, tmp_path):
    fork = load_fork("falling_mask_rate")
    results = fork.train(configured(fork, toy, tmp_path / "falling", logging_steps=1, train_batch_size=64)).results
    rates = [line["mask_rate"] for line in metrics(tmp_path / "falling", "train")]
    assert rates[0] == pytest.approx(0.3 * 9 / 11, abs=0.03)  # of 11 tokens a sentence, two are special
    assert rates[-1] == pytest.approx(0.15 * 9 / 11, abs=0.03)
    assert results["mask_rate"] == pytest.approx(np.mean(rates))
    two = load_fork("two_optimizers")
    two.train(configured(two, toy, tmp_path / "two", logging_steps=1))
    line = metrics(tmp_path / "two", "train")[0]
    assert line["learning_rate"] == pytest.approx(two.MUON_RATE * 11 / 12)
    assert line["learning_rate_2"] == pytest.approx(5e-3 * 11 / 12)


def test_select_cannot_choose_special_tokens_or_another_shape(toy, tmp_path, monkeypatch):
    fork = load_fork("falling_mask_rate")
    monkeypatch.setattr(fork, "select", lambda maskable, *_, **__: np.ones_like(maskable))
    fork.train(configured(fork, toy, tmp_path / "all", max_train_steps=1))
    assert metrics(tmp_path / "all", "train")[0]["mask_rate"] < 1
    monkeypatch.setattr(fork, "select", lambda maskable, *_, **__: np.ones_like(maskable)[:, 1:])
    with pytest.raises(ValueError, match=r"select returned bool \(8, 15\), it has to be bool \(8, 16\)"):
        fork.train(configured(fork, toy, tmp_path / "shape", max_train_steps=1))


@pytest.mark.parametrize("extra", [{"progress": torch.nn.Linear(1, 1)}, {"table": {"a": 1}}])
def test_extra_state_that_cannot_be_kept_is_refused_before_the_first_step(toy, tmp_path, monkeypatch, extra):
    fork = load_fork("falling_mask_rate")
    keeps = fork.Run.keeps
    monkeypatch.setattr(
        fork.Run, "keeps", lambda run, net, update, progress, before, _, about: keeps(
            run, net, update, progress, before, extra, about
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="extra_state"):
        fork.train(configured(fork, toy, tmp_path / "run"))


def test_train_shows_no_progress_bars_of_other_libraries(toy, tmp_path, capfd):
    transformers_logging.enable_progress_bar()
    try:
        original(toy.config(tmp_path / "run", max_train_steps=1))
        assert transformers_logging.is_progress_bar_enabled(), "it is as it was"
    finally:
        transformers_logging.disable_progress_bar()
    assert "Loading weights" not in capfd.readouterr().err


def test_the_readme_shows_what_a_fork_changes():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("```diff\n")[2].partition("```")[0].splitlines()
    before, after = (
        (REPOSITORY / path).read_text().splitlines() for path in ("mlm/train.py", "scripts/forks/averaged_weights.py")
    )
    assert all(line[1:] in after and line[1:] not in before for line in shown if line.startswith("+"))
    assert all(line[1:] in before and line[1:] not in after for line in shown if line.startswith("-"))
    assert len([line for line in shown if line[0] in "+-"]) == 10
    assert len(readme.splitlines()) <= 220
