"""The token store: a split's documents as one stream of tokens on disk, made once per (corpus, tokenizer).

    <token_store>/<key>/train/ids.npy              [N] the smallest unsigned type that holds the vocabulary
                              word_starts.npy      [N] bool, 1: a word of the tokenizer begins here
                              document_offsets.npy [D + 1] int64, document d: ids[offsets[d] : offsets[d + 1]]
                              header.json          what it was made from, sizes, fingerprints
                        validation/…

The key names the corpus (paths, sizes and times, or the Hub's revision) and the tokenizer, so that a second
run finds its store without reading a document. A store is built beside its place and renamed, so that a
half-built one is never found. Of several runs that want the same one, one builds and the others wait, by a
lock on <key>.lock, a file that stays (`one_builder` says why); it may be removed when no run builds.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mlm.data import corpus
from mlm.data.corpus import Corpus, CorpusConfig
from mlm.data.tokenizer import TokenizerInfo, text_encoder
from mlm.errors import UserError, at_least
from mlm.files import one_builder

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
ARRAYS = ("ids", "word_starts", "document_offsets")
BATCH_DOCUMENTS = 1000
BATCH_CHARACTERS = 4_000_000  # what is held in memory at a time, unless one document is longer
MAX_MEAN_WORD = 10  # tokens; whole words longer than this on average are no words
ABANDONED = 24 * 3600  # seconds in which a build that is alive has written something


@dataclass(frozen=True)
class TokenStoreConfig:
    """Where token stores are kept, and how they are made."""

    token_store: str | None = None  # Keep token stores between runs in this folder (default: ~/.cache/mlm).
    overwrite_cache: bool = False  # Build the token store anew even if a valid one exists.
    preprocessing_num_workers: int | None = None  # Tokenise with this many threads (default: all cores).

    def __post_init__(self) -> None:
        at_least(self, 1, "preprocessing_num_workers")


@dataclass(frozen=True)
class TokenStore:
    """One split, memory-mapped: nothing is read before it is used."""

    header: dict[str, Any]
    ids: np.ndarray  # [N] uint8, uint16 or uint32
    word_starts: np.ndarray  # [N] bool
    document_offsets: np.ndarray  # [D + 1] int64

    @property
    def sees_words(self) -> bool:
        """Whether the tokenizer's words are words here, and not whole sentences of an unsegmented script."""
        return self.header["words"] is not None and self.mean_word <= MAX_MEAN_WORD

    @property
    def mean_word(self) -> float:
        """Ordinary tokens a word; infinite where there is no word."""
        return self.header["maskable_tokens"] / self.header["words"] if self.header["words"] else float("inf")


class Encoded(NamedTuple):
    """A batch of documents as one stream of n tokens."""

    ids: np.ndarray  # [n] int64
    word_starts: np.ndarray  # [n] bool
    lengths: np.ndarray  # [documents] int64, none of them 0


def prepare(
    source: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    config: TokenStoreConfig,
    whole_words: bool = False,
    only: str | None = None,
) -> dict[str, TokenStore]:
    """The token stores of the corpus's splits: found, or built now.

    whole_words: whether words are to be masked. Where the tokenizer sees none, that is a UserError, and
    otherwise a warning.
    only: the one split that is wanted; the others are not tokenised

    Raises UserError where the corpus cannot be read or the store cannot be written.
    """
    stores = _find_or_build(source, tokenizer, info, config, only)
    longest = max((store.mean_word for store in stores.values() if store.header["words"]), default=0)
    if whole_words:
        for store in stores.values():
            check_words(store)
    elif longest > MAX_MEAN_WORD:
        log.warning("%s; tokens can be masked, whole words cannot", _no_words(longest))
    return stores


def limit_threads(config: TokenStoreConfig) -> None:
    """Has the tokenizers library use as many threads as `config` says.

    To be called before any tokenizer works in this process: the library asks once, when it starts its pool.
    """
    if config.preprocessing_num_workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(config.preprocessing_num_workers)


