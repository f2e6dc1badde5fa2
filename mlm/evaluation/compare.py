"""Two models on the same masks: how much better one is, how sure that is, and where.

gain       = perplexity before / perplexity after = exp(loss before − loss after)
interval   paired bootstrap, percentiles (Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
           chapters 8 and 13): documents are drawn with replacement, as many as there are, each with its
           nats under both models, for predictions within a document are not independent. A test
           compares it with scipy.stats.bootstrap(…, paired=True, method="percentile").
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from mlm.evaluation.breakdown import breakdowns, by_token, by_word, grouped
from mlm.evaluation.evaluate import EvalSet, Evaluation, measure, unigram_perplexity
from mlm.figures import exp_or_inf, figure, finite

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
AT_A_TIME = 1 << 22  # drawn units that are held in memory
OPENING = 24  # tokens of a document by which a person knows it


class Conclusion(NamedTuple):
    """What a run ends with, for its directory and for people."""

    results: dict[str, Any]  # for all_results.json
    lines: str
    comparison: dict[str, Any] | None  # comparison.json; None where there was no evaluation before
    documents: pa.Table | None  # documents.parquet


def conclude(
    eval_sets: dict[str, EvalSet],
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    tokenizer: PreTrainedTokenizerBase,
    counts: np.ndarray,
) -> Conclusion:
    """What the evaluations of `eval_sets`, "held_out" and perhaps "general", before and after come to.

    before: may lack any of them
    counts: [V] int64, tokens of the training corpus
    """
    lines = []
    compared = {n: compare(eval_sets[n], before[n], after[n], tokenizer, counts) for n in before}

    held_out = eval_sets["held_out"]
    results = _scalars(measure(after["held_out"], held_out))
    if "held_out" in before:
        was = _scalars(measure(before["held_out"], held_out))
        results |= {f"{name}_before": value for name, value in was.items()}
        results |= _gain(compared["held_out"], "")
        lines.append(f"held-out text: {in_words(compared['held_out'])}")
    targets = after["held_out"].target
    results["perplexity_unigram"] = unigram_perplexity(counts, held_out.info.maskable, targets)
    if "general" in eval_sets:
        now = _scalars(measure(after["general"], eval_sets["general"]))
        results |= {f"general_{name}": value for name, value in now.items()}
        if "general" in before:
            was = _scalars(measure(before["general"], eval_sets["general"]))
            results |= {f"general_{name}_before": value for name, value in was.items()}
            results |= _gain(compared["general"], "general_")
            lines.append(f"general text: {in_words(compared['general'])}")
        else:
            lines.append(f"general text: perplexity {figure(now['perplexity'])}")
    comparison = {n: compared.get(n) for n in ("held_out", "general")} if "held_out" in compared else None
    tables = [documents(n, eval_sets[n], before[n], after[n], tokenizer) for n in before]
    return Conclusion(results, "\n".join(lines), comparison, pa.concat_tables(tables) if comparison else None)


def compare(
    eval_set: EvalSet,
    before: Evaluation,
    after: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
    counts: np.ndarray | None,
) -> dict[str, Any]:
    """The comparison of two evaluations of one text under the same masks, as JSON has it.

    gain        {"value", "interval"}, above 1 where the second model is better
    difference  the same of the loss, in nats a masked token, below 0 where it is better
    counts      [V] int64, tokens of the training corpus; None: no breakdown by frequency

    An interval is [None, None] where there is one document and one chunk, or loss is infinite. Raises
    ValueError for evaluations of other tokens, or under other masks.
    """
    if not before.same_masks(after):
        raise ValueError(f"{eval_set.name}: the two evaluations are not of the same masked tokens")
    document = documents_of(eval_set, before)
    units, unit = np.unique(document, return_inverse=True)
    kind = "documents"
    if len(units) < 2:  # a book: its chunks are all that there is to draw from
        units, unit = np.unique(before.chunk, return_inverse=True)
        kind = "chunks"
    count, nats_before, nats_after = grouped(unit, len(units), before.nats, after.nats)
    low, high = bootstrap(nats_after - nats_before, count)
    difference = float((after.nats.sum() - before.nats.sum()) / max(before.masked, 1))
    return finite(
        {
            "text": eval_set.name,
            "before": measure(before, eval_set),
            "after": measure(after, eval_set),
            "gain": {"value": exp_or_inf(-difference), "interval": [exp_or_inf(-high), exp_or_inf(-low)]},
            "difference": {"value": difference, "interval": [low, high]},
            "bootstrap": {
                "confidence": CONFIDENCE,
                "resamples": RESAMPLES,
                "unit": kind,
                "units": len(units),
                "seed": SEED,
            },
            "masks": {
                "seeds": [eval_set.config.eval_mask_seed + i for i in range(eval_set.config.eval_mask_seeds)],
                "folds": eval_set.config.eval_mask_folds,
                "masked_tokens": before.masked,
                "chunks": len(eval_set.chunk_ids),
                "documents": len(np.unique(document)),
            },
            "breakdowns": breakdowns(eval_set, before, after, counts),
            "tokens": by_token(tokenizer, before, after),
            "words": by_word(eval_set, tokenizer, before, after),
        }
    )


def bootstrap(
    difference: np.ndarray, count: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """The interval of the difference in loss, Σ difference / Σ count over the units drawn.

    difference: [U] float64, nats after less nats before of each unit
    count:      [U] int64, its masked tokens, at least 1

    Returns the ends of the central CONFIDENCE of `resamples` resamples; NaN for fewer than two units.
    """
    U = len(count)
    if U < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rows = max(AT_A_TIME // U, 1)
    losses = []
    for first in range(0, resamples, rows):
        # Drawn units, gathered: 8 times as fast as multinomial counts times sums, at 25,000 units.
        drawn = rng.integers(0, U, (min(rows, resamples - first), U))
        losses.append(difference[drawn].sum(axis=1) / count[drawn].sum(axis=1))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(losses), [tail, 100 - tail])
    return float(low), float(high)


def documents_of(eval_set: EvalSet, found: Evaluation) -> np.ndarray:
    """The document [M] int64 of each masked token, by its number in the token store."""
    place = eval_set.chunks.places(found.chunk, found.column)
    return np.searchsorted(eval_set.store.document_offsets, place, side="right") - 1


def documents(
    name: str, eval_set: EvalSet, before: Evaluation, after: Evaluation, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """One row for each document with a masked token: which, how it opens, masked tokens, nats."""
    store = eval_set.store
    numbers, group = np.unique(documents_of(eval_set, before), return_inverse=True)
    count, nats_before, nats_after = grouped(group, len(numbers), before.nats, after.nats)
    begin = store.document_offsets[numbers]
    end = np.minimum(store.document_offsets[numbers + 1], begin + OPENING)
    openings = [
        tokenizer.decode(store.ids[b:e].tolist(), skip_special_tokens=True)
        for b, e in zip(begin, end, strict=True)
    ]
    return pa.table(
        {
            "text": pa.array([name] * len(numbers), pa.string()),
            "document": numbers,
            "opening": pa.array(openings, pa.string()),
            "masked_tokens": count,
            "nats_before": nats_before,
            "nats_after": nats_after,
        }
    )


def in_words(compared: dict[str, Any]) -> str:
    """A comparison on one line."""
    (low, high), drawn = compared["gain"]["interval"], compared["bootstrap"]
    sure = f"no interval from one of {drawn['unit']}"
    if low is not None:
        sure = f"{drawn['confidence']:.0%} interval {figure(low)} to {figure(high)}"
        sure += f", {drawn['units']:,} {drawn['unit']} resampled"
    by_seed = compared["after"]["perplexity_by_seed"]
    seeds = f", {figure(min(by_seed))} to {figure(max(by_seed))} over {len(by_seed)} mask seeds"
    return (
        f"perplexity {figure(compared['before']['perplexity'])} before, "
        f"{figure(compared['after']['perplexity'])} after{seeds if len(by_seed) > 1 else ''}, "
        f"gain {figure(compared['gain']['value'])} ({sure})"
    )


def _scalars(measured: dict[str, Any]) -> dict[str, Any]:
    """The figures of a text for all_results.json, with the spread over mask seeds where there are several."""
    by_seed = measured.pop("perplexity_by_seed")
    return measured | ({"perplexity_spread": max(by_seed) - min(by_seed)} if len(by_seed) > 1 else {})


def _gain(compared: dict[str, Any], prefix: str) -> dict[str, Any]:
    low, high = compared["gain"]["interval"]
    return {f"{prefix}gain": compared["gain"]["value"], f"{prefix}gain_low": low, f"{prefix}gain_high": high}
