"""Builds the token store of a corpus, says what is in it, and shows some of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm.startup import quick_imports

with quick_imports():
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from mlm import cli
    from mlm.data.batches import mask_chunks
    from mlm.data.chunks import ChunkConfig, Chunks, chunk_length, cut_into_chunks
    from mlm.data.corpus import CorpusConfig
    from mlm.data.masking import MaskingConfig, make_recipe
    from mlm.data.token_store import TokenStore, TokenStoreConfig, prepare
    from mlm.data.tokenizer import TokenizerInfo, tokenizer_info
    from mlm.errors import at_least
    from mlm.model.load import ModelConfig, open_tokenizer, position_limit
    from mlm.train import select


@dataclass(frozen=True)
class ShowConfig:
    show: int = 0  # random documents and chunks of each split to print, with their masks
    seed: int = 42  # names the order in which they are drawn, and the masks

    def __post_init__(self) -> None:
        at_least(self, 0, "show", "seed")


ROOMS = (ModelConfig, CorpusConfig, TokenStoreConfig, ChunkConfig, MaskingConfig, ShowConfig)


def main(argv: Sequence[str]) -> dict[str, Any]:
    model, corpus, store_config, chunking, masking, look, _ = cli.parse(ROOMS, argv, cli.command(__doc__))
    tokenizer = open_tokenizer(model, corpus, store_config)
    info = tokenizer_info(tokenizer)
    stores = prepare(corpus, tokenizer, info, store_config, masking.whole_word_mask)
    length = chunk_length(chunking, position_limit(model))
    summary = {}
    for split, store in stores.items():
        chunks = cut_into_chunks(store, chunking, length, info)
        summary[split] = describe(store, chunks)
        print(split)
        for name, value in summary[split].items():
            print(f"  {name.replace('_', ' '):<22} {'unknown' if value is None else format(value, ',')}")
        draw = np.random.default_rng(look.seed)
        for number in draw.choice(
            store.header["documents"], min(look.show, store.header["documents"]), replace=False
        ):
            start, end = store.document_offsets[number : number + 2]
            print(
                f"\n{split} document {number}:",
                tokenizer.decode(store.ids[start:end], skip_special_tokens=True),
            )
        for number in draw.choice(len(chunks), min(look.show, len(chunks)), replace=False):
            print(
                f"\n{split} chunk {number}: {show_chunk(number, chunks, tokenizer, info, masking, look.seed)}"
            )
    if look.show:
        print("\nto be predicted: ‹word› became the mask token, ‹word→other› another token, ‹word=› stays")
    return {"token_store": str(Path(next(iter(stores.values())).ids.filename).parents[1]), **summary}


def describe(store: TokenStore, chunks: Chunks) -> dict[str, Any]:
    """The counts that a person looks at before training."""
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
        "seconds": round(header["seconds"], 2),
        "tokens_per_second": round(header["tokens"] / max(header["seconds"], 1e-9)),
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
        lambda maskable, draws, starts: select(
            maskable, draws, masking.mlm_probability, starts, masking.whole_word_mask
        ),
    )
    ids, seen_ids, starts = rows.ids[0], seen.input_ids[0].tolist(), rows.word_starts[0].copy()
    predicted = set(seen.positions.tolist())
    starts[0] = True

    def show(place: int) -> str:
        text = tokenizer.decode([ids[place]]).strip().removeprefix("##")
        if place not in predicted:
            return text
        if seen_ids[place] == info.mask_id:
            return f"‹{text}›"
        if seen_ids[place] == ids[place]:
            return f"‹{text}=›"
        return f"‹{text}→{tokenizer.decode([seen_ids[place]]).strip()}›"

    words = np.split(np.arange(len(ids)), np.flatnonzero(starts)[1:])
    return " ".join("".join(map(show, word.tolist())) for word in words)


if __name__ == "__main__":
    cli.run(main)
