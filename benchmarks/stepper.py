"""One way to take a training step, or to evaluate a batch, in a process of its own that does so when asked.

    python -m benchmarks.stepper WAY SIZE        then lines on standard input, each answered by one of JSON:
        step    takes one                        null
        loss    of the batch, without dropout    nats a masked token, by the way itself where it evaluates
        profile takes a few                      where their time goes, as shares
        end                                      peak memory in MiB, FLOPs, the rate of matrix products

Two processes asked in turn time two ways in one run, each with its own memory. The batch is ready, the
weights are random; the model, dropout included, is transformers' default configuration. `ours` is the very
update that train.py calls (mlm.engine.update.Update), `dense` the same with the model's own loss.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    get_scheduler,
)

from benchmarks.made_up import Ready, dense_objective, labels_of, random_words
from mlm.engine.device import keep_freed_memory
from mlm.engine.optimizer import OptimizerConfig, make_optimizer, make_scheduler
from mlm.engine.update import Objective, Update, UpdateConfig
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import peak_memory_mib
from mlm.train import objective

# Without dropout, so that ways that do the same arrive at the same weights.
TOY = {"vocab_size": 300, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOY |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
REPOSITORY = Path(__file__).parents[1]
LEARNING_RATE, STEPS = 5e-5, 10_000


class Size(NamedTuple):
    model: Callable[[], PreTrainedModel]
    batch: int
    length: int


SIZES = {
    "distilbert": Size(lambda: DistilBertForMaskedLM(DistilBertConfig()), 16, 128),
    "bert 2x128": Size(
        lambda: BertForMaskedLM(
            BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
        ),
        32,
        128,
    ),
    "toy": Size(lambda: BertForMaskedLM(BertConfig(**TOY)), 8, 512),  # two micro-batches
}


class Workload:
    """A model, and a batch of random words that is masked beforehand."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.model = size.model()
        words = random_words(size.batch, size.length, self.model.config.vocab_size, size.batch)
        self.batches = Ready(words, torch.device("cpu"))
        [self.batch], self.masked = self.batches.load(0, size.batch)
        self.labels = labels_of(self.batch)  # [B, T], -100 where nothing is predicted

    @property
    def flops(self) -> int:
        """Of a forward pass over the batch."""
        return forward_flops(self.model, *self.labels.shape, self.masked)


def forward_flops(model: PreTrainedModel, batch: int, length: int, masked: int) -> int:
    """FLOPs of a forward pass over [batch, length] tokens, whose head runs on `masked` of them.

    Two for each product with a weight, and with queries, keys and values (Kaplan et al. 2020, table 1).
    """
    config = model.config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    encoder = sum(p.numel() for n, p in model.base_model.named_parameters() if "embeddings" not in n)
    attention = 2 * 2 * layers * length * hidden
    head = 2 * (hidden * config.vocab_size + hidden * hidden)
    return batch * length * (2 * encoder + attention) + masked * head


