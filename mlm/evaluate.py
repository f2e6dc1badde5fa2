"""Exact evaluation: the same chunks under the same masks, each prediction counted once, summed in float64.

    perplexity = exp(total nats / total masked tokens)

A mean of batch means is not this number: batches hold different counts of masked tokens.

What is kept is each prediction, so that sums over chunks, documents or kinds of tokens, and comparisons with
another model, all come from the same numbers. A prediction's nats are put on the grid of multiples of 2**-24
(float32's own from 0.5 to 1): sums of them in float64 are exact in any order, up to 2**29 nats in all, and
the sums of any breakdown add up to the total to the bit. It costs memory: some 60 bytes a prediction at the
end of `evaluate`, and 100 in compare.py, on each process; --max_eval_samples bounds them.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mlm.batches import mask_chunks, subset
from mlm.chunks import ChunkConfig, Chunks, cut_into_chunks
from mlm.errors import UserError, at_least
from mlm.masking import Recipe
from mlm.model import SparseMaskedLM
from mlm.stream import TokenStore
from mlm.tokenizer import TokenFacts

GRID = 2.0**24
LONGEST_SPACED_WORD = 20  # characters; a mean above it is of a script that does not part words by spaces


def exp_or_inf(nats: float) -> float:
    """exp(nats), infinite from 700 on: at 709.8 float64 ends, and math.exp raises."""
    return math.inf if nats >= 700 else math.exp(nats)


@dataclass(frozen=True)
class EvaluateConfig:
    """On what, and under which masks, models are measured."""

    per_device_eval_batch_size: int = 32  # chunks at a time; no figure depends on it
    max_eval_samples: int | None = None  # evaluate on that many chunks only, drawn by --eval_mask_seed
    eval_mask_seed: int = 0  # names the fixed masks; the same for every run that is compared
    eval_mask_seeds: int = 1  # before and after: measure under so many mask seeds, from that one on
    eval_mask_folds: int | None = (
        None  # before and after: predict every token once, a share in each of K passes
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "per_device_eval_batch_size", "max_eval_samples", "eval_mask_seeds")
        at_least(self, 2, "eval_mask_folds")

    @property
    def identity(self) -> dict[str, int | None]:
        """The settings that figures depend on, by name."""
        return {name: n for name, n in asdict(self).items() if name != "per_device_eval_batch_size"}

    @property
    def passes(self) -> list[tuple[int, tuple[int, int] | None]]:
        """The mask seed and the fold, (k, K) or none, of each pass of a complete evaluation."""
        seeds = range(self.eval_mask_seed, self.eval_mask_seed + self.eval_mask_seeds)
        K = self.eval_mask_folds
        return [(seed, fold) for seed in seeds for fold in ([(k, K) for k in range(K)] if K else [None])]


@dataclass(frozen=True)
class Text:
    """Held-out chunks under fixed masks: what the evaluations of several models have in common."""

    name: str  # the file or data set, for people
    store: TokenStore
    chunks: Chunks
    chunk_ids: np.ndarray  # [n] int64, those that are measured
    recipe: Recipe
    facts: TokenFacts
    config: EvaluateConfig


class Evaluation(NamedTuple):
    """What a model made of M masked tokens, in the order of passes, chunks as given, and columns."""

    mask_pass: np.ndarray  # [M] int32, index into EvaluateConfig.passes
    chunk: np.ndarray  # [M] int32, chunk id
    column: np.ndarray  # [M] int32, where in the chunk
    target: np.ndarray  # [M] int32, the token that stood there
    nats: np.ndarray  # [M] float64, its cross entropy, a multiple of 1 / GRID
    hit: np.ndarray  # [M] bool, whether the likeliest token was the right one

    @property
    def masked(self) -> int:
        return len(self.nats)

    @property
    def loss(self) -> float:
        """Nats a masked token; NaN where nothing was masked."""
        return float(self.nats.sum() / self.masked) if self.masked else math.nan

    @property
    def perplexity(self) -> float:
        return exp_or_inf(self.loss)

    @property
    def accuracy(self) -> float:
        return float(self.hit.mean()) if self.masked else math.nan

    @property
    def first_pass(self) -> "Evaluation":
        """The part that the short evaluations during training repeat."""
        return self._part(0, 1)

    def seeds(self, config: EvaluateConfig) -> "list[Evaluation]":
        """Mask seed by mask seed, all folds of each."""
        passes = config.eval_mask_folds or 1
        return [self._part(s * passes, (s + 1) * passes) for s in range(config.eval_mask_seeds)]

    def _part(self, first: int, end: int) -> "Evaluation":
        begin, stop = np.searchsorted(self.mask_pass, [first, end])
        return Evaluation(*(values[begin:stop] for values in self))

    def same_masks(self, other: "Evaluation") -> bool:
        """Whether the two are of the very same tokens, masked in the same passes."""
        return all(np.array_equal(mine, its) for mine, its in zip(self[:4], other[:4], strict=True))

    def summary(self) -> dict[str, float]:
        """The totals, under the names that all_results.json gives them."""
        return {
            "perplexity": self.perplexity,
            "eval_loss": self.loss,
            "accuracy": self.accuracy,
            "eval_masked_tokens": self.masked,
        }


def make_text(
    name: str,
    store: TokenStore,
    chunking: ChunkConfig,
    length: int,
    recipe: Recipe,
    facts: TokenFacts,
    config: EvaluateConfig,
) -> Text:
    """The chunks of `length` tokens that `config` chooses. Raises UserError where there are none."""
    try:
        chunks = cut_into_chunks(store, chunking, length, facts)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if config.eval_mask_folds and config.eval_mask_folds > length:
        raise UserError(f"--eval_mask_folds {config.eval_mask_folds}: a chunk has {length} tokens only")
    chunk_ids = subset(config.eval_mask_seed, len(chunks), config.max_eval_samples)
    return Text(name, store, chunks, chunk_ids, recipe, facts, config)


@torch.no_grad()  # not inference_mode: a buffer that a model makes on first use has to serve training too
def evaluate(
    model: SparseMaskedLM,
    text: Text,
    accelerator: Accelerator,
    complete: bool = True,
    stopped: Callable[[], int] = lambda: 0,
) -> Evaluation | None:
    """Measures `model` on a text, its chunks cut into contiguous shares over the processes.

    complete: under the masks of all passes, else of the first one alone
    stopped: asked before each batch whether to give it up; where one process does, all return None.
    """
    n, rank, world = len(text.chunk_ids), accelerator.process_index, accelerator.num_processes
    start, end = n * rank // world, n * (rank + 1) // world
    size = text.config.per_device_eval_batch_size
    parts = [text.chunk_ids[first : min(first + size, end)] for first in range(start, end, size)]
    passes = list(enumerate(text.config.passes))
    was_training = model.training
    model.eval()
    places = [np.zeros((4, 0), np.int32)]  # pass, chunk, column, target of each prediction
    nats, hits = (
        [torch.zeros(0, dtype=kind, device=accelerator.device)] for kind in (torch.float, torch.bool)
    )
    gave_up = False
    for (number, (seed, fold)), part in itertools.product(passes if complete else passes[:1], parts):
        if gave_up := bool(stopped()):
            break
        epochs = np.zeros(len(part), np.int64)  # fixed masks: those of epoch 0 of the mask seed
        batch = mask_chunks(text.chunks, part, epochs, seed, text.recipe, text.facts.ordinary, fold)
        row, column = np.divmod(batch.positions.numpy(), batch.input_ids.shape[1])
        places.append(
            np.array([np.full(len(row), number), part[row], column, batch.targets.numpy()], np.int32)
        )
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            batch_nats, batch_hits = model(
                batch.input_ids, batch.positions, batch.targets, batch.attention_mask
            )
        nats.append(batch_nats)
        hits.append(batch_hits)
    model.train(was_training)

    share = None
    if not gave_up:
        # the evaluation's one synchronisation
        exact = np.round(torch.cat(nats).cpu().double().numpy() * GRID) / GRID
        right = torch.cat(hits).cpu().numpy()
        share = Evaluation(*np.concatenate(places, axis=1), exact, right)
    shares = gather_object([share])
    if any(share is None for share in shares):
        return None
    whole = Evaluation(*map(np.concatenate, zip(*shares, strict=True)))
    order = np.argsort(whole.mask_pass, kind="stable")  # within a pass, shares follow each other already
    return Evaluation(*(values[order] for values in whole))


def evaluate_all(
    model: SparseMaskedLM,
    texts: dict[str, Text],
    accelerator: Accelerator,
    complete: bool = True,
    stopped: Callable[[], int] = lambda: 0,
) -> dict[str, Evaluation] | None:
    """`evaluate` on each of the texts; None as soon as one is given up."""
    found: dict[str, Evaluation] = {}
    for name, text in texts.items():
        evaluation = evaluate(model, text, accelerator, complete, stopped)
        if evaluation is None:
            return None
        found[name] = evaluation
    return found


def measure(evaluation: Evaluation, text: Text) -> dict[str, Any]:
    """A model's figures on a text: `summary`, bits per character and per word, perplexity by mask seed.

    bits per character = loss / ln 2 · ordinary tokens of the text / its characters

    over the whole text, documents as they were read: code points, and words parted by white space (None where
    they are longer than LONGEST_SPACED_WORD on average, as in a script without spaces). These do not depend
    on the tokenizer, so that models with different ones can be compared. It is no likelihood of the text, and
    no compression rate: each token was predicted from both its sides, some of them masked as well, and
    unknown tokens, which are never predicted, cost nothing.
    """
    header = text.store.header
    bits = evaluation.loss / math.log(2) * header["ordinary_tokens"]
    characters, words = header["characters"], header["spaced_words"]
    spaced = characters <= LONGEST_SPACED_WORD * words
    return {
        **evaluation.summary(),
        "bits_per_character": bits / max(characters, 1),
        "bits_per_word": bits / max(words, 1) if spaced else None,
        "perplexity_by_seed": [part.perplexity for part in evaluation.seeds(text.config)],
    }


def token_counts(store: TokenStore, size: int) -> np.ndarray:
    """How often each of `size` tokens stands in a store: [size] int64."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(store.ids), 1 << 24):  # so that a corpus larger than memory works
        counts += np.bincount(store.ids[start : start + (1 << 24)], minlength=size)
    return counts


def unigram_perplexity(counts: np.ndarray, ordinary: np.ndarray, targets: np.ndarray) -> float:
    """What a model that knows nothing but frequencies makes of the very tokens that `evaluate` masks.

    Maximum likelihood over the ordinary tokens of the training stream, with add-one smoothing (Laplace):
    p(token) = (count + 1) / (ordinary tokens + size of the ordinary vocabulary).

    counts: [V] int64, of the training stream; ordinary: [V] bool; targets: [M], the masked tokens
    """
    smoothed = (counts + 1)[ordinary]
    logs = np.zeros(len(counts))
    logs[ordinary] = np.log(smoothed) - np.log(smoothed.sum())
    return math.exp(-logs[targets].mean()) if len(targets) else math.nan
