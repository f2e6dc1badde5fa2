"""Exact evaluation: the same chunks under the same masks, each counted once, summed in float64.

    perplexity = exp(total nats / total masked tokens)

A mean of batch means is not this number: batches hold different counts of masked tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from mlm.batches import Batch, mask_chunks
from mlm.chunks import Chunks
from mlm.errors import at_least
from mlm.masking import Recipe
from mlm.model import SparseMaskedLM
from mlm.stream import TokenStore
from mlm.tokenizer import TokenFacts


@dataclass(frozen=True)
class EvaluateConfig:
    per_device_eval_batch_size: int = 32  # chunks at a time; no figure depends on it
    max_eval_samples: int | None = None  # evaluate on that many chunks only, drawn by --eval_mask_seed
    eval_mask_seed: int = 0  # names the fixed masks; the same for every run that is compared

    def __post_init__(self) -> None:
        at_least(self, 1, "per_device_eval_batch_size", "max_eval_samples")


@dataclass(frozen=True)
class Evaluation:
    """What a model made of n held-out chunks, chunk by chunk."""

    chunk_ids: np.ndarray  # [n] int64
    nats: np.ndarray  # [n] float64, summed cross entropy of the masked tokens
    counts: np.ndarray  # [n] int64, masked tokens
    hits: np.ndarray  # [n] int64, masked tokens whose likeliest token was the right one

    @property
    def loss(self) -> float:
        """Nats a masked token; NaN where nothing was masked."""
        return float(self.nats.sum() / self.counts.sum()) if self.counts.any() else math.nan

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss >= 700 else math.exp(self.loss)

    @property
    def accuracy(self) -> float:
        return float(self.hits.sum() / self.counts.sum()) if self.counts.any() else math.nan

    def summary(self) -> dict[str, float]:
        """The totals, under the names that all_results.json gives them."""
        return {
            "perplexity": self.perplexity,
            "eval_loss": self.loss,
            "accuracy": self.accuracy,
            "eval_masked_tokens": int(self.counts.sum()),
        }


def unigram_perplexity(
    train: TokenStore,
    chunks: Chunks,
    chunk_ids: np.ndarray,
    recipe: Recipe,
    facts: TokenFacts,
    config: EvaluateConfig,
) -> float:
    """What a model that knows nothing but frequencies makes of the very tokens that `evaluate` masks.

    Maximum likelihood over the ordinary tokens of the training stream, with add-one smoothing (Laplace):
    p(token) = (count + 1) / (ordinary tokens + size of the ordinary vocabulary).
    """
    counts = np.zeros(facts.size, np.int64)
    for start in range(0, len(train.ids), 1 << 24):  # so that a corpus larger than memory works
        counts += np.bincount(train.ids[start : start + (1 << 24)], minlength=facts.size)
    smoothed = (counts + 1)[facts.ordinary]
    logs = np.zeros(facts.size)
    logs[facts.ordinary] = np.log(smoothed) - np.log(smoothed.sum())
    total, masked = 0.0, 0
    for first in range(0, len(chunk_ids), config.per_device_eval_batch_size):
        part = chunk_ids[first : first + config.per_device_eval_batch_size]
        targets = mask_held_out(chunks, part, recipe, facts, config).targets.numpy()
        total, masked = total - logs[targets].sum(), masked + len(targets)
    return math.exp(total / masked) if masked else math.nan


def mask_held_out(
    chunks: Chunks, chunk_ids: np.ndarray, recipe: Recipe, facts: TokenFacts, config: EvaluateConfig
) -> Batch:
    """Held-out chunks under their fixed masks: those of epoch 0 of --eval_mask_seed."""
    epochs = np.zeros(len(chunk_ids), np.int64)
    return mask_chunks(chunks, chunk_ids, epochs, config.eval_mask_seed, recipe, facts.ordinary)


@torch.no_grad()  # not inference_mode: a buffer that a model makes on first use has to serve training too
def evaluate(
    model: SparseMaskedLM,
    chunks: Chunks,
    chunk_ids: np.ndarray,
    recipe: Recipe,
    facts: TokenFacts,
    config: EvaluateConfig,
    accelerator: Accelerator,
    stopped: Callable[[], int] = lambda: 0,
) -> Evaluation | None:
    """Measures `model` on the chunks `chunk_ids` [n], cut into contiguous shares over the processes.

    stopped: asked before each batch whether to give it up; where one process does, all return None.
    """
    n, rank, world = len(chunk_ids), accelerator.process_index, accelerator.num_processes
    start, end = n * rank // world, n * (rank + 1) // world
    was_training = model.training
    model.eval()
    nats, hits, rows, gave_up = [], [], [], False
    for first in range(start, end, config.per_device_eval_batch_size):
        if gave_up := bool(stopped()):
            break
        part = chunk_ids[first : min(first + config.per_device_eval_batch_size, end)]
        batch = mask_held_out(chunks, part, recipe, facts, config)
        rows.append(first + batch.positions.numpy() // batch.input_ids.shape[1])
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            batch_nats, batch_hits = model(
                batch.input_ids, batch.positions, batch.targets, batch.attention_mask
            )
        nats.append(batch_nats)
        hits.append(batch_hits)
    model.train(was_training)

    # nats, hits and counts of every chunk in float64, zero for those of other processes; last, who gave up
    sums = np.zeros((3, n + 1))
    sums[0, n] = gave_up
    if rows:
        row = np.concatenate(rows)  # [masked tokens of this share] which chunk each belongs to
        # the pass's one synchronisation
        sums[0, :n] = np.bincount(row, torch.cat(nats).cpu().double().numpy(), n)
        sums[1, :n] = np.bincount(row, torch.cat(hits).cpu().numpy(), n)
        sums[2, :n] = np.bincount(row, minlength=n)
    if world > 1:
        sums = accelerator.reduce(torch.from_numpy(sums).to(accelerator.device)).cpu().numpy()
    if sums[0, n]:
        return None
    nats, hits, counts = sums[:, :n]
    return Evaluation(chunk_ids, nats, counts.astype(np.int64), hits.astype(np.int64))
