"""The marker with options, on every endpoint and from the unmodified SDK, on the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sglang as sgl

from obcache_sglang import lang
from obcache_sglang.local_server import Server
from tests.serving.client import MARKER, document, flush, generate, report, tokenizer

L = 200
ASKED = "\n\nWhy?"


@pytest.fixture
def text(server: Server, model_dir: Path) -> str:
    flush(server)
    return str(tokenizer(model_dir).decode(document(model_dir, L, "class")))


def told(options: str) -> str:
    return f"<|obcache:{options}|>"


def bodies(content: str) -> dict[str, dict[str, Any]]:
    """A request to each endpoint, by its path."""
    messages = [{"role": "user", "content": content}]
    return {
        "/generate": {"text": content, "sampling_params": {"max_new_tokens": 4}},
        "/v1/completions": {"model": "default", "prompt": content, "max_tokens": 4},
        "/v1/chat/completions": {"model": "default", "messages": messages, "max_tokens": 4},
        "/v1/messages": {"model": "default", "messages": messages, "max_tokens": 4},
        "/v1/responses": {"input": messages, "max_output_tokens": 4},
        "/api/chat": {"model": "default", "messages": messages, "options": {"num_predict": 4}, "stream": False},
    }


PATHS = tuple(bodies(""))


def ask(server: Server, path: str, content: str, **fields: Any) -> Any:
    body = bodies(content)[path] | fields
    if path == "/v1/responses":
        body["model"] = server.get("/v1/models")["data"][0]["id"]
    return server.request("POST", path, json=body)


def test_each_prompt_of_a_batch_has_its_own(server: Server, text: str) -> None:
    ratios = (0.25, 0.5, 0.75)
    prompts = [text + told(f"ratio={ratio}") + ASKED for ratio in ratios] + [text + MARKER + ASKED, text + ASKED]
    answers = server.post("/generate", {"text": prompts, "sampling_params": {"max_new_tokens": 4, "temperature": 0}})
    reports = [report(answer) for answer in answers[:4]]
    assert [each["compression_ratio"] for each in reports] == [*ratios, 0.5]
    assert [each["context_tokens"] for each in reports] == [L] * 4
    assert [round(each["kept_tokens"] / L, 2) for each in reports] == [0.75, 0.5, 0.25, 0.5]
    assert "obcache" not in answers[4]["meta_info"]


@pytest.mark.parametrize("path", PATHS)
def test_every_endpoint_hears_it(server: Server, text: str, path: str) -> None:
    answer = ask(server, path, text + told("ratio=0.25") + ASKED)
    assert answer.status_code == 200, answer.text
    said = answer.headers["X-Obcache"]
    assert said.startswith("compressed; ") and "; ratio=0.25; " in said
    # The same context, said in the other way where the endpoint can: nothing of the options is in its text.
    again = ask(server, path, text + told("compression_ratio=0.25,mode=marked") + "\n\nWhen?")
    assert again.headers["X-Obcache"] == said.replace("compressed", "reused")


def test_it_says_what_custom_params_say(server: Server, text: str) -> None:
    first = generate(server, text + told("ratio=0.25,method=tova,budget=uniform") + ASKED)
    wish = {"compression_ratio": 0.25, "method": "tova", "budget": "uniform"}
    second = generate(server, text + MARKER + ASKED, obcache=wish)
    assert [report(each)["status"] for each in (first, second)] == ["compressed", "reused"]
    assert report(first)["context_id"] == report(second)["context_id"]
    assert first["output_ids"] == second["output_ids"]
    assert first["meta_info"]["prompt_tokens"] == second["meta_info"]["prompt_tokens"]
    assert (report(first)["method"], report(first)["budget"]) == ("tova", "uniform")
    # Where both say something, custom_params count.
    third = generate(server, text + told("ratio=0.75,method=tova,budget=uniform") + ASKED, obcache={"compression_ratio": 0.25})
    assert report(third)["context_id"] == report(first)["context_id"]


def test_the_anthropic_sdk(server: Server, text: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=server.url, api_key="none") as client:
        system = [
            {"type": "text", "text": text + told("ratio=0.25,ttl=600"), "cache_control": {"type": "ephemeral", "ttl": "1h"}}
        ]
        asked: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "Why?"}]}
        answer = client.messages.with_raw_response.create(**asked, system=system, max_tokens=4)
        counts = [
            client.messages.count_tokens(**asked, system=each).input_tokens for each in (text, text + told("ratio=0.25,ttl=600"))
        ]
    assert "; ratio=0.25; " in answer.headers["X-Obcache"]
    assert counts[0] == counts[1]
    (context,) = server.get("/obcache/contexts")["contexts"]
    assert context["ttl_seconds"] == 600  # a marker in the text counts more than a breakpoint


def test_pins_and_lifetimes_take_effect(server: Server, text: str) -> None:
    identity = report(generate(server, text + told("pin, ttl=600") + ASKED))["context_id"]
    context = server.get(f"/obcache/contexts/{identity}")
    assert (context["pinned"], context["ttl_seconds"]) == (True, 600)
    assert server.request("DELETE", f"/obcache/contexts/{identity}").status_code == 200
    identity = report(generate(server, text + MARKER + ASKED))["context_id"]
    context = server.get(f"/obcache/contexts/{identity}")
    assert (context["pinned"], context["ttl_seconds"]) == (False, None)


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_compressing_ahead_hears_it(server: Server, text: str, kind: str) -> None:
    content = text + told("ratio=0.25") + " not this"
    body: dict[str, Any] = {kind: content if kind == "text" else [{"role": "user", "content": content}]}
    made = server.post("/obcache/compress", body)
    assert (made["status"], made["compression_ratio"]) == ("compressed", 0.25)
    path = "/generate" if kind == "text" else "/v1/chat/completions"
    answer = ask(server, path, text + told("ratio=0.25") + ASKED)
    assert answer.headers["X-Obcache"].startswith("reused; ") and made["id"] in answer.headers["X-Obcache"]
    # Its own keys count more.
    assert server.post("/obcache/compress", {**body, "compression_ratio": 0.75})["compression_ratio"] == 0.75


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("wrong", "words"),
    [("<|obcache:ratio=2|>", "compression_ratio"), ("<|obcache:colour=red|>", "colour"), ("<|obcache:ttl=60", "not closed")],
)
def test_wrong_ones_are_a_400_that_names_them(server: Server, text: str, path: str, wrong: str, words: str) -> None:
    answer = ask(server, path, text + wrong + ASKED)
    assert answer.status_code == 400, answer.text
    assert words in answer.text


def test_as_ordinary_tokens_it_is_a_400(server: Server, text: str, model_dir: Path) -> None:
    ids = tokenizer(model_dir)(text + told("ratio=0.25") + ASKED)["input_ids"]
    answer = server.request("POST", "/generate", json={"input_ids": ids, "sampling_params": {"max_new_tokens": 4}})
    assert answer.status_code == 400 and "ordinary tokens, with options" in answer.text


def test_an_echo_is_what_the_model_read(server: Server, text: str) -> None:
    answer = ask(server, "/v1/completions", text + told("ratio=0.25") + ASKED, echo=True)
    assert answer.json()["choices"][0]["text"].startswith(text + ASKED)


def test_a_program_of_the_frontend_language(server: Server, text: str) -> None:
    @sgl.function
    def asks(s: Any) -> None:
        s += lang.context(text, compression_ratio=0.25, ttl_seconds=600)
        s += ASKED + sgl.gen("answer", max_tokens=4, temperature=0)

    assert asks.run(backend=sgl.RuntimeEndpoint(server.url))["answer"]
    (context,) = server.get("/obcache/contexts")["contexts"]
    assert (context["context_tokens"], context["ttl_seconds"]) == (L, 600)
    assert report(generate(server, text + MARKER + ASKED, obcache={"compression_ratio": 0.25}))["status"] == "reused"


@pytest.mark.parametrize("path", PATHS)
def test_a_server_without_compression_refuses_it(stock_server: Server, path: str) -> None:
    for marker in (told("ratio=0.25"), told(""), "<|obcache:pin"):
        refused = ask(stock_server, path, "A document." + marker + ASKED)
        assert refused.status_code == 400 and "--obcache" in refused.text, refused.text
    assert ask(stock_server, path, "The words `<|obcache:` begin it." + ASKED).status_code == 200
