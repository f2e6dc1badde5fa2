"""Sentences of the held-out text with a word masked, and what a run's model writes there before and after."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from mlm.errors import UserError
from mlm.fill_mask import Filler, fill, load
from mlm.model import ModelConfig, SparseMaskedLM, load_model
from mlm.record import write_json
from mlm.sentences import MASK

EXAMPLES = 6
TOP_K = 5
FEW = 5  # occurrences with no gain that are added to a word's own
EDGE = 2  # words that have to stand on either side of a mask
Examples = list[dict[str, Any]]


def keep_examples(folder: Path, trust_remote_code: bool = False) -> str:
    """Writes <folder>/fill_mask.json, {"sentences": Examples}, where a run has ended and there is none yet.

    Returns why there is none, in one line, or nothing.
    """
    kept = folder / "fill_mask.json"
    if kept.exists() or not (folder / "comparison.json").exists():
        return ""
    try:
        examples = fill_before_and_after(folder, None, trust_remote_code)
    except UserError as error:  # the base may be gone, and a report is good without
        return f"{folder}: no examples of filled masks, as {error}\n"
    with suppress(OSError):  # a run that may only be read
        write_json(kept, {"sentences": examples})
    return ""


def fill_before_and_after(
    folder: Path, sentences: Sequence[str] | None, trust_remote_code: bool = False
) -> Examples:
    """What a run's model, and the one that it began from, write at the masks of sentences.

    folder: a run directory
    sentences: with masks in them; None: openings of held-out documents (`from_held_out`)

    Returns [sentence] of {"text", "truth": word or None, "before", "after"}, the last two [mask][rank] of
    {"token", "probability"}.

    Raises UserError where one of the models cannot be loaded, or a sentence has no mask.
    """
    adapted, tokenizer = load(str(folder), trust_remote_code)
    if sentences is None:
        chosen = from_held_out(folder, tokenizer)
    else:
        chosen = [(text.replace(tokenizer.mask_token or MASK, MASK), None) for text in sentences]
    if not chosen:
        return []
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))["configuration"]
    # Of a model from nothing the seed draws the very weights from which training began.
    config = ModelConfig(**{**about["model"], "trust_remote_code": trust_remote_code})
    base = SparseMaskedLM(load_model(config, tokenizer, about["loop"]["seed"]).to(adapted.model.device))
    texts = [text for text, _ in chosen]
    before, after = (fill(model, tokenizer, texts, TOP_K) for model in (base, adapted))
    return [
        {"text": text, "truth": truth, "before": _plain(was), "after": _plain(now)}
        for (text, truth), was, now in zip(chosen, before, after, strict=True)
    ]


def from_held_out(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[tuple[str, str]]:
    """Openings of held-out documents, in an order drawn by `seed`, each with a word of one token masked.

    Returns sentences and their words, each word and each document once: of the words whose summed gain is the
    largest, first those that gained most at an occurrence, so that "movie" comes before "the".
    """
    try:
        compared = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["held_out"]
        table = pq.read_table(folder / "documents.parquet", columns=["text", "opening"])
    except FileNotFoundError:
        return []
    openings = [row["opening"].split() for row in table.to_pylist() if row["text"] == "held_out"]
    openings = [openings[i] for i in np.random.default_rng(seed).permutation(len(openings))]
    found: list[tuple[str, str]] = []
    gained = (compared["words"] or compared["tokens"])["gained"]
    for word in (row["text"] for row in sorted(gained, key=_gain, reverse=True)):
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        opening = next((words for words in openings if word in words[EDGE:-EDGE]), None)
        if opening is None or len(ids) != 1 or not word.isalpha():
            continue
        openings.remove(opening)
        place = opening.index(word, EDGE)
        found.append((" ".join([*opening[:place], MASK, *opening[place + 1 :]]), word))
    return found[:EXAMPLES]


def _gain(row: dict[str, Any]) -> float:
    """Nats at an occurrence, a word of few being held back."""
    return ((row["nats_before"] or 0) - (row["nats_after"] or 0)) / (row["count"] + FEW)


def _plain(masks: list[list[Filler]]) -> list[list[dict[str, Any]]]:
    return [[filler._asdict() for filler in ranked] for ranked in masks]
