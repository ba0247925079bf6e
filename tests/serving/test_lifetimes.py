"""Evicted, flushed, aborted, retracted, pinned, expired, deleted: nothing is lost, nothing hangs. On the real engine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server
from tests.serving.client import (
    QUESTIONS,
    compressions,
    document,
    flush,
    generate,
    generate_together,
    question,
    report,
)

L = 304  # whole pages of 16


def wish(**more: object) -> dict[str, object]:
    return {"context_len": L, **more}


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def waiting(server: Server) -> int:
    return sum(load["num_waiting_reqs"] for load in server.get("/v1/loads")["loads"])


def abort(server: Server, rid: str) -> None:
    assert server.request("POST", "/abort_request", json={"rid": rid}).status_code == 200


def test_flush_forgets_contexts_and_questions_make_them_again(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, L, "booleans") + question(model_dir, "\n\nIn short,")
    first = generate(server, prompt, obcache=wish())
    flush(server)
    assert server.get("/obcache/contexts")["contexts"] == []
    again = generate(server, prompt, obcache=wish())
    assert report(again)["status"] == "compressed"
    assert again["output_ids"] == first["output_ids"]


def both_wait(server: Server, pool: ThreadPoolExecutor, asked: list[dict[str, Any]]) -> tuple[list[Future[dict[str, Any]]], int]:
    """Both ask while the first one compresses; and how many contexts had been compressed before.

    A fast machine may be done before the second has come, or before SGLang publishes its next load: then once more.
    """
    for _ in range(20):
        flush(server)
        before = compressions(server)
        futures = [pool.submit(generate, server, **asked[0])]
        wait_for(lambda first=futures[0]: waiting(server) >= 1 or first.done())
        futures.append(pool.submit(generate, server, **asked[1]))
        wait_for(lambda first=futures[0]: waiting(server) >= 2 or first.done())
        if not futures[0].done():
            return futures, before
        futures[1].result(timeout=120)
    raise AssertionError("the first question was answered before the second one waited, 20 times")


def test_aborting_the_question_that_compresses_leaves_the_others(server: Server, model_dir: Path) -> None:
    context = document(model_dir, 2000)
    asked = [
        {"prompt": context + question(model_dir, f"\n\n{i}:"), "obcache": {"context_len": 2000}, "rid": f"aborts-{i}"}
        for i in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        futures, before = both_wait(server, pool, asked)
        abort(server, "aborts-0")
        answer = futures[1].result(timeout=120)
    assert report(answer)["status"] in ("compressed", "reused")
    assert compressions(server) == before + 1


@pytest.mark.long
def test_aborting_everyone_who_waits_ends_the_compression(server: Server, model_dir: Path) -> None:
    flush(server)
    prompt = document(model_dir, 2001) + question(model_dir, "\n\nIn short,")
    before = compressions(server)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            server.request,
            "POST",
            "/generate",
            json={
                "input_ids": prompt,
                "rid": "alone",
                "sampling_params": {"custom_params": {"obcache": {"context_len": 2001}}},
            },
        )
        wait_for(lambda: waiting(server) >= 1)
        time.sleep(0.3)
        abort(server, "alone")
        future.result(timeout=120)
    wait_for(lambda: server.get("/v1/loads")["loads"][0]["num_used_tokens"] == 0)
    assert compressions(server) == before
    assert server.get("/obcache/contexts")["contexts"] == []
    assert report(generate(server, prompt, obcache={"context_len": 2001}))["status"] == "compressed"


@pytest.mark.long
def test_deleting_a_context_waits_for_its_readers(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, L, "typesseq") + question(model_dir, "\n\nIn short,")
    expected = generate(server, prompt, obcache=wish(), max_new_tokens=60, sampling_params={"ignore_eos": True})
    identity = report(expected)["context_id"]
    answers: list[dict[str, Any]] = []
    reader = threading.Thread(
        target=lambda: answers.append(
            generate(server, prompt, obcache=wish(), max_new_tokens=60, sampling_params={"ignore_eos": True})
        )
    )
    reader.start()
    wait_for(lambda: server.get(f"/obcache/contexts/{identity}")["readers"] == 1)
    deleted = server.request("DELETE", f"/obcache/contexts/{identity}")
    reader.join()
    assert deleted.status_code == 200, deleted.text
    assert answers[0]["output_ids"] == expected["output_ids"]
    assert server.request("GET", f"/obcache/contexts/{identity}").status_code == 404
    assert report(generate(server, prompt, obcache=wish()))["status"] == "compressed"


def test_time_to_live(server: Server, model_dir: Path) -> None:
    body = {"input_ids": document(model_dir, L, "typesmapping"), "ttl_seconds": 8.0, "pin": True}
    made = server.post("/obcache/compress", body)
    assert server.get(f"/obcache/contexts/{made['id']}")["pinned"]
    wait_for(lambda: server.request("GET", f"/obcache/contexts/{made['id']}").status_code == 404, 30)


def test_an_evicted_context_comes_back(tight_server: Server, model_dir: Path) -> None:
    """Documents of 304 tokens at ratio 0.2 hold 244 slots each: the pool of 1536 cannot hold ten."""
    topics = ["numbers", "class", "strings", "calls", "with", "try", "for", "function", "import", "subscriptions"]
    prompts = [document(model_dir, L, topic) + question(model_dir, "\n\nIn short,") for topic in topics]
    w = wish(compression_ratio=0.2)
    first = [generate(tight_server, prompt, obcache=w) for prompt in prompts]
    assert {report(answer)["kept_tokens"] for answer in first} == {256}  # int(304 * 0.8) = 243, in pages of 16
    assert {report(answer)["status"] for answer in first} == {"compressed"}
    resident = tight_server.get("/obcache/contexts")["contexts"]
    assert 0 < len(resident) < len(prompts)
    gone = tight_server.request("GET", f"/obcache/contexts/{report(first[0])['context_id']}")
    assert gone.status_code == 404
    again = generate(tight_server, prompts[0], obcache=w)
    assert report(again)["status"] == "compressed"
    assert again["output_ids"] == first[0]["output_ids"]


@pytest.mark.long
def test_compressions_wait_for_each_other_before_contexts_are_evicted(tight_server: Server, model_dir: Path) -> None:
    """41 contexts of 32 slots fit into the pool of 1536 while one of them is compressed (64 and 32), not with the four of a chunk."""
    flush(tight_server)
    text = document(model_dir, 41 * 64, "class")
    bodies = [{"input_ids": text[first : first + 64], "compression_ratio": 0.5} for first in range(0, len(text), 64)]
    before = compressions(tight_server)
    with ThreadPoolExecutor(len(bodies)) as pool:
        made = list(pool.map(lambda body: tight_server.post("/obcache/compress", body), bodies))
    assert [each["kept_tokens"] for each in made] == [32] * len(bodies)
    assert compressions(tight_server) - before == len(bodies)
    resident = [each for each in tight_server.get("/obcache/contexts")["contexts"] if each["state"] == "resident"]
    assert len(resident) == len(bodies)


@pytest.mark.long
def test_answered_questions_yield_before_idle_contexts(tight_server: Server, model_dir: Path) -> None:
    """Ten different questions leave more in the pool of 1536 than it has; the context that nobody asks meanwhile is older."""
    idle, asked = (document(model_dir, L, topic) for topic in ("numbers", "class"))
    w = wish(compression_ratio=0.8)
    flush(tight_server)
    assert report(generate(tight_server, idle + question(model_dir, QUESTIONS[0]), obcache=w))["status"] == "compressed"
    endings = document(model_dir, 1600, "strings")
    for first in range(0, 1600, 160):
        generate(tight_server, asked + endings[first : first + 160], obcache=w)
    assert report(generate(tight_server, idle + question(model_dir, QUESTIONS[1]), obcache=w))["status"] == "reused"


def test_a_pool_too_small_for_the_compression_serves_exactly(tight_server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, 1000, "class") + question(model_dir, "\n\nIn short,")
    w = {"context_len": 1000, "compression_ratio": 0.1}
    exact = generate(tight_server, prompt)
    answer = generate(tight_server, prompt, obcache=w)
    assert report(answer)["status"] == "exact"
    assert report(answer)["reason"] == "pool_too_small"
    assert answer["output_ids"] == exact["output_ids"]


def test_pinned_contexts_yield_before_anything_hangs(tight_server: Server, model_dir: Path) -> None:
    flush(tight_server)
    made = [
        tight_server.post("/obcache/compress", {"input_ids": document(model_dir, L, t), "pin": True, "compression_ratio": 0.2})
        for t in ("numbers", "class", "strings", "calls")
    ]
    assert [m["pinned"] for m in made] == [True, True, True, False]  # 3 x 256 slots are half of the pool
    long = generate(tight_server, document(model_dir, 1300, "formatstrings"), max_new_tokens=4)
    assert len(long["output_ids"]) == 4
    flush(tight_server)


@pytest.mark.long
def test_retracted_requests_answer_as_if_alone(tight_server: Server, model_dir: Path) -> None:
    """SGLang retracts one of several decoding requests every 40 steps here, as it does when the pool is full."""
    context = document(model_dir, L, "exceptions")
    asked = [
        {
            "prompt": context + question(model_dir, f"\n\nPoint {i}:"),
            "obcache": wish(),
            "max_new_tokens": 48,
            "sampling_params": {"ignore_eos": True},
        }
        for i in range(4)
    ]
    alone = [generate(tight_server, **request) for request in asked]
    together = generate_together(tight_server, asked)
    assert any(answer["meta_info"]["num_retractions"] > 0 for answer in together)
    for one, two, request in zip(alone, together, asked, strict=True):
        assert two["output_ids"] == one["output_ids"]
        assert two["meta_info"]["prompt_tokens"] == len(request["prompt"])
        assert report(two)["status"] == "reused"


REPLAY = {"method": "replay", "replay_chunk": 200}


def progress(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `POST /obcache/compress` streams; closing it is what a client does that hangs up."""
    with server.request("POST", "/obcache/compress", json={**body, "stream": True}, stream=True) as response:
        assert response.status_code == 200, response.text
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def used_slots(server: Server) -> int:
    return server.get("/v1/loads")["loads"][0]["num_used_tokens"]


