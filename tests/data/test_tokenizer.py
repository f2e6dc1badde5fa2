"""Claims about tokenizers: which ids are special, unused or missing (invariant 6)."""

import copy
import json
import os
import shlex
import stat
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.esm.configuration_esm import get_default_vocab_list
from transformers.models.esm.tokenization_esm import EsmTokenizer

from mlm.data import corpus
from mlm.data.corpus import CorpusConfig
from mlm.data.tokenizer import (
    corpus_tokenizer,
    load_tokenizer,
    readable,
    text_encoder,
    tokenizer_info,
    train_tokenizer,
)
from mlm.errors import UserError
from tests.data.stores import build
from tests.tokenizers_for_tests import byte_level_bpe, unigram, wordpiece

TEXTS = ["the old fox likes grapes", "the young owl likes mice", "a small unlikely fox"] * 5
KINDS = [wordpiece, byte_level_bpe, unigram]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def word_level(vocabulary, **roles):
    """A vocabulary taken as it is: each whitespace-separated word is a token."""
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]", **roles)


def test_an_example_to_check_by_eye():
    names = ["[PAD]", "[UNK]", "[MASK]", "fox", "##es", "[unused0]", "owl", None, "mice"]  # no token has id 7
    vocabulary = {name: token_id for token_id, name in enumerate(names) if name}
    info = tokenizer_info(word_level(vocabulary, pad_token="[PAD]"))
    assert info.size == 9
    assert info.special.astype(int).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert info.maskable.astype(int).tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 1]
    assert (info.mask_id, info.pad_id, info.unknown_id) == (2, 0, 1)
    assert (info.prefix, info.suffix) == ((), ())
    assert info.has_words


@kinds
def test_all_special_tokens_are_special_and_none_is_maskable(kind):
    tokenizer = kind(TEXTS)
    info = tokenizer_info(tokenizer)
    names = [tokenizer.convert_ids_to_tokens(int(token_id)) for token_id in np.flatnonzero(info.special)]
    if kind is wordpiece:
        assert names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    else:
        assert names == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert not (info.special & info.maskable).any()
    assert info.maskable.sum() == len(tokenizer) - 5


@kinds
def test_prefix_and_suffix_are_what_the_tokenizer_puts_around_a_text(kind):
    tokenizer = kind(TEXTS)
    info = tokenizer_info(tokenizer)
    assert info.prefix == (tokenizer.cls_token_id,)
    assert info.suffix == (tokenizer.sep_token_id,)


def test_special_tokens_that_a_user_added_are_special():
    tokenizer = wordpiece(TEXTS)
    learnt = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[DOSE]"]})
    tokenizer.add_tokens([AddedToken("[DRUG]", special=True), AddedToken("aspirin")])
    info = tokenizer_info(tokenizer)
    for name, special in (("[DOSE]", True), ("[DRUG]", True), ("aspirin", False)):
        token_id = tokenizer.convert_tokens_to_ids(name)
        assert token_id >= learnt
        assert info.special[token_id] == special
        assert info.maskable[token_id] != special


PLACEHOLDERS = ["[unused5]", "[unused993]", "<unused7>", "madeupword0002", "</s>NOTUSED", "<null_1>"]


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_placeholders_are_not_maskable(placeholder):
    vocabulary = {"[UNK]": 0, "[MASK]": 1, "fox": 2, placeholder: 3, f"{placeholder}s": 4}
    assert tokenizer_info(word_level(vocabulary)).maskable.tolist() == [False, False, True, False, True]


def test_esms_amino_acids_are_maskable_and_its_placeholder_is_not(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(get_default_vocab_list()))
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"))
    maskable = tokenizer.convert_ids_to_tokens(np.flatnonzero(tokenizer_info(tokenizer).maskable).tolist())
    assert maskable == [*"LAGVSERTIDPKQNFYMHWCXBUZO.-"]


def test_a_tokenizer_without_padding_pads_with_a_token_that_is_never_drawn():
    info = tokenizer_info(word_level({"[UNK]": 0, "[MASK]": 1, "fox": 2}))
    assert info.special[info.pad_id]


def test_a_tokenizer_without_a_mask_token_is_refused():
    tokenizer = wordpiece(TEXTS)
    tokenizer.mask_token = None
    with pytest.raises(UserError, match=r"no mask token.*--tokenizer_name"):
        tokenizer_info(tokenizer)


def test_a_tokenizer_of_special_tokens_alone_is_refused():
    with pytest.raises(UserError, match="no token besides its special ones"):
        tokenizer_info(word_level({"[UNK]": 0, "[MASK]": 1}))


