"""Adapts a masked language model to a domain: the rooms in order, then the loop. This is the file to fork.

accelerate launch scripts/train.py --model_name_or_path MODEL --dataset_name DATASET --output_dir FOLDER
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from mlm import checkpoint
from mlm.batches import Batches, subset
from mlm.checkpoint import CheckpointConfig
from mlm.chunks import ChunkConfig, chunk_length, cut_into_chunks
from mlm.corpus import CorpusConfig
from mlm.errors import UserError, at_least
from mlm.evaluate import EvaluateConfig, evaluate, unigram_perplexity
from mlm.hardware import make_accelerator
from mlm.masking import DROPOUT, MaskingConfig, make_recipe, stream_key
from mlm.model import ModelConfig, SparseMaskedLM, load_model, max_positions, vocabulary_size
from mlm.record import Meter, RecordConfig, Run, peak_memory_mib, plan
from mlm.stream import StreamConfig, check_words, prepare, store_folder
from mlm.tokenizer import corpus_tokenizer, load_tokenizer, token_facts


@dataclass(frozen=True)
class LoopConfig:
    """The knobs of the loop itself."""

    seed: int = 42  # names the order of the chunks, their masks, dropout's draws and fresh weights
    # the batch
    train_batch_size: int | None = None  # chunks a step (default: next two flags × processes)
    per_device_train_batch_size: int = 8  # chunks that go through the model at a time
    gradient_accumulation_steps: int = (
        1  # passes through the model a step, where --train_batch_size is not given
    )
    # the length
    num_train_epochs: float = 3.0  # passes over the training chunks
    max_train_steps: int | None = None  # steps to take, instead of epochs
    max_train_samples: int | None = None  # train on that many chunks only, drawn by the seed
    # AdamW and its schedule
    learning_rate: float = 5e-5  # its peak
    weight_decay: float = 0.0  # not on biases and norms
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it; 0: never
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"  # linear ends at 0
    num_warmup_steps: int = 0  # steps in which the learning rate rises to its peak
    # arithmetic
    mixed_precision: Literal["no", "fp16", "bf16"] | None = (
        None  # default: what accelerate was configured for
    )
    deterministic: bool = False  # deterministic kernels only, so that a GPU repeats a run to the bit
    # evaluation
    eval_on_start: bool = True  # measure the model before the first step
    eval_steps: int | Literal["epoch"] = "epoch"  # steps between evaluations; always one at the end
    load_best_model_at_end: bool = False  # keep the weights of the lowest evaluation loss, not the last ones

    def __post_init__(self) -> None:
        at_least(self, 1, "train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        at_least(self, 1, "max_train_steps", "max_train_samples", "eval_steps")
        at_least(
            self, 0, "learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "num_warmup_steps"
        )


@dataclass(frozen=True)
class Config:
    """A whole run: what each room is asked for. The command line is made of these."""

    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    chunks: ChunkConfig = field(default_factory=ChunkConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    record: RecordConfig = field(default_factory=RecordConfig)


ROOMS = [room.default_factory for room in fields(Config)]  # what the command line is made of


@dataclass(frozen=True)
class Result:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    results: dict[str, Any]  # as in all_results.json
    output_dir: Path


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides weights and optimizer."""

    step: int = 0  # updates that were applied
    nats: float = 0.0  # training loss, summed over the masked tokens of all steps
    masked: int = 0  # ... and their number
    seconds: float = 0.0  # spent in training steps
    skipped: int = 0  # steps that fp16's scaler made us take again
    before: dict[str, float] | None = None  # the evaluation before the first step
    best: dict[str, float] | None = None  # the evaluation of the lowest loss


