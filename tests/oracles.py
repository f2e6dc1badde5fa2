"""Slow and obvious versions of what the modules do fast. Nothing here uses the modules."""

from collections.abc import Iterable, Sequence
from typing import Any

Grid = Sequence[Sequence[int]]  # [B][T]

# The token store and its chunks


def tokens_of(tokenizer, text: str) -> tuple[list[int], list[bool]]:
    """(ids, word_starts) of one document, from the ordinary call of a fast tokenizer.

    A word starts where `word_ids` changes; special tokens, which have no word there, are words of their own.
    """
    encoding = tokenizer(text)
    words = encoding.word_ids()
    starts = [word is None or i == 0 or word != words[i - 1] for i, word in enumerate(words)]
    return encoding["input_ids"], starts


def chunks_of(documents: list[list], chunk_size: int, remainder: str, padding: Any) -> list[list]:
    """Joins the documents into one list and slices it."""
    stream = [value for document in documents for value in document]
    rows = [stream[start : start + chunk_size] for start in range(0, len(stream), chunk_size)]
    if rows and len(rows[-1]) < chunk_size:
        last = rows.pop()
        if remainder == "pad":
            rows.append(last + [padding] * (chunk_size - len(last)))
    return rows


def course_chunks(batch: dict[str, list[list]], chunk_size: int) -> dict[str, list[list]]:
    """What the Hugging Face course maps over 1,000 documents at a time: all columns joined and cut.

    https://huggingface.co/learn/llm-course/chapter7/3, `group_texts`, less its copy of the ids as labels.
    """
    whole = sum(map(len, batch["input_ids"])) // chunk_size * chunk_size
    columns = {name: [value for document in column for value in document] for name, column in batch.items()}
    return {
        name: [column[start : start + chunk_size] for start in range(0, whole, chunk_size)]
        for name, column in columns.items()
    }


# Masks, a token at a time, in Python integers

GOLDEN, BITS = 0x9E3779B97F4A7C15, 2**64


def splitmix64(x: int) -> int:
    """The finalizer of https://prng.di.unimi.it/splitmix64.c."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % BITS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % BITS
    return x ^ (x >> 31)


def slow_draw(seed: int, epoch: int, chunk_ids: Iterable[int], length: int, purpose: int = 1) -> list[list[int]]:
    """Number t + 1 of the chunk's sequence for the token at t; the chunk's key is a number of the epoch's."""
    key = 0
    for word in (seed, epoch, purpose):  # 1: masks, 2: the order of chunks, 3: a sample of them
        key = splitmix64((key + GOLDEN + word) % BITS)
    keys = [splitmix64((key + chunk * GOLDEN) % BITS) for chunk in chunk_ids]
    return [[splitmix64((key + (t + 1) * GOLDEN) % BITS) for t in range(length)] for key in keys]


def slow_select(maskable: Grid, draws: Grid, rate: float, starts: Grid | None = None) -> list[list[bool]]:
    """A token is selected where the draw of its own (or, with `starts`, of its word's first token) is low."""
    selected = [[False] * len(row) for row in maskable]
    for b, row in enumerate(maskable):
        for t, may_be in enumerate(row):
            deciding = t if starts is None else _head(starts[b], t)
            selected[b][t] = bool(may_be) and draws[b][deciding] >> 32 < round(rate * 2**32)
    return selected


def slow_select_fold(maskable: Grid, draws: Grid, starts: Grid | None, fold: int, folds: int) -> list[list[bool]]:
    """Deals a chunk's maskable tokens (or the words that have one) out to the folds, by rising draws."""
    selected = [[False] * len(row) for row in maskable]
    for b, row in enumerate(maskable):
        heads = [t if starts is None else _head(starts[b], t) for t in range(len(row))]
        units = {head for head, may_be in zip(heads, row, strict=True) if may_be}
        ranked = sorted(units, key=lambda head: (draws[b][head], head))
        turn = {head: (rank + draws[b][0] % 2**32) % folds for rank, head in enumerate(ranked)}
        selected[b] = [bool(m) and turn[head] == fold for head, m in zip(heads, row, strict=True)]
    return selected


def _head(starts: Sequence[bool], t: int) -> int:
    """Where the word of the token at `t` begins in the chunk, which may begin inside a word."""
    while t and not starts[t]:
        t -= 1
    return t


def slow_corrupt(ids: Grid, selected: Grid, draws: Grid, recipe: Any) -> tuple[list[list[int]], list[int], list[int]]:
    """(ids, positions, targets) as `corrupt` gives them."""
    seen, positions, targets = [list(row) for row in ids], [], []
    replacements = list(map(int, recipe.maskable_ids))
    for b, row in enumerate(ids):
        for t, token in enumerate(row):
            if not selected[b][t]:
                continue
            positions.append(b * len(row) + t)
            targets.append(token)
            second = splitmix64(draws[b][t])
            if second >> 32 < recipe.replace:
                seen[b][t] = recipe.mask_id
            elif second >> 32 < recipe.randomise:
                seen[b][t] = replacements[second % 2**32 * len(replacements) >> 32]
    return seen, positions, targets


# The order of chunks, a place at a time


def slow_permute(place: int, n: int, keys: Sequence[int]) -> int:
    """Where the network of two keys a round takes `place`, on a grid that has n cells or some more."""
    columns = 4
    while columns * columns < n or columns % 2:
        columns += 1
    rows = max(4, -(-n // columns))
    while True:
        row, column = divmod(place, columns)
        for key in range(0, len(keys), 2):
            column = (column + (splitmix64((keys[key] + row) % BITS) >> 2)) % columns
            row = (row + (splitmix64((keys[key + 1] + column) % BITS) >> 2)) % rows
        place = row * columns + column
        if place < n:
            return place


def slow_order(seed: int, epoch: int, n: int, purpose: int = 2) -> list[int]:
    """The chunk at each place of an epoch; its keys are the first ten draws for orders."""
    [keys] = slow_draw(seed, epoch, [0], 10, purpose)
    return [slow_permute(place, n, keys) for place in range(n)]
