"""The probe: what it finds where something is planted, and how often its interval holds the truth."""

import json
import logging
import signal
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlm.data.order import ReplayConfig
from mlm.data.task import Task, TaskConfig
from mlm.engine.checkpoint import CheckpointConfig
from mlm.engine.signals import Stopped
from mlm.errors import UserError
from mlm.evaluation import probe as probe_module
from mlm.evaluation.probe import CHOICES, FOLDS, choose, f1_scores, features, probe, sizes, spread
from mlm.report.run_record import read_runs
from mlm.report.summary import outcome
from mlm.train import train
from tests.conftest import ANIMALS
from tests.runs import TWO
from tests.runs import run as start_run
from tests.scripts import load_script


def made_up(n, seed, *effects):
    """Labels [n], and for each model features [n, 8] in which the first column tells the two classes so far apart."""
    rng = np.random.default_rng(seed)
    labels, noise = rng.integers(0, 2, n), rng.normal(size=(n, 8))
    return labels, *(noise + effect * labels[:, None] * (np.arange(8) == 0) for effect in effects)


def test_a_model_that_is_the_base_differs_from_it_by_exactly_zero():
    labels, before, after = made_up(30, 0, 1.0, 1.0)
    for row in probe(labels, before, after):
        for metric in ("accuracy", "macro_f1"):
            assert row[metric]["difference"] == 0
            assert row[metric]["interval"] == [0, 0]


def test_a_planted_effect_is_found():
    labels, before, after = made_up(80, 0, 0.0, 4.0)
    rows = probe(labels, before, after)
    assert [(row["k"], row["classifier"]) for row in rows] == [(27, "logistic regression"), (27, "nearest neighbours")]
    for row in rows:
        assert row["accuracy"]["interval"][0] > 0
        assert row["macro_f1"]["interval"][0] > 0


def test_both_models_are_measured_on_the_same_splits():
    labels, before, after = made_up(30, 1, 1.0, 0.0)
    for row, swapped in zip(probe(labels, before, after), probe(labels, after, before), strict=True):
        assert row["accuracy"]["before"] == swapped["accuracy"]["after"]
        assert row["accuracy"]["difference"] == pytest.approx(-swapped["accuracy"]["difference"])


def population(rng, documents, share, training):
    """Scores of each fold's CHOICES on its documents, with no difference on average.

    A choice's effect is that of a linear statistic of the labels that it takes, `share` of one pool; beside it each
    document has an effect of its own, and each pair of them.
    """
    pool = rng.normal(size=120)
    size = round(share * len(pool))
    for _ in range(FOLDS):
        by_choice = [training * np.sqrt(size) * rng.permutation(pool)[:size].mean() for _ in range(CHOICES)]
        own, pairs = 0.25 * rng.normal(size=documents), 0.2 * rng.normal(size=(CHOICES, documents))
        yield np.add.outer(by_choice, own) + pairs


@pytest.mark.parametrize("share", [0.05, 0.3, 0.75])
@pytest.mark.parametrize("training", [0.0, 0.02, 0.06])
def test_the_interval_holds_the_truth_as_often_as_it_says(share, training):
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        _, low, high = spread(list(population(rng, 80, share, training)), share)
        held += low <= 0 <= high
    assert held / 400 >= 0.93


def test_many_splits_do_not_feign_many_labels():
    """Choices that share three quarters of their labels vary little, though other labels would matter."""
    rng = np.random.default_rng(0)
    naive = [spread(list(population(rng, 80, 0.75, 0.06)), 0.0) for _ in range(200)]
    assert np.mean([low <= 0 <= high for _, low, high in naive]) < 0.8


@given(st.integers(0, 9), st.integers(1, 40))
def test_splits_are_of_k_labels_a_class_outside_the_fold(seed, k):
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], [20, 35, 60]))
    splits = list(choose(labels, k, seed))
    assert sorted(np.concatenate([test for test, _ in splits])) == list(range(len(labels)))  # each tested in one fold
    larger = choose(labels, k + 5, seed)
    for (test, chosen), (_, more) in zip(splits, larger, strict=True):
        assert len(chosen) == CHOICES
        for own, wider in zip(chosen, more, strict=True):
            assert not set(own) & set(test)
            assert set(own) <= set(wider)
            assert np.bincount(labels[own])[2] == min(k, 36)
            assert np.bincount(labels[own])[0] == min(k, 12)  # three quarters of the 16 outside the fold


