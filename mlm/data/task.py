"""Labelled documents: a task that may profit from the adaptation. train.py trains on no label."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlm.data import corpus
from mlm.data.corpus import CorpusConfig
from mlm.errors import UserError, in_words_of, one_line

FEWEST, MOST = 10, 5000  # documents of a class, two a fold of probe.py; in all, drawn by a fixed seed, for minutes


@dataclass(frozen=True)
class TaskConfig:
    """A task, labelled documents, that shows what the adaptation is worth; train.py trains on no label."""

    task_file: str | None = None  # Probe with the labelled documents of this file, in the formats of --train_file.
    task_dataset_name: str | None = None  # Or of this dataset or folder: its train split, else its validation split.
    task_text_column: str | None = None  # This column holds their text (default: --text_column).
    task_pair_column: str | None = None  # This column holds the second text, where pairs of texts have classes.
    task_label_column: str = "label"  # This column holds their classes.

    @property
    def given(self) -> str | None:
        return self.task_file or self.task_dataset_name

    def __post_init__(self) -> None:
        if self.task_file and self.task_dataset_name:
            raise UserError("--task_file and --task_dataset_name: give one of the two")


class Task(NamedTuple):
    name: str  # the file or data set
    texts: list[tuple[str, ...]]  # of n documents, or n pairs of them
    labels: np.ndarray  # [n] int64, classes by number, FEWEST or more of each
    seen: int | None  # of the n, those with a text that stands in the training text; None: there is none


def read_task(config: TaskConfig, domain: CorpusConfig) -> Task | None:
    """The documents that have text and a label, cleaned as the domain's are; None where no task is given.

    Raises UserError where they cannot be read, or their labels are no classes of FEWEST documents or more.
    """
    if not (name := config.given):
        return None
    column, label = config.task_text_column or domain.text_column, config.task_label_column
    pair = (config.task_pair_column,) if config.task_pair_column else ()
    if "text" in (label, *pair) and column != "text":
        raise UserError(f"{name}: only the column of --task_text_column may be called text; rename the other")
    with in_words_of("task"):
        source = CorpusConfig(config.task_dataset_name, train_file=config.task_file, text_column=column)
        splits = corpus.read(source, (label, *pair))
    rows = splits.get("train", splits.get("validation"))
    if lacks := [c for c in (label, *pair) if c not in rows.column_names]:
        raise UserError(f"{name} has no column {lacks[0]!r}: name it with --task_label_column or --task_pair_column")
    kind = getattr(rows.features[label], "dtype", "several labels a document")  # lists and mappings have none
    if kind.startswith(("float", "decimal", "several")):
        needed = "a probe needs one class, a text or whole number, each"
        raise UserError(f"{name}: column {label!r} holds {kind}; {needed}")
    table = rows.with_format("arrow")[:]
    texts, labels = list(zip(*(table[c].to_pylist() for c in ("text", *pair)), strict=True)), table[label].to_pylist()
    kept = [i for i, own in enumerate(texts) if labels[i] is not None and all(t and t.strip() for t in own)]
    kept = np.sort(np.random.default_rng(0).permutation(kept)[:MOST]).astype(int).tolist()
    classes, numbers, sizes = np.unique([str(labels[i]) for i in kept], return_inverse=True, return_counts=True)
    if len(classes) < 2 or sizes.min() < FEWEST:
        rarest = f", {one_line(classes[sizes.argmin()], 40)!r} with {sizes.min()}" if len(classes) else ""
        found = f"{len(classes)} classes in {len(kept)} documents{rarest}"
        raise UserError(f"{name}: {found}; a probe needs two classes or more, with {FEWEST} documents or more each")
    clean = corpus.strip_html if domain.strip_html else str
    texts = [tuple(map(clean, texts[i])) for i in kept]
    seen = in_training_text(texts, domain) if domain.train_file or domain.dataset_name else None
    return Task(name, texts, numbers, seen)


def in_training_text(documents: list[tuple[str, ...]], domain: CorpusConfig) -> int | None:
    """How many of the labelled documents stand in the training text, up to case and white space; None where there is
    no such text. Memory is for the labelled ones alone."""

    def folded(text: str) -> str:
        return " ".join(text.lower().split())

    text = corpus.load(domain)
    if "train" not in text.splits:
        return None
    keys = [set(map(folded, texts)) for texts in documents]
    found = set().union(*keys).intersection(map(folded, text.documents("train")))
    return sum(not own.isdisjoint(found) for own in keys)
