"""Two models on the same masks: how much better one is, how sure that is, and where it is better.

gain = perplexity before / perplexity after = exp(loss before − loss after), with an interval (interval.py)"""

import math
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import readable, spell
from mlm.errors import printable
from mlm.evaluation.breakdown import breakdowns, by_token, by_word, grouped
from mlm.evaluation.evaluate import EvalSet, Evaluation, measure, unigram_perplexity
from mlm.evaluation.interval import CONFIDENCE, FEWEST, interval
from mlm.figures import exp_or_inf, figure, finite

HANDFUL, LEAST, MOST_OF = 5, 0.05, 0.5  # a concentrated gain, see `concentration`
BEYOND = 100  # times the perplexity of token frequencies: more than of equal odds for 30,000 tokens of English
OPENING = 24  # tokens of a document by which a person knows it
# The two texts, each with the prefix of its JSON keys and its words.
EVAL_SETS = {"held_out": ("", "held-out"), "out_of_domain": ("out_of_domain_", "out-of-domain")}


class Conclusion(NamedTuple):
    results: dict[str, Any]  # for all_results.json
    lines: str  # for people
    comparison: dict[str, Any] | None  # comparison.json; None where there was no evaluation before
    documents: pa.Table | None  # documents.parquet


def conclude(
    eval_sets: dict[str, EvalSet],
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    tokenizer: PreTrainedTokenizerBase,
    counts: np.ndarray,
) -> Conclusion:
    """The final figures. before: empty where nothing was measured before the first step; counts: as in `compare`"""
    results, lines, compared, tables = {}, [], dict.fromkeys(EVAL_SETS), []
    for name, eval_set in eval_sets.items():
        prefix, title = EVAL_SETS[name]
        results |= _named(measure(after[name], eval_set), prefix)
        if name in before:
            whole = (before.get("documents"), after.get("documents")) if name == "held_out" else (None, None)
            compared[name] = compare(eval_set, before[name], after[name], tokenizer, counts, whole)
            results |= _named(measure(before[name], eval_set), prefix, "_before")
            results |= gain_figures(compared[name], prefix)
            lines.append(f"{title} text: {in_words(compared[name])}")
            tables.append(documents(name, eval_set, before[name], after[name], tokenizer))
        elif name == "out_of_domain":
            lines.append(f"{title} text: perplexity {figure(results['out_of_domain_perplexity'])}")
    maskable = eval_sets["held_out"].info.maskable
    results["perplexity_unigram"] = unigram_perplexity(counts, maskable, after["held_out"].target)
    results["held_out_leaks"] = eval_sets["held_out"].store.header.get("leaks")
    whole = (compared, pa.concat_tables(tables)) if tables else (None, None)
    return Conclusion(results, "\n".join(lines), *whole)


def compare(
    eval_set: EvalSet,
    before: Evaluation,
    after: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
    counts: np.ndarray | None,
    documents: tuple[Evaluation | None, Evaluation | None] = (None, None),
) -> dict[str, Any]:
    """The comparison of two evaluations of one text under the same masks, as JSON has it.

    gain           {"value", "interval"}, above 1 where the second model is better
    difference     the same of the loss, in nats a masked token, below 0 where it is better
    concentration  see `concentration`; None also where the gain may be chance
    counts         [V] int64, how often each token stands in the training corpus; None: no breakdown by frequency
    documents      the evaluations of its documents one by one, where both models have them

    An interval is [None, None] for fewer than FEWEST documents, or infinite loss. Of one document, such as a book, its
    chunks take their place: they resemble one another, so that the interval is too narrow for other documents. Raises
    ValueError for other masked tokens."""
    if not before.same_masks(after):
        raise ValueError(f"{eval_set.name}: the two evaluations are not of the same masked tokens")
    config, document = eval_set.config, documents_of(eval_set, before)
    num_documents = len(np.unique(document))
    units, kind = (document, "documents") if num_documents > 1 else (before.chunk, "chunks")
    gain, difference = _gain_over(before, after, units)
    sure = difference["interval"][1] < 0
    made = {"method": "jackknife", "confidence": CONFIDENCE, "unit": kind, "units": len(np.unique(units))}
    return finite({
        "text": eval_set.name,
        "before": measure(before, eval_set),
        "after": measure(after, eval_set),
        "gain": gain,
        "difference": difference,
        "concentration": concentration(before, after, units, tokenizer) if sure else None,
        "one_by_one": compare_documents(eval_set, *documents, gain) if None not in documents else None,
        "interval": made,
        "bootstrap": made,  # its name while intervals were percentiles of a bootstrap
        "masks": {
            "seeds": config.seeds,
            "folds": config.eval_mask_folds, "masked_tokens": before.masked,
            "chunks": len(eval_set.chunk_ids), "documents": num_documents,
        },
        "breakdowns": breakdowns(eval_set, before, after, counts),
        "tokens": by_token(tokenizer, before, after),
        "words": by_word(eval_set, tokenizer, before, after),
    })  # fmt: skip


