"""Claims about shards: whoever builds them, after whatever kills, the store has the same bytes, each built once."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm.data import corpus, shards, token_store
from mlm.data.corpus import CorpusConfig
from mlm.data.encode import Encoder
from mlm.data.shards import build_shards, read_shards
from mlm.data.token_store import TokenStoreConfig, limit_threads, prepare, write
from mlm.data.tokenizer import tokenizer_info
from mlm.errors import UserError
from tests.data.runs import TEXTS, World, until
from tests.data.stores import TOKENIZERS, build

TOKENIZER = TOKENIZERS["wordpiece"]
INFO = tokenizer_info(TOKENIZER)
SMALL = 1500  # bytes a shard
TRAIN, ALL = 8, 9  # shards of TEXTS: eight of training documents, one of those held out


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """What the datasets library converts goes to a temporary folder, not to the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


# Where shards are cut


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60), more=st.lists(st.integers(1, 40), max_size=9))
def test_shards_hold_all_documents_are_bounded_and_stay_when_text_is_appended(sizes, more):
    def cut(*sizes):
        hashes = np.arange(len(sizes), dtype=np.uint64) * 7
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus, "SHARD", 50)
            return corpus._cut(hashes, np.array(sizes, dtype=np.uint64))

    found = cut(*sizes)
    assert [number for documents, _ in found for number in documents] == list(range(len(sizes)))
    for documents, _ in found:
        assert len(documents) > 0
        assert sum(sizes[number] for number in documents[:-1]) < 50
    assert cut(*sizes, *more)[: len(found) - 1] == found[:-1]
    assert len({fingerprint for _, fingerprint in found}) == len(found)


# The store that is joined from them


