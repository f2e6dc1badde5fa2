"""The token store: a split's documents as one token sequence on disk, built once per corpus and tokenizer.

    <token_store>/<key>/train/ids.npy              [N] the smallest unsigned type that holds the vocabulary
                              word_starts.npy      [N] bool, 1: a word of the tokenizer begins here
                              document_offsets.npy [D + 1] int64, document d: ids[offsets[d] : offsets[d + 1]]
                              token_counts.npy     [V] int64, how often each id stands in it
                              document_lengths.npy int64, [t]: the documents of t tokens, or of LONGEST and more
                              text_hashes.npy      [D] uint64, corpus.text_hash of the documents, ascending
                              header.json          its sources, counts, sizes, checksums and fingerprints
                        validation/…

The key is a hash of the corpus (paths, sizes and times, or the Hub's revision) and the tokenizer, so that a second run
finds its store without reading a document (cache.py). It is joined from shards, which several processes may make
(shards.py). A store of another format version, and one that is damaged (verify.py), is built anew, and a run says so.
"""

import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data import corpus
from mlm.data.cache import build_once, key
from mlm.data.corpus import CorpusConfig
from mlm.data.encode import Encoder
from mlm.data.shards import COUNTS, FORMAT_VERSION, Part, build_shards, read_shards
from mlm.data.tokenizer import TokenizerInfo
from mlm.data.verify import check_mapped, checksum, find_fault
from mlm.errors import UserError, at_least, at_most, one_line

log = logging.getLogger(__name__)

ARRAYS = ("ids", "word_starts", "document_offsets", "token_counts", "document_lengths", "text_hashes")
LONGEST = 2**20  # tokens of a row that can be asked for
MAX_MEAN_WORD = 10  # tokens; "words" that are longer on average are sentences of an unsegmented script


@dataclass(frozen=True)
class TokenStoreConfig:
    """Where token stores are kept, and how they are built."""

    token_store: str | None = None  # Keep token stores between runs in this folder (default: ~/.cache/mlm).
    overwrite_cache: bool = False  # Build the token store anew even if a valid one exists.
    verify_store: bool = False  # Read the token store to verify it, even if this machine has since it started.
    preprocessing_num_workers: int | None = None  # Tokenise in this many processes of one core (default: one, of all).

    def __post_init__(self) -> None:
        at_least(self, 1, "preprocessing_num_workers")
        at_most(self, 1024, "preprocessing_num_workers")

    @property
    def processes(self) -> int:
        """As many as asked for, else as the run has on this machine, where the others wait for this one."""
        return self.preprocessing_num_workers or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class TokenStore:
    """One split, memory-mapped, so that nothing is read before it is used."""

    header: dict[str, Any]
    ids: np.ndarray  # [N] uint8, uint16 or uint32
    word_starts: np.ndarray  # [N] bool
    document_offsets: np.ndarray  # [D + 1] int64
    token_counts: np.ndarray  # [V] int64
    document_lengths: np.ndarray  # int64, the documents of 0, 1, … tokens
    text_hashes: np.ndarray  # [D] uint64, ascending

    def __getattribute__(self, name: str) -> Any:
        """Raises UserError for an array whose file has been cut short since: reading it would end in SIGBUS."""
        value = object.__getattribute__(self, name)
        if name in ARRAYS:
            check_mapped(value)
        return value

    @property
    def mean_word(self) -> float:
        """Maskable tokens per word; infinite where there is no word."""
        return self.header["maskable_tokens"] / self.header["words"] if self.header["words"] else float("inf")

    @property
    def why_no_words(self) -> str | None:
        """Why whole words cannot be masked here; None where they can."""
        if self.header["words"] is None:
            return "this tokenizer is a slow one, which does not know the words that it splits"
        if self.mean_word <= MAX_MEAN_WORD:
            return None
        average = f"words of {self.mean_word:.0f} tokens on average here (at most {MAX_MEAN_WORD} make sense)"
        return f"this tokenizer sees {average}, as in text without spaces"


