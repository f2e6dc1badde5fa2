"""What a checkpoint costs a run: how long the loop is blocked by one, and the wall time of all of them.

Workload: DistilBERT's shape with random weights (66 million, 800 MB a checkpoint), the update of train.py on
16 chunks of 128 random words, a checkpoint after each 4 of 24 steps. Peer: the same steps without any; both
in turn, `--n` of each, medians. Ceiling: the bare copy of weights and moments in host memory.

    python benchmarks/checkpoints.py        writes benchmarks/results/checkpoints.json
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from transformers import DistilBertConfig, DistilBertForMaskedLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.made_up import random_words
from mlm.engine.checkpoint import Writer, snapshot
from mlm.engine.optimizer import OptimizerConfig, make_optimizer, make_scheduler
from mlm.engine.update import Update, UpdateConfig
from mlm.files import write_json
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import environment
from mlm.train import objective

BATCH, LENGTH, STEPS, EVERY = 16, 128, 24, 4


def make_update() -> Update:
    torch.manual_seed(0)
    model = SparseMaskedLM(DistilBertForMaskedLM(DistilBertConfig())).train()
    config = OptimizerConfig(lr_scheduler_type="constant")
    optimizer = make_optimizer(model.named_parameters(), config)
    return Update(
        model,
        objective,
        random_words(8 * BATCH, LENGTH, 30522, BATCH),
        [optimizer],
        [make_scheduler(optimizer, config, STEPS)],
        Accelerator(cpu=True),
        UpdateConfig(per_device_train_batch_size=BATCH),
    )


def run(update: Update, folder: Path | None) -> dict[str, float]:
    """Takes STEPS steps, with a checkpoint after every EVERY where there is a folder for them."""
    blocked, began = [], time.perf_counter()
    with closing(Writer(folder or Path(), keep=1)) as writer:
        for step in range(1, STEPS + 1):
            update(step)
            if folder is not None and step % EVERY == 0:
                before = time.perf_counter()
                writer.save(step, lambda: snapshot(update.model.model, {"update": update}, {}))
                blocked.append(time.perf_counter() - before)
        training = time.perf_counter() - began
        failure = writer.wait()
        assert failure is None, failure
    return {
        "training_seconds": training,
        "seconds_until_written": time.perf_counter() - began,
        "blocked_seconds": statistics.median(blocked) if blocked else 0.0,
    }


def copy(optimizer: Optimizer) -> tuple[float, int]:
    """Seconds and bytes of a bare copy of the weights and moments."""
    weights = (p for group in optimizer.param_groups for p in group["params"])
    moments = (value for values in optimizer.state.values() for value in values.values())
    tensors = [*weights, *moments]
    began = time.perf_counter()
    copies = [tensor.detach().clone() for tensor in tensors]
    return time.perf_counter() - began, sum(each.nbytes for each in copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=3, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoints.json")
    args = parser.parse_args()

    update = make_update()
    run(update, None)  # warms up, and gives the optimizer its moments
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    copies = []
    for _ in range(args.n):
        runs["without"].append(run(update, None))
        with tempfile.TemporaryDirectory() as folder:
            runs["with"].append(run(update, Path(folder)))
        seconds, size = copy(update.optimizers[0])
        copies.append(seconds)

    def median(kind: str, figure: str) -> float:
        return statistics.median(each[figure] for each in runs[kind])

    pairs = zip(runs["with"], runs["without"], strict=True)
    ratios = [with_["training_seconds"] / without["training_seconds"] for with_, without in pairs]
    write_json(
        args.out,
        {
            "what": f"a checkpoint of {size / 2**20:,.0f} MiB after each {EVERY} of {STEPS} steps",
            "bytes": size,
            "n": args.n,
            "blocked_seconds": median("with", "blocked_seconds"),
            "copy_seconds": statistics.median(copies),
            "step_seconds": median("without", "training_seconds") / STEPS,
            "training_time_ratio": statistics.median(ratios),
            "training_time_ratios": sorted(ratios),
            "runs": runs,
            "environment": environment(Accelerator(cpu=True)),
        },
    )
    print(json.dumps(json.loads(args.out.read_text()), indent=1))


if __name__ == "__main__":
    main()
