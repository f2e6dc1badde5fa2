"""Documents to tokens: their ids, where their words begin, and the special tokens around them.

    documents        "owls, fox"                    "foxo"
    ids              [CLS]  owls  ,  fox  [SEP]     [CLS]  fox  ##o  [SEP]
    word_starts      1      1     1  1    1         1      1    0    1

Words are the tokenizer's own (`word_ids`); a special token counts as a word. A literal special token in a
document is text: a vocabulary that holds its special tokens as pieces gets `<s>` as `< s>`. Long documents
come in pieces (pieces.py), which need not be in one batch.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from mlm.data.pieces import PIECE, Encode, cut
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


def pieces(text: str, encode: Encode) -> Iterator[Piece]:
    """A document as pieces to encode one after the other, most documents as one; `encode` is from `piece_encoder`."""
    return iter([(text, True)]) if len(text) <= PIECE else cut(text, encode)


def piece_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """For all documents of a corpus: making it copies the tokenizer, 0.4 s with 250,000 tokens in the vocabulary."""
    backend = text_encoder(tokenizer) if tokenizer.is_fast else None

    def encode(part: str) -> tuple[list[int], list[bool]]:
        with explained(tokenizer):
            if backend is None:
                tokens = _encode_slow([part], tokenizer)
            else:
                tokens = _unpack([backend.encode(part, add_special_tokens=False)])
        return tokens.ids.tolist(), tokens.word_starts.tolist()

    return encode


def encode_batches(
    batches: Iterator[list[Piece]], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[Encoded]:
    """Encodes batches of `pieces` in order."""
    begun = False  # whether the next piece goes on with a document that has tokens
    for batch, tokens in (_fast if tokenizer.is_fast else _slow)(batches, tokenizer, info):
        encoded, begun = _close_documents(tokens, np.array([last for _, last in batch]), info, begun)
        yield encoded


def encode_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[np.ndarray]:
    """The ids `[n]` int64 of each text as the token store holds a document; `[0]` for one without tokens."""
    for encoded in encode_batches(([(text, True)] for text in texts), tokenizer, info):
        yield encoded.ids


def _fast(
    batches: Iterator[list[Piece]], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[tuple[list[Piece], Tokens]]:
    """The tokenizer's threads encode the next batch while Python unpacks this one."""
    backend = text_encoder(tokenizer)

    def encode(batch: list[Piece]) -> list[Encoding]:
        return backend.encode_batch([text for text, _ in batch], add_special_tokens=False)

    with ThreadPoolExecutor(1) as ahead:
        tasks = ((batch, ahead.submit(encode, batch)) for batch in batches)
        for (batch, task), _ in itertools.pairwise(itertools.chain(tasks, [None])):
            with explained(tokenizer):
                tokens = _unpack(task.result())
            if info.special[tokens.ids[tokens.ids != info.unknown_id]].any():
                # A vocabulary can hold its special tokens as pieces (XLM-R's does) and so find them in text.
                pairs = zip(batch, task.result(), strict=True)
                tokens = _unpack([_as_text(text, found, backend, info) for (text, _), found in pairs])
            yield batch, tokens


def _slow(
    batches: Iterator[list[Piece]], tokenizer: PreTrainedTokenizerBase, info: TokenizerInfo
) -> Iterator[tuple[list[Piece], Tokens]]:
    for batch in batches:
        with explained(tokenizer):
            tokens = _encode_slow([text for text, _ in batch], tokenizer)
        yield batch, tokens


def _unpack(encodings: list[Encoding]) -> Tokens:
    ids, words = _flat(e.ids for e in encodings), _flat(e.word_ids for e in encodings)
    return Tokens(ids, np.diff(words, prepend=-1) != 0, np.array([len(e) for e in encodings]))


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
    begun: whether the first piece goes on with a document that has tokens; the same of the next piece is returned
    """
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