@pytest.mark.long
def test_a_replay_shows_its_progress(server: Server, model_dir: Path) -> None:
    flush(server)
    length = 2003
    before = server.get("/obcache/status")["counters"]
    *steps, made = progress(server, {"input_ids": document(model_dir, length, "class"), **REPLAY})
    assert made["status"] == "compressed"
    counts = [step["progress"]["tokens"] for step in steps]
    totals = {step["progress"]["of"] for step in steps} - {0}
    assert counts == sorted(counts)
    (total,) = totals
    after = server.get("/obcache/status")["counters"]
    replayed = after["replayed_tokens"] - before["replayed_tokens"]
    assert total == length + replayed > 2 * length
    assert any(length < count <= total for count in counts)
    assert 0 < after["replay_seconds"] - before["replay_seconds"] < made["seconds"]
    refused = server.request("POST", "/obcache/compress", json={"text": "x", "method": "nonsense", "stream": True})
    assert refused.status_code == 400
    assert "nonsense" in refused.text


@pytest.mark.long
def test_hanging_up_in_the_middle_of_a_replay_ends_it(server: Server, model_dir: Path) -> None:
    flush(server)
    # Fifty passes: far from the last one, which is let finish, when its client is gone.
    body = {"input_ids": document(model_dir, 2005, "class"), **REPLAY, "replay_chunk": 40}
    before = compressions(server)
    stream = progress(server, body)
    for step in stream:
        if step["progress"]["tokens"] > 2005:
            break
    stream.close()
    wait_for(lambda: used_slots(server) == 0)
    assert compressions(server) == before
    assert server.get("/obcache/contexts")["contexts"] == []
    assert server.post("/obcache/compress", body | REPLAY)["status"] == "compressed"


