"""Served exactly at first, compressed when nobody waits. On the real engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from obcache_sglang.local_server import Server, serve
from tests.serving.client import compressions, document, flush, generate, question, report
from tests.serving.conftest import COMMON, STRICT, checked, serving

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


LONG = 1900


@pytest.fixture(scope="module")
def idle_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Replays, of many passes, when the engine is idle."""
    flags = (*COMMON, "--max-total-tokens", "12000", "--chunked-prefill-size", "512", "--obcache", "--obcache-min-tokens", "32")
    flags += ("--obcache-when", "idle", "--obcache-method", "replay", "--obcache-replay-chunk", "100")
    yield from serving(model_dir, tmp_path_factory.mktemp("idle"), flags)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def replayed(server: Server) -> int:
    return server.get("/obcache/status")["counters"]["replayed_tokens"]


def stream_times(server: Server, prompt: list[int], tokens: int) -> list[float]:
    """When each token of an answer came."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"obcache": {"context_len": LONG}}}
    body = {"input_ids": prompt, "sampling_params": params, "stream": True}
    times = []
    with server.request("POST", "/generate", json=body, stream=True) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                assert "error" not in json.loads(line.removeprefix(b"data: "))
                times.append(time.monotonic())
    return times


@pytest.mark.long
def test_an_idle_compression_starts_after_the_last_token_and_makes_way(idle_server: Server, model_dir: Path) -> None:
    """Between the first and the second token of its own question the engine is not idle."""
    prompt = document(model_dir, LONG, "class") + question(model_dir, "\n\nIn short,")
    before = replayed(idle_server)
    times = stream_times(idle_server, prompt, 40)
    assert replayed(idle_server) == before
    gaps = sorted(later - earlier for earlier, later in pairwise(times))
    assert gaps[-1] < max(1.0, 10 * gaps[len(gaps) // 2])
    wait_for(lambda: replayed(idle_server) > before)
    under_way = compressions(idle_server)
    generate(idle_server, document(model_dir, 200, "calls"), max_new_tokens=2)
    assert compressions(idle_server) == under_way, "a client waited for the whole replay"
    wait_for(lambda: compressions(idle_server) == under_way + 1)
    assert report(generate(idle_server, prompt, obcache={"context_len": LONG}))["status"] == "reused"


@pytest.mark.long
def test_idle_compressions_go_on_after_an_abort_of_everything(idle_server: Server, model_dir: Path) -> None:
    for topic in ("exceptions", "formatstrings"):
        before, done = replayed(idle_server), compressions(idle_server)
        prompt = document(model_dir, LONG, topic) + question(model_dir, "\n\nIn short,")
        assert report(generate(idle_server, prompt, obcache={"context_len": LONG}))["reason"] == "deferred"
        wait_for(lambda before=before: replayed(idle_server) > before)
        if topic == "exceptions":
            idle_server.request("POST", "/abort_request", json={"abort_all": True})
            time.sleep(1)
        else:
            wait_for(lambda done=done: compressions(idle_server) > done)


@pytest.mark.long
def test_idle_compressions_make_way_for_flushes_and_weights(idle_server: Server, model_dir: Path) -> None:
    for step in ("flush at once", "flush", "weights"):
        before = replayed(idle_server)
        for topic in ("numbers", "strings", "binary"):
            prompt = document(model_dir, LONG, topic) + question(model_dir, "\n\nIn short,")
            generate(idle_server, prompt, obcache={"context_len": LONG})
        wait_for(lambda before=before: replayed(idle_server) > before)
        started = time.monotonic()
        if step == "flush at once":
            assert idle_server.request("POST", "/flush_cache").status_code == 200
        elif step == "flush":
            flush(idle_server)
        else:
            answer = idle_server.request("POST", "/update_weights_from_disk", json={"model_path": str(model_dir)})
            assert answer.status_code == 200 and answer.json()["success"], answer.text
        assert step == "weights" or time.monotonic() - started < 10
        assert idle_server.get("/obcache/contexts")["contexts"] == []
        assert idle_server.get("/v1/loads")["loads"][0]["num_used_tokens"] == 0