@kinds
def test_the_fingerprint_survives_saving_and_calls(kind, tmp_path):
    tokenizer = kind(TEXTS)
    fingerprint = tokenizer_info(tokenizer).fingerprint
    tokenizer("the old fox", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_info(tokenizer).fingerprint == fingerprint
    for place in ("here", "there"):
        tokenizer.save_pretrained(tmp_path / place)
        loaded = load_tokenizer(str(tmp_path / place))
        assert tokenizer_info(loaded).fingerprint == fingerprint


def test_the_fingerprint_changes_with_whatever_changes_ids():
    tokenizer = wordpiece(TEXTS)
    added, special, bare = (copy.deepcopy(tokenizer) for _ in range(3))
    assert tokenizer_info(bare).fingerprint == tokenizer_info(tokenizer).fingerprint
    added.add_tokens(["aspirin"])
    special.add_tokens([AddedToken("aspirin", special=True)])
    bare.backend_tokenizer.post_processor = None
    several = [tokenizer, added, special, bare, wordpiece([*TEXTS, "beekeeper " * 9])]
    fingerprints = {tokenizer_info(one).fingerprint for one in several}
    assert len(fingerprints) == len(several)


def test_a_slow_tokenizer_has_no_words(tmp_path):
    tokens = ["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "G", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    info = tokenizer_info(EsmTokenizer(str(tmp_path / "vocab.txt")))
    assert not info.has_words
    assert np.flatnonzero(info.maskable).tolist() == [4, 5, 6]
    assert (info.prefix, info.suffix, info.mask_id, info.pad_id) == ((0,), (2,), 7, 1)


def test_the_text_encoder_leaves_the_tokenizer_as_it_is():
    tokenizer = wordpiece(TEXTS)
    tokenizer("the old fox", truncation=True, max_length=3)
    encoder = text_encoder(tokenizer)
    long = "the old fox [MASK] grapes"
    assert tokenizer.mask_token_id not in encoder.encode(long).ids
    assert len(encoder.encode(long).ids) > 3
    assert tokenizer.mask_token_id in tokenizer(long)["input_ids"]


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(UserError) as error:
            load_tokenizer(name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [None, {"model_type": "bert"}, {"model_type": "roberta"}], ids=str)
def test_a_folder_with_vocab_txt_alone_is_a_line_with_a_command_that_helps(tmp_path, config):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "##es"]))
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        info = tokenizer_info(load_tokenizer(str(tmp_path)))
    except UserError as error:
        _, _, command = str(error).partition("if its vocab.txt is BERT's, make one: ")
        [python, *rest] = shlex.split(command)
        assert python == "python"
        subprocess.run([sys.executable, *rest], check=True, capture_output=True)
        info = tokenizer_info(load_tokenizer(str(tmp_path)))
    assert np.flatnonzero(info.maskable).tolist() == [5, 6]


def test_a_tokenizer_that_panics_is_one_line(tmp_path):
    state = json.loads(word_level({"[UNK]": 0, "[MASK]": 1, "fox": 2}).backend_tokenizer.to_str())
    # A table of characters that points nowhere: the Rust code panics at any text.
    state["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8A"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"^the tokenizer {tmp_path} fails \(PanicException: .*--tokenizer_name$"):
        tokenizer_info(load_tokenizer(str(tmp_path)))


def test_a_tokenizer_that_fails_on_a_document_is_one_line(tmp_path):
    backend = Tokenizer(models.WordPiece({"[MASK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]")
    info = tokenizer_info(tokenizer)
    assert build(["a"], tokenizer, info, tmp_path / "known", {}).ids.tolist() == [1]
    with pytest.raises(UserError, match=r"^the tokenizer .* fails \(.*Missing \[UNK\].*--tokenizer_name$"):
        build(["b"], tokenizer, info, tmp_path / "unknown", {})


def test_a_reader_sees_unknown_tokens_and_no_other_special_ones():
    tokenizer = wordpiece(TEXTS)
    ids = np.array(tokenizer("the ж fox")["input_ids"], np.uint16)
    assert readable(tokenizer, ids) == "the [UNK] fox"
    assert readable(tokenizer, ids[:2]) == "the"


def test_code_of_a_tokenizer_runs_only_when_asked_for(tmp_path):
    wordpiece(TEXTS).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(UserError, match=f"^{tmp_path} brings code of its own.*--trust_remote_code true"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_vocabulary_is_learnt_to_the_size_asked_for():
    words = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnrst"]
    tokenizer = train_tokenizer(words, 120)
    assert len(tokenizer) == tokenizer_info(tokenizer).size == 120
    assert tokenizer.decode(tokenizer("BAL fer")["input_ids"], skip_special_tokens=True) == "bal fer"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{text} number {number}\n" for number, text in enumerate(TEXTS * 5)))
    return CorpusConfig(train_file=str(path), validation_file=str(path), allow_leaks=True)


def kept(folder):
    """The folders of the tokenizers that are kept; beside each lies its lock file."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_corpus_has_its_vocabulary_learnt_once(source, tmp_path, monkeypatch):
    folder = tmp_path / "stores"
    first = corpus_tokenizer(source, 90, folder)
    assert len(first) == 90
    (place,) = kept(folder)
    before = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    with monkeypatch.context() as patch:
        patch.delattr(corpus, "load")
        second = corpus_tokenizer(source, 90, folder)
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == before
    assert tokenizer_info(second).fingerprint == tokenizer_info(first).fingerprint

    assert len(corpus_tokenizer(source, 80, folder)) == 80, "another size is another vocabulary"
    os.utime(source.train_file, (0, 0))
    corpus_tokenizer(source, 90, folder)
    assert len(kept(folder)) == 3, "so is that of another corpus"


def test_colleagues_can_read_a_vocabulary_that_was_kept(source, tmp_path):
    folder = tmp_path / "stores"
    folder.mkdir()
    corpus_tokenizer(source, 90, folder)
    (place,) = kept(folder)
    assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode)


def test_a_corpus_with_nothing_to_train_on_teaches_no_vocabulary(source, tmp_path):
    with pytest.raises(UserError, match="--train_file"):
        corpus_tokenizer(CorpusConfig(validation_file=source.validation_file), 90, tmp_path / "stores")


def test_a_folder_that_cannot_be_written_is_one_line(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--token_store .*file/store"):
        corpus_tokenizer(source, 90, tmp_path / "file" / "store")
    with pytest.raises(UserError, match=r"^--token_store .*: cannot write there \(File name too long"):
        corpus_tokenizer(source, 90, tmp_path / ("x" * 300))


def test_the_same_documents_give_the_same_vocabulary():
    """Every pair of letters below is equally frequent, so that only the order of ties decides."""
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh"]
    trained = {train_tokenizer(words, 120).backend_tokenizer.to_str() for _ in range(5)}
    assert len(trained) == 1
