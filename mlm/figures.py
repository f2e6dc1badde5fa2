"""Numbers as JSON and people take them."""

import math
from collections.abc import Iterator
from typing import Any


def mean(total: float, count: int) -> float:
    """NaN of nothing."""
    return total / count if count else math.nan


def exp_or_inf(nats: float) -> float:
    """exp(nats), infinite from 700 on: at 709.8 float64 ends, and math.exp raises."""
    return math.inf if nats >= 700 else math.exp(nats)


def figure(value: float | None) -> str:
    """A figure in a sentence, to four digits; "undefined" for None and NaN: nothing was masked, or it diverged."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.4g}"


def finite(values: Any) -> Any:
    """`values`, nested as JSON is, with None for NaN and infinity, which JSON does not have."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"train": {"seed": 1}} -> ("train.seed", 1)"""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
