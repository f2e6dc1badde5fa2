"""Masks are a pure function of (seed, epoch, chunk id, position) and the recipe (invariants 1, 6 and 7)."""

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
    draw,
    draw_torch,
    make_recipe,
    mix_int64,
    select_fold,
    select_tokens,
    select_words,
    select_words_torch,
)
from mlm.errors import UserError
from tests.oracles import slow_corrupt, slow_draw, slow_select, slow_select_fold

ALL = 1 << 32  # the threshold of a share of 1
MASK, MASKABLE = 4, np.arange(5, 12)  # of twelve tokens, 0 to 4 are special


def recipe(replace=ALL, randomise=ALL):
    return Recipe(replace, randomise, MASK, MASKABLE)


def upper(shares):
    """Draws whose upper half, which selection looks at, is the given share of 2**32."""
    return (np.array(shares) * 2.0**32).astype(np.uint64) << np.uint64(32)


def test_the_worked_example_of_the_module():
    #                       [CLS]    the    film    ##s   [SEP]
    ids = np.array([[           2,     5,      6,     7,     3]])  # fmt: skip
    maskable = np.array([[      0,     1,      1,     1,     0]], bool)  # fmt: skip
    word_starts = np.array([[   1,     1,      1,     0,     1]], bool)  # fmt: skip
    draws = upper([[          0.1,   0.2,    0.9,   0.3,   0.4]])  # fmt: skip

    tokens = select_tokens(maskable, draws, 0.5)
    assert tokens.tolist() == [[0, 1, 0, 1, 0]]
    assert select_words(maskable, draws, 0.5, word_starts).tolist() == [[0, 1, 0, 0, 0]]
    assert select_fold(maskable, draws, None, 0, 2).tolist() == [[0, 1, 1, 0, 0]]
    assert select_fold(maskable, draws, None, 1, 2).tolist() == [[0, 0, 0, 1, 0]]

    corrupted = corrupt(ids, tokens, draws, recipe())
    assert corrupted.ids.tolist() == [[2, MASK, 6, MASK, 3]]
    assert corrupted.positions.tolist() == [1, 3]
    assert corrupted.targets.tolist() == [5, 7]


def test_the_finalizer_is_splitmix64s():
    """The first three outputs for seed 1234567, as published with the reference implementation."""
    states = np.array([(1234567 + i * GOLDEN) % 2**64 for i in (1, 2, 3)], np.uint64).view(np.int64)
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix_int64(states.copy()).view(np.uint64).tolist() == outputs
    assert mix_int64(torch.from_numpy(states)).numpy().view(np.uint64).tolist() == outputs


seeds = st.integers(0, 2**63 - 1)
rates = st.sampled_from([0.0, 0.15, 0.5, 1.0])


