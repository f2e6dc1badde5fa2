"""A short training run, which fails unless perplexity falls: by how much, and at what speed.

Workload: with --imdb and --model_name_or_path one epoch of the checkpoint over 1,000 of the reviews, 5% of
them held out; else a BERT from scratch on the made-up text. Perplexity is that of the held-out part under
fixed masks, so that another run on the same machine gives the same figure. Peer: the model before training.
Ceiling: none is known.
"""

import json

import pytest
from transformers import BertConfig

from benchmarks.compare import keep, row
from mlm.config import Config
from mlm.train import train

DOCUMENTS, BATCH, LEARNING_RATE = 1000, 32, 5e-4
AT_LEAST = {"checkpoint": 1.15, "from scratch": 3.0}  # perplexity before over after, without markup


@pytest.mark.benchmark(group="one epoch of training")
def test_training_lowers_the_perplexity(benchmark, corpus, results, request, tmp_path):
    checkpoint = request.config.getoption("--model_name_or_path")
    if checkpoint is not None:
        kind, model = "checkpoint", {"model_name_or_path": checkpoint}
        length, epochs, rate = 128, 1, LEARNING_RATE
    else:  # a shape alone, in a folder beside the tokenizer
        shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
        BertConfig(**shape, initializer_range=0.1).save_pretrained(tmp_path / "shape")
        corpus.tokenizer.save_pretrained(tmp_path / "shape")
        folder = str(tmp_path / "shape")
        kind, model = "from scratch", {"config_name": folder, "tokenizer_name": folder}
        length, epochs, rate = 32, 6, 10 * LEARNING_RATE
    lines = [json.dumps({"text": text}) for text in corpus.texts[:DOCUMENTS]]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def run() -> dict:
        config = Config.of(
            **model,
            train_file=str(tmp_path / "train.jsonl"),
            token_store=str(tmp_path),
            max_seq_length=length,
            train_batch_size=BATCH,
            per_device_train_batch_size="auto",
            num_train_epochs=epochs,
            learning_rate=rate,
            output_dir=str(tmp_path / "run"),
        )
        return train(config).results

    trained = benchmark.pedantic(run)
    fall = trained["perplexity_before"] / trained["perplexity"]
    keep(
        benchmark,
        results,
        row(
            f"{epochs} epoch over {min(DOCUMENTS, len(corpus.texts)):,} of {corpus.name}, {kind}",
            "perplexity before",
            "peer",
            "× lower",
            [fall],
            AT_LEAST[kind],
            perplexity={"ours": trained["perplexity"], "theirs": trained["perplexity_before"]},
            tokens_per_second={"ours": trained["tokens_per_second"]},
        ),
    )
    assert fall >= AT_LEAST[kind]
