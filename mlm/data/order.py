"""The order in which an epoch sees the chunks: a permutation by (seed, epoch)."""

from functools import lru_cache

import numpy as np

from mlm.data.masking import ORDER, SUBSET, draw


def shuffle(seed: int, epoch: int, n: int, purpose: int = ORDER) -> np.ndarray:
    """The permutation [n] int64 of 0 … n - 1 that (seed, epoch) names: the order of n draws."""
    return np.argsort(draw(seed, epoch, np.zeros(1, dtype=np.int64), n, purpose)[0], kind="stable")


def subset(seed: int, n: int, samples: int | None) -> np.ndarray:
    """The chunk ids [min(samples, n)] that --max_…_samples leaves of n, ascending."""
    if samples is None or samples >= n:
        return np.arange(n)
    return np.sort(shuffle(seed, 0, n, SUBSET)[:samples])


@lru_cache(maxsize=2)  # a batch can reach from one epoch into the next
def epoch_order(seed: int, epoch: int, n: int, samples: int) -> np.ndarray:
    """The chunk ids [samples] in the order in which this epoch sees them."""
    return subset(seed, n, samples)[shuffle(seed, epoch, samples)]
