"""Processes that are killed, memory that runs out, losses that are not finite (invariants 2, 4, 9).

The tests marked `torture` try an accident many times, for minutes; `-m torture` runs them.
"""

import dataclasses
import json
import math
import random
import re
import time
from collections import Counter

import pytest
import torch
from transformers import AutoModelForMaskedLM

from mlm.data.tokenizer import load_tokenizer
from mlm.engine import memory
from mlm.engine.checkpoint import CheckpointConfig, damaged, steps
from mlm.errors import UserError
from mlm.model.load import ModelConfig
from mlm.train import train
from tests.processes import free_port, server
from tests.runs import (
    ONE,
    SCRIPT,
    TORCHRUN,
    TWO,
    assert_each_step_once,
    assert_same_bits,
    assert_same_weights,
    finish,
    metrics,
    run,
    start,
    steps_taken,
    wait_for,
    weights,
    workers,
)

# Processes that are killed

LONG = {
    "checkpointing_steps": 9,
    "save_total_limit": 3,
    "dropout": 0.1,
    "eval_steps": 500,
    "resume_from_checkpoint": "latest",
}


def long(kills):
    """The flags of a run with steps enough to be killed so often."""
    return {**LONG, "max_train_steps": 150 * kills}


def kill_and_go_on(toy, folder, launcher, kills, seed):
    """Gives one command again and again, and kills a worker of it each time but the last.

    Returns how many were killed while they tokenised, started, took steps, and wrote a checkpoint.
    """
    rng, hit = random.Random(seed), Counter()
    store, checkpoints = folder.with_name(f"{folder.name} store"), folder / "checkpoints"
    flags = toy.flags(folder, **long(kills), token_store=store)
    for kill in range(kills):
        moment = rng.choice(["starting", "stepping", "writing"]) if kill else "tokenising"
        came = steps_taken(folder)
        process = start(launcher, flags)
        if moment == "tokenising":
            wait_for(lambda: list(store.glob("*.shards")), process)
        elif moment == "starting":
            time.sleep(rng.uniform(0.2, 4))
        else:
            wait_for(lambda came=came: steps_taken(folder) > came, process)
            time.sleep(rng.uniform(0, 0.2))
        if moment == "writing":
            wait_for(lambda: list(checkpoints.glob("*.partial")), process)
        rng.choice(workers(process)).kill()
        finish(process, seconds=60)  # the other processes are gone within a minute
        assert not (folder / "all_results.json").exists(), "the run had ended before it was killed"
        assert all(damaged(path) is None for path in steps(checkpoints).values())
        hit[moment] += 1
    status, output, errors = run(launcher, flags)
    assert status == 0, errors
    assert json.loads(output.splitlines()[-1])["steps"] == long(kills)["max_train_steps"]
    assert_each_step_once(folder)
    return hit


def uninterrupted(toy, folder, launcher, kills):
    status, _, errors = run(launcher, toy.flags(folder, **long(kills)))
    assert status == 0, errors
    return weights(folder)


def described(hit):
    return ", ".join(f"{count} while {moment}" for moment, count in sorted(hit.items()))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_bits_of_the_uninterrupted_one(toy, tmp_path):
    whole = uninterrupted(toy, tmp_path / "whole", ONE, kills=2)
    kill_and_go_on(toy, tmp_path / "run", ONE, kills=2, seed=0)
    assert_same_bits(weights(tmp_path / "run"), whole)


@pytest.mark.torture
def test_forty_kills_change_no_bit(toy, tmp_path, tally):
    whole, hit = uninterrupted(toy, tmp_path / "whole", ONE, kills=10), Counter()
    for chain in range(4):
        hit += kill_and_go_on(toy, tmp_path / f"run {chain}", ONE, kills=10, seed=chain + 1)
        assert_same_bits(weights(tmp_path / f"run {chain}"), whole)
    tally("`kill -9` at a random moment", hit.total(), f"resumed to the same bits ({described(hit)})")