def test_the_curve_goes_from_16_labels_a_class_to_most_of_them():
    assert sizes(np.repeat([0, 1], 500)) == [16, 64, 300]
    assert sizes(np.repeat([0, 1], 10)) == [6]


@given(st.integers(0, 99))
def test_the_scores_of_documents_have_the_mean_that_scikit_learn_calls_macro_f1(seed):
    rng = np.random.default_rng(seed)
    truth, said = np.append([0, 1, 2], rng.integers(0, 3, 20)), rng.integers(0, 3, (2, 23))
    expected = [f1_score(truth, each, average="macro") for each in said]
    np.testing.assert_allclose(f1_scores(truth, said).mean(axis=1), expected)


@pytest.fixture(scope="module")
def toy_model(toy):
    model = AutoModelForMaskedLM.from_pretrained(toy.checkpoint).train()
    return model, AutoTokenizer.from_pretrained(toy.checkpoint)


def of(texts):
    return Task("task", [(text,) if isinstance(text, str) else text for text in texts], np.zeros(len(texts)))


TEXTS = [f"the old {animal} likes {food} every day ." * (1 + i) for i, (animal, food) in enumerate(ANIMALS.items())]


def test_features_depend_on_neither_batches_nor_order(toy_model):
    accelerator = Accelerator(cpu=True)
    found = features(*toy_model, of(TEXTS), 1, accelerator)
    assert found.shape == (len(TEXTS), 4 * 32)
    others = features(*toy_model, of(TEXTS[::-1] + TEXTS), 3, accelerator)
    for part in (others[: len(TEXTS)][::-1], others[len(TEXTS) :]):
        np.testing.assert_allclose(part, found, rtol=1e-5, atol=1e-5)
    assert toy_model[0].training


def test_the_features_are_means_and_first_tokens_of_the_last_and_the_middle_layer(toy_model):
    model, tokenizer = toy_model
    ids = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**ids, output_hidden_states=True).hidden_states
    model.train()
    expected = torch.cat([x for h in (states[2], states[1]) for x in (h.mean(1), h[:, 0])], dim=1)
    np.testing.assert_allclose(
        features(model, tokenizer, of(TEXTS), 2, Accelerator(cpu=True))[0], expected[0], atol=1e-5
    )


def test_no_end_of_a_long_document_is_left_out(toy_model):
    accelerator = Accelerator(cpu=True)
    long = " ".join([TEXTS[0]] * 30)  # 64 positions hold seven of them
    found = features(*toy_model, of([long, f"{long} {TEXTS[2]}"]), 4, accelerator)
    assert not np.allclose(found[0], found[1], atol=1e-4)


def test_features_do_not_depend_on_how_often_memory_runs_out(toy_model):
    accelerator, seen = Accelerator(cpu=True), []
    expected = features(*toy_model, of(TEXTS[:1] * 8), 4, accelerator)

    def no_room_for_two(module, arguments, keywords):
        seen.append(len(keywords["input_ids"]))
        if seen[-1] > 1:
            raise MemoryError

    with toy_model[0].base_model.register_forward_pre_hook(no_room_for_two, with_kwargs=True):
        found = features(*toy_model, of(TEXTS[:1] * 8), 4, accelerator)
    assert seen == [4, 2, *[1] * 8]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_text_for_which_there_is_no_memory_is_an_error(toy_model):
    def no_room(module, arguments, keywords):
        raise torch.OutOfMemoryError("no room")

    hook = toy_model[0].base_model.register_forward_pre_hook(no_room, with_kwargs=True)
    with hook, pytest.raises(torch.OutOfMemoryError):
        features(*toy_model, of(TEXTS), 4, Accelerator(cpu=True))


