"""A run over two machines, which share no disk or do."""

import signal
import subprocess
import sys

import pytest

from tests.processes import free_port
from tests.runs import (
    SCRIPT,
    TWO,
    assert_each_step_once,
    assert_same_bits,
    finish,
    kill_all,
    metrics,
    run,
    steps_taken,
    wait_for,
    weights,
)

pytestmark = pytest.mark.slow
TORCHRUN = ["torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_addr={main}", "--master_port=29411"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=2", "--num_processes=2"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_ip={main}", "--main_process_port=29412"]
RANK = {TORCHRUN[0]: "--node_rank={rank}", ACCELERATE[0]: "--machine_rank={rank}"}


def launch(machines, launcher, flags):
    """The launcher on each of the machines."""
    return [
        subprocess.Popen(
            [*machine.prefix, sys.executable, "-m"]
            + [word.format(main=machines[0].name, rank=rank) for word in (*launcher, RANK[launcher[0]])]
            + [SCRIPT, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, machine in enumerate(machines)
    ]


def start(machines, flags, program=SCRIPT, **variables):
    """A process on each of the machines, without a launcher."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": machines[0].name, "MASTER_PORT": str(free_port()), **variables}
    return [
        machine.server.start([program, *flags], **world, RANK=str(rank), LOCAL_RANK="0")
        for rank, machine in enumerate(machines)
    ]


def outcome(processes):
    ended = [finish(process) for process in processes]
    assert [status for status, *_ in ended] == [0, 0], ended
    return ended


def test_machines_without_a_shared_disk_resume_from_the_checkpoint_of_the_main_process(machines, toy, tmp_path):
    """Each builds its own token store. The second has nothing else on its disk, in the first run and in the next."""
    one, other = machines
    flags = toy.flags(
        one.place / "run", max_train_steps=100, token_store=one.place / "stores", resume_from_checkpoint="latest"
    )
    processes = start(machines, flags)
    wait_for(lambda: steps_taken(one.disk / "run") > 20, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    assert [finish(process)[0] for process in processes] == [128 + signal.SIGTERM] * 2
    (_, output, errors), (_, silent, quiet) = outcome(start(machines, flags))
    assert "resumed from" in output
    assert (errors, silent, quiet) == ("", "", "")
    assert [path.name for path in other.disk.iterdir()] == ["stores"]
    assert len(metrics(one.disk / "run", "start")) == 2
    assert_each_step_once(one.disk / "run")
    assert run(TWO, toy.flags(tmp_path / "whole", max_train_steps=100))[0] == 0
    assert_same_bits(weights(one.disk / "run"), weights(tmp_path / "whole"))
    # What is finished is found by the machine that has it, and known to the other.
    (_, output, _), _ = outcome(start(machines, flags))
    assert "is finished: 100 steps" in output


def test_machines_that_share_a_disk_build_the_token_store_once(machines, toy, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import os
from mlm import cli
from mlm import train as loop
from mlm.data import cache, token_store
build_once = cache.build_once
def counted(place, find, build, overwrite=False):
    def count(path):
        with open(os.environ['BUILT'], "a") as file:
            print(os.environ["RANK"], place.name, file=file)
        build(path)
    return build_once(place, find, count, overwrite)
token_store.build_once = counted
cli.run(lambda argv: loop.train(cli.parse_config(loop.Config, argv)).results)
""")
    flags = toy.flags(tmp_path / "run", token_store=tmp_path / "stores")
    outcome(start(machines, flags, str(program), BUILT=str(tmp_path / "built")))
    built = [line.split()[1] for line in (tmp_path / "built").read_text().splitlines()]
    assert len(built) == len(set(built)) > 0


@pytest.mark.torture
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_each_launcher_starts_a_run_over_two_machines(machines, toy, tmp_path, launcher):
    processes = launch(machines, launcher, toy.flags(tmp_path / "run"))
    try:
        (_, output, _), (_, silent, _) = outcome(processes)
    finally:
        for process in processes:
            kill_all(process)
    assert "2 process(es) of 4" in output
    assert silent == ""
    assert run(TWO, toy.flags(tmp_path / "whole"))[0] == 0
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))
