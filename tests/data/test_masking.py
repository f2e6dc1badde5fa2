"""Masks are a pure function of (seed, epoch, chunk id, position) and the recipe (laws 1, 6 and 7)."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlm.data.masking import (
    GOLDEN,
    MASKS,
    ORDER,
    MaskingConfig,
    Recipe,
    corrupt,
    corrupt_torch,
    draw,
    draw_torch,
    make_recipe,
    mix,
    select,
    stream_key,
)
from mlm.data.order import shuffle
from mlm.errors import UserError

HALF, ALL = 1 << 31, 1 << 32  # thresholds: p = 0.5 and p = 1
MASK, ORDINARY = 4, np.arange(5, 12)  # of twelve tokens, 0 to 4 are special


def recipe(select=HALF, replace=ALL, randomise=ALL, whole_word=False):
    return Recipe(select, replace, randomise, MASK, ORDINARY, whole_word)


def upper(halves):
    """Draws whose upper half, which selection looks at, is the given share of 2**32."""
    return (np.array(halves) * 2.0**32).astype(np.uint64) << np.uint64(32)


def test_a_worked_example():
    #                  [CLS]    the    film     ##s   [SEP]
    ids = np.array([[      2,     5,      6,      7,     3]])  # fmt: skip
    maskable = np.array([[ 0,     1,      1,      1,     0]], bool)  # fmt: skip
    draws = upper([[     0.1,   0.2,    0.9,    0.3,   0.4]])  # fmt: skip
    starts = np.array([[   1,     1,      1,      0,     1]], bool)  # fmt: skip

    tokens = corrupt(ids, maskable, draws, recipe(), starts)
    assert tokens.ids.tolist() == [[2, MASK, 6, MASK, 3]]  # below one half and maskable: the, ##s
    assert tokens.positions.tolist() == [1, 3]
    assert tokens.targets.tolist() == [5, 7]

    words = corrupt(ids, maskable, draws, recipe(whole_word=True), starts)
    assert words.ids.tolist() == [[2, MASK, 6, 7, 3]]  # "films" goes by the draw of "film"
    assert words.positions.tolist() == [1]


def slow_draw(seed, epoch, chunk_ids, length):
    """SplitMix64 in Python integers, a token at a time."""
    key = stream_key(seed, epoch, MASKS)
    chunk_keys = [mix((key + chunk * GOLDEN) % 2**64) for chunk in chunk_ids]
    return [[mix((chunk_key + (t + 1) * GOLDEN) % 2**64) for t in range(length)] for chunk_key in chunk_keys]


def slow_corrupt(ids, maskable, draws, recipe, starts):
    """The definition of `corrupt`, a token at a time, in Python integers."""
    seen, positions, targets = [list(row) for row in ids], [], []
    for b, row in enumerate(ids):
        word = 0
        for t, token in enumerate(row):
            word = t if starts[b][t] or t == 0 else word
            deciding = draws[b][word if recipe.whole_word else t]
            if not maskable[b][t] or deciding >> 32 >= recipe.select:
                continue
            positions.append(b * len(row) + t)
            targets.append(token)
            second = mix(draws[b][t])
            if second >> 32 < recipe.replace:
                seen[b][t] = recipe.mask_id
            elif second >> 32 < recipe.randomise:
                maskable = recipe.maskable_ids.tolist()
                seen[b][t] = maskable[(second % 2**32) * len(maskable) >> 32]
    return seen, positions, targets


def test_the_finalizer_is_splitmix64s():
    """The first three outputs for seed 1234567, as published with the reference implementation."""
    outputs = [mix((1234567 + i * GOLDEN) % 2**64) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


seeds = st.integers(0, 2**63 - 1)


@given(
    seed=seeds, epoch=st.integers(0, 2**31), chunks=st.lists(st.integers(0, 2**40), min_size=1, max_size=4)
)
def test_numpy_and_torch_draw_the_bits_of_the_definition(seed, epoch, chunks):
    fast = draw(seed, epoch, np.array(chunks), 7)
    assert fast.tolist() == slow_draw(seed, epoch, chunks, 7)
    assert draw_torch(seed, epoch, torch.tensor(chunks), 7).numpy().view(np.uint64).tolist() == fast.tolist()


@given(
    seed=seeds,
    whole_word=st.booleans(),
    p=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    mask=st.sampled_from([0, 0.8, 1]),
)
def test_both_kernels_do_what_the_definition_says(seed, whole_word, p, mask):
    numbers = np.random.default_rng(seed)
    ids = numbers.integers(0, 12, (3, 20))
    starts, maskable = numbers.random((3, 20)) < 0.6, ids > MASK
    draws = draw(seed, 0, np.arange(3), 20)
    chosen = recipe(
        round(p * ALL), round(mask * ALL), round(mask * ALL) + round((1 - mask) * HALF), whole_word
    )

    fast = corrupt(ids, maskable, draws, chosen, starts)
    seen, positions, targets = slow_corrupt(ids.tolist(), maskable, draws.tolist(), chosen, starts)
    assert (fast.ids.tolist(), fast.positions.tolist(), fast.targets.tolist()) == (seen, positions, targets)

    signed = torch.from_numpy(draws.view(np.int64))
    on_torch = corrupt_torch(
        *map(torch.from_numpy, (ids, maskable)), signed, chosen, torch.from_numpy(starts)
    )
    for ours, theirs in zip(fast, on_torch, strict=True):
        assert ours.tolist() == theirs.tolist()


def test_masks_do_not_depend_on_batch_size():
    together = draw(1, 0, np.arange(64), 32)
    alone = [draw(1, 0, np.array([chunk]), 32)[0] for chunk in range(64)]
    assert (together == np.stack(alone)).all()


def test_masks_do_not_depend_on_the_chunk_length():
    assert (draw(1, 0, np.arange(4), 32)[:, :10] == draw(1, 0, np.arange(4), 10)).all()


@pytest.mark.parametrize("changed", [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_seed_epoch_and_chunk_each_change_the_draws(changed):
    seed, epoch, chunk = changed
    assert not (draw(seed, epoch, np.array([chunk]), 64) == draw(1, 0, np.array([0]), 64)).any()


def test_the_order_of_chunks_and_their_masks_have_different_streams():
    assert not (draw(1, 0, np.zeros(1, int), 64, ORDER) == draw(1, 0, np.zeros(1, int), 64, MASKS)).any()


@given(seed=seeds, low=st.floats(0, 1), high=st.floats(0, 1), whole_word=st.booleans())
def test_what_a_lower_rate_masks_a_higher_rate_masks_too(seed, low, high, whole_word):
    low, high = sorted((low, high))
    draws = draw(seed, 0, np.arange(4), 50)
    starts = draw(seed + 1, 0, np.arange(4), 50) % np.uint64(3) == 0
    everything = np.ones((4, 50), bool)
    few = select(everything, draws, recipe(round(low * ALL), whole_word=whole_word), starts)
    many = select(everything, draws, recipe(round(high * ALL), whole_word=whole_word), starts)
    assert (few <= many).all()


def test_the_shares_are_the_ones_asked_for():
    """10^6 tokens: a share of p is met to five standard deviations, 5 * sqrt(p (1 - p) / n)."""
    ids = np.full((1000, 1000), 5)
    config = MaskingConfig(mlm_probability=0.15, mask_replace_prob=0.8, random_replace_prob=0.1)
    chosen = dataclasses.replace(make_recipe(config, Facts), maskable_ids=np.arange(5, 1005))
    seen = corrupt(ids, ids > MASK, draw(7, 0, np.arange(1000), 1000), chosen)
    n = len(seen.positions)
    assert abs(n / 1e6 - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 1e6)
    became = seen.ids.reshape(-1)[seen.positions]
    assert abs((became == MASK).mean() - 0.8) < 5 * np.sqrt(0.8 * 0.2 / n)
    assert abs((became > 5).mean() - 0.1 * 0.999) < 5 * np.sqrt(0.1 * 0.9 / n)
    drawn = np.bincount(became[became > 5], minlength=1005)[6:]
    assert drawn.min() > 0  # each of 999 tokens is expected 15 times
    assert drawn.max() < 50


def test_probability_one_masks_every_ordinary_token_and_zero_none():
    ids = np.tile(np.arange(12), (50, 1))
    draws = draw(3, 0, np.arange(50), 12)
    assert len(corrupt(ids, ids > MASK, draws, recipe(select=0)).positions) == 0
    every = corrupt(ids, ids > MASK, draws, recipe(select=ALL))
    assert (every.ids[:, 5:] == MASK).all()
    assert (every.ids[:, :5] == ids[:, :5]).all()


@given(seed=seeds)
def test_special_tokens_are_never_masked_predicted_or_drawn(seed):
    ids = np.random.default_rng(seed).integers(0, 12, (4, 30))
    seen = corrupt(ids, ids > MASK, draw(seed, 0, np.arange(4), 30), recipe(ALL, replace=0, randomise=ALL))
    special = ids <= MASK
    assert (seen.ids[special] == ids[special]).all()
    assert (seen.targets > MASK).all()
    assert np.isin(seen.ids[~special], ORDINARY).all()


@given(seed=seeds)
def test_all_tokens_of_a_word_are_masked_together(seed):
    numbers = np.random.default_rng(seed)
    starts = numbers.random((4, 30)) < 0.4
    chosen = select(np.ones((4, 30), bool), draw(seed, 0, np.arange(4), 30), recipe(whole_word=True), starts)
    starts[:, 0] = True  # a chunk may begin inside a word
    for row, begins in zip(chosen, starts, strict=True):
        for word in np.split(row, np.flatnonzero(begins)[1:]):
            assert word.all() or not word.any()


@given(seed=seeds, lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_a_word_of_any_length_goes_by_the_draw_of_its_first_token(seed, lengths):
    first = np.cumsum([0, *lengths[:-1]])
    starts = np.zeros((1, sum(lengths)), bool)
    starts[0, first] = True
    draws = draw(seed, 0, np.arange(1), sum(lengths))
    chosen = select(np.ones_like(starts), draws, recipe(whole_word=True), starts)
    by_first = draws[0, first] >> np.uint64(32) < HALF
    assert chosen[0].tolist() == np.repeat(by_first, lengths).tolist()


def test_the_input_is_left_as_it_was():
    ids = np.full((2, 10), 6)
    corrupt(ids, ids > MASK, draw(0, 0, np.arange(2), 10), recipe(ALL))
    assert (ids == 6).all()


@given(seed=seeds, epoch=st.integers(0, 100), n=st.integers(1, 200))
def test_an_epochs_order_is_a_permutation(seed, epoch, n):
    assert sorted(shuffle(seed, epoch, n).tolist()) == list(range(n))


def test_epochs_have_different_orders():
    assert shuffle(1, 0, 50).tolist() != shuffle(1, 1, 50).tolist() != shuffle(2, 1, 50).tolist()


class Facts:
    """What make_recipe looks at of a tokenizer's facts."""

    mask_id = MASK
    maskable = np.arange(12) > MASK


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mlm_probability": 1.5}, "--mlm_probability 1.5: a probability lies between 0 and 1"),
        ({"mask_replace_prob": -0.1}, "--mask_replace_prob -0.1: a probability lies between 0 and 1"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "sum to more than 1"),
        ({"mlm_probability": float("nan")}, "a probability lies between 0 and 1"),
    ],
)
def test_probabilities_that_are_none_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        MaskingConfig(**wrong)
