"""The status file by which processes, torchrun's restarts and launch.sh agree to end."""

import os
import tempfile

import pytest

from mythos.distributed.launch_status import LaunchStatus, end_launch, launch_status


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "MYTHOS_STATUS_FILE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def test_error_without_launcher(capfd):
    assert end_launch("no such corpus") == 1
    assert capfd.readouterr().err == "error: no such corpus\n"
    assert launch_status() is LaunchStatus.RUNNING


def test_error_rules_out_restarts(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert launch_status() is LaunchStatus.RUNNING
    for rank in range(3):  # all processes of the machine fail; one reports
        monkeypatch.setenv("RANK", str(rank))
        assert end_launch("no such corpus") == 1
    assert capfd.readouterr().err == "error: no such corpus\n"
    assert launch_status() is LaunchStatus.ERROR
    monkeypatch.setattr(os, "getppid", os.getpid)  # another launcher
    assert launch_status() is LaunchStatus.RUNNING


def test_error_under_launch_script(capfd, monkeypatch, tmp_path):
    status = tmp_path / "status"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("MYTHOS_STATUS_FILE", str(status))
    assert launch_status() is LaunchStatus.RUNNING
    status.touch()  # as a full disk leaves it
    assert launch_status() is LaunchStatus.RUNNING
    status.write_text("stop\n")
    assert launch_status() is LaunchStatus.STOP
    assert end_launch("no such corpus") == end_launch("a consequence of it") == 1
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert end_launch("a consequence of it") == 0  # launch.sh, which ends with 1, needs no report of torchrun
    assert launch_status() is LaunchStatus.ERROR
    assert status.read_text() == "error: no such corpus\n"  # printed by launch.sh
    assert capfd.readouterr().err == ""
