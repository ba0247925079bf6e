"""The programs of launch/examples, as they stand there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from obcache_sglang.local_server import Server
from tests.serving.client import compressions

EXAMPLES = Path("launch", "examples")


def run(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.parametrize("command", [("bash", "serve_and_ask.sh"), (sys.executable, "openai_client.py")], ids=["curl", "openai"])
def test_two_questions_cause_one_compression(server: Server, command: tuple[str, str]) -> None:
    before = compressions(server)
    program, file = command
    said = run(program, EXAMPLES / file, server.url)
    assert "compressed" in said
    assert "reused" in said
    assert compressions(server) == before + 1


@pytest.mark.long  # test_programs.py runs a program that does more
def test_the_offline_engine(model_dir: Path) -> None:
    said = run(sys.executable, EXAMPLES / "offline_engine.py", model_dir)
    assert said.count("reused: ") == 2, said
