"""Forks a process, or the processes of one run, for each job that comes on standard input; imports are done once.

A job: {"argv", "folder", "environment", "processes"}, and three descriptors: standard output, standard error, and one
for the answers. These are two lines: the process to signal, and the exit status, negative for a signal.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback

from scripts.startup import quick_imports

with quick_imports():
    from mlm import cli
    from mlm.config import Config

    for name in (
        "mlm.inference.fill_mask",
        "mlm.train",
        "datasets.packaged_modules.text.text",
        "torch._dynamo",
        "transformers.models.auto.modeling_auto",
        "transformers.models.bert.modeling_bert",
    ):
        importlib.import_module(name)
    cli.parse_config(Config, [])  # reads the sources that flags are described in


def serve() -> list[str]:
    """Returns the command line of the process that returns from here: a child's child, the job's own."""
    jobs = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch a job
    while True:
        message, descriptors, *_ = socket.recv_fds(jobs, 2**20, 3)
        if not message:
            os._exit(0)
        if not os.fork():
            return watch(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def watch(job: dict, output: int, errors: int, answers: int) -> list[str]:
    """Forks the job's processes, as torchrun would set them up, and ends the others once one has failed."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    running = set()
    for rank in range(job["processes"]):
        if not (child := os.fork()):
            return become(job, rank, output, errors, answers)
        running.add(child)
    os.write(answers, f"{child if job['processes'] == 1 else os.getpid()}\n".encode())
    os.close(output)
    os.close(errors)
    failed = 0
    while running:
        ended, status = os.wait()
        running.remove(ended)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGTERM)
    os.write(answers, f"{failed}\n".encode())
    os._exit(0)


def become(job: dict, rank: int, *descriptors: int) -> list[str]:
    """Takes the job's streams, folder and environment."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for standard, descriptor in enumerate((nothing, *descriptors[:2])):
        os.dup2(descriptor, standard)
    for descriptor in (nothing, *descriptors):
        os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["processes"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    return job["argv"]


def run(program: str) -> None:
    """Runs it as Python would, and ends as Python does, but for taking down a thousand modules, which takes longer."""
    status = 0
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.argv = serve()
    sys.path[0] = os.path.dirname(sys.argv[0])
    if "WORLD_SIZE" in os.environ:  # what they have in common ends before Python, and has to be seen to
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        run(sys.argv[0])
