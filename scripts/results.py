"""Writes benchmarks/RESULTS.md, its chart and the README's table from what benchmarks left as JSON."""

import ast
import html
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.speedrun import records
from mlm import cli

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
BEGIN, END = "<!-- {}: written by scripts/results.py -->\n", "<!-- end of {} -->\n"
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets")
SUITES = ("data_path", "training", "memory", "learning")  # what pytest-benchmark's suites left
SUITE_COMMAND = (
    "python -m pytest benchmarks --imdb FOLDER --model_name_or_path CHECKPOINT --results benchmarks/results"
)
FAULTS_COMMAND = (
    './scripts/test.sh -n 0 -m "" tests/engine/test_checkpoint.py tests/engine/test_faults.py '
    "tests/engine/test_signals.py tests/data/test_lock.py tests/faults tests/test_surroundings.py "
    "--faults benchmarks/results/faults.json"
)
ONCE = "mlm, no evaluation before"  # what does as much as run_mlm_no_trainer's recipe
BF16 = "bf16 on a CPU is a matter of the CPU"
ELSEWHERE = (  # measured by hand: no command repeats it
    "on a Xeon that has the same instructions it was 0.8 times as fast (fp32 39 to 44 s, bf16 53 s)"
)


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
    """`text` with what stands between the marks replaced by the small table of results."""
    begin, end = BEGIN.format("results"), END.format("results")
    head, rest = text.split(begin)
    return f"{head}{begin}{summary()}{rest[rest.index(end) :]}"


def page() -> str:
    """benchmarks/RESULTS.md, whole."""
    parts = [
        "# Results\n\nWritten by `scripts/results.py` from the files in `benchmarks/results/`. A ratio is "
        "the median of those of rounds in which both sides were timed in turn; behind it stand the lowest "
        "and the highest round. A target in bold is missed.\n",
        imdb(),
        *(suite(name) for name in SUITES),
        *([gpu(_stored("gpu"))] if (BENCHMARKS / "results" / "gpu.json").exists() else []),
        overlap(),
        host_work(),
        *([packing()] if (BENCHMARKS / "results" / "packing.json").exists() else []),
        noise(),
        intervals(),
        *([probe()] if (BENCHMARKS / "results" / "probe.json").exists() else []),
        *([replay()] if (BENCHMARKS / "results" / "replay.json").exists() else []),
        *([outlook()] if (BENCHMARKS / "results" / "outlook.json").exists() else []),
        *([speedrun()] if (BENCHMARKS / "results" / "speedrun.json").exists() else []),
        checkpoints(),
        *([corpus_size()] if (BENCHMARKS / "results" / "corpus_size.json").exists() else []),
        faults(),
        (BENCHMARKS / "NOTES.md").read_text(encoding="utf-8"),
    ]
    return "\n".join(parts)


def section(title: str, file: str | None, result: str, where: dict[str, Any], command: str) -> str:
    """The head of a section: the result, where and how it was measured, and the benchmark's docstring."""
    load = where.get("load_before", 0.0)
    busy = f" The machine was busy: {load:.1f} processes wanted a core when it began." if load > 3 else ""
    lines = [f"## {title}\n", f"- Result: {result}", f"- Machine: {_machine(where)}.{busy}"]
    lines.append(f"- Command: `{command}`\n")
    if file is not None:
        docstring = ast.get_docstring(ast.parse((BENCHMARKS / file).read_text(encoding="utf-8")))
        paragraphs = docstring.split("\n\n")[1:]
        lines += [f"{text}\n" for text in paragraphs if not text.startswith("    ")]  # less the commands
    return "\n".join(lines)


