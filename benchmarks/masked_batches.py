"""Masked batches of the same chunks, ours and the peers', and what holds for each of them."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from benchmarks import peers
from benchmarks.peers import Columns, Feature
from mlm.data.batches import Batch, mask_chunks
from mlm.data.chunks import Chunks
from mlm.data.masking import Corrupted, corrupt, draw, make_recipe, select_tokens, select_words
from mlm.data.tokenizer import TokenizerInfo
from tests.oracles import slow_corrupt, slow_draw, slow_select

SEED, RATE = 42, 0.15
MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


class MaskedBatches:
    """All chunks in order, `size` a batch: ours begin in the store, the peers' with lists of integers.

    documents: the same tokens as columns of lists, from which the peers' features are cut beforehand
    limit:     number of batches, where not all
    """

    def __init__(
        self,
        chunks: Chunks,
        documents: Columns,
        tokenizer: PreTrainedTokenizerBase,
        info: TokenizerInfo,
        size: int,
        whole_words: bool,
        limit: int | None = None,
    ) -> None:
        self.chunks, self.tokenizer, self.info, self.whole_words = chunks, tokenizer, info, whole_words
        self.batches = np.split(np.arange(len(chunks)), range(size, len(chunks), size))[:limit]
        self.rows = chunks.take(np.concatenate(self.batches))
        self.recipe = make_recipe(info)
        self.course_features = self._features(documents, *MODEL_INPUTS, "word_ids")
        spans = ("offset_mapping",) if whole_words else ()
        self.collator_features = self._features(documents, *MODEL_INPUTS, "special_tokens_mask", *spans)
        with warnings.catch_warnings():  # that whole words become mask tokens, all of them
            warnings.simplefilter("ignore")
            self.collate = DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=RATE, whole_word_mask=whole_words, seed=SEED
            )
        self.draws = np.random.RandomState(SEED)
        ids = [chunks.take(chunk_ids).ids for chunk_ids in self.batches]
        self.ready = ids, [info.maskable[each] for each in ids]
        self.target = np.empty_like(ids[0])

    def _features(self, documents: Columns, *names: str) -> list[list[Feature]]:
        """For each batch the features that a DataLoader hands to the collator."""
        columns = {name: rows for name, rows in documents.items() if name in names}
        chunks = peers.chain_batch(columns, self.chunks.chunk_size)
        return [[{name: chunks[name][i] for name in chunks} for i in batch] for batch in self.batches]

    def ours(self) -> Iterator[Batch]:
        for ids in self.batches:
            yield mask_chunks(
                self.chunks, ids, np.zeros_like(ids), SEED, self.info.maskable, self.recipe, self._select
            )

    def _select(self, maskable: np.ndarray, draws: np.ndarray, word_starts: np.ndarray) -> np.ndarray:
        if self.whole_words:
            return select_words(maskable, draws, RATE, word_starts)
        return select_tokens(maskable, draws, RATE)

    def kernels(self) -> Iterator[Corrupted]:
        """The kernels of `ours` alone, for single tokens, on ids that are loaded already."""
        for chunk_ids, ids, maskable in zip(self.batches, *self.ready, strict=True):
            draws = draw(SEED, 0, chunk_ids, ids.shape[1])
            yield corrupt(ids, select_tokens(maskable, draws, RATE), draws, self.recipe)

    def collator(self) -> Iterator[dict[str, Any]]:
        for features in self.collator_features:
            yield self.collate(features)

    def course(self) -> Iterator[dict[str, Any]]:
        for features in self.course_features:
            yield peers.course_whole_words(features, self.tokenizer, RATE, self.draws)

    def copy(self) -> Iterator[None]:
        """Writing the ids, which every way to make a batch has to do."""
        for ids in self.ready[0]:
            yield np.copyto(self.target[: len(ids)], ids)

    def check(self) -> None:
        """Checks that each side masks what it promises to, by its own notion of special tokens and words."""
        ids, ours = self.rows.ids, list(self.ours())
        before = [chunk_ids[0] * ids.shape[1] for chunk_ids in self.batches]  # tokens in earlier batches
        chosen = np.zeros(ids.shape, bool)
        for batch, start in zip(ours, before, strict=True):
            chosen.reshape(-1)[batch.positions + start] = True
        seen = np.concatenate([batch.input_ids for batch in ours])
        check_masks(ids, seen, chosen, self.info.maskable[ids], self._words(self.rows.word_starts))
        self._check_by_the_definition(ours[0])
        if not self.whole_words:
            for corrupted, batch in zip(self.kernels(), ours, strict=True):
                assert np.array_equal(corrupted.ids, batch.input_ids)
                assert np.array_equal(corrupted.positions, batch.positions)

        template = np.isin(ids, self.info.prefix + self.info.suffix)
        check_masks(ids, *_seen_and_chosen(self.collator()), ~template, self._words(self._gaps(template)))
        if self.whole_words:
            numbers = [[-1 if w is None else w for w in f["word_ids"]] for b in self.course_features for f in b]
            starts = np.diff(np.array(numbers), axis=1, prepend=-2) != 0
            check_masks(ids, *_seen_and_chosen(self.course()), ~template, starts)

    def _words(self, starts: np.ndarray) -> np.ndarray:
        return starts if self.whole_words else np.ones_like(starts)

    def _gaps(self, template: np.ndarray) -> np.ndarray:
        """Where the collator lets a word begin: after a gap between spans, and after a special token."""
        if not self.whole_words:
            return template
        spans = np.array([feature["offset_mapping"] for batch in self.collator_features for feature in batch])
        gap = spans[:, :, 0] != np.roll(spans[:, :, 1], 1, axis=1)
        return gap | template | np.roll(template, 1, axis=1)

    def _check_by_the_definition(self, batch: Batch) -> None:
        n, length = batch.input_ids.shape
        ids, starts = self.rows.ids[:n], self.rows.word_starts[:n]
        draws = slow_draw(SEED, 0, range(n), length)
        selected = slow_select(self.info.maskable[ids], draws, RATE, starts if self.whole_words else None)
        expected = slow_corrupt(ids.tolist(), selected, draws, self.recipe)
        assert (batch.input_ids.tolist(), batch.positions.tolist(), batch.targets.tolist()) == expected


def _seen_and_chosen(masked: Iterator[dict[str, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    batches = list(masked)
    seen, labels = (torch.cat([batch[name] for batch in batches]).numpy() for name in ("input_ids", "labels"))
    return seen, labels != -100


def check_masks(
    ids: np.ndarray, seen: np.ndarray, chosen: np.ndarray, maskable: np.ndarray, starts: np.ndarray
) -> None:
    """The rest is as it was, no special token is chosen, words are whole, and their share is RATE.

    All are [n, T]; starts: 1, a word begins here, as it does at the head of a chunk; words are drawn
    independently, so that the share of the tokens is met to five standard deviations.
    """
    assert (seen[~chosen] == ids[~chosen]).all()
    assert maskable[chosen].all()
    starts = starts.copy()
    starts[:, 0] = True
    first = np.flatnonzero(starts)
    sizes, hits = (np.add.reduceat(each.reshape(-1), first, dtype=int) for each in (maskable, chosen))
    assert ((hits == 0) | (hits == sizes)).all()
    deviation = np.sqrt(RATE * (1 - RATE) * (sizes**2).sum())
    assert abs(hits.sum() - RATE * sizes.sum()) < 5 * deviation
