"""The settings of a run: one frozen dataclass a module. The command line is made of them (cli.py)."""

import math
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal, Self

from mlm.data.chunks import ChunkConfig
from mlm.data.corpus import CorpusConfig, OutOfDomainConfig
from mlm.data.masking import MaskingConfig
from mlm.data.order import ReplayConfig
from mlm.data.task import TaskConfig
from mlm.data.token_store import TokenStoreConfig
from mlm.engine.checkpoint import CheckpointConfig
from mlm.engine.device import DeviceConfig
from mlm.engine.optimizer import OptimizerConfig
from mlm.engine.update import UpdateConfig
from mlm.errors import UserError, at_least, at_most
from mlm.evaluation.eval_set import EvaluateConfig
from mlm.model.load import ModelConfig
from mlm.report.run_directory import RunConfig

MOST_STEPS = 10**9


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and when to evaluate."""

    seed: int = 42  # The seed sets the order of chunks, training masks, dropout and fresh weights.
    num_train_epochs: float = 3.0  # Each training chunk of the domain is seen this many times.
    max_train_steps: int | None = None  # Take this many optimizer steps, instead of epochs.
    max_train_samples: int | None = None  # Train on this many of the domain's chunks only, drawn by --seed.
    eval_on_start: bool = True  # Evaluate the model before the first step.
    eval_steps: int | Literal["epoch"] = "epoch"  # Evaluate at this interval, and always at the end.
    load_best_model_at_end: bool = False  # Keep the weights of the lowest evaluation loss, not the last ones.

    def __post_init__(self) -> None:
        at_least(self, 1, "max_train_steps", "max_train_samples", "eval_steps")
        at_least(self, 0, "num_train_epochs")
        at_most(self, MOST_STEPS, "max_train_steps", "num_train_epochs")

    def steps(self, chunks: int, global_batch: int | Fraction) -> int:
        """Optimizer steps of the run, over so many chunks: the last one reaches into the next epoch."""
        chunks = min(self.max_train_samples or chunks, chunks)
        steps = self.max_train_steps or math.ceil(round(self.num_train_epochs * chunks / global_batch, 6))
        if steps > MOST_STEPS:
            raise UserError(f"--num_train_epochs {self.num_train_epochs}: {steps:,} steps, at most {MOST_STEPS:,}")
        return steps


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    out_of_domain: OutOfDomainConfig = field(default_factory=OutOfDomainConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    token_store: TokenStoreConfig = field(default_factory=TokenStoreConfig)
    chunks: ChunkConfig = field(default_factory=ChunkConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def added(self) -> dict[str, Any]:
        """The settings that a fork's subclass has added, which its results depend on too."""
        return {name: value for name, value in asdict(self).items() if name not in Config.__dataclass_fields__}

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """of(learning_rate=1e-4): settings under the names of their flags. Raises UserError for another name."""
        parts = {}
        for module in fields(cls):
            own = [setting.name for setting in fields(module.type) if setting.name in settings]
            parts[module.name] = module.type(**{name: settings.pop(name) for name in own})
        if settings:
            raise UserError(f"no setting is called {', '.join(sorted(settings))}")
        return cls(**parts)
