"""What a client may not send, or may send without harm to others. On the real engine."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.kv.context import FIRST_VIRTUAL_ID
from obcache_sglang.local_server import Server
from tests.serving.client import MARKER, document, flush, generate, marker_id, question, report, tokenizer

L = 300
OUTSIDE = [1 << 61, (1 << 62) + 7, 49_154, -1, 1 << 40]  # 49,152 and 49,153 begin the marker in its two forms


def refused(server: Server, path: str, body: dict[str, Any], words: str, status: int = 400) -> None:
    response = server.request("POST", path, json=body)
    assert response.status_code == status, response.text
    assert words in response.text


@pytest.mark.parametrize("token", OUTSIDE)
def test_ids_outside_the_vocabulary_are_refused_wherever_they_come(server: Server, model_dir: Path, token: int) -> None:
    prompt = [*document(model_dir, 40), token, 5]
    refused(server, "/generate", {"input_ids": prompt}, "outside [0, 49152)")
    refused(server, "/generate", {"input_ids": [prompt[:20], prompt]}, "outside [0, 49152)")
    refused(server, "/v1/completions", {"model": "m", "prompt": prompt}, "outside [0, 49152)")
    refused(server, "/obcache/compress", {"input_ids": prompt}, "outside [0, 49152)")
    score = {"model": "m", "query": prompt, "items": [[5, 6]], "label_token_ids": [5]}
    refused(server, "/v1/score", score, "outside [0, 49152)")
    generate(server, prompt[:20])


def test_virtual_ids_of_a_context_cannot_be_sent(server: Server, model_dir: Path) -> None:
    """Wherever in their range they are: no plain prompt stands behind a context."""
    made = server.post("/obcache/compress", {"input_ids": document(model_dir, L, "atom-identifiers")})
    for base in (FIRST_VIRTUAL_ID, FIRST_VIRTUAL_ID + int(made["id"][:16], 16) % (1 << 62), FIRST_VIRTUAL_ID + (1 << 62) - 1):
        refused(server, "/generate", {"input_ids": [*range(base, base + made["kept_tokens"]), 5]}, "outside [0, 49152)")


@pytest.mark.parametrize("text", [MARKER, f"{MARKER}{MARKER}", ""])
def test_a_prompt_of_nothing_but_the_marker_is_refused(server: Server, text: str) -> None:
    for body in ({"text": text}, {"text": text, "sampling_params": {"custom_params": {"obcache": False}}}, {"text": ["a", text]}):
        assert server.request("POST", "/generate", json=body).status_code == 400
    assert server.request("POST", "/obcache/compress", json={"text": text}).status_code == 400
    refused(server, "/generate", {"input_ids": [marker_id(server)]}, "empty")
    assert server.request("GET", "/health").status_code == 200


@pytest.mark.parametrize("value", ["x", {"a": 1}, 0, False, ""])
def test_embeddings_that_are_none_do_not_end_the_server(server: Server, value: object) -> None:
    """SGLang's scheduler calls a method of whatever it is given (found by `tests.fuzz --seed 2`)."""
    refused(server, "/generate", {"text": "The", "positional_embed_overrides": value}, "positional_embed_overrides")
    assert server.request("GET", "/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        # Read as a float, and None when the scheduler gets it (found by `tests.fuzz --seed 3`).
        ("/v1/completions", {"logit_bias": {"5": "NaN"}}, "logit_bias has the value nan"),
        ("/v1/completions", {"logit_bias": {"5": "-inf"}}, "logit_bias has the value -inf"),
        ("/generate", {"sampling_params": {"stop_token_ids": [999_999], "min_new_tokens": 1}}, "stop_token_ids has 999999"),
        ("/v1/completions", {"stop_token_ids": [-7], "min_tokens": 1}, "stop_token_ids has -7"),
        ("/generate", {"sampling_params": {"n": 10**9}}, "n=1000000000 is more than 4096"),
        ("/v1/completions", {"n": 10**9}, "n=1000000000 is more than 4096"),
        ("/generate", {"return_logprob": True, "top_logprobs_num": 10**6}, "top_logprobs_num=1000000 is more than 49152"),
        ("/v1/completions", {"logprobs": 10**6}, "top_logprobs_num=1000000 is more than 49152"),
        ("/generate", {"return_logprob": True, "logprob_start_len": -5}, "logprob_start_len=-5 is below -1"),
    ],
)
def test_sampling_parameters_that_would_end_the_scheduler_are_refused(
    server: Server, path: str, fields: dict[str, Any], words: str
) -> None:
    """Each ends a stock server of 0.5.23."""
    prompt: dict[str, Any] = {"text": "The"} if path == "/generate" else {"model": "m", "prompt": "The"}
    refused(server, path, prompt | fields, words)
    assert generate(server, "The", max_new_tokens=2)["output_ids"]


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_ollamas_endpoints_say_what_is_wrong(server: Server, path: str) -> None:
    """SGLang's handlers of these let a ValueError out, as a 500."""
    for text, words in ((f"{MARKER}So?", "no context before it"), (f"One.{MARKER}Two.{MARKER}Three.", "2 times")):
        body = {"prompt": text} if path == "/api/generate" else {"messages": [{"role": "user", "content": text}]}
        refused = server.request("POST", path, json={"model": "m", "stream": False, "options": {"num_predict": 2}, **body})
        assert refused.status_code == 400, refused.text
        assert words in refused.text


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_id": ["x"]},
        {"return_logprob": True, "logprob_start_len": [0]},
        {"return_logprob": True, "top_logprobs_num": [1]},
        {"return_logprob": [True]},
    ],
    ids=lambda fields: list(fields)[-1],
)
@pytest.mark.parametrize("marked", [False, True])
def test_lists_in_the_place_of_one_value_do_not_end_the_server(
    server: Server, model_dir: Path, fields: dict[str, Any], marked: bool
) -> None:
    text = tokenizer(model_dir).decode(document(model_dir, 60)) + MARKER + " So" if marked else "The"
    refused = server.request(
        "POST", "/generate", json={"text": text, "sampling_params": {"max_new_tokens": 2}, **fields}, timeout=60
    )
    assert refused.status_code == 400, refused.text
    assert next(reversed(fields)) in refused.text
    assert len(generate(server, "The", max_new_tokens=2)["output_ids"]) == 2


