"""Sentences of the held-out text with a word masked, and what a run's model writes there before and after."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from mlm.errors import UserError, printable
from mlm.figures import unspaced
from mlm.files import write_json
from mlm.inference.fill_mask import MASK, fill, load, own_mask
from mlm.model.load import ModelConfig, load_model
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.run_record import Rows, RunRecord, files_of

EXAMPLES = 6
TOP_K = 5
FEW = 5  # occurrences with no gain that are added to a word's own
EDGE = 2  # words that have to stand on either side of a mask
LETTERS = 3  # of a word, at least, in a script that has capitals; elsewhere one can be a word

# Blanks that a decoder leaves where it does not know how a text was spaced.
BLANKS = re.compile(r" +(?=[.,!?;:)}])|(?<=[({]) +")
APOSTROPHE = re.compile(r"(?<=[\w\]]) ' (?=(?:s|t|m|d|re|ve|ll)\b)", re.IGNORECASE)


def with_examples(
    run: RunRecord, sentences: Sequence[str] | None, trust_remote_code: bool = False
) -> tuple[RunRecord, str]:
    """A run with what its model, and the one that it began from, write at the masks of sentences.

    sentences: with masks in them; None: openings of held-out documents of a run that has ended, kept in fill_mask.json

    Returns the run, and in a line why it has no examples. Raises UserError where a sentence has no mask or no room."""
    if sentences is None and (run.examples is not None or not run.comparison.get("held_out")):
        return run, ""
    try:
        with files_of(run.folder):
            adapted, tokenizer = load(str(run.folder), trust_remote_code)
            about = run.about["configuration"]
            config = ModelConfig(**{**about["model"], "trust_remote_code": trust_remote_code})
            # The seed draws the very weights from which the training of a model from scratch began.
            base = SparseMaskedLM(load_model(config, tokenizer, about["train"]["seed"]).to(adapted.model.device))
            chosen = from_held_out(run, tokenizer) if sentences is None else []
        if sentences is None:
            examples = _fill((base, adapted), tokenizer, chosen)
            with suppress(OSError):  # a run that may only be read
                write_json(run.folder / "fill_mask.json", {"results": run.results, "sentences": examples})
    except UserError as error:  # the base may be gone, and a report is good without
        return run, f"{printable(str(run.folder))}: no examples of filled masks, as {error}\n"
    if sentences is not None:
        given = [(text.replace(tokenizer.mask_token or MASK, MASK), None) for text in sentences]
        examples = _fill((base, adapted), tokenizer, given)
    return replace(run, examples=examples), ""


def _fill(
    models: Sequence[SparseMaskedLM], tokenizer: PreTrainedTokenizerBase, chosen: Sequence[tuple[str, str | None]]
) -> Rows:
    """What both models write at the masks of sentences, each of which comes with the masked word or None. Returns
    [sentence] of {"text", "truth": word or None, "before", "after"}, the last two [mask][rank] of {"token",
    "probability"}. Raises UserError where a sentence has no mask, or is too long."""
    rows = [{"text": text, "truth": truth} for text, truth in chosen]
    for when, model in zip(("before", "after"), models, strict=True):
        for row, masks in zip(rows, fill(model, tokenizer, [text for text, _ in chosen], TOP_K), strict=True):
            row[when] = [[filler._asdict() for filler in ranked] for ranked in masks]
    return rows


def from_held_out(run: RunRecord, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[tuple[str, str]]:
    """Openings of held-out documents, in an order drawn by `seed`, each with a word of one token masked.

    Returns sentences and their words, each word and each document once: of the words whose summed gain is the largest,
    first those that gained most at an occurrence, so "movie" before "the"."""
    compared = run.comparison["held_out"]
    table = pq.read_table(run.folder / "documents.parquet", columns=["text", "opening"])
    openings = [row["opening"].split() for row in table.to_pylist() if row["text"] == "held_out"]
    np.random.default_rng(seed).shuffle(openings)
    drawn: list[tuple[str, str]] = []
    gained = (compared["words"] or compared["tokens"])["gained"]
    # by nats at an occurrence, a word of few being held back
    ordered = sorted(gained, key=lambda r: ((r["nats_after"] or 0) - (r["nats_before"] or 0)) / (r["count"] + FEW))
    for word in (row["text"] for row in ordered):
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        opening = next((words for words in openings if word in words[EDGE:-EDGE]), None)
        is_word = word.isalpha() and (len(word) >= LETTERS or word.upper() == word.lower())
        if opening is None or len(ids) != 1 or not is_word:
            continue
        openings.remove(opening)
        place = opening.index(word, EDGE)
        drawn.append((readable(" ".join([*opening[:place], MASK, *opening[place + 1 :]]), tokenizer), word))
    return drawn[:EXAMPLES]


def readable(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A decoded text without the blanks that no one writes, where a model sees the same tokens."""
    closed = APOSTROPHE.sub("'", BLANKS.sub("", unspaced(text)))
    one, other = (tokenizer(own_mask(tokenizer, t), verbose=False)["input_ids"] for t in (text, closed))
    return closed if one == other else text
