"""Training on one GPU, with random weights: speed, memory, utilisation, and the laws checked on the device.

For the sizes of DistilBERT, BERT-base, RoBERTa-base and ModernBERT-base, at 128 and 512 tokens, about 32,000
tokens a step: fp16 with its scaler and bf16, the dense head (the model's own loss) and the sparse one, eager,
and compiled for the sparse head in bf16. Ceiling: the GPU's own rate at a large product of matrices in that
precision; what the dense head does in excess of the sparse one does not count as use. Waiting for data is
the share of a step that goes when its batch is there already; how often the host waits for the device while
it loads a batch and tells it a step is counted, and should be never. A compiled step sees one number of
masked tokens, to which a run would have to pad.

    python benchmarks/gpu.py                 under 8 minutes; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --self_test     the same on a CPU, with toys that say nothing of speed

Without a GPU it says so and ends well.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from benchmarks.stepper import forward_flops
from mlm.config import Config
from mlm.data.batches import Batch, Batches
from mlm.data.chunks import ChunkConfig, Chunks
from mlm.data.corpus import CorpusConfig
from mlm.data.masking import Recipe, corrupt, corrupt_torch, draw, draw_torch
from mlm.data.token_store import TokenStoreConfig
from mlm.engine.optimizer import make_optimizer
from mlm.errors import one_line
from mlm.files import write_json
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import environment, peak_memory_mib
from mlm.report.run_directory import RunConfig
from mlm.train import train

# Words are ids from FIRST_WORD to VOCABULARY, which every size has; those below are special here.
VOCABULARY, FIRST_WORD, MASK_ID = 30_000, 1000, 103
SEED, RATE = 0, 0.15
# Precision, sparse head, compiled: what one would train with last, compiled.
SETTINGS = (
    (torch.float16, False, False),
    (torch.float16, True, False),
    (torch.bfloat16, False, False),
    (torch.bfloat16, True, False),
    (torch.bfloat16, True, True),
)
LATEST_COMPILATION = 6 * 60  # seconds


class Scale(NamedTuple):
    """What is the same for all rows."""

    device: torch.device
    tokens: int  # a step
    steps: int  # a round, of `rounds`
    rounds: int
    products: dict[torch.dtype, float]  # FLOP/s of large products of matrices


class Size(NamedTuple):
    model: Callable[[int], PreTrainedModel]  # of so many positions
    target: dict[int, dict[str, float]]  # what to reach in bf16 with the sparse head, by length


def sizes(self_test: bool) -> dict[str, Size]:
    if self_test:
        return {"toy": Size(lambda T: toy(), {})}

    fast = {"tokens_per_second": 1e6, "utilisation": 0.4}
    return {
        "DistilBERT": Size(lambda T: DistilBertForMaskedLM(DistilBertConfig()), {128: fast}),
        "BERT-base": Size(lambda T: BertForMaskedLM(BertConfig()), {512: {"utilisation": 0.45}}),
        "RoBERTa-base": Size(
            lambda T: RobertaForMaskedLM(RobertaConfig(vocab_size=50265, max_position_embeddings=T + 2)), {}
        ),
        "ModernBERT-base": Size(lambda T: ModernBertForMaskedLM(ModernBertConfig()), {}),
    }


def toy(dropout: float = 0.1) -> PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **shape, **dropouts))


def made_up(chunks: int, length: int, tokens: int) -> tuple[Batches, Recipe]:
    """Batches of random words, masked as the loop has them masked."""
    rng = np.random.default_rng(SEED)
    ids = rng.integers(FIRST_WORD, VOCABULARY, chunks * length, dtype=np.uint16)
    scale = 1 << 32
    recipe = Recipe(
        select=round(RATE * scale),
        replace=round(0.8 * scale),
        randomise=round(0.9 * scale),
        mask_id=MASK_ID,
        maskable_ids=np.arange(FIRST_WORD, VOCABULARY),
        whole_word=False,
    )
    rows = Chunks(ids, np.ones(len(ids), bool), length, chunks, pad_id=0)
    maskable = np.arange(VOCABULARY) >= FIRST_WORD
    return Batches(rows, recipe, maskable, SEED, tokens // length), recipe


class Trainer:
    """A step as train.py's loop takes it, with either head, in either precision."""

    def __init__(self, model: PreTrainedModel, precision: torch.dtype, sparse: bool, compiled: bool) -> None:
        self.device = next(model.parameters()).device
        self.model = SparseMaskedLM(model).train() if sparse else model.train()
        self.sparse, self.precision = sparse, precision
        self.run = torch.compile(self.model) if compiled else self.model
        half = precision == torch.float16
        self.optimizer = make_optimizer(model, 5e-5, 0.0, fused=not half)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)

    def step(self, batch: Batch) -> None:
        with torch.autocast(self.device.type, self.precision):
            if self.sparse:
                nats, _ = self.run(batch.input_ids, batch.positions, batch.targets)
                loss = nats.mean()
            else:
                labels = torch.full_like(batch.input_ids, -100).flatten()
                labels[batch.positions] = batch.targets
                loss = self.run(input_ids=batch.input_ids, labels=labels.view_as(batch.input_ids)).loss
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def seconds_a_step(trainer: Trainer, batch: Callable[[int], Batch], steps: int) -> float:
    """The mean over some steps, whose batches are made, or there already, when they are called for."""
    began = time.perf_counter()
    for step in range(steps):
        trainer.step(batch(step))
    synchronise(trainer.device)
    return (time.perf_counter() - began) / steps


