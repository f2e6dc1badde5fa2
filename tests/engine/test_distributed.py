"""Processes of a run compare what they are about to do, each with its own values, before the first step."""

import json

import pytest

from tests.runs import ONE, TWO, assert_same_bits, run, weights

pytestmark = pytest.mark.slow

# What process 1 alone does otherwise, in turn: flags, and a patch of what it reads or computes.
PROGRAM = """
import json, os, sys
from contextlib import nullcontext
from unittest.mock import patch
import torch
from mlm import cli
from mlm import train as loop
from mlm.config import Config
from mlm.data import corpus
from mlm.errors import UserError
from mlm.report import environment

def altered(place):
    def load(*which, load=loop.load_model):
        net = load(*which)
        with torch.no_grad(): next(net.parameters())[place] += 1
        return net
    return load

other = os.environ["RANK"] == "1"
found = {}
for name, (flags, patched) in {
    "seed": (["--seed=7"], nullcontext()),
    "learning rate": (["--learning_rate=1"], nullcontext()),
    "steps": (["--max_train_steps=9"], nullcontext()),
    "evaluations": (["--eval_steps=5"], nullcontext()),
    "resuming": (["--resume_from_checkpoint=latest"], nullcontext()),
    "package": ([], patch.object(environment, "version", lambda package: "9")),
    "loss": ([], patch.object(loop, "objective", lambda model, batch: model(batch.input_ids, batch.positions).sum())),
    "text": (
        ["--token_store=" + sys.argv[0] + ".store"],
        patch.object(corpus, "texts", lambda d, texts=corpus.texts: (x.replace("cat", "dog") for x in texts(d))),
    ),
    "weights": ([], patch.object(loop, "load_model", altered(5))),
}.items():
    with patched if other else nullcontext():
        try:
            loop.train(cli.parse_config(Config, sys.argv[1:] + flags * other))
        except UserError as mistake:
            found[name] = str(mistake)
if not other:
    print(json.dumps(found))
"""
DIFFERENT = {
    "seed": "seed is 42 on process 0, 7 on process 1",
    "learning rate": "learning_rate is 0.005 on process 0, 1.0 on process 1",
    "steps": "max_train_steps is 12 on process 0, 9 on process 1",
    "evaluations": "eval_steps is epoch on process 0, 5 on process 1",
    "resuming": "resume_from_checkpoint is None on process 0, latest on process 1",
    "package": "9 on process 1",
    "loss": "loss function is objective ",
    "text": "train corpus is ",
    "weights": "model is BertForMaskedLM ",
}


def test_processes_that_would_not_do_the_same_are_refused_with_both_values(toy, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    status, output, errors = run(TWO, toy.flags(tmp_path / "run"), str(program))
    assert status == 0, errors
    found = json.loads(output.splitlines()[-1])
    assert found.keys() == DIFFERENT.keys()
    for name, mistake in found.items():
        assert mistake.startswith("the processes of this run would not do the same: ")
        assert DIFFERENT[name] in mistake
    assert not (tmp_path / "run").exists()


# Process 1 alone runs the line.
COMMAND = """
import os, sys
import torch
from mlm import cli
from mlm import train as loop
from mlm.config import Config
if os.environ["RANK"] == "1":
    {line}
cli.run(lambda argv: loop.train(cli.parse_config(Config, argv)).results)
"""


def run_with(line, tmp_path, flags):
    program = tmp_path / "program.py"
    program.write_text(COMMAND.format(line=line))
    return run(TWO, flags, str(program))


def test_where_stores_are_kept_may_differ_and_weights_become_those_of_the_main_process(toy, tmp_path):
    """Stores on the disk of each machine, say. Two rows exchanged are a difference that no mean shows; another kind of
    processor would draw other weights."""
    line = (
        "sys.argv += [f'--token_store={sys.argv[0]}.store']\n"
        "    load = loop.load_model\n"
        "    def exchanged(*which):\n"
        "        net = load(*which)\n"
        "        with torch.no_grad(): next(net.parameters())[[5, 6]] = next(net.parameters())[[6, 5]]\n"
        "        return net\n"
        "    loop.load_model = exchanged"
    )
    status, _, errors = run_with(line, tmp_path, toy.flags(tmp_path / "run"))
    assert status == 0, errors
    assert run(TWO, toy.flags(tmp_path / "whole"))[0] == 0
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_the_main_process_alone_reads_a_checkpoint(toy, tmp_path):
    """The others, on machines that do not share its disk, get from it what they go on from."""
    folder = tmp_path / "run"
    flags = toy.flags(folder, checkpointing_steps=6)
    assert run(TWO, flags)[0] == 0
    whole = weights(folder)
    for path in ("checkpoints/step_12", "model.safetensors", "all_results.json"):
        (folder / path).rename(tmp_path / path.rpartition("/")[2])
    line = "from mlm.engine import checkpoint; checkpoint.load_file = checkpoint.damaged = checkpoint.steps = None"
    status, output, errors = run_with(line, tmp_path, [*flags, "--resume_from_checkpoint=latest"])
    assert status == 0, errors
    assert "resumed from" in output
    assert_same_bits(weights(folder), whole)


def test_gradients_sent_in_another_type_are_another_experiment(toy, tmp_path):
    flags = toy.flags(tmp_path / "run", checkpointing_steps=6)
    assert run(TWO, [*flags, "--reduce_dtype=bf16"])[0] == 0
    (tmp_path / "run" / "all_results.json").unlink()
    status, _, errors = run(TWO, [*flags, "--resume_from_checkpoint=latest"])
    assert status != 0
    assert "reduce_dtype fp32 (the checkpoint: bf16)" in errors
    status, _, errors = run(ONE, [*flags, "--reduce_dtype=bf16", "--resume_from_checkpoint=latest"])
    assert status == 0, "one process that is left goes on: " + errors
