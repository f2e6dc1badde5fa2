"""Text in, documents out: the one module that imports the datasets library, and only where text is read.

A corpus is a Hub dataset, a folder or local files. `identify` names it by some `stat` calls; `load` reads it, to see
what is in it, and its documents are read again where they are needed: both where it lies, without a copy on disk."""

import html
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from hashlib import blake2b
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlm.data.faults import READERS, find_bad_row, find_bomb, find_fault, reader_of
from mlm.errors import UserError, explain_load_failure, one_line
from mlm.files import stamp

ZEROS = "\0" * 64  # of a damaged disk, or of one that lost its power: a block, of 512 bytes or more
SPACE = bytes(code for code in range(128) if chr(code).isspace())
SPACE_BEYOND = [*map(chr, (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))]
LOWER = bytes(range(256)).lower()  # of ASCII
SHARD = 1 << 23  # bytes of text in a shard, until its last document begins: seconds of tokenising, on one core
KNOWN = f"{', '.join(READERS)}, each also with .gz"

Files = str | tuple[str, ...] | None  # one or several: the documents of the first, then those of the next

# Tags, comments and declarations in a row, with the blanks between them. The name of a tag follows "<" and
# ends at white space, "/" or ">": `a < b`, <me@example.org> and <stdio.h> are text.
TAGS = re.compile(r"(?:</?[a-z][\w:-]*(?=[\s/>])[^<>]*>[ \t]*|<![a-z-][^<>]*>[ \t]*)+", re.IGNORECASE)


@dataclass(frozen=True)
class CorpusConfig:
    """Which text, and which part of it is held out."""

    dataset_name: str | None = None  # Read train and validation of this Hub dataset, save_to_disk or data folder.
    dataset_config_name: str | None = None  # Choose this configuration of a dataset that has several.
    train_file: Files = None  # Train on these .txt, .jsonl, .json, .csv or .parquet files, also with .gz.
    validation_file: Files = None  # Hold out the text of these files, in the formats of --train_file.
    validation_split_percentage: float = 5.0  # Hold out this share of documents if there is no held-out text.
    text_column: str = "text"  # This column holds the documents (.txt files have none).
    sample_by: Literal["line", "paragraph", "document"] = "line"  # This is one document of a .txt file.
    strip_html: bool = False  # Remove HTML tags from the documents, and turn entities into characters.
    allow_leaks: bool = False  # Evaluate on held-out documents that stand in the training split, too.

    @property
    def files(self) -> dict[str, list[str]]:
        """The files that are given, by their flags."""
        return {flag: files for flag in ("train_file", "validation_file") if (files := several(getattr(self, flag)))}


@dataclass(frozen=True)
class OutOfDomainConfig:
    """Text outside the domain, measured before and after, never trained on: it shows what a model forgets."""

    out_of_domain_file: str | None = None  # Measure this text too, in the formats of --train_file.
    out_of_domain_dataset_name: str | None = None  # Or this dataset or folder: its validation split, else 5% of it.
    out_of_domain_dataset_config_name: str | None = None  # Choose this configuration of it.
    out_of_domain_text_column: str | None = None  # This column holds its documents (default: --text_column).

    def __post_init__(self) -> None:
        if self.out_of_domain_file and self.out_of_domain_dataset_name:
            raise UserError("--out_of_domain_file and --out_of_domain_dataset_name: give one of the two")


@dataclass(frozen=True)
class Corpus:
    splits: dict[str, "Documents"]  # "train" and/or "validation"
    dropped: dict[str, int]  # empty, whitespace and null documents left out, for each split
    shards: dict[str, list[tuple[range, str]]]  # of each split: which documents, and a fingerprint of their texts
    hashes: dict[str, np.ndarray]  # of the documents of each split, by `text_hash`: [n] uint64
    leaks: int | None  # held-out documents that stand in the training split; None: there is no such split


class Source:
    """The texts of several datasets, each read from the first on, or on from where the last reader left them."""

    def __init__(self, origin: str, datasets: list[Any]) -> None:
        self.origin, self.datasets = origin, datasets
        self.left: tuple[int, int, Any] = 0, -1, None  # by which process, at which text, and those behind it

    def __iter__(self) -> Iterator[str | None]:
        with _explained(self.origin):
            for dataset in self.datasets:
                yield from texts(dataset)

    def at(self, places: np.ndarray, hashes: np.ndarray) -> Iterator[str]:
        """The texts at `places`, int64[n], ascending. Raises UserError where they have other hashes, [n] uint64."""
        (process, last, behind), self.left = self.left, (0, -1, None)
        if process != os.getpid() or last >= places[0]:  # open files are not shared with a parent
            behind = enumerate(self)
        for place, known in zip(places.tolist(), hashes.tolist(), strict=True):
            text = next((text for number, text in behind if number == place), None)
            if text is None or _hash(text.encode()) != known:
                raise UserError(f"{self.origin} changed while it was read; run again")
            yield text
        self.left = os.getpid(), place, behind


