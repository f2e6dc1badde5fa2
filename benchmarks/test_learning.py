"""A short training run, which fails unless perplexity falls: by how much, and at what speed.

With --imdb and --model_name_or_path it is the checkpoint, on 1,000 of the reviews, 5% of them held out;
else a BERT from nothing on the made-up text. Perplexity is that of the held-out part under fixed masks, so
that another run on the same machine gives the same figure.
"""

import json

import pytest
from transformers import BertConfig

from benchmarks.compare import keep, row
from mlm.config import Config
from mlm.data.chunks import ChunkConfig
from mlm.data.corpus import CorpusConfig
from mlm.data.token_store import TokenStoreConfig
from mlm.model.load import ModelConfig
from mlm.report.run_directory import RunConfig
from mlm.train import train

DOCUMENTS, BATCH, LEARNING_RATE = 1000, 32, 5e-4
AT_LEAST = {"checkpoint": 1.6, "from nothing": 3.0}  # perplexity before over after


@pytest.mark.benchmark(group="one epoch of training")
def test_training_lowers_the_perplexity(benchmark, corpus, results, request, tmp_path):
    checkpoint = request.config.getoption("--model_name_or_path")
    if checkpoint is not None:
        kind, model = "checkpoint", ModelConfig(model_name_or_path=checkpoint)
        length, epochs, rate = 128, 1, LEARNING_RATE
    else:  # a shape alone, in a folder beside the tokenizer
        shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
        BertConfig(**shape, initializer_range=0.1).save_pretrained(tmp_path / "shape")
        corpus.tokenizer.save_pretrained(tmp_path / "shape")
        folder = str(tmp_path / "shape")
        kind, model = "from nothing", ModelConfig(config_name=folder, tokenizer_name=folder)
        length, epochs, rate = 32, 6, 10 * LEARNING_RATE
    lines = [json.dumps({"text": text}) for text in corpus.texts[:DOCUMENTS]]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def run() -> dict:
        config = Config(
            model=model,
            corpus=CorpusConfig(train_file=str(tmp_path / "train.jsonl")),
            token_store=TokenStoreConfig(token_store=str(tmp_path)),
            chunks=ChunkConfig(max_seq_length=length),
            loop=LoopConfig(
                train_batch_size=BATCH,
                per_device_train_batch_size="auto",
                num_train_epochs=epochs,
                learning_rate=rate,
            ),
            run=RunConfig(output_dir=str(tmp_path / "run")),
        )
        return train(config).results

    found = benchmark.pedantic(run)
    fall = found["perplexity_before"] / found["perplexity"]
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
            perplexity={"ours": found["perplexity"], "theirs": found["perplexity_before"]},
            tokens_per_second={"ours": found["tokens_per_second"]},
        ),
    )
    assert fall >= AT_LEAST[kind]