def _find_or_build(
    source: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    config: TokenStoreConfig,
    only: str | None,
) -> dict[str, TokenStore]:
    identity = corpus.identify(source) | ({} if only is None else {"only": only})
    key = hashlib.sha256(json.dumps([identity, info.fingerprint], sort_keys=True).encode()).hexdigest()[:20]
    folder = store_folder(config) / key
    if not config.overwrite_cache:
        found = _open_splits(folder, identity, info)
        if found:
            return found

    limit_threads(config)
    # Before the lock: a mistake in the corpus leaves nothing on disk, and reading is quick beside tokenising.
    read = corpus.load(source)
    wanted = [name for name in read.splits if only in (None, name)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with one_builder(folder) as alone:
            stores = {} if config.overwrite_cache else _open_splits(folder, identity, info)
            if stores:  # another run has built them meanwhile
                return stores
            _remove_abandoned(folder, alone)
            name = _workspace(folder, alone)
            with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=folder.parent) as workspace:
                built = Path(workspace, "store")  # the folder around it is its owner's alone
                _build_splits(read, wanted, identity, tokenizer, info, built)
                if config.overwrite_cache or not _open_splits(folder, identity, info):
                    with contextlib.suppress(FileNotFoundError):
                        folder.rename(Path(workspace, "replaced"))  # goes with the workspace
                _put_in_place(built, folder)
            stores = _open_splits(folder, identity, info)  # before the next run may replace them
    except OSError as error:
        raise UserError(f"--token_store {folder.parent}: cannot write there ({error.strerror})") from None
    if not stores:
        raise UserError(f"--token_store {folder}: removed by something else while it was built; run again")
    return stores


def _build_splits(
    read: Corpus,
    splits: list[str],
    identity: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    folder: Path,
) -> None:
    for split in splits:
        progress = tqdm(read.documents(split), f"tokenising {split}", unit=" documents", disable=None)
        origin = {
            "split": split,
            "splits": splits,
            "identity": identity,
            "empty_documents": read.dropped.get(split, 0),
        }
        build(progress, tokenizer, info, folder / split, origin)


def _put_in_place(built: Path, folder: Path) -> None:
    try:
        built.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else a run without the lock was quicker
            raise


def _workspace(folder: Path, alone: bool) -> str:
    """How the folders are called, up to the last dot, in which a process builds: alone, or perhaps not."""
    return f"{folder.name}.building.{socket.gethostname()}" if alone else f"{folder.name}.building"


def _remove_abandoned(folder: Path, alone: bool) -> None:
    """Removes what killed builds of this store left behind.

    Whoever is alone knows that those before it on this machine are dead. The others are told by age: builds
    without the lock, and builds of other machines, since not every shared folder has locks that reach there.
    """
    for leftover in folder.parent.glob(f"{folder.name}.building.*"):
        times = []
        with contextlib.suppress(OSError):  # a build that ends meanwhile takes its folder along
            times = [path.stat().st_mtime for path in (leftover, *leftover.rglob("*"))]
        dead = alone and leftover.name.rpartition(".")[0] == _workspace(folder, alone)
        if dead or (times and time.time() - max(times) > ABANDONED):
            shutil.rmtree(leftover, ignore_errors=True)