@dataclass(frozen=True)
class Documents:
    """The documents of a split, in order, none of them empty. They are read anew in each iteration."""

    source: Source
    places: np.ndarray  # [n] int64, in the source
    hashes: np.ndarray  # [n] uint64, of the texts there
    strip_html: bool

    def __getitem__(self, part: slice) -> "Documents":
        return replace(self, places=self.places[part], hashes=self.hashes[part])

    def __iter__(self) -> Iterator[str]:
        return map(strip_html if self.strip_html else str, self.source.at(self.places, self.hashes))


def several(value: Any) -> list[Any]:
    """The values of a flag that takes one or several, or none."""
    return list(value) if isinstance(value, list | tuple) else [] if value in (None, "") else [value]


def identify(config: CorpusConfig) -> dict[str, Any]:
    """Name the corpus without reading it: equal names mean equal documents in equal splits.

    Local files (every file of a folder) are named by path and stamp, a Hub dataset by its commit, or with no network
    by the one in the local Hub cache. The name is the same after a round trip through JSON.

    Raises UserError as `load` does, for what can be seen without reading."""
    _check(config)
    identity: dict[str, Any] = {"text_column": config.text_column}
    if name := config.dataset_name:
        identity["dataset_config_name"] = config.dataset_config_name
        local = os.path.isdir(name)
        identity["dataset"] = [*map(_named, _files_of(name))] if local else [name, _hub_revision(name)]
    identity |= {flag: _named(*files) for flag, files in config.files.items()}
    if not config.validation_file:
        identity["validation_split_percentage"] = config.validation_split_percentage
    if config.dataset_name or any(reader_of(file) == "text" for file in chain(*config.files.values())):
        identity["sample_by"] = config.sample_by
    identity |= {name: True for name in ("strip_html", "allow_leaks") if getattr(config, name)}
    return identity


def load(config: CorpusConfig) -> Corpus:
    """Read the corpus, to know which documents are in which split.

    Validation documents come from `validation_file`, else from the dataset's "validation" split, else from the
    training documents, by `held_out`. With `validation_file` alone there is no training split. Those that stand in the
    training split, up to case and white space, are left out, unless `config` allows such leaks.

    Raises UserError for files and datasets that cannot be had or read, for a text column that is missing or holds no
    strings, for a split without a document, and as `held_out` does where it is needed."""
    sources = {s: Source(origin(config, s), parts) for s, parts in read(config, stream=True).items()}
    kept, dropped = {}, {}
    for split, source in sources.items():
        with _quiet_datasets(), _explained(source.origin):
            kept[split], dropped[split] = _scan(source, config.strip_html)  # uint64[4, n]
        if not kept[split].size:
            raise UserError(f"{source.origin} holds no {split} document: {dropped[split]} empty ones were dropped")
    if "validation" not in sources:
        out = held_out(kept["train"][1], config.validation_split_percentage)  # bool[n]
        sources["validation"], dropped["validation"] = sources["train"], 0
        kept = {"train": kept["train"][:, ~out], "validation": kept["train"][:, out]}
    leaked = np.isin(kept["validation"][3], kept["train"][3]) if "train" in kept else None  # bool[n]
    if leaked is not None and not config.allow_leaks:
        if leaked.all():
            name = origin(config, "validation")
            raise UserError(f"{name}: every held-out document is in the training split, too (--allow_leaks)")
        kept["validation"] = kept["validation"][:, ~leaked]
    splits = {s: Documents(sources[s], kept[s][0].view(np.int64), kept[s][1], config.strip_html) for s in sources}
    shards = {split: _cut(*kept[split][1:3]) for split in splits}
    hashes, leaks = {split: kept[split][3] for split in splits}, None if leaked is None else int(leaked.sum())
    return Corpus(splits, dropped, shards, hashes, leaks)


