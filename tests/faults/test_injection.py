"""Each call by which a small run writes fails once: the process is killed before it, or it meets EIO or a full disk.

The calls are those that change what is under --output_dir and --token_store: opening to write, write, rename, unlink,
fsync, ftruncate, mkdir, rmdir and link. inject.c counts them and lets one fail.
"""

import errno
import json
import os
import queue
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import Server
from tests.runs import SCRIPT, assert_each_step_once, finish

HERE = Path(__file__).parent
KILL, EIO, ENOSPC = -1, errno.EIO, errno.ENOSPC
# Two checkpoints, of which the first goes, and the best weights after three evaluations, each better than the last.
FLAGS = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "save_total_limit": 1,
    "eval_steps": 2,
    "load_best_model_at_end": "true",
    "logging_steps": 1,
    "dropout": 0.1,
}
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
TIMES = ("tokens_per_second", "train_seconds", "checkpoint_seconds", "peak_memory_mib")  # differ from run to run
# System calls that change a file or folder, and the names that inject.c gives them. The last ones it does not know.
NAMES = {
    **dict.fromkeys(("open", "openat", "openat2", "creat"), "open"),
    **dict.fromkeys(("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile"), "write"),
    **dict.fromkeys(("rename", "renameat", "renameat2"), "rename"),
    **dict.fromkeys(("unlink", "unlinkat"), "unlink"),
    **dict.fromkeys(("mkdir", "mkdirat"), "mkdir"),
    **dict.fromkeys(("link", "linkat"), "link"),
    **dict.fromkeys(("symlink", "symlinkat"), "symlink"),
    **{name: name for name in ("rmdir", "fallocate", "ftruncate", "fsync", "fdatasync")},
    **{name: name for name in ("truncate", "copy_file_range", "splice", "sync_file_range")},
}
OF_PATHS = {"open", "rename", "unlink", "rmdir", "mkdir", "link", "symlink", "truncate"}


WATCHED = str(Path(__file__).with_name("watched.py"))


def preloaded(library: Path, prefix: tuple[str, ...] = ()) -> Server:
    """A server of which each process can count its calls, and let one fail."""
    return Server({**os.environ, "LD_PRELOAD": str(library)}, prefix)


