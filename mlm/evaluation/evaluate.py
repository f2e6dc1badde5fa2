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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from mlm.data.batches import mask_chunks
from mlm.data.token_store import TokenStore
from mlm.evaluation.eval_set import EvalSet, EvaluateConfig
from mlm.figures import exp_or_inf
from mlm.model.sparse_head import SparseMaskedLM

GRID = 2.0**24
LONGEST_SPACED_WORD = 20  # characters; a mean above it is of a script that does not part words by spaces


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


class Evaluations(dict[str, Evaluation]):
    """Evaluations by the name of their eval set, in a form that a checkpoint can hold."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{"held_out.nats": [M], ...}: each column of each evaluation, on the CPU, sharing its memory."""
        return {
            f"{name}.{column}": torch.from_numpy(values)
            for name, evaluation in self.items()
            for column, values in evaluation._asdict().items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Replaces what is here by what `state_dict` gave, to the bit."""
        self.clear()
        for name in dict.fromkeys(key.rpartition(".")[0] for key in state):
            columns = (state[f"{name}.{column}"].cpu().numpy() for column in Evaluation._fields)
            self[name] = Evaluation(*columns)


@torch.no_grad()  # not inference_mode: a buffer that a model makes on first use has to serve training too
def evaluate(
    model: SparseMaskedLM,
    eval_set: EvalSet,
    accelerator: Accelerator,
    complete: bool = True,
    stopped: Callable[[], int] = lambda: 0,
) -> Evaluation | None:
    """Measures `model` on a text, its chunks cut into contiguous shares over the processes.

    complete: under the masks of all passes, else of the first one alone
    stopped: asked before each batch whether to give it up; where one process does, all return None.
    """
    n, rank, world = len(eval_set.chunk_ids), accelerator.process_index, accelerator.num_processes
    start, end = n * rank // world, n * (rank + 1) // world
    size = eval_set.config.per_device_eval_batch_size
    parts = [eval_set.chunk_ids[first : min(first + size, end)] for first in range(start, end, size)]
    passes = list(enumerate(eval_set.config.passes))
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
        batch = mask_chunks(
            eval_set.chunks,
            part,
            epochs,
            seed,
            eval_set.info.maskable,
            eval_set.recipe,
            eval_set.selection(fold),
        )
        row, column = np.divmod(batch.positions.numpy(), batch.input_ids.shape[1])
        places.append(
            np.array([np.full(len(row), number), part[row], column, batch.targets.numpy()], np.int32)
        )
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            # bf16's argmax is slower on a CPU than widening and float32's
            logits = model(batch.input_ids, batch.positions, batch.attention_mask).float()  # [M, V]
            nats.append(F.cross_entropy(logits, batch.targets, reduction="none"))
            hits.append(logits.argmax(dim=-1) == batch.targets)
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
    eval_sets: dict[str, EvalSet],
    accelerator: Accelerator,
    complete: bool = True,
    stopped: Callable[[], int] = lambda: 0,
) -> Evaluations | None:
    """`evaluate` on each of `eval_sets`; None as soon as one is given up."""
    evaluations = Evaluations()
    for name, eval_set in eval_sets.items():
        evaluation = evaluate(model, eval_set, accelerator, complete, stopped)
        if evaluation is None:
            return None
        evaluations[name] = evaluation
    return evaluations


def measure(evaluation: Evaluation, eval_set: EvalSet) -> dict[str, Any]:
    """A model's figures on a text: `summary`, bits per character and per word, perplexity by mask seed.

    bits per character = loss / ln 2 · ordinary tokens of the text / its characters

    over the whole text, documents as they were read: code points, and words parted by white space (None where
    they are longer than LONGEST_SPACED_WORD on average, as in a script without spaces). These do not depend
    on the tokenizer, so that models with different ones can be compared. It is no likelihood of the text, and
    no compression rate: each token was predicted from both its sides, some of them masked as well, and
    unknown tokens, which are never predicted, cost nothing.
    """
    header = eval_set.store.header
    bits = evaluation.loss / math.log(2) * header["maskable_tokens"]
    characters, words = header["characters"], header["spaced_words"]
    spaced = characters <= LONGEST_SPACED_WORD * words
    return {
        **evaluation.summary(),
        "bits_per_character": bits / max(characters, 1),
        "bits_per_word": bits / max(words, 1) if spaced else None,
        "perplexity_by_seed": [part.perplexity for part in evaluation.seeds(eval_set.config)],
    }


def token_counts(store: TokenStore, size: int) -> np.ndarray:
    """How often each of `size` tokens stands in a store: [size] int64."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(store.ids), 1 << 24):  # so that a corpus larger than memory works
        counts += np.bincount(store.ids[start : start + (1 << 24)], minlength=size)
    return counts


def unigram_perplexity(counts: np.ndarray, maskable: np.ndarray, targets: np.ndarray) -> float:
    """What a model that knows nothing but frequencies makes of the very tokens that `evaluate` masks.

    Maximum likelihood over the ordinary tokens of the training stream, with add-one smoothing (Laplace):
    p(token) = (count + 1) / (ordinary tokens + size of the ordinary vocabulary).

    counts: [V] int64, of the training stream; ordinary: [V] bool; targets: [M], the masked tokens
    """
    smoothed = (counts + 1)[maskable]
    logs = np.zeros(len(counts))
    logs[maskable] = np.log(smoothed) - np.log(smoothed.sum())
    return math.exp(-logs[targets].mean()) if len(targets) else math.nan
