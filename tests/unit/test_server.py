"""A server that we start ends with us; that real ones start and answer is what tests/serving sees."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

# Its server is a shell that waits for a child of its own, as a real one does, and is never healthy.
_SCRIPT = """
import pathlib, signal, sys
from obcache_sglang.local_server import serve

# As at a terminal: under nohup, and in a script's background, signals are ignored, and a child inherits that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = pathlib.Path(sys.argv[1])
sys.executable = str(folder / "server")
with serve("model", folder / "log"):
    pass
"""


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in 30 s"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_it_ends_when_we_are_told_to(number: signal.Signals, tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text(f'#!/bin/sh\nsleep 600 &\necho "$$ $!" > {tmp_path}/started\nmv {tmp_path}/started {tmp_path}/pids\nwait\n')
    server.chmod(0o755)
    pids: list[int] = []
    process = subprocess.Popen([sys.executable, "-c", _SCRIPT, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "pids").exists)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(running(pid) for pid in pids)
        process.send_signal(number)
        process.wait(60)
        wait_until(lambda: not any(running(pid) for pid in pids))
        assert process.returncode not in (0, None)
    finally:
        process.kill()
        for pid in filter(running, pids):
            psutil.Process(pid).kill()