def prepare(
    source: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    config: TokenStoreConfig,
    whole_words: bool = False,
    only: str | None = None,
) -> dict[str, TokenStore]:
    """Opens the token stores of the corpus's splits, {"train": …, "validation": …}, and builds missing ones.

    only: the one split to build; the others are not tokenised

    Raises UserError where the corpus cannot be read, the store cannot be written, and, if whole words are to be
    masked, where the tokenizer finds none, which is a warning otherwise."""
    corpus.keep_apart(source, "--token_store", store_folder(config))
    identity = corpus.identify(source) | ({} if only is None else {"only": only})
    folder = store_folder(config) / key([identity, info.fingerprint])

    def find() -> dict[str, TokenStore]:
        with suppress(Unusable):
            return _open_splits(folder, identity, info)
        return {}

    stores, shared = {}, folder.with_name(f"{folder.name}.shards")
    if os.path.isdir(folder) and not config.overwrite_cache:  # false where it cannot be looked for: see `build_once`
        try:
            stores = _open_splits(folder, identity, info, config.verify_store)
        except Unusable as reason:
            log.warning("%s: %s; building it anew", folder, reason)
    if not stores:
        # Before the lock: a mistake in the corpus leaves nothing on disk, and reading takes less than tokenising.
        read = corpus.load(source)
        splits = [split for split in read.splits if only in (None, split)]
        shards = partial(build_shards, read, splits, Encoder(tokenizer, info), config.processes)

        def join(path: Path) -> None:
            for split, made in shards(path.with_name("shards") if config.overwrite_cache else shared).items():
                origin = {"split": split, "splits": splits, "identity": identity, "leaks": read.leaks}
                origin |= {"empty_documents": read.dropped[split]}
                write(read_shards(made), info, path / split, origin, read.hashes[split])

        if not (config.overwrite_cache or find()):
            shards(shared)
        stores = build_once(folder, find, join, config.overwrite_cache)
    shutil.rmtree(shared, ignore_errors=True)  # also what a run left that was killed meanwhile
    if whole_words:
        for store in stores.values():
            check_words(store)
    elif unsegmented := [s for s in stores.values() if s.header["words"] and s.why_no_words]:
        longest = max(unsegmented, key=lambda store: store.mean_word)
        log.warning("%s; tokens can be masked, whole words cannot", longest.why_no_words)
    if "train" in stores and (leaks := stores["validation"].header["leaks"]) and not source.allow_leaks:
        log.warning("left out: %d held-out documents stand in the training split (--allow_leaks keeps them)", leaks)
    return stores


