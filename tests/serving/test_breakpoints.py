"""The standard fields of Anthropic's and OpenAI's APIs, from the unmodified SDK and plain HTTP, on the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server
from tests.serving.client import MARKER, NEW_TOKENS, document, flush, tokenizer

anthropic = pytest.importorskip("anthropic")

EPHEMERAL = {"type": "ephemeral"}


@pytest.fixture
def text(server: Server, model_dir: Path) -> str:
    flush(server)
    return str(tokenizer(model_dir).decode(document(model_dir, 300, "class")))


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none") as opened:
        yield opened


def kinds(header: str) -> dict[str, str]:
    status, *parts = header.split("; ")
    return {"status": status} | dict(part.split("=", 1) for part in parts)


def test_the_anthropic_sdk_caches_as_it_always_did(server: Server, client: Any, text: str) -> None:
    asked: dict[str, Any] = {"model": "default", "max_tokens": NEW_TOKENS}
    asked["system"] = [{"type": "text", "text": text, "cache_control": {**EPHEMERAL, "ttl": "1h"}}]
    usages, headers = [], []
    for question in ("What is a class?", "Name one rule."):
        answer = client.messages.with_raw_response.create(messages=[{"role": "user", "content": question}], **asked)
        headers.append(kinds(answer.headers["X-Obcache"]))
        usages.append(answer.parse().usage)
    assert [each["status"] for each in headers] == ["compressed", "reused"]
    assert headers[0]["id"] == headers[1]["id"] and headers[0]["kept"] == headers[1]["kept"]
    kept, tokens = map(int, headers[0]["kept"].split("/"))
    assert kept < tokens and tokens >= 300
    assert usages[0].cache_creation_input_tokens + (usages[0].cache_read_input_tokens or 0) == tokens
    assert usages[1].cache_read_input_tokens >= tokens and usages[1].cache_creation_input_tokens is None
    (context,) = [each for each in server.get("/obcache/contexts")["contexts"] if each["context_tokens"] == tokens]
    assert context["ttl_seconds"] == 3600
    # The same prompt by hand is the same context: the breakpoint is the marker.
    body = {**asked, "system": text + MARKER, "messages": [{"role": "user", "content": "And now?"}]}
    by_hand = server.request("POST", "/v1/messages", json=body)
    assert kinds(by_hand.headers["X-Obcache"]) == {**headers[1]}


def test_streams_have_the_header_too(client: Any, text: str) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": text, "cache_control": EPHEMERAL}, {"type": "text", "text": "Why?"}],
        }
    ]
    with client.messages.stream(model="default", max_tokens=NEW_TOKENS, messages=messages) as stream:
        assert kinds(stream.response.headers["X-Obcache"])["status"] == "compressed"
        message = stream.get_final_message()
    assert message.usage.output_tokens == NEW_TOKENS


def test_tokens_are_counted_without_the_marker(client: Any, text: str) -> None:
    counts = [
        client.messages.count_tokens(model="default", messages=[{"role": "user", "content": content}]).input_tokens
        for content in (text + "Why?", text + MARKER + "Why?")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_openai_breakpoints(server: Server, text: str, path: str) -> None:
    kind, key, most = ("text", "messages", "max_tokens") if "chat" in path else ("input_text", "input", "max_output_tokens")
    content = [{"type": kind, "text": text, "prompt_cache_breakpoint": {"mode": "explicit"}}, {"type": kind, "text": "Why?"}]
    model = server.get("/v1/models")["data"][0]["id"]
    statuses = []
    for _ in range(2):
        response = server.request("POST", path, json={"model": model, key: [{"role": "user", "content": content}], most: 8})
        assert response.status_code == 200, response.text
        statuses.append(kinds(response.headers["X-Obcache"])["status"])
    assert statuses == ["compressed", "reused"]


def test_parameters_of_the_messages_api_are_heard(server: Server, text: str) -> None:
    body = {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": text + MARKER + "Why?"}]}
    body["custom_params"] = {"obcache": {"compression_ratio": 0.25}}
    assert kinds(server.request("POST", "/v1/messages", json=body).headers["X-Obcache"])["ratio"] == "0.25"
    body["custom_params"] = {"obcache": {"compression_ratio": 2}}
    wrong = server.request("POST", "/v1/messages", json=body)
    assert wrong.status_code == 400 and "compression_ratio" in wrong.text


def test_wrong_breakpoints_are_a_400(server: Server, text: str) -> None:
    content = [{"type": "text", "text": text, "cache_control": {**EPHEMERAL, "ttl": "2h"}}, {"type": "text", "text": "Why?"}]
    body = {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
    for path in ("/v1/messages", "/v1/chat/completions"):
        wrong = server.request("POST", path, json=body)
        assert wrong.status_code == 400 and "2h" in wrong.text and "5m, 30m, 1h" in wrong.text


def test_requests_without_a_context_have_no_header(server: Server) -> None:
    response = server.request("POST", "/generate", json={"text": "Hello", "sampling_params": {"max_new_tokens": 2}})
    assert "X-Obcache" not in response.headers
