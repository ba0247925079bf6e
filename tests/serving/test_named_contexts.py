"""A question that names its context gets the document or an error, never an answer without it. On the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from obcache_sglang.local_server import Server
from tests.serving.client import MARKER, NEW_TOKENS, ask_by_id, document, flush, generate, marker_id, question, report, tokenizer

L = 301  # 18 pages of 16, and 13 tokens


@pytest.mark.parametrize("which", ["server", pytest.param("tight_server", marks=pytest.mark.long)], ids=["page1", "page16"])
def test_by_id_and_by_marker_the_model_reads_the_same(request: pytest.FixtureRequest, which: str, model_dir: Path) -> None:
    """Also what stands behind the last whole page, where instructions are."""
    server: Server = request.getfixturevalue(which)
    flush(server)
    text = tokenizer(model_dir).decode(document(model_dir, L, "objects"))
    for cut in ("", "\n\nAnswer with one word.", " The end"):
        made = server.post("/obcache/compress", {"text": text + cut, "compression_ratio": 0.2})
        asked = "\n\nIn short, this"
        by_marker = generate(server, f"{text}{cut}{MARKER}{asked}", obcache={"compression_ratio": 0.2})
        fields = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "custom_params": {"obcache": {"context_id": made["id"]}}}
        by_id = server.post("/generate", {"text": MARKER + asked, "sampling_params": fields})
        assert report(by_marker)["context_id"] == report(by_id)["context_id"] == made["id"]
        assert by_id["meta_info"]["prompt_tokens"] == by_marker["meta_info"]["prompt_tokens"]
        assert by_id["output_ids"] == by_marker["output_ids"]


def test_a_chat_names_its_context_with_the_marker_where_the_document_stood(server: Server, model_dir: Path) -> None:
    text = tokenizer(model_dir).decode(document(model_dir, L, "numeric-types"))

    def chat(content: str, obcache: object = None) -> dict:
        messages = [{"role": "user", "content": content}]
        body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}
        return server.post("/v1/chat/completions", body | ({} if obcache is None else {"custom_params": {"obcache": obcache}}))

    by_marker = chat(f"{text}{MARKER} What is it about?")
    context_id = by_marker["metadata"]["obcache"]["context_id"]
    by_id = chat(f"{MARKER} What is it about?", {"context_id": context_id})
    assert by_id["choices"][0]["message"] == by_marker["choices"][0]["message"]
    assert by_id["usage"]["prompt_tokens"] == by_marker["usage"]["prompt_tokens"]
    # Where `custom_params` are dropped on the way, nothing but the template's words is left of the document.
    for lost in ([], [{"role": "system", "content": "You are an editor."}]):
        body = {"model": "m", "messages": [*lost, {"role": "user", "content": f"{MARKER} What is it about?"}], "max_tokens": 2}
        refused = server.request("POST", "/v1/chat/completions", json=body)
        assert refused.status_code == 400, refused.text
        assert "no context before it" in refused.text
    named = {"model": "m", "custom_params": {"obcache": {"context_id": context_id}}}
    elsewhere = [{"role": "user", "content": f"Another beginning. {MARKER} What is it about?"}]
    refused = server.request("POST", "/v1/chat/completions", json=named | {"messages": elsewhere})
    assert refused.status_code == 400 and "stand before the marker" in refused.text
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{MARKER} What is it about?"}]
    refused = server.request("POST", "/v1/chat/completions", json=named | {"messages": told})
    assert refused.status_code == 400 and "begins with" in refused.text


def test_a_document_in_the_system_message_is_named_with_the_marker_at_its_start(server: Server, model_dir: Path) -> None:
    text = tokenizer(model_dir).decode(document(model_dir, L, "integers"))

    def chat(system: str, **fields: object) -> requests.Response:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "What is it about?"}]
        body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS, **fields}
        return server.request("POST", "/v1/chat/completions", json=body)

    by_marker = chat(f"{text}{MARKER} Be brief.").json()
    by_id = chat(
        f"{MARKER} Be brief.", custom_params={"obcache": {"context_id": by_marker["metadata"]["obcache"]["context_id"]}}
    ).json()
    assert by_id["metadata"]["obcache"]["status"] == "reused"
    assert by_id["choices"][0]["message"] == by_marker["choices"][0]["message"]
    assert by_id["usage"]["prompt_tokens"] == by_marker["usage"]["prompt_tokens"]
    dropped = chat(f"{MARKER} Be brief.")
    assert dropped.status_code == 400 and "no context before it" in dropped.text


def test_what_loses_the_id_on_the_way_is_an_error(server: Server, model_dir: Path) -> None:
    """A router that drops custom_params leaves a marker with nothing before it; one that keeps them, a question without marker."""
    made = server.post("/obcache/compress", {"input_ids": document(model_dir, L, "slicings")})
    q = question(model_dir, "\n\nIn short,")
    dropped = server.request("POST", "/generate", json={"input_ids": [marker_id(server), *q]})
    assert dropped.status_code == 400 and "drops custom_params" in dropped.text
    params = {"custom_params": {"obcache": {"context_id": made["id"]}}}
    bare = server.request("POST", "/generate", json={"input_ids": q, "sampling_params": params})
    assert bare.status_code == 400 and "put the marker" in bare.text
    empty = server.request("POST", "/generate", json={"input_ids": [marker_id(server)], "sampling_params": params})
    assert empty.status_code == 400 and "empty" in empty.text
    unknown = {"custom_params": {"obcache": {"context_id": "0" * 32}}}
    lost = server.request("POST", "/generate", json={"input_ids": [marker_id(server), *q], "sampling_params": unknown})
    assert lost.status_code == 404


def test_a_session_cannot_be_asked_by_id(server: Server, model_dir: Path) -> None:
    made = server.post("/obcache/compress", {"input_ids": document(model_dir, L, "slicings")})
    session = server.post("/open_session", {"capacity_of_str_len": 10_000})
    body = {
        "input_ids": [marker_id(server), *question(model_dir, "\n\nIn short,")],
        "session_params": {"id": session},
        "sampling_params": {"custom_params": {"obcache": {"context_id": made["id"]}}},
    }
    refused = server.request("POST", "/generate", json=body)
    assert refused.status_code == 400 and "a session" in refused.text
    marked = {
        "text": f"One two three. {MARKER} Four",
        "session_params": {"id": session},
        "sampling_params": {"max_new_tokens": 2},
    }
    assert report(server.post("/generate", marked))["status"] == "exact"


def test_a_server_without_compression_refuses_what_relies_on_it(stock_server: Server, model_dir: Path) -> None:
    ids = tokenizer(model_dir)(f"A document.{MARKER} A question")["input_ids"]
    for body in (
        {"text": f"A document.{MARKER} A question"},
        {"input_ids": ids},
        {"text": "A question", "sampling_params": {"custom_params": {"obcache": {"context_id": "0" * 32}}}},
    ):
        refused = stock_server.request("POST", "/generate", json=body)
        assert refused.status_code == 400 and "started without --obcache" in refused.text
    chat = {"model": "m", "messages": [{"role": "user", "content": f"A document.{MARKER} A question"}]}
    assert stock_server.request("POST", "/v1/chat/completions", json=chat).status_code == 400
    assert stock_server.request("POST", "/api/chat", json={**chat, "stream": False}).status_code == 400
    assert len(generate(stock_server, "A question about obcache", obcache=False)["output_ids"]) == NEW_TOKENS


def test_an_evicted_context_is_made_again_when_it_is_named(tight_server: Server, model_dir: Path) -> None:
    flush(tight_server)
    made = tight_server.post("/obcache/compress", {"input_ids": document(model_dir, L, "objects"), "compression_ratio": 0.2})
    q = question(model_dir, "\n\nIn short,")
    first = ask_by_id(tight_server, made["id"], q)
    flush(tight_server)
    again = ask_by_id(tight_server, made["id"], q)
    assert report(again)["status"] == "compressed"
    assert again["output_ids"] == first["output_ids"]
