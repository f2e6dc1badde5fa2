"""Which documents share a row: best fit decreasing, the longest document first, each in the fullest row that takes it.

Documents 0 … 4 of 3, 5, 2, 4 and 2 tokens, in rows of 8:

row 0             | 1 1 1 1 1 0 0 0 |      5 tokens open it, 4 do not fit, 3 fill it
row 1             | 3 3 3 3 2 2 4 4 |      4 tokens open it, 2 and 2 fill it

These are at most 11/9 of the fewest rows, and four (Johnson et al. 1974, "Worst-case performance bounds for simple
one-dimensional packing algorithms"). For masked language models: Krell et al. 2021, arXiv:2107.02027."""

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The row [B] int64 of each document, and the column [B] int64 in which it begins, by their lengths [B] in tokens,
    of which none is more than `size`. Of rows that are as full, the first takes it. A microsecond a document; one
    NumPy pass for all documents of a length took ten times as long for 256 documents, and less only from 16,000 on."""
    row, column = np.empty((2, len(lengths)), np.int64)
    free: list[tuple[int, int]] = []  # ascending: the free tokens of each row, and its number
    longest_first = np.argsort(-lengths, kind="stable")
    for document, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fit = bisect_left(free, (length, 0))
        left, number = free.pop(fit) if fit < len(free) else (size, len(free))
        insort(free, (left - length, number))
        row[document], column[document] = number, size - left
    return row, column
