"""The lowest held-out loss that a recipe reaches on frozen data in two domains, and the time to a given loss.

Workload: 2,000 documents to train on, in chunks of 128 tokens: IMDb's reviews without markup with
bert-tiny-wikitext, and hotel reviews in simplified Chinese with ckip-albert-tiny-chinese. Documents are drawn with a
fixed seed from files whose SHA-256 is checked. A run sees them in `--passes` passes, and as many chunks of the next as
fill its last step. The test loss is that of the weights that it ends with, in nats a token: each token of 300
held-out test documents is predicted once (7 folds), in concatenated chunks however a recipe cuts what it trains on.
Where a recipe adds words to the vocabulary, nats are counted over those tokens that the base's own tokenizer has.
Recipes are chosen by the dev loss: the first fold of 300 other held-out documents (`--dev` measures these alone).
Beside them, where the text has labels, the probe: the accuracy of logistic regression on the mean and first states of
the model (mlm/evaluation/probe.py), cross-validated on 1,000 further documents. It decides nothing.

Peer: `default`, the course's settings at the learning rate that suits the English base, with the same seeds. A recipe
is a YAML file of flags in `recipes/`, for the loop `loop.py`: mlm/train.py with the flags of `ingredients.py`. One
more, `vocabulary_extension`, is scripts/extend_vocabulary.py's, which reads the documents to train on beforehand.

Rule: `default` holds the record of a domain and number of passes until another recipe, in the order in which they
were measured, has a lower loss at p < 0.01 by a paired one-sided t-test over seeds 1 to 5, and is not worse, at
p < 0.01, in the other domain. One in a hundred recipes that do nothing would pass such a test. It says how sure a
difference is over seeds, on these documents. Ceiling: none is known.

    python benchmarks/speedrun/run.py --data FOLDER default no_dropout --seeds 1 2 3 4 5 --passes 1

Time to target, `--track time` (all above is `--track data`): seconds from the start of a process to its end for the
test loss that run_mlm_no_trainer's recipe (no_trainer_recipe.py: batch 8, learning rate 5e-5) reaches in one pass
under the same seed. That recipe is the peer here. Each side runs in turn on all cores, from an empty token store and
cache, and evaluates once, on ten documents. A recipe names its `max_train_steps` and flags of scripts/train.py, which
runs it. Its steps were found on the dev documents; those of short_to_target were raised once after a look at the test
loss (speedrun/LOG.md). Losses are measured afterwards, and show whether a recipe has reached the target.

FOLDER holds imdb/, zh-hotel-reviews/ and models/. What benchmarks/results/speedrun.json has is not measured again.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from sklearn.model_selection import StratifiedKFold, cross_val_score
from threadpoolctl import threadpool_limits
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # where a script finds its neighbours
from extend_vocabulary import ExtensionConfig, extend

from benchmarks.reviews import read
from benchmarks.speedrun import loop
from benchmarks.speedrun.records import SEEDS
from mlm import cli
from mlm.data.cache import build_once
from mlm.data.chunks import ChunkConfig
from mlm.data.corpus import CorpusConfig, OutOfDomainConfig
from mlm.data.task import TaskConfig, read_task
from mlm.engine.device import make_accelerator
from mlm.errors import UserError
from mlm.evaluation.eval_set import EvalSet, EvaluateConfig, open_eval_sets
from mlm.evaluation.evaluate import evaluate
from mlm.evaluation.probe import CLASSIFIERS, features
from mlm.files import write_json
from mlm.model.load import ModelConfig, load_model, open_corpus
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import environment

BENCHMARKS, RECIPES = Path(__file__).parents[1], Path(__file__).parent / "recipes"
TRAIN_PY = BENCHMARKS.parent / "scripts" / "train.py"
TRAIN, HELD_OUT, LABELLED, LENGTH, FOLDS = 2000, 300, 1000, 128, 7
FEW = 10  # documents that a side of the time track evaluates on itself
WHERE = ("commit", "mlm", "torch", "transformers", "processor", "threads")  # of the environment, beside each run
# A run is measured after its end, by `measure`; its own figures are of its last weights, and of few chunks.
ONCE = {"eval_on_start": "false", "eval_steps": 10**9}
CHEAP = {**ONCE, "max_eval_samples": 32}
EXTENSION = "vocabulary_extension"  # a flag of a recipe that is no flag of loop.py
PEER = "run_mlm_no_trainer"
PEERS = {"per_device_train_batch_size": 8, "learning_rate": 5e-5, "num_train_epochs": 1}  # its settings


class Domain(NamedTuple):
    """Frozen files, and the first 16 digits of their SHA-256."""

    train: tuple[str, str]
    held_out: tuple[str, str]
    model: tuple[str, str]


DOMAINS = {
    "imdb": Domain(
        ("imdb/train.parquet", "5fcb2fb48c810da8"),
        ("imdb/test.parquet", "92710970e7720ea9"),
        ("models/bert-tiny-wikitext/model.safetensors", "c711574d36170dda"),
    ),
    "hotel": Domain(
        ("zh-hotel-reviews/train.parquet", "627e791a9d8c68c8"),
        ("zh-hotel-reviews/validation.parquet", "4878591be6b8963b"),
        ("models/ckip-albert-tiny-chinese/model.safetensors", "558b10cf40ab8bdb"),
    ),
}


class Job(NamedTuple):
    """A run, or a side of a round of the time track, to be measured."""

    domain: str
    passes: float
    recipe: str
    seed: int
    files: dict[str, str]  # as `freeze` gives them
    folder: Path  # of the domain
    test: bool  # whether the test documents are looked at

    @property
    def key(self) -> dict[str, Any]:
        """What a run is known by."""
        named = {"domain": self.domain, "passes": self.passes, "recipe": self.recipe, "seed": self.seed}
        return {**named, "settings": settings(self.recipe)}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", help=f"names of files in recipes/; {PEER} is a side of --track time")
    parser.add_argument("--data", type=Path, required=True, help="folder of imdb, zh-hotel-reviews and models")
    parser.add_argument("--track", choices=("data", "time"), default="data")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--passes", type=float, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS], help="of --track time: its rounds")
    parser.add_argument("--dev", action="store_true", help="measure the dev loss alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of OMP_NUM_THREADS threads each")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "speedrun.json")
    args = parser.parse_args(words)
    if args.track == "time" and args.jobs > 1:
        parser.error("--jobs: each side of --track time has all cores to itself")
    if not set(args.seeds) <= set(SEEDS):
        parser.error(f"--seeds: the records are of seeds {SEEDS[0]} to {SEEDS[-1]}, and no others count")
    for recipe in args.recipes:
        if recipe != PEER and not (RECIPES / f"{recipe}.yaml").is_file():
            parser.error(f"{recipe}: not among {', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}")
        if (recipe == PEER or "max_train_steps" in settings(recipe)) != (args.track == "time"):
            parser.error(f"{recipe}: --track time wants max_train_steps in a recipe, --track data wants none")
        if EXTENSION in settings(recipe) and args.track == "time":
            parser.error(f"{recipe}: --track time takes no {EXTENSION}, whose seconds it would not count")
    return args


def checked(data: Path, frozen: tuple[str, str]) -> Path:
    """A frozen file. Raises UserError where it is another one."""
    path, digest = data / frozen[0], frozen[1]
    if not path.is_file():
        raise UserError(f"{path} is not there: --data is a folder of imdb/, zh-hotel-reviews/ and models/")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()[:16]) != digest:
        raise UserError(f"{path}: its SHA-256 begins with {found}, not {digest}")
    return path


def freeze(domain: Domain, data: Path, folder: Path) -> dict[str, str]:
    """Writes a domain's samples of documents to `folder`: the files as flags, `dev_file`, and `task` where the
    held-out file has labels."""
    train, held_out = (read(checked(data, file)) for file in (domain.train, domain.held_out))
    apart = sorted(set(held_out) - set(train))  # no document stands in two samples
    chosen = np.random.default_rng(0).choice(len(apart), 2 * HELD_OUT, replace=False)
    samples = {
        "train_file": [train[i] for i in np.random.default_rng(0).choice(len(train), TRAIN, replace=False)],
        "validation_file": [apart[i] for i in chosen[:HELD_OUT]],
        "dev_file": [apart[i] for i in chosen[HELD_OUT:]],
    }
    files = {"model_name_or_path": str(checked(data, domain.model).parent)}
    for name, documents in samples.items():
        files[name] = str(folder / f"{name}.parquet")
        pq.write_table(pa.table({"text": documents}), files[name])
    table = pq.read_table(data / domain.held_out[0])
    if "label" in table.column_names:
        label_of = dict(zip(held_out, table["label"].to_pylist(), strict=True))
        rest = np.random.default_rng(1).permutation(np.delete(np.arange(len(apart)), chosen))[:LABELLED]
        files["task"] = str(folder / "task.parquet")
        labelled = {"text": [apart[i] for i in rest], "label": [label_of[apart[i]] for i in rest]}
        pq.write_table(pa.table(labelled), files["task"])
    return files


def settings(recipe: str) -> dict[str, Any]:
    """The flags of a recipe, as they stand in its file."""
    if recipe == PEER:
        return PEERS
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))


def inputs(job: Job) -> dict[str, Any]:
    """The flags that all sides of a job share."""
    files = {name: file for name, file in job.files.items() if name not in ("dev_file", "task")}
    if number := settings(job.recipe).get(EXTENSION):
        files["model_name_or_path"] = str(extended(job, number))
    return {**files, "max_seq_length": LENGTH, "seed": job.seed}


def extended(job: Job, number: int) -> Path:
    """The base with `number` words more, made once for all seeds."""
    text = CorpusConfig(train_file=job.files["train_file"], validation_file=job.files["validation_file"])
    base, place = job.files["model_name_or_path"], job.folder / f"extended-{number}"
    build_once(place, place.is_dir, lambda path: extend(ExtensionConfig(base, str(path), number), text))
    return place


def eval_sets_of(config: loop.Config) -> tuple[Any, dict[str, EvalSet]]:
    """A model's tokenizer, and the held-out samples in its tokens."""
    tokenizer, info, stores = open_corpus(config)
    return tokenizer, open_eval_sets(config, tokenizer, info, stores["validation"], LENGTH)


