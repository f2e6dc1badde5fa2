"""The README's tables, and the page of results, are what the stored measurements say."""

import json

from tests.conftest import REPOSITORY
from tests.scripts import load_script

RESULTS = REPOSITORY / "benchmarks" / "results"
results = load_script("results")


def test_the_readmes_tables_are_written_from_the_stored_results():
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
