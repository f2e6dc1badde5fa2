"""The charts of the report, as plotly's JSON in the page's colours; report.html draws them.

All text of a run goes through `_label`, as plotly would read tags in it.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from mlm.report.run_record import RunRecord

SERIES = 6  # colours of the page; of more runs than that, the next ones are dashed
HEIGHT = 320  # of a chart, in pixels
TRAINING = "training (with dropout, under training masks)"  # the loss; a fork's may be no cross entropy
Compared = Sequence[tuple[RunRecord, dict[str, Any]]]  # runs, and "held_out" or "general" of comparison.json


def loss_chart(runs: Sequence[RunRecord]) -> go.Figure:
    """Loss against tokens seen: of training between two lines of the log, and of each evaluation."""
    several = len(runs) > 1
    chart = _chart("tokens seen", "loss")
    for run in runs:
        name = f"{_label(run.name)}, " if several else ""
        training = f"{name}training" if several else TRAINING
        _curve(chart, run, "loss", training, {"width": 1.2, "dash": "dot"}, showlegend=not several)
        chart.add_scatter(
            x=[event.get("tokens") for event in run.evaluations],
            y=[event["eval_loss"] for event in run.evaluations],
            name=f"{name}held out",
            line={"color": _colour(run.number), "width": 2, "dash": _dash(run.number)},
            marker={"color": _colour(run.number), "size": 6},
            mode="lines+markers",
        )
    return chart


def event_chart(runs: Sequence[RunRecord], key: str) -> go.Figure:
    """A number of the "train" events of metrics.jsonl against tokens seen."""
    chart = _chart("tokens seen", _label(key.replace("_", " ")))
    for run in runs:
        if any(key in event for event in run.train):
            _curve(chart, run, key, _label(run.name), {"width": 2, "dash": _dash(run.number)})
    chart.update_layout(showlegend=len(runs) > 1)
    if key == "learning_rate":
        chart.update_layout(yaxis={"rangemode": "tozero", "tickformat": ".1e"})
    return chart


def gain_chart(compared: Compared) -> go.Figure:
    """The gain of each run with its interval; a line at 1, where nothing is gained."""
    chart = _chart("perplexity before / after", "")
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
        height=110 + 36 * len(compared), yaxis={"autorange": "reversed", "automargin": True, "type": "category"}
    )
    return chart


def breakdown_chart(compared: Compared, kind: str, title: str) -> go.Figure:
    """The loss of one run before and after by kind of token, or what each of several runs has gained."""
    several = len(compared) > 1
    chart = _chart(title, "nats gained a masked token" if several else "nats a masked token")
    for run, comparison in compared:
        rows = [row for row in comparison["breakdowns"].get(kind, []) if row["count"]]
        names = [_label(row["name"].partition(" ")[0] if kind == "frequency" else row["name"]) for row in rows]
        before, after = ([mean(row, when) for row in rows] for when in ("before", "after"))
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
                customdata=[row["count"] for row in rows],
                hovertemplate="%{y:.3f} nats, %{customdata:,} masked<extra>%{fullData.name}</extra>",
            )
    chart.update_layout(barmode="group", bargap=0.3, xaxis={"type": "category", "automargin": True})
    return chart


def mean(row: dict[str, Any], when: str) -> float | None:
    """Nats a masked token of a row of comparison.json, "before" or "after"; None where they are infinite."""
    nats = row[f"nats_{when}"]
    return None if nats is None else nats / row["count"]


def _curve(
    chart: go.Figure, run: RunRecord, key: str, name: str, line: dict[str, Any], showlegend: bool = True
) -> None:
    chart.add_scatter(
        x=[event.get("tokens") for event in run.train],
        y=[event.get(key) for event in run.train],
        name=name,
        line={"color": _colour(run.number), **line},
        mode="lines" if len(run.train) > 1 else "markers",
        showlegend=showlegend,
    )


def _chart(x: str, y: str) -> go.Figure:
    """An empty chart in the page's own colours, which report.html fills in for light and dark."""
    axis = {"gridcolor": "var(--line)", "linecolor": "var(--line)", "zerolinecolor": "var(--line)"}
    small = {"font": {"size": 13}}
    hover = {"bgcolor": "var(--page)", "font": {"color": "var(--text)"}, "bordercolor": "var(--line)"}
    return go.Figure(
        layout={
            "template": "none",
            "height": HEIGHT,
            "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--text)"},
            "hoverlabel": hover,
            "xaxis": {"title": {"text": x, **small}, "showgrid": False, **axis, "zeroline": False},
            "yaxis": {"title": {"text": y, **small}, "automargin": True, **axis},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
            "hovermode": "x unified" if x == "tokens seen" else "closest",
            "dragmode": False,
        }
    )


def _colour(i: int) -> str:
    return f"var(--series-{i % SERIES})"


def _dash(i: int) -> str:
    return ("solid", "dash", "dashdot")[i // SERIES % 3]


def _label(text: str) -> str:
    return escape(text, quote=False)
