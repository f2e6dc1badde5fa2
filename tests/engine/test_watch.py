"""A process or a machine that is lost ends the others within half a minute, whatever they wait for."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlm.engine.watch import IDLE, INTERVAL, PROBES, _accept
from tests.machines import link
from tests.processes import free_port, server
from tests.runs import finish

LOST = IDLE + INTERVAL * PROBES  # seconds
# Two processes of a run that meet; then each does as its line says.
PROGRAM = """
import sys, time
import torch
import torch.distributed as dist
from mlm import cli
from mlm.engine import watch
from mlm.engine.device import make_accelerator
from mlm.engine.distributed import host_group
from mlm.errors import UserError

watch.GRACE = watch.MEETING = 1.0

def body(argv):
    accelerator = make_accelerator()
    group, rank = host_group(accelerator), accelerator.process_index
    dist.barrier(group)
    print("met", flush=True)
    exec(argv[rank])
    return {}

cli.run(body)
"""
WAITS = "dist.recv(torch.empty(1), src=1 - rank, group=group)"  # for what is never sent


def meet(tmp_path, lines, servers=None, address="127.0.0.1", before="", met="met\n"):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("def body", f"{before}\ndef body"))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    processes = [
        server.start([str(program), *lines], **world, RANK=str(rank), LOCAL_RANK="0")
        for rank, server in enumerate(servers or [server(), server()])
    ]
    for process in processes:
        assert process.stdout.readline() == met, process.communicate()
    return processes


@pytest.mark.slow
def test_processes_between_which_the_link_is_silent_end_within_half_a_minute(machines, tmp_path):
    """No connection is closed: without the watch both would wait in gloo for a month."""
    processes = meet(tmp_path, [WAITS, WAITS], [m.server for m in machines], machines[0].name)
    link(machines[1].name, "down")
    try:
        began = time.monotonic()
        for rank, process in enumerate(processes):
            status, _, errors = finish(process, LOST + 15)
            assert status == 1
            assert errors.count("\n") == 1, errors
            [line] = errors.splitlines()
            assert line.startswith(
                f"error: process {rank} ends because process {1 - rank} or its machine is not there"
            )
            assert "--resume_from_checkpoint latest" in line
        assert time.monotonic() - began > IDLE
    finally:
        link(machines[1].name, "up")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_waits_outside_of_gloo_ends_when_another_is_killed(tmp_path, victim):
    """As one does whose device waits for a collective of NCCL."""
    processes = meet(tmp_path, ["time.sleep(300)"] * 2)
    processes[victim].kill()
    status, _, errors = finish(processes[1 - victim], 60)
    processes[victim].communicate()
    assert status == 1
    assert errors.count(f"error: process {1 - victim} ends because process {victim} has ended") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("first", "line", "its"), [(0, "pass", 0), (1, "raise UserError('mistaken')", 2)])
def test_a_process_that_ends_in_order_ends_no_other(tmp_path, first, line, its):
    lines = ["time.sleep(3)"] * 2  # longer than the grace
    lines[first] = line
    processes = meet(tmp_path, lines)
    assert finish(processes[first])[0] == its
    status, _, errors = finish(processes[1 - first])
    assert (status, errors) == (0, "")


@pytest.mark.slow
def test_a_run_whose_main_process_cannot_be_reached_says_so(tmp_path):
    """At a port that none could know beforehand, as a firewall may have it."""
    before = "import socket; socket.create_connection = lambda *_: (_ for _ in ()).throw(ConnectionRefusedError())"
    for process in meet(tmp_path, ["pass", "pass"], before=before, met=""):
        status, _, errors = finish(process)
        assert (status, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("error: not all processes reach port ")


def test_whoever_else_finds_the_port_is_no_process_of_the_run():
    token = b"0123456789abcdef"
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(_accept, listening, token, 2)
        callers = []
        for said in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            token[::-1] + b"\0\0\0\1",
            token + b"\0\0\0\2",
            token + b"\0\0\1\0",
        ):
            callers.append(socket.create_connection(listening.getsockname()))
            callers[-1].sendall(said)
            callers[-1].shutdown(socket.SHUT_WR)
        assert sorted(accepted.result(10).values()) == [2, 256]
        for end in (*callers, *accepted.result()):
            end.close()
