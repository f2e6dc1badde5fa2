"""Claims about runs that want the same token store, or the same trained tokenizer, at the same time."""

import errno
import os
import random
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from mlm.data.cache import build_once
from mlm.errors import UserError
from tests.data.runs import World, until, without_privileges

kinds = pytest.mark.parametrize(
    "kind", ["store", "tokenizer"]
)  # runs that want a store share its shards: test_shards.py
vocabulary = pytest.mark.parametrize("kind", ["tokenizer"])


@pytest.fixture
def world(tmp_path, kind) -> Iterator[World]:
    world = World(tmp_path, kind)
    yield world
    for process in world.running:
        process.kill()
        process.join()


@vocabulary
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
    tally("four runs build the same vocabulary at once", 1, "one builds, the others wait for it")


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


@pytest.mark.torture
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
        halfway += "killed" in world.builders() and not world.place.exists()
        moments += 1

        world.ended(world.start("next"))
        assert world.log("next") == "", "it does not wait"
        assert kind == "tokenizer" or world.workspaces() == set()
    tally("`kill -9` while a store or vocabulary is built", moments, "the next run builds it at once, the same")


@vocabulary
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


@vocabulary
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
    runs = [world.halfway(str(number), locks=False) for number in range(3)]
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
        assert (begin[0], begin[1:]) == ("begin", end[1:])
    names = [name for event, name, *_ in events[0::2]]
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


def test_a_build_that_loses_its_folder_as_another_run_is_quicker_takes_what_that_one_made(tmp_path):
    made = []

    def build(path):
        made.append(path)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    assert build_once(tmp_path / "kept" / "place", lambda: made, build) is made
    with pytest.raises(UserError, match=r"--token_store .*kept: cannot write there \(No such file or directory\)"):
        build_once(tmp_path / "kept" / "place", lambda: made, build, overwrite=True)
