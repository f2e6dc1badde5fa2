"""Forks a training process for each line of JSON on standard input; what all of them import is imported once.

A line: {"flags", "output", "errors", "log", "watched", "fault", "number"}, the last four as inject.c has them; without
a log the calls of the process go by uncounted. The answer is a line too: its exit status, negative for a signal.
"""

import ctypes
import importlib
import json
import os
import signal
import sys

from mlm.startup import quick_imports

with quick_imports():
    from mlm import cli
    from mlm.config import Config
    from mlm.train import main

    for name in ("datasets.packaged_modules.text.text", "transformers.models.bert.modeling_bert", "torch._dynamo"):
        importlib.import_module(name)  # what a run would import late
    cli.parse_config(Config, [])  # reads the sources that flags are described in

SECONDS = 120  # a run that takes longer hangs: SIGALRM ends it


def watch(log: str, watched: list[str], fault: int, number: int) -> None:
    """Has the preloaded library count this process's calls. Exits with 77 where the kernel refuses."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    folders = [folder.encode() for folder in watched]
    if ctypes.CDLL(None).watch(*folders, descriptor, fault, ctypes.c_long(number)):
        os._exit(77)


def serve() -> dict:
    """The next process's task, in that process; the first process answers for it, and ends with its input."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        child = os.fork()
        if not child:
            return json.loads(line)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()
    sys.exit()


task = serve()
signal.alarm(SECONDS)
for standard, path in enumerate((os.devnull, task["output"], task["errors"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), standard)
if "log" in task:
    watch(task["log"], task["watched"], task["fault"], task["number"])
sys.argv = ["train.py", *task["flags"]]
cli.run(main)
