"""Compress once, answer many: what is shared, what is counted, what clients see. On the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obcache_sglang.local_server import Server
from tests.serving.client import (
    MARKER,
    NEW_TOKENS,
    ask_by_id,
    compressions,
    document,
    flush,
    generate,
    generate_together,
    question,
    report,
    tokenizer,
)

L = 300


def wish(**more: object) -> dict[str, object]:
    return {"context_len": L, **more}


def test_ten_questions_at_once_cause_one_compression(server: Server, model_dir: Path) -> None:
    context = document(model_dir, L, "binary")
    before = compressions(server)
    prompts = [context + question(model_dir, f"\n\nQuestion {i}: what is") for i in range(10)]
    answers = generate_together(server, [{"prompt": p, "obcache": wish()} for p in prompts])
    assert compressions(server) == before + 1
    assert sorted(report(answer)["status"] for answer in answers) == ["compressed"] + ["reused"] * 9
    assert len({report(answer)["context_id"] for answer in answers}) == 1
    for prompt, answer in zip(prompts, answers, strict=True):
        meta = answer["meta_info"]
        assert meta["prompt_tokens"] == len(prompt)
        if report(answer)["status"] == "compressed":
            assert meta["cached_tokens"] == 0
        else:
            assert L <= meta["cached_tokens"] < len(prompt)
    later = generate(server, prompts[0] + question(model_dir, " really"), obcache=wish())
    assert report(later)["status"] == "reused"
    assert later["meta_info"]["cached_tokens"] >= len(prompts[0])


def test_questions_of_one_batch_cause_one_compression(server: Server, model_dir: Path) -> None:
    """They reach the scheduler in one message, and are decided in one pass, before any job of theirs is queued."""
    context = document(model_dir, L, "integers")
    prompts = [context + question(model_dir, f"\n\nPoint {i}:") for i in range(4)]
    before = compressions(server)
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "custom_params": {"obcache": wish(budget="global")}}
    answers = server.post("/generate", {"input_ids": prompts, "sampling_params": params})
    assert compressions(server) == before + 1
    assert sorted(report(answer)["status"] for answer in answers) == ["compressed", "reused", "reused", "reused"]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert generate(server, prompt, obcache=wish(budget="global"))["output_ids"] == answer["output_ids"]


@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9])
def test_slots_held_are_exactly_the_formula(server: Server, model_dir: Path, ratio: float) -> None:
    made = server.post("/obcache/compress", {"input_ids": document(model_dir, 333, "numbers"), "compression_ratio": ratio})
    assert (made["context_tokens"], made["kept_tokens"]) == (333, int(333 * (1 - ratio)))
    described = server.get(f"/obcache/contexts/{made['id']}")
    assert described["slots"] == int(333 * (1 - ratio))
    assert described["settings"]["compression_ratio"] == ratio


def test_pool_usage_falls_to_the_slots_kept(server: Server, model_dir: Path) -> None:
    """SGLang's own accounts: a pinned context is all that is in use, and it uses M slots."""
    flush(server)
    made = server.post("/obcache/compress", {"input_ids": document(model_dir, 800, "class"), "pin": True})
    assert made["pinned"]
    used = [load["num_used_tokens"] for load in server.get("/v1/loads")["loads"]]
    assert used == [made["kept_tokens"]]
    assert server.request("DELETE", f"/obcache/contexts/{made['id']}").status_code == 200
    assert server.get("/v1/loads")["loads"][0]["num_used_tokens"] == 0


def test_tenants_share_nothing(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, L, "comparisons") + question(model_dir, "\n\nIn short,")
    before = compressions(server)
    first = generate(server, prompt, obcache=wish(), cache_salt="tenant-a")
    second = generate(server, prompt, obcache=wish(), cache_salt="tenant-b")
    again = generate(server, prompt, obcache=wish(), cache_salt="tenant-a")
    assert compressions(server) == before + 2
    assert [report(a)["status"] for a in (first, second, again)] == ["compressed", "compressed", "reused"]
    assert report(first)["context_id"] == report(again)["context_id"] != report(second)["context_id"]
    identity = report(first)["context_id"]
    for salt, status in (({}, 404), ({"X-Cache-Salt": "tenant-b"}, 404), ({"X-Cache-Salt": "tenant-a"}, 200)):
        assert server.request("GET", f"/obcache/contexts/{identity}", headers=salt).status_code == status
    assert server.request("DELETE", f"/obcache/contexts/{identity}", headers={"X-Cache-Salt": "tenant-b"}).status_code == 404
    listed = server.get("/obcache/contexts", headers={"X-Cache-Salt": "tenant-b"})["contexts"]
    assert [context["readers"] for context in listed] == [0]
    assert report(second)["context_id"] not in json.dumps(listed)
    stranger = server.request(
        "POST",
        "/generate",
        json={"text": f"{MARKER}So", "sampling_params": {"custom_params": {"obcache": {"context_id": identity}}}},
    )
    assert stranger.status_code == 404, stranger.text


