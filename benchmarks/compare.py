"""How two implementations are timed against each other, and what a row of results holds."""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture


class Case(NamedTuple):
    """Whom ours is compared with, and how often."""

    against: str
    # again: ours once more, which shows the noise; ceiling: what cannot be beaten, since it does less
    kind: Literal["again", "peer", "ceiling"]
    rounds: int
    at_least: float | None = None  # the target for the median of the ratios


def cases(*each: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", each, ids=[case.against for case in each])


def compare(
    benchmark: BenchmarkFixture,
    results: list[dict[str, Any]],
    case: Case,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    tokens: int,
    size: int,
) -> np.ndarray | None:
    """Times both in turn, ours first, `case.rounds` times, in this process; adds a row to `results`.

    A round's ratio is their seconds over ours, so that above 1 ours is faster, and what else the machine
    does falls on both. The benchmark's own statistics are those of `theirs`.

    tokens: that one call of either handles; size: bytes, likewise

    Returns the seconds of ours [rounds], or None where benchmarks are disabled and each ran once, untimed.
    """
    seconds: list[float] = []

    def time_ours() -> None:
        began = time.perf_counter()
        ours()
        seconds.append(time.perf_counter() - began)

    benchmark.pedantic(theirs, setup=time_ours, rounds=case.rounds)
    if benchmark.disabled:
        return None
    mine, others = np.array(seconds), np.array(benchmark.stats.stats.data)
    medians = {"ours": np.median(mine), "theirs": np.median(others)}
    measured = row(
        benchmark.group,
        case.against,
        case.kind,
        "×",
        others / mine,
        case.at_least,
        tokens_per_second={who: tokens / median for who, median in medians.items()},
        bytes_per_second={who: size / median for who, median in medians.items()},
    )
    keep(benchmark, results, measured)
    return mine


def keep(benchmark: BenchmarkFixture, results: list[dict[str, Any]], measured: dict[str, Any]) -> None:
    """Adds a row to `results` that is the benchmark's own extra_info: what is added to one is in both."""
    benchmark.extra_info.update(measured)
    results.append(benchmark.extra_info)


def row(
    workload: str,
    against: str,
    kind: str,
    unit: str,
    values: np.ndarray | list[float],
    at_least: float | None = None,
    at_most: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row of the stored results: the values' median, range and number, beside the target for the median."""
    return {
        "workload": workload,
        "against": against,
        "kind": kind,
        "unit": unit,
        "median": float(np.median(values)),
        "low": float(np.min(values)),
        "high": float(np.max(values)),
        "n": len(values),
        "at_least": at_least,
        "at_most": at_most,
        **more,
    }
