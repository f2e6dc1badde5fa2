"""Host work of a process for a step, by the number of processes.

Workload: the batches of the middle one of 1, 8, 64 and 512 simulated processes, 64 chunks of 128 random words each,
out of the same 65,536 chunks, masked as training does, by an order of the epoch that is made before; processor time,
in turn, `--n` rounds of 16 steps of each, medians. Peer: one process. Ceiling: its time, as its share is no smaller.

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
from mlm.files import write_json
from mlm.report.environment import environment

SHARE, LENGTH, VOCABULARY, CHUNKS = 64, 128, 30_522, 65_536
STEPS = (0, 1) * 8  # of the first epoch, which for 512 processes has no more
WORLDS, AT_MOST = (1, 8, 64, 512), 1.1


def seconds(batches: Batches) -> float:
    """Of processor time for a step: its share loaded, what is counted and expected of it."""
    began = time.process_time()
    for step in STEPS:
        share, _ = batches.load(step, SHARE)
        batches.expected(step), sum(batch.tokens for batch in share)
    return (time.process_time() - began) / len(STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=101, help="rounds of each number of processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "host_work.json")
    args = parser.parse_args()
    words = random_words(CHUNKS, LENGTH, VOCABULARY, SHARE)
    worlds = [replace(words, global_batch=SHARE * world, rank=world // 2, world=world) for world in WORLDS]
    for batches in worlds:
        seconds(batches)
    one, *others = zip(*([seconds(batches) for batches in worlds] for _ in range(args.n)), strict=True)
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
