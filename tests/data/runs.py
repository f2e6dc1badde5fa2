"""Runs that want the same token store, or the same trained tokenizer, at the same time.

A run is a process of its own, forked from one that has imported what takes seconds.
"""

import ctypes
import errno
import itertools
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from mlm.data import cache, corpus, shards, token_store, tokenizer
from mlm.data.corpus import CorpusConfig
from mlm.data.token_store import TokenStoreConfig, prepare
from mlm.data.tokenizer import corpus_tokenizer, load_tokenizer, tokenizer_info
from mlm.errors import UserError
from tests.tokenizers_for_tests import wordpiece

TEXTS = [f"the {age} fox likes grapes, unlikely {n}" for n in range(100) for age in ("old", "young", "small")]

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__, "datasets", "pandas"])


@dataclass(frozen=True)
class Job:
    """What a run does, and how it is delayed."""

    folder: Path  # train.txt, tokenizer/ and stores/; the runs write what they did here
    kind: str  # what it needs: the "store", or the "tokenizer"
    name: str = "run"
    overwrite: bool = False
    timeout: float = cache.LOCK_TIMEOUT  # seconds
    gate: bool = False  # stays in the middle of the text until the file `go` is there
    pause: float = 0.0  # seconds before each document
    shard: int = corpus.SHARD  # bytes
    workers: int | None = None
    locks: bool = True  # that the file system has

    @property
    def kept(self) -> Path:
        return self.folder / "stores"

    @property
    def source(self) -> CorpusConfig:
        return CorpusConfig(train_file=str(self.folder / "train.txt"))

    def get(self, kept: Path) -> dict[str, str | int]:
        """Finds or builds it in the folder `kept`; its place, the place's inode, a digest of its content."""
        if self.kind == "tokenizer":
            place = Path(corpus_tokenizer(self.source, 90, kept).name_or_path)
            contents = [path.read_bytes() for path in sorted(place.iterdir())]
        else:
            loaded = load_tokenizer(str(self.folder / "tokenizer"))
            config = TokenStoreConfig(str(kept), self.overwrite, preprocessing_num_workers=self.workers)
            stores = prepare(self.source, loaded, tokenizer_info(loaded), config)
            place = Path(stores["train"].ids.filename).parents[1]
            timeless = [{**store.header, "seconds": 0} for store in stores.values()]
            contents = [json.dumps(timeless).encode()]
            contents += [getattr(s, array).tobytes() for s in stores.values() for array in token_store.ARRAYS]
        digest = sha256(b"".join(sha256(content).digest() for content in contents)).hexdigest()
        return {"place": place.name, "inode": place.stat().st_ino, "digest": digest}


class SlowText:
    """Documents that come slowly, or, until the file `go` is there, no further than half of what a process reads."""

    read = itertools.count()

    def __init__(self, documents: Iterable[str], job: Job) -> None:
        self.documents, self.job = documents, job

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            time.sleep(self.job.pause)
            if next(self.read) == len(TEXTS) // 2 and self.job.gate:
                (self.job.folder / f"{self.job.name}.halfway").touch()
                until((self.job.folder / "go").exists)
            yield document


def work(job: Job) -> None:
    """What the process of a run does."""
    logging.basicConfig(filename=job.folder / f"{job.name}.log", level=logging.ERROR, format="%(message)s")
    logging.getLogger("mlm").setLevel(logging.INFO)
    cache.LOCK_TIMEOUT, corpus.SHARD = job.timeout, job.shard
    shards.BATCH_DOCUMENTS = 10  # so that files grow as the text comes

    def event(kind: str, what: str) -> None:
        with (job.folder / "builds").open("a") as builds:
            print(kind, job.name, what, os.getpid(), file=builds, flush=True)

    def write_shard(read: corpus.Corpus, split: str, documents: range, *rest: object) -> None:
        event("begin", f"{split}:{documents.start}")
        write(read, split, documents, *rest)
        event("end", f"{split}:{documents.start}")

    def train(documents: Iterable[str], *rest: object) -> object:
        event("begin", "vocabulary")
        trained = learn(SlowText(documents, job), *rest)
        event("end", "vocabulary")
        return trained

    def acquire(lock: FileLock, *given: object, **named: object) -> object:
        if job.kept in Path(lock.lock_file).parents:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return lock_it(lock, *given, **named)

    lock_it = FileLock.acquire
    write, tokenise, learn = shards._write_shard, shards.tokenise, tokenizer.train_tokenizer
    shards._write_shard, tokenizer.train_tokenizer = write_shard, train
    shards.tokenise = lambda texts, encoder: tokenise(SlowText(texts, job), encoder)
    if not job.locks:
        FileLock.acquire = acquire
    result = job.get(job.kept)
    (job.folder / f"{job.name}.json").write_text(json.dumps(result))


def without_privileges(job: Job) -> None:
    """`work`, by a root that may write only what its permission bits let it write; or by an ordinary user."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1)  # of the effective ones CAP_DAC_OVERRIDE
    assert libc.capset(header, sets) == 0
    try:
        work(job)
    except UserError as error:
        (job.folder / f"{job.name}.error").write_text(str(error))


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.005)


class World:
    """A folder with a text, and the runs that were started in it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kept, self.job = folder, folder / "stores", Job(folder, kind)
        self.running: list[multiprocessing.Process] = []
        (folder / "train.txt").write_text("".join(f"{text}\n" for text in TEXTS))
        wordpiece(TEXTS).save_pretrained(folder / "tokenizer")
        self.alone = self.job.get(folder / "elsewhere")  # what a run alone gets
        self.place = self.kept / self.alone["place"]
        self.lock = self.place.with_name(f"{self.place.name}.lock")

    def start(self, name: str, work: Callable[[Job], None] = work, **options):
        job = replace(self.job, name=name, **options)
        process = processes.Process(target=work, args=(job,), name=name)
        process.start()
        self.running.append(process)
        return process

    def halfway(self, name: str, **options):
        """A run that is halfway through building, and stays there."""
        process = self.start(name, gate=True, **options)
        until((self.folder / f"{name}.halfway").exists)
        return process

    def go(self) -> None:
        (self.folder / "go").touch()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def ended(self, process) -> dict[str, str | int]:
        """What a run got, which has to be what a run alone gets."""
        process.join(60)
        assert process.exitcode == 0
        result = json.loads((self.folder / f"{process.name}.json").read_text())
        assert (result["place"], result["digest"]) == (self.alone["place"], self.alone["digest"])
        return result

    def builds(self) -> list[list[str]]:
        """[["begin", name, what, process id], ["end", …], …]: when which run read text for building, and what."""
        path = self.folder / "builds"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def builders(self) -> list[str]:
        """The runs that read text for building, in the order in which they began."""
        return list(dict.fromkeys(name for event, name, *_ in self.builds() if event == "begin"))

    def begun(self, *names: str) -> list[str]:
        """The shards that runs of these names, or all runs, began to build."""
        return [what for event, name, what, _ in self.builds() if event == "begin" and name in (names or (name,))]

    def finished(self) -> set[str]:
        """The files of the shards that are there."""
        return {path.name for path in self.kept.glob("*.shards/*.shard")}

    def workspaces(self) -> set[str]:
        return {path.name for path in self.kept.iterdir()} - {self.place.name, self.lock.name}
