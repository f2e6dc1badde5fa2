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


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json") if path.stem != "faults"))
def test_each_benchmark_states_its_workload_its_peer_and_its_ceiling(name):
    files = (RESULTS.parent / file for file in (f"{name}.py", f"test_{name}.py", f"{name}/run.py"))
    file = next(file for file in files if file.exists())
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    for word in ("Workload:", "Peer", "Ceiling"):
        assert word in docstring, word
