"""Masks from a counter-based hash: drawing is apart from corrupting.

    draws = draw(seed, epoch, chunk_ids, length)            64 random bits for each token's place
    selected = select_tokens(maskable, draws, rate)         which tokens are predicted
    corrupted = corrupt(ids, selected, draws, recipe)       what the model sees: a pure function of these

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

from mlm.data.tokenizer import TokenizerInfo
from mlm.errors import UserError

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
# What a stream is for, so that the order of chunks tells nothing of their masks. DROPOUT + rank comes last.
MASKS, ORDER, SUBSET, DROPOUT = 1, 2, 3, 4
ALL_BITS = 2**64 - 1
SCALE = 1 << 32


@dataclass(frozen=True)
class MaskingConfig:
    """How many tokens are predicted, and what the model sees in their place."""

    mlm_probability: float = 0.15  # Predict this share of the tokens (or of the words).
    mask_replace_prob: float = 0.8  # Replace this share of the predicted tokens by the mask token.
    random_replace_prob: float = 0.1  # Replace this share of them by a random token; the rest stays as it is.
    whole_word_mask: bool = False  # Mask all tokens of a word together.

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
    """What a predicted token is replaced by, in integers: thresholds are shares of 2**32, so that 1 takes all."""

    replace: int  # a predicted token becomes the mask token where its second draw lies below this,
    randomise: int  # a random maskable token where it lies below that; otherwise it stays
    mask_id: int
    maskable_ids: np.ndarray  # [R] int64, the ids a random replacement is drawn from

    @property
    def digest(self) -> str:
        """A fingerprint: with equal digests `corrupt` does the same to the same tokens."""
        thresholds = f"{self.replace} {self.randomise} {self.mask_id} "
        return hashlib.sha256(thresholds.encode() + self.maskable_ids.tobytes()).hexdigest()[:16]


class Corrupted(NamedTuple):
    """A corrupted batch, M tokens of it to be predicted: NumPy arrays or torch tensors, as the input was."""

    ids: np.ndarray  # [B, T] int64, what the model sees
    positions: np.ndarray  # [M] int64 into the flat B * T, ascending
    targets: np.ndarray  # [M] int64, what stood there


def make_recipe(info: TokenizerInfo, mask: float = 0.8, randomise: float = 0.1) -> Recipe:
    """The shares of predicted tokens that become the mask token, and a random one, as integer thresholds.

    By default BERT's own (Devlin et al. 2019, section 3.1): 80% masked, 10% random, 10% as they are.
    """
    return Recipe(
        replace=_threshold(mask),
        randomise=min(_threshold(mask + randomise), SCALE),
        mask_id=info.mask_id,
        maskable_ids=np.flatnonzero(info.maskable),
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


def select_tokens(maskable: np.ndarray, draws: np.ndarray, rate: float) -> np.ndarray:
    """Each maskable token with probability `rate`, on its own: [B, T] bool, 1: predicted.

    maskable: [B, T] bool, 1: no special or unused token
    draws:    [B, T] uint64

    What is selected at a lower rate is selected at any higher one.
    """
    return (draws >> np.uint64(32) < _threshold(rate)) & maskable


def select_words(maskable: np.ndarray, draws: np.ndarray, rate: float, word_starts: np.ndarray) -> np.ndarray:
    """Each word with probability `rate`, all of its maskable tokens together: [B, T] bool, 1: predicted.

    A word has the draw of its first token in the chunk. Arguments as in `select_tokens`, and
    word_starts: [B, T] bool, 1: a word begins here.
    """
    hit = draws >> np.uint64(32) < _threshold(rate)
    starts = word_starts.copy()
    starts[:, :1] = True  # a chunk may begin inside a word
    return _through_words(hit.reshape(-1), starts.reshape(-1)).reshape(hit.shape) & maskable


def select_fold(
    maskable: np.ndarray, draws: np.ndarray, word_starts: np.ndarray | None, fold: int, folds: int
) -> np.ndarray:
    """Which tokens are predicted in pass `fold` of `folds`: [B, T] bool, one pass for each maskable token.

    The order of its draw among the chunk's tokens decides, dealt out in turn from a fold that the chunk's
    draws name. So the folds of a chunk differ by one token or word at most. Words stay together where
    `word_starts` is given. Arguments as in `select_words`.
    """
    rows, length = draws.shape
    head = (
        np.broadcast_to(np.arange(length), draws.shape) if word_starts is None else _word_heads(word_starts)
    )
    units = np.zeros((rows, length), bool)  # 1: a token, or a word, to be dealt out
    row, column = np.nonzero(maskable)
    units[row, head[row, column]] = True
    order = np.argsort(np.where(units, draws, ALL_BITS), axis=1, kind="stable")
    turn = np.empty((rows, length), np.int64)
    np.put_along_axis(turn, order, np.broadcast_to(np.arange(length), draws.shape), axis=1)
    turn += ((draws[:, :1] & np.uint64(0xFFFFFFFF)) % np.uint64(folds)).astype(np.int64)
    return (np.take_along_axis(turn % folds, head, axis=1) == fold) & maskable


def corrupt(ids: np.ndarray, selected: np.ndarray, draws: np.ndarray, recipe: Recipe) -> Corrupted:
    """What the model sees, where it predicts, and what stood there.

    ids:      [B, T] int64
    selected: [B, T] bool, 1: predicted
    draws:    [B, T] uint64
    """
    positions = np.flatnonzero(selected)  # [M]
    targets = ids.reshape(-1)[positions]
    second = _mix(draws.reshape(-1)[positions])  # fresh bits: the first draw was used up on the selection
    fate = second >> np.uint64(32)
    drawn = (second & np.uint64(0xFFFFFFFF)) * np.uint64(len(recipe.maskable_ids)) >> np.uint64(32)
    seen = np.where(fate < recipe.randomise, recipe.maskable_ids[drawn], targets)
    seen = np.where(fate < recipe.replace, recipe.mask_id, seen)
    corrupted = ids.copy()
    corrupted.reshape(-1)[positions] = seen
    return Corrupted(corrupted, positions, targets)


# The same on torch tensors of any device, to the bit. Training masks on the host, while the device computes;
# these are for masking on the device instead, which benchmarks/gpu.py times.


def select_tokens_torch(maskable: torch.Tensor, draws: torch.Tensor, rate: float) -> torch.Tensor:
    """`select_tokens` of draws [B, T] int64."""
    return (_shift(draws, 32) < _threshold(rate)) & maskable


def select_words_torch(
    maskable: torch.Tensor, draws: torch.Tensor, rate: float, word_starts: torch.Tensor
) -> torch.Tensor:
    """`select_words` of draws [B, T] int64."""
    column = torch.arange(draws.shape[1], device=draws.device)
    first = torch.where(word_starts, column, 0).cummax(dim=1).values  # [B, T]
    return select_tokens_torch(maskable, draws.gather(1, first), rate)


def corrupt_torch(
    ids: torch.Tensor, selected: torch.Tensor, draws: torch.Tensor, recipe: Recipe
) -> Corrupted:
    """`corrupt` of draws [B, T] int64. `nonzero` synchronises the device."""
    positions = selected.reshape(-1).nonzero().squeeze(1)  # [M]
    targets = ids.reshape(-1)[positions]
    second = _mix_torch(draws.reshape(-1)[positions])
    fate = _shift(second, 32)
    maskable_ids = torch.from_numpy(recipe.maskable_ids).to(ids.device)
    drawn = _shift((second & 0xFFFFFFFF) * len(maskable_ids), 32)
    seen = torch.where(fate < recipe.randomise, maskable_ids[drawn], targets)
    seen = torch.where(fate < recipe.replace, recipe.mask_id, seen)
    corrupted = ids.reshape(-1).index_copy(0, positions, seen).reshape(ids.shape)
    return Corrupted(corrupted, positions, targets)


def _threshold(share: float) -> int:
    return round(share * SCALE)


def _word_heads(word_starts: np.ndarray) -> np.ndarray:
    """[B, T] int64, the column where each token's word begins in its chunk."""
    column = np.arange(word_starts.shape[1])
    return np.maximum.accumulate(np.where(word_starts, column, 0), axis=1)


def _through_words(hit: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """What a word's first token has, given to all its tokens; [n] bool each, starts[0] is 1.

    A segmented scan by doubling (Hillis & Steele, "Data parallel algorithms", CACM 1986), since passes over
    bool arrays are all but free: as many as the logarithm of the longest word hit, whatever the tokens.
    """
    hit, inside, reach = hit & starts, ~starts, 1  # inside: the last `reach` tokens start no word
    while (further := hit[:-reach] & inside[reach:]).any():
        hit[reach:] |= further
        inside[reach:] &= inside[:-reach]
        reach *= 2
    return hit


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
