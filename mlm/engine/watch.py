"""Notices that a run has lost a process, whatever the others wait for and however long a step takes.

A process that dies has its connections closed by its machine, which ends the waits of gloo. A machine or a link that
is gone says nothing, and a device that waits in NCCL hears nothing for minutes. So each process keeps a connection to
the main one on which nothing is sent: the kernels ask each other whether they are there (SO_KEEPALIVE, tcp(7)), which
needs no Python. Who leaves in order says so; one that is lost ends the others with status 1, for a launcher to start
them anew. Neither a process that hangs is noticed, nor a link between two of which none is the main process.
"""

import atexit
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress

from accelerate import Accelerator

from mlm.engine.distributed import from_main

log = logging.getLogger(__name__)

IDLE, INTERVAL, PROBES = 5, 5, 3  # seconds, seconds, times: without an answer for 20 s, a machine is lost
GRACE = 20.0  # seconds for a process whose wait has ended to say so, and to finish the checkpoint that it writes
MEETING = 30.0  # seconds for all to connect
IN_ORDER = b"."


class Watch:
    """A thread that ends this process once another one is lost, until it exits. All processes make one at a time."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._rank, self._leaving = accelerator.process_index, threading.Event()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=4096) as server:
            # The token tells the processes of this run from whoever else finds the port.
            port, token = from_main((server.getsockname()[1], secrets.token_bytes(16)), accelerator)
            if accelerator.is_main_process:
                self._ranks = _accept(server, token, accelerator.num_processes - 1)
            else:
                self._ranks = _call(port, token + self._rank.to_bytes(4))
        for connection in self._ranks:
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # On macOS TCP_KEEPIDLE has another name, and this number (netinet/tcp.h).
            for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES)):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name, 0x10), value)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        atexit.register(self._leave)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._ranks:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    try:
                        if key.fileobj.recv(1) == IN_ORDER or self._leaving.wait(GRACE):
                            continue
                        reason = "has ended"
                    except OSError as error:
                        reason = f"or its machine is not there any more ({error.strerror})"
                    self._end(f"process {self._ranks[key.fileobj]} {reason}")

    def _end(self, reason: str) -> None:
        resumes = "--resume_from_checkpoint latest resumes from the last checkpoint, if it has written one"
        with suppress(OSError, ValueError):
            print(f"error: process {self._rank} ends because {reason}; {resumes}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: the main thread waits

    def _leave(self) -> None:
        self._leaving.set()
        for connection in self._ranks:
            with suppress(OSError):
                connection.send(IN_ORDER)
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()


def _call(port: int, named: bytes) -> dict[socket.socket, int]:
    """A connection to the main process, whose rank is 0; none where a firewall, say, is before it."""
    with suppress(OSError):
        connection = socket.create_connection((os.environ["MASTER_ADDR"], port), MEETING)
        connection.sendall(named)
        return {connection: 0}
    return {}


def _accept(server: socket.socket, token: bytes, processes: int) -> dict[socket.socket, int]:
    """The connections of so many other processes, and their ranks; fewer where not all come."""
    ranks, end = {}, time.monotonic() + MEETING
    while len(ranks) < processes:
        server.settimeout(max(end - time.monotonic(), 0.1))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = f"{processes - len(ranks)} of {processes} other processes do not reach the main one at its port"
            log.warning("%s %d: where a machine is lost, this run may wait", missing, server.getsockname()[1])
            break
        connection.settimeout(1.0)
        with connection.makefile("rb") as sent, suppress(OSError):
            if secrets.compare_digest(sent.read(len(token)), token):
                ranks[connection] = int.from_bytes(sent.read(4))
    return ranks
