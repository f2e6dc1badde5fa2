"""Two machines that a run goes over: network namespaces of this one, joined by a veth pair."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def inside(name: str) -> list[str]:
    """How a command begins that is run in the network of a machine."""
    return ["ip", "netns", "exec", name]


@contextmanager
def two_machines() -> Iterator[list[str]]:
    """The names of two machines and of the network device of each.

    Raises CalledProcessError, or FileNotFoundError without iproute2, where they may not be made.
    """
    names = [f"mlm{os.getpid()}{letter}" for letter in "ab"]
    with ExitStack() as stack:
        for name in names:
            command("ip", "netns", "add", name)
            stack.callback(command, "ip", "netns", "delete", name)
        pair = ["peer", "name", names[1], "netns", names[1]]
        command("ip", "link", "add", names[0], "netns", names[0], "type", "veth", *pair)
        for name, address in zip(names, ADDRESSES, strict=True):
            command(*inside(name), "ip", "address", "add", f"{address}/24", "dev", name)
            link(name, "up", "lo")
            link(name, "up")
        yield names


def link(name: str, state: str, device: str | None = None) -> None:
    """Lets a machine's link be `up` or `down`: then it is silent, and no connection is closed."""
    command(*inside(name), "ip", "link", "set", device or name, state)