@pytest.mark.torture
def test_ten_kills_of_one_of_two_processes_change_no_bit(toy, tmp_path, tally):
    whole = uninterrupted(toy, tmp_path / "whole", TORCHRUN, kills=10)
    hit = kill_and_go_on(toy, tmp_path / "run", TORCHRUN, kills=10, seed=5)
    assert_same_bits(weights(tmp_path / "run"), whole)
    tally("the same of one of two processes", hit.total(), f"resumed to the same bits ({described(hit)})")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_with_a_clear_message(toy, tmp_path, victim, tally):
    """Without a launcher, which would end them by itself: as Slurm's srun starts them."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = toy.flags(tmp_path / "run", **LONG, max_train_steps=100_000)
    processes = [server().start([SCRIPT, *flags], **world, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    wait_for(lambda: steps_taken(tmp_path / "run") > 20, processes[0])
    processes[victim].kill()
    began = time.monotonic()
    status, _, errors = finish(processes[1 - victim], seconds=60)
    processes[victim].communicate()
    assert status == 1
    assert errors.count("because another process of the run has ended") == 1
    assert "Traceback" not in errors
    assert all(damaged(path) is None for path in steps(tmp_path / "run" / "checkpoints").values())
    waited = time.monotonic() - began
    tally("one of two processes dies, without a launcher", 1, f"the other says so and ends ({waited:.1f} s)")


# Memory that runs out


def short_of_memory(toy, folder, when, **flags):
    """A program whose process of rank 1 runs out of memory in a micro-batch where `when` holds."""
    program = folder.with_suffix(".py")
    program.write_text(f"""
import os, sys, torch
from mlm import cli
from mlm.model.sparse_head import SparseMaskedLM
from mlm.config import Config
from mlm.train import train

rank, calls, forward = int(os.environ.get("RANK", 1)), 0, SparseMaskedLM.forward

def short_of_memory(self, input_ids, *others):
    global calls
    calls += self.training
    if self.training and rank == 1 and {when}:
        torch.empty(1 << 50)
    return forward(self, input_ids, *others)

