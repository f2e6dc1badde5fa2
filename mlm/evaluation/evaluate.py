"""Exact evaluation: the same chunks under the same masks, each prediction counted once, summed in float64.

    perplexity = exp(total nats / total masked tokens)

An evaluation keeps every prediction, so that all sums and comparisons come from the same numbers. Nats are rounded to
multiples of 2**-24 (float32's own spacing from 0.5 to 1): sums of them in float64 are exact in any order, up to 2**29
nats in all. Memory on the main process is some 60 bytes a prediction at the end of `evaluate`, and 100 in compare.py;
--max_eval_samples bounds it."""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import release_memory

from mlm.engine.distributed import from_main, gather_on_main
from mlm.engine.memory import out_of_memory
from mlm.errors import UserError
from mlm.evaluation.eval_set import EvalSet, EvaluateConfig
from mlm.figures import exp_or_inf, mean
from mlm.model.load import MOST_UNKNOWN
from mlm.model.predict import cross_entropy, without_dropout
from mlm.model.sparse_head import SparseMaskedLM

log = logging.getLogger(__name__)

GRID = 2.0**24
CHARACTER = math.log2(154_998)  # bits; so many characters are assigned in Unicode 16
LONGEST_SPACED_WORD = 20  # characters; a higher mean is that of a script without spaces between words


class Evaluation(NamedTuple):
    """A model's predictions of M masked tokens, in the order of mask rounds, chunks as given, and columns."""

    mask_round: np.ndarray  # [M] int32, index into EvaluateConfig.rounds
    chunk: np.ndarray  # [M] int64, chunk id
    column: np.ndarray  # [M] int32, where in the chunk
    target: np.ndarray  # [M] int32, the token that stood there
    nats: np.ndarray  # [M] float64, its cross entropy, a multiple of 1 / GRID
    hit: np.ndarray  # [M] bool, whether the likeliest token was the right one

    @property
    def masked(self) -> int:
        return len(self.nats)

    @property
    def loss(self) -> float:
        """Nats a masked token."""
        return mean(float(self.nats.sum()), self.masked)

    @property
    def perplexity(self) -> float:
        return exp_or_inf(self.loss)

    @property
    def first_round(self) -> "Evaluation":
        """The first mask round, which is all that the evaluations during training measure."""
        return Evaluation(*(values[self.mask_round == 0] for values in self))

    def seeds(self, config: EvaluateConfig) -> "list[Evaluation]":
        """One evaluation for each mask seed, with all of its folds."""
        seed = self.mask_round // (config.eval_mask_folds or 1)
        return [Evaluation(*(values[seed == s] for values in self)) for s in range(config.eval_mask_seeds)]

    def same_masks(self, other: "Evaluation") -> bool:
        """Whether both are of the same tokens, masked in the same rounds."""
        return all(np.array_equal(mine, its) for mine, its in zip(self[:4], other[:4], strict=True))

    def summary(self) -> dict[str, float]:
        """The totals, under the names that all_results.json gives them; NaN where nothing was masked."""
        accuracy = mean(int(self.hit.sum()), self.masked)
        figures = {"perplexity": self.perplexity, "eval_loss": self.loss, "accuracy": accuracy}
        return {**figures, "eval_masked_tokens": self.masked}


