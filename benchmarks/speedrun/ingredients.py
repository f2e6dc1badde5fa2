"""What recipes are made of beyond mlm's own flags, each off unless its flag asks for it. What pays moves into mlm."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, get_scheduler

from mlm.config import Config as Settings
from mlm.data.batches import Batches
from mlm.data.chunks import Chunks, Rows
from mlm.data.masking import draw
from mlm.engine import optimizer as plain
from mlm.errors import UserError, at_least, at_most
from mlm.model.sparse_head import SparseMaskedLM
from scripts.forks import two_optimizers

CUT = 2**32  # the purpose of draws, beyond those that mlm/data/masking.py takes: the last is DROPOUT + rank


@dataclass(frozen=True)
class IngredientsConfig:
    """Ingredients of recipes."""

    mlm_probability_start: float | None = None  # The mask rate goes from this one to --mlm_probability, linearly.
    mask_spans: bool = False  # Mask spans of tokens, as long as SpanBERT's, instead of single ones.
    recut_epochs: bool = False  # Cut the text at another offset in each epoch.
    average_share: float | None = None  # Save an exponential average of the weights over this share of the steps.
    decay_share: float | None = None  # Hold the learning rate, but for this last share of the steps: 1 - sqrt.
    muon_rate: float | None = None  # Muon at this peak learning rate for the encoder's matrices, AdamW for the rest.

    def __post_init__(self) -> None:
        shares = "mlm_probability_start", "average_share", "decay_share"
        at_least(self, 0, *shares, "muon_rate")
        at_most(self, 1, *shares)


@dataclass(frozen=True)
class Config(Settings):
    ingredients: IngredientsConfig = IngredientsConfig()

    def __post_init__(self) -> None:
        if self.ingredients.mask_spans and self.masking.whole_word_mask:
            raise UserError("--whole_word_mask: spans are of tokens here; leave it out")
        if self.ingredients.average_share is not None and self.train.load_best_model_at_end:
            raise UserError("--load_best_model_at_end: the average of a run is saved, not the best of its weights")
        if self.ingredients.recut_epochs and (self.chunks.line_by_line or self.replay.replay_file):
            raise UserError(
                "--recut_epochs: of one text that is concatenated; leave --line_by_line and --replay_file out"
            )


def make_optimizers(model: SparseMaskedLM, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the encoder's matrices and AdamW for all else."""
    if (rate := config.ingredients.muon_rate) is not None:
        return two_optimizers.make_optimizers(model, config, rate)
    return [plain.make_optimizer(model.named_parameters(), config.optimizer)]


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> LRScheduler:
    """The schedule of mlm's flags, or warm-up, a constant rate and a decay to 0 as 1 - sqrt over `decay_share`."""
    if (share := config.ingredients.decay_share) is None:
        return plain.make_scheduler(optimizer, config.optimizer, steps)
    shape = {"num_decay_steps": max(round(share * steps), 1), "decay_type": "1-sqrt"}
    return get_scheduler("warmup_stable_decay", optimizer, config.optimizer.num_warmup_steps, steps, shape)


def make_average(net: PreTrainedModel, config: Config, steps: int) -> AveragedModel | None:
    """An exponential average of the weights whose memory is a share of the run's steps, however many there are."""
    if (share := config.ingredients.average_share) is None:
        return None
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(share * steps, 1)))


class ShiftedChunks(Chunks):
    """Chunk o * n + c is chunk c of the n that the text has from its token o on, o in 0 … chunk_size - 1."""

    def take(self, chunk_ids: np.ndarray) -> Rows:
        index = self._from(chunk_ids)[0][:, None] + np.arange(self.chunk_size)  # [B, T]
        return Rows(self.ids[index].astype(np.int64), self.word_starts[index], None)

    def _from(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offset, chunk = np.divmod(chunk_ids, len(self))
        first = chunk * self.chunk_size + offset
        return first, len(self.ids) - first


class RecutBatches(Batches):
    """Batches of `ShiftedChunks`, with an offset that is a pure function of (seed, epoch)."""

    def places(self, step: int, begin: int = 0, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        chunk_ids, epochs = super().places(step, begin, end)
        offset = draw(self.seed, epochs, np.zeros_like(epochs), 1, CUT)[:, 0] % np.uint64(self.chunks.chunk_size)
        return chunk_ids + offset.astype(np.int64) * len(self.chunks), epochs


def recut(batches: Batches) -> Batches:
    """The same batches, cut anew in each epoch, which leaves less than a chunk out at both ends of the text."""
    if len(batches.chunks.ids) < 2 * batches.chunks.chunk_size:
        raise UserError("--recut_epochs: one chunk cannot be cut at another offset; give more text")
    full = len(batches.chunks.ids) // batches.chunks.chunk_size  # without one that --remainder pad has added
    chunks = ShiftedChunks(**{**vars(batches.chunks), "num_chunks": full - 1})
    return RecutBatches(**{**vars(batches), "chunks": chunks})
