"""Several processes add up their gradients while a backward pass still runs, and end where one process does."""

import dataclasses
import gc
import os
import weakref
from functools import cache
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import BertConfig, BertForMaskedLM, get_scheduler

from benchmarks.made_up import random_words
from benchmarks.stepper import TOY
from mlm.engine import distributed
from mlm.engine.update import Update, UpdateConfig
from mlm.model.sparse_head import SparseMaskedLM
from mlm.train import objective
from tests.runs import TWO, assert_same_bits, half_precision, run

pytestmark = pytest.mark.slow
STEPS, VOCABULARY, LENGTH = 3, 300, 16


class Case(NamedTuple):
    """Steps of `chunks` chunks, on two processes in micro-batches of `micro_batch`."""

    chunks: int = 11  # six on one process, in two micro-batches, and five on the other
    micro_batch: int = 4
    fp16_scale: float | None = None  # that fp16 begins with
    reduce_dtype: str = "fp32"
    memory_ends: str | None = None  # where, in the last pass of step 1 on process 1: in its "forward" or "backward"


CASES = {
    "uneven": Case(),
    "one micro-batch against two": Case(chunks=9),
    "an empty share": Case(chunks=1),
    "fp16": Case(fp16_scale=2.0**10),
    "fp16 that overflows": Case(fp16_scale=2.0**40),
    "fp16 and an empty share": Case(chunks=1, fp16_scale=2.0**40),
    "sent in bf16": Case(reduce_dtype="bf16"),
    "no memory in forward": Case(memory_ends="forward"),
    "no memory in backward": Case(memory_ends="backward"),
    "no memory, sent in bf16": Case(memory_ends="backward", reduce_dtype="bf16"),
}
PROGRAM = """
import sys
import torch
import torch.distributed as dist
from tests.engine import test_reduction as test
results = {name: test.take_steps(case) for name, case in test.CASES.items()}
torch.save(results, f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


class Taken(NamedTuple):
    weights: dict[str, torch.Tensor]
    sums: list[float]  # of each step
    counts: list[tuple[int, int]]  # of each step, masked tokens and all
    overflows: list[int]  # of each step
    micro_batch: int  # of the last step
    entered: list[int]  # the sizes of the gradients' reductions, in the order in which this process entered them
    early: list[int]  # how many of them before the word embeddings' gradient of each pass, which comes last


def toy(case, world, rank):
    """An update whose gradients fill some twenty buckets."""
    AcceleratorState._reset_state()
    accelerator = half_precision(case.fp16_scale) if case.fp16_scale else Accelerator(cpu=True)
    torch.manual_seed(0)
    model = SparseMaskedLM(BertForMaskedLM(BertConfig(**{**TOY, "num_hidden_layers": 2}))).train()
    batches = dataclasses.replace(random_words(64, LENGTH, VOCABULARY, case.chunks), world=world, rank=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config = UpdateConfig(case.chunks, "auto", max_grad_norm=0, reduce_dtype=case.reduce_dtype)
    made = [optimizer], [get_scheduler("constant", optimizer)], accelerator, config
    with patch.object(distributed, "BUCKET", 2000):
        update = Update(model, objective, batches, *made)
    update.micro_batch = case.micro_batch
    return update


def run_out(update, where):
    """Has the fourth pass, in the middle of the second step, find no memory."""
    passes = []

    def no_memory(*_):
        passes.append(None)
        if len(passes) == 4:
            raise torch.OutOfMemoryError("no memory")

    if where == "forward":
        update.model.register_forward_pre_hook(no_memory)
    elif where == "backward":
        update.model.model.bert.encoder.layer[0].attention.self.query.weight.register_hook(no_memory)


def take_steps(case):
    """In each of two processes, or in this one alone."""
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    update = toy(case, world, rank)
    entered, early = [], []
    if rank == 1:
        run_out(update, case.memory_ends)
    reduce = dist.all_reduce

    def all_reduce(tensor, *more, **how):
        if how.get("async_op"):
            entered.append(tensor.numel())
        return reduce(tensor, *more, **how)

    update.model.model.bert.embeddings.word_embeddings.weight.register_hook(lambda _: early.append(len(entered)))
    with patch.object(dist, "all_reduce", all_reduce):
        steps = [update(step) for step in range(STEPS)]
    return Taken(
        update.model.model.state_dict(),
        [step.sums.item() for step in steps],
        [(step.masked, step.tokens) for step in steps],
        [step.overflows for step in steps],
        update.micro_batch,
        entered,
        early,
    )._asdict()


@cache
def alone(name):
    """What one process does, which never runs out of memory."""
    return Taken(**take_steps(CASES[name]))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes did in each case."""
    folder = tmp_path_factory.mktemp("reduction")
    (folder / "program.py").write_text(PROGRAM)
    status, _, errors = run(TWO, [str(folder)], str(folder / "program.py"))
    assert status == 0, errors
    found = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    return {name: [Taken(**results[name]) for results in found] for name in CASES}