def measure(config: loop.Config, job: Job, model: PreTrainedModel | None = None) -> dict[str, float | None]:
    """The losses on both held-out samples, in nats a token, of `model`, or else of the one that `config` names, and
    the accuracy of its probe where there are labels."""
    by_folds, accelerator = EvaluateConfig(eval_mask_folds=FOLDS), make_accelerator()
    other = OutOfDomainConfig(out_of_domain_file=job.files["dev_file"])
    chunks = ChunkConfig(max_seq_length=LENGTH)  # the same held-out chunks, however a recipe cuts its training text
    measured = replace(config, evaluate=by_folds, out_of_domain=other, chunks=chunks)
    tokenizer, eval_sets = eval_sets_of(measured)
    _, of_base = eval_sets_of(replace(measured, model=ModelConfig(job.files["model_name_or_path"])))
    net = SparseMaskedLM(model or load_model(measured.model, tokenizer, seed=0), LENGTH).to(accelerator.device)

    def loss(name: str, complete: bool) -> float:
        mine, its = (sets[name].store.header["maskable_tokens"] for sets in (eval_sets, of_base))
        return evaluate(net, eval_sets[name], accelerator, complete).loss * (mine / its)

    found = {"dev_loss": loss("out_of_domain", complete=False)}
    if not job.test:
        return {"loss": None, **found, "accuracy": None}
    found["loss"] = loss("held_out", complete=True)
    task = read_task(TaskConfig(task_file=job.files.get("task")), CorpusConfig())
    return {**found, "accuracy": task and accuracy(features(net.model, tokenizer, task, 32, accelerator), task.labels)}


