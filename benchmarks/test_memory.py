"""Peak memory of a training step: what a process comes to in a few of them.

Workload: the ways, sizes and batches of test_training.py, each in a process of its own (stepper.py), whose
peak includes Python and the libraries, some 350 MiB, on both sides. Peer: `defaults`, run_mlm_no_trainer's
step. Ceiling: weights, gradients and AdamW's two moments, 1,086 MiB for DistilBERT.
"""

import numpy as np
import pytest

from benchmarks.compare import keep, row
from benchmarks.stepper import Stepper

STEPS = 5


def peak(way: str, size: str) -> float:
    with Stepper(way, size) as process:
        for _ in range(STEPS):
            process()
        return process.ask("end")["peak_memory_mib"]


@pytest.mark.parametrize(
    ("way", "size", "at_most"),
    [
        ("ours", "distilbert", None),
        ("ours, bf16", "distilbert", 0.75),
        ("ours, bf16, micro-batches of 4", "distilbert", 0.75),
        ("ours", "bert 2x128", 0.5),
        ("ours, bf16", "bert 2x128", None),
    ],
)
def test_peak_memory(benchmark, results, way, size, at_most):
    if benchmark.disabled:
        if (way, size) != ("ours, bf16, micro-batches of 4", "distilbert"):
            pytest.skip("one way and a toy show that it is measured")
        assert peak(way, "toy") > 100
        return
    mine, other = benchmark.pedantic(lambda: (peak(way, size), peak("defaults", size)))
    mebibytes = {"ours": mine, "theirs": other}
    ratio = np.array([mine / other])
    added = row(f"{way}, {size}", "defaults", "peer", "of its", ratio, at_most=at_most, mebibytes=mebibytes)
    keep(benchmark, results, added)
