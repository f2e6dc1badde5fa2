"""Sentences of the held-out text with a word masked, and what a run's model writes there before and after."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from mlm.errors import UserError
from mlm.fill_mask import MASK, fill, load
from mlm.model import ModelConfig, SparseMaskedLM, load_model

EXAMPLES = 6
TOP_K = 5
EDGE = 2  # words that have to stand on either side of a mask


def fill_before_and_after(
    folder: Path, sentences: Sequence[str] | None, trust_remote_code: bool = False
) -> dict[str, Any] | None:
    """What fill_mask.json holds: {"sentences": [{"text", "truth", "before", "after"}]}, before and after as
    [mask][rank] of {"token", "probability"}.

    folder: a run directory
    sentences: with masks in them; None: openings of held-out documents, each with one of the words masked
        that gained most

    None where nothing is to be filled: no sentences, and the run compared nothing.

    Raises UserError where the run's model or its base cannot be loaded, or a sentence has no mask.
    """
    adapted, tokenizer = load(str(folder), trust_remote_code)
    chosen = [(text, None) for text in sentences] if sentences else from_held_out(folder, tokenizer)
    if not chosen:
        return None
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))["configuration"]
    # Of a model from nothing the seed draws the very weights from which training began.
    config = ModelConfig(**{**about["model"], "trust_remote_code": trust_remote_code})
    base = SparseMaskedLM(load_model(config, tokenizer, about["loop"]["seed"]).to(adapted.model.device))
    texts = [text for text, _ in chosen]
    before, after = ([_plain(a) for a in fill(m, tokenizer, texts, TOP_K)] for m in (base, adapted))
    rows = zip(chosen, before, after, strict=True)
    return {
        "sentences": [
            {"text": text, "truth": truth, "before": was, "after": now} for (text, truth), was, now in rows
        ]
    }


def from_held_out(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[tuple[str, str]]:
    """Openings of held-out documents, drawn by `seed`, each with a word of one token masked, and the word:
    those that gained most first, each word and each document once."""
    try:
        compared = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["held_out"]
        table = pq.read_table(folder / "documents.parquet", columns=["text", "opening"])
    except FileNotFoundError:
        return []
    openings = [row["opening"].split() for row in table.to_pylist() if row["text"] == "held_out"]
    openings = [openings[i] for i in np.random.default_rng(seed).permutation(len(openings))]
    found = []
    for word in (row["text"] for row in (compared["words"] or compared["tokens"])["gained"]):
        if not word.isalpha() or len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) != 1:
            continue
        for words in openings:
            if word in words[EDGE:-EDGE]:
                place = words.index(word, EDGE)
                found.append((" ".join([*words[:place], MASK, *words[place + 1 :]]), word))
                openings.remove(words)
                break
        if len(found) == EXAMPLES:
            break
    return found


def _plain(masks: list[list[Any]]) -> list[list[dict[str, Any]]]:
    return [[filler._asdict() for filler in ranked] for ranked in masks]


def read_sentences(path: str) -> list[str]:
    """The lines of a file that are not blank. Raises UserError where it cannot be read or has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sentences {path}: cannot be read ({error})") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"--sentences {path}: no sentence in it")
    return [line for line in lines if line.strip()]
