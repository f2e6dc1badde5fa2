"""What runs did, as one HTML file that opens without a network: from their directories alone.

All text of a run is escaped: jinja2 does it on the page, `_label` in the charts. Every figure of
all_results.json stands in a <data value="…" data-run="…" data-key="…">, whose value is the JSON number.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from mlm.errors import UserError, one_line
from mlm.report.model_card import short

SERIES = 6  # colours of the page; of more runs than that, the next ones are dashed
SHOWN = 15  # words of a table before the rest is folded away
HEIGHT = 320  # of a chart, in pixels
Rows = list[dict[str, Any]]

# What has to be in a file for a run to be shown, and in a line of metrics.jsonl for a point of a curve.
ABOUT = ("configuration", "experiment", "environment")
PARTS = ("gain", "bootstrap", "masks", "breakdowns", "tokens")
EVENTS = {"train": ("loss", "learning_rate"), "eval": ("eval_loss",)}
EXAMPLE = ("text", "truth", "before", "after")

# What figures depend on beside the model: key of run.json's experiment, and its name for people.
MEASURED = {
    "eval_mask_seed": "mask seeds",
    "eval_mask_seeds": "numbers of mask seeds",
    "eval_mask_folds": "mask folds",
    "max_eval_samples": "numbers of chunks",
    "max_seq_length": "chunk lengths",
}


@dataclass(frozen=True)
class Record:
    """What is in a run directory. A run that has not ended has no results and no comparison."""

    folder: Path
    name: str
    number: int  # its place on the page, and so its colour
    about: dict[str, Any]  # run.json
    results: dict[str, Any]  # all_results.json
    comparison: dict[str, Any]  # comparison.json
    train: Rows  # events of metrics.jsonl
    evaluations: Rows
    examples: Rows | None  # fill_mask.json; None: there are none of these results


def write_report(runs: Sequence[Record], output: Path) -> None:
    """Writes the page, whole or not at all. Raises UserError where `output` cannot be written."""
    page = render(runs)
    partial = output.with_name(f"{output.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None


def read_runs(folders: Sequence[Path]) -> list[Record]:
    """Run directories, named so that they can be told apart.

    Raises UserError where one holds no run, a file of it is damaged, or it is named twice.
    """
    return [
        _read(folder, name, i) for i, (folder, name) in enumerate(zip(folders, _names(folders), strict=True))
    ]


def results_digest(folder: Path) -> str | None:
    """A fingerprint of a run's results, times included; None where there are none."""
    path = folder / "all_results.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _read(folder: Path, name: str, number: int) -> Record:
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} holds no run.json; name the --output_dir of a training run")
    found = {n: _json(folder / f"{n}.json") for n in ("run", "all_results", "comparison", "fill_mask")}
    _needs(folder / "run.json", found["run"], ABOUT)
    for section in ABOUT:
        _needs(folder / "run.json", found["run"][section], ())
    for part in ("model", "corpus"):
        _needs(folder / "run.json", found["run"]["configuration"].get(part), ())
    for compared in filter(None, found["comparison"].values()):
        _needs(folder / "comparison.json", compared, ("text", "words", *PARTS))
        for part in PARTS:
            _needs(folder / "comparison.json", compared[part], ())
    events, kept = _events(folder / "metrics.jsonl"), found["fill_mask"]
    current = kept.get("results") == results_digest(folder)
    return Record(
        folder=folder,
        name=name,
        number=number,
        about=found["run"],
        results={n: v for n, v in found["all_results"].items() if v is None or isinstance(v, int | float)},
        comparison=found["comparison"],
        train=events["train"],
        evaluations=events["eval"],
        examples=[e for e in kept.get("sentences", []) if _has(e, EXAMPLE)] if kept and current else None,
    )


def _events(path: Path) -> dict[str, Rows]:
    """The lines of metrics.jsonl for each of EVENTS, without those that are whole no more, or not yet."""
    found: dict[str, Rows] = {event: [] for event in EVENTS}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # the line that a running, or killed, run was writing
            continue
        for kind, fields in EVENTS.items():
            if _has(event, ("event", *fields)) and event["event"] == kind:
                found[kind].append(event)
    return found


