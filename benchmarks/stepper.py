"""One way to take a training step, or to evaluate a batch, in a process of its own that does so when told.

    python -m benchmarks.stepper WAY SIZE        then lines on standard input, each answered by one of JSON:
        step    takes one                        null
        loss    of the batch, without dropout    nats a masked token, by the way itself where it evaluates
        profile takes a few                      where their time goes, as shares
        end                                      peak memory in MiB, FLOPs, the rate of matrix products

Two of them told in turn are two ways timed in one run, each with a memory of its own. The batch is ready, the
weights are random; the model, its dropout included, is what transformers makes of its default configuration.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    get_scheduler,
)

from mlm.engine.device import keep_freed_memory
from mlm.engine.optimizer import make_optimizer, make_scheduler
from mlm.engine.update import first
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import peak_memory_mib

# Without dropout, so that ways that do the same arrive at the same weights.
TOY = {"vocab_size": 300, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOY |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
REPOSITORY = Path(__file__).parents[1]
RATE, LEARNING_RATE, STEPS = 0.15, 5e-5, 10_000


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
    "toy": Size(lambda: BertForMaskedLM(BertConfig(**TOY)), 8, 512),  # two passes
}


class Workload:
    """A model and a batch: corrupted ids [B, T], labels [B, T] with -100 elsewhere, positions and targets."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.model = size.model()
        vocabulary = self.model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, vocabulary, (size.batch, size.length), generator=generator)
        masked = torch.rand(self.ids.shape, generator=generator) < RATE
        self.labels = torch.where(masked, self.ids, -100)
        self.inputs = torch.where(masked, 4, self.ids)

    @property
    def auto(self) -> int:
        """Chunks that --per_device_train_batch_size auto puts into a pass."""
        return first("auto", None, *self.ids.shape, torch.device("cpu"))

    def parts(self, chunks: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Ids, positions and targets of passes of at most so many chunks."""
        found = []
        for ids, labels in zip(self.inputs.split(chunks), self.labels.split(chunks), strict=True):
            positions = (labels.flatten() != -100).nonzero().squeeze(1)
            found.append((ids, positions, labels.flatten()[positions]))
        return found

    @property
    def masked(self) -> int:
        return int((self.labels != -100).sum())

    @property
    def flops(self) -> int:
        """Of a forward pass over the batch."""
        return forward_flops(self.model, *self.ids.shape, self.masked)


def forward_flops(model: PreTrainedModel, batch: int, length: int, masked: int) -> int:
    """Of a forward pass over [batch, length] tokens, `masked` of which the head runs on: two for each
    multiplication with a weight, and with queries, keys and values (Kaplan et al. 2020, table 1)."""
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
    padding = torch.ones_like(work.ids)

    def step() -> None:
        model(input_ids=work.inputs, attention_mask=padding, labels=work.labels).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return step


def dense(work: Workload) -> Callable[[], object]:
    """The dense head with labels passed in; passes, precision, optimizer and memory as ours."""
    keep_freed_memory()
    model = work.model.train()
    optimizer = make_optimizer(model, LEARNING_RATE, 0.0, fused=True)
    scheduler = make_scheduler(optimizer, "linear", 0, STEPS)

    def step() -> None:
        for ids, labels in zip(work.inputs.split(work.auto), work.labels.split(work.auto), strict=True):
            share = (labels != -100).sum() / work.masked
            (model(input_ids=ids, labels=labels).loss * share).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return step


def ours(
    work: Workload, precision: torch.dtype | None = None, chunks: int | None = None
) -> Callable[[], object]:
    """A step of train.py's loop on a ready batch, in passes of so many chunks, or of those of `auto`."""
    keep_freed_memory()
    model = SparseMaskedLM(work.model).train()
    optimizer = make_optimizer(model, LEARNING_RATE, 0.0, fused=True)
    scheduler = make_scheduler(optimizer, "linear", 0, STEPS)
    autocast = torch.autocast("cpu", precision) if precision else contextlib.nullcontext()
    parts = work.parts(chunks or work.auto)

    def step() -> None:
        for ids, positions, targets in parts:
            with autocast:
                nats, _ = model(ids, positions, targets)
            (nats.sum() / work.masked).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return step


def evaluate_dense(work: Workload) -> Callable[[], object]:
    """Loss by the model itself, from the logits of all positions."""
    keep_freed_memory()
    model = work.model.eval()

    def step() -> float:
        with torch.no_grad():
            return model(input_ids=work.inputs, labels=work.labels).loss.item()

    return step


def evaluate_ours(work: Workload) -> Callable[[], object]:
    """Loss and hits of the masked positions, as evaluate.py has them."""
    keep_freed_memory()
    model = SparseMaskedLM(work.model).eval()
    [part] = work.parts(len(work.ids))

    def step() -> float:
        with torch.no_grad():
            nats, _ = model(*part)
            return nats.double().mean().item()

    return step


WAYS = {
    "defaults": defaults,
    "dense": dense,
    "ours": ours,
    "ours, bf16": lambda work: ours(work, torch.bfloat16),
    "ours, bf16, passes of 4": lambda work: ours(work, torch.bfloat16, 4),
    "evaluation, dense": evaluate_dense,
    "evaluation, ours": evaluate_ours,
}


@torch.no_grad()
def loss(work: Workload) -> float:
    """Nats a masked token of the batch, by the dense head, without dropout: how far the steps have come."""
    training = work.model.training
    logits = work.model.eval()(input_ids=work.inputs).logits
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


# What torch's own names of the work on a CPU come under, by the beginning of the name.
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
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), None)
        if kind is not None:
            found[kind] += event.self_cpu_time_total / 1e6 / whole
    return {**found, "the rest": 1 - sum(found.values())}


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
