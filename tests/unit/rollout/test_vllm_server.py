"""A process group ends with the process that started it, and so do its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from eventually import eventually

from vllm_server import ProcessGroup, free_port, is_taken

PARENT_AND_CHILD = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("pids.tmp").write_text(f"{os.getpid()} {child.pid}")
os.rename("pids.tmp", "pids")
time.sleep(600)
"""
OWNER = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(Path(__file__).parents[3] / "tools")!r})
from vllm_server import ProcessGroup
command = [sys.executable, "-c", {PARENT_AND_CHILD!r}]
group = ProcessGroup(command, env=dict(os.environ), log=pathlib.Path("log"))
time.sleep(600)
"""


def pids_of(folder: Path) -> list[int]:
    eventually(lambda: (folder / "pids").exists())
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        "Z"
        not in subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        ).stdout
    )


@pytest.mark.parametrize("kill", [False, True])
def test_a_group_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", PARENT_AND_CHILD]
    group = ProcessGroup(command, env=dict(os.environ), log=tmp_path / "log")
    pids = pids_of(tmp_path)
    assert pids[0] == group.pid and not group.ended and all(map(alive, pids))
    group.end(kill=kill)
    assert group.ended
    eventually(lambda: not any(map(alive, pids)))


def test_a_group_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=tmp_path)
    pids = pids_of(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    eventually(lambda: not any(map(alive, pids)))


def test_a_free_port_is_not_taken() -> None:
    assert not is_taken(free_port())
