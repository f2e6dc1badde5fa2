"""What a process pays for the size of its corpus: at start, a step, and at the end, and for an epoch's order.

Workload: whole runs of train.py, 30 steps of 32 chunks of 128 tokens, evaluated on 64 held-out chunks before and
after, on token stores of 25 million and of 25 billion tokens in documents of 250, train and held-out alike. The model
has one layer of 4 units and no dropout, so that little of a step is arithmetic, which a GPU's host leaves to the GPU.
These are sparse files in which every token is the word of id 0, but for the word starts that the tables of words look
at; an earlier run has read the same pages. Peer: the smaller store; both in turn, `--n` of each, medians. Ceiling: a
ratio of 1. Memory is the highest RssAnon of the process, without mapped pages. CPU seconds are those of the process,
which other work on the machine stretches less. A store counts as verified: its checksums, once a machine and boot,
take time in proportion to it by design. The order of an epoch is compared with sorting, which it was by.

    python benchmarks/corpus_size.py        writes benchmarks/results/corpus_size.json
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
import mlm.train
from mlm.config import Config
from mlm.data.batches import Batches
from mlm.data.cache import key
from mlm.data.masking import draw
from mlm.data.order import AT_ONCE, chunks_seen, subset
from mlm.data.token_store import prepare
from mlm.data.tokenizer import tokenizer_info
from mlm.engine.update import Step, Update
from mlm.files import stamp, write_json
from mlm.report.environment import environment

SIZES = {"25 million": 25 * 10**6, "25 billion": 25 * 10**9}  # tokens
DOCUMENT, LENGTH, BATCH, STEPS, HELD_OUT, VOCABULARY = 250, 128, 32, 30, 64, 300
LAYOUTS: dict[str, dict[str, Any]] = {
    "concatenated": {},
    "concatenated, --remainder pad": {"remainder": "pad"},
    "--line_by_line": {"line_by_line": True},
}
LIMIT = 1.2  # times what the smaller store takes; but for mapping, as all pages of that one are mapped after a while
MEASURED = {
    "first_step_seconds": "s to the first step",
    "first_step_cpu_seconds": "CPU s to the first step",
    "memory_mib": "MiB",
    "step_cpu_ms": "CPU ms a step",
    "load_cpu_ms": "of which for its batch, pages mapped",
    "map_cpu_ms": "of which to map its pages",
    "end_seconds": "s after the last step",
    "end_cpu_seconds": "CPU s after the last step",
}


def settings(folder: Path, size: str, layout: str) -> dict[str, Any]:
    """A run's, by the names of flags."""
    return {
        "model_name_or_path": str(folder / "checkpoint"), "token_store": str(folder / size),
        "train_file": str(folder / "train.txt"), "validation_file": str(folder / "validation.txt"),
        "allow_leaks": True, "output_dir": str(folder / "run"), "overwrite_output_dir": True,
        "max_seq_length": LENGTH, "train_batch_size": BATCH, "per_device_train_batch_size": BATCH,
        "max_train_steps": STEPS, "max_eval_samples": HELD_OUT, "learning_rate": 1e-3, "dropout": 0.0,
        **LAYOUTS[layout],
    }  # fmt: skip


def make(folder: Path) -> None:
    """A checkpoint, text files, and for each size a token store of theirs that has grown to it."""
    words = [f"w{number}" for number in range(VOCABULARY - 5)]
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: number for number, token in enumerate([*words, *special])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{token[1:-1].lower()}_token": token for token in special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes))
    for part in (tokenizer, model):
        part.save_pretrained(folder / "checkpoint")
    for name in ("train", "validation"):
        (folder / f"{name}.txt").write_text("w0 w1 w2\n" * 100)
    for size, tokens in SIZES.items():
        config = Config.of(**settings(folder, size, "concatenated"))
        stores = prepare(config.corpus, tokenizer, tokenizer_info(tokenizer), config.token_store)
        for store in stores.values():
            grow(Path(store.ids.filename).parent, tokens)


