"""Processes of scripts/evaluate.py compare what they are about to measure, each with its own values."""

import json

import pytest

from tests.runs import TWO, run
from tests.scripts import load_script

# What process 1 alone does otherwise, in turn: flags, and a patch of what it reads or loads.
PROGRAM = """
import json, os, sys
from contextlib import nullcontext
from unittest.mock import patch
import torch
from mlm.data import corpus
from mlm.errors import UserError
from mlm.report import environment
from tests.scripts import load_script

script = load_script("evaluate")

def altered(change):
    def load(*which, load=script.load_trained):
        model = load(*which)
        with torch.no_grad(): change(next(model.parameters()))
        return model
    return load

def larger(table): table[5] += 1
def reversed_rows(table): table.copy_(table.flip(0))
def other_text(dataset, texts=corpus.texts): return (text.replace("cat", "dog") for text in texts(dataset))
def other_sentences(path): return {1: "the dog likes bones"}

other = os.environ["RANK"] == "1"
sentences, store = ["--pseudo_perplexity=" + sys.argv[0] + ".txt"], ["--token_store=" + sys.argv[0] + ".store"]
found = {}
for name, (shared, flags, patched) in {
    "seed": ([], ["--eval_mask_seed=7"], nullcontext()),
    "package": ([], [], patch.object(environment, "version", lambda package: "9")),
    "text": ([], store, patch.object(corpus, "texts", other_text)),
    "weights": ([], [], patch.object(script, "load_trained", altered(larger))),
    "sentences": (sentences, [], patch.object(script, "read_sentences", other_sentences)),
    "weights, sentences": (sentences, [], patch.object(script, "load_trained", altered(larger))),
    "rows reversed": ([], [], patch.object(script, "load_trained", altered(reversed_rows))),
}.items():
    with patched if other else nullcontext():
        try:
            found[name] = script.main(sys.argv[1:] + shared + flags * other)["perplexity"]
        except UserError as mistake:
            found[name] = str(mistake)
if not other:
    print(json.dumps(found))
"""
DIFFERENT = {
    "seed": "eval_mask_seed is 0 on process 0, 7 on process 1",
    "package": "9 on process 1",
    "text": "held_out corpus is ",
    "weights": "model is BertForMaskedLM ",
    "sentences": "'the dog likes bones'} on process 1",
    "weights, sentences": "model is BertForMaskedLM ",
}


@pytest.mark.slow
def test_processes_that_would_not_measure_the_same_are_refused_with_both_values(toy, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (tmp_path / "program.py.txt").write_text("the cat likes milk\n")
    flags = [f"--model_name_or_path={toy.checkpoint}", f"--validation_file={toy.validation_file}"]
    flags += [f"--token_store={toy.checkpoint.parent / 'stores'}", "--max_seq_length=16"]
    status, output, errors = run(TWO, flags, str(program))
    assert status == 0, errors
    found = json.loads(output.splitlines()[-1])
    whole = load_script("evaluate").main(flags)["perplexity"]
    assert found.pop("rows reversed") == pytest.approx(whole, rel=1e-6), "the weights are the main process's"
    for name, words in DIFFERENT.items():
        assert found[name].startswith("the processes of this run would not do the same: "), name
        assert words in found[name]
    assert found.keys() == DIFFERENT.keys()