def read(config: CorpusConfig, also: tuple[str, ...] = (), stream: bool = False) -> dict[str, list[Any]]:
    """The splits, "train" and/or "validation", as they stand in the files: datasets with a column "text", and those of
    `also` that are there; with `stream` iterable ones, of which the datasets library keeps no copy in its cache.
    Raises UserError as `load` does, though not for text that is empty."""
    _check(config)
    for file in [*chain(*config.files.values()), *_files_of(config.dataset_name or "")]:
        if reader_of(file) and (fault := find_bomb(file)):
            raise UserError(f"{file}: {fault}")
    with _quiet_datasets():
        sources = _read_dataset(config, also, stream) if config.dataset_name else {}
        for flag, files in config.files.items():
            sources[flag.removesuffix("_file")] = [_read_file(file, config, also, stream) for file in files]
    return sources


def text_hash(text: str) -> int:
    """64 bits, the same for texts that differ in case and white space alone."""
    return _hash(ascii_spaced(text if text.isascii() else text.lower()).translate(LOWER, SPACE))


def ascii_spaced(text: str) -> bytes:
    """`text` in UTF-8, with a blank for each white space beyond ASCII."""
    for blank in () if text.isascii() else SPACE_BEYOND:  # of English text, a tenth of a regular expression's time
        text = text.replace(blank, " ")
    return text.encode()


def keep_apart(config: CorpusConfig, flag: str, folder: str | Path) -> None:
    """Raises UserError where a folder that a run writes to lies in the dataset folder: text for the next run."""
    name = config.dataset_name
    if name and os.path.isdir(name) and Path(folder).resolve().is_relative_to(Path(name).resolve()):
        lies = f"{flag} {folder} lies in --dataset_name {name}, whose files are all text"
        raise UserError(f"{lies}; choose another folder")


def out_of_domain(config: OutOfDomainConfig, domain: CorpusConfig) -> CorpusConfig | None:
    """The out-of-domain text, its documents cut and cleaned as the domain's are; None where there is none."""
    if not (config.out_of_domain_file or config.out_of_domain_dataset_name):
        return None
    return CorpusConfig(
        dataset_name=config.out_of_domain_dataset_name,
        dataset_config_name=config.out_of_domain_dataset_config_name,
        validation_file=config.out_of_domain_file,
        text_column=config.out_of_domain_text_column or domain.text_column,
        sample_by=domain.sample_by,
        strip_html=domain.strip_html,
        allow_leaks=True,  # into its own training split, of which no run learns
    )


def texts(dataset: Any) -> Iterator[str | None]:
    """The texts of a dataset, in order. They are read in small batches, since one may be a book."""
    for table in dataset.with_format("arrow").iter(batch_size=100):
        yield from table["text"].to_pylist()


def strip_html(text: str) -> str:
    """A document without its HTML tags and comments, and with its entities as characters.

    Tags in a row become one blank, or nothing beside white space and at either end of the text. All else stays as it
    is, the code of a script element too: the rule is for text with some markup, not web pages."""

    def gap(tags: re.Match) -> str:
        start, end = tags.span()
        inside = start > 0 and end < len(text)
        return " " if inside and not (text[start - 1].isspace() or text[end].isspace()) else ""

    return html.unescape(TAGS.sub(gap, text))


def held_out(hashes: np.ndarray, percentage: float) -> np.ndarray:
    """Which documents are held out, bool[n]: those whose hash, uint64[n], is in the lowest `percentage` of its range.

    A document's side depends on its text alone, so it stays when others are added or reordered, and equal texts share
    a side. Where that leaves a side empty, the texts of the lowest (or highest) hash cross over. Raises UserError for
    a percentage outside (0, 100), and where all hashes are equal: one text has no two sides."""
    _check_percentage(percentage)
    if hashes.min() == hashes.max():
        raise UserError("a corpus of one distinct document has nothing to hold out: give --validation_file")
    return hashes < min(max(int(percentage / 100 * 2**64), int(hashes.min()) + 1), int(hashes.max()))


