"""Which chunks a step sees is a pure function of (seed, step), however the work is cut."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.data import order
from mlm.data.batches import Batches, mask_chunks
from mlm.data.chunks import Chunks
from mlm.data.masking import Recipe, select_tokens
from mlm.data.order import AT_ONCE, mixture_seen, subset
from tests.oracles import slow_order

MASKABLE = np.arange(100) > 4
RECIPE = Recipe(1 << 32, 1 << 32, mask_id=4, maskable_ids=np.arange(5, 100))


def chunks(n, length=6):
    """Chunk c holds the token c + 5 throughout, so that a batch shows which chunks it has."""
    ids = np.repeat(np.arange(n) + 5, length).astype(np.uint16)
    return Chunks(ids, np.ones(len(ids), bool), length, n, pad_id=0)


def select(maskable, draws, rate, word_starts):
    return select_tokens(maskable, draws, rate)


def batches(n=10, seed=1, global_batch=4, rate=lambda step: 0.5, **more):
    return Batches(chunks(n), RECIPE, MASKABLE, select, rate, seed, global_batch, **more)


def masked(chunks, chunk_ids, epochs, rate=0.5):
    def selection(maskable, draws, word_starts):
        return select_tokens(maskable, draws, rate)

    return mask_chunks(chunks, np.array(chunk_ids), np.array(epochs), 1, MASKABLE, RECIPE, selection)


def test_the_worked_example_of_the_module():
    steps = [batches(n=5).places(step) for step in (0, 1)]
    assert [chunk_ids.tolist() for chunk_ids, _ in steps] == [[2, 4, 0, 3], [1, 3, 4, 1]]
    assert [epochs.tolist() for _, epochs in steps] == [[0, 0, 0, 0], [0, 1, 1, 1]]
    for step, expected in ((0, [[2, 4], [0, 3]]), (1, [[1, 3], [4, 1]])):
        shares = [batches(n=5, rate=lambda _: 0, rank=rank, world=2).load(step, 4)[0] for rank in (0, 1)]
        assert [(batch.input_ids[:, 0] - 5).tolist() for [batch] in shares] == expected


def test_a_step_that_reaches_into_the_next_epoch_takes_both_orders():
    first, second = slow_order(1, 0, 5), slow_order(1, 1, 5)
    chunk_ids, epochs = batches(n=5).places(1)
    assert chunk_ids.tolist() == [first[4], *second[:3]]
    assert epochs.tolist() == [0, 1, 1, 1]


@given(n=st.integers(1, 20), G=st.integers(1, 30), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_every_epoch_sees_every_chunk_once(n, G, seed, epochs):
    """A corpus smaller than one batch works too."""
    steps = -(-epochs * n // G)
    seen = np.concatenate([batches(n, seed, G).places(step)[0] for step in range(steps)])
    assert len(seen) == steps * G
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(
    n=st.integers(1, 20),
    G=st.integers(1, 20),
    world=st.integers(1, 5),
    micro=st.integers(1, 6),
    step=st.integers(0, 4),
)
def test_processes_and_micro_batches_cut_the_global_batch_without_changing_it(n, G, world, micro, step):
    [whole], count_of_all = batches(n, global_batch=G).load(step, G)
    parts, counts = [], []
    for rank in range(world):
        share, count = batches(n, global_batch=G, rank=rank, world=world).load(step, micro)
        counts.append(count)
        assert all(len(batch.input_ids) <= micro for batch in share)
        assert sum(len(batch.input_ids) for batch in share) in (G // world, -(-G // world))
        parts += share
    assert sum(counts) == count_of_all == len(whole.positions)
    assert sum(batch.tokens for batch in parts) == whole.tokens == 6 * G
    assert np.concatenate([batch.input_ids for batch in parts]).tolist() == whole.input_ids.tolist()
    assert np.concatenate([batch.targets for batch in parts]).tolist() == whole.targets.tolist()


def test_a_process_whose_share_is_empty_has_no_batch():
    assert batches(global_batch=2, rank=1, world=4).load(0, 4) == ([], 0)


def test_a_process_takes_and_masks_its_own_share_alone_however_many_there_are():
    @dataclasses.dataclass(frozen=True)
    class Counted(Chunks):
        def take(self, chunk_ids):
            taken.append(len(chunk_ids))
            return super().take(chunk_ids)

    def counted(maskable, draws, rate, word_starts):
        selected.append(len(draws))
        return select_tokens(maskable, draws, rate)

    for world in (1, 8, 512):
        taken, selected = [], []
        own = batches(n=90, global_batch=3 * world, rank=world // 2, world=world)
        own = dataclasses.replace(own, chunks=Counted(**vars(own.chunks)), select=counted)
        assert len(own.load(5, 2)[0]) == 2
        assert taken == selected == [2, 1]


def own_places(own, step):
    """The chunk ids and epochs of a process's share, which is as large as each other's."""
    share = own.global_batch // own.world
    return own.places(step, own.rank * share, (own.rank + 1) * share)


@pytest.mark.parametrize(
    ("seed", "n", "samples", "world", "at_1023", "at_1024"),
    [
        (1, 5, None, 2, ([4, 1, 1, 0], [1637, 1637, 1638, 1638]), ([0, 4, 3, 1], [1639] * 4)),
        (7, 10**6, None, 64, ([376904, 187074, 369597, 259487], [0] * 4), ([998843, 673082, 705943, 543245], [0] * 4)),
        (7, 10**6, 40, 512,
         ([305654, 483111, 506137, 819642], [52403] * 4), ([567166, 750952, 1918, 187801], [52454] * 4)),
    ],
)  # fmt: skip
def test_the_places_of_a_share_are_those_that_checkpoints_were_trained_on(seed, n, samples, world, at_1023, at_1024):
    """As computed one step after the other; from step 1024 on, shares of four are in another group of steps."""
    own = dataclasses.replace(batches(5, seed, 4 * world, rank=world // 2, world=world), samples=samples)
    own = dataclasses.replace(own, chunks=dataclasses.replace(own.chunks, num_chunks=n))
    for step, expected in ((1023, at_1023), (1024, at_1024), (1023, at_1023)):
        assert tuple(each.tolist() for each in own_places(own, step)) == expected


def test_a_process_computes_the_places_of_its_own_share_alone_however_many_there_are(monkeypatch):
    def counted(places, n, keys):
        computed.append(len(places))
        return permute(places, n, keys)

    permute = order.permute
    monkeypatch.setattr(order, "permute", counted)
    for share, world in ((64, 1), (64, 8), (64, 64), (64, 512), (1, 4096), (3 * AT_ONCE, 2)):
        computed, own = [], batches(90, 11, share * world, rank=world // 2, world=world)
        steps = 2 * max(AT_ONCE // share, 1)
        for step in range(steps):
            own_places(own, step)
        assert sum(computed) == steps * share
        assert len(computed) == 2, "and by few calls"


def test_what_places_cost_in_memory_depends_on_neither_the_chunks_nor_the_processes():
    def memory(n, world):
        own = batches(5, 12, 32 * world, rank=world // 2, world=world)
        own = dataclasses.replace(own, chunks=dataclasses.replace(own.chunks, num_chunks=n))
        mixture_seen.cache_clear()
        tracemalloc.start()
        own_places(own, 10**6)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    memory(10, 1)
    assert memory(10**9, 4096) < 1.1 * memory(10**4, 1)


def test_what_a_caller_writes_into_places_is_not_kept():
    own = batches(90, 13)
    seen, _ = own.places(0)
    before = seen.tolist()
    seen[:] = -1
    assert own.places(0)[0].tolist() == before


@given(rate=st.floats(0.02, 1), G=st.integers(1, 500), length=st.integers(4, 60), pad=st.booleans())
def test_what_losses_are_divided_by_is_near_the_masked_tokens_and_known_to_each_process(rate, G, length, pad):
    """To a factor of two, where there are enough for their mean; it is a power of two, by which no bit is lost."""
    own = dataclasses.replace(batches(n=40, global_batch=G, rate=lambda step: rate), chunks=chunks(40, length))
    if pad:  # documents of two lengths
        offsets = np.cumsum([0, *[length, length - length // 2] * 20])
        text = {"ids": own.chunks.ids[: offsets[-1]], "word_starts": own.chunks.word_starts[: offsets[-1]]}
        own = dataclasses.replace(own, chunks=dataclasses.replace(own.chunks, **text, document_offsets=offsets))
    others = dataclasses.replace(own, rank=3, world=5)
    masked = own.load(0, G)[1]
    assert own.expected(0) == others.expected(0)
    assert own.expected(0).bit_count() == 1
    assert masked < 50 or 0.5 < own.expected(0) / masked < 2


def test_the_rate_and_the_selection_are_those_of_the_step():
    def first_columns(maskable, draws, rate, word_starts):
        return maskable & (np.arange(maskable.shape[1]) < rate)

    for rank in (0, 1):
        own = batches(rate=lambda step: step + 1, rank=rank, world=2)
        own = dataclasses.replace(own, select=first_columns)
        for step in (0, 1, 2):
            [batch], count = own.load(step, 4)
            assert (batch.positions.numpy() % 6).tolist() == [*range(step + 1)] * 2
            assert count == 2 * (step + 1)


def test_a_chunk_is_masked_anew_in_each_epoch():
    first, second = (masked(chunks(8), range(8), [epoch] * 8) for epoch in (0, 1))
    assert first.positions.tolist() != second.positions.tolist()


def test_rows_of_two_epochs_in_one_batch_have_each_their_own_masks():
    together = masked(chunks(8), [3, 3, 2], [0, 1, 1])
    alone = [masked(chunks(8), [chunk], [epoch]) for chunk, epoch in ((3, 0), (3, 1), (2, 1))]
    assert together.input_ids.tolist() == [batch.input_ids[0].tolist() for batch in alone]


def test_a_sample_is_drawn_by_the_seed_and_kept_for_every_epoch():
    few = batches(n=50, samples=8)
    seen = [set(few.places(step)[0].tolist()) for step in range(4)]
    assert seen[0] | seen[1] == seen[2] | seen[3] == set(subset(1, 50, 8).tolist())


def test_padding_is_never_predicted_and_full_rows_carry_no_attention_mask():
    ids = np.arange(5, 15).astype(np.uint16)
    padded = Chunks(ids, np.ones(10, bool), 6, 2, pad_id=0)
    batch = masked(padded, [0, 1], [0, 0], rate=1)
    assert batch.attention_mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch.targets.tolist() == list(range(5, 15))
    assert batch.tokens == 10
    assert masked(padded, [0], [0], rate=1).attention_mask is None
