"""What a checkpoint costs a run: how long the loop stands still for one, and the wall time of all of them.

Workload: a BERT of DistilBERT's size (66 million weights, 800 MB a checkpoint) from random weights, batches
of 16 × 128 random tokens' chunks, a checkpoint after each 4 of 24 steps, against the same steps without any.
Runs alternate, `n` of each; medians. Ceiling: the bare copy of weights and moments in host memory.

    python benchmarks/checkpoints.py        writes benchmarks/results/checkpoints.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import DistilBertConfig, DistilBertForMaskedLM

from mlm.engine.checkpoint import State, Writer, snapshot
from mlm.engine.optimizer import make_optimizer, make_scheduler
from mlm.files import write_json
from mlm.report.environment import environment

BATCH, LENGTH, MASKED, STEPS, EVERY = 16, 128, 300, 24, 4


def run(state: State, folder: Path | None) -> dict[str, float]:
    """Takes STEPS steps, with a checkpoint after every EVERY where there is a folder for them."""
    draw = torch.Generator().manual_seed(0)
    stood_still, began = [], time.perf_counter()
    with Writer(folder or Path(), keep=1) as writer:
        for step in range(1, STEPS + 1):
            ids = torch.randint(30522, (BATCH, LENGTH), generator=draw)
            hidden = state.model.distilbert(ids)[0].flatten(0, 1)[:MASKED]
            logits = state.model.vocab_projector(state.model.vocab_layer_norm(hidden))
            torch.nn.functional.cross_entropy(logits, ids.flatten()[:MASKED]).backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
            if folder is not None and step % EVERY == 0:
                before = time.perf_counter()
                writer.save(step, lambda step=step: snapshot(state, {}, {"step": step}))
                stood_still.append(time.perf_counter() - before)
        training = time.perf_counter() - began
        failure = writer.wait()
        assert failure is None, failure
    return {
        "training_seconds": training,
        "seconds_until_written": time.perf_counter() - began,
        "stood_still_seconds": statistics.median(stood_still) if stood_still else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=3, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoints.json")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = DistilBertForMaskedLM(DistilBertConfig())
    optimizer = make_optimizer(model, 1e-5, 0.0, fused=True)
    state = State(model, optimizer, make_scheduler(optimizer, "constant", 0, STEPS), None)
    run(state, None)  # warms up, and gives the optimizer its moments

    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    copies = []
    for _ in range(args.n):
        runs["without"].append(run(state, None))
        with tempfile.TemporaryDirectory() as folder:
            runs["with"].append(run(state, Path(folder)))
        tensors = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
        before = time.perf_counter()
        kept = [tensor.detach().clone() for tensor in tensors]
        copies.append(time.perf_counter() - before)
        size = sum(tensor.nbytes for tensor in kept)
        del kept

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
            "stood_still_seconds": median("with", "stood_still_seconds"),
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
