"""Writes benchmarks/RESULTS.md, its chart and the README's tables from what benchmarks left as JSON."""

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm import cli

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
BEGIN, END = "<!-- {}: written by scripts/results.py -->\n", "<!-- end of {} -->\n"
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets")
SUITES = ("data_path", "training", "memory", "learning")  # what pytest-benchmark's suites left


def main(argv: Sequence[str]) -> dict[str, Any]:
    cli.parse([], argv, cli.command(__doc__))
    readme = REPOSITORY / "README.md"
    written = {
        readme: with_tables(readme.read_text(encoding="utf-8")),
        BENCHMARKS / "RESULTS.md": page(),
        BENCHMARKS / "results" / "imdb.svg": chart(),
    }
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return {"written": [str(path) for path in written]}


def with_tables(text: str) -> str:
    """`text` with what stands between each pair of marks replaced."""
    for name, table in (("results", imdb()), ("checkpoints", checkpoints()), ("faults", faults())):
        head, rest = text.split(BEGIN.format(name))
        text = f"{head}{BEGIN.format(name)}{table}{rest[rest.index(END.format(name)) :]}"
    return text


def page() -> str:
    """benchmarks/RESULTS.md, whole."""
    parts = [
        "# Results\n\nWritten by `scripts/results.py` from the files in `benchmarks/results/`. A ratio is "
        "the median of those of rounds in which both sides were timed in turn; behind it stand the lowest "
        "and the highest round. A target in bold is missed.\n",
        f"## A run from start to end\n\n{imdb()}\n{first_step()}",
        *(suite(name) for name in SUITES),
        *([gpu(_stored("gpu"))] if (BENCHMARKS / "results" / "gpu.json").exists() else []),
        f"## What the masks cost in noise\n\n{noise()}",
        f"## What a checkpoint costs\n\n{checkpoints()}",
        f"## Accidents\n\n{faults()}",
        (BENCHMARKS / "NOTES.md").read_text(encoding="utf-8"),
    ]
    return "\n".join(parts)


