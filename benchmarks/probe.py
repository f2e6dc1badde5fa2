"""Whether an adaptation helps a classifier of film reviews: the curve of the probe, fine-tuning, and their intervals.

Workload: one epoch over unlabelled IMDb reviews without markup, drawn with a fixed seed from the training half, as in
imdb.py; labelled ones from the test half, of which none is trained on. Peer: the base, on the same splits, probed by
scripts/evaluate.py; scripts/finetune.py gives the second opinion. Ceiling: none is known.

Coverage is that of the whole procedure (folds, choices, classifier, interval) on made-up documents, drawn anew each
time, whose classes two models tell apart unequally well: the share of the intervals that hold the difference over all
documents and labels. The classifier there is discriminant analysis, which is quick.

    python benchmarks/probe.py --imdb FOLDER --model_name_or_path CHECKPOINT

FOLDER holds train.parquet and test.parquet with columns `text` and `label`. Writes benchmarks/results/probe.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.reviews import read, sample
from mlm.evaluation.probe import choose, share_of, sizes, spread
from mlm.files import write_json
from mlm.report.environment import environment

SCRIPTS = Path(__file__).parents[1] / "scripts"
TRAINING = {"max_seq_length": 128, "learning_rate": 5e-4, "num_train_epochs": 1, "train_batch_size": 32, "seed": 42}
MADE_UP = 200  # documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imdb", type=Path, required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument(
        "--unlabelled", type=int, nargs="+", default=[2000, 20_000], help="reviews to adapt on, a run each"
    )
    parser.add_argument("--labelled", type=int, default=3000, help="reviews to probe with")
    parser.add_argument("--labels", type=int, nargs="*", default=[16], help="a class, to fine-tune to")
    parser.add_argument("--seeds", type=int, default=2, help="fine-tunings in each fold")
    parser.add_argument("--samples", type=int, default=200, help="simulated probes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probe.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(args, number, Path(folder)) for number in args.unlabelled]
    write_json(
        args.out,
        {
            "what": "one epoch over unlabelled IMDb reviews without markup",
            "model": args.model_name_or_path.name,
            "runs": runs,
            "coverage": coverage(args.samples),
            "samples": args.samples,
            "environment": environment(Accelerator(cpu=True)),
        },
    )


def measure(args: argparse.Namespace, unlabelled: int, folder: Path) -> dict:
    """A run over so many reviews: its perplexity before and after, what the probe says, and fine-tuning."""
    reviews = read(args.imdb / "test.parquet")
    labels = pq.read_table(args.imdb / "test.parquet", columns=["label"])["label"].to_pylist()
    order = np.random.default_rng(1).permutation(len(reviews))
    chosen, held_out = order[: args.labelled].tolist(), order[args.labelled : args.labelled + 300].tolist()
    task = folder / "task.parquet"
    pq.write_table(pa.table({"text": [reviews[i] for i in chosen], "label": [labels[i] for i in chosen]}), task)
    pq.write_table(pa.table({"text": [reviews[i] for i in held_out]}), folder / "held_out.parquet")
    base, run = args.model_name_or_path, folder / f"run of {unlabelled}"
    train = sample(args.imdb / "train.parquet", unlabelled, folder / "train.parquet")
    files = {"train_file": train, "validation_file": folder / "held_out.parquet"}
    start("train.py", {"model_name_or_path": base, **files, **TRAINING, "output_dir": run, "eval_on_start": False})
    models = {"model_name_or_path": run, "compare": base}
    flags = {"validation_file": folder / "held_out.parquet", "max_seq_length": TRAINING["max_seq_length"]}
    start("evaluate.py", {**models, **flags, "task_file": task, "output": folder / "comparison.json"})
    comparison = json.loads((folder / "comparison.json").read_text())
    tuned = []
    for k in args.labels:
        flags = {"task_file": task, "labels": k, "seeds": args.seeds, "learning_rate": 5e-4}
        tuned.append(start("finetune.py", {**models, **flags}))
    perplexities = [comparison["held_out"][when]["perplexity"] for when in ("before", "after")]
    return {"unlabelled": unlabelled, "perplexities": perplexities, "probe": comparison["task"], "finetuning": tuned}


def start(script: str, flags: dict) -> dict:
    """What a script has on the last line of its output."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    print(script, *words, flush=True)
    done = subprocess.run([sys.executable, SCRIPTS / script, *words], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def made_up(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels [n], half of either class, and two models' features of the documents [n, 6]: what tells the classes apart
    is stronger in the second."""
    labels = rng.permutation(np.arange(n) % 2)
    shared, own = rng.normal(size=(n, 6)), rng.normal(size=(2, n, 6))
    features = [0.8 * shared + 0.6 * each for each in own]
    for each, apart in zip(features, (0.9, 1.1), strict=True):
        each[:, 0] += apart * labels
    return labels, features


def hits(features: list[np.ndarray], labels: np.ndarray, chosen: np.ndarray, test: np.ndarray) -> np.ndarray:
    """How much more often the second model is right about each test document: [n], -1, 0 or 1."""
    first, second = (LinearDiscriminantAnalysis().fit(x[chosen], labels[chosen]).predict(x[test]) for x in features)
    return 1.0 * (second == labels[test]) - (first == labels[test])


def coverage(samples: int) -> dict[int, float]:
    """For each k the share of simulated probes whose interval holds the truth."""
    rng, covered = np.random.default_rng(0), {}
    for k in sizes(np.arange(MADE_UP) % 2):
        differences = []
        for _ in range(2 * samples):
            labels, features = made_up(rng, 2000)
            chosen = np.concatenate([np.flatnonzero(labels == c)[:k] for c in (0, 1)])
            differences.append(hits(features, labels, chosen, np.arange(1000, 2000)).mean())
        truth, held = np.mean(differences), 0
        for _ in range(samples):
            labels, features = made_up(rng, MADE_UP)
            scores = [
                np.array([hits(features, labels, c, test) for c in chosen]) for test, chosen in choose(labels, k, 0)
            ]
            _, low, high = spread(scores, share_of(labels, k))
            held += low <= truth <= high
        covered[k] = held / samples
        print(k, truth, covered[k], flush=True)
    return covered


if __name__ == "__main__":
    main()
