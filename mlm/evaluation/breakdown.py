"""Where a model has gained and lost: nats before and after, by kinds of tokens, by token, and by word.

Every prediction is in exactly one row of a breakdown, and sums of nats are exact (evaluate.py): the counts and nats of
its rows add up to the totals to the bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import spell
from mlm.evaluation.evaluate import EvalSet, Evaluation

MOST = 50  # tokens, or words, that are listed as gained, and as lost
HANDFUL, LEAST, MOST_OF = 5, 0.05, 0.5  # a concentrated gain: `carriers` says how
Rows = list[dict[str, Any]]  # {"name" or "text", "count", "nats_before", "nats_after"}


def grouped(group: np.ndarray, n: int, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, ...]:
    """Counts [n] int64 and nats before and after [n] float64 of the members [M] of each of n groups."""
    return np.bincount(group, minlength=n), np.bincount(group, before, n), np.bincount(group, after, n)


def breakdowns(eval_set: EvalSet, before: Evaluation, after: Evaluation, counts: np.ndarray | None) -> dict[str, Rows]:
    """By frequency, by whole words and word pieces, and by position.

    counts: [V] int64, how often each token stands in the training corpus; None: not known, and no breakdown by
        frequency. There is none by words where the tokenizer sees no words.
    """
    groups: dict[str, tuple[Sequence[str], np.ndarray]] = {}  # the name of each group, the group [M] of each token
    if counts is not None:
        tenth = frequency_tenths(counts, eval_set.info.maskable)
        sizes = np.bincount(tenth[eval_set.info.maskable], minlength=10)
        names = [f"{i} ({size:,} tokens)" for i, size in enumerate(sizes, start=1)]
        groups["frequency"] = names, tenth[before.target]
    if eval_set.store.sees_words:
        groups["word"] = ("whole words", "word pieces"), word_pieces(eval_set, before)
    tenth = before.column * 10 // eval_set.chunks.chunk_size
    groups["position"] = [f"{10 * i}–{10 * i + 10}%" for i in range(10)], tenth
    return {
        kind: _rows("name", names, *grouped(group, len(names), before.nats, after.nats))
        for kind, (names, group) in groups.items()
    }


def frequency_tenths(counts: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """The tenth [V] int64, in 0 … 9, of each token: tenths of the corpus, not of the vocabulary.

    Tokens, the most frequent first (then by id), are cut so that each tenth holds about a tenth of the training
    corpus: a token is in tenth ⌊10 · occurrences of those before it / all occurrences⌋. Tokens that never occur are
    in the last.

    counts: [V] int64, how often each token stands in the training corpus; maskable: [V] bool
    """
    ids = np.flatnonzero(maskable)
    ranked = ids[np.argsort(-counts[ids], kind="stable")]
    above = np.cumsum(counts[ranked]) - counts[ranked]
    tenth = np.full(len(counts), 9)
    tenth[ranked] = np.minimum(10 * above // max(counts[ranked].sum(), 1), 9)
    return tenth


def word_pieces(eval_set: EvalSet, evaluation: Evaluation) -> np.ndarray:
    """[M] int64: 0 where a masked token is a whole word, 1 where it is a piece of one."""
    starts = eval_set.store.word_starts
    place = eval_set.chunks.places(evaluation.chunk, evaluation.column)
    after = np.minimum(place + 1, len(starts) - 1)
    return (~(starts[place] & (starts[after] | (after == place)))).astype(np.int64)


def carriers(before: Evaluation, after: Evaluation) -> tuple[np.ndarray, float]:
    """The few tokens [k] int32 that carry most of the nats gained, the largest gain first; and their share.

    They are at most HANDFUL, each carries LEAST of the total or more, and together they carry MOST_OF it; if
    not, k and the share are 0.
    """
    tokens, group = np.unique(before.target, return_inverse=True)
    _, nats_before, nats_after = grouped(group, len(tokens), before.nats, after.nats)
    improvement = nats_before - nats_after
    total = improvement.sum()
    order = np.argsort(-improvement, kind="stable")[:HANDFUL]
    order = order[improvement[order] >= LEAST * total]
    share = float(improvement[order].sum() / total) if total > 0 else 0.0
    return (tokens[order], share) if share > MOST_OF else (tokens[:0], 0.0)


def by_token(tokenizer: PreTrainedTokenizerBase, before: Evaluation, after: Evaluation) -> dict[str, Rows]:
    """The tokens of the largest summed improvement and worsening, over all their masked occurrences."""
    tokens, group = np.unique(before.target, return_inverse=True)
    sums = grouped(group, len(tokens), before.nats, after.nats)
    return _largest(*sums, lambda row: spell(tokenizer, tokens[row : row + 1].tolist()))


def by_word(
    eval_set: EvalSet, tokenizer: PreTrainedTokenizerBase, before: Evaluation, after: Evaluation
) -> dict[str, Rows] | None:
    """As `by_token` for words, equal where all their ids are; None where the tokenizer sees no words.

    `count` is of places in the text under a mask seed, whether one or all of the word's tokens were masked.
    """
    if not eval_set.store.sees_words:
        return None
    ids, N = eval_set.store.ids, len(eval_set.store.ids)
    starts = np.flatnonzero(eval_set.store.word_starts)
    place = eval_set.chunks.places(before.chunk, before.column)
    # words [W]: those with a masked token, by number in the text; word [M]: each masked token's index in them
    words, word = np.unique(np.searchsorted(starts, place, side="right") - 1, return_inverse=True)
    begin, end = starts[words], np.append(starts, N)[words + 1]
    group = np.empty(len(words), np.int64)  # equal where the ids are
    examples: list[int] = []
    for length in np.unique(end - begin):
        same = np.flatnonzero(end - begin == length)
        spelling = ids[begin[same][:, None] + np.arange(length)]  # [words of this length, length]
        _, first, which = np.unique(spelling, axis=0, return_index=True, return_inverse=True)
        group[same] = len(examples) + which.reshape(-1)
        examples += same[first].tolist()

    seed = before.mask_round // (eval_set.config.eval_mask_folds or 1)
    occurrences = np.unique(seed.astype(np.int64) * len(words) + word) % max(len(words), 1)
    _, nats_before, nats_after = grouped(group[word], len(examples), before.nats, after.nats)
    count = np.bincount(group[occurrences], minlength=len(examples))

    def read(row: int) -> str:
        return spell(tokenizer, ids[begin[examples[row]] : end[examples[row]]].tolist())

    return _largest(count, nats_before, nats_after, read)


def _rows(label: str, names: Sequence[str], *sums: np.ndarray) -> Rows:
    """One row for each name; sums: the three [n] of `grouped`."""
    return [
        {label: name, "count": count, "nats_before": before, "nats_after": after}
        for name, count, before, after in zip(names, *(values.tolist() for values in sums), strict=True)
    ]


def _largest(count: np.ndarray, before: np.ndarray, after: np.ndarray, text: Callable[[int], str]) -> dict[str, Rows]:
    """The first MOST rows each way; where the sums are the same, a row is neither gained nor lost."""
    largest = {}
    for name, improvement in (("gained", before - after), ("lost", after - before)):
        rows = np.argsort(-improvement, kind="stable")[:MOST]
        rows = rows[improvement[rows] > 0]
        largest[name] = _rows("text", [text(row) for row in rows.tolist()], count[rows], before[rows], after[rows])
    return largest
