"""Ways into SGLang's queue past an ordinary arrival: preemption by a higher priority, and a prefill that is delayed.

Whoever comes that way is decided on before it is prefilled, and gets the answer that it gets alone. Others are tested where they arise:
grammars in `test_sharing.py`, retraction in `test_lifetimes.py`, all at once in `test_soak.py`, the manager's part in `tests/unit/test_manager.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server, serve
from tests.serving.client import document, flush, generate, question, report
from tests.serving.conftest import COMMON, STRICT, checked

L = 200
FLAGS = (*COMMON, "--max-total-tokens", "2000", "--chunked-prefill-size", "128", "--max-running-requests", "2")
FLAGS += ("--obcache", "--obcache-min-tokens", "32", "--obcache-method", "snapkv", "--obcache-compression-ratio", "0.5")

WAYS = {
    "preemption": ("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "1"),
    # While one or two run, the next waits until another one does too; SGLang never delays the first such.
    "delayed prefill": (
        *("--enable-prefill-delayer", "--prefill-delayer-max-delay-passes", "20", "--prefill-delayer-queue-min-ratio", "2"),
        *("--prefill-max-requests", "2", "--max-running-requests", "3", "--enable-metrics"),
    ),
}


@pytest.fixture(params=WAYS, scope="module")
def way(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Server]]:
    folder = tmp_path_factory.mktemp("ways")
    with serve(model_dir, folder / "log", (*FLAGS, *WAYS[request.param]), STRICT) as server:
        for running in checked(server):
            yield request.param, running


@pytest.mark.long
@pytest.mark.parametrize("budget", ["uniform", "adakv"])
def test_whoever_comes_back_into_the_queue_is_served_from_its_context(
    way: tuple[str, Server], model_dir: Path, budget: str
) -> None:
    name, server = way
    contexts = [document(model_dir, L, topic) for topic in ("exceptions", "class", "calls")]

    def request(which: int, max_new_tokens: int, **fields: Any) -> dict[str, Any]:
        return {
            "prompt": contexts[which] + question(model_dir, f"\n\nPoint {which}:"),
            "obcache": {"context_len": L, "budget": budget},
            "max_new_tokens": max_new_tokens,
            "sampling_params": {"ignore_eos": True},
            **fields,
        }

    def prioritized(priority: int) -> dict[str, Any]:
        return {"priority": priority} if name == "preemption" else {}

    flush(server)
    alone = [generate(server, **request(which, tokens))["output_ids"] for which, tokens in enumerate((60, 60, 8))]
    started = time.monotonic()

    def ask(which: int, tokens: int, priority: int) -> tuple[dict[str, Any], float]:
        return generate(server, **request(which, tokens, **prioritized(priority))), time.monotonic() - started

    with ThreadPoolExecutor(3) as pool:
        low = [pool.submit(ask, which, 60, 0) for which in (0, 1)]
        deadline = time.monotonic() + 60
        while server.get("/v1/loads")["loads"][0]["num_running_reqs"] < 2:
            assert time.monotonic() < deadline
        high = pool.submit(ask, 2, 8, 100)
        answers = [each.result() for each in (*low, high)]
    assert [answer["output_ids"] for answer, _ in answers] == alone
    assert [report(answer)["status"] for answer, _ in answers] == ["reused"] * 3
    if name == "preemption":  # both places were taken, and the last to come was answered first
        assert answers[2][1] < min(answers[0][1], answers[1][1])
    else:
        metrics = server.request("GET", "/metrics").text
        assert re.search(r'prefill_delayer_outcomes_total{.*output_reason="delay".*} [1-9]', metrics), "no prefill was delayed"
    (rank,) = server.get("/obcache/status")["ranks"]
    assert rank["counters"]["exact"].get("undecided", 0) == 0