def test_pairs_have_the_features_of_both_texts_and_of_what_they_share(toy_model):
    accelerator = Accelerator(cpu=True)
    u, v = features(*toy_model, of(TEXTS[:2]), 2, accelerator)
    pair = features(*toy_model, of([(TEXTS[0], TEXTS[1])]), 2, accelerator)[0]
    np.testing.assert_allclose(pair, np.concatenate([u, v, abs(u - v), u * v]), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def labelled(toy, tmp_path_factory):
    """Sentences on cats and on dogs; ten of them stand in the training text, in capitals."""
    file = tmp_path_factory.mktemp("task") / "labelled.jsonl"
    rng = np.random.default_rng(0)
    own = [line for line in toy.train_file.read_text().splitlines() if "cat" in line][:10]
    rows = [{"text": line.upper(), "label": "cat"} for line in own]
    for animal in ("cat", "dog"):
        for _ in range(15):
            words = rng.permutation(["often", "never", "here", "there", "now", "then"])
            rows.append({"text": f"{' '.join(words)} a {animal}", "label": animal})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def run(toy, labelled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    train(toy.config(folder, modules={"task": TaskConfig(task_file=str(labelled))}))
    return folder


def test_a_run_probes_its_base_and_itself_once_it_is_saved(run, labelled):
    results, comparison = (json.loads((run / f"{name}.json").read_text()) for name in ("all_results", "comparison"))
    task = comparison["task"]
    assert (task["documents"], task["classes"], task["splits"]) == (40, 2, 20)
    last = [row for row in task["curve"] if row["classifier"] == "logistic regression"][-1]
    assert results["task_accuracy"] == last["accuracy"]["after"]
    assert results["task_accuracy_low"] <= results["task_accuracy_difference"] <= results["task_accuracy_high"]
    before, after = (f"{100 * last['accuracy'][when]:.4g}%" for when in ("before", "after"))
    card = (run / "README.md").read_text()
    line = f"- task, at most {last['k']} labels a class: accuracy {before} before, {after} after, difference"
    assert line in card
    named = "10 texts of the task (first in rows 0, 1, 2, 3, 4, counted from 0) stand in the training text"
    assert f"- {named}; no label was trained on" in card
    assert comparison["held_out"] is not None


def test_a_terminal_shows_the_outcome_of_a_run_with_a_task(run):
    shown = outcome({**json.loads((run / "all_results.json").read_text()), "output_dir": str(run)})
    assert shown.endswith(f"saved to {run}")


def test_labelled_documents_that_were_replayed_in_training_are_counted_too(toy, labelled, tmp_path):
    """The training text has none of these cats."""
    (tmp_path / "dogs.txt").write_text("the dog likes bones\n" * 200)
    (tmp_path / "replay.jsonl").write_text(labelled.read_text())
    task, replay = TaskConfig(task_file=str(labelled)), ReplayConfig(str(tmp_path / "replay.jsonl"), replay_share=0.1)
    files = {"train_file": str(tmp_path / "dogs.txt"), "max_train_steps": 1, "allow_leaks": True}
    results = train(toy.config(tmp_path / "run", modules={"task": task, "replay": replay}, **files)).results
    assert results["task_in_training_text"] == 40


def test_labelled_documents_that_were_read_in_training_are_counted_and_named(run):
    results = json.loads((run / "all_results.json").read_text())
    assert results["task_in_training_text"] == 10
    assert results["task_first_rows_in_training_text"] == list(range(5))
    task = json.loads((run / "comparison.json").read_text())["task"]
    assert task["rows_in_training_text"] == list(range(10))  # as `labelled` wrote them


@pytest.fixture(scope="module")
def drawn(toy, labelled, tmp_path_factory):
    """The folder and the messages of a run that takes 36 of the 40 rows, and is not measured before its first step."""
    folder, messages = tmp_path_factory.mktemp("drawn") / "run", []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlm.data.task.MOST", 36)
        patch.setattr(logging.getLogger("mlm"), "handlers", [*logging.getLogger("mlm").handlers, handler])
        modules = {"task": TaskConfig(task_file=str(labelled))}
        train(toy.config(folder, modules=modules, max_train_steps=1, eval_on_start=False))
    return folder, messages


def test_of_a_task_that_is_drawn_from_both_numbers_are_recorded_and_on_the_card(drawn, toy, labelled):
    run, messages = drawn
    assert [m for m in messages if "are taken" in m] == [
        f"{labelled}: of its 40 rows 36 are taken, drawn by a fixed seed"
    ]
    results, task = (json.loads((run / f"{n}.json").read_text()) for n in ("all_results", "comparison"))
    assert (results["task_rows"], results["task_rows_taken"], results["task_documents"]) == (40, 36, 36)
    assert (task["task"]["rows"], task["task"]["rows_taken"]) == (40, 36)
    written = [json.loads(line) for line in labelled.read_text().splitlines()]
    trained_on = {line.lower() for line in toy.train_file.read_text().splitlines()}
    named = task["task"]["rows_in_training_text"]
    assert named and all(written[row]["text"].lower() in trained_on for row in named)
    assert "of which 36 of 40 rows are taken, drawn by a fixed seed" in (run / "README.md").read_text()


def evaluated(run, toy, labelled, output, **more):
    """The task, as evaluate.py has it for a run and its base."""
    models = {"model_name_or_path": run, "compare": toy.checkpoint}
    flags = {**models, "task_file": labelled, "output": output, **more}
    load_script("evaluate").main([f"--{name}={value}" for name, value in flags.items()])
    return json.loads(output.read_text())["task"]


def test_evaluate_repeats_what_the_run_has(run, toy, labelled, tmp_path):
    texts = {"train_file": toy.train_file, "validation_file": toy.validation_file, "max_seq_length": 16}
    found = evaluated(run, toy, labelled, tmp_path / "o.json", **texts, allow_leaks=True, token_store=tmp_path)
    assert found["in_training_text"] == 10
    own = json.loads((run / "comparison.json").read_text())["task"]["curve"]
    for row, before in zip(found["curve"], own, strict=True):
        for figure in ("before", "after", "difference"):
            assert row["accuracy"][figure] == pytest.approx(before["accuracy"][figure], abs=0.02)


def test_evaluate_says_nothing_of_training_text_that_was_not_named(run, toy, labelled, capsys, tmp_path):
    assert evaluated(run, toy, labelled, tmp_path / "o.json")["in_training_text"] is None
    assert "texts of the task" not in capsys.readouterr().out


def test_a_run_that_was_not_measured_before_is_probed_all_the_same(drawn):
    run, _ = drawn
    comparison = json.loads((run / "comparison.json").read_text())
    assert comparison["held_out"] is None and comparison["task"]["documents"] == 36
    assert not (run / "documents.parquet").exists()
    [read] = read_runs([run])
    with_examples = load_script("examples").with_examples
    assert with_examples(read, None) == (read, ""), "no examples from a comparison that was not made"


def test_a_probe_that_fails_costs_the_probe_alone_and_a_finished_run_says_that_there_is_none(
    toy, labelled, tmp_path, monkeypatch, capsys
):
    def no_memory(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("mlm.evaluation.probe.features", no_memory)
    modules = {"task": TaskConfig(task_file=str(labelled))}
    results = train(toy.config(tmp_path / "run", modules=modules, max_train_steps=3)).results
    assert results["gain"] > 0 and "task_accuracy" not in results
    assert (
        "warning: the task could not be probed (MemoryError: no room); scripts/evaluate.py" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "run" / "comparison.json").read_text())["held_out"] is not None
    latest = CheckpointConfig(resume_from_checkpoint="latest")
    train(toy.config(tmp_path / "run", modules={**modules, "checkpoint": latest}, max_train_steps=3))
    assert "the task is not probed; scripts/evaluate.py" in capsys.readouterr().out


def test_a_signal_ends_the_probe_and_the_run_keeps_its_figures(toy, labelled, tmp_path, monkeypatch):
    own = probe_module.choose

    def asked(*arguments, **options):
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(0.2)  # a thread hears it
        return own(*arguments, **options)

    monkeypatch.setattr(probe_module, "choose", asked)
    modules = {"task": TaskConfig(task_file=str(labelled))}
    with pytest.raises(Stopped, match=r"^stopped by SIGUSR1: the task is not probed; scripts/evaluate.py") as stopped:
        train(toy.config(tmp_path / "run", modules=modules, max_train_steps=3))
    assert stopped.value.number == signal.SIGUSR1
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["gain"] > 0
    assert "task_documents" not in results


@pytest.mark.slow
def test_two_processes_probe_once_and_end_together(toy, labelled, run, tmp_path):
    status, _, errors = start_run(TWO, toy.flags(tmp_path / "run", task_file=labelled))
    assert status == 0, errors
    found, alone = (json.loads((folder / "comparison.json").read_text())["task"] for folder in (tmp_path / "run", run))
    for row, own in zip(found.pop("curve"), alone.pop("curve"), strict=True):
        assert row["accuracy"]["before"] == own["accuracy"]["before"]
        assert row["accuracy"]["after"] == pytest.approx(own["accuracy"]["after"], abs=0.05)
    assert found == alone


def test_a_task_without_labels_is_refused_before_anything_is_trained(toy, tmp_path):
    modules = {"task": TaskConfig(task_file=str(toy.validation_file))}
    with pytest.raises(UserError, match="has no column 'label': name it with --task_label_column"):
        train(toy.config(tmp_path / "run", modules=modules))
    assert not (tmp_path / "run").exists()


def test_a_probe_of_one_model_alone_is_refused(toy, labelled):
    with pytest.raises(UserError, match="a probe is of two models; give --compare BASE"):
        load_script("evaluate").main([f"--model_name_or_path={toy.checkpoint}", f"--task_file={labelled}"])
