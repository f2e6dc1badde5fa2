"""The whole pipeline: text in, filled mask out, on the command line."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ANIMALS, REPOSITORY
from tests.runs import ONE, run


def script(name, *arguments):
    status, output, errors = run(ONE, [*map(str, arguments)], str(REPOSITORY / "scripts" / f"{name}.py"))
    assert status == 0, errors
    return json.loads(output.splitlines()[-1]), output


def test_text_in_filled_mask_out(toy, tmp_path):
    adapted = tmp_path / "adapted"
    results, printed = script("train", *toy.flags(adapted, max_train_steps=700))
    assert results["perplexity"] < results["perplexity_unigram"] < results["perplexity_before"]
    assert f"{results['perplexity']:.4g} after" in printed

    again, _ = script(
        "evaluate",
        *("--model_name_or_path", adapted, "--train_file", toy.train_file, "--max_seq_length", 16),
        *("--validation_file", toy.validation_file, "--token_store", toy.checkpoint.parent / "stores"),
        "--allow_leaks",
    )
    assert again["perplexity"] == results["perplexity"]

    answer, _ = script("fill_mask", "--model_name_or_path", adapted, "the old [MASK] likes grapes every day .")
    [[best, *_]] = answer["sentences"][0]["masks"]
    assert best["token"] in ANIMALS


def test_what_a_store_holds_is_shown(toy, tmp_path):
    flags = ["--train_file", toy.train_file, "--validation_file", toy.validation_file, "--max_seq_length", 16]
    store = ["--model_name_or_path", toy.checkpoint, "--token_store", tmp_path, "--allow_leaks"]
    results, printed = script("prepare", *flags, *store, "--show", 3, "--whole_word_mask")
    assert results["train"]["documents"] == 400
    assert results["validation"]["documents"] == 60
    assert printed.count("train document ") == printed.count("validation chunk ") == 3
    assert "‹" in printed


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.torture)], ids=["20 steps", "whole"])
def test_the_demo_shows_what_it_learnt_and_ends_at_half_of_the_unigram_perplexity_or_less(tmp_path, whole):
    """The whole built-in demo, minutes on two cores: it knows more than how frequent each token is."""
    threads = {**os.environ, "OMP_NUM_THREADS": str(min(2, os.cpu_count())), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "scripts/demo.py", "--output_dir", str(tmp_path / "demo")]
    command += [] if whole else ["--max_train_steps", "20", "--num_warmup_steps", "2", "--max_eval_samples", "64"]
    demo = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=threads)
    assert demo.returncode == 0, demo.stderr
    results = json.loads(demo.stdout.splitlines()[-1])
    assert results["perplexity"] <= 0.5 * results["perplexity_unigram"] or not whole
    assert results["perplexity_before"] > 4000  # about the size of its vocabulary, 8192
    assert demo.stdout.count("[MASK]") >= 3  # sentences, filled before and after
    page = tmp_path / "demo" / "report.html"
    assert f"report: {page}" in demo.stdout.splitlines()
    assert 'id="examples"' in page.read_text(encoding="utf-8")
