"""Training on one GPU, with random weights: speed, memory, utilisation, and the invariants on the device.

Workload: the update that train.py calls (mlm.engine.update.Update), about 32,000 tokens a step, for the sizes
of DistilBERT, BERT-base, RoBERTa-base and ModernBERT-base at 128 and 512 tokens: fp16 with its scaler and
bf16, eager, and compiled where a speed is aimed at. A compiled step sees one number of masked tokens, to
which a run would have to pad.

Peers: the same update with the dense head and the model's own loss, and, in bf16, the step of
run_mlm_no_trainer (the model as accelerate prepares it, its own loss, AdamW as torch has it). Ceiling: the GPU's
rate at a large matrix product in the same precision; FLOPs that the dense head spends on unmasked positions do
not count as use.

Waiting for data is the share of a step's time that is saved where its batch is on the device beforehand. A
step should never make the host wait for the device, except under fp16, whose scaler asks whether gradients
overflowed. Masking on the device (the torch kernels of mlm/data/masking.py) is timed against masking on the
host and copying the batch, which is what training does.

    python benchmarks/gpu.py                 under 8 minutes; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --self_test     the same on a CPU, with toys that say nothing of speed

Without a GPU it prints so and exits with status 0.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.made_up import RATE, SEED, Ready, dense_objective, labels_of, random_words
from benchmarks.stepper import defaults, forward_flops
from mlm.config import Config
from mlm.data.batches import Batch, Batches
from mlm.data.masking import corrupt, draw_torch, select_tokens
from mlm.engine.optimizer import OptimizerConfig, make_optimizer, make_scheduler
from mlm.engine.update import Update, UpdateConfig
from mlm.errors import one_line
from mlm.files import write_json
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import environment, peak_memory_mib
from mlm.train import objective, train

VOCABULARY = 30_000  # every size has these ids
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Setting(NamedTuple):
    """How a size is trained."""

    precision: str
    way: Literal["sparse head", "dense head", "run_mlm_no_trainer"]
    compiled: bool = False


SETTINGS = (
    Setting("fp16", "dense head"),
    Setting("fp16", "sparse head"),
    Setting("bf16", "run_mlm_no_trainer"),
    Setting("bf16", "dense head"),
    Setting("bf16", "sparse head"),
    Setting("bf16", "sparse head", compiled=True),
)


class Scale(NamedTuple):
    """What is the same for all rows."""

    device: torch.device
    lengths: tuple[int, ...]  # tokens a chunk
    tokens: int  # a step
    steps: int  # a round, of `rounds`
    rounds: int
    products: dict[str, float]  # FLOP/s of large products of matrices, by precision


class Size(NamedTuple):
    model: Callable[[int], PreTrainedModel]  # of so many positions
    target: dict[int, dict[str, float]]  # what to reach in bf16 with the sparse head, by length


def sizes(self_test: bool) -> dict[str, Size]:
    if self_test:
        return {"toy": Size(lambda T: toy(), {})}

    fast = {"tokens_per_second": 1.25e6, "utilisation": 0.45}
    return {
        "DistilBERT": Size(lambda T: DistilBertForMaskedLM(DistilBertConfig()), {128: fast}),
        "BERT-base": Size(
            lambda T: BertForMaskedLM(BertConfig()), {512: {"tokens_per_second": 6e5, "utilisation": 0.45}}
        ),
        "RoBERTa-base": Size(
            lambda T: RobertaForMaskedLM(RobertaConfig(vocab_size=50265, max_position_embeddings=T + 2)), {}
        ),
        "ModernBERT-base": Size(lambda T: ModernBertForMaskedLM(ModernBertConfig()), {}),
    }


def toy(dropout: float = 0.1) -> PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **shape, **dropouts))


def make_accelerator(device: torch.device, precision: str, scale: float = 2.0**16) -> Accelerator:
    """In place of any that this process had before. scale: that fp16 begins with"""
    AcceleratorState._reset_state()
    if device.type == "cuda" or precision != "fp16":
        scaler = GradScalerKwargs(init_scale=scale)
        return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[scaler])
    accelerator = Accelerator(cpu=True, mixed_precision="no")  # accelerate offers no fp16 here, torch does
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def make_steps(
    net: PreTrainedModel, setting: Setting, batches: Batches, accelerator: Accelerator
) -> tuple[Callable[[int], object], Callable[[int], object] | None]:
    """A step on a batch that is there already, and (None for the peer) the same one on batches as they come."""
    there = Ready(batches, accelerator.device)
    if setting.way == "run_mlm_no_trainer":
        [batch], _ = there.load(0, batches.global_batch)
        step = defaults(SimpleNamespace(model=accelerator.prepare_model(net), batch=batch, labels=labels_of(batch)))
        return lambda number: step(), None
    model = SparseMaskedLM(net).train()
    if setting.way == "sparse head" and not setting.compiled:
        check_sparse_head(model, there.load(0, batches.global_batch)[0][0], accelerator)
    optimizer = make_optimizer(model.named_parameters(), OptimizerConfig())
    scheduler = make_scheduler(optimizer, OptimizerConfig(), 10_000)
    config = UpdateConfig(per_device_train_batch_size=batches.global_batch)
    loss = objective if setting.way == "sparse head" else dense_objective
    if setting.compiled:
        loss = torch.compile(loss)
    ready, made = (
        Update(model, loss, source, [optimizer], [scheduler], accelerator, config) for source in (there, batches)
    )
    return ready, None if setting.compiled else made


def seconds_a_step(take: Callable[[int], object], scale: Scale) -> float:
    """The mean over the steps of a round."""
    began = time.perf_counter()
    for step in range(scale.steps):
        take(step)
    synchronise(scale.device)
    return (time.perf_counter() - began) / scale.steps


@torch.no_grad()
def check_sparse_head(model: SparseMaskedLM, batch: Batch, accelerator: Accelerator) -> None:
    """Raises AssertionError where the sparse head's loss is not the dense one's, in this precision."""
    model.eval()
    with accelerator.autocast():
        sparse, dense = (each(model, batch).item() for each in (objective, dense_objective))
    model.train()
    assert abs(sparse - dense) < 1e-2 * dense, f"invariant 8: {sparse} {dense}"


def measure(size: Size, length: int, setting: Setting, scale: Scale) -> dict[str, Any]:
    """One row: tokens/s, peak memory, utilisation, the share of a step that waits for data."""
    gc.collect()  # the last row's model, which its own hook refers to
    torch.compiler.reset()  # or a second model would be compiled for shapes that vary
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(SEED)
    with scale.device:
        net = size.model(length)
    global_batch = scale.tokens // length
    batches = random_words(4 * global_batch, length, VOCABULARY, global_batch)
    accelerator = make_accelerator(scale.device, setting.precision)
    ready, from_host = make_steps(net, setting, batches, accelerator)
    for step in range(3):
        ready(step)
    synchronise(scale.device)
    if scale.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    there, made = [], []  # seconds a step, with the batch there already, and made for it; in turn
    for _ in range(scale.rounds):
        there.append(seconds_a_step(ready, scale))
        made.append(seconds_a_step(from_host, scale) if from_host else math.nan)
    waits = None
    if scale.device.type == "cuda" and setting.precision == "bf16":  # under fp16 the scaler asks
        waits = synchronisations(lambda: (from_host or ready)(0))
    seconds = statistics.median(there)
    flops = 3 * forward_flops(net, global_batch, length, batches.load(0, global_batch)[1])
    return {
        "tokens_per_second": scale.tokens / seconds,
        "low": scale.tokens / max(there),
        "high": scale.tokens / min(there),
        "n": len(there),
        "utilisation": flops / seconds / scale.products[setting.precision],
        "peak_memory_mib": peak_memory_mib(scale.device),
        "waiting_for_data": from_host and statistics.median(1 - a / b for a, b in zip(there, made, strict=True)),
        "synchronisations_in_a_step": waits,
    }


class Masking:
    """A global batch taken from its chunks, masked and put on the device, in two ways."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.chunk_ids, self.epochs = batches.places(0)  # all of epoch 0
        self.maskable = torch.from_numpy(batches.maskable).to(device)

    def on_the_host(self) -> Batch:
        """NumPy's kernels, then the copy: what training does."""
        return self.batches.mask(0, self.chunk_ids, self.epochs).to(self.device)

    def on_the_device(self) -> Batch:
        """The copy of the chunks as they are, then torch's kernels."""
        chunks = self.batches.chunks
        pin = self.device.type == "cuda"
        numbers, ids = (
            (torch.from_numpy(each).pin_memory() if pin else torch.from_numpy(each)).to(self.device, non_blocking=pin)
            for each in (self.chunk_ids, chunks.take(self.chunk_ids).ids)
        )
        draws = draw_torch(SEED, 0, numbers, chunks.chunk_size)
        selected = select_tokens(self.maskable[ids], draws, RATE)
        return Batch(*corrupt(ids, selected, draws, self.batches.recipe), None)


