"""Masks from a counter-based hash: drawing, selecting and corrupting are three pure functions.

    draws = draw(seed, epoch, chunk_ids, length)          [B, T] 64 random bits a token
    selected = select_tokens(maskable, draws, rate)       [B, T] which tokens are predicted
    corrupted = corrupt(ids, selected, draws, recipe)     what the model sees, where, and what stood there

    ids                      [CLS]  the     film  ##s     [SEP]
    maskable                 0      1       1     1       0
    word_starts              1      1       1     0       1
    draws, in shares         0.1    0.2     0.9   0.3     0.4
    select_tokens, rate 0.5  .      x       .     x       .         maskable, and a draw below the rate
    select_words, rate 0.5   .      x       .     .       .         "films" has the draw of "film"
    select_fold 0 of 2       .      x       x     .       .         ranks of the draws: the 0, ##s 1, film 2
    select_fold 1 of 2       .      .       .     x       .
    corrupt(select_tokens)   [CLS]  [MASK]  film  [MASK]  [SEP]     positions 1 3, targets the ##s

No generator carries state: a mask depends on (seed, epoch, chunk id, position), the rate and the recipe alone, not on
batch size, worker, process, device or restart. NumPy and torch compute the same bits, as both wrap at 64 bits.

The mixing is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014):
number t of the sequence with a key is mix(key + (t + 1) * GOLDEN), and mix is Stafford's variant 13."""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mlm.data.tokenizer import TokenizerInfo
from mlm.errors import UserError

Array = Any  # a NumPy array, or a torch tensor on any device: both have the operators; 64 bits are uint64 or int64
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
# What draws are for: the order of chunks must be independent of their masks. DROPOUT + rank comes last.
SOURCE, MASKS, ORDER, SUBSET, DROPOUT = 0, 1, 2, 3, 4
ALL_BITS = 2**64 - 1
SCALE = 1 << 32  # thresholds are shares of it, compared with 32 bits of a draw; 1 takes all


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
        if not self.mlm_probability:
            raise UserError("--mlm_probability 0 predicts no token, so that nothing would be learnt")
        mask, randomise = self.mask_replace_prob, self.random_replace_prob
        if mask + randomise > 1 + 1e-9:
            raise UserError(f"--mask_replace_prob {mask} and --random_replace_prob {randomise} sum to more than 1")


@dataclass(frozen=True)
class Recipe:
    """What a predicted token is replaced by, decided by a second draw."""

    replace: int  # of SCALE; a second draw below this: the mask token,
    randomise: int  # of SCALE; else below this: a random maskable token; else the token stays
    mask_id: int
    maskable_ids: np.ndarray  # [R] int64, the ids that a random replacement is drawn from

    @property
    def digest(self) -> str:
        """A fingerprint: recipes with equal digests corrupt alike."""
        thresholds = f"{self.replace} {self.randomise} {self.mask_id} "
        return hashlib.sha256(thresholds.encode() + self.maskable_ids.tobytes()).hexdigest()[:16]


class Corrupted(NamedTuple):
    """A corrupted batch with M predicted tokens."""

    ids: Array  # [B, T] int64, what the model sees
    positions: Array  # [M] int64 into the flat B * T, ascending
    targets: Array  # [M] int64, the tokens that stood there


def make_recipe(info: TokenizerInfo, mask: float = 0.8, randomise: float = 0.1) -> Recipe:
    """A recipe of the shares that become the mask token and a random token. The defaults are BERT's (Devlin et al.
    2019, section 3.1): 80% masked, 10% random, 10% unchanged."""
    either = min(round((mask + randomise) * SCALE), SCALE)
    return Recipe(round(mask * SCALE), either, info.mask_id, np.flatnonzero(info.maskable))


def stream_key(seed: int, epoch: int, purpose: int) -> int:
    """The 64-bit key of the draws of (seed, epoch) for one purpose. Any integer is a seed, modulo 2**64."""
    return int(_stream_keys(seed, np.array([epoch & ALL_BITS], np.uint64), purpose)[0])


def _stream_keys(seed: int, epochs: np.ndarray, purpose: int) -> np.ndarray:
    """`stream_key` of each epoch: [B] uint64."""
    key = np.zeros(1, np.uint64)
    for word in (np.uint64(seed & ALL_BITS), epochs, np.uint64(purpose)):
        key = mix_int64(key + np.uint64(GOLDEN) + word)
    return key


def draw(seed: int, epochs: int | np.ndarray, chunk_ids: np.ndarray, length: int, purpose: int = MASKS) -> np.ndarray:
    """chunk_ids [B] -> draws [B, length] uint64, uniform over all 64 bits. epochs: one, or [B] one for each chunk"""
    keys = _stream_keys(seed, np.asarray(epochs).astype(np.uint64), purpose)
    chunk_keys = mix_int64(np.asarray(chunk_ids).astype(np.uint64) * np.uint64(GOLDEN) + keys)  # [B]
    steps = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(GOLDEN)  # [T]
    return mix_int64(chunk_keys[:, None] + steps)


