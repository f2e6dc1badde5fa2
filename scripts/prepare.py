"""Builds the token stores of a corpus and its replay, prints what is in them, and shows some of it.

With the flags of a run, it says how many epochs of each source that run sees.
Several that run at once, on machines that share --token_store, share the work.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from startup import quick_imports

with quick_imports():
    import numpy as np
    from near_duplicates import check_leaks, need_library
    from outlook import outlook
    from transformers import PreTrainedTokenizerBase

    from mlm import cli
    from mlm.config import Config
    from mlm.data.batches import mask_chunks
    from mlm.data.chunks import Chunks, chunk_length, cut_into_chunks
    from mlm.data.masking import MaskingConfig, make_recipe
    from mlm.data.task import read_task
    from mlm.data.token_store import TokenStore
    from mlm.data.tokenizer import TokenizerInfo, readable
    from mlm.engine.device import make_accelerator
    from mlm.errors import at_least, printable
    from mlm.model.load import open_corpus, position_limit
    from mlm.train import make_batches, select


# A tag without attributes, also as a tokenizer spells it after decoding: < br / >
TAG = re.compile(r"<\s*/?\s*[a-z][a-z0-9]*\s*/?\s*>", re.IGNORECASE)
SAMPLE, OPENING = 1000, 2000  # documents that are searched for tags, and tokens of each
MUCH = 0.005  # share of the tokens that makes tags worth a line: on film reviews with 5% they were 64% of a gain


@dataclass(frozen=True)
class ShowConfig:
    """How much of the text is shown."""

    show: int = 0  # Print this many random documents and chunks of each split, drawn by --seed, with their masks.
    check_leaks: bool = False  # Look for near-duplicates of held-out documents, and of a task's, in the training text.

    def __post_init__(self) -> None:
        at_least(self, 0, "show")
        if self.check_leaks:
            need_library()


@dataclass(frozen=True)
class PrepareConfig(Config):
    """A run, and what of its text is shown before it."""

    show: ShowConfig = field(default_factory=ShowConfig)


def main(argv: Sequence[str]) -> dict[str, Any]:
    config = cli.parse_config(PrepareConfig, argv, __doc__)
    show, accelerator = config.show, make_accelerator("no")  # also where stores are built for GPUs elsewhere
    task = read_task(config.task, config.corpus)
    chunking, masking, seed = config.chunks, config.masking, config.train.seed % 2**64
    tokenizer, info, stores = open_corpus(config)
    length = chunk_length(chunking, position_limit(config.model))
    epochs = {}
    if "train" in stores:
        batches, steps = make_batches(config, info, stores, length, accelerator)
        epochs = batches.epochs(steps)
        epochs["train"] = epochs.pop("domain")
        print(f"A run of one process with these flags takes {steps:,} steps of {batches.global_batch:,} chunks.")
    summary = {}
    for split, store in stores.items():
        chunks = cut_into_chunks(store, chunking, length, info)
        documents, tokens = html_shares(store, tokenizer, seed)
        summary[split] = {**describe(store, chunks), "html_token_share": round(tokens, 6)}
        if split in epochs:
            summary[split]["epochs"] = round(float(epochs[split]), 3)
        print(split)
        for name, value in summary[split].items():
            print(f"  {name.replace('_', ' '):<22} {'unknown' if value is None else format(value, ',')}")
        if tokens > MUCH:
            print(
                f"  HTML tags are {tokens:.1%} of the tokens, in {documents:.0%} of the documents: much of a "
                "gain may come from them alone; --strip_html leaves them out"
            )
        draw = np.random.default_rng(seed)
        number_of = store.header["documents"]
        for number in draw.choice(number_of, min(show.show, number_of), replace=False):
            start, end = store.document_offsets[number : number + 2]
            print(f"\n{split} document {number}: {printable(readable(tokenizer, store.ids[start:end]))}")
        for number in draw.choice(len(chunks), min(show.show, len(chunks)), replace=False):
            masked = show_chunk(number, chunks, tokenizer, info, masking, seed)
            print(f"\n{split} chunk {number}: {masked}")
    if show.show:
        print("\nto be predicted: ‹word› became the mask token, ‹word→other› another token, ‹word=› stays")
    if show.check_leaks:
        summary["leaks"] = check_leaks(config.corpus, task, stores)
    summary["outlook"] = outlook(config, tokenizer, info, stores, length, accelerator)
    return {"token_store": str(Path(next(iter(stores.values())).ids.filename).parents[1]), **summary}


def html_shares(store: TokenStore, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[float, float]:
    """The shares of documents with HTML tags, and of tokens in tags, in the openings of SAMPLE documents."""
    total, in_tags, tagged = 0, 0, 0
    documents = store.header["documents"]
    sample = np.random.default_rng(seed).choice(documents, min(documents, SAMPLE), replace=False)
    for start, end in zip(store.document_offsets[sample], store.document_offsets[sample + 1], strict=True):
        ids = store.ids[start : min(end, start + OPENING)]
        tags = TAG.findall(tokenizer.decode(ids, skip_special_tokens=True))
        total += len(ids)
        in_tags += sum(len(tokenizer.tokenize(tag)) for tag in tags)
        tagged += bool(tags)
    return tagged / len(sample), in_tags / total


def describe(store: TokenStore, chunks: Chunks) -> dict[str, Any]:
    """What is worth a look before training, by name."""
    header = store.header
    return {
        "documents": header["documents"],
        "empty_documents": header["empty_documents"],
        "tokens": header["tokens"],
        "words": header["words"],
        "tokens_per_word": round(store.mean_word, 3) if header["words"] else None,
        "unknown_token_share": round(header["unknown_tokens"] / max(header["tokens"], 1), 6),
        "chunk_size": chunks.chunk_size,
        "chunks": len(chunks),
        "process_seconds": round(header["seconds"], 2),
        "tokens_per_process_second": round(header["tokens"] / max(header["seconds"], 1e-9)),
    }


def show_chunk(
    number: int,
    chunks: Chunks,
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    masking: MaskingConfig,
    seed: int,
) -> str:
    """A chunk as epoch 0 masks it, a word at a time, its pieces together."""
    chunk_ids = np.array([number])
    rows = chunks.take(chunk_ids)
    recipe = make_recipe(info, masking.mask_replace_prob, masking.random_replace_prob)
    seen = mask_chunks(
        chunks,
        chunk_ids,
        np.zeros(1, np.int64),
        seed,
        info.maskable,
        recipe,
        lambda maskable, draws, starts: select(maskable, draws, masking.mlm_probability, starts, masking),
    )
    ids, seen_ids, starts = rows.ids[0], seen.input_ids[0].tolist(), rows.word_starts[0].copy()
    predicted = set(seen.positions.tolist())
    starts[0] = True

    def spelt(place: int) -> str:
        text = printable(tokenizer.decode([ids[place]])).strip().removeprefix("##")
        if place not in predicted:
            return text
        if seen_ids[place] == info.mask_id:
            return f"‹{text}›"
        if seen_ids[place] == ids[place]:
            return f"‹{text}=›"
        return f"‹{text}→{printable(tokenizer.decode([seen_ids[place]])).strip()}›"

    words = np.split(np.arange(len(ids)), np.flatnonzero(starts)[1:])
    return " ".join("".join(map(spelt, word.tolist())) for word in words)


if __name__ == "__main__":
    cli.run(main)