def time_masking(length: int, scale: Scale) -> dict[str, Any]:
    """Tokens/s of both ways to mask, timed in turn; a ratio above 1: on the device is faster."""
    global_batch = scale.tokens // length
    batches = random_words(4 * global_batch, length, VOCABULARY, global_batch)
    masking = Masking(batches, scale.device)

    def seconds(mask: Callable[[], Batch]) -> float:
        synchronise(scale.device)
        began = time.perf_counter()
        mask()
        synchronise(scale.device)
        return time.perf_counter() - began

    masking.on_the_host(), masking.on_the_device()
    pairs = [(seconds(masking.on_the_host), seconds(masking.on_the_device)) for _ in range(scale.rounds * scale.steps)]
    host, device = zip(*pairs, strict=True)
    ratios = [mine / other for mine, other in pairs]
    return {
        "length": length,
        "host_tokens_per_second": scale.tokens / statistics.median(host),
        "device_tokens_per_second": scale.tokens / statistics.median(device),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "n": len(pairs),
        "synchronisations": synchronisations(masking.on_the_device) if scale.device.type == "cuda" else None,
    }


def check_invariants(device: torch.device) -> dict[str, str]:
    """Invariants 1, 2 and 8 on the device. Raises AssertionError where one does not hold."""
    batches = random_words(64, 128, VOCABULARY, 32)
    masking = Masking(batches, device)
    for mine, its in zip(masking.on_the_host(), masking.on_the_device(), strict=True):
        assert mine is its is None or torch.equal(mine, its), "invariant 1: masks differ"
    here, there = (batches.mask(0, *batches.places(0)).to(where) for where in (torch.device("cpu"), device))
    for mine, its in zip(here, there, strict=True):
        assert mine is its is None or torch.equal(mine, its.cpu()), "a batch changes on its way"

    loss, reference = gradients(device, batches, sparse=False, micro_batches=1)
    for invariant, sparse, micro_batches in (("8: sparse equals dense", True, 1), ("2: cut in 4", True, 4)):
        other, others = gradients(device, batches, sparse, micro_batches)
        assert abs(other - loss) < 1e-4 * loss, f"invariant {invariant}"
        for mine, its in zip(reference, others, strict=True):
            assert (mine - its).norm() <= 1e-3 * mine.norm() + 1e-6, f"invariant {invariant}"
    return {
        "1": "masks and targets of 32 × 128 tokens equal the host's to the bit",
        "2": "loss to 1e-4, gradients to 1e-3 in norm, in 1 micro-batch and in 4, fp32",
        "8": "loss to 1e-4, gradients to 1e-3 in norm, sparse head and dense head, fp32",
    }


