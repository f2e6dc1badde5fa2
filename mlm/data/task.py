"""Labelled documents, or pairs: a task that may profit from the adaptation. train.py trains on no label."""

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mlm.data import corpus
from mlm.data.corpus import CorpusConfig
from mlm.data.token_store import TokenStore
from mlm.errors import UserError, in_words_of, one_line, printable

log = logging.getLogger(__name__)
FEWEST, MOST = 10, 5000  # documents of a class, two a fold of probe.py, or queries; rows, drawn by a fixed seed


@dataclass(frozen=True)
class TaskConfig:
    """A task, labelled documents, that shows what the adaptation is worth; train.py trains on no label."""

    task_file: str | None = None  # Probe with the labelled documents of this file, in the formats of --train_file.
    task_dataset_name: str | None = None  # Or of this dataset or folder: its train split, else its validation split.
    task_dataset_config_name: str | None = None  # Choose this configuration of it.
    task_kind: Literal["classification", "retrieval"] = "classification"  # Classes, or which document a query finds.
    task_text_column: str | None = None  # This column holds their text, or the queries (default: --text_column).
    task_pair_column: str | None = None  # This one the second text of pairs that have classes, or queries' documents.
    task_label_column: str = "label"  # This column holds their classes.

    @property
    def given(self) -> str | None:
        return self.task_file or self.task_dataset_name

    def __post_init__(self) -> None:
        if self.task_file and self.task_dataset_name:
            raise UserError("--task_file and --task_dataset_name: give one of the two")
        if self.given and self.task_kind == "retrieval" and not self.task_pair_column:
            raise UserError("--task_kind retrieval: name the column of the documents with --task_pair_column")


class Task(NamedTuple):
    name: str  # the file or data set
    texts: list[tuple[str, ...]]  # of n documents, or n pairs of them; of retrieval the queries, then the documents
    labels: np.ndarray | None  # [n] int64, classes by number, FEWEST or more of each; None: a task of retrieval
    pairs: np.ndarray | None = None  # [m, 2] int64, of retrieval: a query and a document to find, as in texts
    rows: np.ndarray = np.arange(0)  # [n] int64, where in the file each stands, counted from 0
    of: tuple[int, int] = 0, 0  # how many rows have text and a label, and how many of them are taken, MOST at most

    def seen(self, *trained: TokenStore) -> np.ndarray:
        """Which have a text that stands in any of these, up to case and white space: [n] bool. Reads a few pages."""
        own = np.array([[*map(corpus.text_hash, texts)] for texts in self.texts], np.uint64)  # [n, 1], or [n, 2]
        known = [(store.text_hashes, np.searchsorted(store.text_hashes, own)) for store in trained]
        return np.any([hashes[np.minimum(place, len(hashes) - 1)] == own for hashes, place in known], axis=(0, 2))


def read_task(config: TaskConfig, domain: CorpusConfig) -> Task | None:
    """The documents that have text and a label, cleaned as the domain's are; None where no task is given. Raises
    UserError where they cannot be read, or there are no classes of FEWEST documents or more, or fewer queries."""
    if not (name := config.given):
        return None
    column, label = config.task_text_column or domain.text_column, config.task_label_column
    pair = (config.task_pair_column,) if config.task_pair_column else ()
    classes = config.task_kind == "classification"
    also = (label, *pair) if classes else pair
    if column in also or "text" in also:
        raise UserError(f"{name}: the text has a column of its own, and no other may be called text; rename the other")
    with in_words_of("task"):
        where = config.task_dataset_name, config.task_dataset_config_name, config.task_file
        splits = corpus.read(CorpusConfig(*where, text_column=column), also)
    [rows] = splits.get("train", splits.get("validation"))
    if lacks := [c for c in also if c not in rows.column_names]:
        raise UserError(f"{name} has no column {lacks[0]!r}: name it with --task_label_column or --task_pair_column")
    kinds = {c: getattr(rows.features[c], "dtype", "lists or objects") for c in also}
    if pair and "string" not in kinds[pair[0]]:
        raise UserError(f"{name}: column {pair[0]!r} holds {kinds[pair[0]]}, no text: choose with --task_pair_column")
    if classes and kinds[label].startswith(("float", "decimal", "lists")):
        needed = "a probe needs one class, a text or whole number, each"
        raise UserError(f"{name}: column {label!r} holds {kinds[label]}; {needed}")
    table = rows.with_format("arrow")[:]
    labels = table[label].to_pylist() if classes else [""] * len(rows)
    texts = list(zip(*(table[c].to_pylist() for c in ("text", *pair)), strict=True))
    kept = [i for i, own in enumerate(texts) if labels[i] is not None and all(t and t.strip() for t in own)]
    if len(kept) < len(rows):  # in a .csv file NA, NaN, null and None are gaps, as pandas has it
        log.warning("%s: %d of its %d rows lack a text or a label", printable(name), len(rows) - len(kept), len(rows))
    of = len(kept), min(len(kept), MOST)
    kept = np.sort(np.random.default_rng(0).permutation(kept)[:MOST]).astype(int)
    if of[0] > MOST:
        log.warning("%s: of its %d rows %d are taken, drawn by a fixed seed", printable(name), *of)
    texts = [tuple(map(corpus.strip_html if domain.strip_html else str, texts[i])) for i in kept]
    if not classes:
        return search_task(name, texts, kept, of)
    known, labels, sizes = np.unique([str(labels[i]) for i in kept], return_inverse=True, return_counts=True)
    if len(known) < 2 or sizes.min() < FEWEST:
        rarest = f", {one_line(known[sizes.argmin()], 40)!r} with {sizes.min()}" if len(known) else ""
        found = f"{len(known)} classes in {len(kept)} documents{rarest}"
        raise UserError(f"{name}: {found}; a probe needs two classes or more, with {FEWEST} documents or more each")
    return Task(name, texts, labels, rows=kept, of=of)


def search_task(name: str, pairs: list[tuple[str, ...]], rows: np.ndarray, of: tuple[int, int]) -> Task:
    """Each query and each document once, of the first row. Raises UserError for fewer than FEWEST queries."""
    columns = zip(*pairs or [("", "")], strict=True)
    queries, documents = ({text: i for i, text in enumerate(dict.fromkeys(column))} for column in columns)
    if len(queries) < FEWEST:
        raise UserError(f"{name}: --task_kind retrieval needs {FEWEST} queries or more, each with a document")
    numbers = np.array([(queries[q], len(queries) + documents[d]) for q, d in pairs])
    first = np.unique(numbers.T, return_index=True)[1] % len(pairs)  # pair of each text
    return Task(name, [(text,) for text in [*queries, *documents]], None, np.unique(numbers, axis=0), rows[first], of)
