"""The data path, from text to masked batches, against what people use now and against its ceilings."""

import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

import mlm.corpus
from benchmarks import course_recipe, peers
from benchmarks.compare import Case, cases, row
from mlm.batches import mask_chunks
from mlm.chunks import concatenate
from mlm.masking import MaskingConfig, corrupt, draw, make_recipe
from mlm.stream import build
from mlm.tokenizer import text_encoder
from tests.oracles import chunks_of
from tests.test_masking import slow_corrupt, slow_draw

T, B, MAP_BATCH, SEED, RATE = 128, 64, 1000, 42, 0.15
MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


# From text to the token store


@cases(
    Case("ours", "again", rounds=7),
    Case("encode_batch", "ceiling", rounds=9, at_least=0.85),
    Case("encode_batch_fast", "ceiling", rounds=9),
)
@pytest.mark.benchmark(group="token store from text")
def test_token_store(case, corpus, versus, tmp_path):
    """The ceilings throw away what they made; encode_batch_fast knows no words, which the store has."""
    backend = text_encoder(corpus.tokenizer)
    batches = [corpus.texts[i : i + MAP_BATCH] for i in range(0, len(corpus.texts), MAP_BATCH)]

    def ours():
        return build(corpus.texts, corpus.tokenizer, corpus.facts, tmp_path, {"split": "train"})

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


# From text to chunks


@cases(
    Case("ours", "again", rounds=5),
    Case("run_mlm's two maps", "peer", rounds=5, at_least=1.6),
    Case("run_mlm's two maps, 2 processes", "peer", rounds=5, at_least=1.6),
    Case("the course's two maps", "peer", rounds=3, at_least=3.5),
)
@pytest.mark.benchmark(group="chunks from text")
def test_chunks_from_text(case, corpus, versus, tmp_path):
    """All begin with the same dataset of texts, and end with chunks on disk."""
    documents = np.split(corpus.store.ids, corpus.store.document_offsets[1:-1])

    def ours():
        texts = mlm.corpus.texts(corpus.dataset)
        store = build(texts, corpus.tokenizer, corpus.facts, tmp_path, {"split": "train"})
        return concatenate(store.ids, store.word_starts, T, corpus.facts.pad_id, "drop")

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
    encoded = corpus.tokenizer(
        corpus.texts[:MAP_BATCH], return_special_tokens_mask=True, return_offsets_mapping=True
    )
    return {**encoded, "word_ids": [encoded.word_ids(row) for row in range(MAP_BATCH)]}


def of(documents, *names):
    return {name: rows for name, rows in documents.items() if name in names}


def chunks_of_the_store(corpus, length):
    """The chunks of the same 1,000 documents."""
    end = corpus.store.document_offsets[MAP_BATCH]
    ids, starts = (np.asarray(array[:end]) for array in (corpus.store.ids, corpus.store.word_starts))
    return concatenate(ids, starts, length, corpus.facts.pad_id, "drop")


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


class Masking:
    """Masked batches of the 1,000 documents' chunks, `size` a batch: ours, and the peers'.

    The peers begin with lists, ours with the chunks still in the store. limit: of the number of batches.
    """

    def __init__(self, corpus, documents, length, size, whole_words, limit=None) -> None:
        self.facts, self.tokenizer = corpus.facts, corpus.tokenizer
        self.chunks = chunks_of_the_store(corpus, length)
        self.batches = np.split(np.arange(len(self.chunks)), range(size, len(self.chunks), size))[:limit]
        self.rows = self.chunks.take(np.concatenate(self.batches))
        self.recipe = make_recipe(MaskingConfig(whole_word_mask=whole_words), corpus.facts)
        columns = of(documents, *MODEL_INPUTS, "special_tokens_mask", *["offset_mapping"] * whole_words)
        self.collator_features = self._features(columns, length)
        self.course_features = self._features(of(documents, *MODEL_INPUTS, "word_ids"), length)
        with warnings.catch_warnings():  # that whole words always become mask tokens
            warnings.simplefilter("ignore")
            self._collate = DataCollatorForLanguageModeling(
                corpus.tokenizer, mlm_probability=RATE, whole_word_mask=whole_words, seed=SEED
            )
        self._draws = np.random.RandomState(SEED)
        self._target = np.empty_like(self.rows.ids)

    def _features(self, columns, length):
        """Of each batch a list of features, as a DataLoader hands them to a collator."""
        chunks = peers.chain_batch(columns, length)
        return [[{name: chunks[name][i] for name in chunks} for i in batch] for batch in self.batches]

    def ours(self):
        return [
            mask_chunks(self.chunks, ids, np.zeros_like(ids), SEED, self.recipe, self.facts.ordinary)
            for ids in self.batches
        ]

    def collator(self):
        return [self._collate(features) for features in self.collator_features]

    def course(self):
        return [
            peers.course_whole_words(features, self.tokenizer, RATE, self._draws)
            for features in self.course_features
        ]

    def copy(self):
        np.copyto(self._target, self.rows.ids)

    def compare(self, versus, case):
        theirs = {"ours": self.ours, "the collator": self.collator, "the course's loop": self.course}
        theirs["memory copy"] = self.copy
        self.check(case.against)
        versus(case, self.ours, theirs[case.against], tokens=self.rows.ids.size, size=self.rows.ids.nbytes)

    def check(self, name):
        """Masked as asked for: the right share, no special token, whole words where words are masked."""
        ids, whole_words = self.rows.ids, self.recipe.whole_word
        starts, maskable = self.rows.word_starts, ~np.isin(ids, self.facts.prefix + self.facts.suffix)
        if name == "the collator":
            masked = self.collator()
            if whole_words:  # its words are what stands between gaps
                spans = np.array([f["offset_mapping"] for batch in self.collator_features for f in batch])
                starts = spans[:, :, 0] != np.roll(spans[:, :, 1], 1, axis=1)
                starts |= ~maskable | np.roll(~maskable, 1, axis=1)
        elif name == "the course's loop":
            masked = self.course()
        else:
            masked, maskable = self.ours(), self.facts.ordinary[ids]
        if name in ("the collator", "the course's loop"):
            seen = np.concatenate([batch["input_ids"] for batch in masked])
            chosen = np.concatenate([batch["labels"] for batch in masked]) != -100
        else:
            seen = np.concatenate([batch.input_ids for batch in masked])
            chosen = np.concatenate([_chosen(batch) for batch in masked])
            self._check_against_the_definition(masked[0])
        assert (seen[~chosen] == ids[~chosen]).all()
        assert maskable[chosen].all()
        starts = starts.copy() if whole_words else np.ones_like(chosen)
        starts[:, 0] = True  # a chunk may begin inside a word
        first = np.flatnonzero(starts)
        sizes, hits = (np.add.reduceat(each.reshape(-1), first, dtype=int) for each in (maskable, chosen))
        assert np.isin(hits, [0]).any()
        assert ((hits == 0) | (hits == sizes)).all()
        deviation = np.sqrt(RATE * (1 - RATE) * (sizes**2).sum())
        assert abs(chosen.sum() - RATE * maskable.sum()) < 5 * deviation

    def _check_against_the_definition(self, batch):
        """Our first batch, token by token in Python integers."""
        n, length = batch.input_ids.shape
        ids, starts = self.rows.ids[:n], self.rows.word_starts[:n]
        draws = slow_draw(SEED, 0, range(n), length)
        expected = slow_corrupt(ids.tolist(), self.facts.ordinary[ids], draws, self.recipe, starts)
        assert (batch.input_ids.tolist(), batch.positions.tolist(), batch.targets.tolist()) == expected