def test_settings_of_one_context_stand_side_by_side(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, L, "operator-summary") + question(model_dir, "\n\nIn short,")
    wishes = [wish(compression_ratio=0.2), wish(compression_ratio=0.8), wish(compression_ratio=0.8, method="tova")]
    first = [generate(server, prompt, obcache=w) for w in wishes]
    again = generate_together(server, [{"prompt": prompt, "obcache": w} for w in wishes])
    assert len({report(answer)["context_id"] for answer in first}) == 3
    for one, two in zip(first, again, strict=True):
        assert report(two)["status"] == "reused"
        assert report(two)["context_id"] == report(one)["context_id"]
        assert two["output_ids"] == one["output_ids"]


def test_mixed_batches_give_each_request_the_tokens_it_gets_alone(server: Server, model_dir: Path) -> None:
    docs = [document(model_dir, L, topic) for topic in ("exceptions", "formatstrings", "calls")]
    uniform, adakv, across = (wish(budget=budget) for budget in ("uniform", "adakv", "global"))
    wishes = [None, uniform, adakv, across, None, adakv]
    asked = [
        {"prompt": docs[i % 3] + question(model_dir, f"\n\nPoint {i}:"), "obcache": w, "max_new_tokens": NEW_TOKENS}
        for i, w in enumerate(wishes)
    ]
    alone = [generate(server, **request) for request in asked]
    together = generate_together(server, asked)
    flush(server)
    afresh = generate_together(server, asked)
    for one, two, three in zip(alone, together, afresh, strict=True):
        assert one["output_ids"] == two["output_ids"] == three["output_ids"]


