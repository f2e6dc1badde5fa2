"""Small tokenizers of the three kinds, and token stores built with them."""

import sys
from itertools import pairwise

import pytest
from hypothesis import settings
from transformers.models.esm.tokenization_esm import EsmTokenizer

from mlm.data.encode import Encoder
from mlm.data.shards import tokenise
from mlm.data.token_store import open_store, write
from mlm.data.tokenizer import tokenizer_info
from tests.tokenizers_for_tests import byte_level_bpe, unigram, wordpiece

SPACES = [character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()]

TEXTS = ["the old fox likes grapes, unlikely", "the young owl likes mice!", "don't be unlike a fox"] * 5

TOKENIZERS = {kind.__name__: kind(TEXTS) for kind in (wordpiece, byte_level_bpe, unigram)}

few = settings(max_examples=40, deadline=None)  # each builds a store on a disk that others use, too

kinds = pytest.mark.parametrize("kind", TOKENIZERS)


def documents_of(store):
    """[(ids, word_starts)] of the documents in a store, as lists."""
    spans = pairwise(store.document_offsets)
    return [(store.ids[a:b].tolist(), store.word_starts[a:b].tolist()) for a, b in spans]


def build(texts, tokenizer, info, folder, origin):
    """The store of `texts`, made without shards; texts without a token (of control characters, say) are left out."""
    write(tokenise(texts, Encoder(tokenizer, info)), info, folder, origin)
    return open_store(folder, info.fingerprint)


def built(texts, tokenizer, folder):
    return build(texts, tokenizer, tokenizer_info(tokenizer), folder, {"split": "train"})


def slow_tokenizer(folder):
    tokens = ["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "G", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    return EsmTokenizer(str(folder / "vocab.txt"))


CHINESE = ["这家酒店的房间很干净服务也很好下次还会再来住", "早餐的种类不多而且味道一般但是位置非常方便"] * 9
