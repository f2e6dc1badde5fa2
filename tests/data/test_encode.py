"""Claims about encoding: which ids and words a document has in the token store (invariants 6 and 7)."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from tokenizers.normalizers import Prepend, Replace, Sequence
from transformers import PreTrainedTokenizerFast
from xxhash import xxh3_128_digest

from mlm.data import encode, pieces, shards, token_store
from mlm.data.encode import Encoder
from mlm.data.tokenizer import tokenizer_info
from tests.conftest import REPOSITORY
from tests.data.stores import SPACES, TEXTS, TOKENIZERS, build, built, documents_of, few, kinds, slow_tokenizer
from tests.oracles import tokens_of
from tests.tokenizers_for_tests import wordpiece

INFO = tokenizer_info(TOKENIZERS["wordpiece"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder that the examples of one hypothesis test may write to one after the other."""
    return tmp_path_factory.mktemp("scratch")


def test_an_example_to_check_by_eye(tmp_path):
    tokenizer = wordpiece(["owls", "fox"] * 9)
    store = built(["owls, fox", "\x00", "foxo"], tokenizer, tmp_path)
    # fmt: off
    expected = ["[CLS]", "owls", ",", "fox", "[SEP]", "[CLS]", "fox", "##o", "[SEP]"]
    starts   = [      1,      1,   1,     1,       1,       1,     1,     0,       1]
    # fmt: on
    assert tokenizer.convert_ids_to_tokens(store.ids.tolist()) == expected
    assert store.word_starts.astype(int).tolist() == starts
    assert store.document_offsets.tolist() == [0, 5, 9]
    header = {name: store.header[name] for name in ("documents", "tokens", "words", "maskable_tokens")}
    assert header == {"documents": 2, "tokens": 9, "words": 4, "maskable_tokens": 5}
    assert store.mean_word == 5 / 4


sentences = st.lists(st.sampled_from([*" .,'!\n\t", "fox", "unlikely", "Grapes", "don't", "中", "é", "ＡＢ"])).map(
    "".join
)

texts = st.lists(st.one_of(sentences, st.text(max_size=20)), max_size=6)


@kinds
@few
@given(texts=texts)
def test_tokens_and_words_are_those_of_the_tokenizer_called_on_each_document(kind, texts, scratch):
    tokenizer = TOKENIZERS[kind]
    store = built(texts, tokenizer, scratch)
    inner = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = [tokens_of(tokenizer, text) for text, ids in zip(texts, inner, strict=True) if ids]
    assert documents_of(store) == expected
    for ids, starts in documents_of(store):
        assert starts[0], "the special token before the text"
        assert starts[1], "no word runs on from the document before"
        assert starts[-1], "the special token after the text"
        assert len(ids) > 2


@few
@given(texts=texts)
def test_decoding_the_store_gives_the_documents_back(texts, scratch):
    tokenizer = TOKENIZERS["byte_level_bpe"]
    store = built(texts, tokenizer, scratch)
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in documents_of(store)]
    assert decoded == [text for text in texts if text]


