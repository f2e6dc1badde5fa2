"""Documents to tokens: their ids, where their words begin, and the special tokens around them.

    documents        "owls, fox"                    "foxo"
    ids              [CLS]  owls  ,  fox  [SEP]     [CLS]  fox  ##o  [SEP]
    word_starts      1      1     1  1    1         1      1    0    1

Words are the tokenizer's own (`word_ids`); a special token counts as a word. A literal special token in a
document is text: a vocabulary that holds its special tokens as pieces gets `<s>` as `< s>`. Long documents
come in pieces (pieces.py), which need not be in one batch."""

import itertools
import re
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from mlm.data.tokenizer import TokenizerInfo, explained, text_encoder

Piece = tuple[str, bool]  # text, and whether its document ends with it


class Encoded(NamedTuple):
    """A batch of documents, or of parts of them, as one sequence of n tokens."""

    ids: np.ndarray  # [n] int64
    word_starts: np.ndarray  # [n] bool
    ends: np.ndarray  # int64, where in it documents end; those without a token are left out


class Tokens(NamedTuple):
    """The n tokens of P pieces, without special tokens."""

    ids: np.ndarray  # [n] int64
    word_starts: np.ndarray  # [n] bool
    lengths: np.ndarray  # [P] int64


class Encoder:
    """Encodes with one copy of a tokenizer, for all documents: making it takes 0.4 s with 250,000 tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo) -> None:
        self.tokenizer, self.info = tokenizer, info
        self.backend = text_encoder(tokenizer) if tokenizer.is_fast else None

    def part(self, text: str) -> tuple[list[int], list[bool]]:
        """The ids and word starts of a part of a document, as `cut` needs them."""
        with explained(self.tokenizer):
            tokens = _unpack(self._encode([text]))
        return tokens.ids.tolist(), tokens.word_starts.tolist()

    def batches(self, batches: Iterator[list[Piece]]) -> Iterator[Encoded]:
        """Encodes batches in order; the tokenizer's threads one while Python unpacks the one before."""
        begun = False  # whether the next piece goes on with a document that has tokens
        with ThreadPoolExecutor(1) as ahead:
            tasks = ((batch, ahead.submit(self._encode, [text for text, _ in batch])) for batch in batches)
            for (batch, task), _ in itertools.pairwise(itertools.chain(tasks, [None])):
                with explained(self.tokenizer):
                    tokens = _unpack(task.result())
                if self.backend and (self.info.special[tokens.ids] & (tokens.ids != self.info.unknown_id)).any():
                    # A vocabulary can hold its special tokens as pieces (XLM-R's does) and so find them in text.
                    pairs = zip(batch, task.result(), strict=True)
                    tokens = _unpack([_as_text(text, found, self.backend, self.info) for (text, _), found in pairs])
                encoded, begun = _close_documents(tokens, np.array([last for _, last in batch]), self.info, begun)
                yield encoded

    def _encode(self, texts: list[str]) -> list[Encoding] | Tokens:
        if self.backend is None:
            return _encode_slow(texts, self.tokenizer)
        return self.backend.encode_batch(texts, add_special_tokens=False)


def encode_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[np.ndarray]:
    """The ids `[n]` int64 of each text as the token store holds a document; `[0]` for one without tokens."""
    return (encoded.ids for encoded in Encoder(tokenizer, info).batches([(text, True)] for text in texts))


def _unpack(encodings: list[Encoding] | Tokens) -> Tokens:
    if isinstance(encodings, Tokens):
        return encodings
    ids, words = _flat(e.ids for e in encodings), _flat(e.word_ids for e in encodings)
    return Tokens(ids, np.append(True, words[1:] != words[:-1])[: len(ids)], np.array([len(e) for e in encodings]))


def _flat(rows: Iterable[list[int]]) -> np.ndarray:
    return np.frombuffer(b"".join(array("Q", row) for row in rows), np.int64)  # "q" and NumPy take lists slowly


def _as_text(text: str, encoding: Encoding, backend: Tokenizer, info: TokenizerInfo) -> Encoding:
    """Encodes a document again with each literal special token broken up, so that it is text."""
    found = zip(encoding.ids, encoding.offsets, strict=True)
    where = [span for token_id, span in found if info.special[token_id] and token_id != info.unknown_id]
    for start, end in reversed(where):
        text = text[:start] + _broken(text[start:end]) + text[end:]
    return backend.encode(text, add_special_tokens=False) if where else encoding


def _broken(literal: str) -> str:
    """`< s>` for `<s>`; a special token of a single character is left out."""
    return f"{literal[0]} {literal[1:]}" if len(literal) > 1 else " "


def _encode_slow(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """With a slow tokenizer, which knows no words: every token counts as one."""
    literal = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens))
    texts = [literal.sub(lambda match: _broken(match[0]), text) for text in texts]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = _flat(rows)
    return Tokens(ids, np.ones(len(ids), bool), np.array([len(row) for row in rows]))


def _close_documents(tokens: Tokens, last: np.ndarray, info: TokenizerInfo, begun: bool) -> tuple[Encoded, bool]:
    """Puts the special tokens around each document that has tokens, and a word start at each piece's first token.

    last:  [P] bool, 1: the piece is its document's last
    begun: whether the first piece goes on with a document that has tokens; the same of the next piece is returned"""
    ids, word_starts, lengths = tokens
    after = np.cumsum(lengths)  # [P]
    word_starts[(after - lengths)[lengths > 0]] = True
    stops = np.append(after[last], len(ids))  # [D] where documents end, the last of which may go on
    begins = np.append(0, stops[:-1])
    filled = begins < stops
    opens, closes = filled.copy(), filled.copy()
    opens[0] &= not begun
    closes[0] |= begun
    closes[-1] = False
    # Where one document ends and the next begins, the suffix of the one comes before the prefix of the other.
    place = np.concatenate([np.repeat(stops[closes], len(info.suffix)), np.repeat(begins[opens], len(info.prefix))])
    added = np.array((*info.suffix * closes.sum(), *info.prefix * opens.sum()), np.int64)
    ends = stops + len(info.prefix) * np.cumsum(opens) + len(info.suffix) * np.cumsum(closes)
    goes_on = bool(filled[-1] or (len(stops) == 1 and begun))
    return Encoded(np.insert(ids, place, added), np.insert(word_starts, place, True), ends[closes]), goes_on
