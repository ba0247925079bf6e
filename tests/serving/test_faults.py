"""A defect of ours never ends the server and never changes an answer: every function that SGLang's hooks call raises, one after the other.

On live servers (`tests/serving/faulty.py`), during marked questions beside ordinary ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from obcache_sglang.local_server import Server, serve
from tests.serving.client import MARKER, document, flush, generate, question
from tests.serving.conftest import COMMON, STRICT
from tests.serving.faulty import FAULTY, Faults
from tests.serving.test_lifetimes import wait_for

MODULE = "tests.serving.faulty"
L = 96
FLAGS = ("--max-total-tokens", "3000", "--chunked-prefill-size", "64", "--obcache", "--obcache-min-tokens", "32")
ANSWER_SECONDS = 60
RANKS = 3

Asked = dict[str, Any]
"""Arguments of `generate`."""


@dataclass
class Faulty:
    """A running server with its faults, and what all of `asked` are answered without any: exactly, and compressed."""

    server: Server
    faults: Faults
    asked: dict[str, Asked]
    exact: dict[str, list[int]]
    compressed: dict[str, list[int]]
    context_ids: dict[str, str]

    @classmethod
    def on(cls, server: Server, faults: Faults, model_dir: Path, wishes: dict[str, Any]) -> Faulty:
        """wishes: of the marked questions, by name."""
        asked: dict[str, Asked] = {}
        for number, (name, wish) in enumerate(wishes.items()):
            text = document(model_dir, 200 + L, "class")[20 * number : 20 * number + L]
            asked[name] = {
                "prompt": text + question(model_dir, "\n\nIn short,"),
                "obcache": {"context_len": L, **wish},
                "max_new_tokens": 5,
            }
        for number in range(2):
            prompt = document(model_dir, 60 + 50 * number, "exceptions")
            asked[f"ordinary {number}"] = {"prompt": prompt, "obcache": False, "max_new_tokens": 12}
        exact = {name: generate(server, **{**each, "obcache": False})["output_ids"] for name, each in asked.items()}
        answers = {name: generate(server, **each) for name, each in asked.items()}
        marked = {name: answers[name]["meta_info"]["obcache"] for name in wishes}
        assert {each["status"] for each in marked.values()} == {"compressed"}
        flush(server)
        return cls(
            server, faults, asked, exact, {name: answer["output_ids"] for name, answer in answers.items()},
            {name: each["context_id"] for name, each in marked.items()},
        )  # fmt: skip

    def ask_all(self, turns: int = 2, disturbed: bool = False) -> dict[str, requests.Response]:
        """All at once; nothing hangs."""
        named = [(f"{name} {turn}", each) for turn in range(turns) for name, each in self.asked.items()]
        with ThreadPoolExecutor(len(named) + 1) as pool:
            disturbance = pool.submit(self.disturb) if disturbed else None
            answers = list(pool.map(lambda each: self.send(**each[1]), named))
            if disturbance is not None:
                disturbance.result()
        return {name: answer for (name, _), answer in zip(named, answers, strict=True)}

    def send(self, prompt: list[int], obcache: Any, max_new_tokens: int = 5, **fields: Any) -> requests.Response:
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, "custom_params": {"obcache": obcache}}
        body = {"input_ids": prompt, "sampling_params": params, **fields}
        return self.server.request("POST", "/generate", json=body, timeout=ANSWER_SECONDS)

    def check_answers(self, answers: dict[str, requests.Response]) -> None:
        """Ordinary ones are what they always are; marked ones too, read exactly or compressed, as they say, or an error."""
        for name, response in answers.items():
            asked = name.rpartition(" ")[0]
            if response.status_code != 200:
                assert not asked.startswith("ordinary"), f"{name}: {response.status_code} {response.text}"
                assert response.status_code >= 400
                continue
            answer = response.json()
            report = answer["meta_info"].get("obcache") or {"status": "exact"}
            wanted = self.exact if report["status"] == "exact" else self.compressed
            assert answer["output_ids"] == wanted[asked], (name, report)
            assert answer["meta_info"]["prompt_tokens"] == len(self.asked[asked]["prompt"]) or report["status"] != "exact"

    def disturb(self) -> None:
        """What else calls us: contexts are listed, asked for by id, compressed ahead, pinned, deleted, aborted. Only answers are wanted."""
        identity = next(iter(self.context_ids.values()))
        first = next(iter(self.asked.values()))["prompt"]
        calls: list[tuple[str, str, Any]] = [
            ("GET", "/obcache/contexts", None),
            ("GET", f"/obcache/contexts/{identity}", None),
            ("POST", "/obcache/compress", {"input_ids": first[: L - 20], "pin": True, "ttl_seconds": 5}),
            ("DELETE", f"/obcache/contexts/{identity}?wait_seconds=1", None),
            ("POST", "/flush_cache?timeout=5", None),
        ]
        self.abort_one()
        for method, path, body in calls:
            answer = self.server.request(method, path, json=body, timeout=ANSWER_SECONDS)
            if path == "/obcache/compress" and answer.status_code == 200 and answer.json().get("context_id"):
                # Nobody reads this one: it is freed at once.
                self.server.request("DELETE", f"/obcache/contexts/{answer.json()['context_id']}", timeout=ANSWER_SECONDS)
        params = {"max_new_tokens": 4, "custom_params": {"obcache": {"context_id": identity}}}
        body = {"text": f"{MARKER}\n\nSo", "sampling_params": params}
        self.server.request("POST", "/generate", json=body, timeout=ANSWER_SECONDS)

    def abort_one(self) -> None:
        """SGLang's scheduler hears of aborts of requests that it has: one that decodes for long is aborted."""
        params = {"max_new_tokens": 400, "ignore_eos": True}
        body = {"text": "The", "sampling_params": params, "rid": "to-be-aborted", "stream": True}
        with self.server.request("POST", "/generate", json=body, timeout=ANSWER_SECONDS, stream=True) as answer:
            next(answer.iter_lines(), None)
            self.server.request("POST", "/abort_request", json={"rid": "to-be-aborted"}, timeout=ANSWER_SECONDS)

    def nothing_is_locked(self) -> bool:
        """Whether no slots are in use but those of pinned contexts."""
        (load,) = self.server.get("/v1/loads")["loads"]
        (rank,) = self.server.get("/obcache/status")["ranks"]
        return bool(load["num_used_tokens"] == rank["pool"]["pinned_slots"])

    def check_works_again(self) -> None:
        """Nothing is held by anybody, and compression works."""
        assert self.server.process.poll() is None, self.server.log()[-4000:]
        # Answers are sent before the last slots are given back.
        wait_for(self.nothing_is_locked, 30)
        flush(self.server)
        (load,) = self.server.get("/v1/loads")["loads"]
        assert (load["num_used_tokens"], load["num_waiting_reqs"], load["num_running_reqs"]) == (0, 0, 0), load
        answers = self.ask_all(turns=1)
        self.check_answers(answers)
        reports = {name: answers[f"{name} 0"].json()["meta_info"]["obcache"] for name in self.context_ids}
        assert {each["status"] for each in reports.values()} == {"compressed"}, reports
        flush(self.server)
        assert not re.findall(r"leak|panicked", self.server.log())


