"""Masks filled jointly: a wide beam is exhaustive search; ties and neighbours decide nothing."""

import itertools
import math

import pytest
import torch
from tqdm.utils import disp_len
from transformers import BertConfig, BertForMaskedLM

from mlm.data.tokenizer import train_tokenizer
from mlm.inference.fill_mask import fill
from mlm.model.sparse_head import SparseMaskedLM
from tests.scripts import load_script

script = load_script("fill_mask")
Filled, fill_jointly = script.Filled, script.fill_jointly
ORDERS = ["left_to_right", "confidence"]
SENTENCES = ["a [MASK] b [MASK]", "[MASK] [MASK] [MASK] d", "c a [MASK]", "[MASK] d d a [MASK] [MASK]"]


def letters(seed: int = 0):
    """A model of nine tokens, five of them special, that is sure of some fillers and not of others."""
    tokenizer = train_tokenizer(["a b c d"], 9)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), initializer_range=0.6, **size))
    return SparseMaskedLM(model).eval(), tokenizer


def at(net, row: list[int], position: int) -> torch.Tensor:
    """log p `[V]` of one token, from the stock model, one sentence at a time."""
    with torch.no_grad():
        return net(input_ids=torch.tensor([row])).logits[0, position].log_softmax(dim=-1)


def exhaustive(net, row: list[int], left: list[int], order: str) -> dict[tuple[int, ...], float]:
    """The joint log-probability of every way to fill the masks: {ids of the whole row: nats}."""
    if not left:
        return {tuple(row): 0.0}
    position = left[0]
    if order == "confidence":
        position = max(left, key=lambda p: at(net, row, p).max().item())
    found = {}
    for token, value in enumerate(at(net, row, position).tolist()):
        filled = [token if i == position else t for i, t in enumerate(row)]
        rest = exhaustive(net, filled, [p for p in left if p != position], order)
        found |= {ids: value + other for ids, other in rest.items()}
    return found