def suite(name: str) -> str:
    """The rows of a pytest-benchmark suite."""
    stored = _stored(name)
    rows = [row for row in stored["rows"] if not _noise(row)]
    lines = [
        section(stored["what"].rstrip("."), f"test_{name}.py", _headline(rows), stored["environment"], SUITE_COMMAND),
        "| workload | against | ours is | target | rounds | ours | theirs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['workload']} | {row['against']}{', a ceiling' if row['kind'] == 'ceiling' else ''} "
            f"| {_median(row)}{_spread(row)} | {_target(row)} | {row['n']} | {_speed(row, 'ours')} "
            f"| {_speed(row, 'theirs')} |"
        )
    noise = [f"{row['workload']} {row['low']:.2f} to {row['high']:.2f}" for row in stored["rows"] if _noise(row)]
    lines.append(f"\nOurs against itself, which shows the noise: {'; '.join(noise)}.\n" if noise else "")
    used = [
        f"- {row['workload']}: {row['flops_per_token'] / 1e6:,.0f} MFLOP a token, "
        f"{row['products_per_second'] / 1e9:,.0f} GFLOP/s of matrix products, utilisation "
        f"{row['utilisation']:.2f}{_where_the_rest_goes(row)}"
        for row in {row["workload"]: row for row in rows if "utilisation" in row}.values()
    ]
    lines += [*used, ""] if used else []
    if any("bf16" in row["workload"] for row in rows):
        lines.append(f"{BF16}: {ELSEWHERE}.\n")
    return "\n".join(lines)


def gpu(stored: dict[str, Any]) -> str:
    """The rows of benchmarks/gpu.py, each figure with its target, where it has one."""
    where = stored["environment"]
    speeds = [row["tokens_per_second"] for row in stored["rows"] if "failed" not in row]
    result = f"up to {max(speeds, default=0):,.0f} tokens/s, on {where['device']}"
    lines = [
        section(_sentence(stored["what"]), "gpu.py", result, where, "python benchmarks/gpu.py"),
        "| step | tokens/s | utilisation | waits for data | peak memory | host waits for the device |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_gpu_row(row) for row in stored["rows"]),
    ]
    claims = {name: claim for name, claim in stored["invariants"].items() if isinstance(claim, str)}
    invariants = "; ".join(f"invariant {name}: {claim}" for name, claim in claims.items())
    rates = ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in stored["products_per_second"].items())
    skipped = stored["invariants"]["9"]["skipped_steps"]
    lines.append(
        f"\nMatrix products, TFLOP/s: {rates}. On the device, {invariants}; invariant 9: the learning rate "
        f"held while {skipped} steps were skipped.\n"
    )
    for row in stored["masking"]:
        waits = row["synchronisations"]
        lines.append(
            f"- Masking on the device, {row['length']} tokens a chunk: {row['ratio']:.3g}× the host's speed "
            f"({row['low']:.3g} to {row['high']:.3g}, n = {row['n']}), "
            f"{row['device_tokens_per_second']:,.0f} tokens/s against {row['host_tokens_per_second']:,.0f}"
            f"{'' if waits is None else f'; the host waits {waits} times for the device'}"
        )
    return "\n".join(lines) + "\n"


def _gpu_row(row: dict[str, Any]) -> str:
    step = f"{row['model']}, {row['length']} tokens, {row['precision']}, {row['way']}"
    if row["compiled"]:
        step += ", compiled"
    if "failed" in row:
        return f"| {step} | {row['failed']} | | | | |"
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
    return f"| {step} | {' | '.join(cells)} | {row['peak_memory_mib']:,.0f} MiB | {syncs} |"


