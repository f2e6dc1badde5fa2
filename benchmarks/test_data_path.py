"""The data path, from text to masked batches, against what people use now and against its ceilings.

Workload: the reviews of conftest.py, without markup; each row names its part of the path. Peers: the two maps
of run_mlm and of the course, transformers' collators and the course's (peers.py, course_recipe.py).
Ceilings: the tokenizer's own call with its result thrown away, and a memory copy of the ids.
"""

import shutil
import tracemalloc
from collections import deque
from functools import cache

import numpy as np
import pytest
import torch

import mlm.data.corpus
from benchmarks import course_recipe, peers
from benchmarks.compare import Case, cases, row
from benchmarks.masked_batches import MODEL_INPUTS, SEED, MaskedBatches
from mlm.data.chunks import concatenate
from mlm.data.encode import Encoder
from mlm.data.shards import build_shards, read_shards
from mlm.data.token_store import ARRAYS, open_store, write
from mlm.data.tokenizer import text_encoder
from tests.data.stores import build
from tests.oracles import chunks_of

T, B, MAP_BATCH = 128, 64, 1000  # tokens a chunk, chunks a batch, documents a batch of a map
COPIES, SHARDS = 5, 101  # of the texts, and of all copies: no two copies are cut at the same documents


# From text to the token store


@pytest.fixture
def make_store(corpus, tmp_path):
    """make_store(processes, bytes a shard, copies): the store of the texts, as `prepare` makes it."""

    def make(processes, size, copies=1):
        texts = mlm.data.corpus.Source(corpus.name, [corpus.dataset] * copies)
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mlm.data.corpus, "SHARD", size)
            found, _ = mlm.data.corpus._scan(texts)
            shards = {"train": mlm.data.corpus._cut(*found[1:3])}
        splits = {"train": mlm.data.corpus.Documents(texts, found[0].view(np.int64), found[1], strip_html=False)}
        read = mlm.data.corpus.Corpus(splits, {}, shards, hashes={}, leaks=None)
        encoder = Encoder(corpus.tokenizer, corpus.info)
        made = build_shards(read, ["train"], encoder, processes, tmp_path / "made" / "shards")
        assert len({place for place, _ in made["train"]}) == len(made["train"]), "no shard stands for two"
        write(read_shards(made["train"]), corpus.info, tmp_path / "made" / "train", {"split": "train"})
        return open_store(tmp_path / "made" / "train", corpus.info.fingerprint)

    return make


@cases(
    Case("ours", "again", rounds=5),
    Case("encode_batch", "peer", rounds=9, at_least=0.85),
    Case("encode_batch_fast", "ceiling", rounds=9),
)
@pytest.mark.benchmark(group="token store from text")
def test_token_store(case, corpus, make_store, versus):
    """The tokenizer's own calls, their result thrown away; encode_batch_fast's knows no words."""
    backend = text_encoder(corpus.tokenizer)
    batches = [corpus.texts[i : i + MAP_BATCH] for i in range(0, len(corpus.texts), MAP_BATCH)]

    def ours():
        return make_store(1, mlm.data.corpus.SHARD)

    def encode_batch():
        for batch in batches:
            backend.encode_batch(batch, add_special_tokens=False)

    def encode_batch_fast():
        for batch in batches:
            backend.encode_batch_fast(batch, add_special_tokens=False)

    store, begin = ours(), 0
    encodings = backend.encode_batch(corpus.texts)
    for encoding, end in zip(encodings, store.document_offsets[1:].tolist(), strict=True):
        words = np.array([-1 if word is None else word for word in encoding.word_ids])
        assert store.ids[begin:end].tolist() == encoding.ids
        starts = (np.diff(words, prepend=-1) != 0) | (words == -1)
        assert np.array_equal(store.word_starts[begin:end], starts)
        begin = end
    theirs = {"ours": ours, "encode_batch": encode_batch, "encode_batch_fast": encode_batch_fast}
    versus(case, ours, theirs[case.against], tokens=len(store.ids), size=corpus.size)