def test_compress_runs_no_template_of_the_clients(server: Server) -> None:
    """This one would count to ten to the fifteenth in the server's event loop."""
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": loops}}
    refused = server.request("POST", "/obcache/compress", json=body, timeout=60)
    assert refused.status_code == 400, refused.text
    assert "chat_template is not allowed" in refused.text


def test_deeply_nested_messages_are_refused(server: Server) -> None:
    nested: Any = "x"
    for _ in range(600):
        nested = [nested]
    refused = server.request("POST", "/obcache/compress", json={"messages": [{"role": "user", "content": nested}]}, timeout=60)
    assert refused.status_code == 400, refused.text


@pytest.mark.parametrize("value", [True, 7, "obcache", ["obcache"], [["obcache", True]]])
def test_custom_params_that_are_no_object_are_refused(server: Server, model_dir: Path, value: object) -> None:
    for text in ("The", tokenizer(model_dir).decode(document(model_dir, 60)) + MARKER + " So"):
        body = {"text": text, "sampling_params": {"max_new_tokens": 2, "custom_params": value}}
        refused = server.request("POST", "/generate", json=body)
        assert refused.status_code == 400, refused.text


@pytest.mark.parametrize("ids", [[[1, 2], 5], [[1, 2], None], [[1, 2], "12"], [[1, 2], {"1": 2}], [1, [2]]])
def test_what_is_no_list_of_token_ids_is_refused(server: Server, ids: object) -> None:
    refused = server.request("POST", "/generate", json={"input_ids": ids, "sampling_params": {"max_new_tokens": 2}})
    assert refused.status_code == 400, refused.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kernel_size", 999_999_999_999),
        ("replay_chunk", 1),
        ("window", 10**30),
        ("sink_tokens", 10**30),
        ("max_kept_tokens", 0),
        ("ttl_seconds", 10**400),
        ("ttl_seconds", 1e-300),
        ("compression_ratio", 10**400),
    ],
)
def test_every_number_has_bounds_that_are_told(server: Server, model_dir: Path, field: str, value: object) -> None:
    more = {"kernel_size": {"method": "snapkv", "pooling": "max"}, "replay_chunk": {"method": "replay"}}.get(field, {})
    refused(server, "/obcache/compress", {"input_ids": document(model_dir, 64), field: value, **more}, field)


