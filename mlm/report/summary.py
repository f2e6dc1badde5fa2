"""What a run is about to do, what its result depends on, and what it came to."""

import signal
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlm.data import order
from mlm.data.token_store import TokenStore
from mlm.engine.distributed import agree, from_main
from mlm.engine.experiment import identity, optimizer_identity
from mlm.engine.signals import Stopped
from mlm.engine.update import Update
from mlm.errors import UserError, one_line, printable
from mlm.evaluation.compare import CONFIDENCE, EVAL_SETS, Conclusion, conclude
from mlm.evaluation.eval_set import EvalSet
from mlm.evaluation.evaluate import Evaluation
from mlm.figures import figure, finite
from mlm.model.load import fingerprint, load_model
from mlm.report.environment import peak_memory_mib
from mlm.report.model_card import model_card, task_in_words
from mlm.report.run import PROBES, Run


def describe(
    config: Any, update: Update, eval_sets: dict[str, EvalSet], stores: dict[str, TokenStore], last_step: int
) -> dict[str, Any]:
    """All that the result depends on, as JSON: a checkpoint of another experiment is not resumed."""
    batches = update.batches
    return {
        "train corpus": stores["train"].header["corpus"],
        "replay": [f"{share} of {stores[name].header['corpus']}" for name, share in batches.shares.items()] or None,
        **{f"{name} corpus": eval_set.store.header["corpus"] for name, eval_set in eval_sets.items()},
        **config.evaluate.identity,
        **asdict(config.optimizer),
        "seed": batches.seed,
        "order of chunks": order.VERSION,
        "max_grad_norm": config.update.max_grad_norm,
        "reduce_dtype": config.update.reduce_dtype,  # of one process too, which others may join
        "model": fingerprint(update.model.model),
        "tokenizer": eval_sets["held_out"].info.fingerprint,
        "masks": batches.recipe.digest,
        **asdict(config.masking),
        "loss function": identity(update.objective),
        "mask selection": identity(batches.select),
        "mask rate": identity(batches.rate),
        "optimizers": [
            optimizer_identity(*pair, update.model) for pair in zip(update.optimizers, update.schedulers, strict=True)
        ],
        "dropout": config.model.dropout,
        "mixed_precision": str(update.accelerator.mixed_precision),
        "tf32": config.device.tf32,
        "max_seq_length": batches.chunks.chunk_size,
        "line_by_line": config.chunks.line_by_line,
        "remainder": config.chunks.remainder,
        "train_batch_size": batches.global_batch,
        "chunks": batches.num_chunks,
        "steps": last_step,
        **config.added,
    }


