"""The search task: ranks against a slow oracle, what is planted is found, and the figures of a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.data.corpus import CorpusConfig, text_hash
from mlm.data.task import TaskConfig, read_task
from mlm.evaluation import probe
from mlm.evaluation.retrieval import score, search
from mlm.report.run_record import read_runs
from mlm.train import train
from tests.conftest import ANIMALS
from tests.scripts import load_script


def slow_score(pairs, features):
    """One query after the other, by sorting its documents: those of the same nearness come before its own."""
    queries = sorted({query for query, _ in pairs})
    x = features[:, : features.shape[1] // 4]
    figures = {}
    for query in queries:
        near = {
            d: x[query] @ x[d] / np.linalg.norm(x[query]) / np.linalg.norm(x[d]) for d in range(len(queries), len(x))
        }
        ranks = [sum(other > near[d] - 1e-6 for other in near.values()) for q, d in pairs if q == query]
        own = {"mrr_10": 1 / min(ranks) if min(ranks) <= 10 else 0.0}
        own |= {f"recall_{k}": np.mean([rank <= k for rank in ranks]) for k in (1, 10, 100) if k < len(near)}
        for name, value in own.items():
            figures.setdefault(name, []).append(value)
    return figures


@given(st.integers(0, 9999), st.integers(1, 12), st.integers(2, 130))
def test_ranks_are_those_of_a_slow_search(seed, queries, documents):
    rng = np.random.default_rng(seed)
    features = rng.integers(-2, 3, (queries + documents, 12)).astype(np.float64) + 0.25  # with many ties
    pairs = {
        (q, int(d)) for q in range(queries) for d in rng.integers(queries, queries + documents, rng.integers(1, 4))
    }
    pairs = np.array(sorted(pairs))
    found = score(pairs, features)
    expected = slow_score(pairs.tolist(), features)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-12, err_msg=name)


def made_up(seed, *likeness):
    """30 queries and a document of each, and for each model features that make a pair so much alike."""
    rng, pairs = np.random.default_rng(seed), np.stack([np.arange(30), np.arange(30, 60)], axis=1)
    shared, own = rng.normal(size=(30, 16)), rng.normal(size=(60, 16))
    return pairs, *(own + alike * np.concatenate([shared, shared]) for alike in likeness)


def test_a_model_that_is_the_base_finds_exactly_what_it_does():
    for figures in search(*made_up(0, 1.0, 1.0))["metrics"].values():
        assert figures["difference"] == 0
        assert figures["interval"] == [0, 0]


def test_a_planted_effect_is_found_and_has_a_sign():
    better, worse = (search(*made_up(0, *likeness))["metrics"]["mrr_10"] for likeness in ((0.3, 2.0), (2.0, 0.3)))
    assert better["before"] < better["after"]
    assert better["interval"][0] > 0 > worse["interval"][1]
    assert worse["difference"] == -better["difference"]


def test_a_model_that_tells_no_documents_apart_finds_none():
    pairs, own = made_up(0, 1.0)
    figures = search(pairs, own, np.ones_like(own))["metrics"]
    assert all(metric["after"] == 0 for metric in figures.values())
    nothing = np.full_like(own, np.nan)
    assert all(metric["after"] == 0 for metric in search(pairs, own, nothing)["metrics"].values())


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """On made-up queries of two models that are equally good: their features are drawn alike."""
    held = 0
    for seed in range(400):
        rng, pairs = np.random.default_rng(seed), np.stack([np.arange(40), np.arange(40, 80)], axis=1)
        shared = np.tile(rng.normal(size=(40, 16)), (2, 1))
        both = (shared + 1.2 * rng.normal(size=(80, 16)) for _ in range(2))
        low, high = search(pairs, *both)["metrics"]["mrr_10"]["interval"]
        held += low <= 0 <= high
    assert held / 400 >= 0.93


@pytest.fixture(scope="module")
def questions(toy, tmp_path_factory):
    """Which animal likes what: twelve queries, the documents of six animals, two of which stand in the text."""
    file = tmp_path_factory.mktemp("task") / "questions.jsonl"
    rows = [
        {"question": f"{start} likes {food}", "answer": f"the {age} {animal} likes {food} every day ."}
        for age, (animal, food) in zip(["old", "huge"] * 3, ANIMALS.items(), strict=True)
        for start in ("who", "which animal")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task_file": str(file), "task_kind": "retrieval", "task_text_column": "question"} | {
        "task_pair_column": "answer"
    }


@pytest.fixture(scope="module")
def run(toy, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    train(toy.config(folder, **questions))
    return folder


def test_a_run_searches_with_its_base_and_itself(run):
    results, comparison = (json.loads((run / f"{name}.json").read_text()) for name in ("all_results", "comparison"))
    task = comparison["task"]
    assert (task["queries"], task["documents"], task["in_training_text"]) == (12, 6, 3)
    assert task["rows_in_training_text"] == [0, 4, 8]  # of the first query that each of these documents answers
    assert (results["task_queries"], results["task_documents"]) == (12, 6)
    assert list(task["metrics"]) == ["mrr_10", "recall_1"]  # of six documents ten are no choice
    for name, own in task["metrics"].items():
        assert [results[f"task_{name}{end}"] for end in ("_before", "", "_difference")] == [
            own[key] for key in ("before", "after", "difference")
        ]
        assert [results[f"task_{name}_{end}"] for end in ("low", "high")] == own["interval"]
    card = (run / "README.md").read_text()
    before, after = (f"{100 * task['metrics']['mrr_10'][when]:.4g}%" for when in ("before", "after"))
    assert f"- task, 12 queries: MRR@10 {before} before, {after} after, difference" in card
    assert "- 3 texts of the task (first in rows 0, 4, 8, counted from 0) stand in the training text" in card
    assert (task["rows"], task["rows_taken"]) == (12, 12)


def test_a_row_of_which_both_texts_were_read_is_named_once_and_rows_come_in_order(questions):
    task = read_task(TaskConfig(**questions), CorpusConfig())
    texts = [task.texts[i][0] for query, document in task.pairs[[5, 2]] for i in (query, document)]
    train = SimpleNamespace(text_hashes=np.sort(np.array([*map(text_hash, texts)], np.uint64)))
    features = np.ones((len(task.texts), 4))
    found = probe.conclude(task, [features, features], [train])
    named, lines = found["rows_in_training_text"], Path(questions["task_file"]).read_text().splitlines()
    assert found["in_training_text"] == 4
    assert named == sorted(set(named))
    assert {text for row in named for text in json.loads(lines[row]).values()} >= set(texts)
    assert probe.figures(found)["task_first_rows_in_training_text"] == named


def test_evaluate_repeats_the_search_and_the_same_model_has_no_interval(run, toy, questions, tmp_path, capsys):
    flags = {"model_name_or_path": run, **questions, "output": tmp_path / "found.json"}
    for base in (toy.checkpoint, run):
        load_script("evaluate").main([f"--{name}={value}" for name, value in {**flags, "compare": base}.items()])
        found = json.loads((tmp_path / "found.json").read_text())["task"]["metrics"]
        own = json.loads((run / "comparison.json").read_text())["task"]["metrics"]
        assert found["mrr_10"]["after"] == pytest.approx(own["mrr_10"]["after"], abs=0.05)
    assert "difference 0 points (no query differs)" in capsys.readouterr().out


def test_the_page_has_the_search(run, toy):
    load_script("report").main([str(run)])
    page = (run / "report.html").read_text()
    metrics = read_runs([run])[0].comparison["task"]["metrics"]
    assert '<section id="task">' in page
    assert "12 queries in questions.jsonl search 6 documents" in page
    for name, title in (("mrr_10", "MRR@10"), ("recall_1", "recall@1")):
        assert f'<th scope="row">{title}</th>' in page
        assert f"<td>{100 * metrics[name]['after']:.1f}%</td>" in page
    assert "Accuracy before and after against labels a class" not in page