@cases(Case("ours, one process", "peer", rounds=7, at_least=1.8))
@pytest.mark.benchmark(group="token store from text, two processes, a thread each")
def test_token_store_of_two_processes(case, corpus, make_store, versus, benchmark, monkeypatch):
    """Many shards for each process, as in a large corpus: to start one, and to wait for the last shard, takes the same
    time however much text there is."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    copies = 1 if benchmark.disabled else COPIES
    size = corpus.size * copies
    one, two = (lambda processes=processes: make_store(processes, size // SHARDS, copies) for processes in (1, 2))
    expected = {name: np.array(getattr(one(), name)) for name in ARRAYS}
    assert np.array_equal(expected["ids"], np.tile(corpus.store.ids, copies))
    store = two()
    assert all(np.array_equal(getattr(store, name), array) for name, array in expected.items())
    versus(case, two, one, tokens=len(store.ids), size=size)


# From text to chunks


@cases(
    Case("ours", "again", rounds=5),
    Case("run_mlm's two maps", "peer", rounds=5, at_least=1.6),
    Case("run_mlm's two maps, 2 processes", "peer", rounds=5, at_least=1.6),
    Case("the course's two maps", "peer", rounds=5, at_least=3.5),
)
@pytest.mark.benchmark(group="chunks from text")
def test_chunks_from_text(case, corpus, versus, tmp_path):
    """All begin with the same dataset of texts, and end with chunks on disk."""
    documents = np.split(corpus.store.ids, corpus.store.document_offsets[1:-1])

    def ours():
        texts = mlm.data.corpus.texts(corpus.dataset)
        store = build(texts, corpus.tokenizer, corpus.info, tmp_path, {"split": "train"})
        return concatenate(store.ids, store.word_starts, T, corpus.info.pad_id, "drop")

    def run_mlm(processes=None):
        return peers.run_mlm_maps(corpus.dataset, corpus.tokenizer, T, processes)

    def course():
        splits = course_recipe.datasets.DatasetDict({"train": corpus.dataset})
        return course_recipe.chunk(course_recipe.tokenize(splits, corpus.tokenizer, "text"), T)["train"]

    theirs, processes = {
        "ours": (ours, 1),
        "run_mlm's two maps": (run_mlm, 1),
        "run_mlm's two maps, 2 processes": (lambda: run_mlm(2), 2),
        "the course's two maps": (course, 1),
    }[case.against]
    if case.kind == "again":
        expected, chunks = chunks_of(documents, T, "drop", None), ours()
        made = chunks.take(np.arange(len(chunks))).ids
    else:  # the peers drop the end of each batch of documents
        expected, made = [], theirs()["input_ids"]
        for share in np.array_split(np.arange(len(documents)), processes):
            for start in range(0, len(share), MAP_BATCH):
                batch = [documents[index] for index in share[start : start + MAP_BATCH]]
                expected += chunks_of(batch, T, "drop", None)
    assert np.array_equal(np.array(made), np.array(expected))
    versus(case, ours, theirs, tokens=len(corpus.store.ids), size=corpus.size)


# From tokenised documents to batches of chunks


@pytest.fixture(scope="module")
def documents(corpus):
    """1,000 tokenised documents as columns of lists, all that a tokenizer and the course know of them."""
    encoded = corpus.tokenizer(corpus.texts[:MAP_BATCH], return_special_tokens_mask=True, return_offsets_mapping=True)
    return {**encoded, "word_ids": [encoded.word_ids(row) for row in range(MAP_BATCH)]}


def of(documents, *names):
    return {name: rows for name, rows in documents.items() if name in names}


def chunks_of_the_store(corpus, length):
    """The chunks of the same 1,000 documents."""
    end = corpus.store.document_offsets[MAP_BATCH]
    ids, starts = (np.asarray(array[:end]) for array in (corpus.store.ids, corpus.store.word_starts))
    return concatenate(ids, starts, length, corpus.info.pad_id, "drop")


@cases(
    Case("ours", "again", rounds=31),
    Case("run_mlm's chain", "peer", rounds=31, at_least=10),
    Case("the course's sum", "peer", rounds=3, at_least=200),
    Case("memory copy", "ceiling", rounds=31),
)
@pytest.mark.benchmark(group="1,000 documents chunked, gathered in random order")
def test_chunk_and_gather(case, corpus, documents, versus):
    """The peers begin with lists, and of their columns only the ids become tensors [64, 128] int64."""
    chunks = chunks_of_the_store(corpus, T)
    order = np.random.default_rng(SEED).permutation(len(chunks))
    run_mlm = of(documents, *MODEL_INPUTS, "special_tokens_mask")
    course = of(documents, *MODEL_INPUTS, "word_ids")
    source = chunks.take(np.arange(len(chunks))).ids
    target = np.empty_like(source)

    def ours():
        chunks = chunks_of_the_store(corpus, T)
        return [torch.from_numpy(chunks.take(order[i : i + B]).ids) for i in range(0, len(order), B)]

    def chain():
        return peers.tensors(peers.chain_batch(run_mlm, T)["input_ids"], order, B)

    def lists_added():
        return peers.tensors(course_recipe.chunk_batch(course, T)["input_ids"], order, B)

    def copy():
        np.copyto(target, source)

    made = torch.cat(ours())
    assert made.dtype == torch.int64
    assert np.array_equal(made, source[order])
    theirs = {"ours": ours, "run_mlm's chain": chain, "the course's sum": lists_added, "memory copy": copy}
    if case.kind == "peer":
        assert torch.equal(torch.cat(theirs[case.against]()), made)
    versus(case, ours, theirs[case.against], tokens=source.size, size=source.nbytes)


# Masked batches


@pytest.fixture(scope="module")
def masked_batches(corpus, documents):
    """masked_batches(length, size, whole_words, limit=None): those of the 1,000 documents, checked."""

    @cache
    def make(length, size, whole_words, limit=None):
        chunks = chunks_of_the_store(corpus, length)
        made = MaskedBatches(chunks, documents, corpus.tokenizer, corpus.info, size, whole_words, limit)
        made.check()
        return made

    return make


def compare_batches(versus, case, batches, ours="ours"):
    """Compares making the batches one after the other, none of them kept."""

    def run(name):
        return lambda: deque(getattr(batches, name)(), maxlen=0)

    names = {"the collator": "collator", "the course's loop": "course", "memory copy": "copy", "ours": ours}
    ids = batches.rows.ids
    return versus(case, run(ours), run(names[case.against]), tokens=ids.size, size=ids.nbytes)


@cases(
    Case("ours", "again", rounds=31),
    Case("the collator", "peer", rounds=15, at_least=30),
    Case("memory copy", "ceiling", rounds=31),
)
@pytest.mark.benchmark(group="ready batches of 64 × 128, tokens masked")
def test_masked_tokens(case, masked_batches, versus):
    compare_batches(versus, case, masked_batches(T, B, whole_words=False))


@cases(
    Case("ours", "again", rounds=31),
    Case("the collator", "peer", rounds=9, at_least=10),
    Case("the course's loop", "peer", rounds=15, at_least=50),
    Case("memory copy", "ceiling", rounds=31),
)
@pytest.mark.benchmark(group="ready batches of 64 × 128, whole words masked")
def test_whole_words(case, masked_batches, versus):
    compare_batches(versus, case, masked_batches(T, B, whole_words=True))


@cases(
    Case("ours", "again", rounds=31),
    Case("the collator", "peer", rounds=5, at_least=1000),
    Case("memory copy", "ceiling", rounds=31),
)
def test_whole_words_of_long_chunks(case, corpus, masked_batches, versus, benchmark):
    benchmark.group = f"ready batches of 8 × {corpus.long:,}, whole words masked"
    compare_batches(versus, case, masked_batches(corpus.long, 8, whole_words=True, limit=4))


def test_memory_of_whole_words_is_linear_in_the_tokens(corpus, masked_batches, results):
    """By tracemalloc, which NumPy reports its arrays to."""

    def bytes_per_token(length, name):
        batches = masked_batches(length, 8, whole_words=True, limit=1)
        tracemalloc.start()
        deque(getattr(batches, name)(), maxlen=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak / batches.rows.ids.size

    ours, half = bytes_per_token(corpus.long, "ours"), bytes_per_token(corpus.long // 2, "ours")
    assert abs(ours / half - 1) < 0.02
    peer = bytes_per_token(corpus.long, "collator")
    workload = f"peak memory of a batch of 8 × {corpus.long:,}, whole words masked"
    for against, kind, theirs in (("ours, chunks half as long", "again", half), ("the collator", "peer", peer)):
        per_token = {"ours": ours, "theirs": theirs}
        results.append(row(workload, against, kind, "×", [theirs / ours], bytes_per_token=per_token))


@cases(Case("ours", "again", rounds=31), Case("memory copy", "ceiling", rounds=31))
@pytest.mark.benchmark(group="draw, select, corrupt in NumPy on one core, 64 × 128")
def test_masking_kernels(case, masked_batches, versus, benchmark, results):
    """The first case measures the speed itself, beside its target."""
    batches = masked_batches(T, B, whole_words=False)
    seconds = compare_batches(versus, case, batches, ours="kernels")
    if case.kind == "again" and seconds is not None:
        speed, target = batches.rows.ids.size / seconds, 60e6
        results.append(row(benchmark.group, f"{target:,.0f} tokens/s", "target", "tokens/s", speed, target))
