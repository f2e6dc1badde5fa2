"""Claims about runs that want the same token store, or the same trained tokenizer, at the same time.

A run is a process of its own, forked from one that has imported what takes seconds.
"""

import ctypes
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pytest

from mlm.data import cache, token_store, tokenizer
from mlm.data.corpus import CorpusConfig
from mlm.data.token_store import TokenStoreConfig, prepare
from mlm.data.tokenizer import corpus_tokenizer, load_tokenizer, tokenizer_info
from mlm.errors import UserError
from tests.tokenizers_for_tests import wordpiece

TEXTS = [f"the {age} fox likes grapes, unlikely {n}" for n in range(100) for age in ("old", "young", "small")]
kinds = pytest.mark.parametrize("kind", ["store", "tokenizer"])

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
            config = TokenStoreConfig(token_store=str(kept), overwrite_cache=self.overwrite)
            stores = prepare(self.source, loaded, tokenizer_info(loaded), config)
            place = Path(stores["train"].ids.filename).parents[1]
            timeless = [{**store.header, "seconds": 0} for store in stores.values()]
            contents = [json.dumps(timeless).encode()]
            contents += [getattr(s, array).tobytes() for s in stores.values() for array in token_store.ARRAYS]
        digest = sha256(b"".join(sha256(content).digest() for content in contents)).hexdigest()
        return {"place": place.name, "inode": place.stat().st_ino, "digest": digest}


class SlowText:
    """Documents that come slowly, or no further than half of them until the file `go` is there."""

    def __init__(self, documents: Iterable[str], job: Job) -> None:
        self.documents, self.job = documents, job

    def __iter__(self) -> Iterator[str]:
        for number, document in enumerate(self.documents):
            time.sleep(self.job.pause)
            if self.job.gate and number == len(TEXTS) // 2:
                (self.job.folder / f"{self.job.name}.halfway").touch()
                until((self.job.folder / "go").exists)
            yield document


def work(job: Job) -> None:
    """What the process of a run does."""
    logging.basicConfig(filename=job.folder / f"{job.name}.log", level=logging.ERROR, format="%(message)s")
    logging.getLogger("mlm").setLevel(logging.INFO)
    cache.LOCK_TIMEOUT = job.timeout
    token_store.BATCH_DOCUMENTS = 10  # so that files grow as the text comes

    def counted(build: Callable) -> Callable:
        def counting(documents: Iterable[str], *rest: object) -> object:
            with (job.folder / "builds").open("a") as builds:
                print("begin", job.name, file=builds, flush=True)
                built = build(SlowText(documents, job), *rest)
                print("end", job.name, file=builds, flush=True)
            return built

        return counting

    token_store.build = counted(token_store.build)
    tokenizer.train_tokenizer = counted(tokenizer.train_tokenizer)
    result = job.get(job.folder / "stores")
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
        """[["begin", name], ["end", name], …]: when which run began and ended to read text for building."""
        path = self.folder / "builds"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def builders(self) -> list[str]:
        """The runs that read text for building, in the order in which they began."""
        return list(dict.fromkeys(name for event, name in self.builds() if event == "begin"))

    def workspaces(self) -> set[str]:
        return {path.name for path in self.kept.iterdir()} - {self.place.name, self.lock.name}


@pytest.fixture
def world(tmp_path, kind) -> Iterator[World]:
    world = World(tmp_path, kind)
    yield world
    for process in world.running:
        process.kill()
        process.join()


@kinds
def test_of_runs_that_want_the_same_one_builds_and_the_others_wait(world, tally):
    runs = [world.start(str(number), gate=True) for number in range(4)]
    until(lambda: sum("waiting" in world.log(run.name) for run in runs) == 3)
    (builder,) = (run for run in runs if run.name in world.builders())
    for run in runs:
        holder = f"process {builder.pid} on {socket.gethostname()}"
        line = f"{holder} is building {world.place}: waiting, up to 3600 s"
        assert world.log(run.name).splitlines() == ([] if run is builder else [line])
    world.go()
    assert len({world.ended(run)["inode"] for run in runs}) == 1
    assert world.builders() == [builder.name]
    assert world.workspaces() == set()
    tally("four runs build the same store, or vocabulary, at once", 1, "one builds, the others wait for it")