def _has(value: Any, names: Sequence[str]) -> bool:
    return isinstance(value, dict) and value.keys() >= set(names)


def _needs(path: Path, value: Any, names: Sequence[str]) -> None:
    if not _has(value, names):
        lacks = ", ".join(name for name in names if not (isinstance(value, dict) and name in value))
        reason = f": it lacks {lacks}" if lacks else ""
        raise UserError(f"{path} is damaged, or of another version or program{reason}")


def render(runs: Sequence[Record]) -> str:
    """The page."""
    rooms = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rooms.filters |= {"figure": figure, "count": count, "chance": chance, "short": short, "counted": counted}
    rooms.globals |= {"figure": figure, "share": share, "zip": zip}
    held_out = [(run, run.comparison["held_out"]) for run in runs if run.comparison.get("held_out")]
    return rooms.get_template("report.html").render(
        runs=runs,
        held_out=held_out,
        out_of_domain=[
            (run, run.comparison["general"]) for run, _ in held_out if run.comparison.get("general")
        ],
        measures=_measures(runs, ""),
        general_measures=_measures(runs, "general_"),
        costs=_costs(runs),
        differences=_differing(_settings(runs, ABOUT)) if len(runs) > 1 else {},
        settings={section: _settings(runs, (section,)) for section in ABOUT},
        first_pass_only=any(map(_several_passes, runs)),
        unlike=unlike(runs, "held_out"),
        general_unlike=unlike(runs, "general"),
        gain_chart=_chart(gain_figure(held_out)) if len(held_out) > 1 else None,
        loss_chart=_chart(loss_figure(runs)),
        rate_chart=_chart(rate_figure(runs)),
        breakdown_charts={
            kind: _chart(breakdown_figure(held_out, kind, title))
            for kind, title in (
                ("frequency", "tenth of the training corpus"),
                ("position", "where in the chunk"),
                ("word", ""),
            )
            if any(kind in compared["breakdowns"] for _, compared in held_out)
        },
        shown=SHOWN,
        plotly=get_plotlyjs(),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("a run is named twice")
    names = [path.name for path in paths]
    common = os.path.commonpath(paths)
    return names if len(set(names)) == len(names) else [os.path.relpath(path, common) for path in paths]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return value


def unlike(runs: Sequence[Record], text: str) -> str:
    """Why figures of these runs on "held_out" or "general" text do not compare: one sentence, or nothing."""
    differ = {
        key
        for key in (f"{text} corpus", "tokenizer", "masks", *MEASURED)
        if len({json.dumps(run.about["experiment"][key]) for run in runs if key in run.about["experiment"]})
        > 1
    }
    # The fingerprint of the masks is of the tokenizer's vocabulary too.
    names = {f"{text} corpus": "texts", "tokenizer": "tokenizers", **MEASURED}
    if "tokenizer" not in differ:
        names["masks"] = "ways of masking"
    what = [name for key, name in names.items() if key in differ]
    if not what:
        return ""
    listed = " and ".join(filter(None, (", ".join(what[:-1]), what[-1])))
    if "texts" in what:
        advice = "compare before and after within a run"
    elif "tokenizer" in differ:
        advice = "compare bits per character"
    else:
        advice = "a small difference between runs may come from that alone"
    return f"These runs were measured on different {listed}; {advice}."


def _several_passes(run: Record) -> bool:
    """Whether all_results.json is of more mask passes than the evaluations during the run."""
    experiment = run.about["experiment"]
    passes = (experiment.get("eval_mask_folds") or 1) * (experiment.get("eval_mask_seeds") or 1)
    return passes > 1 and bool(run.evaluations)


# ---- figures for people


def figure(value: float | None, digits: int = 4) -> str:
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
    noun = noun.removesuffix("s")
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def chance(row: dict[str, Any], when: str) -> str:
    """exp(− nats / count): the geometric mean over the occurrences of the probability of what was masked.

    Of a token that is the probability of the right one; of a word in pieces the product over those masked.
    """
    nats = row[f"nats_{when}"]
    return share(0.0 if nats is None else math.exp(-nats / row["count"]))


Measure = tuple[str, str | None, str, Callable[[float | None], str]]


def _measures(runs: Sequence[Record], prefix: str) -> list[Measure]:
    """Rows of a table: label, key of all_results.json before (None: one figure only), key after, format."""
    rows: list[Measure] = [
        ("Perplexity", f"{prefix}perplexity_before", f"{prefix}perplexity", figure),
        ("Loss, nats a masked token", f"{prefix}eval_loss_before", f"{prefix}eval_loss", figure),
        ("Accuracy", f"{prefix}accuracy_before", f"{prefix}accuracy", share),
        ("Bits per character", f"{prefix}bits_per_character_before", f"{prefix}bits_per_character", figure),
        ("Bits per word", f"{prefix}bits_per_word_before", f"{prefix}bits_per_word", figure),
        (
            "Spread over mask seeds, perplexity",
            f"{prefix}perplexity_spread_before",
            f"{prefix}perplexity_spread",
            figure,
        ),
        ("Perplexity of frequencies alone", None, f"{prefix}perplexity_unigram", figure),
        ("Masked tokens", None, f"{prefix}eval_masked_tokens", count),
    ]
    return _present(runs, rows)


def _costs(runs: Sequence[Record]) -> list[Measure]:
    return _present(
        runs,
        [
            ("Training tokens per second", None, "tokens_per_second", count),
            ("Seconds in training steps", None, "train_seconds", figure),
            ("Seconds stood still for checkpoints", None, "checkpoint_seconds", figure),
            ("Peak memory, MiB", None, "peak_memory_mib", count),
            ("Steps", None, "steps", count),
            ("Epochs", None, "epochs", figure),
            ("Steps that fp16's scaler skipped", None, "skipped_steps", count),
            ("Training loss, nats a masked token", None, "train_loss", figure),
        ],
    )


def _present(runs: Sequence[Record], rows: list[Measure]) -> list[Measure]:
    return [row for row in rows if any(run.results.get(row[2]) is not None for run in runs)]


def _settings(runs: Sequence[Record], sections: Sequence[str]) -> dict[str, list[str]]:
    """{setting: its value in each run}, nested ones under dotted names."""
    flat = [
        dict(pair for section in sections for pair in _flat(run.about.get(section, {}), "")) for run in runs
    ]
    return {
        name: [values.get(name, "–") for values in flat] for name in dict.fromkeys(n for f in flat for n in f)
    }


def _flat(nested: dict[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", " ".join(map(str, value))
        else:
            yield f"{prefix}{key}", "–" if value is None else str(value)


def _differing(settings: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: values for name, values in settings.items() if len(set(values)) > 1}


# ---- charts


def loss_figure(runs: Sequence[Record]) -> go.Figure:
    """Loss against tokens seen: of training between two lines of the log, and of each evaluation."""
    chart = _figure("tokens seen", "nats a masked token")
    for run in runs:
        chart.add_scatter(
            x=[event.get("tokens") for event in run.train],
            y=[event["loss"] for event in run.train],
            name=_of(run, "training", runs),
            line={"color": _colour(run.number), "width": 1.2, "dash": "dot"},
            mode="lines" if len(run.train) > 1 else "markers",
        )
        chart.add_scatter(
            x=[event.get("tokens") for event in run.evaluations],
            y=[event["eval_loss"] for event in run.evaluations],
            name=_of(run, "held out", runs),
            line={"color": _colour(run.number), "width": 2, "dash": _dash(run.number)},
            marker={"color": _colour(run.number), "size": 6},
            mode="lines+markers",
        )
    return chart


def rate_figure(runs: Sequence[Record]) -> go.Figure:
    """The learning rate against tokens seen."""
    chart = _figure("tokens seen", "learning rate")
    for run in runs:
        chart.add_scatter(
            x=[event.get("tokens") for event in run.train],
            y=[event["learning_rate"] for event in run.train],
            name=_label(run.name),
            line={"color": _colour(run.number), "width": 2, "dash": _dash(run.number)},
            mode="lines" if len(run.train) > 1 else "markers",
        )
    chart.update_layout(showlegend=len(runs) > 1, yaxis={"rangemode": "tozero", "tickformat": ".1e"})
    return chart


def gain_figure(compared: Sequence[tuple[Record, dict[str, Any]]]) -> go.Figure:
    """The gain of each run with its interval; a line at 1, where nothing is gained."""
    chart = _figure("perplexity before / after", "")
    for run, comparison in compared:
        gain = comparison["gain"]
        low, high = gain["interval"]
        known = None not in (gain["value"], low, high)
        error = {"array": [high - gain["value"]], "arrayminus": [gain["value"] - low]} if known else {}
        chart.add_scatter(
            x=[gain["value"]],
            y=[_label(run.name)],
            error_x={"color": _colour(run.number), "thickness": 2, **error},
            marker={"color": _colour(run.number), "size": 9},
            mode="markers",
            showlegend=False,
        )
    chart.add_vline(x=1, line={"color": "var(--muted)", "width": 1})
    chart.update_layout(
        height=110 + 36 * len(compared),
        yaxis={"autorange": "reversed", "automargin": True, "type": "category"},
    )
    return chart


def breakdown_figure(compared: Sequence[tuple[Record, dict[str, Any]]], kind: str, title: str) -> go.Figure:
    """Of one run the loss before and after by kind of token; of several what each has gained."""
    several = len(compared) > 1
    chart = _figure(title, "nats gained a masked token" if several else "nats a masked token")
    for run, comparison in compared:
        rows = [row for row in comparison["breakdowns"].get(kind, []) if row["count"]]
        names = [
            _label(row["name"].partition(" ")[0] if kind == "frequency" else row["name"]) for row in rows
        ]
        before, after = ([_mean(row, when) for row in rows] for when in ("before", "after"))
        counts = [row["count"] for row in rows]
        if several:
            gained = [None if None in pair else pair[0] - pair[1] for pair in zip(before, after, strict=True)]
            bars = [(_label(run.name), gained, _colour(run.number))]
        else:
            bars = [("before", before, "var(--faint)"), ("after", after, _colour(run.number))]
        for name, values, colour in bars:
            chart.add_bar(
                x=names,
                y=values,
                name=name,
                marker={"color": colour},
                customdata=counts,
                hovertemplate="%{y:.3f} nats, %{customdata:,} masked<extra>%{fullData.name}</extra>",
            )
    chart.update_layout(barmode="group", bargap=0.3, xaxis={"type": "category", "automargin": True})
    return chart


def _mean(row: dict[str, Any], when: str) -> float | None:
    nats = row[f"nats_{when}"]
    return None if nats is None else nats / row["count"]


def _figure(x: str, y: str) -> go.Figure:
    """An empty chart in the page's own colours, which report.html fills in for light and dark."""
    axis = {"gridcolor": "var(--line)", "linecolor": "var(--line)", "zerolinecolor": "var(--line)"}
    small = {"font": {"size": 13}}
    return go.Figure(
        layout={
            "template": "none",
            "height": HEIGHT,
            "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--text)"},
            "hoverlabel": {
                "bgcolor": "var(--page)",
                "font": {"color": "var(--text)"},
                "bordercolor": "var(--line)",
            },
            "xaxis": {"title": {"text": x, **small}, "showgrid": False, **axis, "zeroline": False},
            "yaxis": {"title": {"text": y, **small}, "automargin": True, **axis},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
            "hovermode": "x unified" if x == "tokens seen" else "closest",
            "dragmode": False,
        }
    )


def _chart(chart: go.Figure) -> str:
    """Its JSON, in which plotly writes < so that it cannot end the <script> around it."""
    return chart.to_json()


def _colour(i: int) -> str:
    return f"var(--series-{i % SERIES})"


def _dash(i: int) -> str:
    return ("solid", "dash", "dashdot")[i // SERIES % 3]


def _of(run: Record, what: str, runs: Sequence[Record]) -> str:
    return f"{_label(run.name)}, {what}" if len(runs) > 1 else what


def _label(text: str) -> str:
    """Text for a chart, where plotly would read tags in it."""
    return escape(text, quote=False)