@pytest.mark.parametrize(
    "body",
    [
        {"text": "half a pair \ud800 here"},
        {"messages": [{"role": "user", "content": "half \udfff"}]},
        {"input_ids": [10**30]},
        {"input_ids": [1.5]},
        {"text": "a", "cache_salt": "\ud800"},
        {"text": "a", "extra_key": "\ud800"},
        {"text": "a", "stream": "yes"},
        {"text": "a", "\ud800": 1},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_what_cannot_be_encoded_is_refused_by_name(server: Server, body: dict[str, Any]) -> None:
    response = server.request("POST", "/obcache/compress", data=json.dumps(body))
    assert response.status_code == 400, response.text


def test_a_replay_costs_no_more_than_a_multiple_of_its_context(server: Server, model_dir: Path) -> None:
    before = server.get("/obcache/status")["counters"]["replayed_tokens"]
    body = {"input_ids": document(model_dir, 320, "lambda"), "method": "replay", "replay_chunk": 32}
    assert server.post("/obcache/compress", body)["status"] == "compressed"
    assert server.get("/obcache/status")["counters"]["replayed_tokens"] - before <= 4 * 320


def test_the_marker_as_ordinary_tokens_is_the_marker(server: Server, model_dir: Path) -> None:
    """Clients that tokenize for themselves send its text as the tokens of its letters."""
    text = tokenizer(model_dir).decode(document(model_dir, L, "specialnames"))
    whole = generate(server, f"{text}{MARKER}\n\nIn short,")
    ids = tokenizer(model_dir)(f"{text}{MARKER}\n\nIn short,")["input_ids"]
    assert marker_id(server) not in ids
    by_tokens = generate(server, ids)
    assert report(by_tokens)["context_id"] == report(whole)["context_id"]
    assert by_tokens["output_ids"] == whole["output_ids"]
    # Where a letter of the text before or after is in one token with the marker's own, nobody can say where the context ends.
    for text in (f"What is it<{MARKER}? And why?", f"What is it?{MARKER}> And why?"):
        joined = tokenizer(model_dir)(text)["input_ids"]
        assert not {"<", ">"} <= {*tokenizer(model_dir).convert_ids_to_tokens(joined)}
        refused(server, "/generate", {"input_ids": joined}, "ordinary tokens")


def test_who_names_requests_like_others_changes_nothing(server: Server, model_dir: Path) -> None:
    """At ratio 0 a context answers as the exact cache does, whatever the requests beside its compression are called."""
    flush(server)
    prompts = [document(model_dir, L, topic) + question(model_dir, "\n\nIn short,") for topic in ("bltin-null-object", "class")]
    exact = [generate(server, prompt)["output_ids"] for prompt in prompts]
    flush(server)
    wish = {"context_len": L, "compression_ratio": 0.0}
    generate(server, prompts[1], obcache=wish)
    names = [f"obcache-job-{number}" for number in range(1, 9)]
    with ThreadPoolExecutor(10) as pool:
        hostile = [pool.submit(generate, server, prompts[1], obcache=wish, rid=name) for name in names]
        victim = pool.submit(generate, server, prompts[0], obcache=wish)
        assert victim.result()["output_ids"] == exact[0]
        assert all(each.result()["output_ids"] == exact[1] for each in hostile)
    assert generate(server, prompts[0], obcache=wish)["output_ids"] == exact[0]


@pytest.mark.long
def test_a_compression_is_not_ended_by_the_beginning_of_its_name(server: Server, model_dir: Path) -> None:
    """SGLang aborts whatever begins with the id of a request that a client aborts, also what is not the client's."""
    prompt = document(model_dir, 1500, "class") + question(model_dir, "\n\nIn short,")
    wish = {"context_len": 1500, "method": "replay", "replay_chunk": 100}
    endless = {"max_new_tokens": 200, "sampling_params": {"ignore_eos": True}}
    with ThreadPoolExecutor(2) as pool:
        victim = pool.submit(generate, server, prompt, obcache=wish, rid="victim")
        for letter in "oooo":
            hostile = pool.submit(server.request, "POST", "/generate", json={"input_ids": [5, 6], "rid": letter, **endless})
            time.sleep(0.7)
            server.request("POST", "/abort_request", json={"rid": letter})
            hostile.result()
        assert report(victim.result())["status"] == "compressed"


def test_reports_are_objects_also_in_batches_of_which_a_part_is_marked(server: Server, model_dir: Path) -> None:
    text = tokenizer(model_dir).decode(document(model_dir, L, "typesmethods"))
    params = {"temperature": 0, "max_new_tokens": 4}
    answers = server.post(
        "/generate", {"text": [f"{text}{MARKER} So", "And so", f"{text}{MARKER} But"], "sampling_params": params}
    )
    assert [isinstance(answer["meta_info"].get("obcache"), dict) for answer in answers] == [True, False, True]
    assert "obcache" not in answers[1]["meta_info"]
    body = {"model": "m", "prompt": ["And so", f"{text}{MARKER} So"], "max_tokens": 4, "temperature": 0}
    shown = server.post("/v1/completions", body)["metadata"]["obcache"]
    assert shown["status"] == "reused" and list(shown["choices"]) == ["1"]
    assert "obcache" not in (server.post("/v1/completions", {**body, "prompt": ["And", "So"]}).get("metadata") or {})


def test_an_echoed_prompt_has_no_marker(server: Server, model_dir: Path) -> None:
    text = tokenizer(model_dir).decode(document(model_dir, L, "typesmethods"))
    body = {"model": "m", "prompt": f"{text}{MARKER} So", "echo": True, "max_tokens": 4, "temperature": 0}
    assert server.post("/v1/completions", body)["choices"][0]["text"].startswith(f"{text} So")
    streamed = "".join(event["choices"][0]["text"] for event in server.stream("/v1/completions", {**body, "stream": True}))
    assert streamed.startswith(f"{text} So")


@pytest.mark.parametrize("max_new_tokens", [0, 1])
def test_streams_of_no_token_and_of_one_end_with_a_report(server: Server, model_dir: Path, max_new_tokens: int) -> None:
    prompt = document(model_dir, L, "typesfunctions") + question(model_dir, "\n\nIn short,")
    params = {"temperature": 0, "max_new_tokens": max_new_tokens, "custom_params": {"obcache": {"context_len": L}}}
    *_, last = server.stream("/generate", {"input_ids": prompt, "sampling_params": params, "stream": True})
    assert report(last)["status"] in ("compressed", "reused")
    assert last["meta_info"]["finish_reason"]["type"] == "length"


def test_a_client_that_hangs_up_before_the_first_progress_leaves_no_trace(server: Server, model_dir: Path) -> None:
    body = {"input_ids": document(model_dir, 1200, "class"), "method": "replay", "replay_chunk": 100, "stream": True}
    with pytest.raises(Exception, match="timed out"):
        server.request("POST", "/obcache/compress", json=body, timeout=0.05)
    generate(server, [5, 6])
    assert "StopAsyncIteration" not in server.log()


@pytest.mark.parametrize(
    "constraint", [{"json_schema": '{"type": "object", "properties": {"a%d": {"type": "integer"}}}'}, {"regex": "[ab]{%d}"}]
)
def test_structured_output_is_answered_from_the_context(server: Server, model_dir: Path, constraint: dict[str, str]) -> None:
    """A new grammar brings its request into the queue in the middle of a scheduling pass."""
    context = document(model_dir, L, "typesseq-mutable")
    before = server.get("/obcache/status")["counters"]
    for turn in range(3):
        params = {name: value % (turn + 2) for name, value in constraint.items()}
        prompt = context + question(model_dir, f"\n\nPoint {turn}: ")
        answer = generate(server, prompt, obcache={"context_len": L}, sampling_params=params)
        assert report(answer)["status"] == ("reused" if turn else report(answer)["status"])
        assert report(answer)["status"] in ("compressed", "reused")
    assert server.get("/obcache/status")["counters"]["exact"].get("undecided", 0) == before["exact"].get("undecided", 0)


def test_a_pause_that_retracts_leaves_contexts_in_use(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, L, "typesmodules") + question(model_dir, "\n\nIn short,")
    more = {"obcache": {"context_len": L}, "max_new_tokens": 60, "sampling_params": {"ignore_eos": True}}
    expected = generate(server, prompt, **more)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, server, prompt, **more)
        server.request("POST", "/pause_generation", json={"mode": "retract"})
        server.request("POST", "/continue_generation", json={})
        answer = running.result()
    assert report(answer)["status"] == "reused"
    assert answer["output_ids"] == expected["output_ids"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "exactly one of texts and contexts; given: none"),
        ({"texts": ["a"], "contexts": 5}, "given: texts and contexts"),
        ({"files": []}, "Unknown keys in the body of calibrate: 'files'. Allowed keys: texts, contexts"),
        ({"contexts": 4}, "contexts=4 is not a whole number from 5 to 1000"),
        ({"contexts": True}, "contexts=True is not a whole number"),
        ({"contexts": 5, "max_tokens": 127}, "max_tokens=127 is not a whole number from 128 to"),
        ({"contexts": 5, "name": "../../etc/passwd"}, "is not a plain file name"),
        ({"texts": "a text"}, "texts='a text' is not a list of texts"),
        ({"texts": [5]}, "texts[0]=5 is not a string"),
        ({"texts": ["short"]}, "texts[0] has"),
        ({"texts": [f"a{MARKER}" * 200]}, "texts[0] contains the context marker"),
        ({"texts": ["word " * 200]}, "texts has 1 parts of up to 1024 tokens. Give 5 or more"),
        ([], "The body is not a JSON object. Allowed keys: texts, contexts"),
    ],
    ids=str,
)
def test_what_gates_cannot_be_made_of_is_refused(server: Server, body: Any, words: str) -> None:
    before = server.get("/obcache/calibrate")
    response = server.request("POST", "/obcache/calibrate", json=body)
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text
    assert server.get("/obcache/calibrate") == before


def test_one_calibration_at_a_time_until_it_is_cancelled(server: Server) -> None:
    began = server.request("POST", "/obcache/calibrate", json={"contexts": 5})
    assert began.status_code == 200 and began.json()["state"] == "collecting"
    again = server.request("POST", "/obcache/calibrate", json={"contexts": 5})
    assert again.status_code == 409 and "under way" in again.json()["error"]["message"]
    assert server.request("DELETE", "/obcache/calibrate").json()["state"] == "cancelled"
    assert server.request("DELETE", "/obcache/calibrate").status_code == 404