class Joined:
    """A corpus of several shards, and what one process makes of it without any."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(corpus, "SHARD", SMALL)
        (folder / "train.txt").write_text("".join(f"{text}\n" for text in TEXTS))
        self.folder, self.written = folder, []
        self.read = corpus.load(CorpusConfig(train_file=str(folder / "train.txt")))
        self.encoder = Encoder(TOKENIZER, INFO)
        build(self.read.splits["train"], TOKENIZER, INFO, folder / "expected", {})
        self.expected = contents(folder / "expected")
        write_shard = shards._write_shard

        def counted(read, split, documents, encoder, path):
            self.written.append(documents)
            write_shard(read, split, documents, encoder, path)

        patch.setattr(shards, "_write_shard", counted)

    def shards(self, kept: Path, processes: int = 1):
        return build_shards(self.read, ["train"], self.encoder, processes, kept)["train"]

    def join(self, kept: Path, processes: int = 1):
        store = self.folder / "joined"
        shutil.rmtree(store, ignore_errors=True)
        write(read_shards(self.shards(kept, processes)), INFO, store, {})
        return contents(store)


def contents(store: Path) -> dict[str, bytes]:
    header = {**token_store.open_store(store, INFO.fingerprint).header, "seconds": 0}
    return {"header": header, **{path.name: path.read_bytes() for path in store.glob("*.npy")}}


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Joined(tmp_path_factory.mktemp("joined"), patch)


@pytest.fixture(scope="module")
def whole(joined):
    """A folder of all shards."""
    joined.shards(joined.folder / "whole")
    return joined.folder / "whole"


def cut_off(path: Path, where: int) -> None:
    os.truncate(path, where % path.stat().st_size)


def flip_a_bit(path: Path, where: int) -> None:
    """In the first half, of which every byte is of an array, or of a name or size."""
    data = bytearray(path.read_bytes())
    data[where % (len(data) // 2)] ^= 1
    path.write_bytes(data)


def empty(path: Path, where: int) -> None:
    path.write_bytes(b"")


def of_another_kind(path: Path, where: int) -> None:
    np.save(path.with_suffix(".npy"), np.arange(where % 99))
    path.with_suffix(".npy").rename(path)


STATES = st.sampled_from([None, shutil.copy, shutil.copy, cut_off, flip_a_bit, empty, of_another_kind])


@settings(max_examples=25, deadline=None)
@given(states=st.lists(STATES, min_size=TRAIN, max_size=TRAIN), where=st.integers(0, 10**9))
def test_the_store_has_the_same_bytes_whichever_shards_are_there_or_damaged(states, where, joined, whole):
    kept = joined.folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    jobs = joined.shards(whole)
    assert len(jobs) == len(states)
    lacking = []
    for (place, _), (documents, _), state in zip(jobs, joined.read.shards["train"], states, strict=True):
        if state:
            shutil.copy(place, kept)
        if state not in (None, shutil.copy):
            before = shards._read_shard(place)
            state(kept / place.name, where)
            if same(before, shards._read_shard(kept / place.name)):
                state = shutil.copy  # a bit that nothing depends on
        if state is not shutil.copy:
            lacking.append(documents)
    joined.written.clear()
    assert joined.join(kept) == joined.expected
    assert sorted(joined.written, key=lambda documents: documents.start) == lacking


def test_a_shard_that_is_there_is_read_once_and_one_that_is_damaged_is_said_once(joined, whole, monkeypatch, caplog):
    kept, read = joined.folder / "read", []
    shutil.copytree(whole, kept)
    jobs = joined.shards(kept)
    (damaged, _), read_shard = jobs[2], shards._read_shard
    flip_a_bit(damaged, 0)
    joined.written.clear()
    monkeypatch.setattr(shards, "_read_shard", lambda place: read.append(place) or read_shard(place))
    tokens = sum(len(part.ids) for part in read_shards(jobs))
    assert tokens == joined.expected["header"]["tokens"]
    assert [place for place in read if place != damaged] == [place for place, _ in jobs if place != damaged]
    assert joined.written == [joined.read.shards["train"][2][0]]
    assert caplog.messages == [f"{damaged} is damaged; building it anew"]


def same(parts, others) -> bool:
    return len(parts) == len(others) and all(
        np.array_equal(a, b) for one, other in zip(parts, others, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_store_has_the_same_bytes_from_any_number_of_processes(processes, joined):
    kept = joined.folder / f"of {processes}"
    assert joined.join(kept, processes) == joined.expected
    assert len(list(kept.glob("*.shard"))) == TRAIN


def test_shards_of_another_tokenizer_format_or_treatment_of_markup_are_others(joined, monkeypatch):
    def names():
        return {place.name for place, _ in build_shards(joined.read, ["train"], joined.encoder, 1, folder)["train"]}

    monkeypatch.setattr(shards, "_write_shard", lambda *given: given[-1].touch())
    folder = joined.folder / "others"
    first = names()
    monkeypatch.setattr(shards, "FORMAT_VERSION", 0)
    assert not names() & first
    monkeypatch.undo()
    monkeypatch.setattr(shards, "_write_shard", lambda *given: given[-1].touch())
    monkeypatch.setattr(joined, "encoder", Encoder(other := TOKENIZERS["unigram"], tokenizer_info(other)))
    assert not names() & first


# Several runs, and several processes of a run


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    world = World(tmp_path, "store")
    yield world
    for process in world.running:
        process.kill()
        process.join()


def test_two_runs_build_each_shard_once(world, tally):
    runs = [world.start(name, shard=SMALL, pause=0.005) for name in ("one", "two")]
    assert world.ended(runs[0])["inode"] == world.ended(runs[1])["inode"]
    assert len(world.begun()) == len(set(world.begun())) == ALL
    assert sorted(world.builders()) == ["one", "two"]
    assert world.workspaces() == set()
    tally("two runs build one store on a shared folder", 1, "they share its shards, each built once")


def test_three_processes_of_a_run_build_each_shard_once(world):
    world.ended(world.start("run", shard=SMALL, pause=0.005, workers=3))
    assert len(world.begun()) == len(set(world.begun())) == ALL
    assert len({process for *_, process in world.builds()}) == 3
    assert world.workspaces() == set()


def accident(world: World, workers: int, wait: float) -> tuple[int, int]:
    """Kills a run after so many seconds. How many shards were finished then, and how many the next run began.

    A worker whose parent is killed ends the shard that it is at.
    """
    run = world.start("killed", shard=SMALL, pause=0.002, workers=workers)
    until(world.builds)
    time.sleep(wait)
    run.kill()
    run.join()
    there, finished = world.place.exists(), world.finished()
    before = {name: path.stat().st_mtime_ns for path in world.kept.glob("*.shards/*.shard") if (name := path.name)}
    assert set(before) >= finished
    world.ended(world.start("next", shard=SMALL, workers=workers))
    again = Counter(world.begun("next"))
    done = {what for event, name, what, _ in world.builds() if (event, name) == ("end", "killed")}
    assert not again or max(again.values()) == 1
    assert len(again) <= (0 if there else ALL - len(finished)), "no finished shard is built again"
    assert len(set(again) & done) <= workers, "but for those that were not yet in their places"
    assert world.workspaces() == set()
    return len(finished), len(again)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.torture)]
)
def test_a_build_that_is_killed_at_any_moment_goes_on_with_the_shards_that_are_there(kills, workers, tmp_path, tally):
    draw, halfway = random.Random(kills + workers), 0
    for kill in range(kills):
        folder = tmp_path / str(kill)
        folder.mkdir()
        world = World(folder, "store")
        finished, _ = accident(world, workers, (kill + draw.random()) / kills * 0.9 / workers)
        halfway += 0 < finished < ALL
    assert halfway >= kills // 3
    by = {1: "one process", 2: "two processes"}[workers]
    tally(f"`kill -9` at a random moment while {by} tokenise", kills, "the next run builds no finished shard again")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_killed_run_has_finished_is_not_built_again(workers, world):
    run = world.start("killed", shard=SMALL, pause=0.005, workers=workers)
    until(lambda: len(world.finished()) >= 4)
    run.kill()
    run.join()
    finished = len(world.finished())
    assert 4 <= finished < ALL
    world.ended(world.start("next", shard=SMALL))
    assert len(world.begun("next")) <= ALL - finished


def test_a_run_goes_on_without_a_worker_that_is_killed_and_says_so(world):
    run = world.start("run", shard=SMALL, pause=0.005, workers=2)

    def others():
        return {int(process) for *_, process in world.builds()} - {run.pid}

    until(others)
    os.kill(others().pop(), signal.SIGKILL)
    world.ended(run)
    assert "1 of 2 tokenising processes were killed ([-9])" in world.log("run")
    assert max(Counter(world.begun()).values()) == 2, "the shard that it was at"
    assert world.workspaces() == set()


def test_a_worker_ends_soon_after_its_parent_is_killed(world):
    run = world.start("killed", shard=SMALL, pause=0.005, workers=2)
    until(lambda: len({process for *_, process in world.builds()}) == 2)
    [worker] = {int(process) for *_, process in world.builds()} - {run.pid}
    run.kill()
    run.join()

    def alive():
        with open(f"/proc/{worker}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"

    if not os.path.exists("/proc/self/stat"):
        pytest.skip("only Linux tells")
    until(lambda: not os.path.exists(f"/proc/{worker}") or not alive())
    assert len(world.finished()) < ALL


def test_a_run_builds_the_shard_of_one_that_hangs(world):
    stopped = world.halfway("stopped")
    os.kill(stopped.pid, signal.SIGSTOP)
    result = world.ended(world.start("other", timeout=0.5))
    waiting, apart = world.log("other").splitlines()
    assert "waiting, up to 0.5 s" in waiting
    assert apart.endswith("for 0.5 s: building without it")
    world.go()
    os.kill(stopped.pid, signal.SIGCONT)
    assert world.ended(stopped) == result
    assert world.workspaces() == set()


# In one run


@pytest.fixture
def given_texts(tmp_path, monkeypatch):
    """prepare(processes) of TEXTS in many shards."""
    monkeypatch.setattr(corpus, "SHARD", SMALL)
    file = tmp_path / "train.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS))

    def prepared(processes=None, **options):
        config = TokenStoreConfig(str(tmp_path / "stores"), preprocessing_num_workers=processes, **options)
        return prepare(CorpusConfig(train_file=str(file)), TOKENIZER, INFO, config)

    return prepared


@pytest.mark.parametrize("processes", [1, 2])
def test_what_fails_is_said_by_the_run_itself_and_leaves_what_is_finished(
    processes, given_texts, tmp_path, monkeypatch, capfd
):
    def failing(texts, encoder):
        texts = list(texts)
        if TEXTS[200] in texts:
            raise UserError("the tokenizer fails")
        return tokenise(texts, encoder)

    tokenise = shards.tokenise
    monkeypatch.setattr(shards, "tokenise", failing)
    with pytest.raises(UserError, match=r"^the tokenizer fails$"):
        given_texts(processes)
    assert capfd.readouterr().err == ""
    kept = {path.name: path.stat().st_ino for path in tmp_path.glob("stores/*.shards/*.shard")}
    assert 0 < len(kept) < ALL
    built = []
    monkeypatch.setattr(shards, "tokenise", lambda texts, encoder: built.append(1) or tokenise(texts, encoder))
    assert given_texts()["train"].header["documents"]
    assert len(built) == ALL - len(kept)
    assert not list(tmp_path.glob("stores/*.shards"))


def test_shards_that_are_left_are_removed_by_a_run_that_finds_the_store(given_texts, tmp_path):
    place = Path(given_texts()["train"].ids.filename).parents[1]
    left = place.with_name(f"{place.name}.shards")
    left.mkdir()
    (left / "0.shard").touch()
    given_texts()
    assert not left.exists()


def test_what_is_built_anew_does_not_use_the_shards_that_are_there(given_texts, tmp_path, monkeypatch):
    place = Path(given_texts()["train"].ids.filename).parents[1]
    written, write_shard = [], shards._write_shard
    monkeypatch.setattr(shards, "_write_shard", lambda *given: written.append(1) or write_shard(*given))
    monkeypatch.setattr(shutil, "rmtree", lambda *given, **options: None)
    shutil.move(place, tmp_path / "away")
    given_texts()
    assert (len(written), len(list(tmp_path.glob("stores/*.shards/*.shard")))) == (ALL, ALL)
    given_texts(overwrite_cache=True)
    assert len(written) == 2 * ALL


@pytest.mark.parametrize(("given", "processes"), [(None, 3), (1, 1), (5, 5)])
def test_as_many_processes_tokenise_as_are_asked_for_or_the_run_has_here(given, processes, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    config = TokenStoreConfig(preprocessing_num_workers=given)
    limit_threads(TokenStoreConfig())
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert config.processes == processes
    limit_threads(config)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false", "a thread each"
