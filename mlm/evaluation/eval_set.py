"""Eval sets: held-out chunks under fixed masks, the same for two runs whatever the masks of their training."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data import corpus
from mlm.data.batches import Batch, mask_chunks
from mlm.data.chunks import ChunkConfig, Chunks, cut_into_chunks, line_by_line
from mlm.data.masking import Recipe, make_recipe, select_fold, select_words
from mlm.data.order import subset
from mlm.data.token_store import TokenStore, check_words, prepare
from mlm.data.tokenizer import TokenizerInfo
from mlm.errors import UserError, at_least, at_most, in_words_of
from mlm.evaluation.interval import FEWEST
from mlm.model.load import ModelConfig, model_config, position_limit
from mlm.model.vocabulary import OF_ONE_LENGTH

DOCUMENTS, READ = 400, 512  # so many documents, and tokens of each, are measured one by one at most


@dataclass(frozen=True)
class EvaluateConfig:
    """On what, and under which masks, models are measured."""

    per_device_eval_batch_size: int = 32  # Evaluate this many chunks at a time; no figure depends on it.
    max_eval_samples: int | None = None  # Evaluate on this many chunks only, drawn by --eval_mask_seed.
    eval_mlm_probability: float = 0.15  # Predict this share of the tokens (or of the words).
    eval_whole_word_mask: bool = False  # Predict whole words, all of their tokens masked together.
    eval_mask_seed: int = 0  # This seed sets the fixed masks; compare runs that share it.
    eval_mask_seeds: int = 1  # Measure before and after under this many seeds, from that one on.
    eval_mask_folds: int | None = None  # Before and after, predict each token once, in this many mask rounds.

    def __post_init__(self) -> None:
        at_least(self, 1, "per_device_eval_batch_size", "max_eval_samples", "eval_mask_seeds")
        at_least(self, 2, "eval_mask_folds")
        at_most(self, 2**20, "per_device_eval_batch_size")
        at_most(self, 10_000, "eval_mask_seeds", "eval_mask_folds")
        if not 0 <= self.eval_mlm_probability <= 1:
            raise UserError(f"--eval_mlm_probability {self.eval_mlm_probability}: from 0 to 1")

    @property
    def identity(self) -> dict[str, float | None]:
        """The settings that figures depend on, by name."""
        return {name: n for name, n in asdict(self).items() if name != "per_device_eval_batch_size"}

    @property
    def seeds(self) -> list[int]:
        return [self.eval_mask_seed + i for i in range(self.eval_mask_seeds)]

    @property
    def rounds(self) -> list[tuple[int, int]]:
        """Each mask round of a complete evaluation: its mask seed, and its fold, 0 without --eval_mask_folds."""
        return [(seed, fold) for seed in self.seeds for fold in range(self.eval_mask_folds or 1)]


@dataclass(frozen=True)
class EvalSet:
    """Held-out chunks and their masks: what the evaluations of several models have in common."""

    name: str  # the file or data set, for people
    store: TokenStore
    chunks: Chunks
    chunk_ids: np.ndarray | range  # [n] int64, those that are measured
    recipe: Recipe  # always 80% masked, 10% random, 10% unchanged
    info: TokenizerInfo
    config: EvaluateConfig
    one_by_one: "EvalSet | None" = None  # some of its documents, each in a row of its own

    def batch(self, chunk_ids: np.ndarray | range, mask_round: int) -> Batch:
        """The chunks [B] as mask round `mask_round` masks them."""
        chunk_ids = np.asarray(chunk_ids)
        seed, fold = self.config.rounds[mask_round]
        epochs = np.zeros(len(chunk_ids), np.int64)  # fixed masks: those of epoch 0 of the mask seed
        rate, folds = self.config.eval_mlm_probability, self.config.eval_mask_folds

        def select(maskable: np.ndarray, draws: np.ndarray, word_starts: np.ndarray) -> np.ndarray:
            words = word_starts if self.config.eval_whole_word_mask else np.ones_like(word_starts)  # each its own
            if folds:
                return select_fold(maskable, draws, words, fold, folds)
            return select_words(maskable, draws, rate, words)

        return mask_chunks(self.chunks, chunk_ids, epochs, seed, self.info.maskable, self.recipe, select)


def make_eval_set(
    name: str, store: TokenStore, chunking: ChunkConfig, length: int, info: TokenizerInfo, config: EvaluateConfig
) -> EvalSet:
    """The chunks of `length` tokens that `config` chooses. Raises UserError where there is not even one, it has fewer
    tokens than there are folds, or nothing is masked."""
    try:
        chunks = cut_into_chunks(store, chunking, length, info)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if config.eval_mask_folds and config.eval_mask_folds > length:
        raise UserError(f"--eval_mask_folds {config.eval_mask_folds}: a chunk has {length} tokens only")
    chunk_ids = subset(config.eval_mask_seed, len(chunks), config.max_eval_samples)
    eval_set = EvalSet(name, store, chunks, chunk_ids, make_recipe(info), info, config)
    batches = (np.asarray(chunk_ids[first : first + 32]) for first in range(0, len(chunk_ids), 32))
    folds, rate = range(config.eval_mask_folds or 1), config.eval_mlm_probability  # folds mask each token once
    if not any(len(eval_set.batch(part, fold).positions) for part in batches for fold in folds):
        more = "" if config.eval_mask_folds else f", or more than --eval_mlm_probability {rate:g}"
        where = f"{name}: no token in {len(chunk_ids):,} chunks is masked"
        raise UserError(f"{where}, so that nothing would be measured; give more text{more}")
    return eval_set


def one_by_one(eval_set: EvalSet, chunking: ChunkConfig, model: ModelConfig, limit: int | None) -> EvalSet | None:
    """Documents of an eval set from their start to their end, or as far as the model reads, with their special tokens.

    They are masked once, under the first mask seed. None where there are too few of them to draw a conclusion from,
    chunks are documents already, or the model takes one length only.

    limit: the most tokens that the model takes; None: any number"""
    config, length = eval_set.config, eval_set.chunks.chunk_size
    documents = len(eval_set.store.document_offsets) - 1
    one_length = not model.is_demo and model_config(model).model_type in OF_ONE_LENGTH
    if chunking.line_by_line or documents < FEWEST or one_length:
        return None
    static, store = chunking.pad_to_max_length, eval_set.store
    longest = length if static else max(length, min(limit or READ, READ))
    rows = line_by_line(store.ids, store.word_starts, store.document_offsets, longest, eval_set.info)
    chunks = replace(rows, pad_to_max_length=static)
    few = min(config.max_eval_samples or DOCUMENTS, DOCUMENTS)
    chosen = np.asarray(subset(config.eval_mask_seed, documents, few))
    chosen = chosen[np.argsort(chunks.lengths(chosen), kind="stable")]  # so that batches have little padding
    size = max(config.per_device_eval_batch_size * length // longest, 1)
    once = replace(config, eval_mask_seeds=1, eval_mask_folds=None, per_device_eval_batch_size=size)
    return replace(eval_set, chunks=chunks, chunk_ids=chosen, config=once)


def open_eval_sets(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    held_out: TokenStore,
    length: int,
    limit: int | None = None,
) -> dict[str, EvalSet]:
    """ "held_out" and, where there is out-of-domain text, "out_of_domain", both in chunks of `length` tokens.

    config: a mlm.config.Config
    limit:  the most tokens that the models take which are measured; None: as the one of `config`

    Raises UserError where the out-of-domain text cannot be read, or has no chunk."""
    whole_words = config.evaluate.eval_whole_word_mask
    if whole_words:
        check_words(held_out, "--eval_whole_word_mask")
    sources, stores = {"held_out": config.corpus}, {"held_out": held_out}
    if out_of_domain := corpus.out_of_domain(config.out_of_domain, config.corpus):
        with in_words_of("out_of_domain"):
            prepared = prepare(out_of_domain, tokenizer, info, config.token_store, whole_words, only="validation")
        sources["out_of_domain"], stores["out_of_domain"] = out_of_domain, prepared["validation"]
    cut = (config.chunks, length, info, config.evaluate)
    eval_sets = {key: make_eval_set(corpus.origin(sources[key], "validation"), stores[key], *cut) for key in stores}
    whole = one_by_one(eval_sets["held_out"], config.chunks, config.model, limit or position_limit(config.model))
    return eval_sets | {"held_out": replace(eval_sets["held_out"], one_by_one=whole)}