def accuracy(x: np.ndarray, labels: np.ndarray) -> float:
    """Of logistic regression on features x [n, F] of documents with these labels [n], over five folds."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    with threadpool_limits(1):  # fits too small for threads
        return float(cross_val_score(CLASSIFIERS["logistic regression"], x, labels, cv=folds).mean())


def run(job: Job) -> dict[str, Any]:
    """Trains once and measures what came of it, in this process."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=job.folder) as folder, redirect_stdout(io.StringIO()):
        given = {**inputs(job), **CHEAP, "num_train_epochs": job.passes, "token_store": job.folder / "stores"}
        config = cli.parse_config(loop.Config, flags(job.recipe, {**given, "output_dir": f"{folder}/run"}))
        result = loop.train(config)
        trained = time.perf_counter()
        measured = measure(config, job, result.model)
    ended, own = time.perf_counter(), {name: result.results[name] for name in ("steps", "train_seconds")}
    return {**job.key, **measured, **own, "evaluation_seconds": ended - trained, "seconds": ended - started}


def flags(recipe: str, given: dict[str, Any]) -> list[str]:
    """The command line of loop.py; what is given wins over the recipe."""
    values = {**settings(recipe), **given}
    return [f"--{name}={value}" for name, value in values.items() if name != EXTENSION]


