"""Pseudo-perplexity: the slow way of masking one token after the other, whatever the batches."""

import json
import math
import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForMaskedLM

from mlm.errors import UserError
from mlm.model.load import ModelConfig
from mlm.model.sparse_head import SparseMaskedLM
from tests.conftest import REPOSITORY
from tests.runs import ONE, TWO, run
from tests.scripts import load_script
from tests.tokenizers_for_tests import byte_level_bpe, unigram, wordpiece

script = load_script("evaluate")
SCRIPT = str(REPOSITORY / "scripts" / "evaluate.py")
Scores, score = script.Scores, script.score
TEXTS = ["the old cat likes milk every day", "a young fox, a small bee"] * 5
SENTENCES = [
    "the old cat likes milk every day",
    "a fox",
    "the cat likes honey, milk, bees",
    "x",
    "a small fox",
    "the [MASK] and the </s> are text",
]


def toy_model(tokenizer) -> SparseMaskedLM:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, max_position_embeddings=48, **size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SparseMaskedLM(BertForMaskedLM(config))


def scores_of(model, tokenizer, sentences, batch_size=32) -> Scores:
    numbered = dict(enumerate(sentences, start=1))
    return score(model, tokenizer, numbered, batch_size, Accelerator(cpu=True))


def slow(net, ids: list[int], special: set[int], mask: int) -> tuple[float, int]:
    """(PLL, tokens) of one sentence, one masked copy at a time, by the stock model."""
    total, tokens = 0.0, 0
    for place, token in enumerate(ids):
        if token in special:
            continue
        copy = [mask if i == place else t for i, t in enumerate(ids)]
        with torch.no_grad():
            logits = net.eval()(input_ids=torch.tensor([copy])).logits[0, place]
        total += logits.double().log_softmax(dim=-1)[token].item()
        tokens += 1
    return total, tokens


@pytest.mark.parametrize("kind", [wordpiece, byte_level_bpe, unigram])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_scores_are_those_of_one_masked_copy_at_a_time(kind, batch_size):
    tokenizer = kind(TEXTS)
    model = toy_model(tokenizer)
    found = scores_of(model, tokenizer, SENTENCES[:-1], batch_size)
    for sentence, nats, tokens in zip(SENTENCES, found.log_likelihoods, found.tokens, strict=False):
        ids = tokenizer(sentence)["input_ids"]
        expected = slow(model.model, ids, set(tokenizer.all_special_ids), tokenizer.mask_token_id)
        assert (nats, tokens) == (pytest.approx(expected[0], abs=1e-4), expected[1])


def test_a_sentence_does_not_depend_on_the_other_sentences():
    tokenizer = wordpiece(TEXTS)
    model = toy_model(tokenizer)
    together = scores_of(model, tokenizer, SENTENCES * 3)
    alone = [scores_of(model, tokenizer, [sentence]).log_likelihoods[0] for sentence in SENTENCES * 3]
    np.testing.assert_allclose(together.log_likelihoods, alone, rtol=1e-5)


def test_special_tokens_in_a_sentence_are_text():
    tokenizer = wordpiece(TEXTS)
    found = scores_of(toy_model(tokenizer), tokenizer, ["the [MASK] likes [SEP]", "the likes"])
    pieces = [len(tokenizer(text)["input_ids"]) - 2 for text in ("the", "likes", "[", "mask", "sep", "]")]
    assert found.tokens[0] == sum(pieces) + pieces[2] + pieces[5]
    assert found.tokens[1] == pieces[0] + pieces[1]


def test_unknown_tokens_are_told_and_not_scored():
    tokenizer = wordpiece(TEXTS)
    model = toy_model(tokenizer)
    found = scores_of(model, tokenizer, ["the 漢 cat", "漢", "\u200b."])
    assert found.unknown.tolist() == [1, 1, 0]
    ids = tokenizer("the 漢 cat")["input_ids"]
    special = set(tokenizer.all_special_ids)
    expected, tokens = slow(model.model, ids, special, tokenizer.mask_token_id)
    assert found.log_likelihoods[0] == pytest.approx(expected, abs=1e-4)
    assert found.tokens.tolist() == [tokens, 0, 1]
    assert found.log_likelihoods[1] == 0
    assert math.isnan(found.summary()["bits_per_character"]), "half of the tokens are unknown"


def test_totals_are_over_the_tokens_characters_and_words_of_all_sentences():
    tokenizer = wordpiece(TEXTS)
    sentences = ["the old cat", " a  fox ", "x"]
    found = scores_of(toy_model(tokenizer), tokenizer, sentences)
    total = -found.log_likelihoods.sum()
    summary = found.summary()
    assert summary["pseudo_perplexity"] == pytest.approx(math.exp(total / found.tokens.sum()))
    assert summary["bits_per_character"] == pytest.approx(total / math.log(2) / (11 + 6 + 1))
    assert summary["bits_per_word"] == pytest.approx(total / math.log(2) / (3 + 2 + 1))
    few = Scores(*(np.array([value]) for value in (-300.0, 299, 1, 1200, 200)))
    cost = 4 * math.log2(154_998)  # of the one unknown token, for four characters
    assert few.summary()["bits_per_character"] == pytest.approx((300 / math.log(2) + cost) / 1200)
    empty = Scores(*(np.array([value]) for value in (0.0, 0, 1, 2, 1)))
    assert math.isnan(empty.summary()["pseudo_perplexity"])
    hopeless = Scores(*(np.array([value]) for value in (-1e5, 1, 0, 2, 1)))
    assert hopeless.summary()["pseudo_perplexity"] == math.inf


