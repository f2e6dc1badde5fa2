"""Signals that ask a run to stop: it finishes its step, writes a checkpoint, and can be resumed.

first signal    remembered; the loop and the evaluation look at `asked()` once a batch
second signal   ends the process at once; of SIGXCPU, which the kernel repeats, only another one does
launcher gone   counts as SIGTERM: not every launcher passes signals on to its workers before it dies

A thread hears them: Python's handlers run between two instructions of the main thread, and a step in a C library, or a
collective that waits for another process, can take long."""

import os
import signal
import threading
import time

# What people, schedulers and batch systems send; a terminal that is closed; and the limit of processor time.
ASKING = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU}
SAME_REQUEST = 1.0  # seconds: Ctrl-C reaches a worker twice, from the terminal and from its launcher
# Variables that torchrun and `accelerate launch` set for their workers. Without a launcher a parent that is gone means
# nothing: a run started with nohup outlives its shell.
LAUNCHERS = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"}


class Stopped(Exception):
    """A run that was asked to stop and did, in order. The scripts exit with 128 + `number`."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopSignals:
    """A context in which signals ask for a stop. Python lets only the main thread handle them; others get none."""

    def __init__(self) -> None:
        self.received, self._since = 0, 0.0  # since when, by time.monotonic
        self._parent, self._launched = os.getppid(), LAUNCHERS & os.environ.keys()

    def asked(self) -> int:
        """The number of the signal that asks this process to stop; 0: none does."""
        if self._launched and not self.received and os.getppid() != self._parent:
            self._since, self.received = time.monotonic(), signal.SIGTERM
        return int(self.received)

    def _listen(self, pipe: int) -> None:
        while byte := os.read(pipe, 1):  # b"" once the other end is closed
            if byte[0] in ASKING and not self.received:
                self._since, self.received = time.monotonic(), byte[0]
            elif byte[0] in ASKING - {signal.SIGXCPU} and time.monotonic() - self._since > SAME_REQUEST:
                os._exit(128 + byte[0])
        os.close(pipe)

    def __enter__(self) -> "StopSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
            self._wakeup = signal.set_wakeup_fd(self._writer)  # the C library's handler writes numbers to it
            by_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            asking = ASKING - {signal.SIGHUP} if by_nohup else ASKING
            self._before = {number: signal.signal(number, lambda *_: None) for number in asking}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)
