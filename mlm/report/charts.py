"""The charts of the report, as plotly's JSON; report.html draws them, in the page's fonts and colours."""

from collections.abc import Sequence
from functools import partial
from html import escape
from typing import Any

import plotly.graph_objects as go

from mlm.report.run_record import Rows, RunRecord

SERIES = 6  # colours of the page; of more runs than that, the next ones are dashed
HEIGHT = 320  # of a chart, in pixels
TRAINING = "training (in training mode, under training masks)"  # the loss; a fork's may be no cross entropy
Compared = Sequence[tuple[RunRecord, dict[str, Any]]]  # runs, and "held_out" or "out_of_domain" of comparison.json
_label = partial(escape, quote=False)  # for all text of a run: plotly would read tags in it


def loss_chart(runs: Sequence[RunRecord]) -> go.Figure:
    """Loss against tokens seen: of training between two lines of the log, and of each evaluation."""
    several = len(runs) > 1
    chart = _chart("tokens seen", "loss")
    for run in runs:
        name = f"{_label(run.name)}, " if several else ""
        training = f"{name}training" if several else TRAINING
        _curve(chart, run, run.train, "loss", dotted=True, name=training, showlegend=not several)
        _curve(chart, run, run.evaluations, "eval_loss", name=f"{name}held out", mode="lines+markers")
    return chart


def event_chart(runs: Sequence[RunRecord], key: str) -> go.Figure:
    """A number of the "train" events of metrics.jsonl against tokens seen."""
    chart = _chart("tokens seen", _label(key.replace("_", " ")))
    for run in runs:
        if any(key in event for event in run.train):
            _curve(chart, run, run.train, key, name=_label(run.name))
    chart.update_layout(showlegend=len(runs) > 1)
    if key == "learning_rate":
        chart.update_layout(yaxis={"rangemode": "tozero", "tickformat": ".1e"})
    return chart


def task_chart(compared: Compared) -> go.Figure:
    """The accuracy of probes before and after over the labels a class; the bars are the interval of the difference."""
    chart = _chart("labels a class, at most", "accuracy")
    for run, task in ((run, task) for run, task in compared if "curve" in task):
        curve = {row["k"]: row["accuracy"] for row in task["curve"] if row["classifier"] == "logistic regression"}
        ks, name, own = [*curve], _label(run.name), curve.values()
        up, down = ([abs(each["interval"][end] - each["difference"]) for each in own] for end in (1, 0))
        for when, bars in (("before", {}), ("after", {"array": up, "arrayminus": down})):
            line = {"color": _colour(run), "dash": "solid" if bars else "dot"}
            accuracy = [each[when] for each in own]
            chart.add_scatter(x=ks, y=accuracy, name=f"{name}, {when}", line=line, error_y=bars)
    chart.update_traces(mode="lines+markers")
    ticks = sorted({k for drawn in chart.data for k in drawn.x})
    chart.update_layout(xaxis={"type": "log", "tickvals": ticks}, yaxis={"tickformat": ".0%"})
    return chart


def breakdown_chart(compared: Compared, kind: str, title: str) -> go.Figure:
    """The loss of one run before and after by kind of token, or what each of several runs has gained."""
    several = len(compared) > 1
    chart = _chart(title, "nats gained a masked token" if several else "nats a masked token")
    for run, comparison in compared:
        rows = [row for row in comparison["breakdowns"].get(kind, []) if row["count"]]
        names = [_label(row["name"].partition(" ")[0] if kind == "frequency" else row["name"]) for row in rows]
        counts = [row["count"] for row in rows]
        before, after = ([mean(row, when) for row in rows] for when in ("before", "after"))
        if several:
            gained = [None if None in pair else pair[0] - pair[1] for pair in zip(before, after, strict=True)]
            bars = [(_label(run.name), gained, _colour(run))]
        else:
            bars = [("before", before, "var(--faint)"), ("after", after, _colour(run))]
        for name, values, colour in bars:
            chart.add_bar(x=names, y=values, name=name, marker={"color": colour}, customdata=counts)
    chart.update_traces(hovertemplate="%{y:.3f} nats, %{customdata:,} masked<extra>%{fullData.name}</extra>")
    chart.update_layout(barmode="group", bargap=0.3, xaxis={"type": "category", "automargin": True})
    return chart


def mean(row: dict[str, Any], when: str) -> float | None:
    """Nats a masked token of a row of comparison.json, "before" or "after"; None where they are infinite."""
    nats = row[f"nats_{when}"]
    return None if nats is None else nats / row["count"]


def _curve(chart: go.Figure, run: RunRecord, events: Rows, key: str, dotted: bool = False, **settings: Any) -> None:
    """Draws a number of some events of a run against tokens seen."""
    dash = "dot" if dotted else ("solid", "dash", "dashdot")[run.number // SERIES % 3]
    chart.add_scatter(
        x=[event.get("tokens") for event in events],
        y=[event.get(key) for event in events],
        line={"color": _colour(run), "width": 1.2 if dotted else 2, "dash": dash},
        **{"mode": "lines" if len(events) > 1 else "markers", **settings},
    )


def _chart(x: str, y: str) -> go.Figure:
    """An empty chart with titles for its axes."""
    hover = "x unified" if x == "tokens seen" else "closest"
    return go.Figure(
        layout={"template": "none", "height": HEIGHT, "xaxis_title_text": x, "yaxis_title_text": y, "hovermode": hover}
    )


def _colour(run: RunRecord) -> str:
    return f"var(--series-{run.number % SERIES})"
