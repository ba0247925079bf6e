"""Nothing is marked: prefixes that prompts share are compressed where the pool would lose them. On the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server
from tests.serving.client import compressions, document, flush, generate, generate_together, question, report, tokenizer
from tests.serving.conftest import COMMON, serving
from tests.serving.test_lifetimes import wait_for

L = 400
BOUNDARY = L // 64 * 64
TOPICS = ("assignment", "binary", "calls", "class", "exprlists", "customization")
EXCLUDED = "a namespace of its own"
ASKED = ("\n\nIn short, this means that", "\n\nThe first rule above says", "\n\nFor example,", "\n\nSo we see that")


@pytest.fixture(scope="module")
def auto_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its pool holds three of the six documents."""
    flags = (*COMMON, "--max-total-tokens", "1500", "--obcache", "--obcache-mode", "auto", "--obcache-min-tokens", "128")
    flags += ("--obcache-gates", "smollm2-135m", "--obcache-compression-ratio", "0.7", "--obcache-ladder", "0.85")
    flags += ("--obcache-exclude", f"{EXCLUDED},another")
    yield from serving(model_dir, tmp_path_factory.mktemp("auto"), flags)


def prompt(model_dir: Path, topic: str, number: int) -> list[int]:
    start = tokenizer(model_dir)(f"About {topic}. ")["input_ids"]
    return [*start, *document(model_dir, L, topic)][:L] + question(model_dir, ASKED[number])


def ask(server: Server, model_dir: Path, topic: str, number: int, **fields: Any) -> dict[str, Any]:
    return generate(server, prompt(model_dir, topic, number), **fields)


def test_documents_that_the_pool_has_lost_come_back_compressed(auto_server: Server, model_dir: Path) -> None:
    flush(auto_server)
    for topic in TOPICS:  # nobody knows yet that anything is shared
        answer = report(ask(auto_server, model_dir, topic, 0))
        assert (answer["status"], answer["reason"], answer["context_tokens"]) == ("exact", "no_context", 0)
    second = [report(ask(auto_server, model_dir, topic, 1)) for topic in TOPICS]
    assert {each["status"] for each in second} <= {"exact", "compressed"} and {each["context_tokens"] for each in second} == {
        BOUNDARY
    }
    third = [ask(auto_server, model_dir, topic, 2) for topic in TOPICS]
    reused = [answer for answer in third if report(answer)["status"] == "reused"]
    assert len(reused) >= 4, "the pool holds three of them exactly, and six compressed"
    for answer in reused:
        assert report(answer)["kept_tokens"] == pytest.approx(BOUNDARY * (1 - 0.7), abs=1)
        assert answer["meta_info"]["cached_tokens"] >= BOUNDARY


def test_what_would_be_lost_is_compressed_without_being_read_again(auto_server: Server, model_dir: Path) -> None:
    flush(auto_server)
    for number in (0, 1):
        for topic in TOPICS[:2]:
            assert report(ask(auto_server, model_dir, topic, number))["status"] == "exact"
    before = auto_server.get("/obcache/status")["counters"]
    generate(auto_server, document(model_dir, 1000, "typesseq"), obcache=False)  # other text needs the room
    answers = {topic: ask(auto_server, model_dir, topic, 2) for topic in TOPICS[:2]}
    after = auto_server.get("/obcache/status")["counters"]
    assert [report(answer)["status"] for answer in answers.values()] == ["reused"] * 2
    assert after["in_place"] - before["in_place"] == after["compressions"] - before["compressions"] == 2
    # What was compressed in passing is what is compressed when somebody asks for it.
    flush(auto_server)
    for topic, answer in answers.items():
        auto_server.post("/obcache/compress", {"input_ids": prompt(model_dir, topic, 2)[:BOUNDARY]})
        again = ask(auto_server, model_dir, topic, 2)
        assert (report(again)["status"], again["output_ids"]) == ("reused", answer["output_ids"])


def test_lasting_pressure_keeps_a_part_of_what_was_kept(auto_server: Server, model_dir: Path) -> None:
    flush(auto_server)
    contexts = [prompt(model_dir, topic, 0)[:BOUNDARY] for topic in TOPICS]
    for context in contexts:
        auto_server.post("/obcache/compress", {"input_ids": context})
    before, after = [], []
    for topic in TOPICS[:2]:
        before.append(kept_positions(auto_server, ask(auto_server, model_dir, topic, 0), 0.7))
    long = document(model_dir, 1200, "typesseq")
    assert report(generate(auto_server, long))["status"] == "exact"
    answers = [ask(auto_server, model_dir, topic, 1) for topic in TOPICS[:2]]
    for answer in answers:
        after.append(kept_positions(auto_server, answer, 0.85))
    for larger, smaller in zip(before, after, strict=True):
        assert sum(map(len, smaller)) * 2 == pytest.approx(sum(map(len, larger)), rel=0.05)
        assert all(set(few) <= set(many) for few, many in zip(smaller, larger, strict=True))