def compare_documents(
    eval_set: EvalSet, before: Evaluation, after: Evaluation, in_chunks: dict[str, Any]
) -> dict[str, Any]:
    """The gain on documents one by one, beside the one `in_chunks`, in which a document is cut and joined to others.

    differs: whether the two intervals have nothing in common. A gain in chunks alone is one in predicting next to the
        cuts, and across the joints, of chunks."""
    gain, _ = _gain_over(before, after, before.chunk)
    (low, high), (low_in_chunks, high_in_chunks) = gain["interval"], in_chunks["interval"]
    return {
        "perplexity_before": before.perplexity, "perplexity": after.perplexity, "gain": gain,
        "differs": high < low_in_chunks or high_in_chunks < low,
        "documents": len(np.unique(before.chunk)), "longest": eval_set.one_by_one.chunks.chunk_size,
        "masked_tokens": before.masked,
    }  # fmt: skip


def concentration(
    before: Evaluation, after: Evaluation, units: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any] | None:
    """Whether a handful of token types carries most of the gain, such as the markup of web pages.

    types         at most HANDFUL tokens, the one that gains most first, each with LEAST of the nats gained or more,
                  together with more than MOST_OF; None instead of all this where no few types carry so much
    share         their part of the nats gained, more than 1 where the other tokens have lost
    gain_without  the gain over all other masked tokens, with its interval as in `compare`

    units: [M] int, what is resampled, for each masked token"""
    tokens, group = np.unique(before.target, return_inverse=True)
    gained = np.bincount(group, before.nats - after.nats, len(tokens))
    total = gained.sum()
    few = np.argsort(-gained, kind="stable")[:HANDFUL]
    few = few[gained[few] >= LEAST * total]
    if not gained[few].sum() > MOST_OF * total > 0:
        return None
    gain, _ = _gain_over(before, after, units, ~np.isin(before.target, tokens[few]))
    return {
        "types": [spell(tokenizer, [token]) for token in tokens[few].tolist()],
        "share": float(gained[few].sum() / total),
        "gain_without": gain["value"],
        "gain_without_interval": gain["interval"],
    }