def grow(folder: Path, tokens: int) -> None:
    """Makes the store of a split one of so many tokens, and has it count as verified on this machine."""
    documents = tokens // DOCUMENT
    os.truncate(folder / "ids.npy", 0)
    for name, dtype in (("ids", np.uint16), ("word_starts", np.bool_)):
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (tokens,))
    offsets = np.lib.format.open_memmap(folder / "document_offsets.npy", "w+", np.int64, (documents + 1,))
    for first in range(0, documents + 1, 1 << 22):
        offsets[first : first + (1 << 22)] = np.arange(first, min(first + (1 << 22), documents + 1)) * DOCUMENT
    offsets.flush()
    starts = np.load(folder / "word_starts.npy", mmap_mode="r+")
    for rows, length in ((tokens // LENGTH, LENGTH), (-(-tokens // LENGTH), LENGTH), (documents, DOCUMENT)):
        for row in subset(0, rows, HELD_OUT):
            starts[max(row * length - 1, 0) : (row + 1) * length + 1] = True
    starts.flush()
    np.save(folder / "token_counts.npy", np.arange(VOCABULARY) * 0 + tokens * (np.arange(VOCABULARY) == 0))
    np.save(folder / "document_lengths.npy", documents * (np.arange(DOCUMENT + 1) == DOCUMENT))

    path = folder / "header.json"
    header = json.loads(path.read_text())
    counts = dict.fromkeys(("tokens", "maskable_tokens", "words", "spaced_words"), tokens)
    header |= counts | {"documents": documents, "characters": 3 * tokens}
    header["bytes"] = {name: (folder / f"{name}.npy").stat().st_size for name in header["bytes"]}
    del header["seal"]
    path.write_text(json.dumps(header | {"seal": key(header)}))
    [machine] = json.loads((folder / "verified.json").read_text())
    files = ["header.json", *(f"{name}.npy" for name in header["bytes"])]
    write_json(folder / "verified.json", {machine: {name: stamp(folder / name) for name in files}})


def run(given: dict[str, Any], began: float) -> dict[str, float]:
    """Trains in this process, which was started at `began` on the monotonic clock."""
    loads, steps, work, memory, ended = [], [], [], [], threading.Event()

    def clocks() -> np.ndarray:
        return np.array([time.monotonic() - began, time.process_time()])

    class Timed(Batches):
        def load(self, step: int, micro_batch: int) -> Any:
            clock = [time.thread_time()]
            for _ in range(2):  # the second finds the pages mapped
                loaded = super().load(step, micro_batch)
                clock.append(time.thread_time())
            loads.append(np.diff(clock))
            return loaded

    class Watched(Update):
        def __call__(self, step: int, *requests: Any) -> Step:
            started = time.process_time()
            applied = super().__call__(step, *requests)
            work.append(time.process_time() - started - loads[-1][1])
            steps.append(clocks())
            return applied

    def watch() -> None:
        while not ended.wait(0.01):
            anonymous = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
            memory.append(int(anonymous[1]) / 2**10)

    mlm.train.Batches, mlm.train.Update = Timed, Watched
    watcher = threading.Thread(target=watch)
    watcher.start()
    mlm.train.train(Config.of(**given))
    figures = *steps[0], *(clocks() - steps[-1])
    ended.set()
    watcher.join()
    names = "first_step_seconds", "first_step_cpu_seconds", "end_seconds", "end_cpu_seconds"
    first, second = 1e3 * np.mean(loads[1:], axis=0)  # loads[0] has computed the places of all steps
    step = {"step_cpu_ms": 1e3 * np.mean(work[1:]), "load_cpu_ms": second, "map_cpu_ms": first - second}
    return {"memory_mib": max(memory), **step, **dict(zip(names, figures, strict=True))}


def measure(folder: Path, size: str, layout: str) -> dict[str, float]:
    """`run` in a process of its own."""
    given = json.dumps(settings(folder, size, layout))
    command = [sys.executable, __file__, "--run", given, "--began", str(time.monotonic())]
    here = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.check_output(command, env=here, text=True).splitlines()[-1])


def order(n: int, sorts: bool) -> dict[str, Any]:
    """Seconds and bytes of the places that the first batch of n chunks computes, of a whole epoch's, of sorting it."""

    def whole() -> None:
        for first in range(0, n, 1 << 16):
            chunks_seen(0, np.arange(first, min(first + (1 << 16), n)), n, n)

    work: dict[str, Callable[[], Any]] = {"first batch": lambda: chunks_seen(1, np.arange(AT_ONCE), n, n)}
    if sorts:
        work["whole epoch"] = whole
        work["sorting"] = lambda: np.argsort(draw(0, 0, np.zeros(1, np.int64), n)[0], kind="stable")
    measured = {}
    for name, call in work.items():
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        tracemalloc.start()
        call()
        measured[name] = {"seconds": seconds, "bytes": tracemalloc.get_traced_memory()[1]}
        tracemalloc.stop()
    return {"chunks": n, **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=3, help="runs of each kind")
    parser.add_argument("--folder", type=Path, help="where sparse files can be; 2 GB are written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "corpus_size.json")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args.run, args.began)))
        return

    where, load = environment(Accelerator(cpu=True)), os.getloadavg()[0]
    orders = [order(n, sorts=n <= 10**7) for n in (10**5, 10**6, 10**7, SIZES["25 billion"] // LENGTH)]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make(folder)
        runs: dict[str, dict[str, list[dict[str, float]]]] = {}
        runs = {layout: {size: [] for size in SIZES} for layout in LAYOUTS}
        for number in range(args.n + 1):
            for layout, by_size in runs.items():
                for size, measured in by_size.items():
                    found = measure(folder, size, layout)
                    print(layout, size, found, flush=True)
                    if number > 0:  # the first reads from the disk what the others have in the page cache
                        measured.append(found)
            if number > 0:
                store(args.out, runs, orders, {**where, "load_before": load})


def store(out: Path, runs: dict[str, Any], orders: list[dict[str, Any]], where: dict[str, Any]) -> None:
    medians = {
        layout: {
            size: {name: statistics.median(each[name] for each in measured) for name in MEASURED}
            for size, measured in by_size.items()
        }
        for layout, by_size in runs.items()
    }
    n = len(next(iter(next(iter(runs.values())).values())))
    what = "runs on 25 billion tokens against runs on 25 million"
    stored = {"what": what, "n": n, "measured": MEASURED, "at_most": LIMIT, "medians": medians, "runs": runs}
    write_json(out, {**stored, "order": orders, "environment": where})


if __name__ == "__main__":
    main()