def _check(config: CorpusConfig) -> None:
    """Raises UserError for what can be wrong with a corpus before it is read."""
    name = config.dataset_name
    if not (name or config.files):
        raise UserError("no text: give --dataset_name, --train_file or --validation_file")
    if name and config.train_file:
        raise UserError(f"--dataset_name {name} and --train_file {one_line(config.train_file)}: give one of the two")
    if name and os.path.isfile(name):
        raise UserError(f"--dataset_name {name} is a file: give it as --train_file")
    if name and os.path.isdir(name) and not _is_saved(name) and not any(map(reader_of, _files_of(name))):
        raise UserError(f"{name} holds no data files: expected a save_to_disk folder, or {KNOWN}")
    for flag, file in ((flag, file) for flag, files in config.files.items() for file in files):
        if not os.path.exists(file):
            raise UserError(f"--{flag} {file}: no such file")
        if not os.path.isfile(file):
            raise UserError(f"--{flag} {file} is not a file: give a folder as --dataset_name")
        if not reader_of(file):
            raise UserError(f"--{flag} {file}: unknown kind of file, expected {KNOWN}")
        if not os.path.getsize(file):
            raise UserError(f"--{flag} {file} is empty")
    if not config.validation_file and not name:  # a dataset may bring its own validation split
        _check_percentage(config.validation_split_percentage)


def _check_percentage(percentage: float) -> None:
    if not 0 < percentage < 100:
        raise UserError(f"--validation_split_percentage {percentage}: must be more than 0 and less than 100")


def origin(config: CorpusConfig, split: str) -> str:
    """Where a split comes from, for messages."""
    files = config.files.get("validation_file", []) if split == "validation" else []
    return ", ".join(files) or config.dataset_name or ", ".join(config.files["train_file"])


def _read_dataset(config: CorpusConfig, also: tuple[str, ...], stream: bool) -> dict[str, list[Any]]:
    import datasets

    name = config.dataset_name
    if not os.path.isdir(name):
        _hub_revision(name)  # with no network this fails at once, load_dataset after 23 s of trying
    with _explained(name):
        if _is_saved(name):
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        else:
            path = os.path.abspath(name) if os.path.isdir(name) else name
            splits = _convert(path, config, stream, name=config.dataset_config_name)
        used = [split for split in ("train", "validation") if split in splits]
        if not used:
            raise UserError(f"{name} has neither a train nor a validation split, only {', '.join(splits)}")
        return {split: [_chosen(splits[split], f"{name} ({split})", config.text_column, also)] for split in used}


def _read_file(file: str, config: CorpusConfig, also: tuple[str, ...], stream: bool) -> Any:
    import datasets

    reader, path = reader_of(file), os.path.abspath(file)
    with _explained(file):
        if reader == "parquet" and file.lower().endswith(".gz"):  # the one reader that does not unpack by itself
            # The unpacked copy is cached by path alone: unpack again, the file may have changed in place.
            fresh = datasets.DownloadConfig(force_extract=True)
            path = datasets.DownloadManager(download_config=fresh).extract(path)
        dataset = _convert(reader, config, stream, data_files={"train": escape(path)})["train"]
        return _chosen(dataset, file, "text" if reader == "text" else config.text_column, also)


def _convert(path: str, config: CorpusConfig, stream: bool, **where: Any) -> dict[str, Any]:
    """`load_dataset`, with those of our options that the reader it picks has."""
    import datasets

    reader = datasets.load_dataset_builder(path, **where)
    files = reader.config.data_files or {}
    for file in (file for split in ("train", "validation") for file in files.get(split, ()) if os.path.isfile(file)):
        if fault := find_bad_row(file, config.text_column):
            raise UserError(f"{os.path.normpath(file)}: {fault}")
    # In a .csv file a text of digits stays a text. NA, NaN, null and None are empty documents, as pandas has it: with
    # other settings it would turn gaps in the other columns to strings, and their types would clash.
    options = {"sample_by": config.sample_by, "converters": {config.text_column: str}}
    has = {name: value for name, value in options.items() if hasattr(reader.config, name)}
    return datasets.load_dataset(path, **where, **has, streaming=stream)