def _gain_over(
    before: Evaluation, after: Evaluation, units: np.ndarray, part: np.ndarray | slice = slice(None)
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The gain and the difference in loss, as in `compare`, over all tokens, or a part of them, [M] bool."""
    numbers, unit = np.unique(units[part], return_inverse=True)
    count, nats_before, nats_after = grouped(unit, len(numbers), before.nats[part], after.nats[part])
    low, high = interval(nats_after - nats_before, count)
    value = float((nats_after.sum() - nats_before.sum()) / max(count.sum(), 1))
    gain = {"value": exp_or_inf(-value), "interval": [exp_or_inf(-high), exp_or_inf(-low)]}
    return gain, {"value": value, "interval": [low, high]}


def documents_of(eval_set: EvalSet, evaluation: Evaluation) -> np.ndarray:
    """The document [M] int64 of each masked token, by its number in the token store."""
    place = eval_set.chunks.places(evaluation.chunk, evaluation.column)
    return np.searchsorted(eval_set.store.document_offsets, place, side="right") - 1


def documents(
    name: str, eval_set: EvalSet, before: Evaluation, after: Evaluation, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """One row for each document with a masked token."""
    store = eval_set.store
    numbers, group = np.unique(documents_of(eval_set, before), return_inverse=True)
    sums = grouped(group, len(numbers), before.nats, after.nats)
    begins, ends = store.document_offsets[numbers], store.document_offsets[numbers + 1]
    opening = [readable(tokenizer, store.ids[b : min(e, b + OPENING)]) for b, e in zip(begins, ends, strict=True)]
    text, opening = pa.array([name] * len(numbers), pa.string()), pa.array(opening, pa.string())
    columns = {"text": text, "document": numbers, "opening": opening}
    return pa.table({**columns, **dict(zip(("masked_tokens", "nats_before", "nats_after"), sums, strict=True))})


def in_words(compared: dict[str, Any]) -> str:
    """A comparison on one line, and on another one that of documents one by one, if it tells another story."""
    gain, made, by_seed = compared["gain"], compared["interval"], compared["after"]["perplexity_by_seed"]
    seeds = ""
    if len(by_seed) > 1 and None not in by_seed:
        seeds = f", {figure(min(by_seed))} to {figure(max(by_seed))} over {len(by_seed)} mask seeds"
    unit = "chunks of one document" if made["unit"] == "chunks" else made["unit"]
    before, after = (compared[when]["perplexity"] for when in ("before", "after"))
    text = _gain_in_words(before, after, gain, made["units"], unit, seeds)
    if few := compared["concentration"]:
        text += f"; {len(few['types'])} tokens carry {few['share']:.0%} of it ({printable(' '.join(few['types']))}), "
        text += f"on all others it is {figure(few['gain_without'])}"
    if whole := compared["one_by_one"]:
        unit = f"documents of at most {whole['longest']:,} tokens"
        figures = whole["perplexity_before"], whole["perplexity"], whole["gain"]
        text += f"\none by one: {_gain_in_words(*figures, whole['documents'], unit)}"
        if whole["differs"]:
            cut = "a part of the gain in chunks is of how they are cut and joined, not of the domain"
            less = whole["gain"]["value"] < gain["value"]
            text += f": another story, {cut if less else 'chunks hide a part of the gain'}"
    return text


def _gain_in_words(
    before: float | None, after: float | None, gain: dict[str, Any], units: int, unit: str, seeds: str = ""
) -> str:
    """Two perplexities and their gain, from so many of a unit, with its interval, or why there is none."""
    low, high = map(figure, gain["interval"])
    sure = f"{CONFIDENCE:.0%} interval {low} to {high}, from {units:,} {unit}"
    if gain["interval"][0] is None:
        sure = "no interval: " + ("a loss is infinite" if units >= FEWEST else f"{units} {unit}, fewer than {FEWEST}")
    return f"perplexity {figure(before)} before, {figure(after)} after{seeds}, gain {figure(gain['value'])} ({sure})"


def gain_figures(compared: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The gain of a comparison for all_results.json."""
    low, high = compared["gain"]["interval"]
    figures = {"gain": compared["gain"]["value"], "gain_low": low, "gain_high": high}
    figures["gain_documents"] = compared["masks"]["documents"]
    if few := compared["concentration"]:
        figures["gain_without_concentrated"] = few["gain_without"]
    if whole := compared["one_by_one"]:
        low, high = whole["gain"]["interval"]
        figures |= {"documents_gain": whole["gain"]["value"], "documents_gain_low": low, "documents_gain_high": high}
        figures |= {f"documents_{name}": whole[name] for name in ("perplexity_before", "perplexity")}
    return {f"{prefix}{name}": value for name, value in figures.items()}


def nothing_learnt(results: dict[str, Any]) -> str | None:
    """Why a run with these results, as in all_results.json, is no success; None: nothing speaks against it. A model
    that has become worse than it was, beyond chance, and worse than token frequencies alone, is destroyed. Where
    nothing was measured before, one that is BEYOND times worse than token frequencies is."""
    if not results["steps"]:
        return None
    if results.get("mask_rate") == 0:
        return "no token was masked in any step: give more text, or a higher --mlm_probability"
    before, after = results.get("perplexity_before"), results["perplexity"]
    unigram = results.get("perplexity_unigram") or math.inf  # not in those of an earlier version
    limit = BEYOND * unigram if before is None else max(before, unigram)
    if after is not None and after <= limit:
        return None
    high = results.get("gain_high") or 2 * (results.get("gain") or 0)  # without an interval, half as good
    if before is not None and high >= 1:
        return None
    was = "" if before is None else f"{figure(before)} before, "
    return (
        f"held-out perplexity {was}{figure(after)} after, where token frequencies alone reach "
        f"{figure(unigram)}: training has destroyed the model, give a lower --learning_rate, or warm up"
    )


def _named(measured: dict[str, Any], prefix: str, suffix: str = "") -> dict[str, Any]:
    """The figures of a text for all_results.json."""
    by_seed = measured.pop("perplexity_by_seed")
    if len(by_seed) > 1:
        measured["perplexity_spread"] = max(by_seed) - min(by_seed)
    return {f"{prefix}{name}{suffix}": value for name, value in measured.items()}
