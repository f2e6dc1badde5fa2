"""The README's table, and the page of results, are what the stored measurements say."""

import ast
import json

import pytest

from tests.conftest import REPOSITORY
from tests.scripts import load_script

RESULTS = REPOSITORY / "benchmarks" / "results"
results = load_script("results")


def test_the_readmes_table_is_written_from_the_stored_results():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert results.with_tables(text) == text


def test_the_page_of_results_and_its_chart_are_written_from_them_too():
    assert results.page() == (RESULTS.parent / "RESULTS.md").read_text(encoding="utf-8")
    assert results.chart() == (RESULTS / "imdb.svg").read_text(encoding="utf-8")


def test_each_stored_result_says_where_it_was_measured():
    stored = list(RESULTS.glob("*.json"))
    assert stored
    for path in stored:
        where = json.loads(path.read_text())["environment"]
        assert {"torch", "transformers", "processor", "cores", "commit"} <= where.keys(), path.name


def speedrun(monkeypatch, runs=(), times=()):
    stored = {"runs": list(runs), "times": list(times), "environment": results._stored("speedrun")["environment"]}
    monkeypatch.setattr(results, "_stored", lambda name: stored)
    return results.speedrun()


def test_the_best_recipe_is_chosen_by_other_documents_than_its_loss_is_of(monkeypatch):
    losses = {"default": (4.3, 4.3), "chosen": (4.1, 4.2), "lucky": (4.2, 4.0)}  # dev, test
    common = {"domain": "imdb", "passes": 1, "settings": {}, "accuracy": None}
    runs = [
        {**common, "recipe": recipe, "seed": seed, "dev_loss": dev, "loss": loss + seed * len(recipe) / 1e4}
        for recipe, (dev, loss) in losses.items()
        for seed in range(1, 6)
    ]
    assert "Result: imdb, 1 pass: 4.202 by chosen, 4.302 by default" in speedrun(monkeypatch, runs)


def test_recipes_are_compared_over_the_seeds_that_both_have(monkeypatch):
    losses = {"default": {1: 4.0, 2: 5.0}, "other": {2: 4.9}, "alone": {3: 1.0}}
    common = {"domain": "imdb", "passes": 1, "settings": {}, "accuracy": None}
    runs = [
        {**common, "recipe": recipe, "seed": seed, "dev_loss": loss + 0.2 * (recipe != "default"), "loss": loss}
        for recipe, of_seeds in losses.items()
        for seed, loss in of_seeds.items()
    ]
    found = [line for line in speedrun(monkeypatch, runs).splitlines() if line.startswith(("| def", "| oth", "| alo"))]
    assert found == [
        "| default |  | 4.5000 | 2 | 4.0000 to 5.0000 |  |  |  |  |",
        "| other | +0.1000 (1) | 4.9000 | 1 |  | -0.1000 |  |  |  |",
        "| alone |  | 1.0000 | 1 |  |  |  |  |  |",
    ]


def test_a_race_is_compared_with_its_own_domain_and_a_peer_may_be_missing(monkeypatch):
    sides = [("imdb", "peer", 100.0, 4.0), ("imdb", "fast", 50.0, 4.1), ("hotel", "peer", 10.0, 3.0)]
    sides += [("hotel", "fast", 5.0, 2.9), ("hotel", "default_to_target", 8.0, 3.0), ("news", "fast", 1.0, 2.0)]
    times = [
        {"domain": domain, "recipe": recipe.replace("peer", "run_mlm_no_trainer"), "seed": 1, "settings": {}}
        | {"seconds": seconds, "loss": loss, "processor": "one"}
        for domain, recipe, seconds, loss in sides
    ]
    page = speedrun(monkeypatch, times=times)
    found = [line for line in page.splitlines() if line.startswith("| fast")]
    assert found == [
        "| fast | 1 | a pass | 5.0 | 0.50 (0.50 to 0.50, n = 1) | 0.62 (0.62 to 0.62, n = 1) "
        "| -0.1000 at most, n = 1 |",
        "| fast | 1 | a pass | 50.0 | 0.50 (0.50 to 0.50, n = 1) |  | +0.1000 at most, n = 1 |",
        "| fast | 1 | a pass | 1.0 |  |  |  |",
    ]


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json") if path.stem != "faults"))
def test_each_benchmark_states_its_workload_its_peer_and_its_ceiling(name):
    files = (RESULTS.parent / file for file in (f"{name}.py", f"test_{name}.py", f"{name}/run.py"))
    file = next(file for file in files if file.exists())
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    for word in ("Workload:", "Peer", "Ceiling"):
        assert word in docstring, word