def trained(server: Server, toy, folder: Path, counted: tuple[int, int] | None = None, **flags) -> tuple[int, str]:
    """Trains in folder/run with the store folder/stores. Returns its exit status and standard error.

    counted: a fault, and the number of the call that it hits; folder/log.txt names all calls up to the end
    """
    folder.mkdir(exist_ok=True)
    output, store = folder / "run", folder / "stores"
    argv = [SCRIPT]
    if counted:
        argv = [WATCHED, *map(str, (folder / "log.txt", output, store, *counted))]
    status, _, errors = finish(server.start([*argv, *toy.flags(output, **FLAGS, token_store=store, **flags)]), 120)
    if status == 77:
        pytest.skip("the kernel lets no process filter its system calls")
    return status, errors


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """inject.c, compiled."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, cc, on Linux")
    built = tmp_path_factory.mktemp("library") / "inject.so"
    command = [compiler, "-std=gnu11", "-O1", "-shared", "-fPIC", "-o", str(built), str(HERE / "inject.c")]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        pytest.skip(f"inject.c does not compile here: {compiled.stderr.splitlines()[0]}")
    return built


class Injection:
    """The uninterrupted run, `whole`, and what becomes of others like it that meet a fault."""

    def __init__(self, toy, folder: Path, server: Server) -> None:
        self.toy, self.folder, self.whole = toy, folder, folder / "whole"
        status, errors = trained(server, toy, self.whole, counted=(0, 0))
        assert status == 0, errors
        self.calls = calls(self.whole)

    def meet(self, server: Server, fault: int, number: int) -> tuple[str, str | None]:
        """How a run ends that meets a fault, and what is wrong with that, or with the run that resumes it."""
        folder = self.folder / f"{fault} {number}"
        status, errors = trained(server, self.toy, folder, (fault, number))
        if number > len(made := calls(folder)):  # threads take turns, and this run made fewer calls
            return "not met", None
        end = {-9: "killed", 0: "went on"}.get(status, "stopped in one line")
        wrong = self.ends_badly(folder / "run", fault, status, errors)
        if not wrong:
            resumed, errors = trained(server, self.toy, folder, resume_from_checkpoint="latest")
            wrong = self.differs(folder / "run") if resumed == 0 else f"resumed: {resumed}, {errors[-1500:]}"
        if wrong:
            name = "kill" if fault == KILL else errno.errorcode[fault]
            return end, f"{name} at call {number}, {' '.join(made[number - 1])}: {end}, {wrong}"
        shutil.rmtree(folder)
        return end, None

    def ends_badly(self, run: Path, fault: int, status: int, errors: str) -> str | None:
        """What is wrong with the end of a run that has met a fault."""
        if "Traceback" in errors or (status and fault != KILL and not re.search(r"^error: [^\n]+\n\Z", errors, re.M)):
            return f"no clear line: {status}, {errors[-1500:]}"
        if status not in ((-9,) if fault == KILL else (0, 2)):
            return f"exit status {status}, {errors[-1500:]}"
        if (run / "all_results.json").exists():
            return self.differs(run, complete=False)
        return "exit status 0 without results" if status == 0 else None

    def differs(self, run: Path, complete: bool = True) -> str | None:
        """In what a run that seems finished is not as the uninterrupted one."""
        for name in MODEL:
            path = run / name
            if not path.exists() or path.read_bytes() != (self.whole / "run" / name).read_bytes():
                return f"finished with another {name}, or none"
        if complete:
            mine, whole = (figures(folder) for folder in (run, self.whole / "run"))
            if mine != whole:
                return f"finished with other figures: {mine} for {whole}"
            try:
                assert_each_step_once(run)
            except AssertionError as error:
                return f"metrics.jsonl: {error}"
        return None

    def torment(self, servers: list[Server], fault: int, numbers: list[int]) -> Counter:
        """Runs that meet a fault at each of these calls. Fails with all that is wrong; returns how many ended how."""
        idle = queue.SimpleQueue()
        for server in servers:
            idle.put(server)

        def meet(number: int) -> tuple[str, str | None]:
            server = idle.get()
            try:
                return self.meet(server, fault, number)
            finally:
                idle.put(server)

        with ThreadPoolExecutor(len(servers)) as threads:
            ends, wrong = zip(*threads.map(meet, numbers), strict=True)
        assert not any(wrong), "\n\n".join(filter(None, wrong))
        return Counter(ends)


def calls(folder: Path) -> list[list[str]]:
    """[name, path] of each call of a run, in their order."""
    return [line.split(" ", 2)[1:] for line in (folder / "log.txt").read_text().splitlines()]


def figures(run: Path) -> dict:
    results = json.loads((run / "all_results.json").read_text())
    return {name: value for name, value in results.items() if name not in TIMES}


def spread(made: list[list[str]], kinds: int) -> list[int]:
    """The numbers of calls of so many kinds, the rarest and the commonest, spread over the run."""
    numbers = {}
    for number, (name, _) in enumerate(made, 1):
        numbers.setdefault(name, []).append(number)
    rarest = sorted(numbers.values(), key=len)[:kinds]
    return sorted(of[len(of) * place // kinds] for place, of in enumerate(rarest))


@pytest.fixture(scope="session")
def server(library):
    server = preloaded(library)
    yield server
    server.close()


@pytest.fixture(scope="session")
def injection(toy, server, tmp_path_factory) -> Injection:
    return Injection(toy, tmp_path_factory.mktemp("injection"), server)


def traced(text: str, folder: Path) -> Counter:
    """How often each call that changes `folder` stands in what strace has written, under the names of inject.c."""
    found = Counter()
    for line in text.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if not call or (call[1].startswith("open") and not re.search("O_CREAT|O_TRUNC", call[2])):
            continue
        kind, arguments = NAMES[call[1]], call[2]
        if kind in OF_PATHS:
            place, path = re.findall(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"([^"]*)"', arguments)[-1]
            paths = [os.path.join(place, path)]
        else:
            paths = re.findall(r"\d+<([^>]*)>", arguments)
        if kind == "unlink" and "AT_REMOVEDIR" in arguments:
            kind = "rmdir"
        inside = [p for p in paths if any(Path(p).is_relative_to(folder / name) for name in ("run", "stores"))]
        found.update((kind, unnamed(path, folder)) for path in inside)
    return found


def unnamed(path: str, folder: Path) -> str:
    """A path without what differs from run to run: its folder, and the names of temporary files."""
    return re.sub(r"\.tmp\w{6}|(?<=\.building\.)[^/]*|\b[0-9a-f]{20}\b", "*", path.removeprefix(str(folder)))


@pytest.mark.torture
def test_no_call_escapes_that_strace_sees(toy, injection, library, tmp_path):
    trace = tmp_path / "trace"
    if not shutil.which("strace") or subprocess.run(["strace", "-o", trace, "true"], capture_output=True).returncode:
        pytest.skip("needs strace, and the right to use it")
    prefix = ("strace", "-f", "-y", "-s", "0", "-e", f"trace={','.join(NAMES)}", "-o", str(trace))
    strace = preloaded(library, prefix)
    status, errors = trained(strace, toy, tmp_path)
    strace.close()
    assert status == 0, errors
    counted = Counter((name, unnamed(path, injection.whole)) for name, path in injection.calls)
    assert traced(trace.read_text(), tmp_path) == counted
    assert counted.total() > 200


@pytest.mark.torture
@pytest.mark.parametrize("fault", [KILL, EIO, ENOSPC], ids=["kill", "EIO", "ENOSPC"])
def test_a_fault_at_a_call_of_each_kind_is_survived(injection, server, fault):
    rust = next(n for n, (_, path) in enumerate(injection.calls, 1) if path.endswith("/model.partial/tokenizer.json"))
    injection.torment([server], fault, [*spread(injection.calls, kinds=6), rust])


@pytest.mark.torture
@pytest.mark.parametrize("fault", [KILL, EIO, ENOSPC], ids=["kill", "EIO", "ENOSPC"])
def test_a_fault_at_every_call_is_survived(injection, server, library, fault, tally):
    servers = [server, *(preloaded(library) for _ in range(min(os.cpu_count() or 1, 4) - 1))]
    try:
        ends = injection.torment(servers, fault, [*range(1, len(injection.calls) + 1)])
    finally:
        for other in servers[1:]:
            other.close()
    del ends["not met"]
    name = {KILL: "`kill -9` before", EIO: "EIO at", ENOSPC: "the disk is full from"}[fault]
    ended = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    tally(f"{name} each call by which a run writes", ends.total(), f"{ended}; all resumed to the same bits")