def test_after_pressure_what_is_asked_about_is_exact_again(auto_server: Server, model_dir: Path) -> None:
    """It is read while nobody waits, in the place of text that was not used for longer."""
    flush(auto_server)
    for number in (0, 1):
        for topic in TOPICS[:2]:
            assert report(ask(auto_server, model_dir, topic, number))["status"] == "exact"

    def counters() -> dict[str, Any]:
        return auto_server.get("/obcache/status")["counters"]

    long = document(model_dir, 1000, "typesseq")
    generate(auto_server, long, obcache=False)
    before = counters()
    assert report(ask(auto_server, model_dir, TOPICS[0], 2))["status"] == "reused"
    wait_for(lambda: counters()["restored"] > before["restored"])
    again = ask(auto_server, model_dir, TOPICS[0], 2)
    assert (report(again)["status"], report(again)["reason"]) == ("exact", "deferred")
    assert again["meta_info"]["cached_tokens"] >= BOUNDARY, "by nobody who waits"
    assert again["output_ids"] == ask(auto_server, model_dir, TOPICS[0], 2, obcache=False)["output_ids"]
    assert report(ask(auto_server, model_dir, TOPICS[1], 2))["status"] == "reused"
    # And it yields as it did.
    generate(auto_server, long, obcache=False)
    assert report(ask(auto_server, model_dir, TOPICS[0], 2))["status"] == "reused"


def kept_positions(server: Server, answer: dict[str, Any], ratio: float) -> list[list[int]]:
    """Of each head of all layers."""
    assert (report(answer)["status"], report(answer)["compression_ratio"]) == ("reused", ratio)
    shown = server.get(f"/obcache/contexts/{report(answer)['context_id']}?positions=true")
    return [head for layer in shown["positions"] for head in layer]


def test_with_room_everything_is_what_it_was(auto_server: Server, stock_server: Server, model_dir: Path) -> None:
    flush(auto_server)
    before = compressions(auto_server)
    for number in range(3):
        for topic in TOPICS[:2]:
            answer = ask(auto_server, model_dir, topic, number)
            assert report(answer)["status"] == "exact"
            assert answer["output_ids"] == ask(stock_server, model_dir, topic, number)["output_ids"]
    assert compressions(auto_server) == before


def test_who_insists_reads_exactly(auto_server: Server, model_dir: Path) -> None:
    flush(auto_server)
    for topic in TOPICS[:2]:
        auto_server.post("/obcache/compress", {"input_ids": prompt(model_dir, topic, 0)[:BOUNDARY]})
    compressed = ask(auto_server, model_dir, TOPICS[0], 0)
    assert report(compressed)["status"] == "reused"
    exact = ask(auto_server, model_dir, TOPICS[0], 0, obcache=False)
    assert "obcache" not in exact["meta_info"] and exact["meta_info"]["prompt_tokens"] == compressed["meta_info"]["prompt_tokens"]
    # While the exact one is cached too, nobody has to put up with the other.
    again = ask(auto_server, model_dir, TOPICS[0], 0)
    assert (report(again)["status"], again["output_ids"]) == ("exact", exact["output_ids"])
    # Log-probabilities of the document cannot be had from what is left of it.
    logprobs = ask(auto_server, model_dir, TOPICS[1], 0, return_logprob=True, logprob_start_len=5)
    assert (report(logprobs)["status"], report(logprobs)["reason"]) == ("exact", "input_logprobs")


def test_tenants_share_no_prefix(auto_server: Server, model_dir: Path) -> None:
    flush(auto_server)
    for salt in ("a", "b", "c"):
        answer = ask(auto_server, model_dir, TOPICS[5], ord(salt) % 4, cache_salt=salt)
        assert report(answer)["reason"] == "no_context"


@pytest.mark.parametrize("field", ["cache_salt", pytest.param("extra_key", marks=pytest.mark.long)])
def test_a_namespace_that_is_excluded_is_served_exactly(auto_server: Server, model_dir: Path, field: str) -> None:
    flush(auto_server)
    before = compressions(auto_server)
    for number in range(3):
        for wish in (None, {"context_len": L}):
            answer = ask(auto_server, model_dir, TOPICS[4], number, obcache=wish, **{field: EXCLUDED})
            assert (report(answer)["status"], report(answer)["reason"]) == ("exact", "excluded")
    header = {"cache_salt": "X-Cache-Salt", "extra_key": "X-Extra-Key"}[field]
    body = {"input_ids": prompt(model_dir, TOPICS[4], 0)[:BOUNDARY]}
    made = auto_server.request("POST", "/obcache/compress", json=body, headers={header: EXCLUDED})
    assert "excluded" in made.text
    assert compressions(auto_server) == before
    assert EXCLUDED not in auto_server.request("GET", "/obcache/status").text


