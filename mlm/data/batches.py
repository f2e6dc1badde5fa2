"""Which chunks a step sees, and with which masks: a pure function of (seed, step).

Five chunks under seed 1, in global batches of four, on two processes:

epochs            | epoch 0: 2 4 0 3 1 | epoch 1: 3 4 1 0 2 | …    a permutation each, by (seed, epoch)
global batches    | 2 4 0 3 | 1 3 4 1 | 0 2 …                      step s takes places 4s … 4s + 3
rank 0, rank 1    | 2 4, 0 3 | 1 3, 4 1 | …                        contiguous shares, as even as they come

A chunk's masks are keyed by the epoch in which it is seen, so that it has new ones in each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from mlm.data.chunks import Chunks, Rows
from mlm.data.masking import Recipe, corrupt, draw
from mlm.data.order import chunks_seen


class Batch(NamedTuple):
    """B masked chunks, M tokens of which are predicted."""

    input_ids: torch.Tensor  # [B, T] int64, corrupted
    positions: torch.Tensor  # [M] int64 into the flat B * T, ascending
    targets: torch.Tensor  # [M] int64, the tokens that stood there
    attention_mask: torch.Tensor | None  # [B, T] int64, 0: padding; None: every row is full

    def to(self, device: torch.device) -> "Batch":
        pin = device.type == "cuda"  # a copy from memory that is not pinned synchronises the device
        ready = (t.pin_memory() if pin and t is not None else t for t in self)
        return Batch(*(t if t is None else t.to(device, non_blocking=pin) for t in ready))


Select = Callable[[np.ndarray, np.ndarray, float, np.ndarray], np.ndarray]
"""(maskable [B, T] bool, draws [B, T] uint64, rate, word_starts [B, T] bool) -> [B, T] bool, 1: predicted"""
SelectAtRate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # the same without the rate


def mask_chunks(
    chunks: Chunks,
    chunk_ids: np.ndarray,
    epochs: np.ndarray,
    seed: int,
    maskable: np.ndarray,
    recipe: Recipe,
    select: SelectAtRate,
) -> Batch:
    """Takes chunks [B] from the store and masks them; epochs [B] int64: in which each is seen.

    maskable: [V] bool, 1: may be masked
    """
    (ids, _, lengths), draws, selected = _selected(chunks, chunk_ids, epochs, seed, maskable, select)
    corrupted = corrupt(ids, selected, draws, recipe)
    attention_mask = None
    if lengths is not None and (lengths < ids.shape[1]).any():
        attention_mask = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
    return Batch(*map(torch.from_numpy, corrupted), attention_mask)


@dataclass(frozen=True)
class Batches:
    """The training batches of process `rank` of `world`."""

    chunks: Chunks
    recipe: Recipe
    maskable: np.ndarray  # [V] bool, 1: may be masked
    select: Select  # selects the tokens to predict, at a rate
    rate: Callable[[int], float]  # at a step
    seed: int
    global_batch: int  # chunks a step, over all processes
    rank: int = 0
    world: int = 1
    samples: int | None = None  # train on this many chunks only, drawn by the seed

    @property
    def num_chunks(self) -> int:
        """Chunks in an epoch."""
        return min(self.samples or len(self.chunks), len(self.chunks))

    def tokens(self, step: int) -> int:
        """Tokens in the global batch of a step, padding not counted."""
        return int(self.chunks.lengths(self.places(step)[0]).sum())

    def due(self, every: int | Literal["epoch"] | None, step: int) -> bool:
        """Whether something done every so many steps (or after every epoch) is due after `step` steps."""
        if every == "epoch":
            done, before = (s * self.global_batch // self.num_chunks for s in (step, step - 1))  # epochs
            return done > before
        return every is not None and step % every == 0

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch of a step: its chunk ids [G] int64, and the epoch [G] int64 of each."""
        return chunks_seen(self.seed, step * self.global_batch, self.global_batch, len(self.chunks), self.num_chunks)

    def load(self, step: int, micro_batch: int) -> tuple[list[Batch], int]:
        """This process's share of a step, and the number of masked tokens in the whole global batch.

        The share is cut into micro-batches of at most `micro_batch` chunks; an empty share has none. The mean
        loss divides by the number, which each process counts for itself, without communication.
        """
        chunk_ids, epochs = self.places(step)
        start, end = (-(-self.global_batch * r // self.world) for r in (self.rank, self.rank + 1))
        cuts = [slice(i, min(i + micro_batch, end)) for i in range(start, end, micro_batch)]
        share = [self.mask(step, chunk_ids[cut], epochs[cut]) for cut in cuts]
        masked = sum(len(batch.positions) for batch in share)
        others = np.r_[0:start, end : self.global_batch]
        if len(others):
            given = self.seed, self.maskable, self._select_at(step)
            masked += int(_selected(self.chunks, chunk_ids[others], epochs[others], *given)[2].sum())
        return share, masked

    def mask(self, step: int, chunk_ids: np.ndarray, epochs: np.ndarray) -> Batch:
        """Masks chunks at the rate of a step. chunk_ids, epochs: [B] int64, as in `mask_chunks`"""
        select = self._select_at(step)
        return mask_chunks(self.chunks, chunk_ids, epochs, self.seed, self.maskable, self.recipe, select)

    def _select_at(self, step: int) -> SelectAtRate:
        rate = self.rate(step)
        return lambda maskable, draws, word_starts: self.select(maskable, draws, rate, word_starts)


def _selected(
    chunks: Chunks, chunk_ids: np.ndarray, epochs: np.ndarray, seed: int, maskable: np.ndarray, select: SelectAtRate
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """The chunks [B, T], their draws [B, T], and which tokens `select` chose [B, T], special and unused ones never."""
    rows = chunks.take(chunk_ids)
    draws, allowed = draw(seed, epochs, chunk_ids, rows.ids.shape[1]), maskable[rows.ids]
    selected = select(allowed, draws, rows.word_starts)
    if selected.shape != allowed.shape or selected.dtype != bool:
        raise ValueError(f"select returned {selected.dtype} {selected.shape}, it has to be bool {allowed.shape}")
    return rows, draws, selected & allowed
