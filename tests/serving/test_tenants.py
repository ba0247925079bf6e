"""Who may see, ask and delete whose contexts. On the real engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server
from tests.serving.client import document, generate, marker_id, question, report
from tests.serving.conftest import COMMON, serving

L = 300


def test_no_list_shows_what_opens_a_context(server: Server, model_dir: Path) -> None:
    """A stranger who lists contexts gets their names, and a name answers no question."""
    prompt = document(model_dir, L, "bltin-ellipsis-object") + question(model_dir, "\n\nIn short,")
    identity = report(generate(server, prompt, obcache={"context_len": L}))["context_id"]
    name = server.get(f"/obcache/contexts/{identity}")["name"]
    for path in ("/obcache/contexts", "/obcache/status", f"/obcache/contexts/by-name/{name}?positions=true"):
        assert identity not in server.request("GET", path).text
    assert identity not in server.log()
    assert name in {context["name"] for context in server.get("/obcache/contexts")["contexts"]}
    params = {"custom_params": {"obcache": {"context_id": name}}}
    body = {"input_ids": [marker_id(server), *prompt[L:]], "sampling_params": params}
    assert server.request("POST", "/generate", json=body).status_code == 404
    assert server.request("GET", f"/obcache/contexts/{name}").status_code == 404
    assert server.request("DELETE", f"/obcache/contexts/{name}").status_code == 404


@pytest.mark.parametrize(
    ("field", "header"), [("extra_key", "X-Extra-Key"), ("cache_salt", "X-Cache-Salt")], ids=["extra_key", "cache_salt"]
)
def test_namespaces_are_separate_on_every_endpoint(server: Server, model_dir: Path, field: str, header: str) -> None:
    prompt = document(model_dir, L, "bltin-code-objects") + question(model_dir, "\n\nIn short,")
    made = generate(server, prompt, obcache={"context_len": L}, **{field: "mine"})
    identity = report(made)["context_id"]
    name = server.get(f"/obcache/contexts/{identity}", headers={header: "mine"})["name"]
    # Compressing ahead hears the header too.
    ahead = server.request("POST", "/obcache/compress", json={"input_ids": prompt[:L]}, headers={header: "mine"})
    assert (ahead.json()["status"], ahead.json()["id"]) == ("reused", identity)
    differing = {"input_ids": prompt[:L], field: "yours"}
    refused = server.request("POST", "/obcache/compress", json=differing, headers={header: "mine"})
    assert refused.status_code == 400 and "differ" in refused.text
    for headers in ({}, {header: "yours"}, {"X-Cache-Salt": "mine", "X-Extra-Key": "mine"}):
        assert name not in {each["name"] for each in server.get("/obcache/contexts", headers=headers)["contexts"]}
        for path in (f"/obcache/contexts/{identity}", f"/obcache/contexts/by-name/{name}?positions=true"):
            assert server.request("GET", path, headers=headers).status_code == 404
            assert server.request("DELETE", path, headers=headers).status_code == 404
    body: dict[str, Any] = {
        "input_ids": [marker_id(server), *prompt[L:]],
        "sampling_params": {"max_new_tokens": 1, "custom_params": {"obcache": {"context_id": identity}}},
    }
    assert server.request("POST", "/generate", json=body).status_code == 404
    assert server.request("POST", "/generate", json={**body, field: "yours"}).status_code == 404
    assert server.request("POST", "/generate", json={**body, field: "mine"}).status_code == 200
    assert server.request("DELETE", f"/obcache/contexts/{identity}", headers={header: "mine"}).status_code == 200


def test_nobody_shortens_the_life_of_a_context_that_others_use(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, L, "bltin-type-objects") + question(model_dir, "\n\nIn short,")
    lasting = report(generate(server, prompt, obcache={"context_len": L}))["context_id"]
    generate(server, prompt, obcache={"context_len": L, "ttl_seconds": 1})
    assert server.get(f"/obcache/contexts/{lasting}")["ttl_seconds"] is None
    other = {"context_len": L, "compression_ratio": 0.4}
    limited = report(generate(server, prompt, obcache={**other, "ttl_seconds": 60}))["context_id"]
    generate(server, prompt, obcache={**other, "ttl_seconds": 1})
    assert server.get(f"/obcache/contexts/{limited}")["ttl_seconds"] == 60
    time.sleep(1.5)
    assert {report(generate(server, prompt, obcache=wish))["status"] for wish in ({"context_len": L}, other)} == {"reused"}


def test_a_context_that_is_asked_for_ahead_lasts_whatever_end_was_set_before(server: Server, model_dir: Path) -> None:
    body = {"input_ids": document(model_dir, L, "bltin-null-object")}
    server.post("/obcache/compress", {**body, "ttl_seconds": 1})
    lasting = server.post("/obcache/compress", body)["id"]
    time.sleep(1.5)
    assert server.get(f"/obcache/contexts/{lasting}")["ttl_seconds"] is None


@pytest.fixture(scope="module")
def keyed_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Clients have one key, the operator another; every prompt is its own context."""
    flags = (*COMMON, "--max-total-tokens", "8192", "--api-key", "client", "--admin-api-key", "operator")
    flags += ("--obcache", "--obcache-min-tokens", "32", "--obcache-mode", "prompt")
    yield from serving(model_dir, tmp_path_factory.mktemp("keyed"), flags)