SparseMaskedLM.forward = short_of_memory
cli.run(lambda argv: train(cli.parse_config(Config, argv)).results)
""")
    return toy.flags(folder, per_device_train_batch_size="auto", **flags), str(program)


@pytest.mark.parametrize("when", ["len(input_ids) > 3", "calls == 5", "len(input_ids) > 4 or calls == 9"])
def test_auto_halves_the_micro_batches_where_memory_runs_out_and_changes_nothing_else(toy, tmp_path, when):
    """At once, later in the run, and both. Eight chunks a step."""
    flags, program = short_of_memory(toy, tmp_path / "run", when)
    status, _, errors = run(ONE, flags, program)
    assert status == 0, errors
    assert "out of memory; from here on" in errors
    whole = train(toy.config(tmp_path / "whole")).model.state_dict()
    assert_same_weights(whole, weights(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("when", [pytest.param("len(input_ids) > 3", marks=pytest.mark.torture), "calls == 5"])
def test_memory_that_runs_out_in_one_process_halves_the_micro_batches_of_all(toy, tmp_path, when, tally):
    """A process that tried again alone would hang the others, who wait in the reduction of gradients."""
    flags, program = short_of_memory(toy, tmp_path / "run", when, train_batch_size=11)
    status, _, errors = run(TWO, flags, program)
    assert status == 0, errors
    assert errors.count("out of memory; from here on micro-batches of 3 chunks") == 1
    whole = train(toy.config(tmp_path / "whole", train_batch_size=11)).model.state_dict()
    assert_same_weights(whole, weights(tmp_path / "run"))
    tally("memory runs out in one of two processes", 1, "both halve their micro-batches; the same weights")


def test_what_auto_has_found_is_remembered_by_a_resumed_run(toy, tmp_path):
    """Else it would begin with larger passes, and end in other bits."""
    flags, program = short_of_memory(toy, tmp_path / "run", "calls == 3", checkpointing_steps=5)
    assert run(ONE, flags, program)[0] == 0
    whole = weights(tmp_path / "run")
    for path in ("step_10", "../all_results.json", "../model.safetensors"):
        (tmp_path / "run" / "checkpoints" / path).rename(tmp_path / path.removeprefix("../"))
    status, output, errors = run(ONE, [*flags, "--resume_from_checkpoint=latest"])
    assert status == 0, errors
    assert "in 2 micro-batch(es) of at most 4" in output
    assert_same_bits(weights(tmp_path / "run"), whole)


def test_a_micro_batch_that_cannot_or_may_not_be_smaller_is_a_mistake_in_one_line(toy, tmp_path):
    flags, program = short_of_memory(toy, tmp_path / "run", "True")
    status, _, errors = run(ONE, flags, program)
    assert status == 2
    assert "out of memory with one chunk of 16 tokens; use --gradient_checkpointing true or a" in errors
    status, _, errors = run(ONE, [*flags, "--per_device_train_batch_size=8", "--overwrite_output_dir"], program)
    assert status == 2
    assert "out of memory with --per_device_train_batch_size 8; `auto` finds what fits" in errors


def test_memory_that_an_evaluation_lacks_is_a_mistake_in_one_line(toy, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import torch
from mlm import cli
from mlm.model.sparse_head import SparseMaskedLM
from mlm.config import Config
from mlm.train import train
forward = SparseMaskedLM.forward
def short_of_memory(self, input_ids, *others):
    enough = self.training or len(input_ids) == 2  # of which the trial at construction is
    return forward(self, input_ids, *others) if enough else torch.empty(1 << 50)
SparseMaskedLM.forward = short_of_memory
cli.run(lambda argv: train(cli.parse_config(Config, argv)).results)
""")
    status, _, errors = run(ONE, toy.flags(tmp_path / "run"), str(program))
    assert status == 2
    *lines, mistake = errors.splitlines()
    notes = [line for line in lines if line.startswith("out of memory in evaluation")]
    assert mistake.startswith("error: out of memory evaluating one chunk of 16 tokens")
    assert "--per_device_eval_batch_size" in mistake
    assert [int(note.split()[-5]) for note in notes] == [16, 8, 4, 2], "37 chunks: the last is alone"


def test_auto_asks_for_the_batch_itself(toy, tmp_path):
    with pytest.raises(UserError, match="give the batch itself with --train_batch_size"):
        train(toy.config(tmp_path / "run", train_batch_size=None, per_device_train_batch_size="auto"))


def test_auto_begins_with_the_whole_share_except_on_a_cpu():
    first = memory.first_micro_batch
    assert first("auto", 512, 128, torch.device("cuda")) == 512
    assert first("auto", 512, 128, torch.device("cpu")) * 128 == memory.AUTO_ON_CPU
    assert first("auto", 3, 128, torch.device("cpu")) == 3
    assert first("auto", 512, 8192, torch.device("cpu")) == 1
    assert first(32, 512, 128, torch.device("cuda")) == 32  # what the flag says


# Losses that are not finite


def poisoned(toy, folder, word):
    """The toy's checkpoint, with an embedding of `word` that is not a number."""
    tokenizer = load_tokenizer(str(toy.checkpoint))
    model = AutoModelForMaskedLM.from_pretrained(toy.checkpoint, tie_word_embeddings=False)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids(word)] = math.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(model_name_or_path=str(folder), dropout=0.0)


@pytest.fixture
def one_bad_document(toy, tmp_path):
    """The toy's text, with a word in document 123 alone that the model cannot take."""
    lines = toy.train_file.read_text().splitlines()
    lines[123] = "a zebra ~ is not of this world ."
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    config = toy.config(tmp_path / "run", max_train_steps=60, eval_on_start=False, eval_steps=1000)
    return dataclasses.replace(
        config,
        corpus=dataclasses.replace(config.corpus, train_file=str(tmp_path / "train.txt")),
        model=poisoned(toy, tmp_path / "poisoned", "~"),
        checkpoint=CheckpointConfig(2),
    )