def suite(name: str) -> str:
    """The rows of a pytest-benchmark suite."""
    stored = _stored(name)
    lines = [
        f"## {stored['what']}\n",
        "| workload | against | ours is | target | rounds | ours | theirs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in stored["rows"]:
        if _noise(row):
            continue
        values = [row[key] for key in ("median", "low", "high")]
        median, low, high = (_figure(value) for value in values)
        spread = f" ({low} to {high})" if row["n"] > 1 else ""
        lines.append(
            f"| {row['workload']} | {row['against']}{', a ceiling' if row['kind'] == 'ceiling' else ''} "
            f"| {median}{row['unit'] if row['unit'] == '×' else ' ' + row['unit']}{spread} | {_target(row)} "
            f"| {row['n']} | {_speed(row, 'ours')} | {_speed(row, 'theirs')} |"
        )
    noise = [
        f"{row['workload']} {row['low']:.2f} to {row['high']:.2f}" for row in stored["rows"] if _noise(row)
    ]
    lines.append(f"\nOurs against itself, which shows the noise: {'; '.join(noise)}.\n" if noise else "")
    used = [
        f"{row['workload']}: {row['flops_per_token'] / 1e6:,.0f} MFLOP a token, "
        f"{row['products_per_second'] / 1e9:,.0f} GFLOP/s of matrix products, utilisation "
        f"{row['utilisation']:.2f}{_where_the_rest_goes(row)}"
        for row in {row["workload"]: row for row in stored["rows"] if "utilisation" in row}.values()
    ]
    if used:
        lines += [f"- {line}" for line in used]
        lines.append("")
    load = stored["environment"]["load_before"]
    busy = f" The machine was busy: {load:.1f} processes wanted a core when it began." if load > 3 else ""
    lines.append(
        f"{_machine(stored['environment'])}.{busy} `python -m pytest benchmarks --imdb FOLDER "
        "--model_name_or_path CHECKPOINT --results benchmarks/results`.\n"
    )
    return "\n".join(lines)


def gpu(stored: dict[str, Any]) -> str:
    """The rows of benchmarks/gpu.py, each figure with its target, where it has one."""
    lines = [
        f"## {stored['what'][0].upper()}{stored['what'][1:]}\n",
        "| step | tokens/s | utilisation | waits for data | peak memory | host waits for the device |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in stored["rows"]:
        step = f"{row['model']}, {row['length']} tokens, {row['precision']}, {row['head']} head"
        if row["compiled"]:
            step += ", compiled"
        if "failed" in row:
            lines.append(f"| {step} | {row['failed']} | | | | |")
            continue
        targets, waiting = row.get("targets", {}), row["waiting_for_data"]
        speed = f"{row['tokens_per_second']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"
        figures = {
            "tokens_per_second": (speed, "at_least"),
            "utilisation": (f"{row['utilisation']:.2f}", "at_least"),
            "waiting_for_data": ("" if waiting is None else f"{waiting:.1%}", "at_most"),
        }
        cells = [
            f"{words} {_target({'median': row[name], kind: targets.get(name)})}".strip() if words else ""
            for name, (words, kind) in figures.items()
        ]
        syncs = "" if row["synchronisations_in_a_step"] is None else row["synchronisations_in_a_step"]
        lines.append(f"| {step} | {' | '.join(cells)} | {row['peak_memory_mib']:,.0f} MiB | {syncs} |")
    laws = "; ".join(f"law {law}: {what}" for law, what in stored["laws"].items() if isinstance(what, str))
    rates = ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in stored["products_per_second"].items())
    skipped, where = stored["laws"]["9"]["skipped_steps"], stored["environment"]
    return "\n".join(lines) + (
        f"\n\nMatrix products, TFLOP/s: {rates}. On the device, {laws}; law 9: the learning rate held while "
        f"{skipped} steps were skipped. {where['device']}, {_machine(where)}. "
        "`python benchmarks/gpu.py`.\n"
    )


def imdb() -> str:
    """The course's workload, two recipes against ours, with where and how it was measured."""
    stored = _stored("imdb")
    lines = [
        "| | perplexity before | after | process, start to end | sooner, by | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in stored["results"].items():
        peer_name = "course" if run["evaluates_before"] else "run_mlm_no_trainer"
        peer, memory = stored["results"][peer_name], run["peak_memory_mib"]
        ratios = [
            theirs / mine
            for theirs, mine in zip(peer["wall_seconds_of_each"], run["wall_seconds_of_each"], strict=False)
        ]  # round by round; the course's recipe has one
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        lines.append(
            f"| {name} | {run['perplexity_before']:.1f} | {run['perplexity']:.1f} "
            f"| {run['wall_seconds']:.0f} s "
            f"| {'' if name == peer_name else f'{statistics.median(ratios):.1f}×{spread}'} "
            f"| {memory:,.0f} MiB ({memory / peer['peak_memory_mib']:.2f}) |"
        )
    where = stored["environment"]
    caption = (
        f"O{stored['what'][1:]}, {stored['model']}, {stored['evaluated_masked_tokens']:,} masked tokens; the "
        "first and third evaluate before and after and are compared with each other, the others after only "
        "(their target: 4×); medians of rounds, caches and token store warm but in the first; "
        f"n = {stored['n']}, 1 of the course; "
        f"{_machine(where)}. `python benchmarks/imdb.py`."
    )
    return "\n".join(lines) + f"\n\n{caption}\n"


def first_step() -> str:
    peer, ours = _stored("imdb")["first_step_seconds"].values()
    ratios = [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]
    row = {"median": statistics.median(ratios), "at_least": 1.5}
    return (
        f"From the command to the first optimizer step, caches warm: {statistics.median(ours):.1f} s, "
        f"{row['median']:.2f}× sooner than run_mlm_no_trainer's recipe ({min(ratios):.2f} to "
        f"{max(ratios):.2f}, n = {len(ratios)}; target {_target(row)}).\n"
    )


def noise() -> str:
    """How far perplexity moves with nothing but the mask seed."""
    stored = _stored("mask_noise")
    what = stored["what"]
    lines = [
        "| evaluation | seeds | masked tokens | perplexity | standard deviation | range |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in stored["results"].items():
        mean, deviation, low, high = (found[f"perplexity{which}"] for which in ("", "_std", "_min", "_max"))
        lines.append(
            f"| {name} | {found['figures']} | {found['masked_tokens']:,} | {mean:.1f} | {deviation:.2f} "
            f"| {low:.1f} to {high:.1f} |"
        )
    return "\n".join(lines) + (
        f"\n\n{what[0].upper()}{what[1:]}, {stored['model']}. Compare fold figures with fold figures only: "
        "beside a masked token 15% of the others are masked in a sampled pass, and in a fold those that "
        "share it, 17.3 of 127. "
        f"{_machine(stored['environment'])}. `python benchmarks/mask_noise.py`.\n"
    )


def checkpoints() -> str:
    """How long a run stands still for one, and what all of them cost."""
    stored = _stored("checkpoints")
    ratios = stored["training_time_ratios"]
    return (
        f"With {stored['what']} (a step takes {stored['step_seconds']:.2f} s), the loop stands still for "
        f"{stored['stood_still_seconds']:.2f} s each time, where a bare copy in memory takes "
        f"{stored['copy_seconds']:.2f} s; training takes {stored['training_time_ratio']:.2f} of its time "
        f"without ({ratios[0]:.2f} to {ratios[-1]:.2f}, n = {stored['n']}), as the thread that hashes and "
        f"writes takes a core. {_machine(stored['environment'])}. `python benchmarks/checkpoints.py`.\n"
    )


def faults() -> str:
    """The accidents that the tests have tried, how often, and how they ended."""
    stored = _stored("faults")
    lines = ['| fault | cases | outcome | `./scripts/test.sh -m "" -k …` |', "| --- | --- | --- | --- |"]
    for fault, tried in stored["faults"].items():
        lines.append(f"| {fault} | {tried['cases']} | {tried['outcome']} | `{tried['test']}` |")
    return "\n".join(lines) + f"\n\nOne run on {_machine(stored['environment'])}.\n"


def chart() -> str:
    """Wall times as bars, in the colours of the page around them."""
    results = _stored("imdb")["results"]
    longest, bars = max(run["wall_seconds"] for run in results.values()), []
    for row, (name, run) in enumerate(results.items()):
        seconds, y = run["wall_seconds"], 10 + 34 * row
        width = 330 * seconds / longest
        bars.append(
            f'<text x="190" y="{y + 16}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect class="{"ours" if name.startswith("mlm") else "theirs"}" x="200" y="{y}" '
            f'width="{width:.1f}" height="22" rx="2"/><text x="{206 + width:.1f}" y="{y + 16}">'
            f"{seconds:.0f} s</text>"
        )
    height = 20 + 34 * len(results)
    style = (
        "text{font:13px system-ui,sans-serif;fill:#24292f}.ours{fill:#0b7285}.theirs{fill:#adb5bd}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.ours{fill:#3bc9db}.theirs{fill:#6c757d}}"
    )
    title = "<title>Wall time of one epoch, process start to end</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 {height}" role="img">'
        f"{title}<style>{style}</style>{''.join(bars)}</svg>\n"
    )


def _stored(name: str) -> dict[str, Any]:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def _noise(row: dict[str, Any]) -> bool:
    """Whether a row times ours against itself."""
    return row["kind"] == "again" and "tokens_per_second" in row


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _target(row: dict[str, Any]) -> str:
    if row.get("at_least") is not None:
        met, words = row["median"] >= row["at_least"], f"≥ {_figure(row['at_least'])}"
    elif row.get("at_most") is not None:
        met, words = row["median"] <= row["at_most"], f"≤ {_figure(row['at_most'])}"
    else:
        return ""
    return words if met else f"**{words}**"


def _where_the_rest_goes(row: dict[str, Any]) -> str:
    """The profile of a step that uses less than half of what the machine's matrix products could do."""
    if row["utilisation"] >= 0.5:
        return ""
    products = row["profile"]["matrix products"]
    kinds = sorted(row["profile"].items(), key=lambda kind: -kind[1])
    shares = ", ".join(f"{name} {share:.0%}" for name, share in kinds if share >= 0.005)
    rate = row["utilisation"] / products
    return f"; its time goes to {shares}; its products run at {rate:.2f} of that rate"


def _speed(row: dict[str, Any], who: str) -> str:
    units = {"mebibytes": " MiB", "perplexity": "", "bytes_per_token": " bytes a token"}
    for name, what in {**units, "tokens_per_second": " tokens/s"}.items():
        if name in row:
            return f"{_figure(row[name][who])}{what}"
    return ""


def _machine(where: dict[str, Any]) -> str:
    return (
        f"{where['cores']} cores of {where['processor']}, "
        f"{', '.join(f'{name} {where[name]}' for name in LIBRARIES)}, "
        f"commit {where['commit'] or 'unknown'}"
    )


if __name__ == "__main__":
    cli.run(main)
