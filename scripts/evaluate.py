"""Measures a masked language model on held-out text, under fixed masks, or two models on the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlm.startup import quick_imports

with quick_imports():
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from mlm import cli
    from mlm.config import Config
    from mlm.data.chunks import ChunkConfig, chunk_length
    from mlm.data.corpus import CorpusConfig, OutOfDomainConfig
    from mlm.data.token_store import TokenStore, TokenStoreConfig, prepare
    from mlm.data.tokenizer import tokenizer_info
    from mlm.engine.device import make_accelerator
    from mlm.engine.distributed import local_main_process_first
    from mlm.errors import UserError
    from mlm.evaluation.compare import compare, in_words
    from mlm.evaluation.eval_set import open_eval_sets
    from mlm.evaluation.evaluate import (
        EvalSet,
        EvaluateConfig,
        Evaluation,
        evaluate_all,
        measure,
        token_counts,
    )
    from mlm.evaluation.pseudo_perplexity import PseudoPerplexityConfig
    from mlm.evaluation.pseudo_perplexity import measure as measure_sentences
    from mlm.figures import figure, finite
    from mlm.files import write_json
    from mlm.model.load import ModelConfig, check_embeddings, load_model, open_tokenizer, position_limit
    from mlm.model.sparse_head import SparseMaskedLM


@dataclass(frozen=True)
class CheckpointToMeasure:
    """The part of ModelConfig that measuring needs, the precision, and what to compare with."""

    model_name_or_path: str | None = None  # masked-LM checkpoint, a Hub name or a folder
    tokenizer_name: str | None = None  # tokenizer, where it differs from the model's
    compare: str | None = None  # the base: a second checkpoint, measured on the same masks
    output: str | None = None  # file to write the figures to, with --compare the whole comparison, as JSON
    trust_remote_code: bool = False  # run the Python code that a checkpoint brings along
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # default: as accelerate is configured


ROOMS = (
    *(CheckpointToMeasure, CorpusConfig, OutOfDomainConfig, TokenStoreConfig, ChunkConfig),
    *(EvaluateConfig, PseudoPerplexityConfig),
)


class Measured(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    stores: dict[str, TokenStore]
    eval_sets: dict[str, EvalSet]  # "held_out" and, where asked for, "general"
    evaluations: dict[str, Evaluation]

    def figures(self) -> dict[str, dict[str, Any]]:
        return {name: measure(self.evaluations[name], text) for name, text in self.eval_sets.items()}


def main(argv: Sequence[str]) -> dict[str, Any]:
    what, corpus, out_of_domain, token_store, chunking, evaluation, pseudo, _ = cli.parse(
        ROOMS, argv, cli.command(__doc__)
    )
    if not what.model_name_or_path:
        raise UserError("nothing to measure; give --model_name_or_path")
    model = ModelConfig(what.model_name_or_path, trust_remote_code=what.trust_remote_code)
    base = replace(model, model_name_or_path=what.compare) if what.compare else None
    model = replace(model, tokenizer_name=what.tokenizer_name)
    accelerator = make_accelerator(what.mixed_precision)
    if pseudo.pseudo_perplexity:
        sentences, size = pseudo.pseudo_perplexity, evaluation.per_device_eval_batch_size
        scored = {}
        for name, which in {"base": base, "model": model}.items():
            if which is not None:
                if base is not None:
                    accelerator.print(f"{which.model_name_or_path}:")
                scored[name] = measure_sentences(sentences, which, size, accelerator)
        result = {**scored.pop("model"), **scored}
        if what.output and accelerator.is_main_process:
            save(Path(what.output), result)
        accelerator.end_training()
        return result
    config = Config(model, corpus, out_of_domain, token_store, chunking, evaluate=evaluation)
    limits = [limit for limit in map(position_limit, (model, base) if base else (model,)) if limit]
    length = chunk_length(chunking, min(limits, default=None))

    found = measure_one(config, length, accelerator)
    result: dict[str, Any] = {name: figures for name, figures in found.figures().items()}
    if base is None:
        for name, text in found.eval_sets.items():
            accelerator.print(described(result[name], text))
    else:
        was = measure_one(replace(config, model=base), length, accelerator)
        result, lines = compared(was, found)
        accelerator.print(lines)
    if what.output and accelerator.is_main_process:
        save(Path(what.output), result)
    accelerator.end_training()
    measured = found.figures()["held_out"]
    sizes = {"chunks": len(found.eval_sets["held_out"].chunk_ids), "chunk_size": length}
    return finite({**measured, **sizes, **(headlines(result) if base else {})})


def measure_one(config: Config, length: int, accelerator: Accelerator) -> Measured:
    """The figures of the checkpoint that `config` names, on its eval_sets in chunks of `length` tokens."""
    with local_main_process_first(accelerator):
        tokenizer = open_tokenizer(config.model, config.corpus, config.token_store)
        info = tokenizer_info(tokenizer)
        stores = prepare(config.corpus, tokenizer, info, config.token_store)
    check_embeddings(config.model, tokenizer)
    eval_sets = open_eval_sets(config, tokenizer, info, stores["validation"], length, accelerator)
    model = SparseMaskedLM(load_model(config.model, tokenizer, seed=0)).to(accelerator.device)
    return Measured(tokenizer, stores, eval_sets, evaluate_all(model, eval_sets, accelerator))


def compared(base: Measured, found: Measured) -> tuple[dict[str, Any], str]:
    """The comparison of each text, or where the tokenizers differ the figures of both; and lines to print."""
    result: dict[str, Any] = {"held_out": None, "general": None}
    same = all(
        text.info.fingerprint == base.eval_sets[n].info.fingerprint for n, text in found.eval_sets.items()
    )
    lines = []
    for name, text in found.eval_sets.items():
        before, after = base.evaluations[name], found.evaluations[name]
        if same:
            train = found.stores.get("train")
            counts = token_counts(train, text.info.size) if train else None
            result[name] = compare(text, before, after, found.tokenizer, counts)
            lines.append(f"{text.name}: {in_words(result[name])}")
        else:
            was, now = measure(before, base.eval_sets[name]), measure(after, text)
            result[name] = {"text": text.name, "before": was, "after": now}
            lines.append(
                f"{text.name}: {figure(was['bits_per_character'])} bits per character before, "
                f"{figure(now['bits_per_character'])} after"
            )
    if not same:
        if found.eval_sets["held_out"].config.max_eval_samples:
            lines.append("--max_eval_samples: the two were measured on chunks of different parts of the text")
        lines.append(
            "the two have different tokenizers: their masks and the perplexity of their tokens are not "
            "comparable, bits per character and per word are"
        )
    return finite({**result, "same_tokenizer": same}), "\n".join(lines)


def headlines(result: dict[str, Any]) -> dict[str, Any]:
    """What the last line of output says of a comparison."""
    held_out = result["held_out"]
    before = {f"{name}_before": value for name, value in held_out["before"].items()}
    if not result["same_tokenizer"]:
        return {**before, "same_tokenizer": False}
    low, high = held_out["gain"]["interval"]
    gain = {"gain": held_out["gain"]["value"], "gain_low": low, "gain_high": high}
    return {**before, "same_tokenizer": True, **gain}


def described(figures: dict[str, Any], eval_set: EvalSet) -> str:
    bits = " and ".join(
        f"{figure(figures[f'bits_per_{unit}'])} bits per {unit}"
        for unit in ("character", "word")
        if figures[f"bits_per_{unit}"] is not None
    )
    return (
        f"perplexity {figures['perplexity']:.4g}, loss {figures['eval_loss']:.4f} nats, accuracy "
        f"{figures['accuracy']:.2%}, {bits}, over {figures['eval_masked_tokens']:,} masked tokens in "
        f"{len(eval_set.chunk_ids):,} chunks of {eval_set.chunks.chunk_size} of {eval_set.name}"
    )


def save(path: Path, result: dict[str, Any]) -> None:
    try:
        write_json(path, finite(result))
    except OSError as error:
        raise UserError(f"--output {path}: cannot write there ({error.strerror})") from None


if __name__ == "__main__":
    cli.run(main)