def plan(config: Any, update: Update, eval_sets: dict[str, EvalSet], steps: int) -> str:
    """What a run is about to do, for a person to read."""
    model, batches = update.model, update.batches
    parameters = [*model.parameters()]
    every, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    name = config.model.model_name_or_path or f"{model.model.config.model_type} from scratch"
    G, world, n = batches.global_batch, batches.world, batches.num_chunks
    share = -(-G // world)
    often = ", more than there are: each step sees some several times" if n < G else ""
    sizes = "".join(f"{len(s.chunk_ids):,} {name.replace('_', ' ')}, " for name, s in eval_sets.items())
    mixed = "".join(f"{len(own):,} {name}, " for own, name in zip(batches.replay, batches.shares, strict=True))
    seen = ", ".join(f"{e:.3g} epochs{f' of {name}' if mixed else ''}" for name, e in batches.epochs(steps).items())
    lines = {
        "model": f"{name} ({type(model.model).__name__}), {every:,} parameters, {trained:,} of them trained",
        "head": "on the masked positions" if model.sparse else "on all positions",
        "chunks": f"{n:,} to train on, {mixed}{sizes}of {batches.chunks.chunk_size} tokens",
        "batch": f"{G} chunks a step{often}: {world} process(es) of {share}, "
        f"in {'at most ' if batches.pack else ''}{-(-share // update.micro_batch)} micro-batch(es) of at most "
        f"{min(update.micro_batch, share)}",
        "steps": f"{steps:,} ({seen}), {config.optimizer.lr_scheduler_type} "
        f"learning rate, peak {config.optimizer.learning_rate:g}",
        "precision": f"{update.accelerator.mixed_precision} on {update.accelerator.device}",
    }
    return "\n".join(f"{what:<10} {text}" for what, text in lines.items())


def sizes(stores: dict[str, TokenStore], eval_sets: dict[str, EvalSet]) -> dict[str, dict[str, int]]:
    """Documents and tokens of each text."""
    texts = {**stores, **{name: eval_set.store for name, eval_set in eval_sets.items()}}
    del texts["validation"]  # the held-out text
    return {name: {key: s.header[key] for key in ("documents", "tokens")} for name, s in texts.items()}


def conclude_run(
    run: Run,
    eval_sets: dict[str, EvalSet],
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    tokenizer: PreTrainedTokenizerBase,
    stores: dict[str, TokenStore],
) -> dict[str, Any]:
    """Compares before with after and writes what came of it, on the main process; returns the results on each."""
    results = None
    if run.is_main:
        conclusion = conclude(eval_sets, before, after, tokenizer, stores["train"].token_counts)
        run.log.print(conclusion.lines)
        results = save_results(run, conclusion)
        if run.task:  # what fails in it, for lack of memory, say, costs nothing else
            try:
                conclusion = probe_run(run, tokenizer, conclusion, eval_sets["held_out"].chunks.chunk_size, stores)
                results = save_results(run, conclusion)
                run.log.print(task_in_words(results))
            except Exception as error:
                reason = one_line(f"{type(error).__name__}: {error}", 200)
                run.log.print(f"warning: the task could not be probed ({reason}); {PROBES}")
        run.log.print(
            f"held-out perplexity {figure(results['perplexity'])}, where token frequencies alone reach "
            f"{figure(results['perplexity_unigram'])}; saved to {run.folder}"
        )
    results = from_main(results, run.accelerator)
    if run.task and "task_documents" not in results and (number := agree([run.stop.asked()], run.group)[0]):
        raise Stopped(number, f"stopped by {signal.Signals(number).name}: the task is not probed; {PROBES}")
    return results


def save_results(run: Run, conclusion: Conclusion) -> dict[str, Any]:
    """The figures of the run, as they are written to all_results.json, beside the comparison and the model card."""
    batches = run.update.batches
    results = finite(conclusion.results | run.progress.results())
    epochs = batches.epochs(run.progress.step)
    results |= {"epochs": epochs.pop("domain"), **{f"{name}_epochs": seen for name, seen in epochs.items()}}
    results["peak_memory_mib"] = peak_memory_mib(run.accelerator.device)
    card = model_card(run.hub_id or run.folder.resolve().name, run.config, results)
    run.directory.save_results(results, conclusion, card)
    return results


def probe_run(
    run: Run, tokenizer: PreTrainedTokenizerBase, conclusion: Conclusion, length: int, stores: dict[str, TokenStore]
) -> Conclusion:
    """The conclusion with the probe of the run's task, on the main process: the model as it began, loaded again, and
    as it is. `length` is of the chunks of which --per_device_eval_batch_size fit into memory."""
    from mlm.evaluation import probe  # it imports scikit-learn: a second

    config, accelerator = run.config, run.accelerator
    base = load_model(config.model, tokenizer, config.train.seed)
    if fingerprint(base) != run.experiment["model"]:
        raise UserError(f"{config.model.model_name_or_path} is not the model that the run began from any more")
    size = max(config.evaluate.per_device_eval_batch_size * length // probe.LONGEST, 1)
    models = base.to(accelerator.device), run.model
    both = [probe.features(net, tokenizer, run.task, size, accelerator) for net in models]

    def check() -> None:
        if number := run.stop.asked():
            raise Stopped(number, "asked to stop")

    task = probe.conclude(run.task, both, [stores[name] for name in ("train", *config.replay.shares)], check)
    comparison = {**dict.fromkeys(EVAL_SETS), **(conclusion.comparison or {}), "task": task}
    return conclusion._replace(results=conclusion.results | probe.figures(task), comparison=comparison)


def outcome(results: dict[str, Any]) -> str:
    """A table of the figures before and after, with the gain, and of what the run took.

    results: as in all_results.json, and `output_dir`"""
    shown = {name: figure(value) for name, value in results.items() if not isinstance(value, str | list)}
    rows = [("", "before", "after", "gain") if "perplexity_before" in results else ("", "", "after", "")]
    for text, prefix in (("held-out", ""), ("one by one", "documents_"), ("out-of-domain", "out_of_domain_")):
        gain, low, high = (shown.get(f"{prefix}{name}") for name in ("gain", "gain_low", "gain_high"))
        over = " over chunks of one document" if results.get(f"{prefix}gain_documents") == 1 else ""
        interval = f" ({CONFIDENCE:.0%} interval {low} to {high}{over})" if results.get(f"{prefix}gain_low") else ""
        for name, last in (("perplexity", f"{gain}×{interval}" if gain else ""), ("eval_loss", "")):
            if after := shown.get(f"{prefix}{name}"):
                title = f"{text} {name.removeprefix('eval_')}"
                rows.append((title, shown.get(f"{prefix}{name}_before", ""), after, last))
    minutes, seconds = divmod(round(results["train_seconds"]), 60)
    speed = f"{results['tokens_per_second']:,.0f} tokens/s"
    lines = ["{:<26}{:<11}{:<11}{}".format(*row).rstrip() for row in rows]
    lines += [f"{results['steps']:,} steps at {speed} in {minutes}:{seconds:02}", f"saved to {results['output_dir']}"]
    return printable("\n".join(lines))
