"""Cuts the token sequence of a split into chunks of equal length.

ids                [ a b c d | e f g h | i j ]      documents: abc, defghi, j
concatenate        abcd, efgh                       remainder="drop": i j are dropped, once per split
                   abcd, efgh, ij__                 remainder="pad"
line_by_line       abc_, defg, j___                 one document per row, cut and padded"""

import dataclasses
import logging
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from mlm.data.token_store import LONGEST, TokenStore
from mlm.data.tokenizer import TokenizerInfo
from mlm.data.verify import check_mapped
from mlm.errors import UserError, at_least, at_most

log = logging.getLogger(__name__)

MUCH = 0.01  # of a split's tokens
SHORTEST = 8  # tokens of a chunk that can be asked for


@dataclass(frozen=True)
class ChunkConfig:
    """How long chunks are, and what happens to the last, incomplete one."""

    max_seq_length: int | None = None  # A chunk has this many tokens (default: 128, or the model's limit).
    remainder: Literal["drop", "pad"] = "drop"  # Drop or pad the split's last, incomplete chunk.
    line_by_line: bool = False  # Make each document a row, cut or padded, instead of concatenating text.
    pad_to_max_length: bool = False  # Pad to --max_seq_length, not to a batch's longest row (static shapes).
    pack_documents: bool = False  # Train on rows of several documents each, which do not see one another.

    def __post_init__(self) -> None:
        if self.pack_documents and not self.line_by_line:
            raise UserError("--pack_documents: chunks are documents with --line_by_line alone; give both, or neither")
        at_least(self, 1, "max_seq_length")
        at_most(self, LONGEST, "max_seq_length")


def chunk_length(config: ChunkConfig, max_positions: int | None) -> int:
    """Tokens in a chunk. Raises UserError where fewer than SHORTEST, or more than the model takes, are asked for."""
    asked = config.max_seq_length
    if asked and asked < SHORTEST:
        reason = f"beside special tokens there is hardly a word in a chunk; at least {SHORTEST}"
        raise UserError(f"--max_seq_length {asked}: {reason}")
    if asked and max_positions is not None and asked > max_positions:
        raise UserError(f"--max_seq_length {asked}: the model's position table takes {max_positions} tokens")
    return asked or min(128, max_positions or 128)


class Rows(NamedTuple):
    """B chunks in int64, which torch can index with."""

    ids: np.ndarray  # [B, T] int64
    word_starts: np.ndarray  # [B, T] bool, 1: a word begins here
    lengths: np.ndarray | None  # [B] int64, tokens of each row without padding; None: all are full


