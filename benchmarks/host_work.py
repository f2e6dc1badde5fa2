"""Host work of a process for a step, by the number of processes.

Workload: the batches of the middle one of 1, 8, 64 and 512 simulated processes, 64 chunks of 128 random words each,
out of the same 65,536 chunks, masked as training does. Each of `--n` rounds times consecutive steps that none has
taken before, of each number of processes in turn: 64 of them, the steps whose places a process computes by one call,
so that every mean has one such call in it. Processor time a step, medians. Not in it: `agree`, in which each process
gathers a few small integers from every other. Peer: one process. Ceiling: its time, as its share is no smaller.

    python benchmarks/host_work.py        writes benchmarks/results/host_work.json
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.compare import row
from benchmarks.made_up import random_words
from mlm.data.batches import Batches
from mlm.data.order import AT_ONCE
from mlm.files import write_json
from mlm.report.environment import environment

SHARE, LENGTH, VOCABULARY, CHUNKS = 64, 128, 30_522, 65_536
STEPS = AT_ONCE // SHARE  # a round, whose places are computed together
WORLDS, AT_MOST = (1, 8, 64, 512), 1.1


def seconds(batches: Batches, number: int) -> float:
    """Of processor time for a step of a round: its share loaded, what is counted and expected of it."""
    began = time.process_time()
    for step in range(number * STEPS, (number + 1) * STEPS):
        share, _ = batches.load(step, SHARE)
        batches.expected(step), sum(batch.tokens for batch in share)
    return (time.process_time() - began) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=101, help="rounds of each number of processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "host_work.json")
    args = parser.parse_args()
    words = random_words(CHUNKS, LENGTH, VOCABULARY, SHARE)
    worlds = [replace(words, global_batch=SHARE * world, rank=world // 2, world=world) for world in WORLDS]
    rounds = [[seconds(batches, number) for batches in worlds] for number in range(args.n + 1)]
    one, *others = zip(*rounds[1:], strict=True)  # the first one warms up
    rows = [
        row(
            f"the batches of one of {world} processes",
            "one process",
            "peer",
            "of its time",
            [more / alone for more, alone in zip(times, one, strict=True)],
            at_most=AT_MOST,
            milliseconds={"ours": 1e3 * statistics.median(times), "theirs": 1e3 * statistics.median(one)},
        )
        for world, times in zip(WORLDS[1:], others, strict=True)
    ]
    what = f"Host work of a step of {SHARE} chunks of {LENGTH} tokens a process"
    write_json(args.out, {"what": what, "rows": rows, "environment": environment(Accelerator(cpu=True))})
    print(args.out.read_text())


if __name__ == "__main__":
    main()
