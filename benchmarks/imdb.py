"""One epoch over 2,000 IMDb reviews: this project against the course's recipe, on the same files, in turn.

Workload: reviews drawn with a fixed seed, chunks of 128, batch 32, peak learning rate 5e-4, 15% masked.
Peer: course_recipe.py (dense head, fp32, the collator of transformers). Each runs as a process of its own on
all cores and evaluates before and after. The perplexity at both ends is measured again by scripts/evaluate.py
under the same masks, because each recipe's own evaluation draws its own.

    python benchmarks/imdb.py --imdb FOLDER --model_name_or_path CHECKPOINT

FOLDER holds train.parquet and test.parquet with a column `text`. Writes benchmarks/results/imdb.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from accelerate import Accelerator

from mlm.record import environment, write_json

HERE = Path(__file__).parent
COMMON = {
    "max_seq_length": 128,
    "learning_rate": 5e-4,
    "num_train_epochs": 1,
    "mlm_probability": 0.15,
    "seed": 42,
}


def run(script: Path, flags: dict) -> tuple[dict, float]:
    """The JSON of a script's last line, and its wall time from process start to end in seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items())]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1]), time.perf_counter() - start


def sample(source: Path, reviews: int, target: Path) -> Path:
    table = pq.read_table(source, columns=["text"])
    pq.write_table(table.take(np.random.default_rng(0).choice(len(table), reviews, replace=False)), target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imdb", type=Path, required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument("--reviews", type=int, default=2000)
    parser.add_argument("--held_out", type=int, default=300)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "imdb.json")
    args = parser.parse_args()

    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        files = {
            "model_name_or_path": args.model_name_or_path,
            "train_file": sample(args.imdb / "train.parquet", args.reviews, room / "train.parquet"),
            "validation_file": sample(args.imdb / "test.parquet", args.held_out, room / "validation.parquet"),
        }
        ours = {**files, **COMMON, "per_device_train_batch_size": 32, "token_store": room / "stores"}
        recipes = {
            "course": (HERE / "course_recipe.py", {**files, **COMMON, "batch_size": 32}),
            "mlm": (HERE.parent / "scripts" / "train.py", ours),
            "mlm, bf16": (HERE.parent / "scripts" / "train.py", {**ours, "mixed_precision": "bf16"}),
        }
        for name, (script, flags) in recipes.items():
            found, wall = run(script, {**flags, "output_dir": room / name})
            checked = {
                when: run(
                    HERE.parent / "scripts" / "evaluate.py",
                    {
                        "model_name_or_path": model,
                        "validation_file": files["validation_file"],
                        "token_store": room / "stores",
                        "max_seq_length": 128,
                    },
                )[0]
                for when, model in (("before", args.model_name_or_path), ("after", room / name))
            }
            results[name] = {
                "perplexity_before": checked["before"]["perplexity"],
                "perplexity": checked["after"]["perplexity"],
                "tokens_per_second": found.get("tokens_per_second") or found["train_tokens_per_second"],
                "peak_memory_mib": found["peak_memory_mib"],
                "wall_seconds": wall,
                "steps": found["steps"],
            }
            print(name, json.dumps(results[name]), flush=True)
        masked = checked["after"]["eval_masked_tokens"]
    write_json(
        args.out,
        {
            "what": f"one epoch over {args.reviews:,} IMDb reviews, {args.held_out} held out",
            "model": args.model_name_or_path.name,
            "evaluated_masked_tokens": masked,
            "results": results,
            "environment": environment(Accelerator(cpu=True)),
        },
    )


if __name__ == "__main__":
    main()