@dataclass(frozen=True)
class Chunks:
    """The chunks of a split as views of the token store: only `take` copies, and nothing is kept for each chunk."""

    ids: np.ndarray  # [N] unsigned, the whole store
    word_starts: np.ndarray  # [N] bool
    chunk_size: int
    num_chunks: int
    pad_id: int
    document_offsets: np.ndarray | None = None  # [n + 1] int64, row c is document c; None: it begins at c * chunk_size
    suffix: tuple[int, ...] = ()  # ids that end a document, kept at the end of a row whose document was cut
    pad_to_max_length: bool = False  # rows of chunk_size tokens even where all rows taken are shorter

    def __len__(self) -> int:
        return self.num_chunks

    def take(self, chunk_ids: np.ndarray) -> Rows:
        """chunk_ids [B] -> Rows [B, T]; T is the chunk size, or the longest of the rows if all are padded. Raises
        UserError where the store has been cut short meanwhile."""
        size = self.chunk_size
        for array in (self.ids, self.word_starts):
            check_mapped(array)
        full = self.num_chunks * size
        if self.document_offsets is None and full <= len(self.ids):  # a view, so that a gather is B copies of T tokens
            ids = self.ids[:full].reshape(-1, size)[chunk_ids].astype(np.int64)
            return Rows(ids, self.word_starts[:full].reshape(-1, size)[chunk_ids], None)

        first, rest = self._from(chunk_ids)  # [B]
        lengths = np.minimum(rest, size)
        column = np.arange(size if self.pad_to_max_length else lengths.max(initial=0))  # [T]
        inside = column < lengths[:, None]  # [B, T]
        index = np.minimum(first[:, None] + column, len(self.ids) - 1)
        ids = np.where(inside, self.ids[index], self.pad_id).astype(np.int64)
        word_starts = np.where(inside, self.word_starts[index], True)
        if self.suffix and (cut := rest > size).any():  # then T is the chunk size
            ids[cut, size - len(self.suffix) :] = self.suffix
            word_starts[cut, size - len(self.suffix) :] = True
        return Rows(ids, word_starts, lengths)

    def places(self, chunk_ids: np.ndarray, columns: np.ndarray | int) -> np.ndarray:
        """Where in the store the tokens at these columns [M] of the chunks [M] stand: [M] int64."""
        return self._from(chunk_ids)[0] + columns

    def lengths(self, chunk_ids: np.ndarray) -> np.ndarray:
        """Tokens of the rows [B] without padding: [B] int64."""
        return np.minimum(self._from(chunk_ids)[1], self.chunk_size)

    def _from(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows [B] begin in the store, and the tokens [B] from there to the end of their text."""
        if self.document_offsets is None:
            first = chunk_ids.astype(np.int64) * self.chunk_size
            return first, len(self.ids) - first
        check_mapped(self.document_offsets)
        first = self.document_offsets[chunk_ids]
        return first, self.document_offsets[chunk_ids + 1] - first

    def documents(self, chunk_ids: np.ndarray, document_offsets: np.ndarray) -> np.ndarray:
        """The documents [D] int64, ascending, that these chunks [B] contain tokens of."""
        first = self.places(chunk_ids, 0)
        last = first + self.lengths(chunk_ids) - 1
        begins, ends = np.searchsorted(document_offsets, [first, last], side="right") - 1  # [B]
        return np.unique(np.concatenate([np.arange(b, e + 1) for b, e in zip(begins, ends, strict=True)]))


class Mixture(NamedTuple):
    """The chunks of several sources, numbered on from one to the next."""

    sources: tuple[Chunks, ...]

    def locate(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sources [B] int64, by number, of these chunks [B], and their ids [B] there."""
        begins = [0, *accumulate(map(len, self.sources[:-1]))]
        source = np.searchsorted(begins, chunk_ids, side="right") - 1
        return source, chunk_ids - np.take(begins, source)

    def lengths(self, chunk_ids: np.ndarray) -> np.ndarray:
        """As `Chunks.lengths`."""
        source, ids_there = self.locate(chunk_ids)
        return np.choose(source, [own.lengths(ids_there.clip(max=len(own) - 1)) for own in self.sources])

    def take(self, chunk_ids: np.ndarray) -> Rows:
        """As `Chunks.take`; T is the longest of all rows."""
        if len(self.sources) == 1:
            return self.sources[0].take(chunk_ids)
        source, ids_there = self.locate(chunk_ids)
        own = [source == k for k, _ in enumerate(self.sources)]  # [B] bool each
        parts = [chunks.take(ids_there[o]) for chunks, o in zip(self.sources, own, strict=True)]
        shape = len(chunk_ids), max(part.ids.shape[1] for part in parts)
        rows = Rows(np.full(shape, self.sources[0].pad_id), np.ones(shape, bool), np.empty(shape[0], np.int64))
        for o, (ids, word_starts, lengths) in zip(own, parts, strict=True):
            rows.ids[o, : ids.shape[1]], rows.word_starts[o, : ids.shape[1]] = ids, word_starts
            rows.lengths[o] = ids.shape[1] if lengths is None else lengths
        return rows


def cut_into_chunks(store: TokenStore, config: ChunkConfig, chunk_size: int, info: TokenizerInfo) -> Chunks:
    """The chunks of a split by `config`. Raises UserError where there is none."""
    if config.line_by_line:
        chunks = line_by_line(store.ids, store.word_starts, store.document_offsets, chunk_size, info)
        kept = np.minimum(np.arange(len(store.document_lengths)), chunk_size) @ store.document_lengths
        lost = 1 - kept / max(len(store.ids), 1)
        if lost > MUCH:
            split = f"the {store.header['split']} split, from documents of more than {chunk_size} tokens"
            log.warning("--line_by_line leaves out %.0f%% of the tokens of %s (--max_seq_length)", 100 * lost, split)
    else:
        chunks = concatenate(store.ids, store.word_starts, chunk_size, info.pad_id, config.remainder)
    if len(store.ids) == 0:
        raise UserError(f"no document of the {store.header['split']} split has a token")
    if len(chunks) == 0:
        short = f"the {store.header['split']} split has {len(store.ids)} tokens, less than one chunk of {chunk_size}"
        raise UserError(f"{short}; use a shorter --max_seq_length, or --remainder pad")
    return dataclasses.replace(chunks, pad_to_max_length=config.pad_to_max_length)


def concatenate(
    ids: np.ndarray, word_starts: np.ndarray, chunk_size: int, pad_id: int, remainder: Literal["drop", "pad"]
) -> Chunks:
    """Cuts ids [N] into floor(N / T) chunks, or with "pad" into ceil(N / T), the last one padded."""
    full, rest = divmod(len(ids), chunk_size)
    return Chunks(ids, word_starts, chunk_size, full + (remainder == "pad" and rest > 0), pad_id)


def line_by_line(
    ids: np.ndarray, word_starts: np.ndarray, document_offsets: np.ndarray, chunk_size: int, info: TokenizerInfo
) -> Chunks:
    """One document per row. A document longer than T is cut, and still ends with the suffix ([SEP])."""
    suffix = info.suffix if len(info.suffix) < chunk_size else ()
    return Chunks(ids, word_starts, chunk_size, len(document_offsets) - 1, info.pad_id, document_offsets, suffix)
