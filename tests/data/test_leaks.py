"""Held-out documents that stand in the training split: found whatever their case and white space, and left out."""

import json
import logging
from hashlib import blake2b
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlm.data.corpus import CorpusConfig, load, text_hash
from mlm.data.task import Task
from mlm.errors import UserError
from mlm.train import train
from tests.data.stores import SPACES

words = st.text(alphabet="aBcÄé.…酒", min_size=1)


def folded(text):
    """The slow oracle: in lower case, without what Python sees as white space."""
    return "".join(text.lower().split())


@given(st.lists(words, min_size=1), st.data())
def test_case_and_white_space_do_not_matter_and_all_else_does(own, data):
    gaps = st.lists(st.sampled_from(SPACES), min_size=1).map("".join)
    other = "".join(data.draw(gaps) + word.swapcase() for word in own)
    assert text_hash(other) == text_hash(" ".join(own))
    assert text_hash(f"{other}x") != text_hash(other)


@given(st.text(alphabet=["a", "B", "É", "Σ", "中", *SPACES]))
@example("x".join(SPACES))
def test_a_text_is_hashed_without_any_white_space_that_python_knows(text):
    digest = blake2b(folded(text).encode(), digest_size=8).digest()
    assert text_hash(text) == int.from_bytes(digest, "little"), "also that of stores which are there"


@given(st.text(alphabet=["a", "B", *map(chr, range(128)), *SPACES]))
def test_ascii_is_folded_as_all_other_text_is(text):
    assert text_hash(f"é{text}") == text_hash(f"É{folded(text)}")
    assert text_hash(text) == text_hash(folded(text))


@given(st.lists(words, min_size=1), st.lists(words, min_size=1))
def test_texts_are_looked_up_as_in_a_set(asked, there):
    train = SimpleNamespace(text_hashes=np.sort(np.array([text_hash(text) for text in there], np.uint64)))
    expected = [folded(text) in set(map(folded, there)) for text in asked]
    assert Task("task", [(text,) for text in asked], None).seen(train).tolist() == expected


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Of four held-out documents, the second and the third stand in the training split, in other letters."""
    train = write(tmp_path / "train.jsonl", ["The cat", "a dog likes\nbones", "an owl"])
    held_out = ["the cow", "the  CAT\n", "A dog likes bones", "an owl ."]
    return {"train_file": train, "validation_file": write(tmp_path / "held_out.jsonl", held_out)}


def test_held_out_documents_that_are_trained_on_are_left_out_and_counted(files):
    read = load(CorpusConfig(**files))
    assert list(read.splits["validation"]) == ["the cow", "an owl ."]
    assert read.leaks == 2
    kept = load(CorpusConfig(**files, allow_leaks=True))
    assert len([*kept.splits["validation"]]) == 4
    assert kept.leaks == 2


def test_what_counts_is_the_text_that_is_trained_on(tmp_path):
    """Markup is taken out on both sides before they are compared."""
    files = {"train_file": write(tmp_path / "a.jsonl", ["the <b>cat</b>", "a dog"])}
    files |= {"validation_file": write(tmp_path / "b.jsonl", ["the cat", "a cow"])}
    assert load(CorpusConfig(**files)).leaks == 0
    assert load(CorpusConfig(**files, strip_html=True)).leaks == 1


def test_without_a_training_split_nothing_leaks(files):
    assert load(CorpusConfig(validation_file=files["validation_file"])).leaks is None


def test_a_split_that_is_made_is_looked_through_as_well(tmp_path):
    texts = [f"document {i}" for i in range(200)]
    path = write(tmp_path / "a.jsonl", [*texts, *map(str.upper, texts)])
    read = load(CorpusConfig(train_file=path, validation_split_percentage=20))
    held_out = {text.lower() for text in read.splits["validation"]}
    assert read.leaks > 20
    assert held_out
    assert not held_out & {text.lower() for text in read.splits["train"]}


def test_a_text_that_leaks_as_a_whole_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["the cat", "a dog"])
    with pytest.raises(UserError, match=r"a.jsonl: every held-out document is in the training split.*allow_leaks"):
        load(CorpusConfig(train_file=path, validation_file=path))


@pytest.fixture(scope="module")
def leaking(toy, tmp_path_factory):
    """Held-out sentences of which 8 of 20 stand in the training text."""
    lines = toy.train_file.read_text().splitlines()
    own = [f"{one} {other}".upper() for one, other in zip(lines[:12], lines[12:24], strict=True)]
    file = tmp_path_factory.mktemp("leaks") / "held_out.txt"
    file.write_text("\n".join([*own, *lines[:8]]))
    return str(file)


def test_a_run_says_how_many_leak_in_a_line_and_in_its_results(toy, leaking, tmp_path, caplog):
    config = {"validation_file": leaking, "token_store": str(tmp_path / "stores"), "max_train_steps": 2}
    texts = {}
    for allowed in (False, True):
        results = train(toy.config(tmp_path / f"{allowed}", allow_leaks=allowed, **config)).results
        assert results["held_out_leaks"] == 8
        texts[allowed] = json.loads((tmp_path / f"{allowed}" / "run.json").read_text())["experiment"][
            "held_out corpus"
        ]
    message = "left out: 8 held-out documents stand in the training split (--allow_leaks keeps them)"
    assert caplog.messages == [message], "and of those that are to be kept nothing"
    assert caplog.records[0].levelno == logging.WARNING
    assert texts[False] != texts[True], "another text is measured, and a checkpoint of the one is not resumed with it"


def test_a_second_run_finds_the_store_without_what_leaks(toy, leaking, tmp_path, caplog):
    config = {"validation_file": leaking, "token_store": str(tmp_path / "stores"), "max_train_steps": 1}
    first, second = (
        train(toy.config(tmp_path / name, allow_leaks=False, **config)).results["perplexity"] for name in "ab"
    )
    assert first == second
    assert len(caplog.messages) == 2, "each run says it"
