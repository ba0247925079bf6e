"""Served exactly at first, compressed when nobody waits. On the real engine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from obcache_sglang.server import serve
from tests.serving.client import compressions, document, generate, question, report
from tests.serving.conftest import COMMON, STRICT, checked

L = 300


@pytest.mark.long
def test_questions_are_exact_until_the_engine_is_idle(model_dir: Path, tmp_path: Path) -> None:
    flags = (*COMMON, "--max-total-tokens", "2800", "--chunked-prefill-size", "256", "--obcache", "--obcache-min-tokens", "32")
    flags += ("--obcache-when", "idle", "--obcache-method", "replay", "--obcache-compression-ratio", "0.5")
    wish = {"context_len": L}
    with serve(model_dir, tmp_path / "log", flags, STRICT) as server:
        for _ in checked(server):
            prompt = document(model_dir, L, "binary") + question(model_dir, "\n\nIn short,")
            plain = generate(server, prompt)
            first = generate(server, prompt, obcache=wish)
            assert (report(first)["status"], report(first)["reason"]) == ("exact", "deferred")
            assert first["output_ids"] == plain["output_ids"]
            deadline = time.monotonic() + 60
            while not compressions(server):
                assert time.monotonic() < deadline, "an idle server did not compress"
                time.sleep(0.2)
            second = generate(server, prompt, obcache=wish)
            assert report(second)["status"] == "reused"
            assert report(second)["kept_tokens"] == L // 2
            status = server.get("/obcache/status")
            assert status["counters"]["replayed_tokens"] > L
            assert status["counters"]["exact"] == {"deferred": 1}

            # A request that runs on and on keeps the engine busy; a context is compressed at last when the pool gets tight.
            other = document(model_dir, L, "calls") + question(model_dir, "\n\nIn short,")
            busy = {"prompt": document(model_dir, 1450, "class"), "max_new_tokens": 400, "sampling_params": {"ignore_eos": True}}
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(generate, server, **busy)
                time.sleep(5)
                assert report(generate(server, other, obcache=wish))["reason"] == "deferred"
                deadline = time.monotonic() + 120
                while compressions(server) < 2 and not running.done():
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
                assert not running.done(), "compressed only when the engine was idle"
                running.result()
