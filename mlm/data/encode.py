"""Documents to tokens: their ids, where their words begin, and the special tokens around them.

    documents        "owls, fox"                    "foxo"
    ids              [CLS]  owls  ,  fox  [SEP]     [CLS]  fox  ##o  [SEP]
    word_starts      1      1     1  1    1         1      1    0    1

Words are the tokenizer's own (`word_ids`); a special token counts as a word. A literal special token in a
document is text: a vocabulary that holds its special tokens as pieces gets `<s>` as `< s>`.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import TokenizerInfo, text_encoder


class Encoded(NamedTuple):
    """A batch of documents as one sequence of n tokens."""

    ids: np.ndarray  # [n] int64
    word_starts: np.ndarray  # [n] bool
    lengths: np.ndarray  # [documents] int64; documents without a token are left out


def encode_batches(
    batches: Iterator[list[str]], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[Encoded]:
    """Encodes batches in order; the tokenizer's threads encode the next one while Python unpacks this one."""
    if not tokenizer.is_fast:
        for batch in batches:
            yield _encode_slow(batch, tokenizer, info)
        return
    backend = text_encoder(tokenizer)
    with ThreadPoolExecutor(1) as ahead:
        tasks = ((batch, ahead.submit(backend.encode_batch, batch, add_special_tokens=False)) for batch in batches)
        for (batch, task), _ in itertools.pairwise(itertools.chain(tasks, [None])):
            yield _unpack(batch, task.result(), backend, info)


def encode_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[np.ndarray]:
    """The ids `[n]` int64 of each text as the token store holds a document; `[0]` for one without tokens."""
    for encoded in encode_batches(([text] for text in texts), tokenizer, info):
        yield encoded.ids


def _unpack(batch: list[str], encodings: list[Encoding], backend: Tokenizer, info: TokenizerInfo) -> Encoded:
    ids = _flat(e.ids for e in encodings)
    if info.special[ids[ids != info.unknown_id]].any():
        # A vocabulary can hold its special tokens as pieces (XLM-R's does) and so find them in text.
        encodings = [_as_text(text, e, backend, info) for text, e in zip(batch, encodings, strict=True)]
        ids = _flat(e.ids for e in encodings)
    word_starts = np.diff(_flat(e.word_ids for e in encodings), prepend=-1) != 0
    return _close_documents(ids, word_starts, np.array([len(e) for e in encodings]), info)


def _flat(rows: Iterable[list[int]]) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int64)


def _as_text(text: str, encoding: Encoding, backend: Tokenizer, info: TokenizerInfo) -> Encoding:
    """Encodes a document again with each literal special token broken up, so that it is text."""
    where = [
        span
        for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)
        if info.special[token_id] and token_id != info.unknown_id
    ]
    for start, end in reversed(where):
        text = text[:start] + _broken(text[start:end]) + text[end:]
    return backend.encode(text, add_special_tokens=False) if where else encoding


def _broken(literal: str) -> str:
    """`< s>` for `<s>`; a special token of a single character is left out."""
    return f"{literal[0]} {literal[1:]}" if len(literal) > 1 else " "


def _encode_slow(batch: list[str], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo) -> Encoded:
    """With a slow tokenizer, which knows no words: every token counts as one."""
    literal = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens))
    batch = [literal.sub(lambda match: _broken(match[0]), text) for text in batch]
    rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    ids = _flat(rows)
    return _close_documents(ids, np.ones(len(ids), bool), np.array([len(row) for row in rows]), info)


def _close_documents(ids: np.ndarray, word_starts: np.ndarray, lengths: np.ndarray, info: TokenizerInfo) -> Encoded:
    """Puts the special tokens around each document that has tokens, and a word start at its first token."""
    lengths = lengths[lengths > 0]
    ends = np.cumsum(lengths)
    word_starts[ends - lengths] = True
    # Where one document ends and the next begins, the suffix of the one comes before the prefix of the other.
    place = np.concatenate([np.repeat(ends, len(info.suffix)), np.repeat(ends - lengths, len(info.prefix))])
    added = np.array((*info.suffix * len(lengths), *info.prefix * len(lengths)), np.int64)
    lengths = lengths + len(info.prefix) + len(info.suffix)
    return Encoded(np.insert(ids, place, added), np.insert(word_starts, place, True), lengths)
