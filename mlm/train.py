"""Adapts a masked language model to a domain: the rooms in order, then the loop. This is the file to fork.

accelerate launch scripts/train.py --model_name_or_path MODEL --dataset_name DATASET --output_dir FOLDER
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import release_memory
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm.config import Config
from mlm.data.batches import Batches
from mlm.data.chunks import chunk_length, cut_into_chunks
from mlm.data.masking import DROPOUT, MaskingConfig, make_recipe, select_tokens, select_words, stream_key
from mlm.data.token_store import prepare
from mlm.data.tokenizer import tokenizer_info
from mlm.engine import checkpoint
from mlm.engine import update as passes
from mlm.engine.checkpoint import Progress, State, Writer, not_written
from mlm.engine.device import make_accelerator
from mlm.engine.distributed import agree, host_group, local_main_process_first, sum_gradients
from mlm.engine.nonfinite import check_scale, find_nonfinite
from mlm.engine.optimizer import make_optimizer, make_scheduler
from mlm.engine.signals import Stopped, StopSignals
from mlm.errors import UserError
from mlm.evaluation.compare import conclude
from mlm.evaluation.eval_set import open_eval_sets
from mlm.evaluation.evaluate import Evaluation, evaluate_all, token_counts
from mlm.figures import finite
from mlm.model.load import fingerprint, load_model, open_tokenizer
from mlm.model.sparse_head import SparseMaskedLM
from mlm.model.vocabulary import max_positions
from mlm.report.environment import peak_memory_mib
from mlm.report.metrics import Meter
from mlm.report.run_directory import Run, plan


def mask_rate(step: int, last_step: int, masking: MaskingConfig) -> float:
    """The share of the tokens that is predicted in a step."""
    return masking.mlm_probability


def select(
    maskable: np.ndarray, draws: np.ndarray, rate: float, word_starts: np.ndarray, whole_words: bool
) -> np.ndarray:
    """Which tokens a step predicts: [B, T] bool. The other arguments are those of `select_words`."""
    if whole_words:
        return select_words(maskable, draws, rate, word_starts)
    return select_tokens(maskable, draws, rate)


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
    loop = config.train
    trackers = config.run.report_to if config.run.with_tracking else None
    accelerator = accelerator or make_accelerator(
        config.device.mixed_precision, config.device.deterministic, trackers
    )
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    group = host_group(accelerator)
    run = Run(config.run, accelerator, config.checkpoint.resume_from_checkpoint)
    stop = StopSignals()

    # The rooms, in order.
    with local_main_process_first(accelerator):  # one process a machine tokenises, the others find its store
        tokenizer = open_tokenizer(config.model, config.corpus, config.token_store)
        info = tokenizer_info(tokenizer)
        stores = prepare(config.corpus, tokenizer, info, config.token_store, config.masking.whole_word_mask)
    if "train" not in stores:
        raise UserError("--validation_file alone leaves nothing to train on; give --train_file too")
    net = load_model(config.model, tokenizer, loop.seed)
    length = chunk_length(config.chunks, max_positions(net.config))
    chunks = cut_into_chunks(stores["train"], config.chunks, length, info)
    recipe = make_recipe(info, config.masking.mask_replace_prob, config.masking.random_replace_prob)
    with local_main_process_first(accelerator):
        eval_sets = open_eval_sets(config, tokenizer, info, stores["validation"], length)
    G = passes.global_batch(
        config.update.train_batch_size,
        config.update.per_device_train_batch_size,
        config.update.gradient_accumulation_steps,
        world,
    )
    batches = Batches(
        chunks,
        recipe,
        info.maskable,
        partial(select, whole_words=config.masking.whole_word_mask),
        lambda step: mask_rate(step, last_step, config.masking),
        loop.seed,
        G,
        rank,
        world,
        loop.max_train_samples,
    )
    n = batches.num_chunks
    last_step = loop.max_train_steps or math.ceil(round(loop.num_train_epochs * n / G, 6))

    # What the result depends on: a checkpoint of another experiment is not gone on with.
    experiment = {
        "train corpus": stores["train"].header["corpus"],
        **{f"{name} corpus": text.store.header["corpus"] for name, text in eval_sets.items()},
        **config.evaluate.identity,
        "seed": loop.seed,
        "max_grad_norm": config.update.max_grad_norm,
        **asdict(config.optimizer),
        "mlm_probability": config.masking.mlm_probability,
        "whole_word_mask": config.masking.whole_word_mask,
        "model": fingerprint(net),
        "tokenizer": info.fingerprint,
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
    adamw = make_optimizer(
        model, config.optimizer.learning_rate, config.optimizer.weight_decay, fused=accelerator.scaler is None
    )
    scheduler = make_scheduler(
        adamw, config.optimizer.lr_scheduler_type, config.optimizer.num_warmup_steps, last_step
    )
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
        measured = eval_sets if complete else {"held_out": eval_sets["held_out"]}
        evaluations = evaluate_all(model, measured, accelerator, complete, stop.asked)
        if evaluations is None:  # given up: it is made up for when the run goes on
            save_and_stop()
        found = evaluations["held_out"].first_pass.summary()
        run.log("eval", progress.step, tokens=progress.tokens, **found)
        loss, perplexity = found["eval_loss"], found["perplexity"]
        part = "" if len(config.evaluate.passes) == 1 else f" (pass 1 of {len(config.evaluate.passes)})"
        run.say(f"step {progress.step}: held-out loss {loss:.4f}, perplexity {perplexity:.4g}{part}")
        if loop.load_best_model_at_end and run.is_main:
            writer.save_best(progress.step, net, found)
        progress.evaluated = True
        return evaluations

    def save() -> None:
        started = time.perf_counter()
        if run.is_main:
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
                logits = model(input_ids, positions, attention_mask)  # [M, V]
                losses = F.cross_entropy(logits.float(), targets, reduction="none")  # [M] float32
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
        micro_batch = passes.first(config.update.per_device_train_batch_size, found, share, length, device)
        run.begin(config, experiment, progress.step if resumed else None)
        run.say(plan(config, model, batches, micro_batch, eval_sets, last_step, accelerator))
        run.log("start", progress.step, steps=last_step, train_batch_size=G, chunks=n)
        if resumed and run.is_main and loop.load_best_model_at_end:
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
                micro_batch = passes.smaller(micro_batch, config.update.per_device_train_batch_size, length)
                progress.micro_batch[str(world)] = micro_batch
                run.say(f"step {progress.step}: out of memory; from here on {micro_batch} chunks in a pass")
                optimizer.zero_grad()
                release_memory()
                continue
            sum_gradients(parameters, nats, world)
            smallest.grad += nats * 0  # so that a loss that is not finite has no finite gradient
            norm = accelerator.clip_grad_norm_(parameters, config.update.max_grad_norm or math.inf)
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
            reports = due(config.run.logging_steps) or progress.step == last_step
            if not (evaluates or saves or reports or asked):
                continue
            # The host waits for the device here, not in each step (where, under fp16, the scaler does).
            window, lost = meter.read()
            if lost:
                step = progress.step - lost
                trouble = find_nonfinite(model, batches, step, stores["train"], accelerator)
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
            after = evaluate_all(model, eval_sets, accelerator)  # to its end: what a checkpoint needs is gone
        told = conclude(eval_sets, before, after, tokenizer, token_counts(stores["train"], info.size))
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