@given(seed=seeds, epoch=st.integers(0, 2**31), chunks=st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_numpy_and_torch_draw_the_bits_of_the_definition(seed, epoch, chunks):
    fast = draw(seed, epoch, np.array(chunks), 7)
    assert fast.tolist() == slow_draw(seed, epoch, chunks, 7)
    assert draw_torch(seed, epoch, torch.tensor(chunks), 7).numpy().view(np.uint64).tolist() == fast.tolist()


def toy_batch(seed):
    """ids, maskable, word_starts and draws, all [3, 20]; chunks may begin inside a word."""
    numbers = np.random.default_rng(seed)
    ids = numbers.integers(0, 12, (3, 20))
    return ids, ids > MASK, numbers.random((3, 20)) < 0.6, draw(seed, 0, np.arange(3), 20)


def signed(draws):
    return torch.from_numpy(draws.view(np.int64))


@given(seed=seeds, rate=rates)
def test_numpy_and_torch_select_the_tokens_of_the_definition(seed, rate):
    _, maskable, _, draws = toy_batch(seed)
    expected = slow_select(maskable.tolist(), draws.tolist(), rate)
    assert select_tokens(maskable, draws, rate).tolist() == expected
    assert select_tokens(torch.from_numpy(maskable), signed(draws), rate).tolist() == expected


@given(seed=seeds, rate=rates)
def test_numpy_and_torch_select_the_words_of_the_definition(seed, rate):
    _, maskable, starts, draws = toy_batch(seed)
    expected = slow_select(maskable.tolist(), draws.tolist(), rate, starts.tolist())
    assert select_words(maskable, draws, rate, starts).tolist() == expected
    tensors = torch.from_numpy(maskable), signed(draws), rate, torch.from_numpy(starts)
    assert select_words_torch(*tensors).tolist() == expected


@given(seed=seeds, folds=st.integers(2, 9), whole_words=st.booleans())
def test_folds_are_those_of_the_definition_and_partition_the_maskable_tokens(seed, folds, whole_words):
    _, maskable, starts, draws = toy_batch(seed)
    starts = starts if whole_words else None
    selected = [select_fold(maskable, draws, starts, fold, folds) for fold in range(folds)]
    for fold, ours in enumerate(selected):
        words = starts.tolist() if whole_words else None
        assert ours.tolist() == slow_select_fold(maskable.tolist(), draws.tolist(), words, fold, folds)
    assert (np.sum(selected, axis=0) == maskable).all()


@given(seed=seeds, rate=rates, mask=st.sampled_from([0, 0.8, 1]))
def test_numpy_and_torch_corrupt_as_the_definition_does(seed, rate, mask):
    ids, maskable, _, draws = toy_batch(seed)
    chosen = recipe(round(mask * ALL), round((1 + mask) / 2 * ALL))
    selected = select_tokens(maskable, draws, rate)

    ours = corrupt(ids, selected, draws, chosen)
    expected = slow_corrupt(ids.tolist(), selected.tolist(), draws.tolist(), chosen)
    assert (ours.ids.tolist(), ours.positions.tolist(), ours.targets.tolist()) == expected

    on_torch = corrupt(torch.from_numpy(ids), torch.from_numpy(selected), signed(draws), chosen)
    assert tuple(tensor.tolist() for tensor in on_torch) == expected


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


def test_the_order_of_chunks_and_their_masks_have_different_draws():
    assert not (draw(1, 0, np.zeros(1, int), 64, ORDER) == draw(1, 0, np.zeros(1, int), 64, MASKS)).any()


@given(seed=seeds, low=st.floats(0, 1), high=st.floats(0, 1))
def test_the_set_masked_at_a_lower_rate_is_a_subset_of_the_set_at_a_higher_rate(seed, low, high):
    low, high = sorted((low, high))
    everything, draws = np.ones((4, 50), bool), draw(seed, 0, np.arange(4), 50)
    starts = draw(seed + 1, 0, np.arange(4), 50) % np.uint64(3) == 0
    assert (select_tokens(everything, draws, low) <= select_tokens(everything, draws, high)).all()
    few, many = (select_words(everything, draws, rate, starts) for rate in (low, high))
    assert (few <= many).all()


class Info:
    """What make_recipe reads of a TokenizerInfo."""

    mask_id = MASK
    maskable = np.arange(1005) > MASK


def test_the_shares_are_the_ones_asked_for():
    """10^6 tokens: a share of p is met to five standard deviations, 5 * sqrt(p (1 - p) / n)."""
    ids, draws = np.full((1000, 1000), 5), draw(7, 0, np.arange(1000), 1000)
    seen = corrupt(ids, select_tokens(ids > MASK, draws, 0.15), draws, make_recipe(Info, 0.8, 0.1))
    n = len(seen.positions)
    assert abs(n / 1e6 - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 1e6)
    became = seen.ids.reshape(-1)[seen.positions]
    assert abs((became == MASK).mean() - 0.8) < 5 * np.sqrt(0.8 * 0.2 / n)
    assert abs((became > 5).mean() - 0.1 * 0.999) < 5 * np.sqrt(0.1 * 0.9 / n)
    drawn = np.bincount(became[became > 5], minlength=1005)[6:]
    assert drawn.min() > 0  # each of 999 tokens is expected 15 times
    assert drawn.max() < 50


def test_rate_one_masks_every_maskable_token_and_zero_none():
    ids = np.tile(np.arange(12), (50, 1))
    draws = draw(3, 0, np.arange(50), 12)
    assert not select_tokens(ids > MASK, draws, 0.0).any()
    every = corrupt(ids, select_tokens(ids > MASK, draws, 1.0), draws, recipe())
    assert (every.ids[:, 5:] == MASK).all()
    assert (every.ids[:, :5] == ids[:, :5]).all()


@given(seed=seeds)
def test_special_tokens_are_never_masked_predicted_or_drawn(seed):
    ids = np.random.default_rng(seed).integers(0, 12, (4, 30))
    draws, starts = draw(seed, 0, np.arange(4), 30), np.ones((4, 30), bool)
    for selected in (
        select_tokens(ids > MASK, draws, 1.0),
        select_words(ids > MASK, draws, 1.0, starts),
        select_fold(ids > MASK, draws, None, 0, 1),
    ):
        seen = corrupt(ids, selected, draws, recipe(replace=0, randomise=ALL))
        special = ids <= MASK
        assert (seen.ids[special] == ids[special]).all()
        assert (seen.targets > MASK).all()
        assert np.isin(seen.ids[~special], MASKABLE).all()


@given(seed=seeds)
def test_all_tokens_of_a_word_are_masked_together(seed):
    numbers = np.random.default_rng(seed)
    starts = numbers.random((4, 30)) < 0.4
    chosen = select_words(np.ones((4, 30), bool), draw(seed, 0, np.arange(4), 30), 0.5, starts)
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
    chosen = select_words(np.ones_like(starts), draws, 0.5, starts)
    by_first = draws[0, first] >> np.uint64(32) < ALL // 2
    assert chosen[0].tolist() == np.repeat(by_first, lengths).tolist()


def test_the_input_is_left_as_it_was():
    ids, starts = np.full((2, 10), 6), np.zeros((2, 10), bool)
    draws = draw(0, 0, np.arange(2), 10)
    before = draws.copy()
    corrupt(ids, select_words(ids > MASK, draws, 1.0, starts), draws, recipe())
    assert (ids == 6).all() and not starts.any() and (draws == before).all()


def test_recipes_that_corrupt_differently_have_different_digests():
    info = Info()
    recipes = [make_recipe(info), make_recipe(info, 0.7), make_recipe(info, 0.8, 0.2), recipe()]
    assert len({each.digest for each in recipes}) == 4
    assert make_recipe(info).digest == make_recipe(info, 0.8, 0.1).digest


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