def limit_threads(config: TokenStoreConfig) -> None:
    """Lets this process and those forked from it tokenise with one thread each, where there are to be several."""
    if config.preprocessing_num_workers or config.processes > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def store_folder(config: TokenStoreConfig) -> Path:
    """Where token stores are kept between runs."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mlm")
    return Path(config.token_store or default).expanduser()


class Unusable(Exception):
    """Why a store on disk is not used."""


def _open_splits(
    folder: Path, identity: dict[str, Any], info: TokenizerInfo, verify: bool = False
) -> dict[str, TokenStore]:
    """All splits of a store of this corpus and tokenizer. Raises Unusable where anything is wrong."""
    paths = (folder / split for split in ("train", "validation"))
    stores = {path.name: open_store(path, info.fingerprint, verify) for path in paths if os.path.isdir(path)}
    # While another process removes a store, its splits disappear one after the other.
    if not stores or any(set(store.header.get("splits", ())) != set(stores) for store in stores.values()):
        raise Unusable("a split is missing")
    if any(store.header.get("identity") != identity for store in stores.values()):
        raise Unusable("it is another corpus's")
    return stores


def open_store(folder: Path, tokenizer_fingerprint: str, verify: bool = False) -> TokenStore:
    """The store in `folder`, verified once a machine and boot, or now (`verify`). Raises Unusable where it is damaged,
    of another format version or of another tokenizer."""
    try:
        header = json.loads((folder / "header.json").read_text())
        if header["version"] != FORMAT_VERSION:
            raise Unusable(f"it is of format version {header['version']!r}, not {FORMAT_VERSION}")
        if header["tokenizer"] != tokenizer_fingerprint:
            raise Unusable("it is another tokenizer's")
        if header.pop("seal") != key(header):
            raise Unusable(f"{folder.name}: header.json is not what was written")
        if header["bytes"] != _sizes(folder):
            raise Unusable(f"{folder.name}: its files have other sizes than were written")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        fault = find_fault(folder, header, arrays, verify)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{folder.name}: it cannot be read ({one_line(f'{type(error).__name__}: {error}')})") from None
    if fault:
        raise Unusable(f"{folder.name}: {fault}")
    for array in arrays.values():  # a chunk is in a page or two, and the kernel would read 32 around each
        array.base.madvise(mmap.MADV_RANDOM)
    return TokenStore(header, **arrays)


def write(parts: Iterable[Part], info: TokenizerInfo, folder: Path, origin: dict[str, Any], hashes: Any = ()) -> None:
    """Joins a split's parts to a store in `folder`, whose header repeats `origin`; hashes: [D] by corpus.text_hash."""
    folder.mkdir(parents=True, exist_ok=True)
    digest, totals = hashlib.sha256(), np.zeros(len(COUNTS), np.int64)
    token_counts, document_lengths = np.zeros(info.size, np.int64), np.zeros(LONGEST + 1, np.int64)
    tokens = begun = 0  # and where the document began that is not at its end
    with (
        _growing(folder / "ids.npy", np.min_scalar_type(info.size - 1)) as append_ids,
        _growing(folder / "word_starts.npy", np.bool_) as append_starts,
        _growing(folder / "document_offsets.npy", np.int64) as append_offsets,
    ):
        append_offsets(np.zeros(1, np.int64))
        for part in parts:
            append_ids(part.ids)
            append_starts(part.word_starts)
            append_offsets(ends := tokens + part.ends)
            token_counts += np.bincount(part.ids, minlength=info.size)
            np.add.at(document_lengths, np.minimum(np.diff(ends, prepend=begun), LONGEST), 1)
            begun = ends[-1] if len(ends) else begun
            tokens += len(part.ids)
            digest.update(part.digests)
            totals += part.counts
    np.save(folder / "token_counts.npy", token_counts)
    np.save(folder / "document_lengths.npy", np.trim_zeros(document_lengths, "b"))
    np.save(folder / "text_hashes.npy", np.sort(np.asarray(hashes, np.uint64)))
    counts = dict(zip(COUNTS, totals.tolist(), strict=True))
    header = {
        "version": FORMAT_VERSION,
        "tokenizer": info.fingerprint,
        "vocabulary_size": info.size,
        "corpus": digest.hexdigest(),
        "bytes": _sizes(folder),
        "checksums": {name: checksum(folder / f"{name}.npy") for name in ARRAYS},
        "seconds": counts.pop("ns") / 1e9,  # of all processes together
        "documents": int(document_lengths.sum()),
        "tokens": tokens,
        "maskable_tokens": int(token_counts[info.maskable].sum()),
        "unknown_tokens": 0 if info.unknown_id is None else int(token_counts[info.unknown_id]),
        **counts,
        "words": counts["words"] if info.has_words else None,
        **origin,
    }
    (folder / "header.json").write_text(json.dumps(header | {"seal": key(header)}, indent=1))


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / f"{name}.npy").stat().st_size for name in ARRAYS}


def check_words(store: TokenStore, flag: str = "--whole_word_mask") -> None:
    """Raises UserError where the tokenizer finds no words, so that whole words cannot be masked."""
    if store.why_no_words:
        raise UserError(f"{flag}: {store.why_no_words}; choose another with --tokenizer_name, or mask tokens")


@contextmanager
def _growing(path: Path, dtype: type) -> Iterator[Callable[[np.ndarray], None]]:
    """Appends to a new one-dimensional .npy file: NumPy pads the header so that the final length fits."""
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (0,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, described)
        start = file.tell()
        yield lambda values: file.write(np.ascontiguousarray(values, dtype).data)
        described["shape"] = ((file.tell() - start) // np.dtype(dtype).itemsize,)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, described)
        file.flush()
        os.fsync(file.fileno())
