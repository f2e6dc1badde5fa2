"""Filling masks: the numbers of the stock pipeline, either spelling of a mask, one line for every mistake."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.utils import disp_len
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    ConvBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    pipeline,
)

from mlm.data.tokenizer import load_tokenizer, train_tokenizer
from mlm.errors import UserError
from mlm.inference.fill_mask import Filler, fill, load
from mlm.inference.targets import Target, score_targets
from mlm.model.load import ModelConfig, load_trained
from tests.runs import ONE, run
from tests.scripts import load_script
from tests.tokenizers_for_tests import wordpiece

script, terminal = load_script("fill_mask"), load_script("terminal")
ROOT = Path(__file__).parents[2]
TINY_CHECKPOINT = ROOT.parent / "shared/data/models/bert-tiny-wikitext"
TEXTS = [
    "This is a great film, and the acting is good.",
    "This was a boring movie; the ending was worse than the acting.",
    "A wonderful story, told with great care by a good director.",
]
SENTENCES = ["This is a great [MASK].", "A [MASK] story", "The [MASK] was [MASK] than the acting.", "[MASK]"]
TOY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
}


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: `<mask>` takes the blank before it, words carry theirs."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def save_toy(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(config)
        for parameter in model.parameters():  # far enough from uniform that no two tokens tie
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    tokenizer = train_tokenizer(TEXTS * 3, 120)
    config = BertConfig(vocab_size=len(tokenizer), **TOY)
    return save_toy(tmp_path_factory.mktemp("toys") / "bert", config, tokenizer)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """Its embedding table has five rows more than the tokenizer has tokens, as padded tables have."""
    tokenizer = byte_level_tokenizer()
    config = RobertaConfig(vocab_size=len(tokenizer) + 5, pad_token_id=tokenizer.pad_token_id, **TOY)
    return save_toy(tmp_path_factory.mktemp("toys") / "roberta", config, tokenizer)


@pytest.fixture(scope="module")
def convbert(tmp_path_factory) -> Path:
    tokenizer = train_tokenizer(TEXTS * 3, 120)
    config = ConvBertConfig(vocab_size=len(tokenizer), embedding_size=16, conv_kernel_size=3, **TOY)
    return save_toy(tmp_path_factory.mktemp("toys") / "convbert", config, tokenizer)


@pytest.fixture
def answer() -> Callable[..., dict]:
    """The script's `main`, in this process."""
    main = script.main
    return lambda *argv: main([str(word) for word in argv])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launched(*argv: object) -> tuple[int, str, str]:
    """Its exit status, standard output and standard error."""
    return run(ONE, [*map(str, argv)], str(ROOT / "scripts" / "fill_mask.py"))


def oracle(folder: Path, sentence: str, top_k: int) -> list[list[Filler]]:
    """What the stock pipeline fills in: `[mask][rank]`."""
    stock = pipeline("fill-mask", str(folder), device="cpu")
    masks = stock(sentence.replace("[MASK]", stock.tokenizer.mask_token), top_k=top_k)
    masks = masks if isinstance(masks[0], list) else [masks]
    return [[Filler(filler["token_str"], filler["score"]) for filler in mask] for mask in masks]


def assert_same(found: list[list[list[Filler]]], expected: list[list[list[Filler]]]) -> None:
    """Equal tokens and probabilities, where blanks around a token do not count."""
    for masks, expected_masks in zip(found, expected, strict=True):
        for fillers, expected_fillers in zip(masks, expected_masks, strict=True):
            for filler, other in zip(fillers, expected_fillers, strict=True):
                assert filler.probability == pytest.approx(other.probability, abs=1e-5)
                assert filler.token == other.token.strip() or not other.token.strip()


@pytest.mark.parametrize("kind", ["bert", "roberta", "convbert"])
def test_fillers_are_those_of_the_stock_pipeline(kind, request):
    folder = request.getfixturevalue(kind)
    found = fill(*load(str(folder)), SENTENCES, top_k=20)
    assert_same(found, [oracle(folder, sentence, top_k=20) for sentence in SENTENCES])


