"""Measures a masked language model on held-out text: loss, perplexity and accuracy under fixed masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlm import cli
from mlm.batches import subset
from mlm.chunks import ChunkConfig, chunk_length, cut_into_chunks
from mlm.corpus import CorpusConfig
from mlm.errors import UserError
from mlm.evaluate import EvaluateConfig, evaluate
from mlm.hardware import make_accelerator
from mlm.masking import MaskingConfig, make_recipe
from mlm.model import ModelConfig, SparseMaskedLM, check_embeddings, load_model, max_positions
from mlm.stream import StreamConfig, check_words, prepare
from mlm.tokenizer import load_tokenizer, token_facts


@dataclass(frozen=True)
class PrecisionConfig:
    mixed_precision: Literal["no", "fp16", "bf16"] | None = (
        None  # default: what accelerate was configured for
    )


ROOMS = (ModelConfig, CorpusConfig, StreamConfig, ChunkConfig, MaskingConfig, EvaluateConfig, PrecisionConfig)


def main(argv: Sequence[str]) -> dict[str, Any]:
    model, corpus, stream, chunking, masking, evaluation, precision, _ = cli.parse(
        ROOMS, argv, cli.command(__doc__)
    )
    if not model.model_name_or_path:
        raise UserError("nothing to measure; give --model_name_or_path")
    accelerator = make_accelerator(precision.mixed_precision)
    with accelerator.local_main_process_first():
        tokenizer = load_tokenizer(model.tokenizer_name or model.model_name_or_path, model.trust_remote_code)
        facts = token_facts(tokenizer)
        check_embeddings(model, tokenizer)
        store = prepare(corpus, tokenizer, facts, stream)["validation"]
    if masking.whole_word_mask:
        check_words(store)
    net = load_model(model, tokenizer, seed=0)
    length = chunk_length(chunking, max_positions(net.config))
    chunks = cut_into_chunks(store, chunking, length, facts)
    chunk_ids = subset(evaluation.eval_mask_seed, len(chunks), evaluation.max_eval_samples)
    sparse = SparseMaskedLM(net).to(accelerator.device)
    found = evaluate(sparse, chunks, chunk_ids, make_recipe(masking, facts), facts, evaluation, accelerator)
    accelerator.print(
        f"perplexity {found.perplexity:.4g}, loss {found.loss:.4f} nats, accuracy {found.accuracy:.2%} "
        f"over {found.counts.sum():,} masked tokens in {len(chunk_ids):,} chunks of {length}"
    )
    return {**found.summary(), "chunks": len(chunk_ids), "chunk_size": length}


if __name__ == "__main__":
    cli.run(main)
