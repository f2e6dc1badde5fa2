"""Two machines, for the tests of runs that go over both."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.machines import ADDRESSES, inside, two_machines
from tests.processes import Server

# Its own host name, folder and table of the names of both; then what is to be run.
BECOME = """
set -e
echo "$0" >/proc/sys/kernel/hostname
mount --bind "$1" "$2"
mount --bind "$3" /etc/hosts
shift 3
exec "$@"
"""


@dataclass
class Machine:
    name: str  # its host name, and that of its network device
    disk: Path  # the folder that it finds at `place`, where the other machine has one of its own
    place: Path
    prefix: list[str]  # how a command begins that is run on it
    server: Server  # of processes on it


@pytest.fixture(scope="package")
def machines(tmp_path_factory) -> Iterator[list[Machine]]:
    """Two of them. Skips the test where they may not be made."""
    folder = tmp_path_factory.mktemp("machines")
    place, hosts = folder / "disk", folder / "hosts"
    place.mkdir()
    with ExitStack() as stack:
        try:
            names = stack.enter_context(two_machines())
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here, which take root and iproute2 ({error})")
        entries = zip(("127.0.0.1", *ADDRESSES), ("localhost", *names), strict=True)
        # An address of version 4 is asked for in version 6 too, and no server for names is there.
        hosts.write_text("".join(f"{address} {name}\n::ffff:{address} {name}\n" for address, name in entries))
        made = []
        for name in names:
            (disk := folder / name).mkdir()
            own = ["unshare", "--uts", "sh", "-c", BECOME, name, str(disk), str(place), str(hosts)]
            prefix = [*inside(name), *own]
            made.append(Machine(name, disk, place, prefix, Server(prefix=tuple(prefix))))
            stack.callback(made[-1].server.close)
        yield made