@pytest.mark.long
def test_a_flush_in_the_middle_of_a_replay_waits_for_it(server: Server, model_dir: Path) -> None:
    flush(server)
    stream = progress(server, {"input_ids": document(model_dir, 1207, "class"), **REPLAY})
    for step in stream:
        if step["progress"]["tokens"] > 1207:
            break
    flush(server)
    *_, made = stream
    assert made["status"] == "compressed"
    assert used_slots(server) == 0
    assert server.get("/obcache/contexts")["contexts"] == []


@pytest.mark.long
@pytest.mark.parametrize("attention", ["whole", "local"])
def test_a_replay_whose_exact_cache_is_evicted_reads_it_again(tight_server: Server, model_dir: Path, attention: str) -> None:
    """Between local passes it is not evicted."""
    flush(tight_server)
    context = document(model_dir, L, "exceptions")
    settings = wish(method="replay", replay_chunk=40, replay_attention=attention)
    asked = {"prompt": context + question(model_dir, "\n\nIn short,"), "obcache": settings}
    alone = generate(tight_server, **asked)
    flush(tight_server)
    # Each of these wants most of the pool, so that nothing that is not in use stays in it.
    others = [{"prompt": document(model_dir, 900 + i, "class"), "max_new_tokens": 30} for i in range(4)]
    answer, *_ = generate_together(tight_server, [asked, *others])
    assert report(answer)["status"] == "compressed"
    assert answer["output_ids"] == alone["output_ids"]
