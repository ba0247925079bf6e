"""Prompts that say where several segments end: system prompt, document, turns of a conversation. On the real engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server
from tests.serving.client import MARKER, NEW_TOKENS, compressions, document, flush, generate, generate_together, report, tokenizer
from tests.serving.conftest import COMMON, serving
from tests.serving.test_segments import prefilled_tokens

TOPICS = ("naming", "binary", "calls")

# ChatML, with tools where most templates write them.
TEMPLATE = """{% if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def gate_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("gates")
    template = folder / "tools.jinja"
    template.write_text(TEMPLATE)
    flags = (*COMMON, "--chat-template", str(template), "--max-total-tokens", "8192", "--chunked-prefill-size", "512")
    flags += ("--obcache", "--obcache-min-tokens", "32")
    flags += ("--obcache-gates", "smollm2-135m", "--obcache-compression-ratio", "0.6")
    yield from serving(model_dir, folder, flags)


def test_a_system_prompt_is_read_once_for_all_documents_behind_it(gate_server: Server, model_dir: Path) -> None:
    words = tokenizer(model_dir)
    system, *documents = (words.decode(document(model_dir, 200, topic)) for topic in TOPICS)
    flush(gate_server)
    turns = []
    for text in documents:
        before = prefilled_tokens(gate_server)
        answer = generate(gate_server, f"{system}{MARKER}{text}{MARKER}\n\nIn short,")
        assert report(answer)["status"] == "compressed"
        turns.append(prefilled_tokens(gate_server) - before)
    system_tokens = len(words(system)["input_ids"])
    assert turns[1] < turns[0] - system_tokens + 20
    # The system prompt is a context by itself, and the answer does not depend on who came first.
    alone = generate(gate_server, f"{system}{MARKER}\n\nIn short,")
    assert (report(alone)["status"], report(alone)["context_tokens"]) == ("reused", system_tokens)
    flush(gate_server)
    again = generate(gate_server, f"{system}{MARKER}{documents[1]}{MARKER}\n\nIn short,")
    assert again["output_ids"] == answer["output_ids"]


def chat_turn(server: Server, messages: list[dict[str, str]], asked: str) -> tuple[int, dict[str, Any]]:
    """(tokens that were prefilled, the answer) of one turn, which ends with a marker of its own; messages grow by it."""
    messages.append({"role": "user", "content": asked + MARKER + "\n\nIs that so?"})
    before = prefilled_tokens(server)
    answer = server.post("/v1/chat/completions", {"model": "default", "messages": messages, "max_tokens": NEW_TOKENS})
    messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    return prefilled_tokens(server) - before, answer


def test_a_turn_of_a_chat_costs_its_own_tokens(gate_server: Server, model_dir: Path) -> None:
    """The client leaves its markers where they were, and puts one more at the end of each turn."""
    words = tokenizer(model_dir)
    flush(gate_server)
    messages = [{"role": "system", "content": words.decode(document(model_dir, 300, "class")) + MARKER}]
    turns, cached = [], []
    for topic in ("exceptions", "numbers", "with", "try"):
        prefilled, answer = chat_turn(gate_server, messages, words.decode(document(model_dir, 150, topic)))
        turns.append(prefilled)
        found = answer["metadata"]["obcache"]
        cached.append((found["status"], found["context_tokens"], answer["usage"]["prompt_tokens"]))
    assert [status for status, _, _ in cached] == ["compressed"] * 4
    # The whole history would be 1,000 tokens in the last turn.
    assert max(turns[1:]) < 260 and cached[-1][2] > 900, (turns, cached)


@pytest.mark.long
def test_thirty_turns_cost_what_each_of_them_says(gate_server: Server, model_dir: Path) -> None:
    """Prints what each turn prefilled and took: `-s` shows it."""
    words = tokenizer(model_dir)
    flush(gate_server)
    text = document(model_dir, 30 * 150 + 300, "class")
    messages = [{"role": "system", "content": words.decode(text[:300]) + MARKER}]
    prefilled, compressed = [], compressions(gate_server)
    for turn in range(30):
        started_at = time.perf_counter()
        tokens_read, answer = chat_turn(gate_server, messages, words.decode(text[300 + 150 * turn : 450 + 150 * turn]))
        seconds = time.perf_counter() - started_at
        prefilled.append(tokens_read)
        tokens, found = answer["usage"]["prompt_tokens"], answer["metadata"]["obcache"]
        print(f"turn {turn + 1}: {tokens} tokens, {found['kept_tokens']} kept, {tokens_read} prefilled, {seconds:.2f} s")
        assert found["status"] == "compressed"
    assert compressions(gate_server) - compressed == 30 and tokens > 4500
    assert max(prefilled[20:]) < 1.2 * max(prefilled[1:10])


def test_every_breakpoint_ends_a_segment(gate_server: Server, model_dir: Path) -> None:
    """Anthropic's clients mark the system prompt and the document: the first is read once for all documents."""
    flush(gate_server)
    words = tokenizer(model_dir)
    system, *documents = (words.decode(document(model_dir, 200, topic)) for topic in TOPICS)
    mark = {"cache_control": {"type": "ephemeral"}}
    made = []
    for text in documents:
        content = [{"type": "text", "text": text, **mark}, {"type": "text", "text": "In short?"}]
        body = {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
        body["system"] = [{"type": "text", "text": system, **mark}]
        answer = gate_server.request("POST", "/v1/messages", json=body)
        assert answer.status_code == 200 and answer.headers["X-Obcache"].startswith("compressed"), answer.headers
        made.append(answer.json()["usage"]["cache_creation_input_tokens"])
    assert made[1] < made[0] - 150, "the system prompt is compressed already"
    contexts = gate_server.get("/obcache/contexts")["contexts"]
    assert len(contexts) == 3 and sorted(len(each["settings"]["boundaries"]) for each in contexts) == [0, 1, 1]


def test_a_breakpoint_on_a_tool_ends_a_context(gate_server: Server, model_dir: Path) -> None:
    flush(gate_server)
    text = tokenizer(model_dir).decode(document(model_dir, 250, "class"))
    schema = {"type": "object", "properties": {"word": {"type": "string"}}}
    tools = [{"name": "look_up", "description": text, "input_schema": schema, "cache_control": {"type": "ephemeral"}}]
    headers = []
    for asked in ("What is a class?", "Name one rule."):
        body = {"model": "default", "max_tokens": 4, "tools": tools, "messages": [{"role": "user", "content": asked}]}
        answer = gate_server.request("POST", "/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
        headers.append(dict(part.split("=") for part in answer.headers["X-Obcache"].split("; ")[1:]))
        headers[-1]["status"] = answer.headers["X-Obcache"].split(";")[0]
    assert [each["status"] for each in headers] == ["compressed", "reused"]
    assert headers[0]["id"] == headers[1]["id"] and int(headers[0]["kept"].split("/")[1]) > 250
    # A marker that a client puts there itself is a mistake, as ever.
    body = {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": MARKER + "And?"}]}
    assert gate_server.request("POST", "/v1/messages", json=body).status_code == 400


def test_instructions_may_stay_exact(gate_server: Server, model_dir: Path) -> None:
    flush(gate_server)
    words = tokenizer(model_dir)
    system, text = (words.decode(document(model_dir, 200, topic)) for topic in TOPICS[:2])
    prompt = f"{system}{MARKER}{text}{MARKER}\n\nIn short,"
    answer = generate(gate_server, prompt, obcache={"exact_segments": 1})
    found = report(answer)
    first = len(words(system)["input_ids"])
    assert found["kept_tokens"] == first + int((found["context_tokens"] - first) * 0.4)
    positions = gate_server.get(f"/obcache/contexts/{found['context_id']}?positions=true")["positions"]
    assert all(head[:first] == list(range(first)) for layer in positions for head in layer)
    # A whole context that stays exact answers as the exact prompt does.
    flush(gate_server)
    alone = {"exact_segments": 2, "boundaries": [first, found["context_tokens"] - 1], "context_len": found["context_tokens"]}
    ids = words(f"{system}{text}\n\nIn short,")["input_ids"]
    kept = generate(gate_server, ids, obcache=alone)
    exact = generate(gate_server, ids, obcache=False)
    assert report(kept)["kept_tokens"] == found["context_tokens"] and kept["output_ids"] == exact["output_ids"]
    # Without anything after it, it needs no context.
    only = generate(gate_server, f"{system}{MARKER}\n\nIn short,", obcache={"exact_segments": 1})
    assert (report(only)["status"], report(only)["reason"]) == ("exact", "exact_segments")


@pytest.mark.long
def test_a_system_prompt_that_stays_exact_holds_its_slots_once(gate_server: Server, model_dir: Path) -> None:
    """Whoever comes first, and whether somebody has asked with nothing but the system prompt before."""
    words = tokenizer(model_dir)
    system, *documents = (words.decode(document(model_dir, 300, topic)) for topic in (*TOPICS, "class"))
    prompts = [f"{system}{MARKER}{text}{MARKER}\n\nIn short," for text in documents]
    asked = [{"prompt": prompt, "obcache": {"exact_segments": 1}, "max_new_tokens": 12} for prompt in prompts]
    flush(gate_server)
    alone = []
    for each in asked:
        alone.append(generate(gate_server, **each)["output_ids"])
        flush(gate_server)
    before = prefilled_tokens(gate_server)
    together = generate_together(gate_server, asked)
    assert [each["output_ids"] for each in together] == alone
    assert {report(each)["status"] for each in together} == {"compressed"}
    system_tokens, kept = len(words(system)["input_ids"]), [report(each)["kept_tokens"] for each in together]
    contexts = gate_server.get("/obcache/contexts")["contexts"]
    assert sorted(each["slots"] for each in contexts) == sorted(each - system_tokens for each in kept)
    lengths = [len(words(text)["input_ids"]) for text in (system, *documents)]
    assert prefilled_tokens(gate_server) - before < sum(lengths) + 60, "it is read once"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_the_newest_turns_of_a_chat_stay_exact(gate_server: Server, model_dir: Path, path: str) -> None:
    """The client marks nothing, and says how many."""
    words = tokenizer(model_dir)
    flush(gate_server)
    text = document(model_dir, 1000, "class")
    system, messages = words.decode(text[:200]), []
    prefilled, found = [], []
    for turn in range(4):
        messages.append({"role": "user", "content": words.decode(text[200 * turn + 200 : 200 * turn + 400])})
        body = {"model": "default", "max_tokens": NEW_TOKENS, "temperature": 0, "messages": messages}
        if path == "/v1/messages":
            body["system"] = system
        else:
            body["messages"] = [{"role": "system", "content": system}, *messages]
        before = prefilled_tokens(gate_server)
        custom_params = {"obcache": {"keep_last_turns": 2, "segment_ratios": [0.0]}}
        answer = gate_server.request("POST", path, json={**body, "custom_params": custom_params})
        assert answer.status_code == 200, answer.text
        prefilled.append(prefilled_tokens(gate_server) - before)
        found.append(answer.headers["X-Obcache"])
        said = answer.json()
        said = said["content"][0]["text"] if path == "/v1/messages" else said["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": said})
    # First nothing is before the newest two, then the system prompt, which stays exact, then one turn more each time.
    assert found[0] == "exact; reason=no_context" and found[1] == "exact; reason=exact_segments"
    kept = [dict(part.split("=") for part in each.split("; ")[1:])["kept"].split("/") for each in found[2:]]
    (first, second), system_tokens = ([*map(int, each)] for each in kept), len(words(system)["input_ids"])
    assert found[2].startswith("compressed") and found[3].startswith("compressed")
    for slots, tokens in (first, second):
        assert slots < system_tokens + 0.45 * (tokens - system_tokens)
    assert 200 < second[1] - first[1] < 260
    # The turn that left the newest two is read again, after what is compressed; and they, after it.
    assert max(prefilled[1:]) < 3 * 260, prefilled


def test_each_marker_says_its_segments_ratio(gate_server: Server, model_dir: Path) -> None:
    words = tokenizer(model_dir)
    system, *documents = (words.decode(document(model_dir, 200, topic)) for topic in TOPICS)
    flush(gate_server)
    first, second = (len(words(text)["input_ids"]) for text in documents)
    prompt = "<|obcache:ratio=0|>".join([system, documents[0]]) + "<|obcache:ratio=0.5|>" + documents[1]
    answers = [generate(gate_server, f"{prompt}<|obcache:ratio=0.9|>\n\n{asked}") for asked in ("In short,", "So?")]
    assert [report(each)["status"] for each in answers] == ["compressed", "reused"]
    own = len(words(system)["input_ids"])
    assert report(answers[0])["kept_tokens"] == own + int(first * 0.5) + int(second * (1 - 0.9))
    found = gate_server.get(f"/obcache/contexts/{report(answers[0])['context_id']}?positions=true")
    heads = [head for layer in found["positions"] for head in layer]
    counts = [sum(low <= position < high for head in heads for position in head) for low, high in ((0, own), (own, own + first))]
    assert counts == [own * len(heads), int(first * 0.5) * len(heads)]
    assert found["settings"]["segment_ratios"] == [0.0, 0.5, 0.9]