def race(job: Job) -> dict[str, Any]:
    """A side of a round of the time track: the seconds of its process, and the losses that it has reached."""
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        few = f"{folder}/few.parquet"
        pq.write_table(pq.read_table(job.files["validation_file"])[:FEW], few)
        given = {**inputs(job), "validation_file": few, "output_dir": f"{folder}/run"}
        if job.recipe == PEER:
            words = [f"--{name}={value}" for name, value in {**given, **PEERS}.items()]
            command = [BENCHMARKS / "no_trainer_recipe.py", *words]
        else:
            command = [TRAIN_PY, *flags(job.recipe, {**given, **ONCE, "token_store": f"{folder}/stores"})]
        variables = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"}
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True, env=variables)
        seconds = time.perf_counter() - started
        trained = {**inputs(job), "model_name_or_path": f"{folder}/run", "token_store": job.folder / "stores"}
        words = [f"--{name}={value}" for name, value in trained.items()]
        return {**job.key, **measure(cli.parse_config(loop.Config, words), job), "seconds": seconds}


def jobs(args: argparse.Namespace, done: list[dict[str, Any]], folder: Path) -> Iterator[Job]:
    """What is not measured yet: all recipes under a seed, then all under the next."""
    for domain in args.domains:
        own = folder / domain
        own.mkdir(parents=True)
        files = freeze(DOMAINS[domain], args.data, own)
        for passes in args.passes:
            for seed in args.seeds:
                for recipe in args.recipes:
                    job = Job(domain, passes, recipe, seed, files, own, test=not args.dev)
                    needed = [] if args.dev else ["loss", *(["accuracy"] if "task" in files else [])]
                    same = (row for row in done if job.key.items() <= row.items())
                    if not any(all(row.get(name) is not None for name in needed) for row in same):
                        yield job


def main() -> None:
    args = parse_arguments()
    rows, body = ("runs", run) if args.track == "data" else ("times", race)
    stored = json.loads(args.out.read_text()) if args.out.exists() else {"runs": [], "times": []}
    stored["environment"] = environment(make_accelerator())
    where = {name: stored["environment"][name] for name in WHERE}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool,  # torch's threads do not survive a fork
    ):
        todo = list(jobs(args, stored[rows], Path(folder)))  # a file that is missing ends it before the first run
        asked = {pool.submit(body, job): job for job in todo}
        failed = False
        for done in as_completed(asked):
            if failure := done.exception():  # the others go on
                print(f"{asked[done].key}: {failure}", file=sys.stderr)
                if not isinstance(failure, UserError):
                    traceback.print_exception(failure)
                failed = True
                continue
            stored[rows].append({**done.result(), **where})
            write_json(args.out, stored)
            print(json.dumps(stored[rows][-1]), flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
