"""Which chunks a step sees is a pure function of (seed, step), however the work is cut."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlm.data.batches import Batches, mask_chunks
from mlm.data.chunks import Chunks
from mlm.data.masking import Recipe
from mlm.data.order import shuffle, subset

ORDINARY = np.arange(100) > 4
RECIPE = Recipe(1 << 31, 1 << 32, 1 << 32, mask_id=4, maskable_ids=np.arange(5, 100), whole_word=False)


def chunks(n, length=6):
    """Chunk c holds the token c + 5 throughout, so that a batch shows which chunks it has."""
    ids = np.repeat(np.arange(n) + 5, length).astype(np.uint16)
    return Chunks(ids, np.ones(len(ids), bool), length, n, pad_id=0)


def batches(n=10, seed=1, global_batch=4, **more):
    return Batches(chunks(n), RECIPE, ORDINARY, seed, global_batch, **more)


def test_a_worked_example():
    """Five chunks, four a step: the second step takes the last of epoch 0 and three of epoch 1."""
    first, second = shuffle(1, 0, 5).tolist(), shuffle(1, 1, 5).tolist()
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
    [whole], masked = batches(n, global_batch=G).load(step, G)
    parts = []
    for rank in range(world):
        share, count = batches(n, global_batch=G, rank=rank, world=world).load(step, micro)
        assert count == masked  # each process knows the count of all
        assert all(len(batch.input_ids) <= micro for batch in share)
        assert sum(len(batch.input_ids) for batch in share) in (G // world, -(-G // world))
        parts += share
    assert np.concatenate([batch.input_ids for batch in parts]).tolist() == whole.input_ids.tolist()
    assert np.concatenate([batch.targets for batch in parts]).tolist() == whole.targets.tolist()


def test_a_process_whose_share_is_empty_has_no_batch_but_knows_the_count():
    share, masked = batches(global_batch=2, rank=0, world=4).load(0, 4)
    assert share == []
    assert masked == batches(global_batch=2).load(0, 4)[1] > 0


def test_a_chunk_is_masked_anew_in_each_epoch():
    first = mask_chunks(chunks(8), np.arange(8), np.zeros(8, int), 1, RECIPE, ORDINARY)
    second = mask_chunks(chunks(8), np.arange(8), np.ones(8, int), 1, RECIPE, ORDINARY)
    assert first.positions.tolist() != second.positions.tolist()


def test_rows_of_two_epochs_in_one_batch_have_each_their_own_masks():
    ids, epochs = np.array([3, 3, 2]), np.array([0, 1, 1])
    together = mask_chunks(chunks(8), ids, epochs, 1, RECIPE, ORDINARY)
    alone = [mask_chunks(chunks(8), ids[[i]], epochs[[i]], 1, RECIPE, ORDINARY) for i in range(3)]
    assert together.input_ids.tolist() == [batch.input_ids[0].tolist() for batch in alone]


def test_a_sample_is_drawn_by_the_seed_and_kept_for_every_epoch():
    few = batches(n=50, samples=8)
    seen = [set(few.places(step)[0].tolist()) for step in range(4)]
    assert seen[0] | seen[1] == seen[2] | seen[3] == set(subset(1, 50, 8).tolist())
    assert subset(1, 50, 8).tolist() != subset(2, 50, 8).tolist()
    assert subset(1, 50, None).tolist() == subset(1, 50, 99).tolist() == list(range(50))


def test_padding_is_never_predicted_and_full_rows_carry_no_attention_mask():
    ids = np.arange(5, 15).astype(np.uint16)
    padded = Chunks(ids, np.ones(10, bool), 6, 2, pad_id=0, lengths=np.array([6, 4]))
    every = Recipe(1 << 32, 1 << 32, 1 << 32, 4, RECIPE.maskable_ids, False)
    batch = mask_chunks(padded, np.array([0, 1]), np.zeros(2, int), 0, every, ORDINARY)
    assert batch.attention_mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert batch.targets.tolist() == list(range(5, 15))
    assert mask_chunks(padded, np.array([0]), np.zeros(1, int), 0, every, ORDINARY).attention_mask is None