def defaults(work: Workload) -> Callable[[], object]:
    """As run_mlm_no_trainer has it: the collator's batch, the model's own loss, plain AdamW, fp32."""
    model = work.model.train()
    plain = [p for name, p in model.named_parameters() if "bias" in name or "LayerNorm.weight" in name]
    others = [p for name, p in model.named_parameters() if not ("bias" in name or "LayerNorm.weight" in name)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": plain}], lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, 0, STEPS)
    ids, padding = work.batch.input_ids, torch.ones_like(work.batch.input_ids)

    def step() -> None:
        model(input_ids=ids, attention_mask=padding, labels=work.labels).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return step


def ours(
    work: Workload,
    precision: str = "no",
    micro_batch: int | Literal["auto"] = "auto",
    objective: Objective = objective,
) -> Callable[[], object]:
    """The update of train.py on the ready batch."""
    keep_freed_memory()
    model = SparseMaskedLM(work.model).train()
    config = OptimizerConfig(learning_rate=LEARNING_RATE)
    optimizer = make_optimizer(model.named_parameters(), config)
    update = Update(
        model,
        objective,
        work.batches,
        [optimizer],
        [make_scheduler(optimizer, config, STEPS)],
        Accelerator(cpu=True, mixed_precision=precision),
        UpdateConfig(train_batch_size=len(work.labels), per_device_train_batch_size=micro_batch),
    )
    steps = itertools.count()
    return lambda: update(next(steps))


def evaluate_dense(work: Workload) -> Callable[[], object]:
    """Loss by the model itself, from the logits of all positions."""
    keep_freed_memory()
    model = work.model.eval()

    def step() -> float:
        with torch.no_grad():
            return model(input_ids=work.batch.input_ids, labels=work.labels).loss.item()

    return step


def nats_and_hits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[M] float32 and [M] bool of logits [M, V], as evaluate.py computes them."""
    logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=-1) == targets


def evaluate_ours(work: Workload) -> Callable[[], object]:
    """Loss and hits of the masked positions."""
    keep_freed_memory()
    model, batch = SparseMaskedLM(work.model).eval(), work.batch

    def step() -> float:
        with torch.no_grad():
            logits = model(batch.input_ids, batch.positions, batch.attention_mask)
            nats, _ = nats_and_hits(logits, batch.targets)
            return nats.double().mean().item()

    return step


WAYS = {
    "defaults": defaults,
    "dense": partial(ours, objective=dense_objective),
    "ours": ours,
    "ours, bf16": partial(ours, precision="bf16"),
    "ours, bf16, micro-batches of 4": partial(ours, precision="bf16", micro_batch=4),
    "evaluation, dense": evaluate_dense,
    "evaluation, ours": evaluate_ours,
}


@torch.no_grad()
def loss(work: Workload) -> float:
    """Nats a masked token of the batch, by the dense head, without dropout: how far the steps have come."""
    training = work.model.training
    logits = work.model.eval()(input_ids=work.batch.input_ids).logits
    work.model.train(training)
    return F.cross_entropy(logits.flatten(0, 1), work.labels.flatten()).item()


def matrix_products(precision: torch.dtype, seconds: float = 1.0) -> float:
    """The machine's rate, in FLOP/s, at products of DistilBERT's largest shape."""
    left, right = torch.randn(2048, 768, dtype=precision), torch.randn(768, 3072, dtype=precision)
    left @ right
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * 2048 * 768 * 3072 / (time.perf_counter() - start))
    return best


# What a kernel is counted as, by the beginning of torch's name of it.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::"),
    "attention": ("aten::_scaled_dot_product", "aten::_softmax"),
    "the loss": ("aten::_log_softmax", "aten::nll_loss", "aten::argmax"),
    "GELU and norms": ("aten::gelu", "aten::native_layer_norm"),
    "dropout's draws": ("aten::native_dropout", "aten::bernoulli"),
    "the optimizer": ("aten::_fused_adam", "aten::_foreach", "aten::linalg_vector_norm"),
    "other kernels": ("aten::",),  # copies, sums, zeros
}


def shares(step: Callable[[], object], steps: int = 5) -> dict[str, float]:
    """Where the time of a step goes: the share of each of KINDS, and of what is in no kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        whole = time.perf_counter() - began
    share = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), None)
        if kind is not None:
            share[kind] += event.self_cpu_time_total / 1e6 / whole
    return {**share, "the rest": 1 - sum(share.values())}


class Stepper:
    """A process that takes a step when called."""

    def __init__(self, way: str, size: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stepper", way, size],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str) -> Any:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self) -> None:
        self.ask("step")

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    way, size = sys.argv[1:]
    work = Workload(SIZES[size])
    step = WAYS[way](work)
    for line in sys.stdin:
        answer: object
        if line.strip() == "step":
            step()
            answer = None
        elif line.strip() == "loss":
            answer = step() if way.startswith("evaluation") else loss(work)
        elif line.strip() == "profile":
            answer = shares(step)
        else:
            peak = peak_memory_mib(torch.device("cpu"))  # before the products below
            rate = matrix_products(torch.bfloat16 if "bf16" in way else torch.float32)
            answer = {"peak_memory_mib": peak, "flops": work.flops, "products_per_second": rate}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
