"""Near-duplicates of a few documents in a large text, by MinHash and locality-sensitive hashing.

Two documents are near-duplicates where LIKE or more of their shingles, runs of RUN words, are common to both: the
Jaccard similarity of the two sets, which MinHash estimates from HASHES hashes with a standard error of 0.035 (Broder
1997, On the resemblance and containment of documents). At LIKE the bands of the index miss one pair in twenty, at 0.9
one in ten thousand. In Chinese and Japanese each letter is a word. A document that another one merely quotes, amid
much else, resembles it too little to be found.

Memory is for the documents that are looked for; the large text passes by once.
"""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from mlm.data import corpus
from mlm.data.corpus import CorpusConfig
from mlm.data.task import Task
from mlm.data.token_store import TokenStore
from mlm.errors import UserError, one_line, printable
from mlm.figures import UNSPACED

LIKE, RUN, HASHES = 0.8, 5, 128
BANDS = (16, 8)  # 16 of 8 hashes: a pair of similarity s is a candidate with probability 1 - (1 - s ** 8) ** 16
MOST = 20_000  # held-out documents that are looked for, drawn by a fixed seed
SHOWN = 5  # rows of a task that are printed
WORD = re.compile(rf"{UNSPACED}|[^\W{UNSPACED[1:]}+")


def check_leaks(source: CorpusConfig, task: Task | None, stores: dict[str, TokenStore]) -> dict[str, Any]:
    """How many held-out documents, and texts of a task, stand in the training split, or nearly; printed.

    Raises UserError where there is no training split.
    """
    if "train" not in stores:
        raise UserError("--check_leaks: there is no training text to look in; give --train_file or --dataset_name")
    read = corpus.load(source)
    trained = [store for name, store in stores.items() if name != "validation"]  # the replay is trained on, too
    sought = {"held-out documents": few(read.splits["validation"])}
    held_out = len(sought["held-out documents"])
    if task:
        sought["texts of the task"] = [text for texts in task.texts for text in texts]
    documents = [text for texts in sought.values() for text in texts]
    stand = stand_in(documents, trained)
    near = near_duplicates(documents, read.splits["train"]) & ~stand
    counts = stores["validation"].header["leaks"], int(stand[held_out:].sum())
    figures = {}
    for what, equal, own in zip(sought, counts, np.split(near, [held_out]), strict=False):
        figures[what] = {"equal": equal, "looked_for": len(own), "near": int(own.sum())}
        near_ones = f"of {len(own):,} looked for, {own.sum():,} more have a near-duplicate there"
        print(f"{what}: {equal:,} stand in the training split; {near_ones}")
    if task:
        named = figures["texts of the task"]
        stands, resembles = (which[held_out:].reshape(len(task.texts), -1).any(axis=1) for which in (stand, near))
        named["rows"] = name_rows(task, stands, "stands in the training split")
        named["near_rows"] = name_rows(task, resembles, "has a near-duplicate there")
    return figures


def name_rows(task: Task, which: np.ndarray, what: str) -> list[int]:
    """The task's rows, counted from 0, of the texts chosen by `which`, [n] bool; the first ones are printed."""
    for i in np.flatnonzero(which)[:SHOWN]:
        print(f"  row {task.rows[i]}, counted from 0, {what}: {one_line(printable(' | '.join(task.texts[i])), 60)}")
    rows = np.unique(task.rows[which]).tolist()
    if which.sum() > SHOWN:
        print(f"  … {which.sum() - SHOWN:,} more; --json lists the rows")
    return rows


def stand_in(texts: Sequence[str], trained: Sequence[TokenStore]) -> np.ndarray:
    """Which texts stand in the training split or in replay, up to case and white space: [n] bool."""
    return Task("", [(text,) for text in texts], None).seen(*trained)


def few(documents: Iterable[str]) -> list[str]:
    """At most MOST documents, each as likely as any other (Vitter 1985, Random sampling with a reservoir)."""
    draw, kept = np.random.default_rng(0), []
    for number, document in enumerate(documents):
        if number < MOST:
            kept.append(document)
        elif (place := draw.integers(number + 1)) < MOST:
            kept[place] = document
    return kept


def shingles(text: str) -> list[bytes]:
    """The runs of RUN words, in lower case; of a shorter text all its words, of one without words itself."""
    words = WORD.findall(text.lower()) or [text]
    return [" ".join(words[i : i + RUN]).encode() for i in range(max(len(words) - RUN + 1, 1))]


def need_library() -> None:
    """Raises UserError where datasketch is not installed."""
    if not importlib.util.find_spec("datasketch"):
        raise UserError("--check_leaks needs a package that is not installed: pip install datasketch")


def near_duplicates(documents: Sequence[str], text: Iterable[str]) -> np.ndarray:
    """Of which documents the text has a near-duplicate: [n] bool."""
    from datasketch import MinHash, MinHashLSH

    def hashed(texts: Iterable[str]) -> Iterable[Any]:
        return MinHash.generator(map(shingles, texts), num_perm=HASHES, hashfunc=xxhash.xxh32_intdigest)

    sought = list(hashed(documents))
    index, found = MinHashLSH(num_perm=HASHES, params=BANDS), np.zeros(len(documents), bool)
    for number, own in enumerate(sought):
        index.insert(number, own)
    for other in hashed(tqdm(text, "looking for near-duplicates", unit=" documents", disable=None)):
        for number in index.query(other):
            found[number] |= other.jaccard(sought[number]) >= LIKE
    return found
