"""Writes the README's table of results from the JSON files that the benchmarks left."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm import cli

REPOSITORY = Path(__file__).parents[1]
BEGIN, END = "<!-- results: written by scripts/results.py -->\n", "<!-- end of results -->\n"


def main(argv: Sequence[str]) -> dict[str, Any]:
    cli.parse([], argv, cli.command(__doc__))
    readme = REPOSITORY / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table()), encoding="utf-8")
    return {"written": str(readme)}


def with_table(text: str, table: str) -> str:
    """`text` with what stands between the two marks replaced."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}{table}{rest[rest.index(END) :]}"


def table() -> str:
    """The course's workload, its recipe against ours, with where and how it was measured."""
    imdb = json.loads((REPOSITORY / "benchmarks" / "results" / "imdb.json").read_text())
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
        f"n = 1; {where['cores']} cores of {where['processor']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, commit {where['commit'] or 'unknown'}. `python benchmarks/imdb.py`."
    )
    return "\n".join(rows) + f"\n\n{caption}\n"


if __name__ == "__main__":
    cli.run(main)