def every_way(model, tokenizer, sentence: str, order: str) -> dict[tuple[str, ...], float]:
    """The same: {fillers, from left to right: nats}."""
    row = tokenizer(sentence)["input_ids"]
    masks = [i for i, token in enumerate(row) if token == tokenizer.mask_token_id]
    found = exhaustive(model.model, row, masks, order)
    return {tuple(tokenizer.convert_ids_to_tokens([ids[i] for i in masks])): p for ids, p in found.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_a_beam_that_is_wide_enough_is_exhaustive_search(order):
    model, tokenizer = letters()
    ways = len(tokenizer) ** 3
    for sentence, found in zip(SENTENCES, fill_jointly(model, tokenizer, SENTENCES, order, ways), strict=True):
        expected = every_way(model, tokenizer, sentence, order)
        assert {filled.tokens: filled.log_probability for filled in found} == pytest.approx(expected, abs=1e-4)
        values = [filled.log_probability for filled in found]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_narrow_beam_goes_on_from_the_likeliest_beginnings(order, num_beams):
    """Mask by mask, by the exhaustive probabilities of sentences that are filled in part."""
    model, tokenizer = letters()
    net = model.model
    for sentence, found in zip(SENTENCES, fill_jointly(model, tokenizer, SENTENCES, order, num_beams), strict=True):
        row = tokenizer(sentence)["input_ids"]
        masks = [i for i, token in enumerate(row) if token == tokenizer.mask_token_id]
        beam = [(0.0, row, masks)]
        for _ in masks:
            grown = []
            for total, ids, left in beam:
                sure = left[:1] if order == "left_to_right" else left
                place = max(sure, key=lambda p: at(net, ids, p).max().item())
                for token, value in enumerate(at(net, ids, place).tolist()):
                    filled = [token if i == place else t for i, t in enumerate(ids)]
                    grown.append((total + value, filled, [p for p in left if p != place]))
            beam = sorted(grown, key=lambda way: -way[0])[:num_beams]
        expected = [tuple(tokenizer.convert_ids_to_tokens([ids[i] for i in masks])) for _, ids, _ in beam]
        assert [filled.tokens for filled in found] == expected
        assert [filled.log_probability for filled in found] == pytest.approx([p for p, _, _ in beam], abs=1e-4)


def test_the_surest_mask_is_filled_first_wherever_it_stands():
    model, tokenizer = letters(seed=1)
    net = model.model
    row = tokenizer("a [MASK] b [MASK]")["input_ids"]
    assert at(net, row, 4).max() > at(net, row, 2).max()  # the model is surer of the second mask
    likeliest_second = tokenizer.convert_ids_to_tokens(at(net, row, 4).argmax().item())
    [[found]] = fill_jointly(model, tokenizer, ["a [MASK] b [MASK]"], "confidence", 1)
    assert found.tokens[1] == likeliest_second
    by_order = [fill_jointly(model, tokenizer, SENTENCES[:1], order, 81)[0] for order in ORDERS]
    assert {f.tokens: f.log_probability for f in by_order[0]} != pytest.approx(
        {f.tokens: f.log_probability for f in by_order[1]}, abs=1e-2
    )


@pytest.mark.parametrize("order", ORDERS)
def test_of_equally_likely_fillers_the_lower_ids_come_first(order):
    """A model that knows nothing: every token is as likely as any other, every mask as sure."""
    model, tokenizer = letters()
    for parameter in model.model.cls.parameters():
        parameter.data.zero_()
    [found] = fill_jointly(model, tokenizer, ["a [MASK] b [MASK]"], order, 12)
    tokens = tokenizer.convert_ids_to_tokens(range(9))
    assert [filled.tokens for filled in found] == list(itertools.product(tokens, repeat=2))[:12]
    assert [filled.log_probability for filled in found] == pytest.approx([-2 * math.log(9)] * 12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_sentence_does_not_depend_on_the_other_sentences(order):
    model, tokenizer = letters()
    together = fill_jointly(model, tokenizer, SENTENCES * 15, order, 4)
    for sentence, found in zip(SENTENCES * 15, together, strict=True):
        [alone] = fill_jointly(model, tokenizer, [sentence], order, 4)
        assert [filled.tokens for filled in found] == [filled.tokens for filled in alone]
        expected = [filled.log_probability for filled in alone]
        assert [filled.log_probability for filled in found] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_one_mask_is_filled_as_independently(order):
    model, tokenizer = letters()
    [[independent]] = fill(model, tokenizer, ["c a [MASK]"], top_k=9)
    [jointly] = fill_jointly(model, tokenizer, ["c a [MASK]"], order, 9)
    assert [filled.tokens for filled in jointly] == [(filler.token,) for filler in independent]
    expected = [filler.probability for filler in independent]
    assert [math.exp(filled.log_probability) for filled in jointly] == pytest.approx(expected, abs=1e-6)


def test_a_filler_that_is_the_mask_token_fills_its_mask():
    """It is a token of the vocabulary, with a probability, like any other."""
    model, tokenizer = letters()
    model.model.cls.predictions.bias.data[tokenizer.mask_token_id] = 1000.0
    [[first, *_]] = fill_jointly(model, tokenizer, ["a [MASK] b [MASK]"], "left_to_right", 2)
    assert first.tokens == ("[MASK]", "[MASK]")
    assert first.text == "a [MASK] b [MASK]"


def test_the_text_is_the_sentence_filled_in():
    model, tokenizer = letters()
    for filled in fill_jointly(model, tokenizer, ["A [MASK] b [MASK]"], "confidence", 5)[0]:
        assert filled.text == f"a {filled.tokens[0]} b {filled.tokens[1]}"


def test_chinese_is_written_without_the_blanks_of_wordpiece():
    tokenizer = train_tokenizer(["房間很好"], 9)
    config = BertConfig(vocab_size=9, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    model = SparseMaskedLM(BertForMaskedLM(config))
    model.model.cls.predictions.bias.data[tokenizer.convert_tokens_to_ids("好")] = 1000.0
    assert fill_jointly(model, tokenizer, ["房間[MASK][MASK]"], "left_to_right", 1)[0][0].text == "房間好好"


def test_cells_show_sentences_where_all_fit_and_fillers_where_not():
    short, long = Filled("a b", ("b",), -1.5), Filled("a " + "b " * 30, ("b", "b"), -20.25)
    assert script.joint_cells([[short], [short]], 46) == [["   -1.50 nats  a b"]] * 2
    assert script.joint_cells([[short], [long]], 46) == [["   -1.50 nats  b"], ["  -20.25 nats  b … b"]]
    wide = Filled("房" * 16, ("房",), -1.0)
    [[cell]] = script.joint_cells([[wide]], 46)
    assert disp_len(cell) <= 46
    assert cell.endswith("  房")
