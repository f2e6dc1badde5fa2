"""Evaluations go into a checkpoint and come out of it to the bit."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from mlm.evaluation.evaluate import GRID, Evaluation, Evaluations


def evaluation(rng: np.random.Generator, M: int) -> Evaluation:
    places = rng.integers(0, 1 << 30, (4, M)).astype(np.int32)
    return Evaluation(*places, rng.integers(0, 1 << 30, M) / GRID, rng.random(M) < 0.5)


@given(
    st.dictionaries(st.sampled_from(["held_out", "out_of_domain", "a.b", ""]), st.integers(0, 20)),
    st.integers(0, 2**32),
)
def test_evaluations_come_back_from_a_file_of_tensors_to_the_bit(sizes, seed):
    rng = np.random.default_rng(seed)
    saved = Evaluations({name: evaluation(rng, M) for name, M in sizes.items()})
    loaded = Evaluations(stale=evaluation(rng, 3))
    loaded.load_state_dict(load(save(saved.state_dict())))
    assert loaded.keys() == saved.keys()
    for name, columns in saved.items():
        for mine, its in zip(columns, loaded[name], strict=True):
            assert mine.dtype == its.dtype
            assert mine.tobytes() == its.tobytes()