@pytest.mark.skipif(not TINY_CHECKPOINT.is_dir(), reason=f"needs {TINY_CHECKPOINT}")
def test_fillers_of_a_trained_checkpoint_are_those_of_the_stock_pipeline():
    found = fill(*load(str(TINY_CHECKPOINT)), SENTENCES, top_k=10)
    assert_same(found, [oracle(TINY_CHECKPOINT, sentence, top_k=10) for sentence in SENTENCES])


def test_the_whole_vocabulary_is_ranked_and_sums_to_one(bert):
    model, tokenizer = load(str(bert))
    [[ranked]] = fill(model, tokenizer, ["A [MASK] story"], top_k=len(tokenizer))
    probabilities = [filler.probability for filler in ranked]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert {filler.token for filler in ranked} == set(tokenizer.get_vocab())


def test_fillers_do_not_depend_on_the_other_sentences(convbert):
    model, tokenizer = load(str(convbert))  # its convolutions would look into padding
    together = fill(model, tokenizer, SENTENCES * 20, top_k=5)
    assert_same(together, [fill(model, tokenizer, [sentence], top_k=5)[0] for sentence in SENTENCES * 20])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_literal_mask_is_the_mask_token_of_the_tokenizer(kind, request):
    model, tokenizer = load(str(request.getfixturevalue(kind)))
    own = [sentence.replace("[MASK]", tokenizer.mask_token) for sentence in SENTENCES]
    assert fill(model, tokenizer, SENTENCES, top_k=5) == fill(model, tokenizer, own, top_k=5)


def test_every_token_has_a_spelling_without_blanks_around_it(roberta):
    model, tokenizer = load(str(roberta))
    [[ranked]] = fill(model, tokenizer, ["A [MASK]"], top_k=len(tokenizer) + 5)
    tokens = [filler.token for filler in ranked]
    assert all(token and token == token.strip() for token in tokens)
    assert {"great", "Ġ", "Ċ", f"id {len(tokenizer)}"} <= set(tokens)  # a word, a blank, a newline, no token


def test_the_model_stays_in_its_mode(bert):
    model, tokenizer = load(str(bert))
    for training in (True, False):
        model.train(training)
        fill(model, tokenizer, ["A [MASK] story"], top_k=1)
        assert {module.training for module in model.modules()} == {training}


def test_dropout_is_off(bert):
    model, tokenizer = load(str(bert))
    model.train()
    assert fill(model, tokenizer, SENTENCES, 5) == fill(model, tokenizer, SENTENCES, 5)


def test_a_sentence_without_a_mask_is_named(bert):
    with pytest.raises(UserError, match=r"sentence 2 \('No gaps here\.'\) has no mask: write \[MASK\]"):
        fill(*load(str(bert)), ["A [MASK] story", "No gaps\nhere."], 5)


@pytest.mark.parametrize(("kind", "longest"), [("bert", 24), ("roberta", 22)])
def test_a_sentence_that_is_too_long_is_refused_with_both_figures(kind, longest, request):
    model, tokenizer = load(str(request.getfixturevalue(kind)))
    fits = "[MASK]" * (longest - 2)
    assert len(fill(model, tokenizer, [fits], 1)[0]) == longest - 2
    with pytest.raises(UserError, match=rf"sentence 1 .* is {longest + 1} tokens long, .* takes {longest}:"):
        fill(model, tokenizer, [fits + "[MASK]"], 1)


def test_a_tokenizer_without_a_mask_token_is_refused(bert):
    model, tokenizer = load(str(bert))
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="has no mask token"):
        fill(model, tokenizer, SENTENCES, 5)


def test_a_tokenizer_larger_than_the_model_is_refused(bert, tmp_path):
    tokenizer = load_tokenizer(str(bert))
    config = ModelConfig(model_name_or_path=str(bert))
    load_trained(config, tokenizer, "cpu")
    rows = len(tokenizer)
    tokenizer.add_tokens(["cinematography"])
    with pytest.raises(UserError, match=rf"ids go up to {rows}, the model's embedding table has {rows} rows"):
        load_trained(config, tokenizer, "cpu")

    AutoModelForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="embedding table"):
        load(str(tmp_path))