@few
@given(texts=st.lists(st.text(alphabet=["a", "é", "中", *SPACES], min_size=1), min_size=1, max_size=9))
@example(texts=["x".join(SPACES)])
def test_characters_words_and_digests_are_those_of_the_texts_in_any_batches(texts):
    """`split` is the slow oracle of the words between white space."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BATCH_DOCUMENTS", 2)
        parts = list(shards.tokenise(texts, Encoder(TOKENIZERS["wordpiece"], INFO)))
    assert len(parts) == (len(texts) + 1) // 2
    counts = dict(zip(shards.COUNTS, sum(part.counts for part in parts), strict=True))
    assert counts["characters"] == sum(map(len, texts))
    assert counts["spaced_words"] == sum(len(text.split()) for text in texts)
    digests = b"".join(part.digests.tobytes() for part in parts)
    assert digests == b"".join(xxh3_128_digest(text.encode()) for text in texts)


@few
@given(texts=st.lists(st.text(alphabet=["a", "é", " ", "\u3000", "\n"], max_size=9), max_size=4))
def test_words_between_white_space_are_counted_alike_in_parts_of_any_size(texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BATCH_CHARACTERS", 3)  # bytes of a part, too
        parts = list(shards.tokenise(texts, Encoder(TOKENIZERS["wordpiece"], INFO)))
    spaced = sum(part.counts[shards.COUNTS.index("spaced_words")] for part in parts)
    assert spaced == sum(len(text.split()) for text in texts)


LITERALS = ["[MASK]", "[SEP]", "[CLS]", "[PAD]", "[UNK]", "<s>", "</s>", "<mask>", "<pad>", "<unk>"]

# NFKC maps these to the literals.
FULLWIDTH = [text.translate({code: code + 0xFEE0 for code in range(33, 127)}) for text in LITERALS]

hostile = st.lists(st.sampled_from([*LITERALS, *FULLWIDTH, *"<s>[] /", "mask", "fox"])).map("".join)


@kinds
@few
@given(texts=st.lists(hostile, max_size=4))
@example(texts=["fox [MASK] owl[SEP]</s> <s> <mask> <pad>"])
@example(texts=["＜s＞", "a＜mask＞b ＜/s＞<s><s>", "<<s>s>"])
def test_a_literal_special_token_in_a_document_is_text(kind, texts, scratch):
    tokenizer = TOKENIZERS[kind]
    info = tokenizer_info(tokenizer)
    for ids, starts in documents_of(built(texts, tokenizer, scratch)):
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert not {token for token in ids[1:-1] if info.special[token]} - {info.unknown_id}
        assert starts[1]


@kinds
def test_the_letters_of_a_literal_special_token_are_kept(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    for number, literal in enumerate(["[MASK]", "</s>", "<mask>"]):
        ((ids, _),) = documents_of(built([f"fox {literal} owl"], tokenizer, tmp_path / str(number)))
        text = tokenizer.decode(ids[1:-1])
        if kind == "byte_level_bpe":  # the others lose case or spaces
            assert text == f"fox {literal} owl"
        assert text.replace(" ", "").lower() == f"fox{literal}owl".lower()


def test_a_special_token_that_is_a_single_character_never_comes_out_of_text(tmp_path):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "#": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    backend.normalizer = Replace(Regex(r"\s"), "")
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="#")
    assert built(["ab#ba", "#"], tokenizer, tmp_path).ids.tolist() == [2, 3, 3, 2]


def test_a_slow_tokenizer_takes_literal_special_tokens_as_text(tmp_path):
    tokenizer = slow_tokenizer(tmp_path)
    store = built(["LAG <mask> L", "GAL<eos>"], tokenizer, tmp_path / "store")
    info = tokenizer_info(tokenizer)
    for ids, _ in documents_of(store):
        assert not {token for token in ids[1:-1] if info.special[token]} - {info.unknown_id}


def test_several_special_tokens_around_a_document(tmp_path):
    tokenizer = wordpiece(TEXTS)
    specials = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[PAD]", "[SEP]")]
    for number, template in enumerate(["[CLS] [PAD] $A", "$A [SEP] [PAD] [SEP]", "$A"]):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=specials
        )
        store = built(["the old", "unlike foxes"], tokenizer, tmp_path / str(number))
        assert documents_of(store) == [tokens_of(tokenizer, text) for text in ("the old", "unlike foxes")]


@kinds
def test_long_documents_are_whole_and_nobody_is_warned(kind, tmp_path, recwarn, caplog, capfd):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer", model_max_length=8)
    info = tokenizer_info(tokenizer)
    tokenizer(TEXTS[0], truncation=True)  # leaves its backend set to truncate
    capfd.readouterr()
    text = " ".join(TEXTS)
    store = build([text], tokenizer, info, tmp_path / "store", {"split": "train"})
    whole = len(TOKENIZERS[kind](text)["input_ids"])
    assert len(store.ids) == whole > 100
    assert (len(recwarn), caplog.text, capfd.readouterr()) == (0, "", ("", ""))


def long_document(seed, characters):
    """Words, numbers and punctuation with all kinds of white space between them, a hundred letters in a row, literal
    special tokens, Chinese, and characters that tokenizers make one of."""
    draw = random.Random(seed)
    parts = [
        *" ".join(TEXTS[:3]).split(),
        *LITERALS,
        "e\u0301",
        "ﬁ",
        "家酒店的房间很干净。",
        "3.14",
        "don't",
        "x" * 99,
    ]
    text = ""
    while len(text) < characters:
        text += draw.choice(parts) + draw.choice(
            ["", " ", " ", " ", "  ", "\n", "\n\n", "\t", " \u0301", "\u3000", ", ", ". "]
        )
    return text


def llama_like(texts):
    """A tokenizer that puts a space before a text in any case, also where there is one."""
    tokenizer = TOKENIZERS["unigram"]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>", cls_token="<s>")


LONG = {**TOKENIZERS, "llama-like": llama_like(TEXTS)}


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of some hundred characters, so that many are needed; gives their number."""
    counts = []

    def counted(text, encoder):
        found = list(whole(text, encoder))
        counts.append(len(found))
        return iter(found)

    whole = pieces.cut
    monkeypatch.setattr(pieces, "PIECE", 600)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 1500)
    monkeypatch.setattr(shards, "cut", counted)
    return counts


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("seed", range(3))
def test_a_long_document_in_pieces_has_the_tokens_and_words_of_the_whole(
    kind, seed, tmp_path, short_pieces, monkeypatch
):
    texts = ["fox", long_document(seed, 8000), "", "\x00" * 5000, long_document(seed + 10, 3000), "owl"]
    parts = built(texts, LONG[kind], tmp_path / "parts")
    assert short_pieces[1] > 8
    assert short_pieces[4] > 1
    monkeypatch.undo()
    whole = built(texts, LONG[kind], tmp_path / "whole")
    for array in token_store.ARRAYS:
        assert np.array_equal(getattr(parts, array), getattr(whole, array)), array
    timeless = dict.fromkeys(("seconds", "seal"), 0)
    assert parts.header | timeless == whole.header | timeless


