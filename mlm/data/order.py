"""The order in which an epoch sees the chunks: a permutation by (seed, epoch)."""

from functools import lru_cache

import numpy as np

from mlm.data.masking import ORDER, SUBSET, draw


def shuffle(seed: int, epoch: int, n: int, purpose: int = ORDER) -> np.ndarray:
    """The permutation [n] int64 of 0 … n - 1 that sorts the n draws of (seed, epoch)."""
    return np.argsort(draw(seed, epoch, np.zeros(1, dtype=np.int64), n, purpose)[0], kind="stable")


def subset(seed: int, n: int, samples: int | None) -> np.ndarray:
    """A sample of min(samples, n) of the chunk ids 0 … n - 1, int64, ascending; None: all of them."""
    if samples is None or samples >= n:
        return np.arange(n)
    return np.sort(shuffle(seed, 0, n, SUBSET)[:samples])


@lru_cache(maxsize=2)  # a batch can reach from one epoch into the next
def epoch_order(seed: int, epoch: int, n: int, samples: int) -> np.ndarray:
    """The chunk ids [samples] int64 of the sample in the order in which an epoch sees them."""
    return subset(seed, n, samples)[shuffle(seed, epoch, samples)]