SAID = "An example of what is said there. " * 30
MESSAGES = {"messages": [{"role": "user", "content": SAID}]}
DROPPING = {
    "/api/generate": {"prompt": SAID, "stream": False, "options": {"num_predict": 2}},
    "/api/chat": {**MESSAGES, "stream": False, "options": {"num_predict": 2}},
    "/v1/messages": {**MESSAGES, "max_tokens": 2},
    "/v1/responses": {"input": SAID, "max_output_tokens": 2},
}
"""Endpoints whose models of requests drop what is said about compression and namespaces, by what they are asked."""


@pytest.mark.parametrize("path", DROPPING)
def test_who_is_excluded_or_insists_is_served_exactly_wherever_it_asks(auto_server: Server, path: str) -> None:
    body = {"model": auto_server.get("/v1/models")["data"][0]["id"], **DROPPING[path]}
    told = {
        "own": auto_server.request("POST", path, json=body),
        "excluded": auto_server.request("POST", path, json=body | {"cache_salt": EXCLUDED}),
        "insists": auto_server.request("POST", path, json=body | {"custom_params": {"obcache": False}}),
    }
    assert {each.status_code for each in told.values()} == {200}
    headers = {name: each.headers.get("X-Obcache") for name, each in told.items()}
    assert headers["own"] is not None and "excluded" not in headers["own"]
    assert headers["excluded"] is not None and "reason=excluded" in headers["excluded"]
    assert headers["insists"] is None


@pytest.mark.long
def test_a_crowd_is_answered(auto_server: Server, model_dir: Path) -> None:
    """More than fits at once: compressions go on while others decode."""
    flush(auto_server)
    wanted = [{"prompt": prompt(model_dir, topic, number), "max_new_tokens": 12} for number in range(3) for topic in TOPICS]
    answers = generate_together(auto_server, wanted)
    assert {report(answer)["status"] for answer in answers} <= {"exact", "compressed", "reused"}
    assert all(len(answer["output_ids"]) == 12 for answer in answers)
    assert compressions(auto_server) > 0


def test_chats_are_found_by_what_their_template_makes_of_them(auto_server: Server, model_dir: Path) -> None:
    flush(auto_server)
    system = tokenizer(model_dir).decode(document(model_dir, 300, "class"))
    reports = []
    for asked in ("What is a class?", "Name one rule.", "Which words are new?"):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
        body = auto_server.post("/v1/chat/completions", {"model": "default", "messages": messages, "max_tokens": 4})
        reports.append(body["metadata"]["obcache"])
    assert [each["reason"] for each in reports] == ["no_context", "deferred", "deferred"]
    assert reports[1]["context_tokens"] == reports[2]["context_tokens"] >= 256


@pytest.mark.long
def test_documents_behind_a_longer_system_prompt_hold_no_slots_for_it(auto_server: Server, model_dir: Path) -> None:
    """Every application has one, and alone its documents are shorter than what would be kept of both."""
    flush(auto_server)
    system = document(model_dir, 500, "typesseq")
    prompts = [[system + document(model_dir, 300, topic) + question(model_dir, asked) for topic in TOPICS] for asked in ASKED]
    for asked in prompts[:2]:  # from four documents on it is known what all stand behind
        for each in asked[:4]:
            generate(auto_server, each)
    flush(auto_server)
    answers = [[generate(auto_server, each) for each in asked] for asked in prompts]
    reused = [answer for answer in answers[3] if report(answer)["status"] == "reused"]
    assert len(reused) >= 4, [report(answer) for answer in answers[3]]
    exact, shared = 500 // 64 * 64, 800 // 64 * 64
    for answer in reused:
        assert report(answer)["kept_tokens"] == exact + int((shared - exact) * 0.3)
    slots = {each["slots"] for each in auto_server.get("/obcache/contexts")["contexts"] if each["state"] == "resident"}
    assert slots == {int((shared - exact) * 0.3)}
    # What was compressed in passing is what is compressed when somebody asks for it.
    flush(auto_server)
    first = answers[3].index(reused[0])
    wish = {"input_ids": prompts[3][first][:shared], "boundaries": [exact], "exact_segments": 1}
    assert auto_server.post("/obcache/compress", wish)["kept_tokens"] == report(reused[0])["kept_tokens"]
    assert generate(auto_server, prompts[3][first])["output_ids"] == reused[0]["output_ids"]
