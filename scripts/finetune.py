"""Fine-tunes a model and its base to a task's labels: a second opinion on the probe, and an example of how an adapted
model is used.

    python scripts/finetune.py --model_name_or_path RUN --compare BASE --task_file labelled.jsonl --labels 64

Plain sequence classification. Both models learn from the same few labels, in the same order and with the same seeds of
dropout, as often as there are splits, and are measured on the same other documents. What either checkpoint lacks, the
head and, with BERT, the pooler, which masked-language-model checkpoints are saved without, is drawn anew for each
split, and is the same in both models. Models that bring code of their own are not for this script: it has no
--trust_remote_code.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from startup import quick_imports

with quick_imports():
    import numpy as np
    import torch
    from accelerate import Accelerator
    from transformers import (
        AutoModelForSequenceClassification,
        BatchEncoding,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from mlm import cli
    from mlm.data.corpus import CorpusConfig
    from mlm.data.task import Task, TaskConfig, read_task
    from mlm.data.tokenizer import load_tokenizer
    from mlm.engine.device import make_accelerator
    from mlm.engine.optimizer import OptimizerConfig, make_optimizer, make_scheduler
    from mlm.errors import UserError, at_least, at_most, explain_load_failure, listed
    from mlm.figures import figure
    from mlm.files import write_json
    from mlm.hub import local_files_only, no_bars
    from mlm.model.vocabulary import max_positions

EVALUATED = 64  # documents at a time


@dataclass(frozen=True)
class FinetuneConfig:
    """Which models are fine-tuned, with how many labels, and how."""

    model_name_or_path: str | None = None  # Fine-tune this checkpoint, an adapted one.
    compare: str | None = None  # And this one, its base, in the same way.
    labels: int = 64  # Train on this many labels a class, on fewer of a class that has too few.
    seeds: int = 2  # So often in each of 5 folds, each time with other labels, another head and order.
    epochs: int = 10  # Each of them is seen this many times.
    batch_size: int = 16  # Documents a step.
    max_seq_length: int = 128  # Cut documents after this many tokens, or as many as both models take.
    max_grad_norm: float = 1.0  # Clip gradients to this norm.
    strip_html: bool = False  # Remove HTML tags from the documents, as the run did.
    output: str | None = None  # Write the figures to this JSON file.
    mixed_precision: Literal["no", "bf16"] | None = None  # The default is accelerate's setting.

    def __post_init__(self) -> None:
        at_least(self, 1, "labels", "epochs", "batch_size", "max_seq_length")
        at_least(self, 2, "seeds")  # one choice of labels a fold would show no variance
        at_most(self, 100, "seeds")


def main(argv: Sequence[str]) -> dict[str, Any]:
    config, task_config, optimizer, _ = cli.parse(
        (FinetuneConfig, TaskConfig, OptimizerConfig), argv, cli.command(__doc__)
    )
    if task_config.task_kind != "classification":
        raise UserError(f"--task_kind {task_config.task_kind}: fine-tuning is to classes")
    task = read_task(task_config, CorpusConfig(strip_html=config.strip_html))
    if not (config.model_name_or_path and config.compare and task):
        raise UserError("give --model_name_or_path, --compare and --task_file (or --task_dataset_name)")
    accelerator = make_accelerator(config.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError("fine-tuning to a few labels is for one process; start it without a launcher")
    if accelerator.mixed_precision not in ("no", "bf16"):  # fp16 needs a loss scale, which finetune() has not
        reason = f"accelerate is configured for {accelerator.mixed_precision}, which fine-tuning does not support"
        raise UserError(f"{reason}; give --mixed_precision no or bf16")
    result = compare(config, optimizer, task, accelerator)
    if config.output:
        write_json(Path(config.output), result)
    return result


def compare(
    config: FinetuneConfig, optimizer: OptimizerConfig, task: Task, accelerator: Accelerator
) -> dict[str, Any]:
    """The accuracy of both models, and their difference with its interval, which is the probe's."""
    from mlm.evaluation.probe import choose, share_of, sizes, spread  # it imports scikit-learn: a second

    if config.labels > (most := sizes(task.labels)[-1]):
        reason = "three quarters of what the largest class has outside a fold"
        raise UserError(f"--labels {config.labels}: at most {most} with {task.name}, {reason}")
    names = {"before": config.compare, "after": config.model_name_or_path}
    with seeded(0, accelerator.device):  # from_pretrained draws what is lacking; it is drawn again for each split
        loaded = {when: load(name, task) for when, name in names.items()}
    models, lacking = {when: model for when, (model, _) in loaded.items()}, common_lack(names, loaded)
    accelerator.print(f"drawn anew for each split, the same in both models: {listed(lacking)}")
    lengths = [max_positions(model.config) or config.max_seq_length for model in models.values()]
    config = replace(config, max_seq_length=min(config.max_seq_length, *lengths))

    splits = list(choose(task.labels, config.labels, 0, config.seeds))
    times = f"{2 * len(splits) * config.seeds} times, {config.epochs} epochs each"
    accelerator.print(f"fine-tuning {times}, to test on {len(task.labels):,} documents: minutes to hours on a CPU")
    scores: dict[str, list[np.ndarray]] = {}
    for when, name in names.items():
        tokenizer = load_tokenizer(name)
        rows, cut = encode(tokenizer, task, config.max_seq_length)
        pad = partial(padded, rows, tokenizer, accelerator)
        if cut:
            after = f"after {config.max_seq_length} tokens (--max_seq_length)"
            accelerator.print(f"{name}: {cut:,} documents of {len(task.labels):,} are cut {after}")
        scores[when] = []
        for fold, (test, choices) in enumerate(splits):
            hits = []
            for choice, chosen in enumerate(choices):
                with seeded(fold * config.seeds + choice, accelerator.device):
                    model = start(models[when], models["before"], lacking).to(accelerator.device)
                    finetune(model, pad, chosen, task.labels, config, optimizer, accelerator)
                hits.append(predict(model, pad, test, accelerator) == task.labels[test])
            scores[when].append(np.array(hits, float))
            accelerator.print(f"{name}: fold {fold + 1} of {len(splits)}, accuracy {np.mean(hits):.1%}")
    share = share_of(task.labels, config.labels)
    both = zip(scores["after"], scores["before"], strict=True)
    difference, low, high = spread([after - before for after, before in both], share)
    before, after = (spread(scores[when], share)[0] for when in ("before", "after"))
    sure = f"95% interval {figure(100 * low)} to {figure(100 * high)}"
    if low == high == 0:  # which is no certainty
        sure = "no prediction differs"
    accelerator.print(
        f"fine-tuned to at most {config.labels} labels a class, {len(splits) * config.seeds} times: accuracy "
        f"{before:.1%} before, {after:.1%} after, difference {figure(100 * difference)} points ({sure})"
    )
    figures = {"accuracy_before": before, "accuracy": after, "accuracy_difference": difference}
    figures |= {"accuracy_low": low, "accuracy_high": high, "labels_a_class": config.labels}
    return {**figures, "splits": len(splits) * config.seeds, "documents": len(task.labels)}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators of the CPU, for weights and order, and of the device, for dropout. Restores them."""
    kept = [] if device.type in ("cpu", "mps") else [device.index or 0]  # fork_rng cannot keep the one of MPS
    with torch.random.fork_rng(kept):
        torch.manual_seed(seed)
        yield


@no_bars()
def load(name: str, task: Task) -> tuple[PreTrainedModel, set[str]]:
    """The checkpoint with a head for the task's classes, and the names of the tensors that it lacks.

    Raises UserError where there is none.
    """
    settings = {"num_labels": int(task.labels.max()) + 1, "dtype": torch.float32, "weights_only": True}
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, local_files_only=local_files_only(name), output_loading_info=True, **settings
        )
    except Exception as error:  # missing, damaged, or of an architecture that has no such head
        raise explain_load_failure("model", name, error) from error
    return model, set(found["missing_keys"])


def common_lack(names: dict[str, str], loaded: dict[str, tuple[PreTrainedModel, set[str]]]) -> list[str]:
    """The names of the tensors that either checkpoint lacks. Raises UserError where these are not of equal shapes."""
    lacking = sorted(set().union(*(lack for _, lack in loaded.values())))
    states = [model.state_dict() for model, _ in loaded.values()]
    for name in lacking:
        shapes = [tuple(state[name].shape) if name in state else None for state in states]
        if shapes[0] != shapes[1]:
            reason = f"their {name} is of the shapes {shapes[0]} and {shapes[1]}"
            raise UserError(f"{names['before']} is no base of {names['after']}: {reason}")
    return lacking


def start(model: PreTrainedModel, base: PreTrainedModel, lacking: Sequence[str]) -> PreTrainedModel:
    """A copy of the model with the tensors of these names drawn as a new model of the base's configuration draws them.

    The draw is by the global generator, and does not depend on which of them the model's own checkpoint has.
    """
    drawn, model = type(base)(base.config).state_dict(), copy.deepcopy(model)
    model.load_state_dict({name: drawn[name] for name in lacking}, strict=False)
    return model


def encode(tokenizer: PreTrainedTokenizerBase, task: Task, longest: int) -> tuple[BatchEncoding, int]:
    """What a model reads of the n documents, at most so many tokens of each, and how many documents that cuts."""
    columns = [list(column) for column in zip(*task.texts, strict=True)]  # one, or of pairs two
    whole, rows = (tokenizer(*columns, verbose=False, truncation=cut, max_length=longest) for cut in (False, True))
    pairs = zip(whole["input_ids"], rows["input_ids"], strict=True)
    return rows, sum(len(own) > len(kept) for own, kept in pairs)


def padded(
    rows: BatchEncoding, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, chosen: Sequence[int]
) -> BatchEncoding:
    """The chosen documents as a batch, padded to the longest of them."""
    few = {name: [values[i] for i in chosen] for name, values in rows.items()}
    return tokenizer.pad(few, return_tensors="pt").to(accelerator.device)


def finetune(
    model: PreTrainedModel,
    pad: Callable[[Sequence[int]], BatchEncoding],
    chosen: np.ndarray,
    labels: np.ndarray,
    config: FinetuneConfig,
    settings: OptimizerConfig,
    accelerator: Accelerator,
) -> None:
    """Trains the model on the chosen documents, which `pad` makes batches of, in an order that the CPU's generator
    draws anew in each epoch. labels: [n] int64, of all documents"""
    steps = config.epochs * -(-len(chosen) // config.batch_size)
    optimizer = make_optimizer(model.named_parameters(), settings)
    scheduler = make_scheduler(optimizer, settings, steps)
    model.train()
    for _ in range(config.epochs):
        for rows in torch.from_numpy(chosen)[torch.randperm(len(chosen))].split(config.batch_size):
            targets = torch.from_numpy(labels)[rows].to(accelerator.device)
            with accelerator.autocast():
                loss = torch.nn.functional.cross_entropy(model(**pad(rows.tolist())).logits.float(), targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@torch.no_grad()
def predict(
    model: PreTrainedModel, pad: Callable[[Sequence[int]], BatchEncoding], rows: np.ndarray, accelerator: Accelerator
) -> np.ndarray:
    """The classes [n] of documents [n]."""
    model.eval()
    found = []
    for first in range(0, len(rows), EVALUATED):
        with accelerator.autocast():
            found.append(model(**pad(rows[first : first + EVALUATED].tolist())).logits.argmax(dim=-1))
    return torch.cat(found).cpu().numpy()  # the device synchronises here


if __name__ == "__main__":
    cli.run(main)
