"""Processes forked from one that has imported torch and the libraries: each is one of its own, without the seconds."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from tests.conftest import REPOSITORY


class Forked:
    """The part of subprocess.Popen that tests use, of a job that a server has forked."""

    def __init__(self, output: int, errors: int, answers: int) -> None:
        self.stdout, self.stderr, self._answers = (os.fdopen(pipe) for pipe in (output, errors, answers))
        self.pid, self.returncode = int(self._answers.readline()), None
        self._readers = ThreadPoolExecutor(2)

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], timeout)[0]:
            self.returncode = int(self._answers.readline() or -signal.SIGKILL)  # it is silent if it was killed itself
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        output, errors = (self._readers.submit(stream.read) for stream in (self.stdout, self.stderr))
        self.wait(timeout)
        return output.result(), errors.result()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """A process that forks others.

    environment: that of all of them, if it is not the one of this process at the time
    prefix: of its command, `strace` and its options, say
    """

    def __init__(self, environment: dict[str, str] | None = None, prefix: tuple[str, ...] = ()) -> None:
        self.environment = environment
        self.jobs, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [*prefix, sys.executable, "-m", "tests.server"]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdin=its)
        its.close()

    def start(self, argv: list[str], processes: int = 1, folder: Path = REPOSITORY, **variables: str) -> Forked:
        """Runs `argv`, a program and its arguments, in so many processes of one run."""
        environment = {**(self.environment or os.environ), **variables}
        if processes > 1:
            environment |= {"WORLD_SIZE": str(processes), "MASTER_PORT": str(free_port())}
        job = {"argv": argv, "folder": str(folder), "environment": environment, "processes": processes}
        (output, its_output), (errors, its_errors), (answers, its_answers) = (os.pipe() for _ in range(3))
        socket.send_fds(self.jobs, [json.dumps(job).encode()], [its_output, its_errors, its_answers])
        for descriptor in (its_output, its_errors, its_answers):
            os.close(descriptor)
        return Forked(output, errors, answers)

    def close(self) -> None:
        self.jobs.close()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@cache
def server() -> Server:
    """The one of this process of tests; it ends with it."""
    return Server()
