"""Masks from a counter-based hash: drawing is apart from corrupting.

    draws = draw(seed, epoch, chunk_ids, length)            64 random bits for each token's place
    corrupted = corrupt(ids, maskable, draws, recipe)       a pure function of these

No generator carries state: a mask depends on (seed, epoch, chunk id, position) and the recipe alone, not on
batch size, worker, process, device or restart. NumPy and torch compute the same bits: both wrap at 64.

The mixing is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014):
position t of a stream is mix(key + (t + 1) * GOLDEN), with the finalizer of Stafford's variant 13.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mlm.errors import UserError
from mlm.tokenizer import TokenFacts

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
# What a stream is for, so that the order of chunks tells nothing of their masks. DROPOUT + rank comes last.
MASKS, ORDER, SUBSET, DROPOUT = 1, 2, 3, 4
ALL_BITS = 2**64 - 1


@dataclass(frozen=True)
class MaskingConfig:
    """How many tokens are predicted, and what the model sees in their place."""

    mlm_probability: float = 0.15  # share of the tokens (or of the words) that are predicted
    mask_replace_prob: float = 0.8  # ... of these, the share that becomes the mask token
    random_replace_prob: float = 0.1  # ... and the share that becomes a random token; the rest stays as it is
    whole_word_mask: bool = False  # all tokens of a word are masked together

    def __post_init__(self) -> None:
        for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: a probability lies between 0 and 1")
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise UserError(
                f"--mask_replace_prob {self.mask_replace_prob} and --random_replace_prob "
                f"{self.random_replace_prob} sum to more than 1"
            )


@dataclass(frozen=True)
class Recipe:
    """What `corrupt` does with a draw, in integers; thresholds are shares of 2**32, so that 1 takes all."""

    select: int  # a token is predicted where the upper half of its draw lies below this
    replace: int  # a predicted token becomes the mask token where its second draw lies below this,
    randomise: int  # a random ordinary token where it lies below that; otherwise it stays
    mask_id: int
    ordinary_ids: np.ndarray  # [R] int64, the ids a random replacement is drawn from
    whole_word: bool

    @property
    def digest(self) -> str:
        """A fingerprint: equal digests make equal masks of equal draws."""
        thresholds = f"{self.select} {self.replace} {self.randomise} {self.mask_id} {self.whole_word} "
        return hashlib.sha256(thresholds.encode() + self.ordinary_ids.tobytes()).hexdigest()[:16]


class Corrupted(NamedTuple):
    """A corrupted batch, M tokens of it to be predicted: NumPy arrays or torch tensors, as the input was."""

    ids: np.ndarray  # [B, T] int64, what the model sees
    positions: np.ndarray  # [M] int64 into the flat B * T, ascending
    targets: np.ndarray  # [M] int64, what stood there


def make_recipe(config: MaskingConfig, facts: TokenFacts) -> Recipe:
    """The probabilities as integer thresholds, with the tokenizer's ids."""
    scale = 1 << 32
    return Recipe(
        select=round(config.mlm_probability * scale),
        replace=round(config.mask_replace_prob * scale),
        randomise=min(round((config.mask_replace_prob + config.random_replace_prob) * scale), scale),
        mask_id=facts.mask_id,
        ordinary_ids=np.flatnonzero(facts.ordinary),
        whole_word=config.whole_word_mask,
    )


def mix(x: int) -> int:
    """SplitMix64's finalizer on a Python integer, modulo 2**64: the definition that both kernels follow."""
    x = (x ^ (x >> SHIFTS[0])) * MULTIPLIERS[0] & ALL_BITS
    x = (x ^ (x >> SHIFTS[1])) * MULTIPLIERS[1] & ALL_BITS
    return x ^ (x >> SHIFTS[2])


def stream_key(seed: int, epoch: int, purpose: int) -> int:
    """The 64-bit key of all draws of (seed, epoch) for one purpose."""
    key = 0
    for word in (seed, epoch, purpose):
        key = mix((key + GOLDEN + (word & ALL_BITS)) & ALL_BITS)
    return key


def draw(seed: int, epoch: int, chunk_ids: np.ndarray, length: int, purpose: int = MASKS) -> np.ndarray:
    """chunk_ids [B] -> [B, length] uint64, uniform; `draw_torch` has the same bits in int64."""
    chunk_keys = np.asarray(chunk_ids).astype(np.uint64) * np.uint64(GOLDEN)
    chunk_keys = _mix(chunk_keys + np.uint64(stream_key(seed, epoch, purpose)))  # [B]
    steps = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(GOLDEN)  # [T]
    return _mix(chunk_keys[:, None] + steps)


