"""Given words scored at a mask: the chain rule over their pieces, cut as the tokenizer cuts them there."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import BertConfig, BertForMaskedLM

from mlm.errors import UserError
from mlm.inference.fill_mask import fill
from mlm.inference.targets import Target, score_targets
from mlm.model.sparse_head import SparseMaskedLM
from tests.scripts import load_script
from tests.tokenizers_for_tests import byte_level_bpe, unigram, wordpiece

TEXTS = ["this is a great film, and the acting is good.", "unable and able, a boring film; great films"] * 5


def roberta_like():
    """Byte-level, with RoBERTa's mask token, which takes the blank before it."""
    tokenizer = byte_level_bpe(TEXTS, 330)
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    return tokenizer


TOKENIZERS = {
    "wordpiece": lambda: wordpiece(TEXTS),
    "byte-level": roberta_like,
    "byte-level, the blank left": lambda: byte_level_bpe(TEXTS, 330),
    "unigram": lambda: unigram(TEXTS),
}


def toy_model(tokenizer) -> SparseMaskedLM:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, max_position_embeddings=40, **size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SparseMaskedLM(BertForMaskedLM(config)).eval()


def at(model: SparseMaskedLM, row: list[int], position: int, token: int) -> float:
    """log p of one token, from the stock model, one sentence at a time."""
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([row])).logits
    return logits[0, position].log_softmax(dim=-1)[token].item()


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request):
    tokenizer = TOKENIZERS[request.param]()
    return toy_model(tokenizer), tokenizer


@pytest.mark.parametrize(
    ("kind", "sentence", "word", "pieces"),
    [
        ("wordpiece", "a great [MASK].", "film", ["film"]),
        ("wordpiece", "a great [MASK].", "Film", ["film"]),
        ("wordpiece", "great[MASK] and", "ly", ["##l", "##y"]),  # goes on the word that has begun
        ("wordpiece", "un[MASK] and", "able", ["able"]),  # "unable" would leave no "un": on its own
        ("wordpiece", "[MASK]s", "film", ["film"]),  # what comes after the mask stays as it is
        ("wordpiece", "a [MASK].", "so so", ["s", "##o", "s", "##o"]),
        ("byte-level", "a great [MASK].", "film", ["Ġfilm"]),
        ("byte-level", "[MASK] is good", "film", ["fi", "lm"]),  # no blank before it
        ("byte-level", "a great[MASK] is", "film", ["fi", "lm"]),
        ("byte-level", "[MASK] is a [MASK]", "great film", ["g", "reat", "Ġfilm"]),
        ("byte-level, the blank left", "a great [MASK].", "film", ["fi", "lm"]),  # behind a blank that is a token
        ("unigram", "a great [MASK].", "film", ["▁film"]),
        ("unigram", "[MASK] is good", "film", ["▁film"]),
    ],
)
def test_a_word_is_cut_as_it_is_in_the_place_of_the_mask(kind, sentence, word, pieces):
    tokenizer = TOKENIZERS[kind]()
    [[[target], *_]] = score_targets(toy_model(tokenizer), tokenizer, [sentence], [word])
    assert list(target.pieces) == pieces


@given(st.lists(st.sampled_from(["great", "film", "boring", "able", "zebra", "un"]), min_size=1, max_size=3))
def test_pieces_in_the_place_of_the_mask_read_as_the_sentence_with_the_word(pair, words):
    model, tokenizer = pair
    word = " ".join(words)
    for start in ("this is a ", ""):
        [[[target]]] = score_targets(model, tokenizer, [f"{start}[MASK]"], [word])
        masked = tokenizer(f"{start}{tokenizer.mask_token}")["input_ids"][1:-2]
        ids = masked + tokenizer.convert_tokens_to_ids(list(target.pieces))
        assert tokenizer.decode(ids).split() == f"{start}{word}".split()


def test_a_word_of_one_piece_has_the_probability_of_the_independent_filler(pair):
    """transformers' too: test_fill_mask compares the two."""
    model, tokenizer = pair
    sentences = ["this is a [MASK] film", "[MASK] and the [MASK]."]
    ranked = fill(model, tokenizer, sentences, top_k=len(tokenizer))
    for masks, fillers in zip(score_targets(model, tokenizer, sentences, ["great", "g"]), ranked, strict=True):
        for targets, ranking in zip(masks, fillers, strict=True):
            for target in targets:
                if len(target.pieces) == 1:
                    same = [f.probability for f in ranking if f.token == target.word]
                    assert any(math.exp(target.log_probability) == pytest.approx(p, rel=1e-4) for p in same)