def test_a_loss_that_is_not_finite_names_its_step_chunk_and_document(one_bad_document, tmp_path, tally):
    with pytest.raises(UserError, match="the loss or its gradient is not finite") as stopped:
        train(one_bad_document)
    words = str(stopped.value)
    [end] = metrics(tmp_path / "run", "end")
    assert re.search(rf"step {end['step'] + 1}: ", words)
    assert 123 in end["documents"]
    assert len(end["chunks"]) <= 2, "not the whole batch: the chunks that hold the word"
    assert "lower --learning_rate" in words
    left = steps(tmp_path / "run" / "checkpoints")
    assert max(left, default=0) <= end["step"]
    for folder in left.values():
        assert damaged(folder) is None
    tally("a loss that is not finite", 1, "stops before the update; names step, chunks, documents")


def test_a_loss_that_is_infinite_stops_the_run_though_its_gradient_is_not(toy, tmp_path):
    """A word that the head holds to be impossible: its loss is infinite, the gradient of its logit is -1."""
    tokenizer = load_tokenizer(str(toy.checkpoint))
    model = AutoModelForMaskedLM.from_pretrained(toy.checkpoint)
    with torch.no_grad():
        model.cls.predictions.bias[tokenizer.convert_tokens_to_ids("cat")] = -math.inf
    model.save_pretrained(tmp_path / "sure")
    tokenizer.save_pretrained(tmp_path / "sure")
    modules = {"model": ModelConfig(model_name_or_path=str(tmp_path / "sure"), dropout=0.0)}
    with pytest.raises(UserError, match=r"step \d+: the loss or its gradient is not finite"):
        train(toy.config(tmp_path / "run", modules=modules, eval_on_start=False))


@pytest.mark.parametrize("world", [1, 2])
def test_no_update_is_made_of_a_gradient_that_is_not_finite_nor_any_after_it(toy, tmp_path, world):
    """The weights at the end are those of the last good step, though the loss is read much later."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys, torch
from mlm import cli
from mlm.config import Config
from mlm.engine.update import Update
from mlm.errors import UserError
from mlm.report import run
from mlm.train import train

kept = []
find = run.find_nonfinite
def keep(update, *others):
    kept.append({{name: tensor.clone() for name, tensor in update.model.model.state_dict().items()}})
    return find(update, *others)
run.find_nonfinite = keep
apply, calls = Update._apply, 0
def poison(self, sums):
    global calls
    calls += 1
    if calls == 4:
        self.parameters[3].grad[0] = float("inf")
    return apply(self, sums)
Update._apply = poison
try:
    train(cli.parse_config(Config, sys.argv[1:]))
except UserError as error:
    print("stopped:", error)
    torch.save(kept[0], {str(tmp_path / "kept.pt")!r})
""")
    flags = toy.flags(tmp_path / "run", logging_steps=10, eval_on_start="false", lr_scheduler_type="constant",
                      eval_steps=100)  # fmt: skip
    status, output, errors = run(world, flags, str(program))
    assert status == 0, errors
    assert "stopped: step 4: the loss or its gradient is not finite" in output
    three_steps = toy.config(tmp_path / "three", max_train_steps=3, lr_scheduler_type="constant")
    whole = train(three_steps).model.state_dict()
    assert_same_weights(torch.load(tmp_path / "kept.pt"), whole)


def test_a_run_that_diverges_says_so(toy, tmp_path):
    with pytest.raises(UserError, match="not finite"):
        train(toy.config(tmp_path / "run", learning_rate=1e30, lr_scheduler_type="constant", max_grad_norm=0))
    assert not (tmp_path / "run" / "all_results.json").exists()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN in it