def test_top_k_is_between_one_and_the_vocabulary(bert):
    model, tokenizer = load(str(bert))
    with pytest.raises(UserError, match=r"--top_k 0: at least 1"):
        script.FillMaskConfig(top_k=0)
    with pytest.raises(UserError, match=rf"--top_k 500: the model's vocabulary has {len(tokenizer)} tokens"):
        fill(model, tokenizer, SENTENCES, 500)


names = st.text(st.characters(codec="ascii", categories=["L", "P"]), min_size=1, max_size=120)
ESCAPE = "\x1b]0;owned\x07\x9b2J"  # names the terminal's window, and clears it


@pytest.mark.parametrize("order", [None, "left_to_right"])
def test_escapes_in_sentences_and_in_tokens_are_shown_and_not_sent(order, tmp_path, capsys):
    tokenizer = wordpiece(["the old cat", "\u202e"] * 3, 60)
    vocabulary = {**tokenizer.get_vocab(), ESCAPE: len(tokenizer)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        **{f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")},
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), **size))
    model.cls.predictions.bias.data[vocabulary[ESCAPE]] = 20.0  # the likeliest filler
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), f"the {ESCAPE} [MASK] \u202e"]
    script.main(flags + ([] if order is None else ["--order", order]))
    printed = capsys.readouterr().out
    assert printed.count("\\x1b]0;owned\\x07\\x9b2J") >= 2, "in the sentence and as a filler"
    assert "\\u202e" in printed
    assert not set(printed) & set("\x1b\x07\x9b\u202e")


fillers = st.builds(Filler, st.text(st.sampled_from("aé酒店ｗ"), min_size=1, max_size=60), st.floats(0, 1))


@given(names, names, st.lists(st.tuples(fillers, fillers), min_size=1, max_size=3))
def test_tables_are_aligned_in_a_hundred_columns(base, adapted, pairs):
    left, right = zip(*pairs, strict=True)
    _, head, *rows = terminal.table("A [MASK].", [base, adapted], [[list(left)], [list(right)]]).splitlines()
    assert all(disp_len(line) <= 100 for line in [head, *rows])
    for row, (_, filler) in zip(rows, pairs, strict=True):
        start = next(i for i in range(len(row)) if disp_len(row[:i]) == 54)
        assert row[start:].startswith(f"{filler.probability:.4f}  {filler.token[:10]}")


def test_of_a_long_model_name_the_end_is_shown():
    name = "/runs/" + "of-many-parameters/" * 10 + "step_500"
    fillers = [[Filler("film", 0.5)]]
    assert terminal.table("A [MASK].", [name, name], [fillers, fillers]).splitlines()[1].count("/step_500") == 2


def test_compare_puts_the_base_first(bert, roberta, answer, capsys):
    # RoBERTa's spelling of a mask is one to BERT too.
    result = answer("--model_name_or_path", bert, "--compare", roberta, "--top_k", 2, "A <mask> or [MASK].")
    sentence = "A [MASK] or [MASK]."
    for key, folder in (("sentences", bert), ("base", roberta)):
        [record] = result[key]
        found = [[Filler(**filler) for filler in mask] for mask in record["masks"]]
        assert record["text"] == "A <mask> or [MASK]."
        assert found == fill(*load(str(folder)), [sentence], 2)[0]
    text, head, first_mask, row, *_ = capsys.readouterr().out.splitlines()
    assert text == "A <mask> or [MASK]."
    assert head.index("/roberta") < head.index("/bert")
    assert first_mask == "  mask 1"
    base, adapted = (result[key][0]["masks"][0][0] for key in ("base", "sentences"))
    assert row.split() == [
        f"{base['probability']:.4f}",
        base["token"],
        f"{adapted['probability']:.4f}",
        adapted["token"],
    ]


def test_a_checkpoint_can_be_compared_with_itself(bert, answer):
    result = answer("--model_name_or_path", bert, "--compare", bert, *SENTENCES)
    assert result["sentences"] == result["base"]


def test_the_script_needs_a_model_and_a_sentence(bert, answer):
    with pytest.raises(UserError, match="--model_name_or_path"):
        answer("A [MASK] story")
    with pytest.raises(UserError, match="no sentence"):
        answer("--model_name_or_path", bert)
    with pytest.raises(UserError, match="no such folder"):
        answer("--model_name_or_path", "./nowhere", "A [MASK] story")


