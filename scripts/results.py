"""Writes the README's table of results from the JSON files that the benchmarks left."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm import cli

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
BEGIN, END = "<!-- {}: written by scripts/results.py -->\n", "<!-- end of {} -->\n"


def main(argv: Sequence[str]) -> dict[str, Any]:
    cli.parse([], argv, cli.command(__doc__))
    readme = REPOSITORY / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return {"written": str(readme)}


def with_tables(text: str) -> str:
    """`text` with what stands between each pair of marks replaced."""
    for name, table in (("results", results()), ("faults", faults())):
        head, rest = text.split(BEGIN.format(name))
        text = f"{head}{BEGIN.format(name)}{table}{rest[rest.index(END.format(name)) :]}"
    return text


def faults() -> str:
    """The accidents that the tests have tried, how often, and how they ended."""
    stored = json.loads((RESULTS / "faults.json").read_text())
    rows = ['| fault | cases | outcome | `./scripts/test.sh -m "" -k …` |', "| --- | --- | --- | --- |"]
    for fault, tried in stored["faults"].items():
        rows.append(f"| {fault} | {tried['cases']} | {tried['outcome']} | `{tried['test']}` |")
    where = stored["environment"]
    caption = f"One run on {_machine(where)}."
    return "\n".join(rows) + f"\n\n{caption}\n"


def results() -> str:
    """The course's workload, its recipe against ours, with where and how it was measured."""
    imdb = json.loads((RESULTS / "imdb.json").read_text())
    peer = imdb["results"]["course"]
    rows = [
        "| | perplexity before | after | training tokens/s | process, start to end | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in imdb["results"].items():
        speed, memory = run["tokens_per_second"], run["peak_memory_mib"]
        rows.append(
            f"| {name} | {run['perplexity_before']:.1f} | {run['perplexity']:.1f} "
            f"| {speed:,.0f} ({speed / peer['tokens_per_second']:.1f}×) "
            f"| {run['wall_seconds']:.0f} s ({peer['wall_seconds'] / run['wall_seconds']:.1f}× sooner) "
            f"| {memory:,.0f} MiB ({memory / peer['peak_memory_mib']:.2f}) |"
        )
    where = imdb["environment"]
    caption = (
        f"O{imdb['what'][1:]}, {imdb['model']}, {imdb['evaluated_masked_tokens']:,} masked tokens; "
        f"n = 1; {_machine(where)}. `python benchmarks/imdb.py`."
    )
    return "\n".join(rows) + f"\n\n{caption}\n"


def _machine(where: dict[str, Any]) -> str:
    return (
        f"{where['cores']} cores of {where['processor']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, commit {where['commit'] or 'unknown'}"
    )


if __name__ == "__main__":
    cli.run(main)
