"""One epoch over 2,000 IMDb reviews: this project against two recipes that people use, on the same files.

Workload: reviews drawn with a fixed seed, chunks of 128, batch 32, peak learning rate 5e-4, 15% masked.
Peers: the course's recipe (course_recipe.py), which evaluates before and after, and run_mlm_no_trainer's
(no_trainer_recipe.py), which evaluates after only, as `mlm, no evaluation before` does. Both are fp32 with
the dense head. Each runs as a process of its own on all cores, in turn, `--n` rounds; medians. The perplexity
at both ends is measured again by scripts/evaluate.py under the same masks, as each recipe draws its own.
The time to the first optimizer step is that of runs which end with it, their caches warm.

    python benchmarks/imdb.py --imdb FOLDER --model_name_or_path CHECKPOINT

FOLDER holds train.parquet and test.parquet with a column `text`. Writes benchmarks/results/imdb.json.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from accelerate import Accelerator

from mlm.files import write_json
from mlm.report.environment import environment

HERE, BATCH = Path(__file__).parent, 32
COMMON = {
    "max_seq_length": 128,
    "learning_rate": 5e-4,
    "num_train_epochs": 1,
    "mlm_probability": 0.15,
    "seed": 42,
}


class Ran(NamedTuple):
    said: dict[str, Any]  # the JSON of the script's last line
    seconds: float  # from process start to end
    first_step: float  # from process start to the line that says so
    peak_memory_mib: float


def run(script: Path, flags: dict[str, Any], variables: dict[str, str]) -> Ran:
    start, first_step, line = time.perf_counter(), math.nan, ""
    command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in flags.items())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        for line in process.stdout:
            if math.isnan(first_step) and line.startswith("step 1"):
                first_step = time.perf_counter() - start
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return Ran(json.loads(line), time.perf_counter() - start, first_step, usage.ru_maxrss / 2**10)


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
    parser.add_argument("--n", type=int, default=3, help="rounds; the course's recipe has one")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "imdb.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        alone = {**os.environ, "HF_DATASETS_CACHE": str(room / "cache")}
        files = {
            "model_name_or_path": args.model_name_or_path,
            "train_file": sample(args.imdb / "train.parquet", args.reviews, room / "train.parquet"),
            "validation_file": sample(args.imdb / "test.parquet", args.held_out, room / "validation.parquet"),
        }
        train = HERE.parent / "scripts" / "train.py"
        both = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
        ours = {**files, **COMMON, "train_batch_size": BATCH, "per_device_train_batch_size": "auto"}
        ours |= {"token_store": room / "stores"}
        recipes = {
            "course": (HERE / "course_recipe.py", {**files, **COMMON, "batch_size": BATCH}),
            "run_mlm_no_trainer": (HERE / "no_trainer_recipe.py", {**files, **COMMON, **both}),
            "mlm": (train, ours),
            "mlm, no evaluation before": (train, {**ours, "eval_on_start": "false"}),
            "mlm, bf16": (train, {**ours, "eval_on_start": "false", "mixed_precision": "bf16"}),
        }

        runs: dict[str, list[Ran]] = {name: [] for name in recipes}
        for number in range(args.n):
            for name, (script, flags) in recipes.items():
                if name == "course" and number:
                    continue
                folder = room / f"{name} {number}"
                runs[name].append(run(script, {**flags, "output_dir": folder}, alone))
                print(name, json.dumps(runs[name][-1]), flush=True)
        first: dict[str, list[float]] = {"run_mlm_no_trainer": [], "mlm, no evaluation before": []}
        for number in range(2 * args.n):
            for name, seconds in first.items():
                script, flags = recipes[name]
                once = {**flags, "output_dir": room / f"{name} first {number}", "max_train_steps": 1}
                once |= {} if name == "run_mlm_no_trainer" else {"max_eval_samples": 1}
                seconds.append(run(script, once, alone).first_step)

        def perplexity(model: Path) -> tuple[float, int]:
            measure = {"model_name_or_path": model, "validation_file": files["validation_file"]}
            measure |= {"token_store": room / "stores", "max_seq_length": COMMON["max_seq_length"]}
            found = run(HERE.parent / "scripts" / "evaluate.py", measure, alone).said
            return found["perplexity"], found["eval_masked_tokens"]

        before, masked = perplexity(args.model_name_or_path)
        results = {
            name: {
                "perplexity_before": before,
                "perplexity": perplexity(room / f"{name} 0")[0],
                "wall_seconds": statistics.median(ran.seconds for ran in each),
                "wall_seconds_of_each": [ran.seconds for ran in each],
                "peak_memory_mib": statistics.median(ran.peak_memory_mib for ran in each),
                "steps": each[0].said["steps"],
                "evaluates_before": name in ("course", "mlm"),
            }
            for name, each in runs.items()
        }
    write_json(
        args.out,
        {
            "what": f"one epoch over {args.reviews:,} IMDb reviews, {args.held_out} held out",
            "model": args.model_name_or_path.name,
            "n": args.n,
            "evaluated_masked_tokens": masked,
            "results": results,
            "first_step_seconds": first,
            "environment": environment(Accelerator(cpu=True)),
        },
    )


if __name__ == "__main__":
    main()
