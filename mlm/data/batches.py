"""Which chunks a step sees, and with which masks: a pure function of (seed, step).

Five chunks under seed 1, in global batches of four, on two processes:

epochs            | epoch 0: 2 4 0 3 1 | epoch 1: 3 4 1 0 2 | …    a permutation each, by (seed, epoch)
global batches    | 2 4 0 3 | 1 3 4 1 | 0 2 …                      step s takes places 4s … 4s + 3
rank 0, rank 1    | 2 4, 0 3 | 1 3, 4 1 | …                        contiguous shares, as even as they come

A chunk's masks are keyed by the epoch in which it is seen, so that it has new ones in each. A process computes, takes
and masks its own share alone: what it costs a process does not grow with their number.
Replay, three more chunks in a share of a quarter, takes every fourth place, and has epochs and orders of its own:

domain, replay    | 2 4 0 7 | 3 1 3 5 | 4 1 0 6 | …           numbers 5 … 7, so that no draws are those of the domain
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
import torch

from mlm.data.chunks import Chunks, Mixture
from mlm.data.masking import Recipe, corrupt, draw
from mlm.data.order import AT_ONCE, mixture_seen, seen_before
from mlm.data.packing import pack


class Batch(NamedTuple):
    """B masked chunks, M tokens of which are predicted."""

    input_ids: torch.Tensor  # [B, T] int64, corrupted
    positions: torch.Tensor  # [M] int64 into the flat B * T, ascending
    targets: torch.Tensor  # [M] int64, the tokens that stood there
    attention_mask: torch.Tensor | None  # [B, T], 0: padding, int64 1: a token; or int32 k: a token of the row's
    # document k = 1, 2, … of several; None: every row is full
    sources: torch.Tensor | None = None  # [M] int64, the targets' sources by number; None: there is one

    @property
    def tokens(self) -> int:
        """Tokens, padding not counted. Waits for the device where the batch is on one and has padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.count_nonzero())

    def to(self, device: torch.device) -> "Batch":
        pin = device.type == "cuda"  # a copy from memory that is not pinned synchronises the device
        ready = (t.pin_memory() if pin and t is not None else t for t in self)
        return Batch(*(t if t is None else t.to(device, non_blocking=pin) for t in ready))

    def packed(self, row: np.ndarray, column: np.ndarray, pad_id: int) -> "Batch":
        """The batch with its B documents moved to a `row` [B], which ascend from 0, from a `column` [B] on."""
        if row[-1] == len(row) - 1:
            return self  # each has a row of its own
        B, T = self.input_ids.shape
        inside = torch.ones(B, T, dtype=torch.bool) if self.attention_mask is None else self.attention_mask.bool()
        width = max(T, int((torch.from_numpy(column) + inside.sum(1)).max()))  # T with --pad_to_max_length
        first = torch.from_numpy(row * width + column)  # [B] in the flat rows
        number = torch.from_numpy(np.arange(B) - np.searchsorted(row, row) + 1).int()  # [B], from 1 in each row
        document, token = inside.nonzero(as_tuple=True)  # [N] each
        input_ids = torch.full((row[-1] + 1, width), pad_id)
        documents = torch.zeros_like(input_ids, dtype=torch.int32)
        input_ids.view(-1)[first[document] + token] = self.input_ids[inside]
        documents.view(-1)[first[document] + token] = number[document]
        positions = first[self.positions // T] + self.positions % T
        return self._replace(input_ids=input_ids, positions=positions, attention_mask=documents)


Select = Callable[[np.ndarray, np.ndarray, float, np.ndarray], np.ndarray]
"""(maskable [B, T] bool, draws [B, T] uint64, rate, word_starts [B, T] bool) -> [B, T] bool, 1: predicted"""
SelectAtRate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # the same without the rate


def mask_chunks(
    chunks: Chunks | Mixture,
    chunk_ids: np.ndarray,
    epochs: np.ndarray,
    seed: int,
    maskable: np.ndarray,
    recipe: Recipe,
    select: SelectAtRate,
) -> Batch:
    """Takes chunks [B] from the store and masks them. epochs: [B] int64, in which each is seen; maskable: [V] bool"""
    ids, word_starts, lengths = chunks.take(chunk_ids)
    draws, allowed = draw(seed, epochs, chunk_ids, ids.shape[1]), maskable[ids]
    selected = select(allowed, draws, word_starts)
    if selected.shape != allowed.shape or selected.dtype != bool:
        raise ValueError(f"select returned {selected.dtype} {selected.shape}, it has to be bool {allowed.shape}")
    corrupted = corrupt(ids, selected & allowed, draws, recipe)  # special and unused tokens never
    padded = lengths is not None and (lengths < ids.shape[1]).any()
    attention_mask = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]).long() if padded else None
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
    samples: int | None = None  # train on this many of the domain's chunks only, drawn by the seed
    replay: Sequence[Chunks] = ()  # of further sources
    shares: dict[str, Fraction] = field(default_factory=dict)  # of all chunks, that each of these has, by its name
    pack: bool = False  # several documents share a row, where they fit

    @property
    def mixture(self) -> Mixture:
        return Mixture((self.chunks, *self.replay))

    @property
    def num_chunks(self) -> int:
        """Chunks of the domain in an epoch."""
        return min(self.samples or len(self.chunks), len(self.chunks))

    def epochs(self, step: int) -> dict[str, float]:
        """How many epochs of each source, the domain and the replay, the first `step` steps see."""
        [seen] = seen_before(np.array([step * self.global_batch]), [*self.shares.values()]).T  # [1 + K]
        sizes = [self.num_chunks, *map(len, self.replay)]
        return dict(zip(("domain", *self.shares), (seen / sizes).tolist(), strict=True))

    def expected(self, step: int) -> int:
        """A power of two near the masked tokens of the global batch, which each process knows by itself."""
        tokens = min(len(self.chunks.ids) / len(self.chunks), self.chunks.chunk_size)  # of a chunk
        return 2 ** round(math.log2(max(self.rate(step) * self.global_batch * tokens, 1)))

    def due(self, every: int | Literal["epoch"] | None, step: int) -> bool:
        """Whether something done every so many steps (or after every epoch) is due after `step` steps."""
        if every == "epoch":
            return int(self.epochs(step)["domain"]) > int(self.epochs(step - 1)["domain"])
        return every is not None and step % every == 0

    def places(self, step: int, begin: int = 0, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The chunk ids [n] int64, of `mixture`, at places begin … end - 1 (default: all) of a step's global batch,
        and the epoch [n] int64 of each."""
        G, n = self.global_batch, (self.global_batch if end is None else end) - begin
        steps = max(AT_ONCE // max(n, 1), 1)  # of so many, these places are computed together, and kept
        first = step // steps * steps * G + begin
        given = self.seed, (*map(len, self.mixture.sources),), self.num_chunks, (*self.shares.values(),)
        return tuple(mixture_seen(*given, range(first, first + steps * G, G), n)[:, step % steps].copy())

    def load(self, step: int, micro_batch: int) -> tuple[list[Batch], int]:
        """This process's share of a step, and the number of masked tokens in it. The share is cut into micro-batches
        of at most `micro_batch` rows; an empty share has none."""
        share = (-(-self.global_batch * rank // self.world) for rank in (self.rank, self.rank + 1))
        chunk_ids, epochs = self.places(step, *share)
        row, column = np.arange(len(chunk_ids)), np.zeros(len(chunk_ids), np.int64)
        if self.pack:  # the whole share: rows are fuller, and no matter how they are cut
            row, column = pack(self.mixture.lengths(chunk_ids), self.chunks.chunk_size)
        order = np.lexsort((column, row))
        firsts = np.searchsorted(row[order], range(0, row.max(initial=-1) + 1, micro_batch))
        batches = []
        for own in np.split(order, firsts)[1:]:
            batch = self.mask(step, chunk_ids[own], epochs[own])
            batches.append(batch.packed(row[own] - row[own[0]], column[own], self.chunks.pad_id))
        return batches, sum(len(batch.positions) for batch in batches)

    def mask(self, step: int, chunk_ids: np.ndarray, epochs: np.ndarray) -> Batch:
        """Masks chunks at the rate of a step. chunk_ids, epochs: [B] int64, as in `mask_chunks`"""
        rate, mixture = self.rate(step), self.mixture
        given = mixture, chunk_ids, epochs, self.seed, self.maskable, self.recipe
        batch = mask_chunks(*given, lambda allowed, draws, words: self.select(allowed, draws, rate, words))
        source = torch.from_numpy(mixture.locate(chunk_ids)[0])  # [B]
        return batch._replace(sources=source[batch.positions // batch.input_ids.shape[1]] if self.replay else None)