@torch.no_grad()
def check_sparse_head(trainer: Trainer, batch: Batch) -> None:
    """Raises AssertionError where the sparse head's loss is not the dense one's, in this precision."""
    head, found = trainer.model.eval(), []
    with torch.autocast(trainer.device.type, trainer.precision):
        for head.sparse in (False, True):
            found.append(head(batch.input_ids, batch.positions, batch.targets)[0].mean().item())
    head.train()
    assert abs(found[0] - found[1]) < 1e-2 * found[0], f"law 8: {found}"


def measure(
    size: Size, length: int, precision: torch.dtype, sparse: bool, compiled: bool, scale: Scale
) -> dict[str, Any]:
    """One row: tokens/s, peak memory, utilisation, the share of a step that waits for data."""
    gc.collect()  # the last row's model, which its own hook refers to
    torch.compiler.reset()  # or a second model would be compiled for shapes that vary
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(SEED)
    model = size.model(length).to(scale.device)
    batches, _ = made_up(4 * scale.tokens // length, length, scale.tokens)
    trainer = Trainer(model, precision, sparse, compiled)

    def load(step: int) -> Batch:
        [batch], _ = batches.load(step, batches.global_batch)
        return batch.to(scale.device)

    first = load(0)
    if sparse and not compiled:
        check_sparse_head(trainer, first)
    for _ in range(3):
        trainer.step(first)
    synchronise(scale.device)
    if scale.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ready, made = [], []  # seconds a step, the batch there already, and made for it; in turn
    for _ in range(scale.rounds):
        ready.append(seconds_a_step(trainer, lambda step: first, scale.steps))
        made.append(seconds_a_step(trainer, load, scale.steps) if not compiled else math.nan)
    waits = None
    if scale.device.type == "cuda" and precision == torch.bfloat16:  # under fp16 the scaler asks
        waits = synchronisations(lambda: trainer.step(first if compiled else load(0)))
    seconds = statistics.median(ready)
    flops = 3 * forward_flops(model, batches.global_batch, length, len(first.positions))
    waiting = None if compiled else statistics.median(1 - a / b for a, b in zip(ready, made, strict=True))
    return {
        "tokens_per_second": scale.tokens / seconds,
        "low": scale.tokens / max(ready),
        "high": scale.tokens / min(ready),
        "n": len(ready),
        "utilisation": flops / seconds / scale.products[precision],
        "peak_memory_mib": peak_memory_mib(scale.device),
        "waiting_for_data": waiting,
        "synchronisations_in_a_step": waits,
    }


def check_laws(device: torch.device) -> dict[str, str]:
    """Laws 1, 2 and 8 on the device. Raises AssertionError where one does not hold."""
    batches, recipe = made_up(64, 128, 4096)
    ids = batches.chunks.take(np.arange(64)).ids
    maskable, draws = batches.maskable[ids], draw(SEED, 0, np.arange(64), 128)
    here = corrupt(ids, maskable, draws, recipe)
    there = corrupt_torch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(maskable).to(device),
        draw_torch(SEED, 0, torch.arange(64, device=device), 128),
        recipe,
    )
    for mine, its in zip(here, there, strict=True):
        assert np.array_equal(mine, its.cpu().numpy()), "law 1: masks differ"
    [batch], _ = batches.load(0, batches.global_batch)
    for mine, its in zip(batch, batch.to(device), strict=True):
        assert mine is its is None or torch.equal(mine, its.cpu()), "a batch changes on its way"

    def gradients(sparse: bool, passes: int) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(SEED)
        model = toy(dropout=0.0).to(device)
        head = SparseMaskedLM(model)
        head.sparse = sparse
        total, (share, masked) = 0.0, batches.load(0, batches.global_batch // passes)
        for batch in share:
            nats, _ = head.train()(*batch.to(device)[:3])
            (nats.sum() / masked).backward()
            total += nats.sum().item() / masked
        return total, [p.grad for p in model.parameters() if p.grad is not None]

    loss, reference = gradients(sparse=False, passes=1)
    for law, sparse, passes in (("law 8: sparse equals dense", True, 1), ("law 2: cut in 4", True, 4)):
        other, found = gradients(sparse, passes)
        assert abs(other - loss) < 1e-4 * loss, law
        for mine, its in zip(reference, found, strict=True):
            assert (mine - its).norm() <= 1e-3 * mine.norm() + 1e-6, law
    return {
        "1": "masks and targets of 64 × 128 tokens equal the CPU's to the bit",
        "2": "loss to 1e-4, gradients to 1e-3 in norm, in 1 pass and in 4, fp32",
        "8": "loss to 1e-4, gradients to 1e-3 in norm, sparse head and dense head, fp32",
    }


def check_skipped_steps(device: torch.device) -> dict[str, Any]:
    """Law 9, in a real run: steps that fp16's scaler skips hold the learning rate. Raises AssertionError."""
    scaler = GradScalerKwargs(init_scale=2.0**40)
    if device.type == "cuda":
        accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[scaler])
    else:  # accelerate offers no fp16 here, torch does
        accelerator = Accelerator(cpu=True)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scaler.init_scale)
    with tempfile.TemporaryDirectory() as room:
        lines = [f"the {a} {b} likes {c} ." for a in ("old", "young") for b in "abcdef" for c in "uvwxyz"]
        Path(room, "train.txt").write_text("\n".join(lines * 4))
        config = Config(
            corpus=CorpusConfig(train_file=f"{room}/train.txt", validation_split_percentage=20),
            token_store=TokenStoreConfig(token_store=room),
            chunks=ChunkConfig(max_seq_length=16),
            loop=LoopConfig(train_batch_size=8, max_train_steps=10, eval_on_start=False),
            run=RunConfig(output_dir=f"{room}/run", logging_steps=1),
        )
        results = train(config, accelerator).results
        events = [json.loads(line) for line in Path(room, "run", "metrics.jsonl").read_text().splitlines()]
    rates = [event["learning_rate"] for event in events if event["event"] == "train"]
    assert results["skipped_steps"] > 0, "law 9: nothing was skipped"
    assert np.allclose(rates, [5e-5 * (1 - step / 10) for step in range(1, 11)]), "law 9: learning rates"
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
    began = time.perf_counter()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # no row called compiled that is not
    lengths, tokens, largest = ((128,), 256, 256) if args.self_test else ((128, 512), 32_768, 8192)
    products = {
        precision: products_per_second(device, precision, largest)
        for precision in (torch.float16, torch.bfloat16)
    }
    scale = Scale(device, tokens, *((2, 1) if args.self_test else (8, 3)), products)
    laws: dict[str, Any] = {**check_laws(device), "9": check_skipped_steps(device)}
    AcceleratorState._reset_state()  # from fp16, which the environment would name
    told: dict[str, Any] = {
        "what": f"training steps of {tokens:,} tokens on one GPU, random weights",
        "products_per_second": {name_of(precision): rate for precision, rate in products.items()},
        "laws": laws,
        "rows": [],
        "environment": environment(Accelerator(cpu=args.self_test)),
    }
    print("laws 1, 2, 8 and 9 hold on the device")
    print(f"{'':34}{'tokens/s':>12}{'used':>6}{'MiB':>9}{'waits':>8}  syncs", flush=True)
    for name, size in sizes(args.self_test).items():
        for length in lengths:
            for precision, sparse, compiled in SETTINGS:
                late = time.perf_counter() - began > LATEST_COMPILATION
                if compiled and (args.self_test or late):  # it takes half a minute
                    continue
                row = {
                    "model": name,
                    "length": length,
                    "precision": name_of(precision),
                    "head": "sparse" if sparse else "dense",
                    "compiled": compiled,
                }
                if (precision, sparse) == (torch.bfloat16, True):
                    row["targets"] = size.target.get(length, {}) | {"waiting_for_data": 0.01}
                try:
                    row |= measure(size, length, precision, sparse, compiled, scale)
                except torch.OutOfMemoryError:
                    row["failed"] = "out of memory"
                except RuntimeError as error:
                    if not compiled:  # the compiler's failures are RuntimeErrors, and its own affair
                        raise
                    row["failed"] = one_line(error, 100)
                told["rows"].append(row)
                print(line(row), flush=True)
                if args.out:
                    write_json(args.out, told)  # after each row, so that a failure costs one


def name_of(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def line(row: dict[str, Any]) -> str:
    """A row of the table that is printed."""
    kind = f"{row['model']} {row['length']} {row['precision']} {row['head']}"
    head = f"{kind + (' compiled' if row['compiled'] else ''):34}"
    if "failed" in row:
        return f"{head}  {row['failed']}"
    waiting = "" if row["waiting_for_data"] is None else f"{row['waiting_for_data']:.1%}"
    syncs = "" if row["synchronisations_in_a_step"] is None else row["synchronisations_in_a_step"]
    return (
        f"{head}{row['tokens_per_second']:>12,.0f}{row['utilisation']:>6.2f}{row['peak_memory_mib']:>9,.0f}"
        f"{waiting:>8}  {syncs}"
    )


if __name__ == "__main__":
    main()