def _chosen(dataset: Any, origin: str, column: str, also: tuple[str, ...]) -> Any:
    """The text, as "text", and those of the columns `also` that are there."""
    import datasets

    if not (there := dataset.features):  # of a stream they are known when it is read
        there = datasets.Features.from_arrow_schema(next(dataset.with_format("arrow").iter(1)).schema)
    if column not in there:
        raise UserError(f"{origin} has no column {column!r}, only {', '.join(there)}: name it with --text_column")
    kind = getattr(there[column], "dtype", type(there[column]).__name__)
    if kind not in ("string", "large_string", "null"):
        raise UserError(f"{origin}: column {column!r} holds {kind}, no text: choose with --text_column")
    dataset = dataset.select_columns([column, *(name for name in also if name in there)])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _scan(source: Iterable[str | None], without_html: bool = False) -> tuple[np.ndarray, int]:
    """Of the n documents with more than whitespace the positions; hashes and bytes of the text as it was read, so that
    a document's side does not depend on `without_html`; `text_hash` of what is trained on: uint64[4, n]. And how many
    texts there are besides."""
    positions, hashes, sizes, folded, position = array("Q"), array("Q"), array("Q"), array("Q"), -1
    for position, text in enumerate(source):
        if text and "\0" in text and (ZEROS in text or not text.strip("\0")):
            raise ValueError(f"document {position} holds zeros in the place of text")
        if text and (clean := strip_html(text) if without_html else text).strip():
            data = text.encode()
            positions.append(position)
            hashes.append(_hash(data))
            sizes.append(len(data))
            folded.append(text_hash(clean))
    return np.stack([positions, hashes, sizes, folded]), position + 1 - len(positions)


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _cut(hashes: np.ndarray, sizes: np.ndarray) -> list[tuple[range, str]]:
    """Shards of n documents, of whose hashes and bytes, uint64[n] each, alone it depends where they are cut: every
    SHARD bytes, at the next document. With each a fingerprint of its texts."""
    number = (np.cumsum(sizes) - sizes) // np.uint64(SHARD)
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
    return [(range(a, b), blake2b(hashes[a:b].tobytes(), digest_size=16).hexdigest()) for a, b in pairwise(cuts)]


def _hub_revision(name: str) -> str:
    """The commit of a Hub dataset, or with no network the one in the local Hub cache."""
    from huggingface_hub import HfApi, constants

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception as error:  # its transport's exceptions change from version to version
        cached = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs", "main")
        if cached.is_file():
            return cached.read_text().strip()
        raise explain_load_failure("dataset", name, error) from None


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote the folder, from a DatasetDict (the first file) or a Dataset."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def _files_of(folder: str) -> list[str]:
    """All files of a local dataset folder, and those that the head of its README points to; [] for other names."""
    if not os.path.isdir(folder):
        return []
    files = {str(path) for path in Path(folder).rglob("*") if path.is_file()}
    readme = Path(folder, "README.md")
    if readme.is_file():
        from fsspec.implementations.local import LocalFileSystem  # patterns mean what they mean to the library
        from huggingface_hub import metadata_load

        try:
            configs = (metadata_load(readme) or {}).get("configs") or []
            for config in configs:
                base = os.path.join(os.path.abspath(folder), config.get("data_dir") or "")
                for pattern in _strings(config.get("data_files") or "**"):
                    files.update(filter(os.path.isfile, LocalFileSystem().glob(os.path.join(base, pattern))))
        except Exception as error:  # YAML's own, and whatever follows from values of other types than there should be
            raise UserError(f"{readme}: cannot read its head ({one_line(error)})") from None
    return sorted({os.path.normpath(file) for file in files})


def _strings(value: Any) -> list[str]:
    """The patterns in data_files, which may be one, a list, or lists for splits."""
    if isinstance(value, str):
        return [value.rpartition("::")[2]]  # of zip://*.txt::archive.zip, the archive
    if isinstance(value, dict):
        return _strings([item for name, item in value.items() if name != "split"])
    return [pattern for item in value for pattern in _strings(item)]


def _named(*files: str) -> list[Any]:
    named = [[os.path.abspath(file), *stamp(file)] for file in files]
    return named if len(named) > 1 else named[0]


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Inside, the datasets library logs nothing and shows no bars. Nor does it count a use of its readers on the Hub,
    which takes seconds where there is no network."""
    import datasets

    counts, utils = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.utils
    verbosity, had_bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    utils.logging.set_verbosity(utils.logging.CRITICAL)  # what it logs as an error it raises as well
    utils.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        utils.logging.set_verbosity(verbosity)
        if had_bars:
            utils.enable_progress_bars()


@contextmanager
def _explained(origin: str) -> Iterator[None]:
    """Turns whatever fails while `origin` is read into one line that says which file and line is at fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # pyarrow's, pandas', the library's own, StopIteration for an empty file
        for file in _files_of(origin) if os.path.isdir(origin) else origin.split(", "):
            if os.path.isfile(file) and (fault := find_fault(file)):
                raise UserError(f"{file}: {fault}") from error
        cause = error.__cause__ or error  # the library's own error says less than what it was raised from
        raise UserError(f"cannot read {origin}: {one_line(f'{type(cause).__name__}: {cause}')}") from error