def test_the_model_stays_in_its_mode_and_draws_nothing():
    tokenizer = wordpiece(TEXTS)
    model = toy_model(tokenizer).train()
    before = torch.get_rng_state()
    first, second = (scores_of(model, tokenizer, SENTENCES).log_likelihoods for _ in range(2))
    assert first.tolist() == second.tolist()  # no dropout
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def measured(toy, file) -> dict:
    models = {"model": ModelConfig(model_name_or_path=str(toy.checkpoint))}
    return script.measure_file(str(file), models, 3, Accelerator(cpu=True))


def test_a_sentence_that_is_too_long_is_named_by_its_line(toy, tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("the old cat\n\n" + "milk " * 80 + "\n")
    with pytest.raises(UserError, match=r"line 3 \('milk .*…'\) is 82 tokens long, .* takes 64"):
        measured(toy, file)


def test_a_line_is_printed_for_each_sentence_and_one_for_the_total(toy, tmp_path, capsys):
    file = tmp_path / "sentences.txt"
    file.write_text(
        "the old cat likes milk every day .\n\n  \nthe young fox likes grapes . " + "every day " * 10 + "\n"
    )
    found = measured(toy, file)
    assert [sentence["line"] for sentence in found["sentences"]] == [1, 4]
    assert found["tokens"] == sum(sentence["tokens"] for sentence in found["sentences"])
    total = sum(sentence["pseudo_log_likelihood"] for sentence in found["sentences"])
    assert found["pseudo_log_likelihood"] == pytest.approx(total)
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert max(map(len, (head, first, second))) == 100
    assert first.split()[:2] == ["1", str(found["sentences"][0]["tokens"])]
    assert first.endswith("  the old cat likes milk every day .")
    assert second.endswith("…")
    assert last.startswith(f"pseudo-perplexity {found['pseudo_perplexity']:.4g} over {found['tokens']} tokens")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the sentences (No such file or directory)"),
        (b"", "no sentence in it"),
        (b" \n\n\t\n", "no sentence in it"),
        (b"caf\xe9\n", "not UTF-8 text"),
    ],
)
def test_a_file_without_sentences_is_refused(content, words, toy, tmp_path):
    file = tmp_path / "sentences.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        measured(toy, file)
    assert str(refused.value).startswith(f"{file}: ")
    assert words in str(refused.value)


@pytest.fixture
def standard_input(tmp_path):
    """Holds the sentences."""
    before = os.dup(0)
    (tmp_path / "input").write_text("\n".join(SENTENCES))
    with open(tmp_path / "input") as file:
        os.dup2(file.fileno(), 0)
    yield
    os.dup2(before, 0)
    os.close(before)


def test_two_models_are_scored_side_by_side(toy, tmp_path, standard_input, capsys):
    kept = tmp_path / "found.json"
    flags = ["--model_name_or_path", str(toy.checkpoint), "--compare", str(toy.checkpoint)]
    flags += ["--pseudo_perplexity", "-", "--output", str(kept)]
    found = script.main(flags)
    assert found["base"] == {name: value for name, value in found.items() if name != "base"}
    assert json.loads(kept.read_text()) == found
    assert capsys.readouterr().out.count(f"{toy.checkpoint}:\n") == 2


@pytest.mark.slow
def test_two_processes_share_the_sentences_and_one_speaks(toy, tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_text("\n".join(SENTENCES))
    flags = ["--model_name_or_path", str(toy.checkpoint), "--pseudo_perplexity", str(file)]
    flags += ["--per_device_eval_batch_size", "3"]
    expected = measured(toy, file)
    status, output, errors = run(TWO, flags, SCRIPT)
    assert status == 0, errors
    *_, total, last = output.splitlines()
    assert len(output.splitlines()) == 1 + len(SENTENCES) + 2
    assert total.startswith("pseudo-perplexity ")
    found = json.loads(last)
    assert found["pseudo_perplexity"] == pytest.approx(expected["pseudo_perplexity"], rel=1e-6)
    assert [s["tokens"] for s in found["sentences"]] == [s["tokens"] for s in expected["sentences"]]


def test_a_mistake_ends_the_script_with_one_line_and_status_2(toy, tmp_path):
    flags = ["--model_name_or_path", str(toy.checkpoint), "--pseudo_perplexity", "-"]
    assert run(ONE, flags, SCRIPT) == (2, "", "error: standard input: no sentence in it; write one on each line\n")
