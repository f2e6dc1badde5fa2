"""scripts/prepare.py --check_leaks: near-duplicates, in bounded memory."""

import importlib.util
import json
import random
import sys
import tracemalloc

import numpy as np
import pytest

from mlm.data.task import Task
from mlm.errors import UserError
from tests.data.stores import CHINESE
from tests.scripts import load_script

script = load_script("near_duplicates")
needs_library = pytest.mark.skipif(not importlib.util.find_spec("datasketch"), reason="datasketch is not installed")
WORDS = [f"{first}{second}" for first in "bcdfghkl" for second in ("ake", "ine", "ost", "und")]


def text(rng, length=120):
    return " ".join(rng.choices(WORDS, k=length))


def edited(rng, text, words):
    own = text.split()
    for place in rng.sample(range(len(own)), words):
        own[place] = "other"
    return " ".join(own)


def jaccard(a, b):
    """The slow oracle, of sets of shingles."""
    return len(a & b) / len(a | b)


@needs_library
def test_what_is_found_is_alike_and_what_is_alike_is_found():
    rng = random.Random(0)
    documents = [text(rng) for _ in range(120)]
    large = [text(rng) for _ in range(300)] + [edited(rng, own, i % 12) for i, own in enumerate(documents[:60])]
    rng.shuffle(large)
    found = script.near_duplicates(documents, large)
    of_documents, of_large = ([set(script.shingles(text)) for text in texts] for texts in (documents, large))
    likeness = np.array([max(jaccard(own, other) for other in of_large) for own in of_documents])
    assert not found[likeness < 0.65].any()
    assert found[likeness > 0.92].all()
    assert (likeness > 0.92).sum() >= 5
    assert (likeness < 0.65).sum() >= 60


@needs_library
def test_case_white_space_and_punctuation_do_not_matter():
    own = text(random.Random(1))
    assert script.near_duplicates([own], [own.upper().replace(" ", ",\n")]).tolist() == [True]


@needs_library
def test_a_script_without_spaces_is_compared_by_its_letters():
    own = "".join(CHINESE)
    other = own[:100] + "新" + own[100:]
    assert script.near_duplicates([own, own[::-1]], [other]).tolist() == [True, False]
    assert script.shingles("a酒店bc") == ["a 酒 店 bc".encode()]
    assert script.shingles("!?") != script.shingles("...")


@needs_library
def test_memory_is_for_what_is_looked_for():
    def peak(length):
        rng = random.Random(2)
        documents = [text(rng, 20) for _ in range(30)]
        tracemalloc.start()
        script.near_duplicates(documents, (text(rng, 20) for _ in range(length)))
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    peak(1)  # imports
    assert peak(400) < 1.2 * peak(40)


def test_of_many_documents_each_is_as_likely_to_be_looked_for(monkeypatch):
    assert script.few(iter("abc")) == ["a", "b", "c"]
    monkeypatch.setattr(script, "MOST", 300)
    kept = [int(text) for text in script.few(map(str, range(3000)))]
    assert len(set(kept)) == 300
    assert np.histogram(kept, bins=3, range=(0, 3000))[0].min() > 70


@needs_library
def test_prepare_counts_equal_and_near_ones_of_held_out_text_and_of_a_task(toy, tmp_path, capsys):
    rng = random.Random(3)
    training = [text(rng) for _ in range(30)]
    held_out = [text(rng), training[0].upper(), edited(rng, training[1], 1), edited(rng, training[2], 1)]
    labelled = [training[3].upper(), edited(rng, training[4], 1), *(text(rng) for _ in range(18))]
    files = {"train_file": [{"text": own} for own in training], "validation_file": [{"text": own} for own in held_out]}
    files["task_file"] = [{"text": own, "label": i % 2} for i, own in enumerate(labelled)]
    flags = ["--tokenizer_name", str(toy.checkpoint), "--token_store", str(tmp_path), "--check_leaks"]
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    found = load_script("prepare").main(flags)["leaks"]
    assert found["held-out documents"] == {"equal": 1, "looked_for": 3, "near": 2}
    figures = {"equal": 1, "looked_for": 20, "near": 1, "rows": [0], "near_rows": [1]}
    assert found["texts of the task"] == figures, "an equal one is no near one"
    printed = capsys.readouterr().out
    stand, more = "stand in the training split", "more have a near-duplicate there"
    assert f"held-out documents: 1 {stand}; of 3 looked for, 2 {more}" in printed
    assert f"texts of the task: 1 {stand}; of 20 looked for, 1 {more}" in printed
    for row, what in enumerate(("stands in the training split", "has a near-duplicate there")):
        assert f"  row {row}, counted from 0, {what}: {labelled[row][:40]}" in printed


def test_the_first_rows_are_printed_with_their_openings_and_all_are_returned_once(capsys):
    rows = np.array([10, 11, 12, 13, 14, 15, 12, 17])  # a query and its document may be of one row
    task = Task("task", [(f"text\x1b[2J\n{row} " + "x" * 100,) for row in rows], None, rows=rows)
    assert script.name_rows(task, rows > 10, "is there") == [11, 12, 13, 14, 15, 17]
    lines = capsys.readouterr().out.splitlines()
    assert [line[:34] for line in lines[:-1]] == [f"  row {row}, counted from 0, is there" for row in range(11, 16)]
    assert all(r"text\x1b[2J 1" in line and line.endswith("…") and len(line) < 100 for line in lines[:-1])
    assert lines[-1] == "  … 2 more; --json lists the rows"
    assert script.name_rows(task, rows > 99, "is there") == []
    assert capsys.readouterr().out == ""


def test_there_has_to_be_training_text_to_look_in(toy, tmp_path):
    flags = ["--tokenizer_name", str(toy.checkpoint), "--token_store", str(tmp_path), "--check_leaks"]
    with pytest.raises(UserError, match="--check_leaks: there is no training text to look in; give --train_file"):
        load_script("prepare").main([*flags, "--validation_file", str(toy.validation_file), "--max_seq_length", "16"])


def test_without_the_library_one_line_says_what_to_install_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match="--check_leaks needs a package that is not installed: pip install datasketch"):
        load_script("prepare").main(["--train_file", "no such file", "--check_leaks"])
