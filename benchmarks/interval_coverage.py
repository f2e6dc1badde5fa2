"""How often the 95% interval of a gain holds the true gain, with few documents and with many.

Workload: populations of documents, each with masked tokens and a difference in nats, of which samples of 5 to 200
documents are drawn; the truth is the population's own difference in loss. Made-up ones differ in how long documents
are (log-normal: the logarithm has a standard deviation of 0.8, that of film reviews 0.6; the extreme one 1.5) and in
how they gain; with --documents, those of a run's documents.parquet are a population too. Peer: percentiles of a paired
bootstrap over documents with 2,000 resamples. Ceiling: 95%.

    python benchmarks/interval_coverage.py [--documents RUN/documents.parquet]

Writes benchmarks/results/interval_coverage.json, in some ten minutes.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from mlm.evaluation.interval import CONFIDENCE, interval
from mlm.files import write_json
from mlm.report.environment import environment

SIZES = (5, 6, 8, 10, 20, 40, 60, 100, 200)  # documents
TRUTH = -0.2  # nats a masked token, of the made-up populations
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]  # (generator, U) -> difference, count [U]


def made_up(lengths: str, gains: str) -> Draw:
    """Documents of such lengths (a key below), whose gains are "normal" or "skewed" around TRUTH."""

    def draw(rng: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
        count = {
            "equal": np.full(documents, 30),
            "uniform": rng.integers(1, 60, documents),
            "log-normal": np.ceil(rng.lognormal(3, 0.8, documents)).astype(np.int64),
            "extreme": np.ceil(rng.lognormal(3, 1.5, documents)).astype(np.int64),
        }[lengths]
        own = rng.normal(TRUTH, 0.3, documents) if gains == "normal" else 0.1 - rng.exponential(0.3, documents)
        return count * own + rng.normal(0, np.sqrt(count)), count

    return draw


POPULATIONS: dict[str, Draw] = {
    f"{lengths} lengths, {gains} gains": made_up(lengths, gains)
    for lengths in ("equal", "uniform", "log-normal")
    for gains in ("normal", "skewed")
}


def of_a_run(path: Path) -> tuple[Draw, float]:
    """The held-out documents of a run, drawn with replacement, and their difference in loss."""
    table = pq.read_table(path, filters=[("text", "=", "held_out")])
    count, before, after = (table[name].to_numpy() for name in ("masked_tokens", "nats_before", "nats_after"))
    difference = after - before

    def draw(rng: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(0, len(count), documents)
        return difference[chosen], count[chosen]

    return draw, float(difference.sum() / count.sum())


def percentiles(difference: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """The peer, seeded by its data's length: a bootstrap over documents."""
    chosen = np.random.default_rng(len(count)).integers(0, len(count), (2000, len(count)))
    tail = 50 * (1 - CONFIDENCE)
    return tuple(np.percentile(difference[chosen].sum(axis=1) / count[chosen].sum(axis=1), [tail, 100 - tail]))


def coverage(
    population: str | Draw, documents: int, samples: int, seed: int, truth: float = TRUTH, method: Callable = interval
) -> float:
    """The share of samples of so many documents whose interval holds the truth."""
    draw, rng, held = POPULATIONS.get(population, population), np.random.default_rng(seed), 0
    for _ in range(samples):
        low, high = method(*draw(rng, documents))
        held += low <= truth <= high
    return held / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, help="documents.parquet of a run, as a population of real ones")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "interval_coverage.json")
    args = parser.parse_args()
    populations = {name: (draw, TRUTH) for name, draw in POPULATIONS.items()}
    populations["extreme lengths, skewed gains"] = made_up("extreme", "skewed"), TRUTH
    if args.documents:
        populations["held-out documents of a run"] = of_a_run(args.documents)
    rows = {}
    for name, (draw, truth) in populations.items():
        rows[name] = {
            method.__name__: {documents: coverage(draw, documents, samples, 0, truth, method) for documents in SIZES}
            for method, samples in ((interval, args.samples), (percentiles, args.samples // 25))
        }
        print(name, rows[name], flush=True)
    write_json(
        args.out,
        {
            "what": "share of samples of so many documents whose 95% interval holds the truth",
            "samples": {"interval": args.samples, "percentiles": args.samples // 25},
            "coverage": rows,
            "environment": environment(Accelerator(cpu=True)),
        },
    )


if __name__ == "__main__":
    main()
