"""The Hugging Face course's recipe for adapting a masked language model, as a slow and obvious oracle.

The recipe is the Accelerate half of https://huggingface.co/learn/llm-course/chapter7/3. The tokenizer adds
its special tokens to each document. Documents are joined by adding Python lists, 1,000 at a time, and cut
into chunks; what is left at the end of each 1,000 is dropped. Transformers' collator masks training batches
as they come, and the evaluation set once and for all. Torch's AdamW decays every parameter by its default;
the learning rate falls linearly to 0, without warm-up; gradients are not clipped.

It is slow on purpose: list arithmetic instead of arrays, every column (word ids too) carried through Arrow,
masks drawn in the collator, the vocabulary projected at all positions though 15% carry loss. Nothing is
fused, cached between runs or shared with the project, so that it measures what a reader of the course gets.
All arithmetic is fp32, in one process.

    python benchmarks/course_recipe.py --model_name_or_path distilbert/distilbert-base-uncased \
        --train_file train.parquet --validation_file validation.parquet

The last line of standard output is one JSON object; `seconds` has the wall time of each phase, summed over
epochs where a phase comes once an epoch.
"""

import argparse
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import accelerate
import datasets
import torch
import transformers
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    get_scheduler,
)

Columns = dict[str, list]  # a batch of a dataset: column name -> one entry a row


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The course's masked-language-model recipe, measured.")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True, help="parquet")
    parser.add_argument("--validation_file", required=True, help="parquet")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_seq_length", type=int, default=128, help="tokens in a chunk")
    parser.add_argument("--batch_size", type=int, default=32, help="chunks, in training and in evaluation")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--num_train_epochs", type=int, default=1)
    parser.add_argument("--max_train_samples", type=int, help="chunks, drawn by the seed; all by default")
    parser.add_argument("--max_eval_samples", type=int, help="chunks, drawn by the seed; all by default")
    parser.add_argument("--mlm_probability", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dropout", type=float, help="of every kind; the checkpoint's own by default")
    parser.add_argument("--output_dir", help="where to save the adapted model; nowhere by default")
    return parser.parse_args()


def tokenize(
    documents: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, text_column: str
) -> datasets.DatasetDict:
    """One row a document, untruncated, special tokens around it and the word of each token beside it."""

    def tokenize_batch(batch: Columns) -> Columns:
        encoded = tokenizer(batch[text_column])
        words = [encoded.word_ids(row) for row in range(len(encoded["input_ids"]))]
        return {**encoded, "word_ids": words}

    return documents.map(
        tokenize_batch, batched=True, remove_columns=documents["train"].column_names, desc="tokenising"
    )


def chunk(documents: datasets.DatasetDict, length: int) -> datasets.DatasetDict:
    """One row a chunk of exactly `length` tokens (the course's `group_texts`).

    The end of every 1,000 documents is dropped: up to `length - 1` tokens each time.
    """

    return documents.map(lambda batch: chunk_batch(batch, length), batched=True, batch_size=1000, desc="chunking")


def chunk_batch(batch: Columns, length: int) -> Columns:
    """The documents of a batch joined and cut, column by column; the chunks are their own labels."""
    chunks: Columns = {}
    for name, rows in batch.items():
        # Each addition copies all that came before: quadratic in a batch, as in the course.
        joined = sum(rows, [])  # noqa: RUF017
        kept = len(joined) // length * length
        chunks[name] = [joined[start : start + length] for start in range(0, kept, length)]
    return {**chunks, "labels": chunks["input_ids"]}


def sample(chunks: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """`count` chunks drawn without replacement; all of them, in order, where it is None or not fewer."""
    if count is None or count >= len(chunks):
        return chunks
    return chunks.shuffle(seed=seed).select(range(count))


def mask_once(chunks: datasets.Dataset, collator: DataCollatorForLanguageModeling) -> datasets.Dataset:
    """The chunks with one draw of masks in `input_ids` and `labels` (the course's `insert_random_mask`).

    All evaluations see these masks, so that their perplexities differ by the model alone.
    """

    def mask_batch(batch: Columns) -> Columns:
        rows = [{name: batch[name][row] for name in batch} for row in range(len(batch["input_ids"]))]
        return {name: tensor.numpy() for name, tensor in collator(rows).items()}  # [rows, length] each

    return chunks.map(mask_batch, batched=True, desc="masking the evaluation set")


def load_model(name_or_path: str, dropout: float | None) -> PreTrainedModel:
    """The checkpoint in fp32; `dropout` replaces every dropout rate of its configuration."""
    config = AutoConfig.from_pretrained(name_or_path)
    if dropout is not None:
        for name, value in config.to_dict().items():
            if "dropout" in name and type(value) in (int, float):  # a bool is a switch, None inherits
                setattr(config, name, dropout)
    return AutoModelForMaskedLM.from_pretrained(name_or_path, config=config, dtype=torch.float32)


@torch.no_grad()
def evaluate(
    accelerator: accelerate.Accelerator, model: PreTrainedModel, batches: DataLoader, batch_size: int
) -> float:
    """Perplexity by the course's mean: each chunk counts as its batch's loss, however many tokens are masked.

    A last batch of fewer chunks is repeated `batch_size` times too, and the surplus is cut off.
    """
    model.eval()
    losses = [accelerator.gather(model(**batch).loss.repeat(batch_size)) for batch in batches]
    return math.exp(torch.cat(losses)[: len(batches.dataset)].mean().item())


class Phases:
    """The wall time of each phase, in seconds, summed where a phase comes again."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Prepared(NamedTuple):
    """What training begins with."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    train_chunks: datasets.Dataset
    eval_chunks: datasets.Dataset  # masked once and for all


def prepare(args: argparse.Namespace, phase: Phases) -> Prepared:
    """From files to chunks, in phases."""
    with phase("loading"):
        files = {"train": args.train_file, "validation": args.validation_file}
        documents = datasets.load_dataset("parquet", data_files=files, columns=[args.text_column])
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = load_model(args.model_name_or_path, args.dropout)
    with phase("tokenising"):
        tokenized = tokenize(documents, tokenizer, args.text_column)
    with phase("chunking"):
        chunks = chunk(tokenized, args.max_seq_length).remove_columns("word_ids")
        train_chunks = sample(chunks["train"], args.max_train_samples, args.seed)
        eval_chunks = sample(chunks["validation"], args.max_eval_samples, args.seed)
    with phase("evaluation_masking"):
        fixed = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability, seed=args.seed)
        eval_chunks = mask_once(eval_chunks, fixed)
    return Prepared(tokenizer, model, train_chunks, eval_chunks)


def adapt(
    args: argparse.Namespace, accelerator: accelerate.Accelerator, prepared: Prepared, phase: Phases
) -> dict[str, Any]:
    """The course's loop, and its perplexities and losses; the model is saved where that is asked for."""
    train_batches = DataLoader(
        prepared.train_chunks,
        shuffle=True,
        batch_size=args.batch_size,
        collate_fn=DataCollatorForLanguageModeling(prepared.tokenizer, mlm_probability=args.mlm_probability),
    )
    eval_batches = DataLoader(prepared.eval_chunks, batch_size=args.batch_size, collate_fn=default_data_collator)
    optimizer = torch.optim.AdamW(prepared.model.parameters(), lr=args.learning_rate)
    model, optimizer, train_batches, eval_batches = accelerator.prepare(
        prepared.model, optimizer, train_batches, eval_batches
    )
    steps = args.num_train_epochs * len(train_batches)
    lr_scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)

    with phase("evaluation_before"):
        perplexity_before = evaluate(accelerator, model, eval_batches, args.batch_size)
    print(f"perplexity before training: {perplexity_before:.2f}")

    losses: list[float] = []
    progress = tqdm(total=steps, desc="training")
    for epoch in range(args.num_train_epochs):
        with phase("training"):
            model.train()
            for batch in train_batches:
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.item())  # waits for the device, so that the phase's time is all of it
                progress.update()
        with phase("evaluation_after"):
            perplexity = evaluate(accelerator, model, eval_batches, args.batch_size)
        print(f"perplexity after epoch {epoch + 1}: {perplexity:.2f}")
    progress.close()
    if args.output_dir:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        prepared.tokenizer.save_pretrained(args.output_dir)
    return {
        "perplexity_before": perplexity_before,
        "perplexity": perplexity,
        "train_loss": sum(losses) / len(losses),
        "steps": steps,
    }


def main() -> None:
    args = parse_arguments()
    transformers.set_seed(args.seed)  # draws the order, the training masks and dropout
    datasets.disable_caching()  # a second run must measure the work, not the cache
    accelerator = accelerate.Accelerator(mixed_precision="no")
    phase = Phases()
    prepared = prepare(args, phase)
    figures = adapt(args, accelerator, prepared, phase)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    train_tokens = args.num_train_epochs * len(prepared.train_chunks) * args.max_seq_length
    result = {
        **figures,
        "seconds": {name: round(value, 3) for name, value in phase.seconds.items()},
        "train_tokens_per_second": round(train_tokens / phase.seconds["training"], 1),
        "peak_memory_mib": round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1),
        "chunks": len(prepared.train_chunks),
        "eval_chunks": len(prepared.eval_chunks),
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, accelerate, datasets)},
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
