"""Communication behind computation: a step of two machines whose link is as slow as a backward pass.

Workload: two processes of one thread, each in a network namespace of its own, joined by a veth pair whose rate
`tc … tbf` limits so that the reduction of all gradients alone takes about as long as a backward pass; the update of
train.py on a BERT of 6 layers × 384 with random weights and no dropout, 8 chunks of 128 random words a process.
Peer: the same step whose reduction begins after its backward pass; both in turn, `--n` of each, medians. Ceiling: the
peer's time less the backward pass or the reduction, whichever is shorter; no step comes to it, as the gradient of tied
word embeddings, here an eighth of all (of BERT-base's a fifth), is complete only when the backward pass ends.

What bf16 costs is the distance, relative and in norm, of the summed gradient from the one summed in fp32: of the two
processes, and of 8 and 64 whose gradients are added up one after the other, as in a ring.

    python benchmarks/overlap.py        writes benchmarks/results/overlap.json; takes root
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import BertConfig, BertForMaskedLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.compare import row
from benchmarks.made_up import Ready, random_words
from mlm.engine.distributed import leave_group
from mlm.engine.optimizer import OptimizerConfig, make_optimizer, make_scheduler
from mlm.engine.update import Update, UpdateConfig
from mlm.files import write_json
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import environment
from mlm.train import objective
from tests.machines import ADDRESSES, command, inside, two_machines

SHARE, LENGTH, VOCABULARY, TARGET = 8, 128, 4096, 0.75
SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
SHAPE |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # whose draws are slow on a CPU
BYTES = {"fp32": 4, "bf16": 2}


def limit(name: str, rate: float) -> None:
    """Lets a namespace send so many bytes a second."""
    shape = ("rate", f"{8 * rate:.0f}bit", "burst", "256kb", "limit", "4mb")
    command(*inside(name), "tc", "qdisc", "replace", "dev", name, "root", "tbf", *shape)


class Machine:
    """A process in a namespace, which answers a line with a line of JSON."""

    def __init__(self, name: str, rank: int) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        where = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0]}
        self.process = subprocess.Popen(
            [*inside(name), sys.executable, __file__, "--worker"],
            env={**os.environ, **threads, **where, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def ask(machines: list[Machine], what: str) -> list[Any]:
    """The answer of each, which they work out together."""
    for machine in machines:
        machine.process.stdin.write(f"{what}\n")
        machine.process.stdin.flush()
    return [json.loads(machine.process.stdout.readline()) for machine in machines]


class Worker:
    """What a machine does when asked; each answers with seconds, but `weights` and `error`."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        net = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SHAPE))
        self.model, self.step = SparseMaskedLM(net).train(), 0
        words = random_words(64, LENGTH, VOCABULARY, 2 * SHARE)
        mine = replace(words, rank=accelerator.process_index, world=2)
        batches = Ready(mine, accelerator.device)
        config = OptimizerConfig(lr_scheduler_type="constant")
        optimizer = make_optimizer(self.model.named_parameters(), config)
        made = [optimizer], [make_scheduler(optimizer, config, 1)], accelerator
        self.updates = {
            name: Update(self.model, objective, batches, *made, UpdateConfig(2 * SHARE, SHARE, reduce_dtype=name))
            for name in BYTES
        }
        self.words, self.overlapped = words, {name: each.gradients.backward for name, each in self.updates.items()}

    def overlap(self, dtype: str) -> float:
        self.updates[dtype].gradients.backward = self.overlapped[dtype]
        return self.take(dtype)

    def apart(self, dtype: str) -> float:
        """The reduction begins when the backward pass has ended."""
        self.updates[dtype].gradients.backward = lambda loss, last: loss.backward()
        return self.take(dtype)

    def take(self, dtype: str) -> float:
        dist.barrier()
        began = time.perf_counter()
        self.updates[dtype](self.step)
        self.step += 1
        return time.perf_counter() - began

    def backward(self, dtype: str) -> float:
        """A backward pass, nothing sent."""
        update = self.updates[dtype]
        [batch], masked = update.batches.load(0, SHARE)
        loss = update.loss(batch)[0] / masked
        dist.barrier()
        began = time.perf_counter()
        loss.backward()
        seconds = time.perf_counter() - began
        self.model.zero_grad()
        return seconds

    def reduction(self, dtype: str) -> float:
        """Of gradients that are there."""
        gradients = self.updates[dtype].gradients
        gradients.begin()
        dist.barrier()
        began = time.perf_counter()
        gradients.enter()
        gradients.finish(1.0)
        return time.perf_counter() - began

    def weights(self) -> float:
        return sum(p.double().abs().sum().item() for p in self.model.parameters())

    def error(self) -> dict[str, float]:
        """Of a gradient that is added up in bf16, by the number of processes."""
        sums = {}
        for name, update in self.updates.items():
            update.gradients.begin()
            update._forward_backward(0)
            update.gradients.enter()
            update.gradients.finish(1.0)
            sums[name] = torch.cat([bucket.gradients for bucket in update.gradients.buckets])
        found = {"2": distance(sums["bf16"], sums["fp32"])}
        exact, rounded = (torch.zeros(len(sums["fp32"]), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        for process in range(64):  # simulated, a chunk each
            self.model.zero_grad()
            loss, _ = self.updates["fp32"].loss(self.words.mask(0, np.array([process]), np.array([0])))
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
            exact += gradient
            rounded += gradient.bfloat16()
            if process + 1 in (8, 64):
                found[str(process + 1)] = distance(rounded, exact)
        return found


def distance(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    return ((rounded - exact).norm() / exact.norm()).item()


def work() -> None:
    worker = Worker()
    for line in sys.stdin:
        what, *dtype = line.split()
        print(json.dumps(getattr(worker, what)(*dtype)), flush=True)
    leave_group()


def measure(machines: list[Machine], names: list[str], n: int) -> list[dict[str, Any]]:
    """A row for each type. The link is limited anew for each round, as what else the machine does changes."""
    rows, size = [], sum(p.numel() for p in BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SHAPE)).parameters())
    for dtype, width in BYTES.items():
        rounds: dict[str, list[float]] = {what: [] for what in ("backward", "overlap", "apart", "reduction")}
        for number in range(n + 1):
            for what, seconds in rounds.items():
                seconds.append(max(ask(machines, f"{what} {dtype}")))
                if what == "backward":
                    for name in names:
                        limit(name, size * width / seconds[-1])
            print(f"{dtype} {number}:", *(f"{what} {seconds[-1]:.2f}" for what, seconds in rounds.items()), flush=True)
        backward, ours, theirs, reduction = (seconds[1:] for seconds in rounds.values())  # the first allocated memory
        alone = {"backward": statistics.median(backward), "reduction": statistics.median(reduction)}
        apart = statistics.median(theirs)
        rows.append(
            row(
                f"step, gradients sent in {dtype}",
                "reduction after the backward pass",
                "peer",
                "of its time",
                [overlapped / after for overlapped, after in zip(ours, theirs, strict=True)],
                at_most=TARGET,
                seconds={"ours": statistics.median(ours), "theirs": apart},
                alone=alone,
                ceiling=1 - min(alone.values()) / apart,
                bytes=size * width,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=5, help="steps of each kind")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overlap.json")
    args = parser.parse_args()
    if args.worker:
        return work()
    if not (shutil.which("ip") and shutil.which("tc")):
        return print("nothing is measured: this takes iproute2's commands ip and tc")
    where = {**environment(Accelerator(cpu=True)), "load_before": os.getloadavg()[0]}
    try:
        with two_machines() as names, ExitStack() as stack:
            for name in names:
                limit(name, 1e9)  # so that it is known whether this kernel can
            machines = [stack.enter_context(Machine(name, rank)) for rank, name in enumerate(names)]
            rows = measure(machines, names, args.n)
            one, other = ask(machines, "weights")
            assert one == other, "the two processes have come to different weights"
            errors = ask(machines, "error")[0]
    except subprocess.CalledProcessError as error:
        return print(f"nothing is measured: no namespaces or limits here ({error.stderr.decode().strip()})")
    what = "Communication behind computation, two processes over a slow link"
    write_json(args.out, {"what": what, "rows": rows, "bf16_error": errors, "environment": where})
    print(args.out.read_text())


if __name__ == "__main__":
    main()
