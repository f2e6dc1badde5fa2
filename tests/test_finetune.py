"""Fine-tuning, the second opinion: the same labels, heads and order for both models."""

import json

import numpy as np
import pytest

from mlm.errors import UserError
from tests.scripts import load_script

script = load_script("finetune")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two kinds of sentences that one word tells apart."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("task") / "labelled.jsonl"
    rows = [
        {"text": f"the {rng.choice(['old', 'young'])} {animal} likes {rng.choice(['milk', 'bones'])}", "label": animal}
        for animal in ("cat", "dog")
        for _ in range(15)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def flags(toy, labelled, **more):
    settings = {"model_name_or_path": toy.checkpoint, "compare": toy.checkpoint, "task_file": labelled, "labels": 6}
    return [f"--{name}={value}" for name, value in {**settings, "learning_rate": 5e-3, **more}.items()]


def test_a_model_that_is_the_base_is_exactly_as_good_and_both_learn(toy, labelled, tmp_path):
    output = tmp_path / "figures.json"
    figures = script.main(flags(toy, labelled, output=output))
    assert figures["accuracy"] == figures["accuracy_before"] >= 0.8
    assert figures["accuracy_difference"] == figures["accuracy_low"] == figures["accuracy_high"] == 0
    assert (figures["splits"], figures["documents"], figures["labels_a_class"]) == (10, 30, 6)
    assert json.loads(output.read_text()) == figures


def test_documents_that_are_cut_are_counted(toy, labelled, capsys):
    script.main(flags(toy, labelled, max_seq_length=4, epochs=1))
    assert "30 documents of 30 are cut (--max_seq_length)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"compare": "none"}, "give --model_name_or_path, --compare and --task_file"),
        ({"labels": 0}, "--labels 0: at least 1"),
        ({"seeds": 1}, "--seeds 1: at least 2"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(toy, labelled, more, message):
    with pytest.raises(UserError, match=message):
        script.main(flags(toy, labelled, **more))
