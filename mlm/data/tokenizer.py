"""Tokenizers, loaded or trained on the corpus, and what the other modules need to know of one."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlm.data import corpus
from mlm.data.cache import build_once, key
from mlm.data.corpus import CorpusConfig
from mlm.errors import UserError, explain_load_failure, one_line
from mlm.hub import local_files_only

# Placeholders that occur in no text: BERT's and ModernBERT's, Gemma's, fairseq's, CamemBERT's, ESM's.
UNUSED = re.compile(r"\[unused\d+\]|<unused\d+>|madeupword\d+|</?\w+>NOTUSED|<null_\d+>")


@dataclass(frozen=True)
class TokenizerInfo:
    """What masking, chunking and the model need to know of a tokenizer."""

    size: int  # the largest id + 1
    special: np.ndarray  # [size] bool, 1: a special token, padding and unknown included
    maskable: np.ndarray  # [size] bool, 1: may be masked, predicted and drawn: no special or unused token
    mask_id: int
    pad_id: int
    unknown_id: int | None  # None: every text can be written in the vocabulary (byte-level)
    prefix: tuple[int, ...]  # special ids that the tokenizer puts before a document, [CLS]
    suffix: tuple[int, ...]  # and after it, [SEP]
    has_words: bool  # a fast tokenizer; slow ones do not know the words that they split
    fingerprint: str  # changes with anything that changes ids or words


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by Hub name or folder. Raises UserError where it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=local_files_only(name)
        )
    except BaseException as error:
        if not _is_failure(error):
            raise
        if remedy := _remedy(name):
            raise UserError(f"{name} holds no tokenizer that can be loaded{remedy}") from error
        raise explain_load_failure("tokenizer", name, error) from error


@contextmanager
def explained(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Turns what fails inside a tokenizer into a UserError, panics of its Rust code too."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError) or not _is_failure(error):
            raise
        it, words = tokenizer.name_or_path or type(tokenizer).__name__, one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"the tokenizer {it} fails ({words}): choose another with --tokenizer_name") from error


def _is_failure(error: BaseException) -> bool:
    """A panic is no Exception, and its class cannot be imported."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _remedy(name: str) -> str:
    """What to do with a folder that has a vocabulary alone, as old checkpoints do."""
    if not Path(name, "vocab.txt").is_file() or Path(name, "tokenizer.json").is_file():
        return ""
    make = f"BertTokenizer(vocab='{name}/vocab.txt').save_pretrained('{name}')"
    return f'; if its vocab.txt is BERT\'s, make one: python -c "from transformers import BertTokenizer; {make}"'


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a lower-case WordPiece vocabulary like BERT's. Reads the documents twice.

    The same documents give the same vocabulary: the trainer breaks ties between equally frequent pairs by the
    ids of their characters, which it assigns in the order of a hash map, so they get their ids beforehand."""
    specials = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    engine = BertWordPieceTokenizer()
    starts, inside = set(), set()
    for text in documents:
        for word, _ in engine.pre_tokenizer.pre_tokenize_str(engine.normalizer.normalize_str(text)):
            starts.add(word[0])
            inside.update(word[1:])
    numbered = [*specials.values(), *sorted(starts), *(f"##{character}" for character in sorted(inside))]
    options = {"min_frequency": 0, "limit_alphabet": sys.maxsize, "show_progress": False}
    engine.train_from_iterator(documents, vocab_size, special_tokens=numbered, **options)
    engine = BertWordPieceTokenizer(engine.get_vocab())  # another one, in which letters are not special
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(engine.to_str()), **specials)


def corpus_tokenizer(source: CorpusConfig, vocab_size: int, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer trained on the corpus's training documents, kept in `folder` for later runs. Raises UserError
    where there are no training documents, or `folder` cannot be written."""
    corpus.keep_apart(source, "--token_store", folder)
    place = folder / f"tokenizer-{key([corpus.identify(source), vocab_size])}"
    found = partial(os.path.isdir, place)  # false where it cannot be looked for, which `build_once` explains
    if not found():
        read = corpus.load(source)
        if "train" not in read.splits:
            raise UserError("no text to learn a vocabulary from: give --train_file, or --tokenizer_name")
        build_once(place, found, lambda path: train_tokenizer(read.splits["train"], vocab_size).save_pretrained(path))
    return load_tokenizer(str(place))


def spell(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Tokens as text; as the vocabulary spells them where the text would be blank (a newline, say)."""
    spelt = (tokenizer.convert_ids_to_tokens(i) or f"id {i}" for i in ids)  # an embedding may have no token
    return tokenizer.decode(ids).strip() or " ".join(spelt)


def readable(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Tokens as text for a reader: unknown ones are shown, other special ones are not."""
    hidden = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return tokenizer.decode([int(token_id) for token_id in ids if token_id not in hidden])


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of a fast tokenizer's engine that does not truncate, and takes a literal `[MASK]` as text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def tokenizer_info(tokenizer: PreTrainedTokenizerBase) -> TokenizerInfo:
    """Raises UserError where the tokenizer has no mask token, or no token that may be masked."""
    name, mask_id, pad_id = tokenizer.name_or_path, tokenizer.mask_token_id, tokenizer.pad_token_id
    if mask_id is None:
        it = name or type(tokenizer).__name__
        raise UserError(f"the tokenizer {it} has no mask token: choose one that has with --tokenizer_name")
    with explained(tokenizer):
        vocabulary, (prefix, suffix) = tokenizer.get_vocab(), template(tokenizer)
    size = max(vocabulary.values()) + 1
    special, maskable = np.zeros(size, bool), np.zeros(size, bool)
    added = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
    special[tokenizer.all_special_ids + added] = True
    maskable[[token_id for token, token_id in vocabulary.items() if not UNUSED.fullmatch(token)]] = True
    maskable &= ~special
    if not maskable.any():
        raise UserError(f"the tokenizer {name} knows no token besides its special ones{_remedy(name)}")

    slow = [type(tokenizer).__name__, sorted(vocabulary.items())]
    engine = text_encoder(tokenizer).to_str() if tokenizer.is_fast else slow
    roles = [np.flatnonzero(special).tolist(), mask_id, pad_id]
    return TokenizerInfo(
        size=size,
        special=special,
        maskable=maskable,
        mask_id=mask_id,
        pad_id=mask_id if pad_id is None else pad_id,  # the attention mask hides it
        unknown_id=tokenizer.unk_token_id,
        prefix=prefix,
        suffix=suffix,
        has_words=tokenizer.is_fast,
        fingerprint=hashlib.sha256(json.dumps([engine, roles]).encode()).hexdigest(),
    )


def template(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special ids that the tokenizer puts before and after a text: ([CLS], [SEP]) of `[CLS] a [SEP]`."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    extra = len(full) - len(bare)
    start = next((i for i in range(extra + 1) if full[i : i + len(bare)] == bare), 0)
    return tuple(full[:start]), tuple(full[start + len(bare) :])
