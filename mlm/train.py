"""Adapts a masked language model to a domain: the rooms in order, then the loop. This is the file to fork.

accelerate launch scripts/train.py --model_name_or_path MODEL --dataset_name DATASET --output_dir FOLDER
"""

import math
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm import checkpoint, passes
from mlm.batches import Batches
from mlm.checkpoint import CheckpointConfig, Progress, State, Writer, not_written
from mlm.chunks import ChunkConfig, chunk_length, cut_into_chunks
from mlm.compare import conclude
from mlm.corpus import CorpusConfig, GeneralConfig
from mlm.errors import UserError, at_least
from mlm.evaluate import EvaluateConfig, Evaluation, evaluate_all, token_counts
from mlm.hardware import make_accelerator
from mlm.masking import DROPOUT, MaskingConfig, make_recipe, stream_key
from mlm.model import ModelConfig, SparseMaskedLM, fingerprint, load_model, max_positions
from mlm.optimizer import Schedule, make_optimizer, make_scheduler
from mlm.processes import agree, host_group, sum_gradients
from mlm.record import Meter, RecordConfig, Run, finite, peak_memory_mib, plan
from mlm.signals import Stopped, StopSignals
from mlm.stream import StreamConfig
from mlm.texts import open_corpus, open_texts
from mlm.trouble import check_scale, find_trouble


@dataclass(frozen=True)
class LoopConfig:
    """The knobs of the loop itself."""

    seed: int = 42  # names the order of the chunks, their masks, dropout's draws and fresh weights
    # the batch
    train_batch_size: int | None = None  # chunks a step (default: the next two flags × processes)
    per_device_train_batch_size: int | Literal["auto"] = 8  # chunks in a pass; auto: as many as fit
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
    general: GeneralConfig = field(default_factory=GeneralConfig)
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


