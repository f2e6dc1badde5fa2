"""The worked forks: small, whole, and resumed as exactly as the file that they are copies of."""

import dataclasses
import difflib
import importlib.util
import sys

import numpy as np
import pytest
import torch

from mlm.engine.checkpoint import CheckpointConfig
from mlm.errors import UserError
from mlm.train import train as original
from tests.conftest import REPOSITORY
from tests.runs import PYTHON, assert_same_bits, metrics, run, weights

FORKS = sorted(path.stem for path in (REPOSITORY / "scripts" / "forks").glob("*.py"))


def load_fork(name):
    path = REPOSITORY / "scripts" / "forks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_fork", path)
    fork = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    return fork


def configured(fork, toy, folder, **settings):
    """The toy's configuration as the fork's own class has it, with its own flags at work."""
    config = toy.config(folder, **settings)
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    if fork.__name__ == "distillation_fork":
        parts["distillation"] = fork.TeacherConfig(teacher=str(toy.checkpoint))
    return fork.Config(**parts)


def test_there_are_five_forks():
    assert len(FORKS) == 5


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_changes_at_most_thirty_lines(name):
    texts = [(REPOSITORY / path).read_text().splitlines() for path in ("mlm/train.py", f"scripts/forks/{name}.py")]
    changes = difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes()
    changed = sum(max(end - start, to - since) for kind, start, end, since, to in changes if kind != "equal")
    assert 0 < changed <= 30


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_trains_another_model_and_resumes_it_to_the_bit(toy, tmp_path, name):
    fork = load_fork(name)
    whole = fork.train(configured(fork, toy, tmp_path / "whole")).model.state_dict()
    plain = original(toy.config(tmp_path / "plain")).model.state_dict()
    assert any(not torch.equal(whole[key], plain[key]) for key in whole), "it does what the original does"

    config = configured(fork, toy, tmp_path / "cut", checkpointing_steps=5)
    fork.train(config)
    (tmp_path / "cut" / "all_results.json").unlink()  # as a kill at the end leaves it
    latest = CheckpointConfig(resume_from_checkpoint="latest")
    resumed = fork.train(dataclasses.replace(config, checkpoint=latest)).model.state_dict()
    assert [line["step"] for line in metrics(tmp_path / "cut", "start")] == [0, 10]
    assert_same_bits(whole, resumed)


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
    assert all(line["cross_entropy"] > line["loss"] for line in lines), "of its own weights the teacher knows all"
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


@pytest.mark.slow
def test_a_copy_is_launched_as_the_original_is(toy, tmp_path):
    copy = tmp_path / "my_train.py"
    copy.write_text((REPOSITORY / "mlm" / "train.py").read_text())
    status, output, errors = run(PYTHON, toy.flags(tmp_path / "run"), str(copy))
    assert status == 0, errors
    assert '"perplexity"' in output.splitlines()[-1]
    assert_same_bits(weights(tmp_path / "run"), original(toy.config(tmp_path / "one")).model.state_dict())