def test_targets_and_joint_fillings_of_two_models_stand_side_by_side(bert, roberta, answer, capsys):
    models = ["--model_name_or_path", bert, "--compare", roberta]
    sentences = ["The [MASK] was <mask>.", "A <mask> story"]
    result = answer(*models, "--targets", "great,so so", *sentences)
    for key, folder in (("sentences", bert), ("base", roberta)):
        model, tokenizer = load(str(folder))
        own = [sentence.replace("<mask>", "[MASK]") for sentence in sentences]
        expected = score_targets(model, tokenizer, own, ["great", "so so"])
        assert [record["text"] for record in result[key]] == sentences
        assert [[[Target(**t) for t in mask] for mask in r["targets"]] for r in result[key]] == expected
    assert capsys.readouterr().out.count("great") == 2 * 3

    result = answer(*models, "--order", "confidence", "--num_beams", 7, "--top_k", 3, *sentences)
    for key, folder in (("sentences", bert), ("base", roberta)):
        expected = script.fill_jointly(*load(str(folder)), own, "confidence", 7)
        found = [[script.Filled(**filled) for filled in record["filled"]] for record in result[key]]
        assert found == [ways[:3] for ways in expected]
    lines = capsys.readouterr().out.splitlines()
    assert all(disp_len(line) <= 100 for line in lines)
    assert sum(line.count(" nats  ") for line in lines) == 2 * 2 * 3


def test_a_narrow_beam_shows_as_many_as_it_keeps(bert, answer):
    result = answer("--model_name_or_path", bert, "--order", "left_to_right", "--num_beams", 2, "A [MASK]")
    assert len(result["sentences"][0]["filled"]) == 2


def test_sentences_come_from_a_file(bert, answer, tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_bytes("\ufeffA [MASK] story\r\n\n  [MASK] is good\n\n".encode())
    result = answer("--model_name_or_path", bert, "--sentences_file", file)
    assert [record["text"] for record in result["sentences"]] == ["A [MASK] story", "  [MASK] is good"]
    assert result == answer("--model_name_or_path", bert, "A [MASK] story", "  [MASK] is good")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sentences_file", "none.txt"], r"^none.txt: cannot read the sentences \(No such file"),
        (["--sentences_file", "none.txt", "A [MASK]"], "sentences twice"),
        (["--num_beams", "3", "A [MASK]"], "--num_beams.*--order"),
        (["--num_beams", "0", "--order", "confidence", "A [MASK]"], "--num_beams 0: at least 1"),
        (["--targets", "a,b", "--order", "confidence", "A [MASK]"], "--targets.*--order confidence"),
        (["--targets", "a,,b", "A [MASK]"], "--targets 'a,,b'"),
        (["--targets", "漢", "A [MASK]"], r"--targets: '漢' is no word that .* could predict.*\[UNK\]"),
        (["--targets", "a", "No gaps."], "has no mask"),
        (["--order", "left_to_right", "No gaps."], "has no mask"),
        (["--order", "random", "A [MASK]"], "--order: 'random' is not independent|left_to_right|confidence"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words, bert, answer):
    with pytest.raises(UserError, match=words):
        answer("--model_name_or_path", bert, *flags)


def test_the_script_ends_with_one_json_object(bert):
    status, output, errors = launched("--model_name_or_path", bert, "--top_k", 3, *SENTENCES)
    assert status == 0, errors
    assert output.startswith(SENTENCES[0])
    result = json.loads(output.splitlines()[-1])
    assert list(result) == ["sentences"]
    assert [record["text"] for record in result["sentences"]] == SENTENCES
    assert [len(record["masks"]) for record in result["sentences"]] == [1, 1, 2, 1]
    found = [[[Filler(**f) for f in mask] for mask in r["masks"]] for r in result["sentences"]]
    assert_same(found, fill(*load(str(bert)), SENTENCES, 3))


def test_a_mistake_ends_the_script_with_one_line_and_status_2(bert):
    status, output, errors = launched("--model_name_or_path", bert, "A [MASK] story", "No gaps here.")
    assert (status, output) == (2, "")
    [line] = errors.splitlines()
    assert line.startswith("error: sentence 2 ('No gaps here.') has no mask")
