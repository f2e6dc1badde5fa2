"""How sure a difference in loss is, from the documents (or chunks) that it was measured on.

    θ = Σ difference / Σ count          θᵢ: the same without document i          n = (Σ count)² / Σ count²
    θ ± t · √(Σ (θᵢ − θ)²),             t: Student's, with n − 1 degrees of freedom, at least 1

The error is the jackknife's without its factor (U − 1) / U, as in HC3 (MacKinnon & White 1985, J. of Econometrics 29),
because documents differ in length; for the same reason n is the number of equally long documents that would be worth
as much (Kish, Survey Sampling, 1965). Documents are left out whole, because predictions within a document are not
independent. Percentiles of a bootstrap are too narrow for few documents: from 5 of them they hold the truth 80% of the
time, this interval 95% (benchmarks/interval_coverage.py)."""

import math

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
FEWEST = 5  # documents, below which no interval is given


def interval(difference: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """The ends of the CONFIDENCE interval of Σ difference / Σ count; NaN for fewer than FEWEST units or infinite nats.

    difference: [U] float64, nats after less nats before of each document
    count:      [U] int64, its masked tokens, at least 1"""
    if len(count) < FEWEST or not np.isfinite(difference).all():
        return math.nan, math.nan
    theta = difference.sum() / count.sum()
    half = half_width((difference - theta * count) / (count.sum() - count), count)
    return float(theta - half), float(theta + half)


def half_width(shifts: np.ndarray, count: np.ndarray) -> float:
    """Half of the CONFIDENCE interval of any statistic of documents.

    shifts: [U] float64, θ − θᵢ of each document; count: [U] int64, its length"""
    worth = count.sum() ** 2 / np.square(count).sum()
    return student(max(worth - 1, 1)) * math.sqrt(np.square(shifts).sum())


def student(freedom: float) -> float:
    """The t that Student's distribution with so many degrees of freedom stays within, CONFIDENCE of it."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