def summary() -> str:
    """The README's table: the course's workload, whole runs, of which all but the course evaluate once."""
    stored = _stored("imdb")
    results, where = stored["results"], stored["environment"]
    lines = [
        "| | perplexity before | after | process, start to end | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("course", "run_mlm_no_trainer", ONCE, "mlm, bf16"):
        run = results[name]
        lines.append(
            f"| {name.removesuffix(', no evaluation before')} | {run['perplexity_before']:.1f} "
            f"| {run['perplexity']:.1f} | {run['wall_seconds']:.0f} s"
            f"{f', {_sooner(stored, name)}' if name.startswith('mlm') else ''} "
            f"| {run['peak_memory_mib']:,.0f} MiB |"
        )
    twice = results["mlm"]["wall_seconds"]
    caption = (
        f"{_sentence(stored['what'])}, {stored['model']}. Medians of n = {stored['n']} rounds (of the course "
        "1), with their ratios to run_mlm_no_trainer's. All evaluate after training, the course before it as "
        f"well, as mlm does by default ({twice:.0f} s). {_machine(where)}. `python benchmarks/imdb.py`. "
        f"{_bf16(stored)}"
    )
    return "\n".join(lines) + f"\n\n{caption}\n"


def imdb() -> str:
    """Whole runs, two recipes against ours, and the time to the first step."""
    stored = _stored("imdb")
    lines = [
        section(
            "A run from start to end",
            "imdb.py",
            f"{_sooner(stored, ONCE)} than run_mlm_no_trainer's recipe, n = {stored['n']}",
            stored["environment"],
            "python benchmarks/imdb.py --imdb FOLDER --model_name_or_path CHECKPOINT",
        ),
        "| | perplexity before | after | process, start to end | | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in stored["results"].items():
        peer_name = _peer(run)
        peer, memory = stored["results"][peer_name], run["peak_memory_mib"]
        lines.append(
            f"| {name} | {run['perplexity_before']:.1f} | {run['perplexity']:.1f} "
            f"| {run['wall_seconds']:.0f} s | {'' if name == peer_name else _sooner(stored, name)} "
            f"| {memory:,.0f} MiB ({memory / peer['peak_memory_mib']:.2f}) |"
        )
    peer, ours = stored["first_step_seconds"].values()
    ratios = [theirs / mine for theirs, mine in zip(peer, ours, strict=True)]
    row = {"median": statistics.median(ratios), "at_least": 1.5}
    lines.append(
        f"\n{_sentence(stored['what'])}, {stored['model']}, {stored['evaluated_masked_tokens']:,} masked "
        "tokens. The first and third evaluate before and after and are compared with each other, the others "
        f"after only (their target: 4×). Medians of n = {stored['n']} rounds, 1 of the course; caches and "
        "token store are warm in all but the first.\n\nFrom the command to the first optimizer step, caches "
        "warm: "
        f"{statistics.median(ours):.1f} s, {row['median']:.2f}× sooner than run_mlm_no_trainer's recipe "
        f"({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}; target {_target(row)}).\n\n"
        f"{_bf16(stored)}\n"
    )
    return "\n".join(lines)


def _peer(run: dict[str, Any]) -> str:
    return "course" if run["evaluates_before"] else "run_mlm_no_trainer"


def _sooner(stored: dict[str, Any], name: str) -> str:
    """By how much a run takes less time than its peer, round by round; the course's recipe has one."""
    run = stored["results"][name]
    peer = stored["results"][_peer(run)]["wall_seconds_of_each"]
    ratios = [theirs / mine for theirs, mine in zip(peer, run["wall_seconds_of_each"], strict=False)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.1f}× sooner{spread}"


def _bf16(stored: dict[str, Any]) -> str:
    fp32, bf16 = (stored["results"][name]["wall_seconds"] for name in (ONCE, "mlm, bf16"))
    return f"{BF16}: here it is {fp32 / bf16:.1f} times as fast as fp32; {ELSEWHERE}."


def overlap() -> str:
    """A step whose gradients travel during the backward pass, against one whose gradients travel after it."""
    stored = _stored("overlap")
    rows, errors = stored["rows"], stored["bf16_error"]
    lines = [
        section(stored["what"], "overlap.py", _headline(rows), stored["environment"], "python benchmarks/overlap.py"),
        "| | of the time without overlap | target | ceiling | rounds | seconds, with and without "
        "| backward pass and reduction alone | sent |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds, alone = (", ".join(map(_figure, row[name].values())) for name in ("seconds", "alone"))
        lines.append(
            f"| {row['workload']} | {_figure(row['median'])}{_spread(row)} | {_target(row)} "
            f"| {_figure(row['ceiling'])} | {row['n']} | {seconds} | {alone} | {row['bytes'] / 2**20:.0f} MiB |"
        )
    cost = ", ".join(f"{error:.2%} for {n}" for n, error in errors.items())
    return "\n".join(lines) + f"\n\nRounding of a gradient that is sent in bf16, by the number of processes: {cost}.\n"


def host_work() -> str:
    """What a process does for a step on the host, whatever their number."""
    stored = _stored("host_work")
    command = "python benchmarks/host_work.py"
    lines = [
        section(stored["what"], "host_work.py", _headline(stored["rows"]), stored["environment"], command),
        "| | of the time of one process alone | target | rounds | milliseconds, and of one alone |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in stored["rows"]:
        milliseconds = ", ".join(map(_figure, row["milliseconds"].values()))
        lines.append(
            f"| {row['workload']} | {_figure(row['median'])}{_spread(row)} | {_target(row)} | {row['n']} "
            f"| {milliseconds} |"
        )
    return "\n".join(lines) + "\n"


def packing() -> str:
    """Rows that documents share, against padded ones."""
    stored = _stored("packing")
    command = "python benchmarks/packing.py --data FOLDER"
    lines = [
        section("Documents that share rows", "packing.py", _headline(stored["rows"]), stored["environment"], command),
        "| | padding | of padded rows | tokens/s | of padded rows | ratio | target | ceiling | rounds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in stored["rows"]:
        padding = " | ".join(f"{row['padding'][who]:.1%}" for who in ("ours", "theirs"))
        speed = " | ".join(_figure(row["tokens_per_second"][who]) for who in ("ours", "theirs"))
        lines.append(
            f"| {row['workload']} | {padding} | {speed} | {_figure(row['median'])}{_spread(row)} | {_target(row)} "
            f"| {_figure(row['ceiling'])} | {row['n']} |"
        )
    return "\n".join(lines) + f"\n\n{stored['what']}, {stored['model']}.\n"


def noise() -> str:
    """How far perplexity moves with nothing but the mask seed."""
    stored = _stored("mask_noise")
    results = stored["results"]
    first = next(iter(results))
    lines = [
        section(
            "What the masks cost in noise",
            "mask_noise.py",
            f"the perplexity of {first} has a standard deviation of {results[first]['perplexity_std']:.2f}, "
            f"n = {results[first]['figures']}",
            stored["environment"],
            "python benchmarks/mask_noise.py --imdb FOLDER --model_name_or_path CHECKPOINT",
        ),
        "| evaluation | seeds | masked tokens | perplexity | standard deviation | range |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, measured in results.items():
        mean, deviation, low, high = (measured[f"perplexity{which}"] for which in ("", "_std", "_min", "_max"))
        lines.append(
            f"| {name} | {measured['figures']} | {measured['masked_tokens']:,} | {mean:.1f} "
            f"| {deviation:.2f} | {low:.1f} to {high:.1f} |"
        )
    return "\n".join(lines) + (
        f"\n\n{_sentence(stored['what'])}, {stored['model']}. Compare fold figures with fold figures only: "
        "beside a masked token 15% of the others are masked in a mask round, and in a fold those that share "
        "it, 17.3 of 127.\n"
    )


def intervals() -> str:
    """How often the interval of a gain holds the truth, and how often percentiles of a bootstrap do."""
    stored = _stored("interval_coverage")
    populations = stored["coverage"]
    usual = [row["interval"] for name, row in populations.items() if not name.startswith("extreme")]
    sizes = list(usual[0])
    lines = [
        section(
            "Whether intervals hold with few documents",
            "interval_coverage.py",
            f"at least {min(min(row.values()) for row in usual):.1%} of the samples, the extreme population aside",
            stored["environment"],
            "python benchmarks/interval_coverage.py --documents RUN/documents.parquet",
        ),
        f"| interval / percentiles, documents: | {' | '.join(sizes)} |",
        "| --- |" + " --- |" * len(sizes),
    ]
    for name, row in populations.items():
        cells = (f"{row['interval'][n]:.1%} / {row['percentiles'][n]:.0%}" for n in sizes)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    samples = " and ".join(f"{number:,}" for number in stored["samples"].values())
    return "\n".join(lines) + f"\n\nThe {stored['what']}; {samples} samples.\n"


def probe() -> str:
    """Whether an adaptation helps a classifier, by the probe and by fine-tuning, and how often the interval holds."""
    stored = _stored("probe")
    told, lines = [], []
    for run in stored["runs"]:
        task, perplexities = run["probe"], " to ".join(f"{p:.1f}" for p in run["perplexities"])
        most = [row for row in task["curve"] if row["classifier"] == "logistic regression"][-1]
        reviews = f"{run['unlabelled']:,} reviews"
        told.append(f"{_points(most['accuracy'])} of accuracy with {most['k']} labels a class after {reviews}")
        lines += [
            f"{_sentence(stored['what'])}, {reviews}, {stored['model']}: perplexity {perplexities}; "
            f"{task['documents']:,} labelled, {task['splits']} splits.\n",
            "| labels a class | classifier | accuracy before | after | difference (95% interval) |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in task["curve"]:
            own = row["accuracy"]
            lines.append(
                f"| {row['k']} | {row['classifier']} | {own['before']:.1%} | {own['after']:.1%} | {_points(own)} |"
            )
        for tuned in run["finetuning"]:
            interval = [tuned["accuracy_low"], tuned["accuracy_high"]]
            own = {"difference": tuned["accuracy_difference"], "interval": interval}
            lines.append(
                f"| {tuned['labels_a_class']} | fine-tuning, {tuned['splits']} times | {tuned['accuracy_before']:.1%} "
                f"| {tuned['accuracy']:.1%} | {_points(own)} |"
            )
        lines.append("")
    head = section(
        "Whether a task profits",
        "probe.py",
        f"by logistic regression on frozen features {'; '.join(told)}",
        stored["environment"],
        "python benchmarks/probe.py --imdb FOLDER --model_name_or_path CHECKPOINT",
    )
    held = ", ".join(f"{share:.1%} with {k} labels a class" for k, share in stored["coverage"].items())
    return (
        f"{head}\n"
        + "\n".join(lines)
        + f"\nThe interval holds the truth in {held}; {stored['samples']:,} samples each.\n"
    )


def replay() -> str:
    """What replay keeps outside of the domain, and costs in it, against training without it seed by seed."""
    stored = _stored("replay")
    before, shares = stored["before"], sorted({run["share"] for run in stored["runs"]})
    kinds = {"out_of_domain_perplexity": "out of the domain", "perplexity": "in it"}

    def of(share: float, figure: str) -> list[float]:
        return [run[figure] for run in stored["runs"] if run["share"] == share]  # of each seed, in their order

    def ratios(share: float, figure: str) -> str:
        paired = [value / without for value, without in zip(of(share, figure), of(0, figure), strict=True)]
        return f"{statistics.median(paired):.3f} ({min(paired):.3f} to {max(paired):.3f})"

    told = " and ".join(f"{ratios(shares[1], figure)} {where}" for figure, where in kinds.items())
    lines = [
        section(
            "What replay keeps",
            "replay.py",
            f"a share of {shares[1]:g} multiplies the perplexity by {told}, n = {len(of(0, 'steps'))}",
            stored["environment"],
            "python benchmarks/replay.py --imdb FOLDER --wikitext FOLDER --model_name_or_path CHECKPOINT",
        ),
        "| share | steps | perplexity out of the domain | to that of share 0 | in the domain | to that of share 0 |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| before | 0 | {before['out_of_domain_perplexity']:.1f} | | {before['perplexity']:.1f} | |",
    ]
    for share in shares:
        cells = [f"{statistics.median(of(share, figure)):.1f} | {ratios(share, figure)}" for figure in kinds]
        lines.append(f"| {share:g} | {of(share, 'steps')[0]:,} | {' | '.join(cells)} |")
    about = f"{_sentence(stored['what'])}, {stored['model']}; medians over seeds, with the range of the paired ratios."
    return "\n".join([*lines, f"\n{about}\n"])


def outlook() -> str:
    """What prepare.py had said of runs, and what came of them."""
    stored = _stored("outlook")
    gains = [row["gain"] for row in stored["runs"]]
    lines = [
        section(
            "What can be known before a run",
            "outlook.py",
            f"perplexity before / after an epoch from {min(gains):.2f} to {max(gains):.2f}",
            stored["environment"],
            "python benchmarks/outlook.py --data FOLDER",
        ),
        "| text | base | tokens a parameter | pieces a word | unknown | perplexity before | out-of-domain | gain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in stored["runs"]:
        low, high = row["gain_interval"]
        other = f"{row['out_of_domain_perplexity']:.1f}" if row["out_of_domain_perplexity"] else ""
        lines.append(
            f"| {row['what']} | {row['model']} | {row['tokens_a_parameter']:.3g} | {row['pieces_a_word']:.2f} "
            f"| {row['unknown_token_share']:.2%} | {row['perplexity']:.1f} | {other} "
            f"| {row['gain']:.3f} ({low:.3f} to {high:.3f}) |"
        )
    return "\n".join(lines) + "\n"


def _points(figures: dict[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{100 * figures['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def checkpoints() -> str:
    """How long the loop is blocked by one, and what all of them cost."""
    stored = _stored("checkpoints")
    ratio, ratios = stored["training_time_ratio"], stored["training_time_ratios"]
    result = f"training takes {ratio:.2f} of its time without ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    head = section(
        "What a checkpoint costs",
        "checkpoints.py",
        f"{result}, n = {stored['n']}",
        stored["environment"],
        "python benchmarks/checkpoints.py",
    )
    return (
        f"{head}\nWith {stored['what']} (a step takes {stored['step_seconds']:.2f} s), the loop is blocked "
        f"for {stored['blocked_seconds']:.2f} s each time; a bare copy in memory takes "
        f"{stored['copy_seconds']:.2f} s. The rest goes to the thread that hashes and writes, which takes a "
        "core.\n"
    )


def corpus_size() -> str:
    """What a corpus a thousand times as large costs a process, and what an epoch's order costs."""
    stored = _stored("corpus_size")
    limit, measured, names = stored["at_most"], stored["medians"], stored["measured"]
    ratios = {layout: {name: large[name] / small[name] for name in names if name != "map_cpu_ms"}
              for layout, (small, large) in ((layout, by.values()) for layout, by in measured.items())}  # fmt: skip
    worst = max(ratio for by_name in ratios.values() for ratio in by_name.values())
    sums = ([size["load_cpu_ms"] + size["map_cpu_ms"] for size in by.values()] for by in measured.values())
    mapped = "; ".join(f"{large / small:.2f} {layout}" for (small, large), layout in zip(sums, measured, strict=True))
    small, large = next(iter(measured.values()))
    lines = [
        section(
            "What the size of the corpus costs",
            "corpus_size.py",
            f"{large} tokens against {small}: at most {worst:.2f} times the cost; a step's batch alone, with the "
            f"mapping of its pages, {mapped}; n = {stored['n']}",
            stored["environment"],
            "python benchmarks/corpus_size.py",
        ),
        f"| rows | | {small} | {large} | ratio, target ≤ {limit} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for layout, by_size in measured.items():
        for name, words in names.items():
            cells = " | ".join(_figure(by_size[size][name]) for size in (small, large))
            ratio = ratios[layout].get(name)
            shown = "" if ratio is None else f"{ratio:.2f}" if ratio <= limit else f"**{ratio:.2f}**"
            lines.append(f"| {layout} | {words} | {cells} | {shown} |")
    lines += ["", "| chunks | order of an epoch | seconds | peak memory |", "| --- | --- | --- | --- |"]
    for row in stored["order"]:
        for name, cost in row.items():
            if name != "chunks":
                memory = f"{cost['bytes'] / 2**20:,.1f} MiB"
                lines.append(f"| {row['chunks']:,} | {name} | {_figure(cost['seconds'])} | {memory} |")
    return "\n".join(lines) + "\n"


def speedrun() -> str:
    """What recipes reach on frozen data, against the default seed by seed, and which of them set a record."""
    stored = _stored("speedrun")
    runs = stored["runs"]
    tracks = sorted({(run["domain"], run["passes"]) for run in runs}, key=lambda track: (track[1], track[0]))
    best = [text for domain, passes in tracks if (text := _best(runs, domain, passes))]
    command = "python benchmarks/speedrun/run.py --data FOLDER RECIPE…"
    result = "; ".join(best) or "no recipe has seeds enough yet"
    lines = [section("Recipes", "speedrun/run.py", result, stored["environment"], command)]
    for domain, passes in tracks:
        lines += [*_recipes(runs, domain, passes), ""]
    for track in sorted({(row["domain"], row["processor"]) for row in stored["times"]}):
        own = [row for row in stored["times"] if (row["domain"], row["processor"]) == track]
        lines += [*_times(own, ", ".join(track)), ""]
    log = "[the log of experiments](speedrun/LOG.md)"
    lines.append(
        "Differences are means over the seeds that both have: rows of one and of five do not rank together.\n"
        f"Runs are of several commits and processors, as each says in `results/speedrun.json`; {log}.\n"
    )
    return "\n".join(lines)


def _best(runs: list[dict[str, Any]], domain: str, passes: float) -> str:
    """The test loss of the recipe of the lowest dev loss, of those with seeds enough, against the default's: chosen by
    its test loss, the best of many would look better than it is."""
    losses, dev = (records.losses(runs, domain, passes, figure) for figure in ("loss", "dev_loss"))
    means = {recipe: statistics.mean(own.values()) for recipe, own in losses.items() if len(own) == len(records.SEEDS)}
    if records.FIRST not in means:
        return ""
    name = min(means, key=lambda recipe: statistics.mean(dev[recipe].values()))
    return f"{domain}, {_passes(passes)}: {means[name]:.3f} by {name}, {means[records.FIRST]:.3f} by {records.FIRST}"


def _passes(passes: float) -> str:
    return f"{passes:g} pass{'' if passes == 1 else 'es'}"


def _times(times: list[dict[str, Any]], track: str) -> list[str]:
    """The time track of a domain on a processor: each side's seconds, with the ratios to those of others in the same
    round, and how far above the loss of the one that sets the target it has ended at most."""
    sides: dict[str, dict[int, dict[str, Any]]] = {}
    for row in times:
        sides.setdefault(row["recipe"], {})[row["seed"]] = row
    others = {"the peer's": sides.get("run_mlm_no_trainer", {}), "default's": sides.get("default_to_target", {})}
    target = others["the peer's"]
    lines = [
        f"| time to target, {track} | n | steps | seconds | of {' | of '.join(others)} | loss, from the peer's |",
        f"|{' --- |' * 7}",
    ]
    for name, rounds in sides.items():
        seconds = statistics.median(row["seconds"] for row in rounds.values())
        ratios = " | ".join(_ratios(rounds, other) for other in others.values())
        above = [row["loss"] - target[seed]["loss"] for seed, row in rounds.items() if seed in target]
        reached = f"{max(above):+.4f} at most, n = {len(above)}" if above else ""
        steps = next(iter(rounds.values()))["settings"].get("max_train_steps", "a pass")
        lines.append(f"| {name} | {len(rounds)} | {steps} | {seconds:.1f} | {ratios} | {reached} |")
    return lines


def _ratios(mine: dict[int, dict[str, Any]], its: dict[int, dict[str, Any]]) -> str:
    """The median ratio of the seconds of rounds that both have, its range, and their number."""
    ratios = [row["seconds"] / its[seed]["seconds"] for seed, row in mine.items() if seed in its]
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)})"


def _recipes(runs: list[dict[str, Any]], domain: str, passes: float) -> list[str]:
    """The table of a domain and a number of passes, in the order by which recipes are chosen: by the dev loss
    minus the default's under the same seeds. Differences are means over the seeds that both have."""
    figures = "loss", "dev_loss", "accuracy"
    losses, dev, accuracies = (records.losses(runs, domain, passes, figure) for figure in figures)
    default, dev_default, probe = (of.get(records.FIRST, {}) for of in (losses, dev, accuracies))
    first = {r.recipe: r for r in records.records(runs, domain, passes)}

    def minus(own: dict[int, float], its: dict[int, float]) -> float:
        return statistics.mean([own[seed] - its[seed] for seed in records.shared(own, its)] or [math.inf])

    names = ("dev loss minus the default's (n)", "test loss", "n", "lowest to highest", "minus the default's", "p")
    probed = "probe accuracy (points minus the default's ± standard error)"
    head = (f"{domain}, {_passes(passes)}", *names, "record", probed)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for recipe in sorted(dev, key=lambda recipe: minus(dev[recipe], dev_default)):
        own, record, other = losses[recipe], first.get(recipe), recipe != records.FIRST
        compared = records.shared(own, default) if other else []
        chosen_by = records.shared(dev[recipe], dev_default) if other else []
        cells = [
            recipe,
            f"{minus(dev[recipe], dev_default):+.4f} ({len(chosen_by)})" if chosen_by else "",
            f"{statistics.mean(own.values()):.4f}" if own else "",
            len(own) or "",
            f"{min(own.values()):.4f} to {max(own.values()):.4f}" if len(own) > 1 else "",
            f"{minus(own, default):+.4f}" if compared else "",
            f"{records.p_value(own, default):.2g}" if len(compared) > 1 else "",
            f"from {record.before}, p = {record.p:.2g}" if record else "",
            _accuracy(accuracies[recipe], probe),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _accuracy(own: dict[int, float], default: dict[int, float]) -> str:
    """A probe's mean over the seeds, and the mean paired difference to the default's with its standard error."""
    if not own or not (seeds := records.shared(own, default)):
        return ""
    points = [100 * (own[seed] - default[seed]) for seed in seeds]
    mean = f"{statistics.mean(own.values()):.1%}"
    if own is default or len(points) < 2:
        return mean
    return f"{mean} ({statistics.mean(points):+.2f} ± {statistics.stdev(points) / len(points) ** 0.5:.2f})"


def faults() -> str:
    """The faults that the tests have tried, how often, and how they ended."""
    stored = _stored("faults")
    cases = sum(tried["cases"] for tried in stored["faults"].values())
    result = f"{len(stored['faults'])} kinds of faults, {cases} cases, each with the outcome that it should have"
    lines = [
        section("Faults", None, result, stored["environment"], FAULTS_COMMAND),
        "Workload: toy runs in real processes, which are killed or signalled, run out of memory or disk, or meet a "
        "system call that fails. The suite leaves out the tests marked `torture`, which `-m torture` runs.\n",
        '| fault | cases | outcome | `./scripts/test.sh -m "" -k …` |',
        "| --- | --- | --- | --- |",
    ]
    for fault, tried in stored["faults"].items():
        lines.append(f"| {fault} | {tried['cases']} | {tried['outcome']} | `{tried['test']}` |")
    return "\n".join(lines) + "\n"


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


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _headline(rows: list[dict[str, Any]]) -> str:
    """How many targets are met, and the first comparison that has one."""
    aimed = [row for row in rows if _target(row)]
    missed = sum(_target(row).startswith("**") for row in aimed)
    row = aimed[0]
    return (
        f"{len(aimed) - missed} of {len(aimed)} targets met; {row['workload']}: {_median(row)}{_spread(row)} "
        f"against {row['against']}, n = {row['n']}"
    )


def _spread(row: dict[str, Any]) -> str:
    return f" ({_figure(row['low'])} to {_figure(row['high'])})" if row["n"] > 1 else ""


def _median(row: dict[str, Any]) -> str:
    return f"{_figure(row['median'])}{'' if row['unit'] == '×' else ' '}{row['unit']}"


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
    commit = where["commit"] or "unknown"
    return (
        f"{where['cores']} cores of {where['processor']}, "
        f"{', '.join(f'{name} {where[name]}' for name in LIBRARIES)}, "
        f"commit {commit[:12]}{'+' if commit.endswith('+') else ''}"
    )


if __name__ == "__main__":
    cli.run(main)
