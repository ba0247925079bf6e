"""Mode auto under lasting pressure: nothing is marked, clients hang up, the cache is flushed, functions raise. No leak, no wrong answer, no hang."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from obcache_sglang.local_server import Server, serve
from obcache_sglang.scheduler.shared_prefixes import WIDELY
from tests.serving.client import document, flush, generate, question
from tests.serving.conftest import COMMON, STRICT, checked
from tests.serving.faulty import UNDER_PRESSURE, WHEN_CALM, Faults
from tests.serving.test_lifetimes import wait_for

pytestmark = pytest.mark.long

MODULE = "tests.serving.faulty"
L = 330
TOPICS = ("exceptions", "formatstrings", "calls", "numbers", "class", "debugger", "binary", "naming")
ASKED = ("\n\nIn short,", "\n\nThe first rule", "\n\nFor example")
RATIOS = (0.7, 0.85)
ANSWER_SECONDS = 120
REQUESTS = int(os.environ.get("OBCACHE_AUTO_SOAK_REQUESTS", "1000"))

FLAGS = (*COMMON, "--max-total-tokens", "1200", "--chunked-prefill-size", "256", "--max-running-requests", "6")
FLAGS += ("--obcache", "--obcache-mode", "auto", "--obcache-min-tokens", "128", "--obcache-gates", "smollm2-135m")
FLAGS += ("--obcache-compression-ratio", str(RATIOS[0]), "--obcache-ladder", str(RATIOS[1]))

Key = tuple[str, str]


@dataclass
class Known:
    """A server, and what each question about each document is answered without any pressure: by ratio, 0 for exactly."""

    server: Server
    prompts: dict[Key, list[int]]
    answers: dict[tuple[Key, float], list[int]]
    long_text: list[int]

    @classmethod
    def of(cls, server: Server, model_dir: Path, topics: tuple[str, ...] = TOPICS, system_tokens: int = 0) -> Known:
        """system_tokens: of the text that all documents stand behind, which stays exact."""
        prompts, answers = {}, {}
        system = document(model_dir, system_tokens, "customization")
        exact, boundary = (number // 64 * 64 for number in (system_tokens, system_tokens + L))
        behind = {"boundaries": [exact], "exact_segments": 1} if exact else {}
        for topic in topics:
            text = system + document(model_dir, L, topic)
            for asked in ASKED:
                prompts[topic, asked] = text + question(model_dir, asked)
                exact = generate(server, prompts[topic, asked], obcache=False, max_new_tokens=8)
                answers[(topic, asked), 0.0] = exact["output_ids"]
            for ratio in RATIOS:
                flush(server)
                server.post("/obcache/compress", {"input_ids": text[:boundary], "compression_ratio": ratio, **behind})
                for asked in ASKED:
                    answer = generate(server, prompts[topic, asked], obcache={"compression_ratio": ratio}, max_new_tokens=8)
                    found = answer["meta_info"]["obcache"]
                    assert (found["status"], found["compression_ratio"], found["context_tokens"]) == ("reused", ratio, boundary)
                    answers[(topic, asked), ratio] = answer["output_ids"]
        flush(server)
        for asked in ASKED[:2] if system else ():  # the server learns what all stand behind
            for topic in topics[:WIDELY]:
                generate(server, prompts[topic, asked])
        flush(server)
        return cls(server, prompts, answers, document(model_dir, 700, "typesseq"))

    def send(self, key: Key, **fields: Any) -> requests.Response:
        body = {"input_ids": self.prompts[key], "sampling_params": {"temperature": 0, "max_new_tokens": 8}, **fields}
        return self.server.request("POST", "/generate", json=body, timeout=ANSWER_SECONDS)

    def problem(self, key: Key, response: requests.Response) -> tuple[str, str | None]:
        """(how it was served, what is wrong with it)."""
        if response.status_code != 200:
            return "error", f"{key}: {response.status_code} {response.text}"
        answer = response.json()
        found = answer["meta_info"].get("obcache") or {"status": "exact", "reason": None}
        ratio = 0.0 if found["status"] == "exact" else found["compression_ratio"]
        right = self.answers[key, ratio] == answer["output_ids"]
        served = f"exact, {found['reason']}" if ratio == 0 else f"{found['status']} at {ratio}"
        undecided = found.get("reason") == "undecided"
        return served, None if right and not undecided else f"{key}: {found} {answer['output_ids']}"

    def check_is_empty(self) -> None:
        """Nothing is held by anybody."""
        assert self.server.process.poll() is None, self.server.log()[-4000:]
        wait_for(self.nothing_is_used, 30)

    def nothing_is_used(self) -> bool:
        flush(self.server)
        (load,) = self.server.get("/v1/loads")["loads"]
        return (load["num_used_tokens"], load["num_waiting_reqs"], load["num_running_reqs"]) == (0, 0, 0)


@pytest.mark.parametrize("system_tokens", [0, 400])
def test_soak(model_dir: Path, tmp_path: Path, system_tokens: int) -> None:
    """One request is retracted every 60 steps; the pool holds three of the eight documents."""
    env = {**STRICT, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "60"}
    with serve(model_dir, tmp_path / "log", FLAGS, env) as server:
        for _ in checked(server):
            soak(Known.of(server, model_dir, system_tokens=system_tokens))


def soak(known: Known) -> None:
    server, chosen = known.server, random.Random(23)
    keys = list(known.prompts)
    asked = [chosen.choice(keys) for _ in range(REQUESTS)]
    kinds = ("answered", "insists", "aborted", "hung up", "other text", "flush")
    fates = chosen.choices(kinds, (78, 5, 5, 5, 5, 2), k=REQUESTS)
    served: Counter[str] = Counter()

    def ask(index: int) -> str | None:
        """What is wrong with the answer."""
        key, fate = asked[index], fates[index]
        if fate == "flush":
            server.request("POST", "/flush_cache?timeout=5", timeout=ANSWER_SECONDS)
            return None
        if fate == "other text":
            body = {"input_ids": known.long_text[index % 50 :], "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
            assert server.request("POST", "/generate", json=body, timeout=ANSWER_SECONDS).status_code == 200
            return None
        if fate == "aborted":
            with ThreadPoolExecutor(1) as pool:
                future = pool.submit(known.send, key, rid=f"soak-{index}-")
                time.sleep(0.03 * (index % 20))
                server.request("POST", "/abort_request", json={"rid": f"soak-{index}-"})
                future.result()
            return None
        if fate == "hung up":
            body = {"input_ids": known.prompts[key], "sampling_params": {"max_new_tokens": 8}}
            with contextlib.suppress(requests.Timeout):
                server.request("POST", "/generate", json=body, timeout=0.05 * (1 + index % 20))
            return None
        params = {"temperature": 0, "max_new_tokens": 8}
        more = {"sampling_params": {**params, "custom_params": {"obcache": False}}} if fate == "insists" else {}
        how, problem = known.problem(key, known.send(key, **more))
        served[how] += 1
        if fate == "insists" and not how.startswith("exact"):
            return f"{key}: {how}, and exactly was wanted"
        return problem

    wrong = []
    with ThreadPoolExecutor(8) as pool:
        for index, each in enumerate(pool.map(ask, range(REQUESTS))):
            if index % 100 == 0:
                print(f"soak: {index} of {REQUESTS}, {dict(served)}", flush=True)
            if each is not None:
                wrong.append(each)
    assert not wrong, wrong[:20]
    assert sum(number for how, number in served.items() if how.startswith("reused")) > REQUESTS // 4, served
    assert server.get("/obcache/status")["counters"]["in_place"] > 10
    known.check_is_empty()


@pytest.fixture(scope="module")
def faulty(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Known, Faults]]:
    folder = tmp_path_factory.mktemp("faulty")
    faults = Faults(folder / "faults")
    with serve(model_dir, folder / "log", FLAGS, {**STRICT, **faults.env}, module=MODULE) as server:
        yield Known.of(server, model_dir, TOPICS[:5]), faults


@pytest.mark.parametrize(
    "name",
    [*UNDER_PRESSURE, "scheduler.in_place.InPlace.advance", "scheduler.in_place.InPlace.start"]
    + ["compress.compression.Compression.keep", "compress.compression.Compression.score"],
)
def test_a_defect_under_pressure_ends_nothing_and_changes_no_answer(faulty: tuple[Known, Faults], name: str) -> None:
    known, faults = faulty
    with faults.of(name):
        problems = ask_all(known)
        raised = name in faults.raised()
    assert raised, "was never called"
    assert not problems
    known.check_is_empty()
    assert not ask_all(known)
    known.check_is_empty()
    assert "leak" not in known.server.log() and "panicked" not in known.server.log()


def restored(server: Server) -> int:
    return int(server.get("/obcache/status")["counters"]["restored"])


def ask_under_pressure_and_after(known: Known, *, until: Callable[[], bool]) -> None:
    """A document is compressed for want of room and asked about again, then nobody waits. All answers are right."""
    flush(known.server)
    topics = sorted({topic for topic, _ in known.prompts})[:2]
    other = {"input_ids": known.long_text, "sampling_params": {"temperature": 0, "max_new_tokens": 2}}

    def ask(key: Key) -> None:
        _, problem = known.problem(key, known.send(key))
        assert problem is None

    for asked in ASKED[:2]:
        for topic in topics:
            ask((topic, asked))
    known.server.post("/generate", other)
    for asked in ASKED[:2]:  # the pool may have lost it: then the first has it compressed
        ask((topics[0], asked))
    wait_for(until)
    ask((topics[0], ASKED[2]))


@pytest.mark.parametrize("name", WHEN_CALM)
def test_a_defect_after_pressure_ends_nothing_and_changes_no_answer(faulty: tuple[Known, Faults], name: str) -> None:
    known, faults = faulty
    with faults.of(name):
        ask_under_pressure_and_after(known, until=lambda: name in faults.raised())
    known.check_is_empty()
    before = restored(known.server)
    ask_under_pressure_and_after(known, until=lambda: restored(known.server) > before)
    known.check_is_empty()


def ask_all(known: Known) -> list[str]:
    """Every question about every document, three documents' worth at a time, with other text between. What is wrong with the answers."""
    problems = []
    keys = sorted(known.prompts, key=lambda key: ASKED.index(key[1]))
    other = {"input_ids": known.long_text, "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    with ThreadPoolExecutor(4) as pool:
        for is_last in (False, True):
            for key, response in zip(keys, pool.map(known.send, keys), strict=True):
                _, problem = known.problem(key, response)
                if problem is not None:
                    problems.append(problem)
            if not is_last:
                assert known.server.request("POST", "/generate", json=other, timeout=ANSWER_SECONDS).status_code == 200
    return problems


RANKS = 3


@pytest.fixture(scope="module")
def faulty_ranks(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Known, Faults]]:
    folder = tmp_path_factory.mktemp("ranks")
    faults = Faults(folder / "faults")
    env = {**STRICT, **faults.env, "SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}
    with serve(model_dir, folder / "log", (*FLAGS, "--tp-size", str(RANKS)), env, module=MODULE) as server:
        yield Known.of(server, model_dir, TOPICS[:4]), faults


@pytest.mark.parametrize(
    "name",
    ["scheduler.pressure.UnderPressure._plan", "scheduler.context_cache.ContextCache.reserve"]
    + ["scheduler.tree.exact_slots", "compress.compression.Compression.keep", "compress.compression.Compression.score"],
)  # fmt: skip
def test_a_defect_of_one_rank_under_pressure_is_all_ranks_defect(faulty_ranks: tuple[Known, Faults], name: str) -> None:
    known, faults = faulty_ranks
    with faults.of(f"{name}@1"):
        problems = ask_all(known)
        raised = f"{name}@1" in faults.raised()
    assert raised, "was never called"
    assert not problems
    known.check_is_empty()
    assert not ask_all(known)
    assert known.server.get("/obcache/status")["counters"]["in_place"] > 0
    known.check_is_empty()


def test_ranks_read_a_context_exactly_again(faulty_ranks: tuple[Known, Faults]) -> None:
    known, faults = faulty_ranks
    name = "scheduler.pressure.UnderPressure.text_before@1"
    with faults.of(name):
        ask_under_pressure_and_after(known, until=lambda: name in faults.raised())
    before = restored(known.server)
    ask_under_pressure_and_after(known, until=lambda: restored(known.server) > before)
    known.check_is_empty()
