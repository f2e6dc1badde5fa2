"""Where a model has gained and lost: nats before and after, by kinds of tokens, by token, and by word.

The counts and nats of a breakdown's rows add up to the totals, to the bit: sums of nats are exact (evaluate.py)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import spell
from mlm.evaluation.evaluate import EvalSet, Evaluation

MOST = 50  # tokens, or words, that are listed as gained, and as lost
Rows = list[dict[str, Any]]  # {"name" or "text", "count", "nats_before", "nats_after"}


def grouped(group: np.ndarray, n: int, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, ...]:
    """Counts [n] int64 and nats before and after [n] float64 of the members [M] of each of n groups."""
    return np.bincount(group, minlength=n), np.bincount(group, before, n), np.bincount(group, after, n)


def breakdowns(eval_set: EvalSet, before: Evaluation, after: Evaluation, counts: np.ndarray | None) -> dict[str, Rows]:
    """By frequency, if `counts` as in `frequency_tenths` are known, by position, and, where the tokenizer sees words,
    by whole words and word pieces."""
    groups: dict[str, tuple[Sequence[str], np.ndarray]] = {}  # the name of each group, the group [M] of each token
    if counts is not None:
        tenth = frequency_tenths(counts, eval_set.info.maskable)
        sizes = np.bincount(tenth[eval_set.info.maskable], minlength=10)
        names = [f"{i} ({size:,} tokens)" for i, size in enumerate(sizes, start=1)]
        groups["frequency"] = names, tenth[before.target]
    if not eval_set.store.why_no_words:
        place = eval_set.chunks.places(before.chunk, before.column)
        starts = eval_set.store.word_starts
        ends = (place + 1 == len(starts)) | starts[(place + 1) % len(starts)]  # the end of the text ends a word
        groups["word"] = ("whole words", "word pieces"), (~(starts[place] & ends)).astype(np.int64)
    tenth = before.column * 10 // eval_set.chunks.chunk_size
    groups["position"] = [f"{10 * i}–{10 * i + 10}%" for i in range(10)], tenth
    return {
        kind: _rows("name", names, *grouped(group, len(names), before.nats, after.nats))
        for kind, (names, group) in groups.items()
    }


def frequency_tenths(counts: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """The tenth [V] int64, in 0 … 9, of each token: tenths of the corpus, not of the vocabulary.

    A token is in tenth ⌊10 · occurrences of those before it / all occurrences⌋, the most frequent first, then by id.
    Tokens that never occur are in the last.

    counts: [V] int64, how often each token stands in the training corpus; maskable: [V] bool"""
    ids = np.flatnonzero(maskable)
    ranked = ids[np.argsort(-counts[ids], kind="stable")]
    above = np.cumsum(counts[ranked]) - counts[ranked]
    tenth = np.full(len(counts), 9)
    tenth[ranked] = np.minimum(10 * above // max(counts[ranked].sum(), 1), 9)
    return tenth


def by_token(tokenizer: PreTrainedTokenizerBase, before: Evaluation, after: Evaluation) -> dict[str, Rows]:
    """The tokens of the largest summed improvement and worsening, over all their masked occurrences."""
    tokens, group = np.unique(before.target, return_inverse=True)
    sums = grouped(group, len(tokens), before.nats, after.nats)
    return _largest(*sums, lambda row: spell(tokenizer, tokens[row : row + 1].tolist()))


def by_word(
    eval_set: EvalSet, tokenizer: PreTrainedTokenizerBase, before: Evaluation, after: Evaluation
) -> dict[str, Rows] | None:
    """As `by_token` for words, equal where all their ids are; None where the tokenizer sees no words. `count` is of
    places in the text under a mask seed, whether one or all of the word's tokens were masked."""
    if eval_set.store.why_no_words:
        return None
    ids = np.asarray(eval_set.store.ids)  # a slice of a memory map would be ten times as slow
    begins, ends, word = word_spans(eval_set.store.word_starts, eval_set.chunks.places(before.chunk, before.column))
    spans = zip(begins.tolist(), ends.tolist(), strict=True)
    spellings: dict[bytes, int] = {}
    # [W] equal where the ids are
    group = np.array([spellings.setdefault(ids[b:e].tobytes(), len(spellings)) for b, e in spans], np.int64)
    seed = before.mask_round // (eval_set.config.eval_mask_folds or 1)
    occurrences = np.unique(seed.astype(np.int64) * len(begins) + word) % max(len(begins), 1)
    _, *nats = grouped(group[word], len(spellings), before.nats, after.nats)
    count, spelt = np.bincount(group[occurrences], minlength=len(spellings)), list(spellings)
    return _largest(count, *nats, lambda row: spell(tokenizer, np.frombuffer(spelt[row], ids.dtype).tolist()))


def word_spans(word_starts: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The W words that tokens [M] stand in: where each begins and ends [W], and the word [M] of each token.

    word_starts [N] bool, 1: a word begins here; of the whole text, whose first token begins one. It is read at the
    tokens of these words alone."""
    place, which = np.unique(places, return_inverse=True)  # [P], ascending
    before, begins, left = np.append(-1, place[:-1]), place.copy(), np.arange(len(place))
    while len(left := left[~word_starts[begins[left]]]):  # back to where the word begins,
        begins[left] -= 1
        left = left[begins[left] > before[left]]  # or to another of these tokens, which stands in the same word
    new = begins > before  # [P]
    ends = place[np.append(new, True)[1:]] + 1  # after the last of each word's tokens
    left = np.flatnonzero(ends < len(word_starts))
    while len(left := left[~word_starts[ends[left]]]):
        ends[left] += 1
        left = left[ends[left] < len(word_starts)]
    return begins[new], ends, (np.cumsum(new) - 1)[which]


def _rows(label: str, names: Sequence[str], *sums: np.ndarray) -> Rows:
    """One row for each name; sums: the three [n] of `grouped`."""
    keys, columns = (label, "count", "nats_before", "nats_after"), (names, *(values.tolist() for values in sums))
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _largest(count: np.ndarray, before: np.ndarray, after: np.ndarray, text: Callable[[int], str]) -> dict[str, Rows]:
    """The first MOST rows each way; where the sums are the same, a row is neither gained nor lost."""
    largest = {}
    for name, improvement in (("gained", before - after), ("lost", after - before)):
        rows = np.argsort(-improvement, kind="stable")[:MOST]
        rows = rows[improvement[rows] > 0]
        largest[name] = _rows("text", [text(row) for row in rows.tolist()], count[rows], before[rows], after[rows])
    return largest
