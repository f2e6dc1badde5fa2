"""What runs did, as one HTML file that opens without a network, made from their directories alone.

jinja2 escapes all text of a run on the page. Every figure of all_results.json stands in a
<data value="…" data-run="…" data-key="…">, whose value is the JSON number."""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from mlm.errors import UserError
from mlm.figures import flat, unspaced
from mlm.files import write_text
from mlm.report.charts import Compared, breakdown_chart, event_chart, loss_chart, mean, task_chart
from mlm.report.model_card import short
from mlm.report.run_record import ABOUT, RunRecord, files_of

LOGGED = {"event", "step", "seconds", "tokens", "loss", "learning_rate", "mask_rate", "tokens_per_second"}

# What figures depend on beside the model: key of run.json's experiment, and its name for people.
MEASURED = {
    "tokenizer": "tokenizers",
    "eval_mlm_probability": "shares of masked tokens",
    "eval_whole_word_mask": "masked units (tokens or whole words)",
    "eval_mask_seed": "mask seeds",
    "eval_mask_seeds": "numbers of mask seeds",
    "eval_mask_folds": "mask folds",
    "max_eval_samples": "numbers of chunks",
    "max_seq_length": "chunk lengths",
}


def write_report(runs: Sequence[RunRecord], output: Path) -> None:
    """Writes the page, whole or not at all. Raises UserError where it cannot be made of the runs, or written."""
    with files_of(*(run.folder for run in runs)):
        page = render(runs)
    try:
        write_text(output, page)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None


def render(runs: Sequence[RunRecord]) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    charts = (breakdown_chart, event_chart, loss_chart, task_chart)
    forms = (aligned, count, chance, short, counted, unspaced, grouped, share, duration)
    functions = {f.__name__: f for f in (*charts, *forms, same, mean, unlike, largest_change, zip)}
    page.filters |= functions | {"shlex_join": shlex.join}
    page.globals |= functions
    texts = ("held_out", "out_of_domain", "task")
    compared = {text: [(run, run.comparison[text]) for run in runs if run.comparison.get(text)] for text in texts}
    logged = {key for run in runs for e in run.train for key in e if type(e[key]) in (int, float)}
    parts = {**compared, **_settings(runs), "scalars": sorted(logged - LOGGED), "examples": _examples(runs)}
    return page.get_template("report.html").render(runs=runs, plotly=get_plotlyjs(), **parts)


def unlike(runs: Sequence[RunRecord], text: str) -> str:
    """Why figures of these runs on "held_out" or "out_of_domain" text do not compare: one sentence, or nothing."""
    experiments = [run.about["experiment"] for run in runs]
    names = {f"{text} corpus": "texts", **MEASURED}
    differ = [key for key in names if len({json.dumps(e[key]) for e in experiments if key in e}) > 1]
    if not differ:
        return ""
    *others, last = [names[key] for key in differ]
    listed = f"{', '.join(others)} and {last}" if others else last
    advice = "a small difference between runs may come from that alone"
    if f"{text} corpus" in differ:
        advice = "compare before and after within a run"
    elif "tokenizer" in differ:
        advice = "compare bits per character"
    return f"These runs were measured on different {listed}; {advice}."


def aligned(value: float | None, digits: int = 4) -> str:
    """`value` to so many significant digits, trailing zeros kept, so that columns align; – for none."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}e}"
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(places, 0)}f}"


def share(value: float | None) -> str:
    """A share or a probability in percent, small ones to one digit."""
    if value is None:
        return "–"
    percent = 100 * value
    return f"{percent:.1f}%" if percent >= 0.1 or not percent else f"{max(percent, 0.001):.1g}%"


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def counted(number: int, noun: str) -> str:
    """1 document, 2 documents; the noun in either."""
    return f"{number:,} {noun.removesuffix('s')}{'' if number == 1 else 's'}"


def chance(row: dict[str, Any], when: str) -> str:
    """exp(− nats / count): the geometric mean over the occurrences of the probability of what was masked."""
    nats = mean(row, when)
    return share(0.0 if nats is None else math.exp(-nats))


def duration(seconds: float | None) -> str:
    """2:05:00 for two hours and five minutes, as in a run's log."""
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))


def same(runs: Sequence[RunRecord], key: str, form: Callable[[float | None], str]) -> bool:
    """Whether a figure of all_results.json reads the same in all runs."""
    return len({form(run.results.get(key)) for run in runs}) == 1


def grouped(items: Iterable[Any], describe: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """Each text that a macro of the page writes about the items, and the items that it holds for."""
    groups: dict[str, tuple[Any, list[Any]]] = {}
    for item in items:
        text = describe(item)
        groups.setdefault(text.striptags(), (text, []))[1].append(item)
    return list(groups.values())


def _settings(runs: Sequence[RunRecord]) -> dict[str, dict[str, Any]]:
    """Settings under dotted names: those that differ with a value for each run, the others by section."""
    differences, alike = {}, {}
    for section in ABOUT:
        settings = [dict(flat(run.about[section])) for run in runs]
        values = {name: [of_run.get(name) for of_run in settings] for name in chain.from_iterable(settings)}
        alike[section] = {name: each[0] for name, each in values.items() if each.count(each[0]) == len(each)}
        differences |= {name: each for name, each in values.items() if name not in alike[section]}
    # The experiment repeats flags, and each run has a folder of its own.
    for name in {*(name.rpartition(".")[2] for name in differences if "." in name), "run.output_dir"}:
        differences.pop(name, None)
    return {"differences": differences, "settings": alike}


def _examples(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Each sentence once: [{"text", "truth", "columns": [(heading, [mask][rank] of fillers)]}]."""
    sentences: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for run in runs:
        for example in run.examples or ():
            columns = sentences.setdefault((example["text"], example["truth"]), [])
            if all(fillers != example["before"] for _, fillers in columns):
                columns.append((f"before {run.name}" if columns else "before", example["before"]))
            columns.append((run.name if len(runs) > 1 else "after", example["after"]))
    return [{"text": text, "truth": truth, "columns": c} for (text, truth), c in sentences.items()]


def largest_change(compared: Compared) -> float:
    """Nats of the word or token that changed most in any run, which the bars of all words are drawn to."""
    lists = [c[kind] for _, c in compared for kind in ("words", "tokens") if c[kind]]
    rows = [row for both in lists for row in (*both["gained"], *both["lost"])]
    return max((abs((row["nats_before"] or 0) - (row["nats_after"] or 0)) for row in rows), default=0)
