"""Claims about chunks: every token of a split is in one (invariant 5), and is copied only when taken."""

import dataclasses
import tracemalloc
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm.data import chunks
from mlm.data.chunks import ChunkConfig, chunk_length, concatenate, cut_into_chunks, line_by_line
from mlm.data.tokenizer import tokenizer_info
from mlm.errors import UserError
from tests.data.stores import build, few
from tests.oracles import chunks_of, course_chunks
from tests.tokenizers_for_tests import wordpiece

PAD = 99
TOKENIZER = wordpiece(["the old fox likes grapes", "the young owl likes mice"] * 5)
INFO = tokenizer_info(TOKENIZER)

documents = st.lists(st.integers(1, 12), max_size=12)  # lengths
chunk_sizes = st.integers(1, 15)


def toy_documents(lengths):
    """Documents of these lengths: the ids of each, the word starts of each, offsets. No id occurs twice."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ids = [list(range(a, b)) for a, b in pairwise(offsets)]
    word_starts = [[place % 3 != 2 for place in range(length)] for length in lengths]
    return ids, word_starts, offsets


def flat(lists, dtype):
    return np.array([value for row in lists for value in row], dtype)


def take_all(chunks):
    return chunks.take(np.arange(len(chunks)))


def real_tokens(rows):
    """Every token of the rows that is no padding, in order."""
    lengths = rows.lengths if rows.lengths is not None else [rows.ids.shape[1]] * len(rows.ids)
    return [int(token) for row, length in zip(rows.ids, lengths, strict=True) for token in row[:length]]


def test_the_worked_example_of_the_module():
    ids = np.array([10, 11, 12, 20, 21, 22, 23, 24, 25, 30], np.uint8)
    starts = np.array([1, 1, 0, 1, 0, 0, 1, 1, 1, 1], bool)

    dropped = take_all(concatenate(ids, starts, 4, PAD, "drop"))
    assert dropped.ids.tolist() == [[10, 11, 12, 20], [21, 22, 23, 24]]
    assert dropped.word_starts.astype(int).tolist() == [[1, 1, 0, 1], [0, 0, 1, 1]]
    assert dropped.lengths is None

    padded = take_all(concatenate(ids, starts, 4, PAD, "pad"))
    assert padded.ids.tolist() == [[10, 11, 12, 20], [21, 22, 23, 24], [25, 30, 99, 99]]
    assert padded.word_starts.astype(int).tolist() == [[1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert padded.lengths.tolist() == [4, 4, 2]


def test_lines_to_check_by_eye(tmp_path):
    store = build(["fox fox", "owl owl owl", "mice"], TOKENIZER, INFO, tmp_path, {"split": "train"})
    rows = take_all(cut_into_chunks(store, ChunkConfig(line_by_line=True), 4, INFO))
    assert [TOKENIZER.convert_ids_to_tokens(row) for row in rows.ids] == [
        ["[CLS]", "fox", "fox", "[SEP]"],
        ["[CLS]", "owl", "owl", "[SEP]"],  # cut
        ["[CLS]", "mice", "[SEP]", "[PAD]"],
    ]
    assert rows.lengths.tolist() == [4, 4, 3]


@given(documents, chunk_sizes, st.sampled_from(["drop", "pad"]))
def test_chunks_are_those_of_lists_joined_and_sliced(lengths, chunk_size, remainder):
    ids, starts, _ = toy_documents(lengths)
    chunks = concatenate(flat(ids, np.uint16), flat(starts, bool), chunk_size, PAD, remainder)
    rows = take_all(dataclasses.replace(chunks, pad_to_max_length=True))
    assert rows.ids.tolist() == chunks_of(ids, chunk_size, remainder, PAD)
    assert rows.word_starts.tolist() == chunks_of(starts, chunk_size, remainder, True)


@given(documents, chunk_sizes)
def test_pad_loses_no_token_and_drop_less_than_a_chunk_of_them(lengths, chunk_size):
    ids, starts, _ = toy_documents(lengths)
    sequence = flat(ids, np.uint16)
    padded = real_tokens(take_all(concatenate(sequence, flat(starts, bool), chunk_size, PAD, "pad")))
    assert padded == sequence.tolist(), "each token once, in order"
    kept = real_tokens(take_all(concatenate(sequence, flat(starts, bool), chunk_size, PAD, "drop")))
    assert kept == sequence.tolist()[: len(kept)]
    assert len(sequence) - len(kept) < chunk_size


@given(documents, chunk_sizes)
def test_one_map_batch_of_the_course_gives_the_same_chunks(lengths, chunk_size):
    ids, starts, _ = toy_documents(lengths)
    rows = take_all(concatenate(flat(ids, np.uint16), flat(starts, bool), chunk_size, PAD, "drop"))
    course = course_chunks({"input_ids": ids, "word_starts": starts}, chunk_size)
    assert rows.ids.tolist() == course["input_ids"]
    assert rows.word_starts.tolist() == course["word_starts"]


def test_drop_loses_one_remainder_a_split_not_one_a_batch_of_documents(tmp_path):
    texts = ["the old fox likes grapes" if number % 3 else "mice" for number in range(2500)]
    store = build(texts, TOKENIZER, INFO, tmp_path, {"split": "train"})  # three batches of documents
    chunk_size = 127
    tokens = [TOKENIZER(text)["input_ids"] for text in texts]
    total = sum(map(len, tokens))
    batches = [course_chunks({"input_ids": tokens[i : i + 1000]}, chunk_size) for i in (0, 1000, 2000)]
    course = sum(len(batch["input_ids"]) for batch in batches)

    chunks = cut_into_chunks(store, ChunkConfig(), chunk_size, INFO)
    assert len(chunks) == total // chunk_size > course
    assert total - len(chunks) * chunk_size < chunk_size
    assert np.array_equal(take_all(chunks).ids, chunks_of(tokens, chunk_size, "drop", PAD))
    padded = cut_into_chunks(store, ChunkConfig(remainder="pad"), chunk_size, INFO)
    assert real_tokens(take_all(padded)) == list(chain(*tokens))


@given(documents.filter(len), st.integers(3, 15), st.booleans())
def test_a_line_is_a_row_that_ends_as_a_document_does(lengths, chunk_size, pad_to_max_length):
    ids, starts, offsets = toy_documents(lengths)
    chunks = line_by_line(flat(ids, np.uint16), flat(starts, bool), offsets, chunk_size, INFO)
    rows = take_all(dataclasses.replace(chunks, pad_to_max_length=pad_to_max_length))

    width = chunk_size if pad_to_max_length else min(chunk_size, max(lengths))
    assert rows.ids.shape == rows.word_starts.shape == (len(lengths), width)
    for row, row_starts, length, document, begins in zip(*rows, ids, starts, strict=True):
        expected, expected_starts = document[:chunk_size], begins[:chunk_size]
        if len(document) > chunk_size:
            expected[-1], expected_starts[-1] = TOKENIZER.sep_token_id, True
        assert length == len(expected)
        assert row.tolist() == expected + [INFO.pad_id] * (width - length)
        assert row_starts.tolist() == expected_starts + [True] * (width - length)


@given(documents.filter(len), chunk_sizes, st.sampled_from(["drop", "pad", "line"]), st.randoms())
def test_a_row_is_the_same_whatever_is_taken_with_it(lengths, chunk_size, layout, random):
    ids, starts, offsets = toy_documents(lengths)
    ids, starts = flat(ids, np.uint16), flat(starts, bool)
    if layout == "line":
        chunks = line_by_line(ids, starts, offsets, chunk_size, INFO)
    else:
        chunks = concatenate(ids, starts, chunk_size, PAD, layout)
    everything = take_all(chunks)
    some = np.array([random.randrange(len(chunks)) for _ in range(5)] if len(chunks) else [], np.int64)
    rows = chunks.take(some)
    width = rows.ids.shape[1]
    assert np.array_equal(rows.ids, everything.ids[some, :width])
    assert np.array_equal(rows.word_starts, everything.word_starts[some, :width])
    if rows.lengths is not None:
        assert np.array_equal(rows.lengths, everything.lengths[some])
        assert width == rows.lengths.max(initial=0), "no wider than its longest row"


def test_rows_come_in_what_torch_indexes_with():
    for kind in (np.uint8, np.uint16, np.uint32):
        for remainder in ("drop", "pad"):
            ids = np.arange(10, dtype=kind)
            rows = take_all(concatenate(ids, np.ones(10, bool), 4, PAD, remainder))
            assert (rows.ids.dtype, rows.word_starts.dtype) == (np.int64, bool)


@pytest.mark.parametrize("options", [{}, {"remainder": "pad"}, {"line_by_line": True}], ids=str)
def test_chunks_are_a_view_of_the_store(options, tmp_path):
    texts = ["the old fox likes grapes"] * 20_000
    store = build(texts, TOKENIZER, INFO, tmp_path, {"split": "train"})  # 140,000 tokens
    tracemalloc.start()
    chunks = cut_into_chunks(store, ChunkConfig(**options), 128, INFO)
    cut = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    rows = chunks.take(np.arange(4))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.shares_memory(chunks.ids, store.ids)
    assert np.shares_memory(chunks.word_starts, store.word_starts)
    assert cut < 20_000, "cutting allocates next to nothing, and nothing for each of the 20,000 documents"
    assert taken < 20_000 + 20 * rows.ids.nbytes, "and taking allocates no more than what is taken"
    assert not np.shares_memory(rows.ids, store.ids), "a row may be written to"


def test_a_chunk_is_128_tokens_or_what_the_model_takes():
    assert chunk_length(ChunkConfig(), None) == 128
    assert chunk_length(ChunkConfig(), 512) == 128
    assert chunk_length(ChunkConfig(), 64) == 64
    assert chunk_length(ChunkConfig(max_seq_length=512), 512) == 512
    assert chunk_length(ChunkConfig(max_seq_length=4096), None) == 4096


def test_a_chunk_longer_than_the_models_positions_is_refused_with_both_figures():
    with pytest.raises(UserError, match=r"--max_seq_length 513: .* 512 tokens"):
        chunk_length(ChunkConfig(max_seq_length=513), 512)


def test_a_chunk_too_short_for_text_is_refused_with_the_reason():
    with pytest.raises(UserError, match="--max_seq_length 2: beside special tokens there is hardly a word"):
        chunk_length(ChunkConfig(max_seq_length=2), 512)


@pytest.mark.parametrize("length", [0, -1])
def test_a_chunk_has_a_token(length):
    with pytest.raises(UserError, match=f"--max_seq_length {length}"):
        ChunkConfig(max_seq_length=length)


def test_a_split_of_less_than_one_chunk_is_refused_unless_padded(tmp_path):
    store = build(["the fox"], TOKENIZER, INFO, tmp_path, {"split": "validation"})
    with pytest.raises(UserError, match=r"validation split has 4 tokens, less .* of 128.*--remainder pad"):
        cut_into_chunks(store, ChunkConfig(), 128, INFO)
    rows = take_all(cut_into_chunks(store, ChunkConfig(remainder="pad"), 128, INFO))
    assert rows.ids.shape == (1, 4)
    wide = take_all(cut_into_chunks(store, ChunkConfig(remainder="pad", pad_to_max_length=True), 128, INFO))
    assert wide.ids.shape == (1, 128)
    assert wide.lengths.tolist() == [4]


@given(lengths=documents.filter(len), chunk_size=chunk_sizes)
@few
def test_what_line_by_line_leaves_out_is_known_without_a_look_at_the_documents(lengths, chunk_size, tmp_path_factory):
    texts = ["fox " * length for length in lengths]
    store = build(texts, TOKENIZER, INFO, tmp_path_factory.mktemp("store"), {"split": "train"})
    kept = sum(min(length + 2, chunk_size) for length in lengths)
    lost = 100 * (1 - kept / (sum(lengths) + 2 * len(lengths)))
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(chunks.log, "warning", lambda text, share, *_: said.append(share))
        cut_into_chunks(store, ChunkConfig(line_by_line=True), chunk_size, INFO)
    assert said == ([pytest.approx(lost)] if lost > 1 else [])


@pytest.mark.parametrize("options", [{}, {"remainder": "pad"}, {"line_by_line": True}], ids=str)
def test_a_split_without_a_token_is_refused(options, tmp_path):
    store = build(["\x00"], TOKENIZER, INFO, tmp_path, {"split": "validation"})
    with pytest.raises(UserError, match="no document of the validation split has a token"):
        cut_into_chunks(store, ChunkConfig(**options), 4, INFO)
