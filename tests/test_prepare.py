"""scripts/prepare.py: the counts that it prints are those of the text, and markup does not go unnoticed."""

import json
import random

import pytest

from tests.scripts import load_script
from tests.tokenizers_for_tests import byte_level_bpe

WORDS = ["the", "old", "young", "cat", "dog", "likes", "milk", "every", "day"]


@pytest.fixture
def prepare(toy, tmp_path, capsys):
    """prepare(documents, *flags): its result, and what it prints, for a file of these documents."""

    def call(documents, *flags):
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        found = load_script("prepare").main(
            [
                *("--tokenizer_name", str(toy.checkpoint), "--validation_file", str(path)),
                *("--token_store", str(tmp_path / "stores"), "--max_seq_length", "16", *flags),
            ]
        )
        return found["validation"], capsys.readouterr().out

    return call


def reviews(number, tags):
    rng = random.Random(0)
    return [" ".join([*rng.choices(WORDS, k=18), *tags]) for _ in range(number)]


def test_a_corpus_with_html_in_it_is_reported_in_a_line_that_names_the_flag(prepare):
    half = [*reviews(30, []), *reviews(30, ["<br />", "</p>"])]
    found, printed = prepare(half)
    [line] = [line for line in printed.splitlines() if "--strip_html" in line]
    assert "in 50% of the documents" in line
    assert f"{found['html_token_share']:.1%} of the tokens" in line
    assert found["html_token_share"] > 0.05


def test_text_without_html_is_not_complained_about(prepare):
    for text in (reviews(60, []), reviews(60, ["a < b", "c > d", "<3"])):
        found, printed = prepare(text)
        assert found["html_token_share"] == 0
        assert "--strip_html" not in printed


def test_without_its_html_a_corpus_is_that_of_the_words_alone(prepare):
    plain, _ = prepare(reviews(60, []))
    marked, _ = prepare(reviews(60, ["<br />", "<br />"]))
    stripped, printed = prepare(reviews(60, ["<br />", "<br />"]), "--strip_html")
    assert stripped["tokens"] == plain["tokens"] < marked["tokens"]
    assert stripped["html_token_share"] == 0
    assert "--strip_html" not in printed


def test_documents_and_chunks_are_shown_with_their_masks(prepare):
    _, printed = prepare(reviews(20, []), "--show", "2", "--mlm_probability", "0.5")
    assert printed.count("validation document ") == printed.count("validation chunk ") == 2
    assert "‹" in printed
    _, again = prepare(reviews(20, []), "--show", "2", "--mlm_probability", "0.5")
    assert again.partition("validation document")[2] == printed.partition("validation document")[2]


def test_what_is_shown_hides_no_unknown_token(prepare):
    _, printed = prepare(["the cat ж likes milk every day " * 3] * 9, "--show", "1")
    [document] = [line for line in printed.splitlines() if line.startswith("validation document ")]
    assert document.count("[UNK]") == 3


def test_escapes_in_documents_and_chunks_are_shown_and_not_sent(prepare, tmp_path):
    """BERT's tokenizers drop them, those of bytes keep them."""
    byte_level_bpe(["the old cat"]).save_pretrained(tmp_path / "bytes")
    text = "the \x1b]0;owned\x07 cat \x1b[2J " * 9
    others = ("--mlm_probability", "1", "--mask_replace_prob", "0", "--random_replace_prob", "1")  # of 256 bytes
    flags = ("--show", "1", *others, "--tokenizer_name", str(tmp_path / "bytes"))
    _, printed = prepare([text], *flags)
    document, chunk = (line for line in printed.splitlines() if line.startswith("validation "))
    assert document.count("\\x1b]0;owned\\x07") == 9
    assert "\\x1b" in chunk or "\\x07" in chunk
    assert not set(printed) & {*map(chr, [*range(9), *range(14, 32), 127])}
