"""An epoch's order is a permutation by (seed, epoch), and a sample of chunks is drawn by the seed."""

from hypothesis import given
from hypothesis import strategies as st

from mlm.data.order import epoch_order, shuffle, subset

seeds = st.integers(0, 2**63 - 1)


@given(seed=seeds, epoch=st.integers(0, 100), n=st.integers(1, 200))
def test_an_epochs_order_is_a_permutation(seed, epoch, n):
    assert sorted(shuffle(seed, epoch, n).tolist()) == list(range(n))


def test_epochs_have_different_orders():
    assert shuffle(1, 0, 50).tolist() != shuffle(1, 1, 50).tolist() != shuffle(2, 1, 50).tolist()


@given(seed=seeds, epoch=st.integers(0, 100), n=st.integers(1, 100), samples=st.integers(1, 120))
def test_an_epoch_sees_each_chunk_of_the_sample_once(seed, epoch, n, samples):
    sample = subset(seed, n, samples)
    assert len(sample) == min(n, samples)
    assert sorted(epoch_order(seed, epoch, n, len(sample)).tolist()) == sample.tolist()


def test_a_sample_is_drawn_by_the_seed_and_ascends():
    assert subset(1, 50, 8).tolist() == sorted(set(subset(1, 50, 8).tolist()))
    assert subset(1, 50, 8).tolist() != subset(2, 50, 8).tolist()
    assert subset(1, 50, None).tolist() == subset(1, 50, 99).tolist() == list(range(50))
