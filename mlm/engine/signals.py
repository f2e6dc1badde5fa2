"""Signals that ask a run to stop: it finishes its step, writes a checkpoint, and can be gone on with.

first signal    remembered; the loop and the evaluation look at `asked()` once a batch
second signal   ends the process at once
launcher gone   counts as SIGTERM: not every launcher passes signals on to its workers before it dies

A thread hears them: Python's own handlers run in the main thread, and only between two of its instructions,
which a step in a C library, or a collective that waits for another process, can keep apart for long.
"""

import os
import signal
import threading
import time
from types import TracebackType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what Slurm users have sent
# Ctrl-C reaches a worker twice, from the terminal and from its launcher, which passes it on. Signals that
# come within this many seconds of the first are the same request.
SAME_REQUEST = 1.0
# Variables that torchrun and `accelerate launch` set for their workers. Only with a launcher does a parent
# that is gone mean anything: a run started with nohup outlives its shell.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")


class Stopped(Exception):
    """A run that was asked to stop and did, in order. The scripts exit with 128 + `number`."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopSignals:
    """A context in which signals ask for a stop instead of ending the process.

    Outside the main thread, where Python lets nobody handle signals, it changes nothing. A launcher that goes
    is noticed from the moment on at which this is made.
    """

    def __init__(self) -> None:
        self.received, self._since = 0, 0.0  # since when, by time.monotonic
        self._parent = os.getppid()
        self._launched = any(name in os.environ for name in LAUNCHERS)

    def asked(self) -> int:
        """The number of the signal that asks this process to stop; 0: none does."""
        if self._launched and not self.received and os.getppid() != self._parent:
            self._since, self.received = time.monotonic(), signal.SIGTERM
        return int(self.received)

    def _listen(self, pipe: int) -> None:
        while byte := os.read(pipe, 1):  # b"" once the other end is closed
            [number] = byte
            if number not in ASKING:
                continue
            if not self.received:
                self._since, self.received = time.monotonic(), number
            elif time.monotonic() - self._since > SAME_REQUEST:
                os._exit(128 + number)
        os.close(pipe)

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            heard, self._told = os.pipe()
            os.set_blocking(self._told, False)
            threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
            self._wakeup = signal.set_wakeup_fd(self._told)  # the C library's handler writes numbers to it
            self._before = {number: signal.signal(number, lambda *_: None) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._told)