def store_folder(config: TokenStoreConfig) -> Path:
    """Where token stores are kept between runs."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mlm")
    return Path(config.token_store or default).expanduser()


def _open_splits(folder: Path, identity: dict[str, Any], info: TokenizerInfo) -> dict[str, TokenStore]:
    """All splits of a whole, valid store of this corpus and tokenizer; none where anything is amiss."""
    stores = {}
    for split in ("train", "validation"):
        if (folder / split).is_dir():
            store = open_store(folder / split, info.fingerprint)
            if store is None or store.header.get("identity") != json.loads(json.dumps(identity)):
                return {}
            stores[split] = store
    # A store that is being removed loses its splits one after the other.
    whole = all(set(store.header.get("splits", ())) == set(stores) for store in stores.values())
    return stores if whole else {}


def open_store(folder: Path, tokenizer_fingerprint: str) -> TokenStore | None:
    """The store in `folder`, or None where it is truncated, of another version or of another tokenizer."""
    try:
        header = json.loads((folder / "header.json").read_text())
        sizes = {name: (folder / f"{name}.npy").stat().st_size for name in ARRAYS}
        if (header["version"], header["tokenizer"], header["bytes"]) != (
            FORMAT_VERSION,
            tokenizer_fingerprint,
            sizes,
        ):
            return None
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenStore(header, **arrays)


def build(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    info: TokenizerInfo,
    folder: Path,
    origin: dict[str, Any],
) -> TokenStore:
    """Tokenises `texts` into `folder`, batch by batch; memory does not grow with the corpus.

    origin: goes into the header as it is. A text without a token (of control characters, say) is left out.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(kind for kind in (np.uint8, np.uint16, np.uint32) if info.size - 1 <= np.iinfo(kind).max)
    digest, text = hashlib.sha256(), Counter()
    tokens = documents = words = maskable_tokens = unknown = longest = 0
    with (
        _Appender(folder / "ids.npy", dtype) as ids_file,
        _Appender(folder / "word_starts.npy", np.bool_) as starts_file,
        _Appender(folder / "document_offsets.npy", np.int64) as offsets_file,
    ):
        offsets_file.append(np.zeros(1, np.int64))
        for encoded in _encode_all(_batches(texts, digest, text), tokenizer, info):
            ids_file.append(encoded.ids.astype(dtype))
            starts_file.append(encoded.word_starts)
            offsets_file.append(tokens + np.cumsum(encoded.lengths))
            maskable = info.maskable[encoded.ids]
            tokens += len(encoded.ids)
            documents += len(encoded.lengths)
            words += int((encoded.word_starts & maskable).sum())
            maskable_tokens += int(maskable.sum())
            unknown += int((encoded.ids == info.unknown_id).sum()) if info.unknown_id is not None else 0
            spans = np.diff(np.flatnonzero(encoded.word_starts), append=len(encoded.ids))
            longest = max(longest, int(spans.max(initial=0)))
    seconds = time.perf_counter() - started
    header = {
        "version": FORMAT_VERSION,
        "tokenizer": info.fingerprint,
        "corpus": digest.hexdigest(),
        "bytes": {name: (folder / f"{name}.npy").stat().st_size for name in ARRAYS},
        "documents": documents,
        "tokens": tokens,
        "maskable_tokens": maskable_tokens,
        "unknown_tokens": unknown,
        "words": words if info.has_words else None,
        "characters": text["characters"],
        "spaced_words": text["words"],
        "longest_word": longest,
        "seconds": seconds,
        **origin,
    }
    (folder / "header.json").write_text(json.dumps(header, indent=1))
    store = open_store(folder, info.fingerprint)
    assert store is not None
    return store


def check_words(store: TokenStore, flag: str = "--whole_word_mask") -> None:
    """Raises UserError where masking whole words would be masking something else."""
    if store.header["words"] is None:
        raise UserError(
            f"{flag}: this tokenizer is a slow one, which does not know the words it cut; "
            "choose a fast one with --tokenizer_name, or mask tokens"
        )
    if store.mean_word > MAX_MEAN_WORD:
        raise UserError(f"{flag}: {_no_words(store.mean_word)}; mask tokens instead")


def _no_words(mean_word: float) -> str:
    return (
        f"this tokenizer sees words of {mean_word:.0f} tokens on average here "
        f"(at most {MAX_MEAN_WORD} make sense), as in text without spaces"
    )


