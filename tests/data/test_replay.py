"""A mixture of sources is exact: which chunk of which source a place sees is a function of (seed, place) alone."""

import dataclasses
import re
from fractions import Fraction
from itertools import accumulate, chain, pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mlm.config import TrainConfig
from mlm.data.chunks import Chunks, Mixture, concatenate, line_by_line
from mlm.data.masking import SOURCE, draw, stream_key
from mlm.data.order import ReplayConfig, chunks_seen, seen_before
from mlm.errors import UserError
from tests.data.test_batches import batches, chunks
from tests.data.test_chunks import INFO
from tests.oracles import slow_order

few_shares = st.lists(st.integers(1, 10**9 - 1).map(lambda n: Fraction(n, 10**9)), min_size=1, max_size=4)


def slow_source(place, shares):
    """The number of the source at a place, in fractions, from the definition."""
    rest, before = Fraction(1), place
    for number, share in reversed([*enumerate(shares, 1)]):
        part = share / rest
        if (before + 1) * part // 1 > before * part // 1:
            return number
        before, rest = before - before * part // 1, rest - share
    return 0


def mixed(sizes, shares, **settings):
    """Batches of the domain, sizes[0] chunks, with a source of sizes[k] for each of the shares."""
    replay = [chunks(n) for n in sizes[1:]]
    return batches(sizes[0], replay=replay, shares={f"replay_{k}": s for k, s in enumerate(shares)}, **settings)


@given(shares=few_shares, first=st.integers(0, 10**15), count=st.integers(0, 60))
@example(shares=[Fraction(29, 100)], first=0, count=200)  # in floating point, 0.29 of 100 is less than 29
@example(shares=[Fraction(1, 3 * 10**8)], first=10**18, count=2)  # and 10**18 + 1 is no number
def test_which_source_a_place_has_is_what_the_fractions_say(shares, first, count):
    assume(sum(shares) < 1)
    before = seen_before(np.arange(first, first + count + 1), shares)
    assert (before.sum(axis=0) == np.arange(first, first + count + 1)).all()
    found = np.diff(before)
    assert (found.sum(axis=0) == 1).all()
    assert found.argmax(axis=0).tolist() == [slow_source(place, shares) for place in range(first, first + count)]