def buckets(case):
    return len(toy(case, 2, 0).gradients.buckets)


def distance(one, other):
    """Of two sets of weights, relative to how far the second is from where it began, in norm."""
    began = toy(CASES["uneven"], 1, 0).model.model.state_dict()
    far = torch.stack([(other[name] - began[name]).norm() for name in began]).norm()
    return (torch.stack([(one[name] - other[name]).norm() for name in began]).norm() / far).item()


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(both, name):
    one, two = alone(name), both[name]
    assert_same_bits(two[0].weights, two[1].weights)
    rounding = 0.01 if "bf16" in name or "fp16" in name else 1e-4
    assert distance(two[0].weights, one.weights) < rounding
    for found in two:
        assert found.sums == pytest.approx(one.sums, rel=rounding)
        assert found.counts == one.counts
        assert found.overflows == two[0].overflows


def test_gradients_are_sent_while_the_last_pass_of_a_step_makes_the_next_ones(both):
    """All but the last few, which wait for the embeddings. In the passes before it, nothing is sent."""
    n = buckets(CASES["uneven"])
    assert n > 10
    for found in both["uneven"]:
        assert found.early[0::2] == [step * n for step in range(STEPS)]
        assert all(step * n + n // 2 < sent < (step + 1) * n for step, sent in enumerate(found.early[1::2]))


@pytest.mark.parametrize("name", CASES)
def test_every_process_enters_every_reduction_in_the_same_order_whatever_it_has_for_it(both, name):
    first, second = both[name]
    attempts = STEPS + sum(first.overflows) + (CASES[name].memory_ends is not None)
    assert first.entered == second.entered
    assert len(first.entered) == attempts * buckets(CASES[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.memory_ends])
def test_memory_that_ends_in_one_process_amid_a_pass_has_both_drop_the_sum_and_halve(both, name):
    for found in both[name]:
        assert found.micro_batch == 2
    sent, n = both[name][1].early, buckets(CASES[name])
    assert len(sent) == 1 + 2 + 2 * 3, "two passes, one and a part of another, and three each of the halved steps"
    undisturbed = both["uneven" if "bf16" not in name else "sent in bf16"][0]
    assert both[name][0].early[3] == undisturbed.early[3] == n + undisturbed.early[1]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fp16_scale])
def test_fp16_overflows_where_it_does_in_one_process(both, name):
    """To a factor of two, as the number that losses are divided by is near the masked tokens."""
    assert abs(sum(both[name][0].overflows) - sum(alone(name).overflows)) <= 1
    assert (sum(alone(name).overflows) > 5) == (CASES[name].fp16_scale > 2.0**20)


def test_bf16_on_the_way_costs_a_rounding_of_each_gradient(both):
    """2 ** -9 of each number that is sent, and as much of each sum."""
    exact, rounded = both["uneven"][0].weights, both["sent in bf16"][0].weights
    assert 0 < distance(rounded, exact) < 2**-7


def test_a_model_is_free_when_its_update_is_gone():
    update = toy(CASES["uneven"], 2, 0)
    parameter, bucket = weakref.ref(update.parameters[0]), weakref.ref(update.gradients.buckets[0].gradients)
    update.gradients.begin()
    update.gradients.backward(update.parameters[0].sum(), last=False)
    del update
    gc.collect()
    assert parameter() is None and bucket() is None


def test_a_gradient_that_comes_twice_after_it_was_sent_is_an_error_and_not_a_wrong_sum():
    """As where a checkpointed layer has backward passes of its own (torch's reentrant checkpoints)."""
    update = toy(CASES["uneven"], 2, 0)
    weight = next(iter(update.gradients.buckets[0].views))
    update.gradients.begin()
    with patch.object(dist, "all_reduce"):
        for p in update.gradients.buckets[0].views:
            update.gradients.backward(p.sum(), last=True)
        with pytest.raises(RuntimeError, match="a second gradient in one backward pass"):
            update.gradients.backward(weight.sum(), last=True)