def _batches(texts: Iterable[str], digest: "hashlib._Hash", seen: Counter) -> Iterator[list[str]]:
    """Batches by number and by characters; `digest` sees each text and, so that borders count, its length.

    seen: counts the texts' characters (code points) and words (by white space), which no tokenizer changes
    """
    batch: list[str] = []
    characters = 0
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        batch.append(text)
        characters += len(text)
        seen.update(characters=len(text), words=len(text.split()))
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_all(
    batches: Iterator[list[str]], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[Encoded]:
    """Encodes the batches in order: the tokenizer's threads are at the next while Python unpacks this one."""
    if not tokenizer.is_fast:
        for batch in batches:
            yield _encode_slow(batch, tokenizer, info)
        return
    backend = text_encoder(tokenizer)
    with ThreadPoolExecutor(1) as ahead:
        waiting: tuple[list[str], Future] | None = None
        for batch in itertools.chain(batches, [None]):
            following = batch and (batch, ahead.submit(backend.encode_batch, batch, add_special_tokens=False))
            if waiting:
                yield _unpack(waiting[0], waiting[1].result(), backend, info)
            waiting = following


def encode_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[np.ndarray]:
    """The ids `[n]` of each text as the store holds a document; of one without tokens, none."""
    for encoded in _encode_all(([text] for text in texts), tokenizer, info):
        yield encoded.ids


def _unpack(batch: list[str], encodings: list[Encoding], backend: Tokenizer, info: TokenizerInfo) -> Encoded:
    chain = itertools.chain.from_iterable
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    ids = np.fromiter(chain(e.ids for e in encodings), np.int64, lengths.sum())
    if info.special[ids[ids != info.unknown_id]].any():
        # A vocabulary can hold its special tokens as pieces (XLM-R's does), and so find them in text.
        encodings = [_as_text(text, e, backend, info) for text, e in zip(batch, encodings, strict=True)]
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = np.fromiter(chain(e.ids for e in encodings), np.int64, lengths.sum())
    words = np.fromiter(chain(e.word_ids for e in encodings), np.int64, lengths.sum())
    word_starts = np.diff(words, prepend=-1) != 0
    return _close_documents(ids, word_starts, lengths, info)


def _as_text(text: str, encoding: Encoding, backend: Tokenizer, info: TokenizerInfo) -> Encoding:
    """The same document with each literal special token broken up, so that it is text."""
    where = [
        span
        for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)
        if info.special[token_id] and token_id != info.unknown_id
    ]
    for start, end in reversed(where):
        text = text[:start] + _broken(text[start:end]) + text[end:]
    return backend.encode(text, add_special_tokens=False) if where else encoding


def _broken(literal: str) -> str:
    """`<s>` becomes `< s>`; a special token of a single character can only be left out."""
    return f"{literal[0]} {literal[1:]}" if len(literal) > 1 else " "


def _encode_slow(batch: list[str], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo) -> Encoded:
    """A slow tokenizer knows no words: every token counts as one."""
    literal = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens))
    batch = [literal.sub(lambda match: _broken(match[0]), text) for text in batch]
    rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64, lengths.sum())
    return _close_documents(ids, np.ones(len(ids), bool), lengths, info)


def _close_documents(
    ids: np.ndarray, word_starts: np.ndarray, lengths: np.ndarray, info: TokenizerInfo
) -> Encoded:
    """Puts the special tokens around each document that has tokens, and a word start at its head."""
    lengths = lengths[lengths > 0]
    before, after = len(info.prefix), len(info.suffix)
    offsets = np.concatenate([[0], np.cumsum(lengths + before + after)])
    document = np.repeat(np.arange(len(lengths)), lengths)  # [n] each token's document
    place = np.arange(len(ids)) + before * (document + 1) + after * document
    out = np.empty(offsets[-1], np.int64)
    starts = np.ones(offsets[-1], bool)
    out[place] = ids
    starts[place] = word_starts
    for i, token_id in enumerate(info.prefix):
        out[offsets[:-1] + i] = token_id
    for i, token_id in enumerate(info.suffix):
        out[offsets[1:] - after + i] = token_id
    starts[offsets[:-1] + before] = True
    return Encoded(out, starts, np.diff(offsets))


class _Appender:
    """A one-dimensional .npy file that grows: NumPy leaves room in the header for the final length."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self.file: IO[bytes] = path.open("wb")
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).data)
        self.length += len(values)

    def _write_header(self) -> None:
        described = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, described)

    def __enter__(self) -> "_Appender":
        return self

    def __exit__(self, *exception: object) -> None:
        with self.file:
            if exception[0] is None:
                self._write_header()
                self.file.flush()
                os.fsync(self.file.fileno())
