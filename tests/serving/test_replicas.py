"""Two replicas in mode auto after SGLang's router, with the settings of launch/deploy: one replica compresses each document, and a replica
that drains or dies costs no answer and no document."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import requests

from obcache_sglang.frontend.breakpoints import header
from obcache_sglang.local_server import Server, serve
from tests.serving.client import document, flush, generate, report, tokenizer
from tests.serving.conftest import COMMON, STRICT, checked, deployed_router_flags, routed
from tests.serving.test_lifetimes import wait_for

pytestmark = pytest.mark.long

L = 200
BOUNDARY = L // 64 * 64
TOPICS = ("assignment", "binary", "calls", "class", "exprlists", "customization")
ASKED = ("\n\nIn short, this means that", "\n\nFor example,")
NEW_TOKENS = 8
# Of six documents one replica gets three or more, and its pool holds two.
FLAGS = ("--max-total-tokens", "620", "--obcache", "--obcache-mode", "auto", "--obcache-min-tokens", "128")
FLAGS += ("--enable-metrics", "--obcache-gates", "smollm2-135m", "--obcache-compression-ratio", "0.7")


@dataclass
class Replicas:
    """wanted: by (reads the compressed context, topic, number of the question), what one replica by itself answers."""

    router: Server
    replicas: list[Server]
    model_dir: Path
    start: Callable[[], Server]
    wanted: dict[tuple[bool, str, int], list[int]] = field(default_factory=dict)

    def text(self, topic: str) -> str:
        return f"About {topic}. " + tokenizer(self.model_dir).decode(document(self.model_dir, L, topic))

    def learn(self, replica: Server) -> None:
        """Fills `wanted`, and leaves the replica's cache empty."""
        for topic in TOPICS:
            for number, asked in enumerate(ASKED):
                answer = generate(replica, self.text(topic) + asked, obcache=False, **PARAMS)
                self.wanted[False, topic, number] = answer["output_ids"]
            flush(replica)
            tokens = tokenizer(self.model_dir)(self.text(topic))["input_ids"]
            replica.post("/obcache/compress", {"input_ids": tokens[:BOUNDARY]})
            for number, asked in enumerate(ASKED):
                answer = generate(replica, self.text(topic) + asked, **PARAMS)
                assert report(answer)["status"] == "reused"
                self.wanted[True, topic, number] = answer["output_ids"]
            flush(replica)

    def ask(self, topic: str, number: int, *, stream: bool = False) -> tuple[requests.Response, dict[str, Any]]:
        """The response of the router and the whole answer, which has the document in it and is what it should be."""
        prompt = self.text(topic) + ASKED[number]
        body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}}
        if stream:
            response, answer = streamed(self.router, body)
        else:
            response = self.router.request("POST", "/generate", json=body)
            assert response.status_code == 200, response.text
            answer = response.json()
        assert answer["meta_info"]["prompt_tokens"] == len(tokenizer(self.model_dir)(prompt)["input_ids"])
        assert report(answer)["context_tokens"] in (0, BOUNDARY)
        assert answer["output_ids"] == self.wanted[report(answer)["status"] != "exact", topic, number]
        return response, answer

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the router thinks of each replica, by URL."""
        return {each["url"]: each for each in self.router.get("/workers")["workers"]}

    def join(self, replica: Server) -> None:
        """The router gets one more replica."""
        response = self.router.request("POST", "/workers", json={"url": replica.url})
        assert response.status_code == 202, response.text
        wait_for(lambda: self.workers().get(replica.url, {}).get("is_healthy"), 60)

    @contextmanager
    def asking(self, *, plain: int, streams: int = 0) -> Iterator[list[str]]:
        """Clients that ask one question after another until the block ends, and after it all must have had right answers. Yields what they asked."""
        done: list[str] = []
        failed: list[Exception] = []
        stop = threading.Event()

        def client(first: int) -> None:
            for turn in count(first, 5):  # not in the order of the other clients
                if stop.is_set():
                    return
                topic = TOPICS[turn % len(TOPICS)]
                try:
                    self.ask(topic, turn // len(TOPICS) % len(ASKED), stream=first >= plain)
                except (AssertionError, requests.RequestException, RuntimeError) as error:
                    failed.append(error)
                done.append(topic)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(plain + streams)]
        for thread in threads:
            thread.start()
        try:
            yield done
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failed == []


PARAMS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "sampling_params": {"ignore_eos": True}}


def streamed(server: Server, body: dict[str, Any]) -> tuple[requests.Response, dict[str, Any]]:
    """The response and the last event, which says why the stream ended."""
    response = server.request("POST", "/generate", json={**body, "stream": True}, stream=True)
    assert response.status_code == 200, response.text
    lines = [line for line in response.iter_lines() if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]", lines
    answer = json.loads(lines[-2].removeprefix(b"data: "))
    assert answer["meta_info"]["finish_reason"]["type"] == "length", answer
    return response, answer


@pytest.fixture(scope="module")
def behind(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        numbers = count()

        def start() -> Server:
            return stack.enter_context(serve(model_dir, folder / f"replica{next(numbers)}", (*COMMON, *FLAGS), STRICT))

        replicas = [start(), start()]
        router = stack.enter_context(routed(replicas, folder, deployed_router_flags()))
        made = Replicas(router, replicas, model_dir, start)
        made.learn(replicas[0])
        yield made
        for each in made.replicas:  # without those that tests ended
            for _ in checked(each):
                pass


def answered(replica: Server) -> int:
    """How many questions the replica has answered so far."""
    counters = replica.get("/obcache/status")["counters"]
    return counters["compressions"] + counters["reuses"] + sum(counters["exact"].values())


def more(done: list[str], number: int) -> None:
    """Waits until clients have had so many answers more."""
    until = len(done) + number
    wait_for(lambda: len(done) >= until, 240)


def test_each_unmarked_document_is_compressed_by_one_replica(behind: Replicas) -> None:
    ids = defaultdict(set)
    for turn, topics in enumerate((TOPICS, TOPICS[::-1], TOPICS)):  # not in an order that taking turns would get right
        for topic in topics:
            response, answer = behind.ask(topic, turn % len(ASKED))
            assert response.headers["X-Obcache"] == header(report(answer)), "the router leaves the header in place"
            assert turn == 0 or report(answer)["reason"] != "no_context", "the replica has seen this document before"
            if report(answer)["status"] != "exact":
                ids[topic].add(report(answer)["context_id"])
    assert ids
    for found in ids.values():
        (identity,) = found  # the other replica's would be another one
        seen = [each.request("GET", f"/obcache/contexts/{identity}").status_code for each in behind.replicas]
        assert sorted(seen) == [200, 404]


def test_a_stream_says_in_its_header_what_its_last_event_says(behind: Replicas) -> None:
    response, answer = behind.ask(TOPICS[0], 1, stream=True)
    assert response.headers["X-Obcache"] == header(report(answer))


def test_the_router_joins_the_metrics_of_replicas(behind: Replicas) -> None:
    joined = behind.router.request("GET", "/engine_metrics").text
    shown = re.findall(r'^sglang_obcache_waiting_requests\{.*worker_addr="([^"]+)"', joined, flags=re.MULTILINE)
    assert sorted(shown) == sorted(each.url for each in behind.replicas), joined[:300]


def test_a_replica_that_is_taken_out_of_the_router_answers_what_it_has_begun(behind: Replicas) -> None:
    with behind.asking(plain=2, streams=2) as done:
        more(done, 4)
        wait_for(lambda: any(each["load"] for each in behind.workers().values()))
        leaving = max(behind.workers().values(), key=lambda each: each["load"])
        response = behind.router.request("DELETE", f"/workers/{leaving['id']}")
        assert response.status_code == 202, response.text
        wait_for(lambda: leaving["url"] not in behind.workers())
        more(done, 8)
    (replica,) = [each for each in behind.replicas if each.url == leaving["url"]]
    before = answered(replica)
    for topic in TOPICS:
        behind.ask(topic, 0)
    assert answered(replica) == before, "nobody asks it any more"
    behind.join(replica)


def test_a_replica_that_is_terminated_answers_what_it_has_begun(behind: Replicas) -> None:
    leaving = behind.replicas.pop(0)
    with behind.asking(plain=2, streams=2) as done:
        more(done, 4)
        leaving.process.send_signal(signal.SIGTERM)
        more(done, 8)
        assert leaving.process.wait(120) == 0
        more(done, 4)
    assert not behind.workers()[leaving.url]["is_healthy"]
    behind.replicas.append(behind.start())
    behind.join(behind.replicas[-1])


def test_a_replica_that_is_killed_costs_no_answer(behind: Replicas) -> None:
    for topic in TOPICS:
        behind.ask(topic, 0)
    busiest = max(behind.replicas, key=answered)
    with behind.asking(plain=4) as done:
        more(done, 2)
        wait_for(lambda: behind.workers()[busiest.url]["load"] > 0)
        os.killpg(busiest.process.pid, signal.SIGKILL)
        behind.replicas.remove(busiest)
        for topic in TOPICS[:4]:  # it had three documents or more
            behind.ask(topic, 0, stream=True)
        more(done, 12)
        wait_for(lambda: not behind.workers()[busiest.url]["is_healthy"])
    for number in range(2):
        for topic in TOPICS:
            behind.ask(topic, number)


def test_a_stream_that_had_begun_on_a_killed_replica_does_not_look_finished(behind: Replicas) -> None:
    """The last test of this module: no replica is left."""
    (replica,) = behind.replicas
    body = {
        "text": behind.text(TOPICS[0]) + ASKED[0],
        "stream": True,
        "sampling_params": {"max_new_tokens": 300, "ignore_eos": True},
    }
    response = behind.router.request("POST", "/generate", json=body, stream=True)
    assert response.status_code == 200
    lines = response.iter_lines()
    assert next(lines).startswith(b"data: {")
    os.killpg(replica.process.pid, signal.SIGKILL)
    behind.replicas.clear()
    with pytest.raises(requests.RequestException):
        assert b"data: [DONE]" not in list(lines)
