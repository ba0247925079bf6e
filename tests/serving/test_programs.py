"""The ways to use it beside HTTP: the offline engine, the frontend language, and a server with tensor parallelism."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from obcache_sglang import local_server
from obcache_sglang.local_server import Server, serve
from tests.serving.client import compressions, document, generate_together, question, report
from tests.serving.conftest import COMMON, STRICT


def test_the_offline_engine(model_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.serving.offline_engine", str(model_dir)]
    with log.open("wb") as output:
        process = local_server.start_process(command, output, os.environ)
    try:
        process.wait(400)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text(errors="replace")
    assert "engine: all good" in said, said[-6000:]


def test_the_frontend_language_example(server: Server) -> None:
    before = compressions(server)
    command = [sys.executable, "-m", "launch.many_questions", "--url", server.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert compressions(server) == before + 1


@pytest.mark.long
def test_three_tensor_parallel_ranks(model_dir: Path, tmp_path: Path) -> None:
    """SmolLM2 has 9 query and 3 KV heads: each rank compresses its own, all hold the same slots."""
    flags = (*COMMON, "--tp-size", "3", "--max-total-tokens", "4096", "--obcache", "--obcache-min-tokens", "32")
    flags += ("--obcache-gates", "smollm2-135m")
    env = {**STRICT, "SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}
    with serve(model_dir, tmp_path / "log", flags, env) as server:
        segments = {"segment_tokens": 128}
        for method, budget, more in (
            ("snapkv", "adakv", {}), ("snapkv", "global", {}), ("tova", "uniform", {}), ("gate", "profile", segments),
            ("gate", "profile", {"boundaries": [150], "exact_segments": 1}), ("gate", "uniform", {"boundaries": [150], "exact_segments": 1}),
        ):  # fmt: skip
            context = document(model_dir, 300, "binary")
            wish = {"context_len": 300, "method": method, "budget": budget, **more}
            asked = [{"prompt": context + question(model_dir, f"\n\nPoint {i}:"), "obcache": wish} for i in range(3)]
            answers = generate_together(server, asked)
            assert sorted(report(answer)["status"] for answer in answers) == ["compressed", "reused", "reused"]
            exact = generate_together(server, [{"prompt": asked[0]["prompt"]}])[0]
            whole = generate_together(server, [{**asked[0], "obcache": {**wish, "compression_ratio": 0.0}}])[0]
            assert whole["output_ids"] == exact["output_ids"]
        assert "leak" not in server.log()
