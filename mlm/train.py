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
from mlm.errors import UserError, at_least, one_line
from mlm.evaluate import EvaluateConfig, evaluate, unigram_perplexity
from mlm.hardware import check_scale, make_accelerator
from mlm.masking import DROPOUT, MaskingConfig, make_recipe, stream_key
from mlm.model import ModelConfig, SparseMaskedLM, load_model, max_positions, vocabulary_size
from mlm.record import Meter, RecordConfig, Run, finite, peak_memory_mib, plan
from mlm.stream import StreamConfig, TokenStore, limit_threads, prepare, store_folder
from mlm.tokenizer import TokenFacts, corpus_tokenizer, load_tokenizer, token_facts

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


@dataclass(frozen=True)
class LoopConfig:
    """The knobs of the loop itself."""

    seed: int = 42  # names the order of the chunks, their masks, dropout's draws and fresh weights
    # the batch
    train_batch_size: int | None = None  # chunks a step (default: the next two flags × processes)
    per_device_train_batch_size: int = 8  # chunks that go through the model at a time
    gradient_accumulation_steps: int = 1  # passes a step, where --train_batch_size is not given
    # the length
    num_train_epochs: float = 3.0  # passes over the training chunks
    max_train_steps: int | None = None  # steps to take, instead of epochs
    max_train_samples: int | None = None  # train on that many chunks only, drawn by the seed
    # AdamW and its schedule
    learning_rate: float = 5e-5  # its peak
    weight_decay: float = 0.0  # not on biases and norms
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it; 0: never
    lr_scheduler_type: Schedule = "linear"  # linear ends at 0
    num_warmup_steps: int = 0  # steps in which the learning rate rises to its peak
    # arithmetic
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # default: as accelerate is configured
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


ROOMS = [room.type for room in fields(Config)]  # what the command line is made of


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
    tokens: int = 0  # that went through the model, padding not counted
    seconds: float = 0.0  # spent in training steps
    skipped: int = 0  # steps that fp16's scaler made us take again
    before: dict[str, float] | None = None  # the evaluation before the first step
    after: dict[str, float] | None = None  # the evaluation of the current weights, where there was one