def test_a_word_of_several_pieces_is_the_chain_over_them(pair):
    model, tokenizer = pair
    mask = tokenizer.mask_token_id
    [[_, [target]]] = score_targets(model, tokenizer, ["[MASK] is a [MASK] film"], ["zebrafilm"])
    assert len(target.pieces) >= 3
    pieces = tokenizer.convert_tokens_to_ids(list(target.pieces))
    masked = tokenizer(f"{tokenizer.mask_token} is a {tokenizer.mask_token} film")["input_ids"]
    place = [i for i, token in enumerate(masked) if token == mask][1]
    expected = 0.0
    for j, piece in enumerate(pieces):
        row = masked[:place] + pieces[:j] + [mask] * (len(pieces) - j) + masked[place + 1 :]
        expected += at(model, row, place + j, piece)
    assert target.log_probability == pytest.approx(expected, abs=1e-4)


def test_all_words_of_one_piece_share_one_distribution():
    tokenizer = wordpiece(TEXTS)
    model = toy_model(tokenizer)
    words = [w for w in tokenizer.get_vocab() if w.isalpha()]
    [[targets]] = score_targets(model, tokenizer, ["a [MASK]."], words)
    assert [target.word for target in targets] == words  # in the order given
    [[ranked]] = fill(model, tokenizer, ["a [MASK]."], len(tokenizer))
    expected = {filler.token: filler.probability for filler in ranked}
    found = {target.word: math.exp(target.log_probability) for target in targets}
    assert found == pytest.approx({word: expected[word] for word in words}, rel=1e-4)


def test_a_word_does_not_depend_on_the_other_words_and_sentences(pair):
    model, tokenizer = pair
    sentences = ["a [MASK] film", "[MASK]", "the [MASK] and the [MASK]"] * 15
    words = ["great", "zebra", "great zebra", "boring"]
    together = score_targets(model, tokenizer, sentences, words)
    for sentence, masks in zip(sentences[:3], together[-3:], strict=True):
        for i, word in enumerate(words):
            [alone] = score_targets(model, tokenizer, [sentence], [word])
            expected = [[target.log_probability for target in mask] for mask in alone]
            assert [mask[i].log_probability for mask in masks] == pytest.approx([p for [p] in expected], abs=1e-5)


def test_words_that_the_tokenizer_does_not_know_are_refused():
    tokenizer = wordpiece(TEXTS)
    model = toy_model(tokenizer)
    for word, reason in (("漢", r"makes \[UNK\]"), ("[SEP]", r"makes \[SEP\]"), ("\u200b", "is no text")):
        with pytest.raises(UserError, match=rf"--targets: {re.escape(repr(word))} .*{reason}"):
            score_targets(model, tokenizer, ["a [MASK]"], ["film", word])


def test_a_word_that_makes_a_sentence_too_long_is_refused():
    tokenizer = wordpiece(TEXTS)
    model = toy_model(tokenizer)
    sentence = " ".join(["a"] * 37) + " [MASK]"  # of the model's 40
    assert score_targets(model, tokenizer, [sentence], ["a"])
    with pytest.raises(UserError, match=r"is 41 tokens long, .* takes 40"):
        score_targets(model, tokenizer, [sentence], ["a a"])


def test_targets_are_written_as_in_a_csv_file():
    parse_targets = load_script("fill_mask").parse_targets
    assert parse_targets("good") == ["good"]
    assert parse_targets(' good, so so ,"1,000" , good,","') == ["good", "so so", "1,000", ","]
    for text in ("", " ", "good,", ",good", "good,,bad"):
        with pytest.raises(UserError, match=r"--targets .*expected words"):
            parse_targets(text)


def test_a_table_shows_the_pieces_of_words_that_have_several():
    cell = load_script("terminal").cell
    assert cell(Target("film", ("Ġfilm",), math.log(0.25))) == "   -1.39 nats  0.25      film"
    assert cell(Target("films", ("Ġfilm", "s"), -20.0)) == "  -20.00 nats  2.06e-09  films  = Ġfilm s"
