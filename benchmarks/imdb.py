"""One epoch over 2,000 IMDb reviews: this project against two recipes that people use, on the same files.

Workload: reviews drawn with a fixed seed and freed from markup (reviews.py), chunks of 128, batch 32, peak
learning rate 5e-4, 15% masked. Each side runs as a process of its own on all cores, in turn, `--n` rounds;
medians. The perplexity at both ends is measured again by scripts/evaluate.py under the same masks, as each
recipe draws its own. The time to the first optimizer step is that of runs that end with it, caches warm.

Peers: the course's recipe (course_recipe.py), which evaluates before and after, and run_mlm_no_trainer's
(no_trainer_recipe.py), which evaluates after only, as `mlm, no evaluation before` does. Both are fp32 with
the dense head. Ceiling: none is known for a whole run; test_training.py says how near a step is to the
machine's matrix products.

    python benchmarks/imdb.py --imdb FOLDER --model_name_or_path CHECKPOINT

FOLDER holds train.parquet and test.parquet with a column `text`. Writes benchmarks/results/imdb.json.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.reviews import sample
from mlm.files import write_json
from mlm.report.environment import environment

HERE, SCRIPTS = Path(__file__).parent, Path(__file__).parents[1] / "scripts"
BATCH = 32
COMMON = {"max_seq_length": 128, "learning_rate": 5e-4, "num_train_epochs": 1, "mlm_probability": 0.15, "seed": 42}
FIRST_STEP = re.compile(r"\bstep 1\b")
FASTEST = "mlm, no evaluation before"  # what does as much as run_mlm_no_trainer's recipe


class Recipe(NamedTuple):
    script: Path
    flags: dict[str, Any]


class Ran(NamedTuple):
    answer: dict[str, Any]  # the JSON of the script's last line
    seconds: float  # from process start to end
    first_step: float  # from process start to the line that reports it
    peak_memory_mib: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imdb", type=Path, required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument("--reviews", type=int, default=2000)
    parser.add_argument("--held_out", type=int, default=300)
    parser.add_argument("--n", type=int, default=3, help="rounds; the course's recipe has one")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "imdb.json")
    return parser.parse_args()


def recipes(args: argparse.Namespace, folder: Path) -> dict[str, Recipe]:
    """Every side by its name, all on the same files, which are written to `folder`."""
    files = {
        "model_name_or_path": args.model_name_or_path,
        "train_file": sample(args.imdb / "train.parquet", args.reviews, folder / "train.parquet"),
        "validation_file": sample(args.imdb / "test.parquet", args.held_out, folder / "validation.parquet"),
    }
    common = {**files, **COMMON}
    both = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
    ours = {**common, "train_batch_size": BATCH, "per_device_train_batch_size": "auto"}
    ours["token_store"] = folder / "stores"
    once = {**ours, "eval_on_start": "false"}
    train = SCRIPTS / "train.py"
    return {
        "course": Recipe(HERE / "course_recipe.py", {**common, "batch_size": BATCH}),
        "run_mlm_no_trainer": Recipe(HERE / "no_trainer_recipe.py", {**common, **both}),
        "mlm": Recipe(train, ours),
        FASTEST: Recipe(train, once),
        "mlm, bf16": Recipe(train, {**once, "mixed_precision": "bf16"}),
    }


def run(recipe: Recipe, folder: Path, **flags: Any) -> Ran:
    """Runs a recipe in a process of its own, whose datasets cache is in `folder`."""
    start, first_step, line = time.perf_counter(), math.nan, ""
    given = [f"--{name}={value}" for name, value in {**recipe.flags, **flags}.items()]
    command = [sys.executable, str(recipe.script), *given]
    variables = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        for line in process.stdout:
            if math.isnan(first_step) and FIRST_STEP.search(line):
                first_step = time.perf_counter() - start
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return Ran(json.loads(line), time.perf_counter() - start, first_step, usage.ru_maxrss / 2**10)


def whole_runs(sides: dict[str, Recipe], folder: Path, n: int) -> dict[str, list[Ran]]:
    """Every side in turn, `n` rounds; their models stay in "<name> <round>"."""
    runs: dict[str, list[Ran]] = {name: [] for name in sides}
    for number in range(n):
        for name, recipe in sides.items():
            if name == "course" and number:
                continue
            runs[name].append(run(recipe, folder, output_dir=folder / f"{name} {number}"))
            print(name, json.dumps(runs[name][-1]), flush=True)
    return runs


def first_steps(sides: dict[str, Recipe], folder: Path, n: int) -> dict[str, list[float]]:
    """Seconds from the command to the first optimizer step, in turn."""
    first: dict[str, list[float]] = {"run_mlm_no_trainer": [], FASTEST: []}
    for number in range(n):
        for name, seconds in first.items():
            once = {"output_dir": folder / f"{name} first {number}", "max_train_steps": 1}
            once |= {} if name == "run_mlm_no_trainer" else {"max_eval_samples": 1}
            seconds.append(run(sides[name], folder, **once).first_step)
    return first


def perplexity(model: Path, sides: dict[str, Recipe], folder: Path) -> tuple[float, int]:
    """A model's perplexity under the masks that all models are measured with, and the masked tokens."""
    shared = {name: sides["mlm"].flags[name] for name in ("validation_file", "token_store", "max_seq_length")}
    measured = run(Recipe(SCRIPTS / "evaluate.py", shared), folder, model_name_or_path=model).answer
    return measured["perplexity"], measured["eval_masked_tokens"]


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sides = recipes(args, folder)
        runs = whole_runs(sides, folder, args.n)
        first = first_steps(sides, folder, 2 * args.n)
        before, masked = perplexity(args.model_name_or_path, sides, folder)
        results = {
            name: {
                "perplexity_before": before,
                "perplexity": perplexity(folder / f"{name} 0", sides, folder)[0],
                "wall_seconds": statistics.median(ran.seconds for ran in each),
                "wall_seconds_of_each": [ran.seconds for ran in each],
                "peak_memory_mib": statistics.median(ran.peak_memory_mib for ran in each),
                "steps": each[0].answer["steps"],
                "evaluates_before": name in ("course", "mlm"),
            }
            for name, each in runs.items()
        }
    write_json(
        args.out,
        {
            "what": f"one epoch over {args.reviews:,} IMDb reviews without markup, {args.held_out} held out",
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