def _chosen(batch):
    chosen = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    chosen.view(-1)[batch.positions] = True
    return chosen


@cases(
    Case("ours", "again", rounds=15),
    Case("the collator", "peer", rounds=15, at_least=30),
    Case("memory copy", "ceiling", rounds=31),
)
@pytest.mark.benchmark(group="ready batches of 64 × 128, tokens masked")
def test_masked_tokens(case, corpus, documents, versus):
    Masking(corpus, documents, T, B, whole_words=False).compare(versus, case)


@cases(
    Case("ours", "again", rounds=15),
    Case("the collator", "peer", rounds=9, at_least=10),
    Case("the course's loop", "peer", rounds=9, at_least=50),
    Case("memory copy", "ceiling", rounds=31),
)
@pytest.mark.benchmark(group="ready batches of 64 × 128, whole words masked")
def test_whole_words(case, corpus, documents, versus):
    Masking(corpus, documents, T, B, whole_words=True).compare(versus, case)


@cases(
    Case("ours", "again", rounds=15),
    Case("the collator", "peer", rounds=5, at_least=1000),
    Case("memory copy", "ceiling", rounds=31),
)
@pytest.mark.benchmark(group="a ready batch of 8 long chunks, whole words masked")
def test_whole_words_of_long_chunks(case, corpus, documents, versus):
    Masking(corpus, documents, corpus.long, 8, whole_words=True, limit=1).compare(versus, case)


def test_memory_of_whole_words_is_linear_in_the_tokens(corpus, documents, results):
    def peak(length, name):
        masking = Masking(corpus, documents, length, 8, whole_words=True, limit=1)
        tracemalloc.start()
        getattr(masking, name)()
        try:
            return tracemalloc.get_traced_memory()[1] / masking.rows.ids.size
        finally:
            tracemalloc.stop()

    half, full = (np.array([peak(length, "ours")]) for length in (corpus.long // 2, corpus.long))
    assert abs(full / half - 1) < 0.02
    workload = f"peak memory of masking whole words, 8 × {corpus.long:,}"
    theirs = np.array([peak(corpus.long, "collator")])
    results.append(row(workload, "ours, chunks half as long", "again", "bytes a token, ×", half / full))
    results.append(
        row(
            workload,
            "the collator",
            "peer",
            "×",
            theirs / full,
            bytes_per_token={"ours": full[0], "theirs": theirs[0]},
        )
    )


@cases(
    Case("ours", "again", rounds=31),
    Case("memory copy", "ceiling", rounds=31),
)
@pytest.mark.benchmark(group="draw + corrupt in NumPy on one core, 64 × 128")
def test_draw_and_corrupt(case, corpus, documents, versus, results):
    masking = Masking(corpus, documents, T, B, whole_words=False)
    ids = [masking.chunks.take(batch).ids for batch in masking.batches]
    maskable = [corpus.facts.ordinary[each] for each in ids]

    def ours():
        return [
            corrupt(each, able, draw(SEED, 0, batch, T), masking.recipe)
            for batch, each, able in zip(masking.batches, ids, maskable, strict=True)
        ]

    for corrupted, batch in zip(ours(), masking.ours(), strict=True):
        assert np.array_equal(corrupted.ids, batch.input_ids)
    theirs = {"ours": ours, "memory copy": masking.copy}[case.against]
    versus(case, ours, theirs, tokens=masking.rows.ids.size, size=masking.rows.ids.nbytes)