def train(config: Config, accelerator: Accelerator | None = None) -> Result:
    """Runs `config`.

    Raises:
        UserError: it cannot be done, or the loss is not finite any more.
        Stopped: a signal asked for it, and a checkpoint has been written.
    """
    loop = config.loop
    trackers = config.record.report_to if config.record.with_tracking else None
    accelerator = accelerator or make_accelerator(loop.mixed_precision, loop.deterministic, trackers)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    group = host_group(accelerator)
    run = Run(config.record, accelerator, config.checkpoint.resume_from_checkpoint)
    stop = StopSignals()

    # The rooms, in order.
    tokenizer, facts, stores = open_corpus(config, accelerator)
    if "train" not in stores:
        raise UserError("--validation_file alone leaves nothing to train on; give --train_file too")
    net = load_model(config.model, tokenizer, loop.seed)
    length = chunk_length(config.chunks, max_positions(net.config))
    chunks = cut_into_chunks(stores["train"], config.chunks, length, facts)
    recipe = make_recipe(config.masking, facts)
    texts = open_texts(config, tokenizer, facts, stores["validation"], length, accelerator)
    G = passes.global_batch(
        loop.train_batch_size, loop.per_device_train_batch_size, loop.gradient_accumulation_steps, world
    )
    batches = Batches(chunks, recipe, facts.ordinary, loop.seed, G, rank, world, loop.max_train_samples)
    n = batches.num_chunks
    last_step = loop.max_train_steps or math.ceil(round(loop.num_train_epochs * n / G, 6))

    # What the result depends on: a checkpoint of another experiment is not gone on with.
    experiment = {
        "train corpus": stores["train"].header["corpus"],
        **{f"{name} corpus": text.store.header["corpus"] for name, text in texts.items()},
        **config.evaluate.identity,
        **{name: getattr(loop, name) for name in ("seed", "learning_rate", "weight_decay", "max_grad_norm")},
        **{name: getattr(loop, name) for name in ("lr_scheduler_type", "num_warmup_steps")},
        "model": fingerprint(net),
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
    model = SparseMaskedLM(net).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    smallest = min(parameters, key=torch.numel)
    adamw = make_optimizer(model, loop.learning_rate, loop.weight_decay, fused=accelerator.scaler is None)
    scheduler = make_scheduler(adamw, loop.lr_scheduler_type, loop.num_warmup_steps, last_step)
    optimizer = accelerator.prepare(adamw)  # steps through fp16's scaler, where there is one
    state = State(net, optimizer, scheduler, accelerator.scaler)

    progress, before = Progress(), {}
    checkpoints = run.folder / "checkpoints"
    writer, meter = Writer(checkpoints, config.checkpoint.save_total_limit), Meter()

    def due(every: int | str | None) -> bool:
        """Whether what is done every so many steps, or after each epoch, comes after the step just taken."""
        if every == "epoch":
            return progress.step * G // n > (progress.step - 1) * G // n
        return every is not None and progress.step % every == 0

    def measure(complete: bool) -> dict[str, Evaluation]:
        """Of each text under all masks, or of the held-out text under those of the first pass."""
        measured = texts if complete else {"held_out": texts["held_out"]}
        evaluations = evaluate_all(model, measured, accelerator, complete, stop.asked)
        if evaluations is None:  # given up: it is made up for when the run goes on
            save_and_stop()
        found = evaluations["held_out"].first_pass.summary()
        run.log("eval", progress.step, tokens=progress.tokens, **found)
        loss, perplexity = found["eval_loss"], found["perplexity"]
        part = "" if len(config.evaluate.passes) == 1 else f" (pass 1 of {len(config.evaluate.passes)})"
        run.say(f"step {progress.step}: held-out loss {loss:.4f}, perplexity {perplexity:.4g}{part}")
        if loop.load_best_model_at_end and run.speaks:
            writer.save_best(progress.step, net, found)
        progress.evaluated = True
        return evaluations

    def save() -> None:
        started = time.perf_counter()
        if run.speaks:
            writer.save(
                progress.step, lambda: checkpoint.snapshot(state, experiment, asdict(progress), before)
            )
        stood_still = time.perf_counter() - started
        progress.saving += stood_still
        run.log("checkpoint", progress.step, seconds_stood_still=stood_still)

    def save_and_stop() -> NoReturn:
        save()
        failure = writer.wait()
        number, failed = agree([stop.asked(), failure is not None], group)
        if failed:
            raise not_written(failure)
        raise Stopped(number, run.how_to_go_on(number, progress.step))

    def forward_backward() -> tuple[torch.Tensor, int]:
        """Adds to each .grad this process's part of the gradient of the mean loss over all masked tokens of
        the global batch, however it is cut. Returns the nats [] of its part, and how many tokens in all."""
        share, masked = batches.load(progress.step, micro_batch)
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
        return nats, masked

    with run, stop, writer:
        resumed, notes = checkpoint.find(config.checkpoint.resume_from_checkpoint, checkpoints, accelerator)
        run.say("\n".join(notes))
        if resumed:
            progress = checkpoint.load(resumed, state, experiment)
            before = checkpoint.load_before(resumed)
        found, share = progress.micro_batch.get(str(world)), -(-G // world)
        micro_batch = passes.first(loop.per_device_train_batch_size, found, share, length, device)
        run.begin(config, experiment, progress.step if resumed else None)
        run.say(plan(config, model, batches, micro_batch, texts, last_step, accelerator))
        run.log("start", progress.step, steps=last_step, train_batch_size=G, chunks=n)
        if resumed and run.speaks and loop.load_best_model_at_end:
            writer.remember_best(resumed.parent)

        if progress.step == 0 and loop.eval_on_start:
            before = measure(complete=True)
        elif 0 < progress.step < last_step and due(loop.eval_steps) and not progress.evaluated:
            measure(complete=False)
        broken = torch.zeros((), device=device)  # 1 from the first step on that was not finite
        meter.restart()
        model.train()
        while progress.step < last_step:
            ran_out = False
            try:
                nats, masked = forward_backward()
            except (RuntimeError, MemoryError) as error:
                if not passes.out_of_memory(error):
                    raise
                ran_out = True
            # No process enters the reduction of gradients unless all have them.
            failure = writer.take_failure()
            ran_out, asked, failed = agree([ran_out, stop.asked(), failure is not None], group)
            if failed and config.checkpoint.on_save_error == "stop":
                raise not_written(failure)
            run.say(failure or "")
            if ran_out:  # the same batch again, in smaller passes
                micro_batch = passes.smaller(micro_batch, loop.per_device_train_batch_size, length)
                progress.micro_batch[str(world)] = micro_batch
                run.say(f"step {progress.step}: out of memory; from here on {micro_batch} chunks in a pass")
                optimizer.zero_grad()
                release_memory()
                continue
            sum_gradients(parameters, nats, world)
            smallest.grad += nats * 0  # so that a loss that is not finite has no finite gradient
            norm = accelerator.clip_grad_norm_(parameters, loop.max_grad_norm or math.inf)
            if accelerator.scaler is None:
                # Decided on the device, and read later: from here on the optimizer leaves the weights alone.
                broken = torch.maximum(broken, (~norm.isfinite()).float())
                adamw.found_inf = broken
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.step_was_skipped:  # fp16 overflowed: the same batch again, at the lower scale
                progress.skipped += 1
                check_scale(accelerator.scaler.get_scale(), progress.step)
                continue
            scheduler.step()
            meter.add(nats, broken, masked, batches.tokens(progress.step))
            progress.step += 1
            run.advance(progress.step, last_step)

            evaluates, saves = due(loop.eval_steps), due(config.checkpoint.checkpointing_steps)
            reports = due(config.record.logging_steps) or progress.step == last_step
            if not (evaluates or saves or reports or asked):
                continue
            # The host waits for the device here, not in each step (where, under fp16, the scaler does).
            window, lost = meter.read()
            if lost:
                step = progress.step - lost
                trouble = find_trouble(model, batches, step, stores["train"], accelerator)
                run.log("end", step, **trouble._asdict())
                raise UserError(trouble.words(step, stores["train"], tokenizer))
            for name, value in window._asdict().items():
                setattr(progress, name, getattr(progress, name) + value)
            rate = scheduler.get_last_lr()[0]
            run.report(progress.step, window, rate, progress.tokens)
            progress.evaluated = False
            if asked:
                save_and_stop()
            if evaluates and progress.step < last_step:
                measure(complete=False)
            if saves:
                save()
            meter.restart()

        after = before if before and progress.step == 0 else measure(complete=True)
        run.say(writer.wait() or "")
        if loop.load_best_model_at_end and checkpoint.load_best(checkpoints, net, accelerator):
            after = evaluate_all(model, texts, accelerator)  # to its end: what a checkpoint needs is gone
        told = conclude(texts, before, after, tokenizer, token_counts(stores["train"], facts.size))
        results = finite({
            **told.results,
            "train_loss": progress.nats / max(progress.masked, 1),
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "train_seconds": progress.seconds,
            "checkpoint_seconds": progress.saving,
            "steps": progress.step,
            "epochs": progress.step * G / n,
            "skipped_steps": progress.skipped,
            "peak_memory_mib": peak_memory_mib(device),
        })  # fmt: skip
        run.say(told.lines)
        run.finish(net, tokenizer, config, results, told.comparison, told.documents)
    return Result(net, tokenizer, results, run.folder)