def gradients(
    device: torch.device, batches: Batches, sparse: bool, micro_batches: int
) -> tuple[float, list[torch.Tensor]]:
    """Nats a masked token of a step of the update, and the gradient that its optimizer gets."""
    torch.manual_seed(SEED)
    model = SparseMaskedLM(toy(dropout=0.0).to(device)).train()
    received: list[torch.Tensor] = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: received.extend(p.grad.clone() for p in parameters))
    update = Update(
        model,
        objective if sparse else dense_objective,
        batches,
        [optimizer],
        [make_scheduler(optimizer, OptimizerConfig(), 1)],
        make_accelerator(device, "no"),
        UpdateConfig(per_device_train_batch_size=batches.global_batch // micro_batches, max_grad_norm=0),
    )
    step = update(0)
    return step.sums[0].item() / step.masked, received


def check_skipped_steps(device: torch.device) -> dict[str, Any]:
    """Invariant 9, in a real run: steps that fp16's scaler skips hold the learning rate.

    Raises AssertionError where they do not.
    """
    accelerator = make_accelerator(device, "fp16", scale=2.0**40)
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"the {a} {b} likes {c} ." for a in ("old", "young") for b in "abcdef" for c in "uvwxyz"]
        Path(folder, "train.txt").write_text("\n".join(lines * 4))
        config = Config.of(
            train_file=f"{folder}/train.txt",
            validation_split_percentage=20,
            token_store=folder,
            max_seq_length=16,
            train_batch_size=8,
            max_train_steps=10,
            eval_on_start=False,
            output_dir=f"{folder}/run",
            logging_steps=1,
        )
        results = train(config, accelerator).results
        events = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    rates = [event["learning_rate"] for event in events if event["event"] == "train"]
    assert results["skipped_steps"] > 0, "invariant 9: nothing was skipped"
    assert np.allclose(rates, [5e-5 * (1 - step / 10) for step in range(1, 11)]), "invariant 9: rates"
    return {"skipped_steps": results["skipped_steps"], "learning_rates": rates}