@given(shares=few_shares, first=st.integers(0, 10**12), steps=st.sampled_from([1, 10, 1000]), G=st.integers(1, 512))
def test_over_any_window_each_source_has_its_share_to_within_one_chunk(shares, first, steps, G):
    """Of two sources; a further one adds one chunk at most."""
    assume(sum(shares) < 1)
    begin, end = seen_before(np.array([first, first + steps * G]), shares).T.tolist()
    asked = [(1 - sum(shares)) * steps * G, *(share * steps * G for share in shares)]
    assert max(abs(e - b - wanted) for b, e, wanted in zip(begin, end, asked, strict=True)) < len(shares)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=3),
    G=st.integers(1, 30),
    seed=st.integers(0, 5),
    steps=st.integers(1, 9),
)
def test_each_source_is_read_epoch_by_epoch_in_an_order_of_its_own(sizes, G, seed, steps):
    own = mixed(sizes, [Fraction(1, 4), Fraction(1, 10)][: len(sizes) - 1], seed=seed, global_batch=G)
    seen, epochs = (np.concatenate(both) for both in zip(*map(own.places, range(steps)), strict=True))
    source = own.mixture.locate(seen)[0]
    for k, n in enumerate(sizes):
        mine = seen[source == k] - sum(sizes[:k])
        assert epochs[source == k].tolist() == [place // n for place in range(len(mine))]
        for epoch in range(len(mine) // n):
            assert sorted(mine[epoch * n : (epoch + 1) * n]) == list(range(n))
        assert own.epochs(steps)[("domain", "replay_0", "replay_1")[k]] == len(mine) / n
    assert (
        seen[source == 0].tolist() == chunks_seen(seed, np.arange((source == 0).sum()), sizes[0], sizes[0])[0].tolist()
    )


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    G=st.integers(1, 12),
    world=st.integers(1, 5),
    seed=st.integers(0, 5),
    step=st.integers(0, 3),
)
@example(sizes=[9, 5, 2], G=1, world=1, seed=1, step=4096)  # the first step of the second group
def test_each_process_sees_what_the_definition_says_place_by_place(sizes, G, world, seed, step):
    shares = [Fraction(1, 4), Fraction(1, 10)][: len(sizes) - 1]
    before, expected = [0] * len(sizes), []
    for place in range((step + 1) * G):
        k = slow_source(place, shares)
        epoch, there = divmod(before[k], sizes[k])
        before[k] += 1
        if place >= step * G:
            key = stream_key(seed, k, SOURCE) if k else seed
            expected.append((sum(sizes[:k]) + slow_order(key, epoch, sizes[k])[there], epoch))
    own, cuts = mixed(sizes, shares, seed=seed, global_batch=G), [-(-G * rank // world) for rank in range(world + 1)]
    found = [zip(*own.places(step, begin, end), strict=True) for begin, end in pairwise(cuts)]
    assert [*chain(*found)] == expected


def test_the_places_of_a_share_are_those_that_checkpoints_were_trained_on():
    """As computed one step after the other; from step 1024 on, shares of four are in another group of steps."""
    own = mixed([90, 20, 7], [Fraction(1, 4), Fraction(1, 10)], seed=3, global_batch=256, samples=50)
    for step, seen, epochs in (
        (1023, [31, 33, 99, 110], [3406, 3406, 3275, 3743]),
        (1024, [53, 62, 88, 97], [3409, 3409, 3409, 3278]),
        (10**6, [6, 111, 0, 90], [3328001, 3657144, 3328001, 3200001]),
    ):
        assert [each.tolist() for each in own.places(step, 128, 132)] == [seen, epochs]


def test_the_worked_example_of_the_module():
    own = mixed([5, 3], [Fraction(1, 4)])
    assert [own.places(step)[0].tolist() for step in (0, 1, 2)] == [[2, 4, 0, 7], [3, 1, 3, 5], [4, 1, 0, 6]]


def test_another_seed_and_another_source_have_another_order():
    def orders(seed):
        own = mixed([40, 40, 40], [Fraction(1, 3), Fraction(1, 3)], seed=seed, global_batch=120)
        seen, _ = own.places(0)
        return [(seen[own.mixture.locate(seen)[0] == k] % 40).tolist() for k in range(3)]

    first, other = orders(1), orders(2)
    assert len({tuple(order) for order in (*first, *other)}) == 6


@given(G=st.integers(1, 20), world=st.integers(1, 3), micro=st.integers(1, 6), step=st.integers(0, 4))
def test_processes_and_micro_batches_cut_a_mixture_without_changing_it(G, world, micro, step):
    settings = {"sizes": [7, 5, 3], "shares": [Fraction(1, 4), Fraction(1, 7)], "global_batch": G}
    [whole], masked = mixed(**settings).load(step, G)
    loads = [mixed(**settings, rank=rank, world=world).load(step, micro) for rank in range(world)]
    parts = [batch for share, _ in loads for batch in share]
    assert sum(count for _, count in loads) == masked
    for name in ("input_ids", "targets", "sources"):
        found = [getattr(batch, name).numpy() for batch in parts]
        assert np.concatenate(found).tolist() == getattr(whole, name).tolist()


def test_each_target_is_told_its_source():
    own = mixed([7, 5, 3], [Fraction(1, 4), Fraction(1, 4)], global_batch=16)
    [batch], _ = own.load(3, 16)
    expected = own.mixture.locate(own.places(3)[0])[0][batch.positions.numpy() // 6]
    assert batch.sources.tolist() == expected.tolist()
    assert set(expected) == {0, 1, 2}
    assert batches().load(0, 4)[0][0].sources is None


def test_the_domains_masks_are_those_without_replay_and_no_chunk_of_the_replay_has_them():
    """The replay is the same text, and its chunks are seen in the same epochs."""
    own = mixed([30, 30], [Fraction(1, 2)], global_batch=60)
    masks = own.mask(0, np.arange(60), np.zeros(60, int))
    alone = batches(30).mask(0, np.arange(30), np.zeros(30, int))
    rows = masks.positions.numpy() // 6
    assert masks.positions[rows < 30].tolist() == alone.positions.tolist()
    assert masks.input_ids[:30].tolist() == alone.input_ids.tolist()
    again = masks.positions[rows >= 30] - 30 * 6
    shared = len(set(again.tolist()) & set(alone.positions.tolist()))
    assert shared < 0.7 * len(again)  # half of the positions are masked, so that a half of these is by chance
    assert len(np.unique(draw(1, 0, np.arange(60), 6))) == 360


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), chosen=st.lists(st.integers(0, 99), max_size=9))
def test_rows_of_several_sources_are_those_of_each(lengths, chosen):
    """Full ones, one with a padded end, and documents of several lengths."""
    ids, offsets = np.arange(1, sum(lengths) + 1).astype(np.uint16), np.array([0, *accumulate(lengths)])
    starts = np.ones(len(ids), bool)
    padded, documents = concatenate(ids, starts, 4, 0, "pad"), line_by_line(ids, starts, offsets, 4, INFO)
    mixture = Mixture((chunks(5, 4), padded, documents))
    chunk_ids = np.array([number % (5 + len(padded) + len(documents)) for number in chosen], int)
    rows = mixture.take(chunk_ids)
    for row, chunk in enumerate(chunk_ids):
        [k], there = mixture.locate(np.array([chunk]))
        alone = mixture.sources[k].take(there)
        n = alone.ids.shape[1]
        assert rows.ids[row].tolist() == alone.ids[0].tolist() + [0] * (rows.ids.shape[1] - n)
        assert rows.word_starts[row, :n].tolist() == alone.word_starts[0].tolist()
        assert rows.lengths[row] == (n if alone.lengths is None else alone.lengths[0])


def test_epochs_are_those_of_the_domain():
    train = TrainConfig(num_train_epochs=2)
    own = mixed([90, 20], [Fraction(1, 10)], global_batch=10)
    steps = train.steps(90, 10 * Fraction(9, 10))
    assert steps == 20
    assert own.epochs(steps) == {"domain": 2.0, "replay_0": 1.0}
    assert [step for step in range(1, 21) if own.due("epoch", step)] == [10, 20]


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, {}),
        ({"replay_file": "a"}, {"replay": Fraction(1, 10)}),
        ({"replay_file": ("a", "b")}, {"replay": Fraction(1, 10)}),
        ({"replay_file": ("a", "b"), "replay_share": (0.1, 0.25)},
         {"replay_1": Fraction(1, 10), "replay_2": Fraction(1, 4)}),
    ],
)  # fmt: skip
def test_shares_are_exact_and_one_share_is_that_of_all_files(settings, shares):
    assert ReplayConfig(**settings).shares == shares


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"replay_share": 0.0}, "--replay_share 0.0: more than 0 each"),
        ({"replay_share": 1.0}, "less than 1 together"),
        ({"replay_share": float("nan")}, "more than 0 each"),
        ({"replay_share": (0.5, 0.5)}, "less than 1 together"),
        ({"replay_share": (0.1, 0.1)}, "2 shares of 1 files"),
    ],
)
def test_shares_that_cannot_be_are_refused(settings, reason):
    with pytest.raises(UserError, match=reason):
        ReplayConfig(replay_file="a", **settings)


@pytest.mark.parametrize("share", [0.2, (0.1, 0.2)])
def test_a_share_of_no_text_is_refused(share):
    with pytest.raises(UserError, match=re.escape(f"--replay_share {share}: of which text? give --replay_file")):
        ReplayConfig(replay_share=share)


def test_one_source_alone_is_taken_as_a_view():
    one = Mixture((chunks(5),))
    assert one.take(np.arange(5)).lengths is None
    assert dataclasses.is_dataclass(Chunks)
