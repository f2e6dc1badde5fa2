"""Which recipes set a record, by the rule that run.py states."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy.stats import ttest_rel

FIRST = "default"  # holds the record until another recipe does
SEEDS = (1, 2, 3, 4, 5)  # these and no others: a test to which seeds are added until it is passed is none
CHANCE = 0.01  # p below


class Record(NamedTuple):
    recipe: str
    before: str  # the recipe whose record it was
    p: float


def losses(
    runs: Sequence[dict[str, Any]], domain: str, passes: float, figure: str = "loss"
) -> dict[str, dict[int, float]]:
    """The held-out loss of each of the SEEDS, by recipe, in the order in which recipes were first measured. Where a
    recipe's settings have changed since, its last ones count.

    figure: or `accuracy`, or `dev_loss`, which all runs have"""
    own = [run for run in runs if (run["domain"], run["passes"]) == (domain, passes)]
    last = {run["recipe"]: run["settings"] for run in own}
    found: dict[str, dict[int, float]] = {run["recipe"]: {} for run in own}
    for run in own:
        if run["seed"] in SEEDS and run["settings"] == last[run["recipe"]] and run.get(figure) is not None:
            found[run["recipe"]][run["seed"]] = run[figure]
    return found


def shared(mine: dict[int, float], its: dict[int, float]) -> list[int]:
    """The seeds that both have."""
    return sorted(mine.keys() & its.keys())


def p_value(mine: dict[int, float], its: dict[int, float]) -> float:
    """Of the paired, one-sided t-test over the shared seeds that mine are lower; NaN with fewer than two seeds, or
    where all differences are zero."""
    seeds = shared(mine, its)
    if len(seeds) < 2 or all(mine[seed] == its[seed] for seed in seeds):
        return math.nan
    return float(ttest_rel([mine[seed] for seed in seeds], [its[seed] for seed in seeds], alternative="less").pvalue)


def records(runs: Sequence[dict[str, Any]], domain: str, passes: float) -> list[Record]:
    """The records of a domain, in their order. A recipe that is worse in any other domain sets none, nor does one that
    has not been measured there."""
    own, set_so_far, holder = losses(runs, domain, passes), [], FIRST
    others = [losses(runs, other, passes) for other in sorted({run["domain"] for run in runs} - {domain})]

    def enough(by_recipe: dict[str, dict[int, float]], *recipes: str) -> bool:
        return len(shared(*(by_recipe.get(recipe, {}) for recipe in recipes))) == len(SEEDS)

    for recipe in own:
        if not all(enough(by_recipe, recipe, holder) for by_recipe in (own, *others)):
            continue
        p = p_value(own[recipe], own[holder])
        worse = any(p_value(by_recipe[holder], by_recipe[recipe]) < CHANCE for by_recipe in others)
        if p < CHANCE and not worse:
            set_so_far.append(Record(recipe, holder, p))
            holder = recipe
    return set_so_far