CLIENT, OPERATOR = ({"Authorization": f"Bearer {key}"} for key in ("client", "operator"))


def test_contexts_of_others_take_the_operators_key(keyed_server: Server, model_dir: Path) -> None:
    server = keyed_server
    made = server.post("/obcache/compress", {"input_ids": document(model_dir, L), "cache_salt": "mine"}, headers=CLIENT)
    mine = {**CLIENT, "X-Cache-Salt": "mine"}
    described = server.get(f"/obcache/contexts/{made['id']}", headers=mine)
    assert server.request("GET", "/obcache/contexts", headers=mine).status_code == 401
    by_name = f"/obcache/contexts/by-name/{described['name']}"
    for method in ("GET", "DELETE"):
        assert server.request(method, by_name, headers=mine).status_code == 401
        assert server.request(method, f"/obcache/contexts/{made['id']}").status_code == 401
        assert server.request(method, f"/obcache/contexts/{made['id']}", headers=CLIENT).status_code == 404
    assert described["name"] in {each["name"] for each in server.get("/obcache/contexts", headers=OPERATOR)["contexts"]}
    assert len(server.get(f"{by_name}?positions=true", headers=OPERATOR)["positions"]) == 30
    assert server.request("DELETE", by_name, headers=OPERATOR).json()["state"] == "deleted"
    assert server.request("GET", f"/obcache/contexts/{made['id']}", headers=mine).status_code == 404


def test_in_mode_prompt_log_probabilities_of_the_prompt_are_served_exactly(keyed_server: Server, model_dir: Path) -> None:
    """Clients that asked for nothing of ours get what SGLang gives; those that asked for a context are told."""
    prompt = document(model_dir, 100, "calls")
    body = {"input_ids": prompt, "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 2}}
    answer = keyed_server.post("/generate", body, headers=CLIENT)
    assert len(answer["meta_info"]["input_token_logprobs"]) == 100
    assert (report(answer)["status"], report(answer)["reason"]) == ("exact", "input_logprobs")
    completion = {"model": "m", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 2}
    echoed = keyed_server.post("/v1/completions", completion, headers=CLIENT)
    assert echoed["metadata"]["obcache"]["reason"] == "input_logprobs"
    asked = {**body, "sampling_params": {"max_new_tokens": 2, "custom_params": {"obcache": {"context_len": 90}}}}
    assert keyed_server.request("POST", "/generate", json=asked, headers=CLIENT).status_code == 400
    assert report(generate_with(keyed_server, prompt))["status"] == "compressed"


def generate_with(server: Server, prompt: list[int]) -> dict[str, Any]:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
    return server.post("/generate", body, headers=CLIENT)
