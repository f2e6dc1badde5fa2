"""Ends a process whose run has lost another one, whatever it waits for and however long a step takes.

A process that dies has its connections closed by its machine, which ends the waits of gloo. A machine or link that is
gone says nothing, and a device that waits in NCCL hears nothing for minutes. So each process keeps a connection to the
main one on which nothing is sent: the kernels ask each other whether they are there (SO_KEEPALIVE, tcp(7)), without
Python. Who ends in order says so. Not noticed: a process that hangs, a link that does not lead to the main process."""

import atexit
import os
import secrets
import selectors
import socket
import sys
import threading
from contextlib import suppress

from accelerate import Accelerator

from mlm.engine.distributed import from_main
from mlm.errors import UserError

IDLE, INTERVAL, PROBES = 5, 5, 3  # seconds, seconds, times: without an answer for 20 s, a machine is lost
GRACE = 20.0  # seconds for a process whose wait has ended to say so, and to finish the checkpoint that it writes
MEETING = 30.0  # seconds for the next process to connect, and to name itself
IN_ORDER = b"."


def watch(accelerator: Accelerator) -> None:
    """From here on this process ends with status 1 once another one is lost. All of a run have to call it. Raises
    UserError where they do not reach the main process at MASTER_ADDR."""
    rank, dual = accelerator.process_index, socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=4096) as server:
        # The token tells the processes of this run from whoever else finds the port.
        port, token = from_main((server.getsockname()[1], secrets.token_bytes(16)), accelerator)
        try:
            if rank == 0:
                others = _accept(server, token, accelerator.num_processes - 1)
            else:
                main = socket.create_connection((os.environ["MASTER_ADDR"], port), MEETING)
                main.sendall(token + rank.to_bytes(4))
                others = {main: 0}
        except OSError as error:
            raise UserError(f"not all processes reach port {port} of {os.environ['MASTER_ADDR']} ({error})") from error
    for connection in others:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # On macOS TCP_KEEPIDLE has another name, and this number (netinet/tcp.h).
        for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name, 0x10), value)
    leaving = threading.Event()
    thread = threading.Thread(target=_listen, args=(others, rank, leaving), daemon=True)
    thread.start()
    atexit.register(_leave, others, leaving, thread)


def _accept(server: socket.socket, token: bytes, processes: int) -> dict[socket.socket, int]:
    """The connections of so many other processes, with their ranks. Raises TimeoutError where not all come."""
    others = {}
    server.settimeout(MEETING)
    while len(others) < processes:
        connection, _ = server.accept()
        connection.settimeout(MEETING)
        with connection.makefile("rb") as sent, suppress(OSError):
            if secrets.compare_digest(sent.read(len(token)), token):
                others[connection] = int.from_bytes(sent.read(4))
    return others


def _listen(others: dict[socket.socket, int], rank: int, leaving: threading.Event) -> None:
    with selectors.DefaultSelector() as selector:
        for connection in others:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                selector.unregister(key.fileobj)
                reason, grace = "has ended", GRACE
                try:
                    if key.fileobj.recv(1) == IN_ORDER:
                        continue
                except OSError as error:
                    if not isinstance(error, ConnectionError):  # which a process is that ends, too
                        reason, grace = f"or its machine is not there any more ({error.strerror})", 0.0
                if leaving.wait(grace):
                    continue
                resumes = "--resume_from_checkpoint latest resumes from the last checkpoint, if it has written one"
                line = f"error: process {rank} ends because process {others[key.fileobj]} {reason}; {resumes}"
                with suppress(OSError, ValueError):
                    print(line, file=sys.stderr, flush=True)
                os._exit(1)  # for a launcher to start it anew; the main thread waits and would not hear of it


def _leave(others: dict[socket.socket, int], leaving: threading.Event, thread: threading.Thread) -> None:
    leaving.set()
    for connection in others:
        with suppress(OSError):
            connection.send(IN_ORDER)
            connection.shutdown(socket.SHUT_RDWR)
    thread.join()
