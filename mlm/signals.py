"""Signals that ask a run to stop: it finishes its step, writes a checkpoint, and can be gone on with.

first signal    remembered; the loop and the evaluation look at `asked()` once a batch
second signal   ends the process at once
launcher gone   counts as SIGTERM: not every launcher passes signals on to its workers before it dies
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

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

    Outside the main thread, where Python lets nobody handle signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._parent = os.getppid()
        self._launched = any(name in os.environ for name in LAUNCHERS)

    def asked(self) -> int:
        """The number of the signal that asks this process to stop; 0: none does."""
        if self._launched and not self.received and os.getppid() != self._parent:
            self.received = signal.SIGTERM
        return int(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST:
            os._exit(128 + number)

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
