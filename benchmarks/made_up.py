"""Batches of random words, and what a step of `mlm.engine.update.Update` is timed with."""

from typing import Any

import numpy as np
import torch

from mlm.data.batches import Batch, Batches
from mlm.data.chunks import Chunks
from mlm.data.masking import SCALE, Recipe, select_tokens
from mlm.model.sparse_head import SparseMaskedLM

FIRST_WORD, MASK_ID = 5, 4  # the ids below FIRST_WORD are special in every vocabulary here
SEED, RATE = 0, 0.15


def random_words(chunks: int, length: int, vocabulary: int, global_batch: int) -> Batches:
    """`chunks` chunks of uniformly drawn words, masked as training masks tokens by default."""
    numbers = np.random.default_rng(SEED)
    ids = numbers.integers(FIRST_WORD, vocabulary, chunks * length, dtype=np.uint16)
    recipe = Recipe(
        replace=round(0.8 * SCALE),
        randomise=round(0.9 * SCALE),
        mask_id=MASK_ID,
        maskable_ids=np.arange(FIRST_WORD, vocabulary),
    )
    return Batches(
        Chunks(ids, np.ones(len(ids), bool), length, chunks, pad_id=0),
        recipe,
        np.arange(vocabulary) >= FIRST_WORD,
        select=lambda maskable, draws, rate, word_starts: select_tokens(maskable, draws, rate),
        rate=lambda step: RATE,
        seed=SEED,
        global_batch=global_batch,
    )


class OnDevice(Batch):
    """A batch that is on its device already."""

    def to(self, device: torch.device) -> Batch:
        return self


class Ready:
    """`batches`, but every step has the batch of step 0, which is masked and on the device beforehand."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.loaded: dict[int, tuple[list[Batch], int]] = {}  # by the micro-batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def load(self, step: int, micro_batch: int) -> tuple[list[Batch], int]:
        if micro_batch not in self.loaded:
            share, masked = self.batches.load(0, micro_batch)
            self.loaded[micro_batch] = [OnDevice(*batch.to(self.device)) for batch in share], masked
        return self.loaded[micro_batch]


def labels_of(batch: Batch) -> torch.Tensor:
    """[B, T] int64 on the batch's device: the targets at their positions, -100 elsewhere."""
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.positions] = batch.targets
    return labels.view_as(batch.input_ids)


def dense_objective(model: SparseMaskedLM, batch: Batch) -> torch.Tensor:
    """The model's own loss, from the logits of all positions, as a sum [] of nats over the masked tokens."""
    return model.model(input_ids=batch.input_ids, labels=labels_of(batch)).loss * len(batch.targets)
