"""Measures a masked language model on held-out text, under fixed masks, or two models on the same ones.

Of a finished run: --model_name_or_path RUN --compare BASE, and the run's flags about text, chunks and
evaluation, repeat what the run has in comparison.json.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from startup import quick_imports

with quick_imports():
    import numpy as np
    from accelerate import Accelerator
    from pseudo_perplexity import Scores, score
    from sentences import read_sentences
    from terminal import PAGE, fit
    from transformers import PreTrainedTokenizerBase

    from mlm import cli
    from mlm.config import Config
    from mlm.data.chunks import ChunkConfig, chunk_length
    from mlm.data.corpus import CorpusConfig, OutOfDomainConfig
    from mlm.data.task import Task, TaskConfig, read_task
    from mlm.data.token_store import TokenStore, TokenStoreConfig, limit_threads
    from mlm.data.tokenizer import load_tokenizer, tokenizer_info
    from mlm.engine.checkpoint import tensors
    from mlm.engine.device import make_accelerator
    from mlm.engine.distributed import broadcast, check_same, local_main_process_first, on_main
    from mlm.errors import UserError, printable
    from mlm.evaluation.compare import EVAL_SETS, compare, documents_of, gain_figures, in_words
    from mlm.evaluation.eval_set import EvalSet, EvaluateConfig, open_eval_sets
    from mlm.evaluation.evaluate import Evaluations, evaluate_all, measure
    from mlm.evaluation.interval import CONFIDENCE, FEWEST, half_width
    from mlm.figures import exp_or_inf, figure, finite, mean
    from mlm.files import write_json
    from mlm.model.load import ModelConfig, fingerprint, load_trained, open_corpus, position_limit
    from mlm.model.sparse_head import SparseMaskedLM
    from mlm.model.vocabulary import check_encoder
    from mlm.report.environment import versions
    from mlm.report.model_card import task_in_words


@dataclass(frozen=True)
class CheckpointToMeasure:
    """The part of ModelConfig that measuring needs, the precision, and what to compare with."""

    model_name_or_path: str | None = None  # Measure this checkpoint, a Hub name or a folder.
    tokenizer_name: str | None = None  # Use this tokenizer if it differs from the model's.
    compare: str | None = None  # Measure this second checkpoint, the base, on the same masks.
    pseudo_perplexity: str | None = None  # Score the sentences of this file, no held-out text (-: standard input).
    output: str | None = None  # Write the figures, or with --compare the comparison, to this JSON file.
    trust_remote_code: bool = False  # Run the Python code that a checkpoint brings along.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # The default is accelerate's setting.


MODULES = (
    *(CheckpointToMeasure, CorpusConfig, OutOfDomainConfig, TokenStoreConfig, ChunkConfig),
    *(EvaluateConfig, TaskConfig),
)


class Measured(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    stores: dict[str, TokenStore]
    eval_sets: dict[str, EvalSet]  # "held_out" and, where asked for, "out_of_domain"
    evaluations: Evaluations

    def figures(self) -> dict[str, dict[str, Any]]:
        return {name: measure(self.evaluations[name], eval_set) for name, eval_set in self.eval_sets.items()}


def main(argv: Sequence[str]) -> dict[str, Any]:
    what, corpus, out_of_domain, token_store, chunks, evaluation, task_config, _ = cli.parse(
        MODULES, argv, cli.command(__doc__)
    )
    if not what.model_name_or_path:
        raise UserError("nothing to measure; give --model_name_or_path")
    model = ModelConfig(what.model_name_or_path, trust_remote_code=what.trust_remote_code)
    models = {"base": replace(model, model_name_or_path=what.compare)} if what.compare else {}
    models["model"] = replace(model, tokenizer_name=what.tokenizer_name)
    if task_config.given and not what.compare:
        raise UserError("--task_file: a probe is of two models; give --compare BASE")
    accelerator = make_accelerator(what.mixed_precision)
    # Where stores are kept may differ.
    modules = (what, corpus, out_of_domain, chunks, evaluation, task_config)
    settings = {name: value for module in modules for name, value in asdict(module).items()}
    check_same({**settings, **versions(), "device": accelerator.device.type}, accelerator)
    task = on_main(lambda: read_task(task_config, corpus), accelerator)
    if what.pseudo_perplexity:
        size = evaluation.per_device_eval_batch_size
        result = summary = measure_file(what.pseudo_perplexity, models, size, accelerator)
        train = None
    elif task and not (corpus.dataset_name or corpus.files):
        if out_of_domain != OutOfDomainConfig():
            raise UserError("--out_of_domain_file: give the held-out text too, --validation_file")
        limit_threads(token_store)
        result, summary, train = {}, {}, None
    else:
        config = Config(
            corpus=corpus, out_of_domain=out_of_domain, token_store=token_store, chunks=chunks, evaluate=evaluation
        )
        result, summary, train = measure_corpus(config, models, accelerator)
    if task:
        found, figures = measure_task(task, models, train, evaluation.per_device_eval_batch_size, accelerator)
        result, summary = {**result, "task": found}, {**summary, **figures}
    if what.output and accelerator.is_main_process:
        save(Path(what.output), result)
    accelerator.end_training()
    return summary


def load(config: ModelConfig, accelerator: Accelerator) -> tuple[SparseMaskedLM, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(config.tokenizer_name or config.model_name_or_path, config.trust_remote_code)
    return load_trained(config, tokenizer, accelerator.device), tokenizer


def measure_file(path: str, models: dict[str, ModelConfig], size: int, accelerator: Accelerator) -> dict[str, Any]:
    """The pseudo-perplexity of a file's sentences, printed; that of the base, if there is one, under "base".

    Raises UserError where the file cannot be read, the processes differ in it or in a model, and as `score` does.
    """
    # There is one standard input.
    sentences = on_main(lambda: read_sentences(path), accelerator) if path == "-" else read_sentences(path)
    measured = {}
    for name, config in models.items():
        if len(models) > 1:
            accelerator.print(f"{config.model_name_or_path}:")
        model, tokenizer = load(config, accelerator)
        text = {"sentences": sentences, "tokenizer": tokenizer_info(tokenizer).fingerprint}
        check_same({**text, "model": fingerprint(model.model)}, accelerator)
        broadcast(tensors(model.model).values(), accelerator)  # which that fingerprint rounds
        scores = score(model, tokenizer, sentences, size, accelerator)
        measured[name] = print_scores(sentences, scores, accelerator)
    return {**measured.pop("model"), **measured}


def print_scores(sentences: dict[int, str], scores: Scores, accelerator: Accelerator) -> dict[str, Any]:
    """Prints a line for each sentence and one for all; returns `Scores.summary`, and "sentences"."""
    accelerator.print(f"{'line':>6} {'tokens':>6} {'PLL, nats':>10} {'PPPL':>9}  sentence")
    records, totals = [], (scores.log_likelihoods.tolist(), scores.tokens.tolist())
    for (line, text), nats, tokens in zip(sentences.items(), *totals, strict=True):
        perplexity = exp_or_inf(mean(-nats, tokens))
        figures = {"pseudo_log_likelihood": nats, "tokens": tokens, "pseudo_perplexity": perplexity}
        records.append({"line": line, "text": text, **finite(figures)})
        head = f"{line:>6} {tokens:>6} {nats:>10.2f} {perplexity:>9.4g}  "
        accelerator.print(head + fit(printable(text.strip()), PAGE - len(head)).rstrip())
    summary = scores.summary()
    accelerator.print(
        f"pseudo-perplexity {figure(summary['pseudo_perplexity'])} over {summary['tokens']:,} tokens in "
        f"{len(sentences):,} sentences; {summary['bits_per_character']:.4g} bits a character, "
        f"{summary['bits_per_word']:.4g} a word"
        + (f"; {summary['unknown_tokens']:,} unknown tokens are not predicted" if scores.unknown.any() else "")
    )
    return {**finite(summary), "sentences": records}


def measure_corpus(
    config: Config, models: dict[str, ModelConfig], accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str, Any], TokenStore | None]:
    """Prints the figures on each eval set. Returns them, those for the last line of output, and the training split."""
    limits = [limit for limit in map(position_limit, models.values()) if limit]
    limit = min(limits, default=None)
    length = chunk_length(config.chunks, limit)
    measured = {n: measure_one(replace(config, model=m), length, limit, accelerator) for n, m in models.items()}
    result, summary, lines = on_main(lambda: conclude(measured, length), accelerator)
    accelerator.print(lines)
    return result, summary, measured["model"].stores.get("train")


def conclude(measured: dict[str, Measured], length: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The figures on each eval set, those for the last line of output, and lines to print. length: of a chunk"""
    adapted = measured["model"]
    result: dict[str, Any] = adapted.figures()
    eval_set = adapted.eval_sets["held_out"]
    summary = {EVAL_SETS[text][0] + name: value for text in result for name, value in result[text].items()}
    summary |= {"chunks": len(eval_set.chunk_ids), "chunk_size": length}
    summary["held_out_leaks"] = eval_set.store.header["leaks"]
    if "base" in measured:
        result, lines = compare_both(measured["base"], adapted)
        summary |= headlines(result)
    else:
        lines = "\n".join(in_words_alone(figures, adapted.eval_sets[name]) for name, figures in result.items())
    return result, finite(summary), lines


