"""Claims about a run's directory on a file system without locks: no run is kept out by one that is dead."""

import errno
import fcntl
import os

import pytest
from accelerate import Accelerator

from mlm.report.run_directory import RunConfig, RunDirectory


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ESTALE])
def test_without_locks_a_run_goes_on_and_says_so_and_a_dead_one_keeps_nobody_out(tmp_path, code, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "run").mkdir()
    for _ in range(2):
        caplog.clear()
        directory = RunDirectory(RunConfig(output_dir=str(tmp_path / "run")), None, accelerator)
        directory.claim()  # and is then killed: it releases nothing
        [line] = caplog.messages
        assert line.startswith(f"--output_dir {tmp_path}/run: no locks there")
        assert os.strerror(code) in line
    directory.release()
