"""Many requests, more contexts than the pool holds, and clients that hang up: no leak, no wrong answer, no hang."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from obcache_sglang.local_server import Server, serve
from tests.serving.client import document, flush, generate, question, report
from tests.serving.conftest import COMMON, STRICT, checked

L = 304
NUM_CONTEXTS = 12
NUM_REQUESTS = 300
BUDGETS = ("uniform", "adakv", "global")
TOPICS = (
    "exceptions",
    "formatstrings",
    "calls",
    "numbers",
    "class",
    "debugger",
    "binary",
    "naming",
    "booleans",
    "import",
    "with",
    "try",
)


@pytest.mark.long
def test_a_pool_of_four_contexts_serves_twelve_with_random_aborts(model_dir: Path, tmp_path: Path) -> None:
    # A context keeps 96 slots, its questions need about 40 more, and a compression needs 400 for a moment.
    flags = (
        *COMMON,
        "--max-total-tokens",
        "800",
        "--page-size",
        "16",
        "--chunked-prefill-size",
        "256",
        "--max-running-requests",
        "4",
    )
    flags += ("--obcache", "--obcache-min-tokens", "32", "--obcache-method", "snapkv")
    with serve(model_dir, tmp_path / "log", flags, STRICT) as server:
        for _ in checked(server):
            run(server, model_dir)


def run(server: Server, model_dir: Path) -> None:
    contexts = [document(model_dir, L, topic) for topic in TOPICS[:NUM_CONTEXTS]]

    def request(context: int, which: int) -> dict[str, Any]:
        wish = {"context_len": L, "budget": BUDGETS[context % 3]}
        return {"prompt": contexts[context] + question(model_dir, f"\n\nPoint {which}:"), "obcache": wish, "max_new_tokens": 8}

    chosen = random.Random(7)
    asked = [(chosen.randrange(NUM_CONTEXTS), chosen.randrange(3)) for _ in range(NUM_REQUESTS)]
    aborted = set(chosen.sample(range(NUM_REQUESTS), NUM_REQUESTS // 10))
    alone = {key: generate(server, **request(*key)) for key in sorted(set(asked))}
    assert all(report(answer)["status"] != "exact" for answer in alone.values())

    def ask(index: int) -> dict[str, Any] | None:
        if index not in aborted:
            return generate(server, **request(*asked[index]))
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(server.request, "POST", "/generate", json=body(request(*asked[index]), f"soak-{index}-"))
            time.sleep(0.05 * (index % 20))
            assert server.request("POST", "/abort_request", json={"rid": f"soak-{index}-"}).status_code == 200
            future.result()
        return None

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(NUM_REQUESTS)))
    wrong = [
        (key, report(answer))
        for key, answer in zip(asked, answers, strict=True)
        if answer is not None and report(answer)["status"] != "exact" and answer["output_ids"] != alone[key]["output_ids"]
    ]
    assert not wrong
    exact = sum(answer is not None and report(answer)["status"] == "exact" for answer in answers)
    assert exact < NUM_REQUESTS // 10  # the pool may be too full for a compression at times, not as a rule
    assert [load["num_waiting_reqs"] for load in server.get("/v1/loads")["loads"]] == [0]


def body(request: dict[str, Any], rid: str) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": request["max_new_tokens"], "custom_params": {"obcache": request["obcache"]}}
    return {"input_ids": request["prompt"], "sampling_params": params, "rid": rid}


SOAK_REQUESTS = int(os.environ.get("OBCACHE_SOAK_REQUESTS", "10000"))
"""Of the long soak; a quarter of a second each, or more on a busy machine."""

SCHEMA = json.dumps({"type": "object", "properties": {"point": {"type": "integer"}}, "required": ["point"]})


@pytest.fixture
def shallow_model(model_dir: Path, tmp_path: Path) -> Path:
    """The first layers of the small model: what is soaked is the engine's book-keeping, which costs the same, not its arithmetic."""
    shallow = tmp_path / "model"
    shallow.mkdir()
    for file in model_dir.iterdir():
        (shallow / file.name).symlink_to(file)
    config = json.loads((model_dir / "config.json").read_text())
    (shallow / "config.json").unlink()
    (shallow / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    return shallow


@pytest.mark.long
def test_overlap_retraction_mixed_chunks_and_structured_output_together(
    model_dir: Path, shallow_model: Path, tmp_path: Path
) -> None:
    """Decode steps run in the batches of prefill chunks, and one request is retracted every 60 steps; the pool holds half the contexts."""
    flags = (
        *COMMON,
        "--max-total-tokens",
        "640",
        "--chunked-prefill-size",
        "64",
        "--enable-mixed-chunk",
        "--max-running-requests",
        "8",
    )
    flags += ("--grammar-backend", "xgrammar", "--obcache", "--obcache-min-tokens", "32", "--obcache-method", "snapkv")
    env = {**STRICT, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "60"}
    with serve(shallow_model, tmp_path / "log", flags, env) as server:
        for _ in checked(server):
            run_all_kinds(server, model_dir, SOAK_REQUESTS)


def run_all_kinds(server: Server, model_dir: Path, num_requests: int) -> None:
    chosen = random.Random(11)
    contexts = [document(model_dir, 80 + 3 * i, topic) for i, topic in enumerate(TOPICS)]
    kinds: dict[str, dict[str, Any]] = {
        "text": {},
        "json": {"json_schema": SCHEMA},
        "regex": {"regex": "(yes|no), [a-z ]{1,20}"},
        "unmarked": {},
    }

    def request(context: int, which: int, kind: str) -> dict[str, Any]:
        tokens = contexts[context]
        wish: Any = {"context_len": len(tokens), "budget": BUDGETS[context % 3], "pin": context == 0}
        return {
            "prompt": tokens + question(model_dir, f"\n\nPoint {which}:"),
            "obcache": False if kind == "unmarked" else wish,
            "max_new_tokens": 12,
            "sampling_params": kinds[kind],
        }

    all_keys = [(c, which, kind) for c in range(len(contexts)) for which in range(2) for kind in kinds]
    answers = {key: generate(server, **request(*key)) for key in all_keys}
    assert all(status_of(answer) != "exact" for key, answer in answers.items() if key[2] != "unmarked")
    alone = {key: answer["output_ids"] for key, answer in answers.items()}
    read_exactly = {key: generate(server, **{**request(*key), "obcache": False})["output_ids"] for key in all_keys}
    asked = [chosen.choice(all_keys) for _ in range(num_requests)]
    fates = chosen.choices(("answered", "aborted", "hung up", "new grammar"), (80, 6, 6, 8), k=num_requests)

    def ask(index: int) -> str | None:
        """What is wrong with the answer."""
        key, fate = asked[index], fates[index]
        wanted = request(*key)
        if fate == "new grammar":  # each is compiled while others run, and comes into the queue in the middle of a pass
            pattern = f"({index}|[a-z ]{{1,12}})"
            answer = generate(server, **{**wanted, "sampling_params": {"regex": pattern}})
            fits = re.fullmatch(pattern, answer["text"])
            return None if fits and status_of(answer) != "undecided" else f"{key} {pattern}: {answer}"
        if fate == "aborted":
            with ThreadPoolExecutor(1) as pool:
                future = pool.submit(server.request, "POST", "/generate", json=body(wanted, f"soak-{index}-"))
                time.sleep(0.03 * (index % 20))
                assert server.request("POST", "/abort_request", json={"rid": f"soak-{index}-"}).status_code == 200
                future.result()
            return None
        if fate == "hung up":
            with contextlib.suppress(requests.Timeout):
                server.request("POST", "/generate", json=body(wanted, f"soak-{index}-"), timeout=0.05 * (1 + index % 20))
            return None
        answer = generate(server, **wanted)
        status = status_of(answer)
        if status == "undecided":
            return f"{key}: undecided"
        expected = (read_exactly if status == "exact" else alone)[key]
        if answer["output_ids"] != expected:
            return f"{key}: {status} {answer['output_ids']}, alone {expected}"
        if status == "exact" and key[2] != "unmarked":
            exact.append(index)
        return None

    exact: list[int] = []
    wrong = []
    with ThreadPoolExecutor(10) as pool:
        for index, each in enumerate(pool.map(ask, range(num_requests))):
            if index % 500 == 0:
                print(f"soak: {index} of {num_requests}", flush=True)
            if each is not None:
                wrong.append(each)
    assert not wrong, wrong[:20]
    assert len(exact) < num_requests // 5
    flush(server)
    (load,) = server.get("/v1/loads")["loads"]
    assert (load["num_waiting_reqs"], load["num_running_reqs"], load["num_used_tokens"]) == (0, 0, 0)


def status_of(answer: dict[str, Any]) -> str:
    """compressed | reused | exact, or the reason where no decision was taken; exact too for a request without compression."""
    found = answer["meta_info"].get("obcache", {})
    return "undecided" if found.get("reason") == "undecided" else found.get("status", "exact")
