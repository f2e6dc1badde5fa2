"""Documents that share rows: the same documents, masks and targets, in fewer rows."""

import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlm.data.batches import Batches
from mlm.data.chunks import ChunkConfig, Chunks
from mlm.data.masking import Recipe, select_tokens
from mlm.data.packing import pack
from mlm.errors import UserError

SIZE = 8
MASKABLE = np.arange(1000) > 4
RECIPE = Recipe(1 << 32, 1 << 32, mask_id=4, maskable_ids=np.arange(5, 1000))
lengths = st.lists(st.integers(1, SIZE), min_size=1, max_size=40)


def slow_pack(lengths, size):
    """The rows as lists of documents: the longest first, each into the row with the least room that it fits in."""
    rows = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        room = [size - sum(lengths[d] for d in row) for row in rows]
        fitting = [number for number in range(len(rows)) if room[number] >= lengths[document]]
        if fitting:
            rows[min(fitting, key=lambda number: room[number])].append(document)
        else:
            rows.append([document])
    return rows


def test_the_worked_example_of_the_module():
    row, column = pack(np.array([3, 5, 2, 4, 2]), 8)
    assert row.tolist() == [0, 0, 1, 1, 1]
    assert column.tolist() == [5, 0, 4, 0, 6]


@given(lengths)
def test_packing_is_the_slow_ones_and_no_documents_overlap(lengths):
    row, column = pack(np.array(lengths), SIZE)
    taken = [(r, c + i) for r, c, n in zip(row, column, lengths, strict=True) for i in range(n)]
    assert len(set(taken)) == len(taken) == sum(lengths)
    assert all(c < SIZE for _, c in taken)
    by_row = [sorted(np.flatnonzero(row == r), key=lambda d: column[d]) for r in range(row.max() + 1)]
    assert by_row == slow_pack(lengths, SIZE)


def test_a_document_costs_as_much_among_many():
    def seconds(documents):
        many = np.random.default_rng(0).integers(1, 129, documents)
        tries = []
        for _ in range(3):
            began = time.process_time()
            pack(many, 128)
            tries.append(time.process_time() - began)
        return min(tries) / documents

    assert seconds(100_000) < 3 * seconds(1_000)  # 1.3; 4.5 where all rows stand in one sorted list


def test_no_document_takes_no_row():
    assert [each.tolist() for each in pack(np.array([], np.int64), SIZE)] == [[], []]


def documents(lengths, first=5):
    """Documents of these lengths, no token of which is another's."""
    ids = np.arange(first, first + sum(lengths)).astype(np.uint16)
    offsets = np.cumsum([0, *lengths])
    return Chunks(ids, np.ones(len(ids), bool), SIZE, len(lengths), pad_id=0, document_offsets=offsets)


def batches(lengths, rate=0.5, **more):
    def select(maskable, draws, rate, word_starts):
        return select_tokens(maskable, draws, rate)

    given = {"seed": 1, "global_batch": len(lengths), "pack": True, **more}
    return Batches(documents(lengths), RECIPE, MASKABLE, select, lambda step: rate, **given)


def test_a_row_shows_its_documents_by_number_and_its_padding_as_zero():
    [batch], masked = batches([3, 5, 2, 4, 1], rate=0).load(0, 4)
    assert masked == 0
    assert batch.input_ids.tolist() == [[8, 9, 10, 11, 12, 5, 6, 7], [15, 16, 17, 18, 13, 14, 19, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 3, 0]]
    assert batch.attention_mask.dtype == torch.int32, "by which a model knows them from padding alone"
    assert batch.tokens == 15


def test_documents_that_fill_their_rows_are_not_marked():
    share, _ = batches([8, 8, 3, 3]).load(0, 2)
    assert [batch.attention_mask is None for batch in share] == [True, False]


def test_rows_are_as_wide_as_the_fullest_unless_shapes_are_to_be_static():
    few = batches([2, 3])
    static = replace(few, chunks=replace(few.chunks, pad_to_max_length=True))
    assert [own.load(0, 1)[0][0].input_ids.shape for own in (few, static)] == [(1, 5), (1, 8)]


def texts(share):
    """Each document of a share, as it is after masking, with its targets by their places in it."""
    found = []
    for batch in share:
        documents = batch.attention_mask
        documents = torch.ones_like(batch.input_ids) if documents is None else documents
        target = torch.zeros_like(batch.input_ids).view(-1)
        target[batch.positions] = batch.targets
        assert batch.positions.tolist() == sorted(batch.positions.tolist())
        for ids, numbers, targets in zip(batch.input_ids, documents, target.view_as(batch.input_ids), strict=True):
            for number in range(1, int(numbers.max()) + 1):
                own = numbers == number
                found.append((ids[own].tolist(), targets[own].tolist()))
    return sorted(found)


@given(lengths, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2))
def test_documents_masks_and_targets_are_those_of_padded_rows_however_they_are_cut(lengths, micro, world, step):
    G = max(len(lengths) // 2, 1)
    padded, count = batches(lengths, global_batch=G, pack=False).load(step, G)
    packed, counts = [], []
    for rank in range(world):
        own = batches(lengths, global_batch=G, rank=rank, world=world)
        share, masked = own.load(step, micro)
        assert all(len(batch.input_ids) <= micro and batch.input_ids.shape[1] <= SIZE for batch in share)
        whole, _ = own.load(step, 40)
        assert sum(map(len, (b.input_ids for b in share))) == sum(map(len, (b.input_ids for b in whole)))
        assert texts(share) == texts(whole), (
            "rows do not depend on the micro-batch, which running out of memory halves"
        )
        packed, counts = packed + share, [*counts, masked]
    assert texts(packed) == texts(padded)
    assert sum(counts) == count
    assert sum(batch.tokens for batch in packed) == sum(batch.tokens for batch in padded)


def test_targets_of_a_mixture_keep_their_sources():
    replay = [documents([2, 7, 3, 4], first=500)]
    mixed = {"global_batch": 8, "replay": replay, "shares": {"replay": Fraction(1, 4)}}
    [batch], _ = batches([3, 5, 2, 4, 1, 6], rate=1, **mixed).load(0, 8)
    assert len(batch.input_ids) < 8
    assert batch.sources.tolist() == (batch.targets >= 500).long().tolist()
    assert set(batch.sources.tolist()) == {0, 1}


def test_packing_without_line_by_line_is_a_mistake():
    with pytest.raises(UserError, match=r"--pack_documents: .* --line_by_line"):
        ChunkConfig(pack_documents=True)
