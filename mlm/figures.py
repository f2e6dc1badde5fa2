"""Numbers and decoded text as JSON and people take them."""

import math
import re
from collections.abc import Iterator
from typing import Any

# Chinese and Japanese, without Hangul: blanks between their letters come from a decoder, not from the text.
UNSPACED = "[\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
GAPS = re.compile(rf"(?<={UNSPACED}) +(?={UNSPACED}|\[MASK\])|(?<=\[MASK\]) +(?={UNSPACED})")


def mean(total: float, count: int) -> float:
    """NaN of nothing."""
    return total / count if count else math.nan


def exp_or_inf(nats: float) -> float:
    """exp(nats), infinite from 700 on: at 709.8 float64 ends, and math.exp raises."""
    return math.inf if nats >= 700 else math.exp(nats)


def figure(value: float | None) -> str:
    """A figure in a sentence, to four digits; "undefined" where JSON has None: nothing was masked, or it diverged."""
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "undefined"


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


def unspaced(text: str) -> str:
    """Decoded Chinese and Japanese without the blanks that a decoder puts between tokens."""
    return GAPS.sub("", text)
