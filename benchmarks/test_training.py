"""A training step and the evaluation of a batch, against what people use now: speed and utilisation.

Workload: DistilBERT and a BERT of 2 layers × 128, random weights, a ready batch of random words, 15% of them
masked. Peers: `defaults`, run_mlm_no_trainer's step, and `dense`, our update with the model's own loss over
all positions. Ceiling: the machine's rate at a large matrix product in the same precision, of which
`utilisation` is the share in use. Each way runs in a process of its own (stepper.py), asked in turn.

Where nothing is timed (--benchmark-disable), the model is a toy, and the ways have to arrive at the same
loss, in one process.
"""

import pytest

from benchmarks.compare import Case, cases
from benchmarks.stepper import SIZES, WAYS, Stepper, Workload, loss


@pytest.fixture
def full(benchmark) -> bool:
    """Whether the models have their real sizes."""
    return not benchmark.disabled


def measure(case, versus, results, way, size, full):
    """Times `way` against case.against at `size`, and adds how much of the machine it uses."""
    if not full:
        return check(case, versus, way)
    tokens = SIZES[size].batch * SIZES[size].length
    with Stepper(way, size) as ours, Stepper(case.against, size) as theirs:
        before = ours.ask("loss")
        for _ in range(3):  # the first steps allocate memory
            ours(), theirs()
        versus(case, ours, theirs, tokens=tokens, size=8 * tokens)
        mine, other = ours.ask("loss"), theirs.ask("loss")
        if way.startswith("evaluation"):
            assert mine == pytest.approx(other, rel=1e-5)
        else:  # both have learnt, and as much, up to dropout
            assert before - mine == pytest.approx(before - other, rel=0.1)
            assert before - mine > 0.01
        machine, measured = ours.ask("end"), results[-1]
        forwards = 1 if way.startswith("evaluation") else 3  # backward does twice the work of forward
        measured["flops_per_token"] = forwards * machine["flops"] / tokens
        measured["products_per_second"] = machine["products_per_second"]
        used = measured["flops_per_token"] * measured["tokens_per_second"]["ours"]
        measured["utilisation"] = used / machine["products_per_second"]
        if measured["utilisation"] < 0.5:
            measured["profile"] = ours.ask("profile")


def check(case, versus, way):
    """Both ways arrive at the same loss, here in this process."""
    ours, theirs = Workload(SIZES["toy"]), Workload(SIZES["toy"])
    steps = WAYS[way](ours), WAYS[case.against](theirs)
    before = loss(ours)
    for _ in range(3):
        losses = [step() for step in steps]
    if way.startswith("evaluation"):
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    else:
        assert loss(ours) == pytest.approx(loss(theirs), rel=1e-3 if "bf16" in way else 1e-6)
        assert loss(ours) < before - 1e-4
    versus(case, *steps, tokens=1, size=1)


@cases(
    Case("ours", "again", rounds=5), Case("dense", "peer", rounds=5, at_least=1.4), Case("defaults", "peer", rounds=5)
)
@pytest.mark.benchmark(group="training step, DistilBERT, 16 × 128, fp32")
def test_distilbert_fp32(case, versus, results, full):
    measure(case, versus, results, "ours", "distilbert", full)


@cases(Case("defaults", "peer", rounds=5, at_least=3.0))
@pytest.mark.benchmark(group="training step, DistilBERT, 16 × 128, bf16")
def test_distilbert_bf16(case, versus, results, full):
    measure(case, versus, results, "ours, bf16", "distilbert", full)


@cases(Case("defaults", "peer", rounds=5))
@pytest.mark.benchmark(group="training step, DistilBERT, 16 × 128, bf16, micro-batches of 4")
def test_distilbert_bf16_in_less_memory(case, versus, results, full):
    measure(case, versus, results, "ours, bf16, micro-batches of 4", "distilbert", full)


@cases(
    Case("ours", "again", rounds=5), Case("dense", "peer", rounds=5), Case("defaults", "peer", rounds=5, at_least=5.0)
)
@pytest.mark.benchmark(group="training step, BERT 2 × 128, 32 × 128, fp32")
def test_small_bert_fp32(case, versus, results, full):
    measure(case, versus, results, "ours", "bert 2x128", full)


@cases(Case("defaults", "peer", rounds=5))
@pytest.mark.benchmark(group="training step, BERT 2 × 128, 32 × 128, bf16")
def test_small_bert_bf16(case, versus, results, full):
    measure(case, versus, results, "ours, bf16", "bert 2x128", full)


@cases(Case("evaluation, dense", "peer", rounds=15, at_least=1.3))
@pytest.mark.benchmark(group="evaluation of a batch, DistilBERT, 16 × 128, fp32")
def test_distilbert_evaluation(case, versus, results, full):
    measure(case, versus, results, "evaluation, ours", "distilbert", full)


@cases(Case("evaluation, dense", "peer", rounds=15, at_least=4.0))
@pytest.mark.benchmark(group="evaluation of a batch, BERT 2 × 128, 32 × 128, fp32")
def test_small_bert_evaluation(case, versus, results, full):
    measure(case, versus, results, "evaluation, ours", "bert 2x128", full)
