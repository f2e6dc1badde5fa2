"""An epoch's order is a permutation by (seed, epoch), and a sample of chunks is drawn by the seed."""

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlm.data.masking import ORDER, SUBSET, draw
from mlm.data.order import AT_ONCE, VERSION, chunks_seen, order_keys, permute, subset
from tests.oracles import slow_order, slow_permute, splitmix64

seeds = st.integers(0, 2**63 - 1)


def order(seed, epoch, n):
    """The chunk at each place of an epoch."""
    return permute(np.arange(n), n, order_keys(seed, np.full(n, epoch)))


def orders(n, count):
    """[count, n] the orders of so many epochs."""
    keys = order_keys(7, np.arange(count))
    return permute(np.tile(np.arange(n), count), n, np.repeat(keys, n, axis=1)).reshape(count, n)


def test_the_worked_example_of_the_module():
    cells, beyond = "0123456789abcdef", "abcdef"
    places = np.array([list(row) for row in ("0123", "4567", "89ab", "cdef")])
    right, down = ([(splitmix64(key + number) >> 2) % 4 for number in range(4)] for key in (1, 2))
    assert (right, down) == ([1, 2, 0, 1], [2, 0, 1, 3])
    rotated = np.array([np.roll(row, by) for row, by in zip(places, right, strict=True)])
    assert ["".join(row) for row in rotated] == ["3012", "6745", "89ab", "fcde"]
    rotated = np.array([np.roll(column, by) for column, by in zip(rotated.T, down, strict=True)]).T
    assert ["".join(row) for row in rotated] == ["80d5", "f71b", "394e", "6ca2"]

    comes_to = {place: cells["".join(rotated.flat).index(place)] for place in cells}
    assert (comes_to["0"], comes_to["1"], comes_to["3"], comes_to["2"], comes_to["f"]) == ("1", "6", "8", "f", "4")
    seen = [comes_to[place] for place in cells[:10]]
    while beyond_now := [i for i, cell in enumerate(seen) if cell in beyond]:
        for i in beyond_now:
            seen[i] = comes_to[seen[i]]
    assert "".join(seen) == "1648732509"
    keys = np.repeat([[1], [2]], 10, axis=1)
    assert permute(np.arange(10), 10, keys).tolist() == list(map(int, seen))


def test_the_order_is_that_of_its_version():
    """Checkpoints name the version: where these chunks are others, it has to be another."""
    assert VERSION == 2
    assert order(1, 0, 10).tolist() == slow_order(1, 0, 10) == [7, 4, 0, 9, 1, 8, 5, 2, 6, 3]
    assert subset(1, 1000, 5).tolist() == [51, 210, 720, 803, 871]


@given(seed=seeds, epoch=st.integers(0, 2**31), n=st.integers(1, 300))
def test_numpy_and_torch_compute_the_permutation_of_the_definition(seed, epoch, n):
    keys, places = order_keys(seed, np.full(n, epoch)), np.arange(n)
    fast = permute(places, n, keys)
    assert fast.tolist() == slow_order(seed, epoch, n)
    assert permute(torch.from_numpy(places), n, torch.from_numpy(keys.copy())).tolist() == fast.tolist()
    assert places.tolist() == list(range(n)), "the argument is left as it was"


@given(n=st.integers(2**31 - 9, 2**61), seed=seeds, share=st.floats(0, 0.99))
def test_places_and_chunks_can_be_more_than_32_bits_hold(n, seed, share):
    places = np.array([0, 1 + int(share * (n - 2)), n - 1])
    seen = permute(places, n, order_keys(seed, np.zeros(3, np.int64))).tolist()
    assert len(set(seen)) == 3
    assert all(0 <= chunk < n for chunk in seen)


def test_large_permutations_are_those_of_the_definition():
    """The oracle looks for its columns one by one."""
    for n in (2**31 - 1, 2**32 + 5):
        keys = order_keys(3, np.zeros(2, np.int64))
        expected = [slow_permute(place, n, keys[:, 0].tolist()) for place in (1, n - 1)]
        assert permute(np.array([1, n - 1]), n, keys).tolist() == expected


def test_every_order_of_up_to_2000_chunks_is_a_permutation():
    for n in range(1, 2001):
        assert np.array_equal(np.sort(order(n, 0, n)), np.arange(n)), n