def train(config: Config, accelerator: Accelerator | None = None) -> Result:
    """Runs `config`. Raises UserError before the first step where it cannot be done."""
    loop = config.loop
    trackers = config.record.report_to if config.record.with_tracking else None
    accelerator = accelerator or make_accelerator(loop.mixed_precision, loop.deterministic, trackers)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    run = Run(config.record, accelerator, config.checkpoint.resume_from_checkpoint)

    # The rooms, in order.
    tokenizer, facts, stores = open_corpus(config, accelerator)
    if "train" not in stores:
        raise UserError("--validation_file alone leaves nothing to train on; give --train_file too")
    net = load_model(config.model, tokenizer, loop.seed)
    length = chunk_length(config.chunks, max_positions(net.config))
    chunks, held_out = (
        cut_into_chunks(stores[s], config.chunks, length, facts) for s in ("train", "validation")
    )
    recipe = make_recipe(config.masking, facts)
    G = loop.train_batch_size or loop.per_device_train_batch_size * loop.gradient_accumulation_steps * world
    batches = Batches(
        chunks,
        recipe,
        facts.ordinary,
        seed=loop.seed,
        global_batch=G,
        micro_batch=loop.per_device_train_batch_size,
        rank=rank,
        world=world,
        samples=loop.max_train_samples,
    )
    n = batches.num_chunks
    last_step = loop.max_train_steps or math.ceil(round(loop.num_train_epochs * n / G, 6))
    if loop.num_warmup_steps >= max(last_step, 1):
        raise UserError(f"--num_warmup_steps {loop.num_warmup_steps}: the run has {last_step} steps only")
    held_out_ids = subset(config.evaluate.eval_mask_seed, len(held_out), config.evaluate.max_eval_samples)

    model = SparseMaskedLM(net).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, loop, fused=accelerator.scaler is None)
    try:
        scheduler = get_scheduler(loop.lr_scheduler_type, optimizer, loop.num_warmup_steps, max(last_step, 1))
    except ValueError as error:  # polynomial's end lies above a tiny --learning_rate
        raise UserError(f"--lr_scheduler_type {loop.lr_scheduler_type}: {one_line(error)}") from error
    optimizer = accelerator.prepare(optimizer)  # steps through fp16's scaler, where there is one

    # What the result depends on: a checkpoint of another experiment is not gone on with.
    experiment = {
        **{f"{split} corpus": store.header["corpus"] for split, store in stores.items()},
        **{name: getattr(loop, name) for name in ("seed", "learning_rate", "weight_decay", "max_grad_norm")},
        **{name: getattr(loop, name) for name in ("lr_scheduler_type", "num_warmup_steps")},
        "tokenizer": facts.fingerprint,
        "masks": recipe.digest,
        "dropout": config.model.dropout,
        "mixed_precision": str(accelerator.mixed_precision),
        "max_seq_length": length,
        "line_by_line": config.chunks.line_by_line,
        "train_batch_size": G,
        "chunks": n,
        "steps": last_step,
    }
    checkpoints = run.folder / "checkpoints"
    progress = Progress()
    if resumed := checkpoint.find(config.checkpoint, checkpoints):
        state = checkpoint.load(resumed, net, optimizer, scheduler, accelerator.scaler, experiment)
        progress = Progress(**state)
    run.begin(config, experiment, progress.step)
    run.say(plan(config, model, batches, len(held_out_ids), last_step, accelerator))
    run.log("start", progress.step, steps=last_step, train_batch_size=G, chunks=n)

    def measure() -> dict[str, float]:
        found = evaluate(model, held_out, held_out_ids, recipe, facts, config.evaluate, accelerator).summary()
        run.log("eval", progress.step, **found)
        loss, perplexity = found["eval_loss"], found["perplexity"]
        run.say(f"step {progress.step}: held-out loss {loss:.4f}, perplexity {perplexity:.4g}")
        if loop.load_best_model_at_end and run.speaks:
            checkpoint.save_best(checkpoints / "best", net, found)
        return found

    def due(every: int | str | None) -> bool:
        """Whether what is done every so many steps, or after each epoch, comes after the step just taken."""
        if every == "epoch":
            return progress.step * G // n > (progress.step - 1) * G // n
        return every is not None and progress.step % every == 0

    if loop.eval_on_start and progress.step == 0:
        progress.before = progress.after = measure()
    meter = Meter(accelerator)
    model.train()
    while progress.step < last_step:
        # The gradient of the mean loss over all masked tokens of the global batch, however it is cut.
        share, masked = batches.load(progress.step)
        torch.manual_seed(stream_key(loop.seed, progress.step, DROPOUT + rank))
        nats = torch.zeros((), device=device)
        for batch in share:
            input_ids, positions, targets, attention_mask = batch.to(device)
            with accelerator.autocast():
                losses, _ = model(input_ids, positions, targets, attention_mask)  # [M] float32
            accelerator.backward(losses.sum() / max(masked, 1))
            nats += losses.detach().sum()
        if accelerator.scaler is not None and not share:
            accelerator.scaler.scale(nats)  # its first use, which `backward` would have been, sets it up
        sum_gradients(parameters, world)
        if loop.max_grad_norm:
            accelerator.clip_grad_norm_(parameters, loop.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.step_was_skipped:  # fp16 overflowed: the same batch again, at the lower scale
            progress.skipped += 1
            check_scale(accelerator.scaler.get_scale(), progress.step)
            continue
        scheduler.step()
        meter.add(nats, masked, batches.tokens(progress.step))
        progress.step += 1
        run.advance(progress.step, last_step)

        evaluates, saves = due(loop.eval_steps), due(config.checkpoint.checkpointing_steps)
        if not (evaluates or saves or due(config.record.logging_steps) or progress.step == last_step):
            continue
        # The host waits for the device here, not in each step (where, under fp16, the scaler does).
        window = meter.read()
        for name, value in window._asdict().items():
            setattr(progress, name, getattr(progress, name) + value)
        run.report(progress.step, window, progress.nats / max(progress.masked, 1), scheduler.get_last_lr()[0])
        progress.after = measure() if evaluates else None
        if saves and run.speaks:
            folder, state = checkpoints / f"step_{progress.step}", asdict(progress)
            checkpoint.save(folder, net, optimizer, scheduler, accelerator.scaler, experiment, state)
            run.log("checkpoint", progress.step)
        meter.restart()

    after = progress.after or measure()
    if loop.load_best_model_at_end:
        after = checkpoint.load_best(checkpoints / "best", net, accelerator) or after
    results = finite({
        **after,
        **{f"{name}_before": value for name, value in (progress.before or {}).items()},
        "perplexity_unigram": unigram_perplexity(
            stores["train"], held_out, held_out_ids, recipe, facts, config.evaluate),
        "train_loss": progress.nats / max(progress.masked, 1),
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "train_seconds": progress.seconds,
        "steps": progress.step,
        "epochs": progress.step * G / n,
        "skipped_steps": progress.skipped,
        "peak_memory_mib": peak_memory_mib(device),
    })  # fmt: skip
    run.finish(net, tokenizer, config, results)
    return Result(net, tokenizer, results, run.folder)


def open_corpus(
    config: Config, accelerator: Accelerator
) -> tuple[PreTrainedTokenizerBase, TokenFacts, dict[str, TokenStore]]:
    """The tokenizer (named, or trained on the corpus for a model from nothing), its facts, the stores."""
    model, corpus, stream = config.model, config.corpus, config.stream
    limit_threads(stream)
    if not accelerator.is_local_main_process:
        stream = replace(stream, overwrite_cache=False)
    with accelerator.local_main_process_first():  # one process a machine tokenises, the others find its store
        if name := model.tokenizer_name or model.model_name_or_path:
            tokenizer = load_tokenizer(name, model.trust_remote_code)
        else:
            tokenizer = corpus_tokenizer(corpus, vocabulary_size(model), store_folder(stream))
        facts = token_facts(tokenizer)
        return tokenizer, facts, prepare(corpus, tokenizer, facts, stream, config.masking.whole_word_mask)


def make_optimizer(model: torch.nn.Module, loop: LoopConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW without decay on biases and norms: what is named a bias, or has one dimension.

    fused: one kernel for all parameters; not under fp16, where it would skip a step without saying so.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in trained if p.ndim < 2 or name.endswith("bias")}
    groups = [
        {"params": [p for name, p in trained if name not in plain], "weight_decay": loop.weight_decay},
        {"params": [p for name, p in trained if name in plain], "weight_decay": 0.0},
    ]
    fused = fused and trained[0][1].device.type in ("cuda", "cpu", "xpu", "mps")
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