def test_streaming_says_the_same(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, L, "dynamic-features") + question(model_dir, "\n\nIn short,")
    whole = generate(server, prompt, obcache=wish())
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "custom_params": {"obcache": wish()}}
    body = {"input_ids": prompt, "sampling_params": params, "stream": True}
    response = server.request("POST", "/generate", json=body, stream=True)
    events = [line[len(b"data: ") :] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    last = json.loads(events[-2])
    assert last["text"] == whole["text"]
    assert last["meta_info"]["prompt_tokens"] == len(prompt)
    assert report(last)["status"] == "reused"


def test_marker_in_text_chat_and_completions(server: Server, model_dir: Path) -> None:
    text = tokenizer(model_dir).decode(document(model_dir, L, "debugger"))
    before = compressions(server)
    first = generate(server, f"{text}{MARKER}\n\nIn short, the debugger")
    assert report(first)["status"] == "compressed"
    ids = tokenizer(model_dir)(text)["input_ids"] + tokenizer(model_dir)("\n\nIn short, the debugger")["input_ids"]
    assert first["meta_info"]["prompt_tokens"] == len(ids)
    assert generate(server, ids, obcache={"context_len": report(first)["context_tokens"]})["text"] == first["text"]
    completion = server.post(
        "/v1/completions", {"model": "m", "prompt": f"{text}{MARKER}\n\nAlso, the", "temperature": 0, "max_tokens": 4}
    )
    assert completion["usage"]["prompt_tokens_details"]["cached_tokens"] >= report(first)["context_tokens"]
    assert json.dumps(completion).count(report(first)["context_id"]) == 1
    assert compressions(server) == before + 1

    def chat(q: str) -> dict:
        messages = [{"role": "system", "content": f"Read this.\n{text}{MARKER}"}, {"role": "user", "content": q}]
        return server.post("/v1/chat/completions", {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 4})

    one, two = chat("What is it?"), chat("Who wrote it?")
    assert compressions(server) == before + 2
    assert two["usage"]["prompt_tokens_details"]["cached_tokens"] > one["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_samples_of_one_request_share_a_context(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, L, "context-managers") + question(model_dir, "\n\nIn short,")
    before = compressions(server)
    params = {"temperature": 0.8, "n": 2, "max_new_tokens": 4, "custom_params": {"obcache": wish()}}
    answers = server.post("/generate", {"input_ids": prompt, "sampling_params": params})
    assert len(answers) == 2
    assert compressions(server) == before + 1
    assert {report(answer)["status"] for answer in answers} == {"reused"}


def test_a_context_by_its_id_and_by_the_tokens_a_prompt_starts_with(server: Server, model_dir: Path) -> None:
    context, q = document(model_dir, L, "attribute-access"), question(model_dir, "\n\nIn short,")
    made = server.post("/obcache/compress", {"input_ids": context})
    by_length = generate(server, context + q, obcache=wish())
    by_id = ask_by_id(server, made["id"], q)
    found = generate(server, context + q, obcache=True)
    for answer in (by_length, by_id, found):
        assert report(answer)["status"] == "reused"
        assert report(answer)["context_id"] == made["id"]
        assert answer["output_ids"] == by_length["output_ids"]
        assert answer["meta_info"]["prompt_tokens"] == len(context + q)
    assert report(generate(server, q * 20, obcache=True))["reason"] == "no_context"


def test_mode_prompt_decodes_on_the_small_cache(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, 401, "conversions")
    answer = generate(server, prompt, obcache={"mode": "prompt"}, max_new_tokens=4)
    assert report(answer)["status"] == "compressed"
    assert report(answer)["context_tokens"] == 400
    assert answer["meta_info"]["prompt_tokens"] == 401


def test_log_probabilities_behind_the_context_only(server: Server, model_dir: Path) -> None:
    context, q = document(model_dir, L, "naming"), question(model_dir, "\n\nIn short, a name")
    fields = {"return_logprob": True, "logprob_start_len": L}
    exact = generate(server, context + q, **fields)
    kept = generate(server, context + q, obcache=wish(compression_ratio=0.0), **fields)
    expected = [token for _, token, _ in exact["meta_info"]["input_token_logprobs"]]
    assert [token for _, token, _ in kept["meta_info"]["input_token_logprobs"]] == expected == q
    for one, two in zip(exact["meta_info"]["input_token_logprobs"], kept["meta_info"]["input_token_logprobs"], strict=True):
        assert (one[0] is None) == (two[0] is None)
        if one[0] is not None:
            assert one[0] == pytest.approx(two[0], abs=1e-3)
    body = {"input_ids": context + q, "return_logprob": True, "logprob_start_len": 5}
    refused = server.request("POST", "/generate", json={**body, "sampling_params": {"custom_params": {"obcache": wish()}}})
    assert refused.status_code == 400
    assert "logprob_start_len" in refused.text


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"compression_ratio": 1.2}, "1.2"),
        ({"method": "snap"}, "snapkv"),
        ({"score": 3}, "obcache-kv"),
        ({"ratio": 0.5}, "compression_ratio"),
        ({"context_len": -1}, "-1"),
        ({"budget": "pyramid"}, "global"),
        ("yes", "yes"),
    ],
)
def test_wrong_wishes_are_named(server: Server, model_dir: Path, wrong: object, named: str) -> None:
    body = {"input_ids": document(model_dir, 40), "sampling_params": {"custom_params": {"obcache": wrong}}}
    response = server.request("POST", "/generate", json=body)
    assert response.status_code == 400
    assert named in response.text


def test_two_markers_are_refused_and_one_at_the_start(server: Server) -> None:
    for text, words in ((f"a{MARKER}b{MARKER}c", "2 times"), (MARKER + "One two three. " * 30, "no context before it")):
        refused = server.request("POST", "/generate", json={"text": text})
        assert refused.status_code == 400
        assert words in refused.text


def test_status_and_prometheus_count_the_same(server: Server) -> None:
    status = server.get("/obcache/status")
    assert status["active"]
    assert all(hook["in_place"] for hook in status["hooks"])
    metrics = server.request("GET", "/metrics").text
    lines = [line for line in metrics.splitlines() if line.startswith("sglang:obcache_compressions_total")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in lines) == status["counters"]["compressions"] > 0