def train(config: Config, accelerator: Accelerator | None = None) -> Result:
    """Runs `config`. Raises UserError before the first step where it cannot be done."""
    loop = config.loop
    trackers = config.record.report_to if config.record.with_tracking else None
    accelerator = accelerator or make_accelerator(
        loop.mixed_precision, loop.deterministic, trackers, config.record.output_dir
    )
    device, main = accelerator.device, accelerator.is_main_process
    run = Run(config.record, accelerator, resumes=config.checkpoint.resume_from_checkpoint is not None)

    # The rooms, in order.
    with accelerator.local_main_process_first():  # one process a machine tokenises, the others find its store
        tokenizer = open_tokenizer(config)
        facts = token_facts(tokenizer)
        builds = accelerator.is_local_main_process and config.stream.overwrite_cache
        stores = prepare(config.corpus, tokenizer, facts, replace(config.stream, overwrite_cache=builds))
    if "train" not in stores:
        raise UserError("--validation_file alone leaves nothing to train on; give --train_file too")
    if config.masking.whole_word_mask:
        check_words(stores["train"])
    net = load_model(config.model, tokenizer, loop.seed)
    length = chunk_length(config.chunks, max_positions(net.config))
    chunks, held_out = (
        cut_into_chunks(stores[s], config.chunks, length, facts) for s in ("train", "validation")
    )
    recipe = make_recipe(config.masking, facts)
    batches = Batches(
        chunks, recipe, facts.ordinary, loop.seed, global_batch(loop, accelerator.num_processes),
        loop.per_device_train_batch_size, accelerator.process_index, accelerator.num_processes,
        loop.max_train_samples,
    )  # fmt: skip
    G, n = batches.global_batch, batches.num_chunks
    last_step = loop.max_train_steps or math.ceil(loop.num_train_epochs * n / G)
    held_out_ids = subset(config.evaluate.eval_mask_seed, len(held_out), config.evaluate.max_eval_samples)

    model = SparseMaskedLM(net).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, loop, fused=accelerator.scaler is None)
    scheduler = get_scheduler(loop.lr_scheduler_type, optimizer, loop.num_warmup_steps, last_step)
    optimizer = accelerator.prepare(optimizer)  # steps through fp16's scaler, where there is one

    progress = Progress()
    if resumed := checkpoint.find(config.checkpoint, run.folder / "checkpoints"):
        progress = Progress(**checkpoint.load(resumed, net, optimizer, scheduler, accelerator.scaler))
    run.begin(config, progress.step, {
        "corpus": {name: store.header["corpus"] for name, store in stores.items()},
        "tokenizer": facts.fingerprint,
        "masks": recipe.digest,
    })  # fmt: skip
    run.say(plan(config, model, batches, len(held_out_ids), last_step, accelerator))
    run.log("start", progress.step, steps=last_step, global_batch=G, chunks=n)

    def measure() -> dict[str, float]:
        found = evaluate(model, held_out, held_out_ids, recipe, facts, config.evaluate, accelerator).summary()
        run.log("eval", progress.step, **found)
        run.say(
            f"step {progress.step}: held-out perplexity {found['perplexity']:.4g}, loss {found['loss']:.4f}"
        )
        if progress.best is None or found["loss"] < progress.best["loss"]:
            progress.best = found
            if loop.load_best_model_at_end and main:
                checkpoint.save_weights(run.folder / "checkpoints" / "best", net)
        return found

    def due(every: int | str | None) -> bool:
        """Whether what is done every so many steps, or after each epoch, comes after the step just taken."""
        if every == "epoch":
            return progress.step * G // n > (progress.step - 1) * G // n
        return every is not None and progress.step % every == 0

    if loop.eval_on_start and progress.step == 0:
        progress.before = measure()
    after = None  # the evaluation of the current weights
    meter = Meter(accelerator, tokens_per_step=G * length)
    model.train()
    while progress.step < last_step:
        # The gradient of the mean loss over all masked tokens of the global batch, however it is cut.
        share, masked = batches.load(progress.step)
        torch.manual_seed(stream_key(loop.seed, progress.step, DROPOUT + accelerator.process_index))
        nats = torch.zeros((), device=device)
        for batch in share:
            input_ids, positions, targets, attention_mask = batch.to(device)
            with accelerator.autocast():
                losses, _ = model(input_ids, positions, targets, attention_mask)  # [M] float32
            accelerator.backward(losses.sum() / max(masked, 1))
            nats += losses.detach().sum()
        sum_gradients(parameters, accelerator.num_processes)
        if loop.max_grad_norm:
            accelerator.clip_grad_norm_(parameters, loop.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.step_was_skipped:  # fp16 overflowed: the same batch again, at the lower scale
            progress.skipped += 1
            continue
        scheduler.step()
        progress.step += 1
        meter.add(nats, masked)
        run.advance(progress.step, last_step)

        evaluates, saves = due(loop.eval_steps), due(config.checkpoint.checkpointing_steps)
        if not (evaluates or saves or due(config.record.logging_steps) or progress.step == last_step):
            continue
        # The device synchronises here and nowhere else (but under fp16, where the scaler asks at every step).
        window = meter.read()
        progress.nats += window.nats
        progress.masked += window.masked
        progress.seconds += window.seconds
        run.report(progress.step, window, scheduler.get_last_lr()[0])
        after = measure() if evaluates else None
        if saves and main:
            place = run.folder / "checkpoints" / f"step_{progress.step}"
            checkpoint.save(place, net, optimizer, scheduler, accelerator.scaler, asdict(progress))
            run.log("checkpoint", progress.step)
        meter.restart()

    after = after or measure()
    if loop.load_best_model_at_end and progress.best["loss"] < after["loss"]:
        after = progress.best
        if main:
            checkpoint.load_weights(run.folder / "checkpoints" / "best", net)
    results = {
        **named(after),
        **{f"{name}_before": value for name, value in named(progress.before or {}).items()},
        "perplexity_unigram": unigram_perplexity(
            stores["train"], held_out, held_out_ids, recipe, facts, config.evaluate
        ),
        "eval_masked_tokens": after["masked_tokens"],
        "train_loss": progress.nats / max(progress.masked, 1),
        "tokens_per_second": progress.step * G * length / max(progress.seconds, 1e-9),
        "train_seconds": progress.seconds,
        "steps": progress.step,
        "epochs": progress.step * G / n,
        "skipped_steps": progress.skipped,
        "peak_memory_mib": peak_memory_mib(device),
    }
    run.finish(net, tokenizer, config, results)
    accelerator.wait_for_everyone()
    return Result(net, tokenizer, results, run.folder)


def named(evaluation: dict[str, float]) -> dict[str, float]:
    """An evaluation's figures under the names that all_results.json gives them."""
    names = {"perplexity": "perplexity", "loss": "eval_loss", "accuracy": "accuracy"}
    return {names[key]: value for key, value in evaluation.items() if key in names}


def open_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or one trained on the corpus where the model starts from nothing."""
    if name := config.model.tokenizer_name or config.model.model_name_or_path:
        return load_tokenizer(name, config.model.trust_remote_code)
    return corpus_tokenizer(config.corpus, vocabulary_size(config.model), store_folder(config.stream))


def global_batch(loop: LoopConfig, processes: int) -> int:
    """Chunks a step, over all processes."""
    return (
        loop.train_batch_size
        or loop.per_device_train_batch_size * loop.gradient_accumulation_steps * processes
    )


def make_optimizer(model: torch.nn.Module, loop: LoopConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW without decay on biases and norms, which are the parameters of one dimension.

    fused: one kernel for all parameters; not under fp16, where it would skip a step without saying so.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": loop.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = fused and trained[0].device.type in ("cuda", "cpu", "xpu", "mps")
    return torch.optim.AdamW(groups, lr=loop.learning_rate, fused=fused)


def sum_gradients(parameters: list[torch.nn.Parameter], processes: int, piece: int = 2**24) -> None:
    """Adds up the gradients of all processes, in flat pieces of about `piece` elements.

    One explicit reduction a step, in place of DistributedDataParallel's during backward: a process may
    have had several passes through the model, or none. It costs the overlap of the two.
    """
    if processes == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    start = 0
    while start < len(parameters):
        end, elements = start, 0
        while end < len(parameters) and (end == start or elements + parameters[end].numel() <= piece):
            elements += parameters[end].numel()
            end += 1
        grads = [p.grad for p in parameters[start:end]]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))
        start = end
