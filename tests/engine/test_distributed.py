"""Processes of a run compare what they are about to do, each with its own values, before the first step."""

import pytest

from tests.runs import PYTHON, TORCHRUN, assert_same_bits, run, weights

pytestmark = pytest.mark.slow

# Process 1 alone runs the line.
PROGRAM = """
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
    program.write_text(PROGRAM.format(line=line))
    return run(TORCHRUN, flags, str(program))


DIFFERENT = {
    "seed": ("sys.argv.append('--seed=7')", "seed is 42 on process 0, 7 on process 1"),
    "learning rate": ("sys.argv.append('--learning_rate=1')", "learning_rate is 0.005 on process 0, 1.0 on process 1"),
    "steps": ("sys.argv.append('--max_train_steps=9')", "max_train_steps is 12 on process 0, 9 on process 1"),
    "evaluations": ("sys.argv.append('--eval_steps=5')", "eval_steps is epoch on process 0, 5 on process 1"),
    "resuming": (
        "sys.argv.append('--resume_from_checkpoint=latest')",
        "resume_from_checkpoint is None on process 0, latest on process 1",
    ),
    "a package": (
        "import mlm.report.environment as e; v = e.version; e.version = lambda n: '9' if n == 'tokenizers' else v(n)",
        "9 on process 1",
    ),
    "the loss": (
        "loop.objective = lambda model, batch: model(batch.input_ids, batch.positions).sum()",
        "loss function is objective ",
    ),
    "the text behind one name": (
        "import mlm.data.corpus as c; t = c.texts; c.texts = lambda d: (x.replace('cat', 'dog') for x in t(d))\n"
        "    sys.argv += [f'--token_store={sys.argv[0]}.store']",
        "train corpus is ",
    ),
    "the weights behind one name": (
        "load = loop.load_model\n"
        "    def altered(*which):\n"
        "        net = load(*which)\n"
        "        with torch.no_grad(): next(net.parameters())[5] += 1\n"
        "        return net\n"
        "    loop.load_model = altered",
        "model is BertForMaskedLM ",
    ),
}


@pytest.mark.parametrize(("line", "words"), DIFFERENT.values(), ids=DIFFERENT)
def test_two_processes_that_would_not_do_the_same_are_refused_with_both_values(line, words, toy, tmp_path):
    status, _, errors = run_with(line, tmp_path, toy.flags(tmp_path / "run"))
    assert status != 0
    [mistake] = {line for line in errors.splitlines() if line.startswith("error: ")}
    assert mistake.startswith("error: the processes of this run would not do the same: ")
    assert words in mistake
    assert not (tmp_path / "run").exists()
    assert f'File "{tmp_path}' not in errors  # no traceback beside that of the launcher


def test_weights_that_differ_by_their_place_alone_become_those_of_the_main_process(toy, tmp_path):
    """Such as two rows exchanged, which no mean shows; or drawn by another kind of processor."""
    line = (
        "load = loop.load_model\n"
        "    def exchanged(*which):\n"
        "        net = load(*which)\n"
        "        with torch.no_grad(): next(net.parameters())[[5, 6]] = next(net.parameters())[[6, 5]]\n"
        "        return net\n"
        "    loop.load_model = exchanged"
    )
    status, _, errors = run_with(line, tmp_path, toy.flags(tmp_path / "run"))
    assert status == 0, errors
    assert run(TORCHRUN, toy.flags(tmp_path / "whole"))[0] == 0
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_checkpoint_that_one_process_sees_differently_is_not_resumed(toy, tmp_path):
    flags = toy.flags(tmp_path / "run", checkpointing_steps=6, max_train_steps=12)
    assert run(PYTHON, flags)[0] == 0
    (tmp_path / "run" / "all_results.json").unlink()
    line = "from mlm.engine import checkpoint; checkpoint.digest = lambda folder: None"
    status, _, errors = run_with(line, tmp_path, [*flags, "--resume_from_checkpoint=latest"])
    assert status != 0
    assert "checkpoint is " in errors and "None on process 1" in errors


def test_where_token_stores_are_kept_may_differ(toy, tmp_path):
    """On the disk of each machine, say."""
    line = "sys.argv += [f'--token_store={sys.argv[0]}.store']"
    status, _, errors = run_with(line, tmp_path, toy.flags(tmp_path / "run"))
    assert status == 0, errors