def measure_task(
    task: Task, models: dict[str, ModelConfig], train: TokenStore | None, size: int, accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prints the task of both models. Returns it, and its figures for the last line of output."""
    from mlm.evaluation import probe  # it imports scikit-learn: a second

    def measured() -> dict[str, Any]:
        both = []
        for config in (models["base"], models["model"]):
            model, tokenizer = load(config, accelerator)
            check_encoder(model.model)
            both.append(probe.features(model.model, tokenizer, task, size, accelerator))
        return probe.conclude(task, both, [train] if train else None)

    found = on_main(measured, accelerator)
    figures = probe.figures(found)
    accelerator.print(task_in_words(figures))
    if not train:
        accelerator.print("- whether the model has read these texts in training is unknown without --train_file")
    return found, figures


def measure_one(config: Config, length: int, limit: int | None, accelerator: Accelerator) -> Measured:
    """Evaluates the checkpoint that `config` names on its eval sets, in chunks of `length` tokens, and on documents of
    at most `limit`."""
    with local_main_process_first(accelerator, config) as own:
        tokenizer, info, stores = open_corpus(own)
        eval_sets = open_eval_sets(own, tokenizer, info, stores["validation"], length, limit)
    model = load_trained(config.model, tokenizer, accelerator.device, length)
    text = {f"{name} corpus": eval_set.store.header["corpus"] for name, eval_set in eval_sets.items()}
    check_same({**text, "tokenizer": info.fingerprint, "model": fingerprint(model.model)}, accelerator)
    broadcast(tensors(model.model).values(), accelerator)  # which that fingerprint rounds
    evaluations = evaluate_all(model, eval_sets, accelerator)
    assert evaluations is not None, "nothing asks to stop"
    return Measured(tokenizer, stores, eval_sets, evaluations)


def compare_both(base: Measured, adapted: Measured) -> tuple[dict[str, Any], str]:
    """The comparison on each eval set, or the figures of both where the tokenizers differ; lines to print."""
    names = list(adapted.eval_sets)
    if all(adapted.eval_sets[n].info.fingerprint == base.eval_sets[n].info.fingerprint for n in names):
        train = adapted.stores.get("train")
        counts = train.token_counts if train else None
        compared = {
            n: compare(
                *(adapted.eval_sets[n], base.evaluations[n], adapted.evaluations[n], adapted.tokenizer, counts),
                [m.evaluations.get("documents") if n == "held_out" else None for m in (base, adapted)],
            )
            for n in names
        }
        lines = [f"{printable(compared[n]['text'])}: {in_words(compared[n])}" for n in names]
        return {**dict.fromkeys(EVAL_SETS), **compared, "same_tokenizer": True}, "\n".join(lines)

    result, lines = {}, []
    for name, before in base.figures().items():
        after, text = adapted.figures()[name], adapted.eval_sets[name].name
        change = after["bits_per_character"] - before["bits_per_character"]
        half, documents = half_width_in_bits(base, adapted, name)
        low, high = change - half, change + half
        result[name] = {"text": text, "before": before, "after": after}
        result[name]["difference_in_bits"] = {"value": change, "interval": [low, high], "documents": documents}
        sure = f"{CONFIDENCE:.0%} interval {low:.4f} to {high:.4f}, from {documents:,} documents"
        lines.append(
            f"{printable(text)}: {figure(before['bits_per_character'])} bits per character before, "
            f"{figure(after['bits_per_character'])} after, a difference of {figure(change)} "
            f"({sure if math.isfinite(low) else 'no interval'})"
        )
    if adapted.eval_sets["held_out"].config.max_eval_samples:
        lines.append("--max_eval_samples: the two were measured on chunks of different parts of the text")
    lines.append(
        "the two have different tokenizers: their masks and the perplexity of their tokens are not "
        "comparable, bits per character and per word are"
    )
    return finite({**dict.fromkeys(EVAL_SETS), **result, "same_tokenizer": False}), "\n".join(lines)


def half_width_in_bits(base: Measured, adapted: Measured, name: str) -> tuple[float, int]:
    """Half of the interval of the difference in bits per character on an eval set, and the number of its documents.

    bits per character = loss / ln 2 · tokens / characters, with each document left out in turn: see interval.py

    A token store has the characters of the text, not of each document; a document's are taken as its share of the
    base's tokens. What unknown tokens cost is taken as given. NaN where --max_eval_samples has chosen other documents
    for each of the two, one of them has an empty document, or there is no interval of the loss either."""
    losses, tokens = [], []  # [1 + U] each: of the whole text, and without each document
    for measured in (base, adapted):
        eval_set, evaluation = measured.eval_sets[name], measured.evaluations[name]
        offsets = eval_set.store.document_offsets
        maskable = np.concatenate([[0], np.cumsum(eval_set.info.maskable[eval_set.store.ids])])
        length = np.diff(maskable[offsets])
        document = documents_of(eval_set, evaluation)
        nats, masked = (np.bincount(document, weights, len(length)) for weights in (evaluation.nats, None))
        tokens.append(without_each(length))
        with np.errstate(invalid="ignore", divide="ignore"):  # infinite nats, or a document that has all
            losses.append(without_each(nats) / without_each(masked))
    documents = len(tokens[0]) - 1
    if eval_set.config.max_eval_samples or len(tokens[0]) != len(tokens[1]) or documents < FEWEST:
        return math.nan, documents
    bits = (losses[1] * tokens[1] - losses[0] * tokens[0]) / tokens[0] / math.log(2)  # a token of the base
    bits *= tokens[0][0] / base.eval_sets[name].store.header["characters"]
    return half_width(bits[0] - bits[1:], tokens[0][0] - tokens[0][1:]), documents


def without_each(values: np.ndarray) -> np.ndarray:
    """The sum of values [U], and the sums that lack one of them: [1 + U]."""
    return values.sum() - np.concatenate([[0], values])


def headlines(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a comparison for the last line of output, those of out-of-domain text with that prefix."""
    figures = {"same_tokenizer": result["same_tokenizer"]}
    for eval_set, (prefix, _) in EVAL_SETS.items():
        if not (compared := result[eval_set]):
            continue
        figures |= {f"{prefix}{name}_before": value for name, value in compared["before"].items()}
        if result["same_tokenizer"]:
            figures |= gain_figures(compared, prefix)
        else:
            changed = compared["difference_in_bits"]
            figures[f"{prefix}difference_in_bits"] = changed["value"]
            figures[f"{prefix}difference_low"], figures[f"{prefix}difference_high"] = changed["interval"]
    return figures


def in_words_alone(figures: dict[str, Any], eval_set: EvalSet) -> str:
    """The figures of one model on an eval set, on one line."""
    bits = " and ".join(
        f"{figure(figures[f'bits_per_{unit}'])} bits per {unit}"
        for unit in ("character", "word")
        if figures[f"bits_per_{unit}"] is not None
    )
    return (
        f"perplexity {figure(figures['perplexity'])}, loss {figures['eval_loss']:.4f} nats, accuracy "
        f"{figures['accuracy']:.2%}, {bits}, over {figures['eval_masked_tokens']:,} masked tokens in "
        f"{len(eval_set.chunk_ids):,} chunks of {eval_set.chunks.chunk_size} of {printable(eval_set.name)}"
    )


def save(path: Path, result: dict[str, Any]) -> None:
    try:
        write_json(path, finite(result))
    except OSError as error:
        raise UserError(f"--output {path}: cannot write there ({error.strerror})") from None


if __name__ == "__main__":
    cli.run(main)
