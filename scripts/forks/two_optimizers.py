"""A fork with Muon (Jordan et al. 2024) for the encoder's matrices and AdamW for all else.

    accelerate launch scripts/forks/two_optimizers.py --model_name_or_path MODEL --train_file FILE …

The first three functions are what most forks change: the loss, how many tokens a step masks, and which."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlm import cli
from mlm.config import Config
from mlm.data.batches import Batch, Batches
from mlm.data.chunks import chunk_length, cut_into_chunks
from mlm.data.masking import MaskingConfig, make_recipe, select_tokens, select_words
from mlm.data.token_store import TokenStore
from mlm.data.tokenizer import TokenizerInfo
from mlm.engine.device import make_accelerator
from mlm.engine.distributed import local_main_process_first
from mlm.engine.optimizer import make_optimizer, make_scheduler
from mlm.engine.update import Update
from mlm.errors import UserError
from mlm.evaluation.eval_set import open_eval_sets
from mlm.evaluation.evaluate import Evaluations
from mlm.model.load import load_model, open_corpus
from mlm.model.sparse_head import SparseMaskedLM
from mlm.model.vocabulary import max_positions
from mlm.report.metrics import Progress
from mlm.report.run import Run
from mlm.report.summary import conclude_run, describe, outcome, plan, sizes

MUON_RATE = 0.02  # the peak. Muon computes in bfloat16: other numbers of processes differ by more than rounding


def objective(model: SparseMaskedLM, batch: Batch) -> torch.Tensor | tuple[torch.Tensor, dict]:
    """The losses of a micro-batch's masked tokens, [M] float32, or their sum. With a dict of sums behind them, `return
    losses, {"agreement": …}`, these are logged beside the loss."""
    logits = model(batch.input_ids, batch.positions, batch.attention_mask)  # [M, V]: the masked tokens alone
    return F.cross_entropy(logits.float(), batch.targets, reduction="none")


def mask_rate(step: int, last_step: int, masking: MaskingConfig) -> float:
    """The share of tokens that optimizer step `step`, in 0 … last_step - 1, predicts."""
    return masking.mlm_probability


def select(
    maskable: np.ndarray, draws: np.ndarray, rate: float, word_starts: np.ndarray, masking: MaskingConfig
) -> np.ndarray:
    """Which tokens of B chunks are predicted: [B, T] bool, 1: predicted.

    maskable:    [B, T] bool, 1: no special or unused token
    draws:       [B, T] uint64, 64 random bits for each token: a function of (seed, epoch, chunk, position)
    word_starts: [B, T] bool, 1: a word begins here"""
    if masking.whole_word_mask:
        return select_words(maskable, draws, rate, word_starts)
    return select_tokens(maskable, draws, rate)


def make_optimizers(model: SparseMaskedLM, config: Config, muon_rate: float) -> list[torch.optim.Optimizer]:
    """Muon, peaking at `muon_rate`, for the encoder's matrices, without embeddings; AdamW for all else."""
    named = model.model.base_model.named_parameters(prefix=f"model.{model.model.base_model_prefix}")
    matrices = {name: p for name, p in named if p.requires_grad and p.ndim == 2 and "embedding" not in name}
    others = [(name, p) for name, p in model.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(matrices.values(), lr=muon_rate, weight_decay=0.0)
    return [muon, make_optimizer(others, config.optimizer)]


@dataclass(frozen=True)
class Result:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    results: dict[str, Any]  # as in all_results.json
    output_dir: Path


def train(config: Config, accelerator: Accelerator | None = None) -> Result:
    """Runs `config`. Raises UserError where it cannot be done, or the loss is not finite any more, and Stopped where a
    signal asked for that and a checkpoint has been written."""
    accelerator = accelerator or make_accelerator(**asdict(config.device), report_to=config.run.trackers)
    run = Run(config, accelerator)
    # Data and model. One process of a machine tokenises the corpus, once; the others find its token store.
    with local_main_process_first(accelerator, config) as own:
        tokenizer, info, stores = open_corpus(own)
        net = load_model(own.model, tokenizer, config.train.seed)
        length = chunk_length(config.chunks, max_positions(net.config))
        eval_sets = open_eval_sets(own, tokenizer, info, stores["validation"], length)
    model = SparseMaskedLM(net, length, config.chunks.pack_documents).to(accelerator.device)
    batches, last_step = make_batches(config, info, stores, length, accelerator)
    batches = replace(batches, pack=model.packs)  # whether documents share rows is a matter of the architecture

    # Update: any optimizers, each with its schedule.
    optimizers = make_optimizers(model, config, MUON_RATE)
    schedulers = [make_scheduler(optimizer, config.optimizer, last_step) for optimizer in optimizers]
    update = Update(model, objective, batches, optimizers, schedulers, accelerator, config.update)

    # Resume. A fork names here what it adds: anything with a state_dict and a load_state_dict.
    progress, before, extra_state = Progress(), Evaluations(), {}
    experiment = describe(config, update, eval_sets, stores, last_step)
    run.keeps(net, update, progress, before, extra_state, experiment)
    if results := run.finished(tokenizer):
        return Result(net, tokenizer, results, run.folder)
    with run:
        run.resume(sizes(stores, eval_sets))
        run.log.print(plan(config, update, eval_sets, last_step))
        if progress.step == 0 and config.train.eval_on_start:
            before.update(run.measure(model, eval_sets, complete=True))
        elif run.missed_evaluation(last_step):
            run.measure(model, eval_sets, complete=False)

        model.train()
        progress.restart()
        while progress.step < last_step:
            applied = update(progress.step, run.requests())
            progress.add(applied)
            evaluates, saves, logs = run.due(progress.step, last_step)
            if not (evaluates or saves or logs or any(applied.requests)):
                continue
            run.report(stores, tokenizer)  # the host waits for the device here, not in each step
            run.obey(applied.requests)
            if evaluates:
                run.measure(model, eval_sets, complete=False)
            if saves:
                run.save()
            progress.restart()

        # Save the model, then measure it and report: from here on nothing can cost what was trained.
        run.save_model(tokenizer)
        with run.analysis():
            after = before if progress.step == 0 and before else run.measure(model, eval_sets, complete=True)
            results = conclude_run(run, eval_sets, before, after, tokenizer, stores)
        run.finish(results)
    return Result(net, tokenizer, results, run.folder)


def make_batches(
    config: Config, info: TokenizerInfo, stores: dict[str, TokenStore], length: int, accelerator: Accelerator
) -> tuple[Batches, int]:
    """The training batches of this process, a pure function of (seed, step), and the number of steps."""
    if "train" not in stores:
        raise UserError("--validation_file alone leaves nothing to train on; give --train_file too")
    names = ("train", *config.replay.shares)
    chunks, *replay = (cut_into_chunks(stores[name], config.chunks, length, info) for name in names)
    global_batch = config.update.global_batch(accelerator.num_processes)
    last_step = config.train.steps(len(chunks), global_batch * (1 - sum(config.replay.shares.values())))
    return Batches(
        chunks=chunks,
        recipe=make_recipe(info, config.masking.mask_replace_prob, config.masking.random_replace_prob),
        maskable=info.maskable,
        select=partial(select, masking=config.masking),
        rate=partial(mask_rate, last_step=last_step, masking=config.masking),
        seed=config.train.seed,
        global_batch=global_batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        samples=config.train.max_train_samples,
        replay=replay,
        shares=config.replay.shares,
    ), last_step


def main(argv: Sequence[str]) -> dict[str, Any]:
    result = train(cli.parse_config(Config, argv, __doc__))
    return {"output_dir": str(result.output_dir), **result.results}


if __name__ == "__main__":
    cli.run(main, outcome)