class Evaluations(dict[str, Evaluation]):
    """Evaluations by the name of their eval set, in a form that a checkpoint can hold."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{"held_out.nats": [M], ...}: each column of each evaluation, on the CPU, sharing its memory."""
        columns = {f"{name}.{column}": v for name, own in self.items() for column, v in own._asdict().items()}
        return {name: torch.from_numpy(values) for name, values in columns.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Replaces what is here by what `state_dict` gave, to the bit."""
        self.clear()
        for name in dict.fromkeys(key.rpartition(".")[0] for key in state):
            self[name] = Evaluation(*(state[f"{name}.{column}"].cpu().numpy() for column in Evaluation._fields))


def evaluate(
    model: SparseMaskedLM,
    eval_set: EvalSet,
    accelerator: Accelerator,
    complete: bool = True,
    stopped: Callable[[], int] = lambda: 0,
) -> Evaluation | None:
    """Measures `model` on an eval set, its chunks cut into contiguous shares over the processes.

    The main process gets the evaluation, through host memory, the others one of no predictions. Where a batch does not
    fit into memory, this process continues with batches of half the size. No figure depends on the size, and the
    processes meet only at the end. Raises UserError, on all of them, where one chunk does not fit.

    complete: all mask rounds, else the first one alone
    stopped: asked before each batch; where it is true on any process, all return None"""
    try:
        with without_dropout(model):
            share = _evaluate_share(model, eval_set, accelerator, complete, stopped)
    except UserError as error:
        share = error
    shares = gather_on_main(share, accelerator)
    failures = [part for part in shares if isinstance(part, UserError)]
    if from_main(failures[0] if failures else None in shares, accelerator):
        return None
    columns = [np.concatenate(column) for column in zip(*shares, strict=True)] or [column[:0] for column in share]
    order = np.argsort(columns[0], kind="stable")  # by mask round; in a round, the shares are in order already
    return Evaluation(*(column[order] for column in columns))


def _evaluate_share(
    model: SparseMaskedLM, eval_set: EvalSet, accelerator: Accelerator, complete: bool, stopped: Callable[[], int]
) -> Evaluation | None:
    """As `evaluate`, this process's share of the chunks."""
    n, rank, world = len(eval_set.chunk_ids), accelerator.process_index, accelerator.num_processes
    chunk_ids = eval_set.chunk_ids[n * rank // world : n * (rank + 1) // world]
    size = eval_set.config.per_device_eval_batch_size
    none, empty = np.zeros(0, np.int32), torch.zeros(0, device=accelerator.device)
    predictions = [(none, none.astype(np.int64), none, none, empty, empty.bool())]  # for a process with an empty share
    for mask_round in range(len(eval_set.config.rounds) if complete else 1):
        left = chunk_ids
        while len(left):
            if stopped():
                return None
            try:
                predicted = _predict(model, eval_set, accelerator, np.asarray(left[:size]), mask_round)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                predicted = None
            if predicted is None:  # outside of `except`, whose traceback holds the activations
                size = min(size, len(left)) // 2
                if size == 0:
                    reason = f"out of memory evaluating one chunk of {eval_set.chunks.chunk_size} tokens"
                    raise UserError(f"{reason} (--per_device_eval_batch_size 1): use a shorter --max_seq_length")
                release_memory()
                log.info("out of memory in evaluation: from here on %d chunks at a time", size)
            else:
                predictions.append(predicted)
                left = left[size:]
    *places, nats, hits = zip(*predictions, strict=True)
    # The device synchronises here and nowhere else.
    exact = np.round(torch.cat(nats).cpu().double().numpy() * GRID) / GRID
    return Evaluation(*map(np.concatenate, places), exact, torch.cat(hits).cpu().numpy())


@torch.no_grad()  # not inference_mode: a buffer that a model makes on first use has to serve training too
def _predict(
    model: SparseMaskedLM, eval_set: EvalSet, accelerator: Accelerator, chunk_ids: np.ndarray, mask_round: int
) -> tuple[np.ndarray | torch.Tensor, ...]:
    """The columns of an Evaluation of the chunks [B], nats and hits still on the device."""
    batch = eval_set.batch(chunk_ids, mask_round)
    row, column = np.divmod(batch.positions.numpy(), batch.input_ids.shape[1])
    small = np.array([np.full(len(row), mask_round), column, batch.targets.numpy()], np.int32)
    batch = batch.to(accelerator.device)
    with accelerator.autocast():
        # bf16's argmax is slower on a CPU than widening and float32's
        logits = model(batch.input_ids, batch.positions, batch.attention_mask).float()  # [M, V]
        hits = logits.argmax(dim=-1) == batch.targets
        return small[0], chunk_ids[row], *small[1:], cross_entropy(logits, batch.targets), hits


def evaluate_all(
    model: SparseMaskedLM,
    eval_sets: dict[str, EvalSet],
    accelerator: Accelerator,
    complete: bool = True,
    stopped: Callable[[], int] = lambda: 0,
) -> Evaluations | None:
    """`evaluate` on each of `eval_sets`, if complete on "documents" one by one too; None once one is given up."""
    evaluations, whole = Evaluations(), eval_sets["held_out"].one_by_one if complete else None
    for name, eval_set in (eval_sets | ({"documents": whole} if whole else {})).items():
        if (evaluation := evaluate(model, eval_set, accelerator, complete, stopped)) is None:
            return None
        evaluations[name] = evaluation
    return evaluations


def measure(evaluation: Evaluation, eval_set: EvalSet) -> dict[str, Any]:
    """A model's figures on a text: `summary`, bits per character and per word, perplexity by mask seed.

    bits per character = (loss / ln 2 · maskable tokens of the text + bits of its unknown ones) / its characters

    Characters are code points of the documents as they were read, words are separated by white space (None in a script
    without spaces). Neither depends on the tokenizer, so that models with different ones can be compared. The figure
    is neither a likelihood of the text nor a compression rate: each token was predicted from both its sides."""
    header = eval_set.store.header
    characters, words = header["characters"], header["spaced_words"]
    bits = evaluation.loss / math.log(2) * header["maskable_tokens"]
    bits += unknown_bits(header["maskable_tokens"], header["unknown_tokens"], characters)
    spaced = characters <= LONGEST_SPACED_WORD * words
    return {
        **evaluation.summary(),
        "bits_per_character": bits / max(characters, 1),
        "bits_per_word": bits / max(words, 1) if spaced else None,
        "perplexity_by_seed": [part.perplexity for part in evaluation.seeds(eval_set.config)],
    }


def unknown_bits(known: int, unknown: int, characters: int) -> float:
    """What the unknown tokens of a text cost, which no model predicts: nothing is known of the characters behind them.

    Each character costs CHARACTER bits, and an unknown token stands for as many as a token does on average. NaN where
    more than MOST_UNKNOWN of the tokens are unknown: then such a guess would decide the figure."""
    if unknown > MOST_UNKNOWN * (known + unknown):
        return math.nan
    return unknown * CHARACTER * characters / max(known + unknown, 1)


def unigram_perplexity(counts: np.ndarray, maskable: np.ndarray, targets: np.ndarray) -> float:
    """The perplexity of a model that knows token frequencies alone, with add-one smoothing (Laplace).

    p(token) = (count + 1) / Σ (count + 1) over the maskable vocabulary

    counts: [V] int64, of the training corpus; maskable: [V] bool; targets: [M] int, the masked tokens"""
    logs = np.log(counts + 1) - np.log((counts + 1)[maskable].sum())
    return math.exp(-logs[targets].mean()) if len(targets) else math.nan
