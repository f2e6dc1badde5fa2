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
from mlm.pseudo_perplexity import PseudoPerplexityConfig, measure
from mlm.record import finite
from mlm.stream import StreamConfig
from mlm.texts import open_corpus
from mlm.train import Config


@dataclass(frozen=True)
class CheckpointToMeasure:
    """The part of ModelConfig that measuring needs, and the precision."""

    model_name_or_path: str | None = None  # masked-LM checkpoint, a Hub name or a folder
    tokenizer_name: str | None = None  # tokenizer, where it differs from the model's
    trust_remote_code: bool = False  # run the Python code that a checkpoint brings along
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # default: as accelerate is configured


ROOMS = (
    CheckpointToMeasure,
    CorpusConfig,
    StreamConfig,
    ChunkConfig,
    MaskingConfig,
    EvaluateConfig,
    PseudoPerplexityConfig,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
    what, corpus, stream, chunking, masking, evaluation, pseudo, _ = cli.parse(
        ROOMS, argv, cli.command(__doc__)
    )
    if not what.model_name_or_path:
        raise UserError("nothing to measure; give --model_name_or_path")
    model = ModelConfig(
        model_name_or_path=what.model_name_or_path,
        tokenizer_name=what.tokenizer_name,
        trust_remote_code=what.trust_remote_code,
    )
    accelerator = make_accelerator(what.mixed_precision)
    if pseudo.pseudo_perplexity:
        return measure(pseudo.pseudo_perplexity, model, evaluation.per_device_eval_batch_size, accelerator)
    config = Config(model=model, corpus=corpus, stream=stream, masking=masking)
    tokenizer, facts, stores = open_corpus(config, accelerator)
    check_embeddings(model, tokenizer)
    store = stores["validation"]
    net = load_model(model, tokenizer, seed=0)
    length = chunk_length(chunking, max_positions(net.config))
    chunks = cut_into_chunks(store, chunking, length, facts)
    chunk_ids = subset(evaluation.eval_mask_seed, len(chunks), evaluation.max_eval_samples)
    sparse = SparseMaskedLM(net).to(accelerator.device)
    found = evaluate(sparse, chunks, chunk_ids, make_recipe(masking, facts), facts, evaluation, accelerator)
    accelerator.print(
        f"perplexity {found.perplexity:.4g}, loss {found.loss:.4f} nats, accuracy {found.accuracy:.2%} "
        f"over {found.counts.sum():,} masked tokens in {len(chunk_ids):,} chunks of {length} "
        f"of {corpus.validation_file or corpus.dataset_name or corpus.train_file or 'the built-in corpus'}"
    )
    accelerator.end_training()
    return {**finite(found.summary()), "chunks": len(chunk_ids), "chunk_size": length}


if __name__ == "__main__":
    cli.run(main)
