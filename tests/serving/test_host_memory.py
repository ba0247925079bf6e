"""Contexts in host memory, with SGLang's HiCache: evicted from a pool for three of them, they come back and answer as before. In float32."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server, serve
from tests.serving.client import NEW_TOKENS, QUESTIONS, compressions, document, flush, generate, question, report
from tests.serving.conftest import COMMON, STRICT, checked
from tests.serving.faulty import IN_HOST_MEMORY, Faults
from tests.serving.test_soak import TOPICS, body

L = 304
FLAGS = (
    *COMMON,
    "--chunked-prefill-size",
    "256",
    "--max-running-requests",
    "4",
    "--enable-metrics",
    "--enable-hierarchical-cache",
)
FLAGS += ("--obcache", "--obcache-min-tokens", "32", "--obcache-compression-ratio", "0.7", "--obcache-gates", "smollm2-135m")
WISHES: tuple[dict[str, Any], ...] = (
    {},
    {"method": "snapkv", "budget": "uniform"},
    {"method": "snapkv", "budget": "adakv"},
    {"method": "snapkv", "budget": "global"},
)
"""Budgets profile, uniform, adakv and global, by turns."""

Key = tuple[int, int]


class Asked:
    """Questions about contexts of one server. alone: the answers that fresh contexts gave, by context and question."""

    def __init__(self, server: Server, model_dir: Path, num_contexts: int) -> None:
        self.server, self.num_contexts = server, num_contexts
        self.other_text = document(model_dir, 560, "typesseq")
        self.contexts = [document(model_dir, L, topic) for topic in TOPICS[:num_contexts]]
        self.questions = [question(model_dir, text) for text in QUESTIONS[:2]]
        self.alone: dict[Key, list[int]] = {}
        self.ids: dict[int, str] = {}

    def request(self, key: Key) -> dict[str, Any]:
        context, which = key
        prompt = self.contexts[context] + self.questions[which]
        return {"prompt": prompt, "obcache": {"context_len": L, **WISHES[context % 4]}, "max_new_tokens": NEW_TOKENS}

    def ask(self, key: Key) -> dict[str, Any]:
        return generate(self.server, **self.request(key))

    def make(self) -> None:
        for context in range(self.num_contexts):
            for which in range(len(self.questions)):
                answer = self.ask((context, which))
                assert report(answer)["status"] == ("compressed" if which == 0 else "reused")
                self.alone[context, which] = answer["output_ids"]
                self.ids[context] = report(answer)["context_id"]

    def push_out(self) -> None:
        """Other text takes nearly all of the pool."""
        generate(self.server, self.other_text, obcache=False, max_new_tokens=2)

    def tiers(self) -> list[str | None]:
        return [each["tier"] for each in self.server.get("/obcache/contexts")["contexts"]]

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = self.server.get("/obcache/status")["counters"]
        return counters


def flags(policy: str, page_size: int, *more: str) -> tuple[str, ...]:
    # Host memory for 20 contexts and their questions. A context keeps 96 slots, and its compression takes 400 for a moment.
    pool = ("--max-total-tokens", "640", "--page-size", str(page_size), "--hicache-ratio", "4")
    return (*FLAGS, *pool, "--hicache-write-policy", policy, *more)


@pytest.fixture(
    scope="module",
    params=[("write_through", 1), pytest.param(("write_back", 16), marks=pytest.mark.long)],
    ids=["write_through", "write_back"],
)
def asked(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    with serve(model_dir, tmp_path_factory.mktemp("host") / "log", flags(*request.param), STRICT) as server:
        made = Asked(server, model_dir, 6)
        made.make()
        for _ in checked(server):
            yield made


def test_contexts_come_back_and_are_not_compressed_again(asked: Asked) -> None:
    before = compressions(asked.server)
    asked.push_out()
    assert asked.tiers().count("host") >= 3
    tiers = []
    for context in range(asked.num_contexts):
        answer = asked.ask((context, 0))
        told = report(answer)
        tiers.append(told["tier"])
        assert (told["status"], answer["meta_info"]["cached_tokens"]) == ("reused", L)
        assert answer["output_ids"] == asked.alone[context, 0]
    assert tiers.count("host") >= 3
    assert report(asked.ask((asked.num_contexts - 1, 0)))["tier"] == "device"
    assert compressions(asked.server) == before == asked.num_contexts
    counters = asked.counters()
    assert counters["host_loads"] >= 3 and counters["host_load_seconds"] > 0
    assert counters["host_slots_loaded"] == counters["host_loads"] * told["kept_tokens"]
    assert asked.counters()["host_contexts"] == asked.tiers().count("host")
    assert "sglang:obcache_host_loads_total" in asked.server.request("GET", "/metrics").text


def test_together_and_aborted_meanwhile(asked: Asked) -> None:
    soak(asked, 40, seed=3)


def soak(asked: Asked, num_requests: int, seed: int) -> None:
    """Random questions by eight clients, each tenth aborted at some time. No context is compressed again."""
    before, chosen = compressions(asked.server), random.Random(seed)
    keys = [(chosen.randrange(asked.num_contexts), chosen.randrange(2)) for _ in range(num_requests)]
    aborted = set(chosen.sample(range(num_requests), num_requests // 10))

    def ask(index: int) -> dict[str, Any] | None:
        if index not in aborted:
            return asked.ask(keys[index])
        with ThreadPoolExecutor(1) as pool:
            rid = f"host-{seed}-{index}-"
            future = pool.submit(asked.server.request, "POST", "/generate", json=body(asked.request(keys[index]), rid))
            time.sleep(0.02 * (index % 20))
            assert asked.server.request("POST", "/abort_request", json={"rid": rid}).status_code == 200
            future.result()
        return None

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(num_requests)))
    done = [(key, answer) for key, answer in zip(keys, answers, strict=True) if answer is not None]
    assert {report(answer)["status"] for _, answer in done} == {"reused"}
    assert [key for key, answer in done if answer["output_ids"] != asked.alone[key]] == []
    assert compressions(asked.server) == before


def test_what_is_deleted_there_does_not_come_back(asked: Asked) -> None:
    asked.push_out()
    paths = [f"/obcache/contexts/{each}" for each in asked.ids.values()]
    path = next(each for each in paths if asked.server.get(each)["tier"] == "host")
    found = asked.server.get(path)
    assert (found["state"], found["slots"]) == ("host", 0)
    assert asked.server.request("POST", f"/obcache/contexts/{found['name']}/save").status_code == 400, "there is no folder"
    assert asked.server.request("DELETE", path).status_code == 200
    assert asked.server.request("GET", path).status_code == 404
    before = compressions(asked.server)
    statuses = [report(asked.ask((context, 0)))["status"] for context in range(asked.num_contexts)]
    assert (statuses.count("compressed"), compressions(asked.server)) == (1, before + 1)


def test_after_a_flush_nothing_comes_back(asked: Asked) -> None:
    flush(asked.server)
    assert asked.tiers() == []
    answer = asked.ask((0, 0))
    assert (report(answer)["status"], answer["output_ids"]) == ("compressed", asked.alone[0, 0])


@pytest.fixture(scope="module")
def faulty(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Asked, Faults, dict[Key, list[int]]]]:
    """With the answers that the exact cache gives, by context and question."""
    folder = tmp_path_factory.mktemp("faulty")
    faults = Faults(folder / "faults")
    with serve(
        model_dir, folder / "log", flags("write_back", 1), {**STRICT, **faults.env}, module="tests.serving.faulty"
    ) as server:
        asked = Asked(server, model_dir, 8)
        keys = [(context, which) for context in range(8) for which in range(2)]
        exact = {key: generate(server, **{**asked.request(key), "obcache": False})["output_ids"] for key in keys}
        flush(server)
        asked.make()
        yield asked, faults, exact
        log = server.log()
        assert "leak" not in log and "panicked" not in log, log[-4000:]


@pytest.mark.long
@pytest.mark.parametrize("name", IN_HOST_MEMORY)
def test_a_defect_ends_nothing_and_changes_no_answer(faulty: tuple[Asked, Faults, dict[Key, list[int]]], name: str) -> None:
    asked, faults, exact = faulty
    keys = [(context, which) for which in range(2) for context in range(asked.num_contexts)]
    for names in ((name,), ()):
        with faults.of(*names), ThreadPoolExecutor(3) as pool:
            for key, answer in zip(keys, pool.map(asked.ask, keys), strict=True):
                wanted = exact[key] if report(answer)["status"] == "exact" else asked.alone[key]
                assert answer["output_ids"] == wanted, (key, report(answer))
                assert names or report(answer)["status"] != "exact"
            raised = set(faults.raised())
        assert raised == set(names)


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [(), ("--tp-size", "3"), ("--disable-overlap-schedule",)], ids=["one", "three_ranks", "no_overlap"]
)
@pytest.mark.parametrize("setting", [("write_through", 16), ("write_back", 1)], ids=["write_through", "write_back"])
def test_a_pool_for_three_of_twelve(model_dir: Path, tmp_path: Path, setting: tuple[str, int], more: tuple[str, ...]) -> None:
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"} if "--tp-size" in more else {}
    env = {**STRICT, **cores, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "60"}
    with serve(model_dir, tmp_path / "log", flags(*setting, *more), env) as server:
        for _ in checked(server):
            asked = Asked(server, model_dir, 12)
            asked.make()
            soak(asked, 300, seed=7)
            assert asked.counters()["host_loads"] > 30