WISHES: dict[str, Any] = {
    "snapkv": {"method": "snapkv", "budget": "adakv"},
    "replay": {"method": "replay", "replay_chunk": 50, "budget": "global"},
    "tova": {"method": "tova", "pin": True, "ttl_seconds": 30},
    "gate": {"method": "gate", "budget": "profile"},
}


class Restarting:
    """A server that is started again after a defect has ended it, so that one such is one failure."""

    def __init__(self, model_dir: Path, folder: Path) -> None:
        self.model_dir, self.folder, self.starts = model_dir, folder, 0
        self.running = ExitStack()
        self.faulty: Faulty | None = None

    def get(self) -> Faulty:
        if self.faulty is None or self.faulty.server.process.poll() is not None:
            self.running.close()
            self.starts += 1
            faults = Faults(self.folder / f"faults{self.starts}")
            # Retracts now and then, so that a job or a question starts over.
            env = {**STRICT, **faults.env, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "13"}
            log_file = self.folder / f"log{self.starts}"
            flags = (*COMMON, *FLAGS, "--obcache-gates", "auto")
            server = self.running.enter_context(serve(self.model_dir, log_file, flags, env, module=MODULE))
            self.faulty = Faulty.on(server, faults, self.model_dir, WISHES)
        return self.faulty


@pytest.fixture(scope="module")
def restarting(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarting]:
    restarting = Restarting(model_dir, tmp_path_factory.mktemp("faulty"))
    with restarting.running:
        yield restarting


BESIDE = {
    "scheduler.jobs.Jobs.discard": "compress.compression.Compression.keep",
    "scheduler.context_cache.ContextCache.withdraw": "compress.compression.Compression.keep",
}
"""What is called only after another defect, and which."""


USUAL = ("schedule",)
"""Faults of every run; the others take twenty-five minutes more."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.rpartition(".")[2] in USUAL else pytest.mark.long) for name in FAULTY]
)
def test_a_defect_ends_nothing_and_changes_no_answer(restarting: Restarting, name: str) -> None:
    faulty = restarting.get()
    with faulty.faults.of(name, *([BESIDE[name]] if name in BESIDE else ())):
        answers = faulty.ask_all(disturbed=True)
        raised = name in faulty.faults.raised()
    assert faulty.server.process.poll() is None, faulty.server.log()[-4000:]
    faulty.check_answers(answers)
    assert raised, "was never called"
    faulty.check_works_again()


@pytest.fixture(scope="module")
def faulty_ranks(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("ranks")
    faults = Faults(folder / "faults")
    env = {**STRICT, **faults.env, "SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}
    flags = (*COMMON, *FLAGS, "--tp-size", str(RANKS), "--obcache-gates", "auto")
    wishes = {"tova": {"method": "tova"}, "replay": WISHES["replay"], "gate": {"method": "gate", "budget": "profile"}} | {
        budget: {"method": "snapkv", "budget": budget} for budget in ("uniform", "adakv", "global", "profile")
    }
    with serve(model_dir, folder / "log", flags, env, module=MODULE) as server:
        yield Faulty.on(server, faults, model_dir, wishes)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "compress.compression.Compression.score",
        "compress.compression.Compression.keep",
        "scheduler.forward.ForwardPlan._plan",
        "scheduler.forward.ForwardPlan._scoring_rows",
        "scheduler.context_cache.ContextCache.reserve",
    ],
)
def test_a_defect_of_one_rank_is_all_ranks_defect(faulty_ranks: Faulty, name: str) -> None:
    """The contexts are served exactly by all ranks, or not at all, and the next ones are compressed."""
    faults, server = faulty_ranks.faults, faulty_ranks.server
    with faults.of(f"{name}@1"):
        answers = faulty_ranks.ask_all()
        assert f"{name}@1" in faults.raised()
    assert server.process.poll() is None, server.log()[-4000:]
    faulty_ranks.check_answers(answers)
    # Method gate goes on from the exact KV that its first, exact answer has left in the cache.
    others = [answer for each, answer in answers.items() if not each.startswith(("ordinary", "gate"))]
    marked = [answer.json()["meta_info"]["obcache"] for answer in others]
    assert {each["status"] for each in marked} == {"exact"}
    faulty_ranks.check_works_again()
