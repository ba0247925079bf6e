"""Two replicas after SGLang's own router (`sglang-router`, policy cache_aware): one reads each document, and no answer misses its document."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server, serve
from tests.serving.client import MARKER, QUESTIONS, compressions, document, flush, generate, report, tokenizer
from tests.serving.conftest import COMMON, STRICT, checked, routed
from tests.serving.test_lifetimes import wait_for

pytestmark = pytest.mark.long

L = 160
TOPICS = ("assignment", "exceptions", "formatstrings", "class")
FLAGS = ("--max-total-tokens", "6000", "--obcache", "--obcache-min-tokens", "32", "--obcache-compression-ratio", "0.5")


@dataclass
class Replicas:
    router: Server
    replicas: list[Server]

    def compressions(self) -> list[int]:
        return [compressions(each) for each in self.replicas]


@pytest.fixture(scope="module")
def behind(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("router")
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(serve(model_dir, folder / f"replica{number}", (*COMMON, *FLAGS), STRICT)) for number in range(2)
        ]
        # Without the retries of launch/deploy. A replica that has ended is found out by the first request or by this check.
        flags = ("--policy", "cache_aware", "--disable-circuit-breaker", "--health-check-interval-secs", "2")
        router = stack.enter_context(routed(replicas, folder, flags))
        yield Replicas(router, replicas)
        for each in replicas[1:]:  # a test ends the first one
            for _ in checked(each):
                pass


def texts(model_dir: Path) -> list[str]:
    words = tokenizer(model_dir)
    return [words.decode(document(model_dir, L, topic)) for topic in TOPICS]


def test_each_document_is_compressed_by_one_replica(behind: Replicas, model_dir: Path) -> None:
    before = behind.compressions()
    for text in texts(model_dir):
        reports = [report(generate(behind.router, text + MARKER + asked)) for asked in QUESTIONS]
        assert [each["status"] for each in reports] == ["compressed", "reused", "reused"]
        assert len({each["context_id"] for each in reports}) == 1
    after = behind.compressions()
    assert sum(after) - sum(before) == len(TOPICS)


def test_answers_are_those_of_a_replica_that_is_asked_itself(behind: Replicas, model_dir: Path) -> None:
    text = texts(model_dir)[0]
    for asked in QUESTIONS:
        answers = [generate(each, text + MARKER + asked)["output_ids"] for each in (behind.router, *behind.replicas)]
        assert answers[0] == answers[1] == answers[2]


def completion(text: str) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "default", "prompt": text, "max_tokens": 4, "temperature": 0}


def chat(text: str) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {
        "model": "default",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 4,
        "temperature": 0,
    }


def native(text: str) -> tuple[str, dict[str, Any]]:
    return "/generate", {"text": text, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}


@pytest.mark.parametrize("endpoint", [completion, chat])
def test_openai_endpoints_go_through(behind: Replicas, model_dir: Path, endpoint: Any) -> None:
    text = texts(model_dir)[1]
    answers = [behind.router.post(*endpoint(text + MARKER + asked)) for asked in QUESTIONS]
    statuses = [each["metadata"]["obcache"]["status"] for each in answers]
    assert set(statuses) <= {"compressed", "reused"}
    assert statuses[1:] == ["reused", "reused"]


def test_an_answer_of_no_tokens_compresses_ahead(behind: Replicas, model_dir: Path) -> None:
    """`/obcache/compress` is not routed. This goes where the questions will go."""
    for each in behind.replicas:
        flush(each)
    text = texts(model_dir)[3]
    ahead = generate(behind.router, text + MARKER + QUESTIONS[0], max_new_tokens=0)
    assert (ahead["output_ids"], report(ahead)["status"]) == ([], "compressed")
    answers = [generate(behind.router, text + MARKER + asked) for asked in QUESTIONS]
    assert [report(answer)["status"] for answer in answers] == ["reused"] * 3
    assert {report(answer)["context_id"] for answer in answers} == {report(ahead)["context_id"]}


@pytest.mark.parametrize(
    ("endpoint", "passed_on"),
    [(completion, {"cache_salt", "extra_key"}), (chat, set()), (native, {"extra_key"})],
)
def test_which_namespaces_reach_a_replica(behind: Replicas, model_dir: Path, endpoint: Any, passed_on: set[str]) -> None:
    """What a router drops does not separate tenants."""

    def context_id(**fields: str) -> str:
        path, body = endpoint(texts(model_dir)[0] + MARKER + QUESTIONS[0])
        answer = behind.router.post(path, {**body, **fields})
        meta = answer["meta_info"] if path == "/generate" else answer["metadata"]
        return meta["obcache"]["context_id"]

    shared = context_id()
    assert {name for name in ("cache_salt", "extra_key") if context_id(**{name: "tenant"}) != shared} == passed_on


def test_breakpoints_do_not_reach_a_replica(behind: Replicas, model_dir: Path) -> None:
    parts = [
        {"type": "text", "text": texts(model_dir)[1], "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": QUESTIONS[0]},
    ]
    body = {"model": "default", "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    itself, through = (each.request("POST", "/v1/chat/completions", json=body) for each in (behind.replicas[0], behind.router))
    assert itself.status_code == through.status_code == 200
    assert "X-Obcache" in itself.headers
    assert "X-Obcache" not in through.headers


def test_what_is_not_routed(behind: Replicas) -> None:
    model = behind.router.get("/v1/models")["data"][0]["id"]
    response = {"model": model, "input": "One, two, three,", "max_output_tokens": 4}
    for path, body, status in (
        ("/v1/messages", {"model": model, "messages": [{"role": "user", "content": "One, two,"}], "max_tokens": 4}, 404),
        ("/obcache/compress", {"text": "One, two, three,"}, 404),
        ("/generate", {"text": ["One, two,", "Three, four,"]}, 422),
        ("/v1/responses", response, 400),
        ("/v1/responses", {**response, "stream": False}, 200),
    ):
        answer = behind.router.request("POST", path, json=body)
        assert answer.status_code == status, (path, answer.text)


@pytest.mark.parametrize("endpoint", [completion, chat, native])
def test_options_in_the_marker_go_through(behind: Replicas, model_dir: Path, endpoint: Any) -> None:
    """The router drops `custom_params` of chat and of /generate."""
    path, body = endpoint(texts(model_dir)[3] + "<|obcache:ratio=0.25|>" + QUESTIONS[0])
    answer = behind.router.post(path, body)
    assert (answer["meta_info"] if path == "/generate" else answer["metadata"])["obcache"]["compression_ratio"] == 0.25


@pytest.mark.parametrize("endpoint", [completion, chat, native])
def test_a_context_id_gives_its_document_or_an_error(behind: Replicas, model_dir: Path, endpoint: Any) -> None:
    """The router drops `custom_params` of chat and of /generate: what is left is a marker without a document."""
    text = texts(model_dir)[2]
    for each in behind.replicas:
        flush(each)
    identity = behind.replicas[0].post("/obcache/compress", {"text": text})["id"]
    path, body = endpoint(MARKER + QUESTIONS[0])
    wish = {"custom_params": {"obcache": {"context_id": identity}}}
    nested = {"sampling_params": {**body["sampling_params"], **wish}} if path == "/generate" else wish
    for _ in range(4):
        answer = behind.router.request("POST", path, json={**body, **nested})
        if answer.status_code == 200:
            meta = answer.json()["meta_info"] if path == "/generate" else answer.json()["metadata"]
            assert meta["obcache"]["context_tokens"] == len(tokenizer(model_dir)(text)["input_ids"])
        else:
            assert answer.status_code in (400, 404), answer.text
            assert "context" in answer.text


def test_a_replica_that_ends_is_an_error_at_first_and_loses_no_later_answer(behind: Replicas, model_dir: Path) -> None:
    """The last test of this module: one replica is gone afterwards. The router takes a few health checks to see it."""
    wanted = {text: generate(behind.replicas[1], text + MARKER + QUESTIONS[0])["output_ids"] for text in texts(model_dir)}
    behind.replicas[0].process.kill()
    behind.replicas[0].process.wait()

    def answered(text: str) -> bool:
        path, body = native(text + MARKER + QUESTIONS[0])
        answer = behind.router.request("POST", path, json=body)
        if answer.status_code != 200:
            assert answer.status_code >= 500, answer.text
            return False
        length = body["sampling_params"]["max_new_tokens"]
        assert answer.json()["output_ids"] == wanted[text][:length]
        assert report(answer.json())["status"] in ("compressed", "reused")
        return True

    for text in wanted:
        wait_for(lambda text=text: answered(text), 60)
    assert all(answered(text) for text in wanted)
