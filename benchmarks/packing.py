"""What --pack_documents saves where each document is a row: padding, and with it time.

Workload: hotel reviews in Chinese, each a document, cut to the length of a row; training steps of ALBERT, loading and
masking included, over several sizes of a step and lengths of a row. A round times the same documents under the same
masks in both ways, in turn, now one and now the other first, in this process. Tokens are those of documents; padding
is the share of all others. Micro-batches are those of `--per_device_train_batch_size auto`. Peer: --line_by_line
without packing, whose rows are as long as the longest document of a micro-batch. Ceiling: the ratio of what both
compute, tokens and padding, which steps would reach that take the same time for each of them; the median of a few
noisy rounds may pass it.

    python benchmarks/packing.py --data FOLDER

FOLDER holds zh-hotel-reviews/train.parquet and models/. Writes benchmarks/results/packing.json.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.compare import row
from mlm.config import Config
from mlm.data.batches import Batch, Batches
from mlm.engine.optimizer import make_optimizer, make_scheduler
from mlm.engine.update import Update
from mlm.errors import UserError
from mlm.files import write_json
from mlm.model.load import load_model, open_corpus
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import environment
from mlm.train import make_batches, objective

MODEL = "ckip-albert-tiny-chinese"
WORKLOADS = ((32, 128), (256, 128), (32, 512))  # documents a step, tokens of a row at most
STEPS = {32: 8, 256: 1}  # of a round


def config_of(data: Path, stores: str, documents: int, length: int) -> Config:
    return Config.of(
        model_name_or_path=str(data / "models" / MODEL),
        train_file=str(data / "zh-hotel-reviews" / "train.parquet"),
        token_store=stores,
        line_by_line=True,
        pack_documents=True,
        max_seq_length=length,
        train_batch_size=documents,
        per_device_train_batch_size="auto",
    )


def computed(share: list[Batch]) -> tuple[int, int]:
    """Tokens of documents, and all that are computed."""
    return sum(batch.tokens for batch in share), sum(batch.input_ids.numel() for batch in share)


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """A row of results: how much sooner packed rows are done, and the padding of both."""
    length, documents = config.chunks.max_seq_length, config.update.train_batch_size
    accelerator = Accelerator(cpu=True)
    tokenizer, info, stores = open_corpus(config)
    model = SparseMaskedLM(load_model(config.model, tokenizer, 0), length, pack=True).train()
    if not model.packs:
        raise UserError(f"{MODEL} does not keep documents apart")
    made, _ = make_batches(config, info, stores, length, accelerator)
    sides: dict[str, Batches] = {"ours": replace(made, pack=True), "theirs": made}
    optimizer = make_optimizer(model.named_parameters(), config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, 10**6)
    given = [optimizer], [scheduler], accelerator, config.update
    updates = {name: Update(model, objective, batches, *given) for name, batches in sides.items()}
    steps = STEPS[documents]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    sizes = {name: [0, 0] for name in sides}
    for number in range(rounds + 1):  # the first warms up
        for name in sorted(sides, reverse=bool(number % 2)):
            began = time.perf_counter()
            for step in range(number * steps, (number + 1) * steps):
                updates[name](step)
            seconds[name].append(time.perf_counter() - began)
            for step in range(number * steps, (number + 1) * steps):
                share, _ = sides[name].load(step, updates[name].micro_batch)
                sizes[name] = [before + now for before, now in zip(sizes[name], computed(share), strict=True)]
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"][1:], seconds["theirs"][1:], strict=True)]
    tokens = sizes["ours"][0] / (rounds + 1)  # of a round
    return row(
        f"{documents} documents a step, rows of {length} tokens",
        "padded rows",
        "peer",
        "×",
        ratios,
        at_least=1.0,
        tokens_per_second={name: tokens * rounds / sum(times[1:]) for name, times in seconds.items()},
        padding={name: 1 - size[0] / size[1] for name, size in sizes.items()},
        ceiling=sizes["theirs"][1] / sizes["ours"][1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of zh-hotel-reviews and models")
    parser.add_argument("--n", type=int, default=9, help="rounds of each workload")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    args = parser.parse_args()
    where = {**environment(Accelerator(cpu=True)), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as stores:
        rows = [measure(config_of(args.data, stores, *workload), args.n) for workload in WORKLOADS]
    what = "Training on documents that share rows, against rows of one document each"
    write_json(args.out, {"what": what, "model": MODEL, "rows": rows, "environment": where})
    print(args.out.read_text())


if __name__ == "__main__":
    main()