def synchronisations(step: Callable[[], object]) -> int:
    """How often the host waits for the device in a step, by torch's own warnings of it."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def products_per_second(device: torch.device, precision: torch.dtype, size: int) -> float:
    """The device's rate in FLOP/s at products of [size, size] matrices, the best of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
    best = 0.0
    for _ in range(10):
        synchronise(device)
        began = time.perf_counter()
        left @ right
        synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def measure_all(scale: Scale, self_test: bool) -> Iterator[dict[str, Any]]:
    """Every row, as it is measured."""
    for (name, size), length, setting in itertools.product(sizes(self_test).items(), scale.lengths, SETTINGS):
        target = size.target.get(length, {})
        if setting.compiled and not target:  # it takes half a minute
            continue
        row: dict[str, Any] = {"model": name, "length": length, **setting._asdict()}
        if setting == Setting("bf16", "sparse head"):
            row["targets"] = target | {"waiting_for_data": 0.01}
        try:
            row |= measure(size, length, setting, scale)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except RuntimeError as error:
            if not setting.compiled:  # the compiler's failures are RuntimeErrors, and its own affair
                raise
            row["failed"] = one_line(error, 100)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--self_test", action="store_true", help="toys on a CPU: whether it runs, no figures")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json; none of a self-test")
    args = parser.parse_args()
    if not args.self_test and not torch.cuda.is_available():
        print("no GPU here: nothing is measured (--self_test runs the same on a CPU, with toys)")
        return
    if args.out is None and not args.self_test:
        args.out = Path(__file__).parent / "results" / "gpu.json"
    device = torch.device("cpu" if args.self_test else "cuda")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # no row is called compiled that is not
    lengths, tokens, largest = ((128,), 256, 256) if args.self_test else ((128, 512), 32_768, 8192)
    products = {name: products_per_second(device, dtype, largest) for name, dtype in DTYPES.items()}
    scale = Scale(device, lengths, tokens, *((2, 1) if args.self_test else (8, 3)), products)
    invariants: dict[str, Any] = {**check_invariants(device), "9": check_skipped_steps(device)}
    stored: dict[str, Any] = {
        "what": f"training steps of {tokens:,} tokens on one GPU, random weights",
        "products_per_second": products,
        "invariants": invariants,
        "masking": [time_masking(length, scale) for length in lengths],
        "rows": [],
        "environment": environment(make_accelerator(device, "no")),
    }
    print("invariants 1, 2, 8 and 9 hold on the device")
    for masking in stored["masking"]:
        print(
            f"masking on the device, {masking['length']} tokens a chunk: {masking['ratio']:.2f} times the "
            f"host's speed ({masking['low']:.2f} to {masking['high']:.2f}, n = {masking['n']})"
        )
    print(f"{'':48}{'tokens/s':>12}{'used':>6}{'MiB':>9}{'waits':>8}  syncs", flush=True)
    for row in measure_all(scale, args.self_test):
        stored["rows"].append(row)
        print(line(row), flush=True)
        if args.out:
            write_json(args.out, stored)  # after each row, so that a failure costs one


def line(row: dict[str, Any]) -> str:
    """A row of the table that is printed."""
    kind = f"{row['model']} {row['length']} {row['precision']} {row['way']}"
    start = f"{kind + (' compiled' if row['compiled'] else ''):48}"
    if "failed" in row:
        return f"{start}  {row['failed']}"
    waiting = "" if row["waiting_for_data"] is None else f"{row['waiting_for_data']:.1%}"
    syncs = "" if row["synchronisations_in_a_step"] is None else row["synchronisations_in_a_step"]
    return (
        f"{start}{row['tokens_per_second']:>12,.0f}{row['utilisation']:>6.2f}{row['peak_memory_mib']:>9,.0f}"
        f"{waiting:>8}  {syncs}"
    )


if __name__ == "__main__":
    main()