@pytest.mark.parametrize("documents", [1, 4])
def test_the_tokenizer_is_copied_as_often_for_one_long_document_as_for_many(
    documents, tmp_path, short_pieces, monkeypatch
):
    copies, copy = [], encode.text_encoder
    monkeypatch.setattr(encode, "text_encoder", lambda tokenizer: copies.append(1) or copy(tokenizer))
    built([long_document(0, 2000)] * documents, TOKENIZERS["wordpiece"], tmp_path)
    assert len(short_pieces) == documents and min(short_pieces) > 1
    assert len(copies) == 1


def test_a_slow_tokenizer_takes_long_documents_in_pieces_too(tmp_path, short_pieces, monkeypatch):
    tokenizer = slow_tokenizer(tmp_path)
    texts = ["LAG " * 1000, "GA<mask>L"]
    parts = built(texts, tokenizer, tmp_path / "parts")
    assert short_pieces[0] > 5
    monkeypatch.undo()
    assert documents_of(built(texts, tokenizer, tmp_path / "whole")) == documents_of(parts)


def test_a_long_document_without_a_place_to_cut_is_one_piece(tmp_path, short_pieces):
    ((ids, _),) = documents_of(built(["fox" * 2000], TOKENIZERS["byte_level_bpe"], tmp_path))
    assert short_pieces == [1]
    assert TOKENIZERS["byte_level_bpe"].decode(ids, skip_special_tokens=True) == "fox" * 2000


MEMORY = """
import resource, sys
from pathlib import Path
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from tests.data.stores import build
tokenizer = load_tokenizer(sys.argv[1])
info, line = tokenizer_info(tokenizer), "the old fox likes grapes, unlikely 12345. "
build([line * 100], tokenizer, info, Path(sys.argv[2], "small"), {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build([line * (int(sys.argv[3]) // len(line))], tokenizer, info, Path(sys.argv[2], "large"), {})
unit = 1 if sys.platform == "darwin" else 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


@pytest.mark.parametrize(
    "characters", [5 * 10**6, pytest.param(3 * 10**8, marks=pytest.mark.torture)], ids=["5 MB", "300 MB"]
)
def test_memory_does_not_grow_with_the_tokens_of_a_document(characters, tmp_path):
    """It held 200 bytes for each of its characters; now a few of its own, and a batch's tokens."""
    TOKENIZERS["wordpiece"].save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "tokenizer"), str(tmp_path), str(characters)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout)
    assert grown < 500e6 + 3 * characters