def draw_torch(seed: int, epoch: int, chunk_ids: torch.Tensor, length: int) -> torch.Tensor:
    """chunk_ids [B] int64 -> [B, length] int64 on their device, the bits of `draw`: to mask there, not on the host."""
    golden = _signed(GOLDEN)
    chunk_keys = mix_int64(chunk_ids * golden + _signed(stream_key(seed, epoch, MASKS)))  # [B]
    steps = torch.arange(1, length + 1, device=chunk_ids.device) * golden  # [T]
    return mix_int64(chunk_keys[:, None] + steps)


def select_tokens(maskable: Array, draws: Array, rate: float) -> Array:
    """Selects each maskable token with probability `rate`, in 0 … 1, independently: [B, T] bool, 1: predicted. A lower
    rate selects a subset of what a higher one does. maskable [B, T] bool, draws [B, T] uint64, or int64 tensors"""
    return (shift(draws, 32) < round(rate * SCALE)) & maskable


def select_words(maskable: np.ndarray, draws: np.ndarray, rate: float, word_starts: np.ndarray) -> np.ndarray:
    """Selects each word with probability `rate`, its maskable tokens together: [B, T] bool, 1: predicted. A word has
    the draw of its first token in the chunk. Arguments as in `select_tokens`, and word_starts [B, T] bool."""
    starts = word_starts.copy()
    starts[:, :1] = True  # a chunk may begin inside a word
    hit = select_tokens(starts, draws, rate)
    return _through_words(hit.reshape(-1), starts.reshape(-1)).reshape(hit.shape) & maskable


def select_words_torch(
    maskable: torch.Tensor, draws: torch.Tensor, rate: float, word_starts: torch.Tensor
) -> torch.Tensor:
    """`select_words` on tensors; draws [B, T] int64."""
    column = torch.arange(draws.shape[1], device=draws.device)
    first = torch.where(word_starts, column, 0).cummax(dim=1).values  # [B, T]
    return select_tokens(maskable, draws.gather(1, first), rate)


def select_fold(
    maskable: np.ndarray, draws: np.ndarray, word_starts: np.ndarray | None, fold: int, folds: int
) -> np.ndarray:
    """Selects one fold, in [0, folds), of several, which partition the maskable tokens: [B, T] bool, 1: predicted. The
    chunk's tokens (with word_starts [B, T], its words) are ranked by their draws and dealt out to the folds in turn,
    beginning at a fold that depends on the chunk's first draw. So the folds of a chunk differ by one at most."""
    column = np.broadcast_to(np.arange(draws.shape[1]), draws.shape)  # [B, T]
    # [B, T] the column at which each token's word begins in its chunk
    head = column if word_starts is None else np.maximum.accumulate(np.where(word_starts, column, 0), axis=1)
    units = np.zeros(draws.shape, bool)  # 1: a token, or the head of a word, to deal out
    row, place = np.nonzero(maskable)
    units[row, head[row, place]] = True
    order = np.argsort(np.where(units, draws, ALL_BITS), axis=1, kind="stable")
    turn = np.empty(draws.shape, np.int64)
    np.put_along_axis(turn, order, column, axis=1)
    turn += ((draws[:, :1] & np.uint64(0xFFFFFFFF)) % np.uint64(folds)).astype(np.int64)
    return (np.take_along_axis(turn % folds, head, axis=1) == fold) & maskable


def corrupt(ids: Array, selected: Array, draws: Array, recipe: Recipe) -> Corrupted:
    """Replaces the selected tokens, [B, T] bool, of ids, [B, T] int64, by the recipe and the draws, as above."""
    of = torch if isinstance(ids, torch.Tensor) else np
    positions = of.argwhere(selected.reshape(-1))[:, 0]  # [M]; the host waits for the device here
    targets = ids.reshape(-1)[positions]
    second = mix_int64(draws.reshape(-1)[positions])  # fresh bits: the first draw was used up on the selection
    fate, maskable_ids = shift(second, 32), of.asarray(recipe.maskable_ids, device=ids.device)
    drawn = shift((second & 0xFFFFFFFF) * len(maskable_ids), 32)
    seen = of.where(fate < recipe.randomise, maskable_ids[drawn], targets)
    seen = of.where(fate < recipe.replace, recipe.mask_id, seen)
    corrupted = of.asarray(ids, copy=True)
    corrupted.reshape(-1)[positions] = seen
    return Corrupted(corrupted, positions, targets)


def _through_words(hit: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sets all tokens of a word whose first token is set in `hit`; [n] bool each, starts[0] is 1. A segmented scan by
    doubling (Hillis & Steele, "Data parallel algorithms", CACM 1986): its number of steps is the logarithm of the
    longest selected word, and a step over a bool array costs next to nothing."""
    inside, reach = ~starts, 1  # inside: the last `reach` tokens start no word
    while (further := hit[:-reach] & inside[reach:]).any():
        hit[reach:] |= further
        inside[reach:] &= inside[:-reach]
        reach *= 2
    return hit


def mix_int64(x: Array) -> Array:
    """SplitMix64's finalizer of each element, in place: memory traffic is what it costs."""
    for by, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        x ^= shift(x, by)
        x *= multiplier if x.dtype == np.uint64 else _signed(multiplier)
    x ^= shift(x, SHIFTS[-1])
    return x


def shift(x: Array, by: int) -> Array:
    """Logical right shift: that of int64 copies the sign."""
    return x >> by if x.dtype == np.uint64 else (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    """The int64 with the bits of the unsigned x."""
    return x - (1 << 64) if x >> 63 else x
