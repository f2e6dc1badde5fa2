"""The order in which an epoch sees the chunks: a permutation of 0 … n - 1 by (seed, epoch), computed place by place.

A generalised Feistel network with cycle walking (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002) on a
grid of about √n columns: a round rotates each row to the right, by a hash of its number with a key, then each column
downwards. A place sees the chunk whose number is that of the cell it comes to, or goes on from a cell past n.
Ten places, the keys 1 and 2; a … f are the cells 10 … 15:

    places         rows by 1 2 0 1    columns by 2 0 1 3
    0 1 2 3        3 0 1 2            8 0 d 5               place 0 sees chunk 1, 1 sees 6, 3 sees 8, …
    4 5 6 7        6 7 4 5            f 7 1 b               2 comes to f, which comes to 4: it sees chunk 4
    8 9 a b        8 9 a b            3 9 4 e
    c d e f        f c d e            6 c a 2               the order: 1 6 4 8 7 3 2 5 0 9"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from mlm.data.corpus import CorpusConfig, Files, several
from mlm.data.masking import ORDER, SOURCE, SUBSET, draw, mix_int64, shift, stream_key
from mlm.errors import UserError

VERSION = 2  # a checkpoint of another order is not resumed; the first one sorted the chunks by their draws
ROUNDS = 5  # two Feistel rounds each
SIDE = 4  # rows and columns at least: on a smaller grid not all permutations are equally likely
AT_ONCE = 4096  # places to compute by one call, of as many steps as that takes
FINEST = 10**9  # shares of sources are multiples of one over it: no product overflows


@dataclass(frozen=True)
class ReplayConfig:
    """Text that is mixed into training, such as general text, so that less of it is forgotten."""

    replay_file: Files = None  # Train on this text too, in the formats of --train_file; none of it is held out.
    replay_share: float | tuple[float, ...] = 0.1  # Take this share of all chunks from it (or one from each file).
    replay_text_column: str | None = None  # This column holds its documents (default: --text_column).

    def __post_init__(self) -> None:
        files, shares = several(self.replay_file), several(self.replay_share)
        if not (min(shares) >= 1 / FINEST and sum(shares) <= 1 - 1 / FINEST):
            raise UserError(f"--replay_share {self.replay_share}: more than 0 each, and less than 1 together")
        if not files and self.replay_share != type(self).replay_share:
            raise UserError(f"--replay_share {self.replay_share}: of which text? give --replay_file")
        if files and len(shares) not in (1, len(files)):
            raise UserError(f"--replay_share: {len(shares)} shares of {len(files)} files; give one, or one for each")

    @property
    def shares(self) -> dict[str, Fraction]:
        """The share of all chunks that each source has, by its name."""
        shares = [Fraction(round(share * FINEST), FINEST) for share in several(self.replay_share)]
        names = [f"replay_{number}" for number, _ in enumerate(shares, 1)] if len(shares) > 1 else ["replay"]
        return dict(zip(names, shares, strict=True)) if self.replay_file else {}

    def texts(self, domain: CorpusConfig) -> dict[str, CorpusConfig]:
        """The text of each source, its documents cut and cleaned as the domain's are."""
        column = self.replay_text_column or domain.text_column
        text = replace(domain, dataset_name=None, train_file=None, text_column=column)
        parts = several(self.replay_file) if len(self.shares) > 1 else [self.replay_file]
        return {name: replace(text, validation_file=part) for name, part in zip(self.shares, parts, strict=False)}


def permute(places: Any, n: int, keys: Any) -> Any:
    """places [B] in 0 … n - 1 -> their images [B] under the permutations of 0 … n - 1 with the keys [2 · rounds, B].
    All int64, as NumPy arrays or as torch tensors, of which it computes the same bits. n is at most 2**61."""
    columns = max(math.isqrt(n - 1) + 1, SIDE)
    columns += columns % 2  # rotations of an odd number of cells are even permutations, products of which are even
    rows = max(-(-n // columns), SIDE)
    image = _rounds(places, columns, rows, keys)
    while (beyond := image >= n).any():
        image[beyond] = _rounds(image[beyond], columns, rows, keys[:, beyond])
    return image


def _rounds(cell: Any, columns: int, rows: int, keys: Any) -> Any:
    row, column = cell // columns, cell % columns
    for right, down in zip(keys[::2], keys[1::2], strict=True):
        column = (column + shift(mix_int64(right + row), 2)) % columns
        row = (row + shift(mix_int64(down + column), 2)) % rows
    return row * columns + column


def order_keys(seed: int, epochs: np.ndarray, purpose: int = ORDER) -> np.ndarray:
    """epochs [B] int64 -> the keys [2 · ROUNDS, B] int64 of their permutations."""
    return draw(seed, epochs, np.zeros_like(epochs), 2 * ROUNDS, purpose).view(np.int64).T


def subset(seed: int, n: int, samples: int | None) -> np.ndarray | range:
    """A sample of min(samples, n) of the chunk ids 0 … n - 1, int64, ascending; None: all of them."""
    if samples is None or samples >= n:
        return range(n)
    return np.sort(permute(np.arange(samples), n, order_keys(seed, np.zeros(samples, np.int64), SUBSET)))


def chunks_seen(seed: int, places: np.ndarray, n: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunk ids [P] int64 at these places [P] of the endless stream of epochs, and the epoch [P] of each. An epoch
    sees a sample of `samples` of the n chunks. Time and memory depend on neither."""
    epochs, places = np.divmod(places, samples)
    seen = permute(places, samples, order_keys(seed, epochs))
    return seen if samples == n else permute(seen, n, order_keys(seed, np.zeros_like(seen), SUBSET)), epochs


def seen_before(places: np.ndarray, shares: Sequence[Fraction]) -> np.ndarray:
    """How many chunks of each source come before these places […] of the stream that they share: [1 + K, …] int64.

    shares: of sources 1 … K, the rest is of source 0. Source K has the places p with ⌊(p + 1) · share⌋ > ⌊p · share⌋,
    and so on with what is left: over places in a row, two sources have their shares to less than one chunk each, and a
    further one adds one at most."""
    counts, rest = [places], Fraction(1)
    for share in reversed(shares):
        by, of = (share / rest).as_integer_ratio()
        counts[1:1] = [counts[0] // of * by + counts[0] % of * by // of]
        counts[0], rest = counts[0] - counts[1], rest - share
    return np.stack(counts)


@lru_cache(maxsize=8)  # several `Batches` can take turns
def mixture_seen(
    seed: int, sizes: tuple[int, ...], samples: int, shares: tuple[Fraction, ...], firsts: range, count: int
) -> np.ndarray:
    """The chunk ids, numbered on from source to source, and the epochs, at `count` places from each of the first ones
    [S] on: [2, S, count] int64. The sources have these sizes, the first one a sample, the others these shares."""
    places = np.array(firsts)[:, None] + np.arange(count)  # [S, count]
    before, after = (seen_before(each, shares) for each in (places, places + 1))  # [1 + K, S, count]
    (chunk_ids, epochs), begins = np.empty((2, *places.shape), np.int64), 0
    for k, (n, drawn) in enumerate(zip(sizes, (samples, *sizes[1:]), strict=True)):
        own, key = after[k] > before[k], stream_key(seed, k, SOURCE) if k else seed  # own [S, count] bool
        seen, epochs[own] = chunks_seen(key, before[k][own], n, drawn)
        chunk_ids[own], begins = begins + seen, begins + n
    return np.stack([chunk_ids, epochs])
