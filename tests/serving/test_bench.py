"""`python -m obcache_sglang.bench` with real servers, small; the arm of KVPress installs an environment, which is long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.bench.__main__ import main
from obcache_sglang.bench.kvpress import Kvpress, KvpressArm, ensure_environment
from obcache_sglang.bench.served import STOCK
from obcache_sglang.bench.workload import make_workload
from tests.serving.client import tokenizer

TOKENS, DOCUMENTS, QUESTIONS, SHARE = 320, 8, 3, 0.53


@pytest.fixture(scope="module")
def measured(model_dir_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    size = ["--documents", str(DOCUMENTS), "--tokens", str(TOKENS), "--questions", str(QUESTIONS), "--pool-share", str(SHARE)]
    more = ["--arms", "tova/obcache-v/uniform@0.85", "replay/obcache-v/global@0.85", "--rounds", "1", "--clients", "1"]
    assert main([str(model_dir_bf16), "--output", str(folder), *size, *more, "--answer-tokens", "4"]) == 0
    assert (folder / "bench.md").read_text().count("\n| ") > 6
    return json.loads((folder / "bench.json").read_text())


def test_a_pool_that_holds_half_exactly_holds_all_compressed(measured: dict[str, Any]) -> None:
    (point,) = measured["points"]
    stock, tova, replay = point["rounds"]
    assert (stock["arm"], tova["arm"]) == (STOCK, "tova/obcache-v/uniform@0.85")
    exact = stock["slots"]
    assert TOKENS <= exact < TOKENS + 50
    assert point["pool_slots"] == pytest.approx(SHARE * DOCUMENTS * exact, abs=50)
    assert tova["resident"] == DOCUMENTS
    assert tova["slots"] == replay["slots"] == pytest.approx(0.15 * exact, abs=1)
    # Each document was read once, all later questions found it.
    assert tova["hit_rate"] > 0.5 > stock["hit_rate"]
    assert 1 <= stock["resident"] <= DOCUMENTS * SHARE
    assert stock["prefilled_tokens"] > 1.4 * tova["prefilled_tokens"]
    assert replay["prefilled_tokens"] > tova["prefilled_tokens"] + DOCUMENTS * TOKENS
    for each in (stock, tova, replay):
        assert each["questions"] == DOCUMENTS * QUESTIONS
        assert 0 < each["first_token_median"] <= each["first_token_p99"]
        assert each["output_tokens_per_second"] <= 4 * each["questions_per_second"] * 1.001
    assert stock["accuracy"] > 0.2


def test_what_compression_costs_is_measured(measured: dict[str, Any]) -> None:
    (point,) = measured["points"]
    tova, replay = point["costs"]
    for cost in (tova, replay):
        assert 0 < cost["scoring_seconds"] < cost["seconds"]
        assert cost["read_seconds"] > 0
    assert replay["seconds"] > tova["seconds"]


@pytest.mark.long
@pytest.mark.parametrize("grouped", [False, True])
def test_kvpress_answers_the_same_questions(model_dir_bf16: Path, tmp_path: Path, grouped: bool) -> None:
    python = ensure_environment(Path(".cache", "obcache_sglang", "kvpress-venv"))
    words = tokenizer(model_dir_bf16)
    workload = make_workload(words, documents=2, tokens=400, questions=4, seed=0, answer_tokens=8)
    with Kvpress.running(python, str(model_dir_bf16), "snapkv", 0.0, tmp_path / "log") as kvpress:
        assert kvpress.versions["kvpress"] == "0.5.5"
        arm = KvpressArm(kvpress, "kvpress", workload, words, 8, grouped=grouped)
        got = arm.run(0, arm.part(workload.order(0)), lambda: None)
    assert got.questions == 8
    assert got.accuracy >= 0.25
    # The pipeline reads the same tokens as a server: it holds all of the document's, and nothing of the questions.
    assert got.slots == workload.context_tokens / 2