@kinds
def test_a_waiting_run_takes_over_from_one_that_is_killed(world):
    builder = world.halfway("builder")
    heir = world.start("heir")
    until(lambda: "waiting" in world.log("heir"))
    builder.kill()
    world.ended(heir)
    assert builder.exitcode == -signal.SIGKILL
    assert world.builders() == ["builder", "heir"]
    assert world.workspaces() == set()


@pytest.mark.slow
@kinds
def test_after_a_run_that_is_killed_at_any_moment_the_next_builds_at_once(kind, tmp_path, tally):
    def world_and_run(name):
        (tmp_path / name).mkdir()
        world = World(tmp_path / name, kind)
        run = world.start("killed", pause=0.002)
        until((world.folder / "killed.log").exists)
        return world, run

    world, run = world_and_run("whole")
    started = time.monotonic()
    world.ended(run)
    duration = time.monotonic() - started

    draw, moments, halfway = random.Random(0), 0, 0
    while halfway < 10:  # of them in the middle of building; the others before and after
        assert moments < 50
        world, run = world_and_run(str(moments))
        run.join(duration * (moments % 10 + draw.random()) / 10)
        run.kill()
        run.join()
        halfway += ["begin", "killed"] in world.builds() and not world.place.exists()
        moments += 1

        world.ended(world.start("next"))
        assert world.log("next") == "", "it does not wait"
        assert kind == "tokenizer" or world.workspaces() == set()
    tally("`kill -9` while a store or vocabulary is built", moments, "the next run builds it at once, the same")


@kinds
def test_a_run_builds_apart_where_the_lock_does_not_come_in_time(world):
    stopped = world.halfway("stopped")
    os.kill(stopped.pid, signal.SIGSTOP)
    before = world.workspaces()
    other = world.start("other", timeout=0.5)
    result = world.ended(other)
    waiting, apart = world.log("other").splitlines()
    holder = f"process {stopped.pid} on {socket.gethostname()}"
    assert waiting == f"{holder} is building {world.place}: waiting, up to 0.5 s"
    assert apart == f"{holder} has held {world.lock} for 0.5 s: building without it"
    assert world.workspaces() == before, "what the stopped one has built so far is left to it"
    world.go()
    os.kill(stopped.pid, signal.SIGCONT)
    assert world.ended(stopped) == result
    assert world.builders() == ["stopped", "other"]
    assert world.workspaces() == set()


@kinds
def test_a_run_that_builds_apart_is_not_taken_for_dead_by_the_next_that_holds_the_lock(world):
    stopped = world.halfway("stopped")
    os.kill(stopped.pid, signal.SIGSTOP)
    apart = world.halfway("apart", timeout=0.5)
    stopped.kill()
    result = world.ended(world.start("next"))
    world.go()
    assert world.ended(apart) == result
    assert world.workspaces() == set()


@kinds
def test_where_there_are_no_locks_runs_build_side_by_side(world):
    world.kept.mkdir()
    world.lock.mkdir()  # what cannot be opened cannot be locked
    runs = [world.halfway(str(number)) for number in range(3)]
    world.go()
    assert len({world.ended(run)["inode"] for run in runs}) == 1
    assert sorted(world.builders()) == ["0", "1", "2"]
    assert world.workspaces() == set()


@pytest.mark.parametrize("kind", ["store"])
def test_runs_that_overwrite_build_one_after_the_other(world):
    runs = [world.start(str(number), overwrite=True, pause=0.001) for number in range(3)]
    for run in runs:
        world.ended(run)
    events = world.builds()
    assert len(events) == 3 * 2 * 2, "each builds both splits"
    for begin, end in zip(events[0::2], events[1::2], strict=True):
        assert (begin[0], begin[1]) == ("begin", end[1])
    names = [name for event, name in events[0::2]]
    assert names[0::2] == names[1::2]
    assert world.workspaces() == set()


@kinds
def test_what_is_kept_in_a_folder_that_cannot_be_written_is_found(world):
    world.ended(world.start("first"))
    world.lock.unlink()
    world.kept.chmod(0o555)
    try:
        world.ended(world.start("second", without_privileges))
        assert set(world.kept.iterdir()) == {world.place}
        assert world.builders() == ["first"]

        world.kept.chmod(0o755)
        world.place.rename(world.folder / "away")
        world.kept.chmod(0o555)
        third = world.start("third", without_privileges)
        third.join(60)
        error = (world.folder / "third.error").read_text()
        assert error == f"--token_store {world.kept}: cannot write there (Permission denied)"
        assert world.log("third") == ""
    finally:
        world.kept.chmod(0o755)