def draw_torch(seed: int, epoch: int, chunk_ids: torch.Tensor, length: int) -> torch.Tensor:
    """chunk_ids [B] int64 -> [B, length] int64 on their device: the bits of `draw`."""
    golden = _signed(GOLDEN)
    chunk_keys = _mix_torch(chunk_ids * golden + _signed(stream_key(seed, epoch, MASKS)))  # [B]
    steps = torch.arange(1, length + 1, device=chunk_ids.device) * golden  # [T]
    return _mix_torch(chunk_keys[:, None] + steps)


def select(
    maskable: np.ndarray, draws: np.ndarray, recipe: Recipe, word_starts: np.ndarray | None = None
) -> np.ndarray:
    """Which tokens are predicted: [B, T] bool.

    maskable:    [B, T] bool, 1: an ordinary token
    draws:       [B, T] uint64
    word_starts: [B, T] bool, 1: a word begins here; for whole words, which share the draw of
                 their first token in the chunk
    """
    hit = draws >> np.uint64(32) < recipe.select
    if recipe.whole_word:
        starts = word_starts.copy()
        starts[:, :1] = True  # a chunk may begin inside a word
        word = np.cumsum(starts) - 1  # [B * T] each token's, counted through the batch
        hit = hit[starts][word].reshape(hit.shape)
    return hit & maskable


def corrupt(
    ids: np.ndarray,
    maskable: np.ndarray,
    draws: np.ndarray,
    recipe: Recipe,
    word_starts: np.ndarray | None = None,
) -> Corrupted:
    """ids [B, T] int64 -> what the model sees, where it predicts, and what stood there. As in `select`."""
    positions = np.flatnonzero(select(maskable, draws, recipe, word_starts))  # [M]
    targets = ids.reshape(-1)[positions]
    second = _mix(draws.reshape(-1)[positions])  # fresh bits: the first draw was used up on the selection
    fate = second >> np.uint64(32)
    drawn = (second & np.uint64(0xFFFFFFFF)) * np.uint64(len(recipe.ordinary_ids)) >> np.uint64(32)
    seen = np.where(fate < recipe.randomise, recipe.ordinary_ids[drawn], targets)
    seen = np.where(fate < recipe.replace, recipe.mask_id, seen)
    corrupted = ids.copy()
    corrupted.reshape(-1)[positions] = seen
    return Corrupted(corrupted, positions, targets)


def corrupt_torch(
    ids: torch.Tensor,
    maskable: torch.Tensor,
    draws: torch.Tensor,
    recipe: Recipe,
    word_starts: torch.Tensor | None = None,
) -> Corrupted:
    """`corrupt` on tensors of any device (draws int64), to the bit. `nonzero` synchronises the device."""
    chosen = draws
    if recipe.whole_word:
        column = torch.arange(draws.shape[1], device=draws.device)
        first = torch.where(word_starts, column, 0).cummax(dim=1).values  # [B, T]
        chosen = draws.gather(1, first)
    selected = (_shift(chosen, 32) < recipe.select) & maskable
    positions = selected.reshape(-1).nonzero().squeeze(1)  # [M]
    targets = ids.reshape(-1)[positions]
    second = _mix_torch(draws.reshape(-1)[positions])
    fate = _shift(second, 32)
    ordinary_ids = torch.from_numpy(recipe.ordinary_ids).to(ids.device)
    drawn = _shift((second & 0xFFFFFFFF) * len(ordinary_ids), 32)
    seen = torch.where(fate < recipe.randomise, ordinary_ids[drawn], targets)
    seen = torch.where(fate < recipe.replace, recipe.mask_id, seen)
    corrupted = ids.reshape(-1).index_copy(0, positions, seen).reshape(ids.shape)
    return Corrupted(corrupted, positions, targets)


def shuffle(seed: int, epoch: int, n: int, purpose: int = ORDER) -> np.ndarray:
    """The permutation [n] int64 of 0 … n - 1 that (seed, epoch) names: the order of n draws."""
    return np.argsort(draw(seed, epoch, np.zeros(1, dtype=np.int64), n, purpose)[0], kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """`mix` on uint64, in place: the passes over memory are what it costs."""
    x ^= x >> SHIFTS[0]
    x *= MULTIPLIERS[0]
    x ^= x >> SHIFTS[1]
    x *= MULTIPLIERS[1]
    x ^= x >> SHIFTS[2]
    return x


def _mix_torch(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, SHIFTS[0])) * _signed(MULTIPLIERS[0])
    x = (x ^ _shift(x, SHIFTS[1])) * _signed(MULTIPLIERS[1])
    return x ^ _shift(x, SHIFTS[2])


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift right: torch's own on int64 copies the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    """The int64 with the bits of the unsigned x."""
    return x - (1 << 64) if x >> 63 else x