def chi_square(counts):
    """By how many standard deviations the statistic of equally likely cells is too large (Wilson & Hilferty 1931)."""
    counts = np.asarray(counts, float).reshape(-1)
    statistic, df = ((counts - counts.mean()) ** 2).sum() / counts.mean(), len(counts) - 1
    return (np.cbrt(statistic / df) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


@pytest.mark.parametrize(("n", "epochs"), [(2, 20_000), (3, 20_000), (4, 20_000), (5, 40_000)])
def test_all_permutations_of_few_chunks_are_equally_likely(n, epochs):
    numbers = orders(n, epochs) @ n ** np.arange(n)
    counts = [np.sum(numbers == np.dot(each, n ** np.arange(n))) for each in itertools.permutations(range(n))]
    assert sum(counts) == epochs
    assert chi_square(counts) < 4


@pytest.mark.parametrize("n", [6, 9, 16, 17, 25])
def test_any_two_places_see_any_two_chunks_equally_often(n):
    seen = orders(n, 20_000)
    for first, second in itertools.pairwise(range(n)):
        pairs = np.bincount(seen[:, first] * n + seen[:, second], minlength=n * n).reshape(n, n)
        assert chi_square(pairs[~np.eye(n, dtype=bool)]) < 5


@pytest.mark.parametrize("n", [16, 24, 25])
def test_half_of_the_permutations_are_odd(n):
    """Sixteen and 24 chunks fill their grid, so that none is walked over."""
    signs = np.linalg.det(np.eye(n)[orders(n, 4000)])
    assert abs(signs.mean()) < 4 / math.sqrt(4000)


@pytest.mark.parametrize("n", [8, 1000])
def test_the_order_is_independent_of_the_masks(n):
    """The chunk at a place, by eighths, against the first draw of a mask, of the chunk and of the place's number."""
    epochs = np.arange(20_000)
    seen = permute(np.full(len(epochs), 5), n, order_keys(7, epochs)) * 8 // n
    for chunk in (0, 5):
        masks = (draw(7, epochs, np.full(len(epochs), chunk), 1)[:, 0] >> np.uint64(61)).astype(int)
        assert chi_square(np.bincount(seen * 8 + masks, minlength=64)) < 4
    assert not (order_keys(7, epochs[:9], ORDER) == order_keys(7, epochs[:9], SUBSET)).any()


def test_epochs_and_seeds_have_different_orders():
    assert order(1, 0, 50).tolist() != order(1, 1, 50).tolist() != order(2, 1, 50).tolist()


@given(
    seed=seeds,
    n=st.sampled_from([1, 2, 7, 100, 4095, 4096]),
    samples=st.integers(1, 300),
    places=st.lists(st.integers(0, 20_000), max_size=9),
)
def test_any_places_of_the_stream_of_epochs_are_those_of_their_orders(seed, n, samples, places):
    samples = min(samples, n)
    keys = order_keys(seed, np.zeros(samples, np.int64), SUBSET)
    kept = permute(np.arange(samples), n, keys) if samples < n else range(n)
    seen, epochs = chunks_seen(seed, np.array(places, np.int64), n, samples)
    assert epochs.tolist() == [place // samples for place in places]
    orders = {epoch: slow_order(seed, epoch, samples) for epoch in epochs.tolist()}
    assert seen.tolist() == [kept[orders[place // samples][place % samples]] for place in places]


@given(seed=seeds, n=st.integers(1, 100), samples=st.integers(1, 120))
def test_an_epoch_sees_each_chunk_of_the_sample_once(seed, n, samples):
    sample = subset(seed, n, samples)
    assert len(sample) == min(n, samples)
    for epoch in (0, 1):
        seen, _ = chunks_seen(seed, epoch * len(sample) + np.arange(len(sample)), n, len(sample))
        assert sorted(seen.tolist()) == list(sample)


def test_a_sample_is_drawn_by_the_seed_and_ascends():
    assert subset(1, 50, 8).tolist() == sorted(set(subset(1, 50, 8).tolist()))
    assert subset(1, 50, 8).tolist() != subset(2, 50, 8).tolist()
    assert subset(1, 50, None) == subset(1, 50, 99) == range(50)


def test_a_batch_of_a_billion_chunks_costs_what_one_of_few_does_and_sorting_does_not():
    def memory(n):
        tracemalloc.start()
        chunks_seen(n, 5 * n // 2 + np.arange(AT_ONCE), n, n)
        subset(n, n, 32)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert memory(10**9) < 1.1 * memory(10**4)

    def seconds(work):
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    n, some = 10**6, np.arange(2**17)
    first_batch = min(seconds(lambda seed=seed: chunks_seen(seed, some[:AT_ONCE], n, n)) for seed in range(5))
    in_all = min(seconds(lambda seed=seed: chunks_seen(seed, some, n, n)) for seed in range(3)) * n / len(some)
    sorting = min(seconds(lambda seed=seed: np.argsort(draw(seed, 0, np.zeros(1, int), n)[0])) for seed in range(3))
    assert first_batch < sorting / 10
    assert in_all < 10 * sorting, "and an epoch's places are no burden either"
