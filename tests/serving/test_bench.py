"""`python -m obcache_sglang.bench` with real servers, small; the arm of KVPress installs an environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.bench.__main__ import main
from obcache_sglang.bench.kvpress import Kvpress, KvpressArm, ensure_environment
from obcache_sglang.bench.workload import make_workload
from tests.serving.client import tokenizer

pytestmark = pytest.mark.long

TOKENS, DOCUMENTS, QUESTIONS, SHARE = 320, 6, 3, 0.53


def measure(model_dir: Path, folder: Path, *more: str) -> dict[str, Any]:
    size = ["--documents", str(DOCUMENTS), "--tokens", str(TOKENS), "--questions", str(QUESTIONS), "--pool-share", str(SHARE)]
    arms = ["--arms", "tova/obcache-v/uniform@0.85", "replay/obcache-v/global@0.85", "--rounds", "1", "--clients", "1"]
    arms += ["--server-flags", "--dtype float32"]  # 16 bits are tens of times slower where a CPU has no arithmetic for them
    assert main([str(model_dir), "--output", str(folder), *size, *arms, "--output-tokens", "4", *more]) == 0
    assert (folder / "bench.md").read_text().count("\n| ") > 6
    return json.loads((folder / "bench.json").read_text())


@pytest.fixture(scope="module")
def measured(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(model_dir, tmp_path_factory.mktemp("bench"), "--stock", "fcfs", "--policies", "fcfs")


@pytest.fixture(scope="module")
def measured_with_all(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arms = ["--stock", "fcfs", "lpm/fp8", "--policies", "fcfs", "lpm", "--bench-serving", "4"]
    return measure(model_dir, tmp_path_factory.mktemp("bench"), *arms)


def test_a_pool_that_holds_half_exactly_holds_all_compressed(measured: dict[str, Any]) -> None:
    (point,) = measured["points"]
    stock, tova, replay = point["rounds"]
    assert (stock["arm"], tova["arm"]) == ("stock/fcfs", "tova/obcache-v/uniform@0.85")
    assert point["stock"] == [point["best_stock"]] == ["stock/fcfs"]
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
        check_latencies(each)
    assert stock["accuracy"] > 0.2


def check_latencies(measured: dict[str, Any]) -> None:
    assert measured["questions"] == DOCUMENTS * QUESTIONS
    latencies = measured["latencies"]
    assert 0 < latencies["median_ttft_ms"] <= latencies["p99_ttft_ms"]
    assert latencies["median_ttft_ms"] < latencies["median_e2e_latency_ms"]
    assert latencies["median_tpot_ms"] > 0
    assert measured["output_tokens_per_second"] == pytest.approx(4 * measured["questions_per_second"])


def test_what_compression_costs_is_measured(measured: dict[str, Any]) -> None:
    (point,) = measured["points"]
    tova, replay = point["costs"]
    for cost in (tova, replay):
        assert 0 < cost["scoring_seconds"] < cost["seconds"]
        assert cost["read_seconds"] > 0
    assert replay["seconds"] > tova["seconds"]


def test_both_policies_and_a_small_cache_are_arms(measured_with_all: dict[str, Any]) -> None:
    (point,) = measured_with_all["points"]
    stock, fp8, tova, replay, tova_lpm, replay_lpm = point["rounds"]
    assert point["stock"] == ["stock/fcfs", "stock/lpm/fp8"]
    assert point["best_stock"] in point["stock"]
    # Twice the tokens in the same bytes.
    assert fp8["resident"] > stock["resident"]
    assert fp8["prefilled_tokens"] < stock["prefilled_tokens"]
    # One client leaves no order to choose: the policy changes nothing.
    for ours, ordered in ((tova, tova_lpm), (replay, replay_lpm)):
        assert ordered["arm"] == f"{ours['arm']}, lpm"
        for figure in ("resident", "slots", "prefilled_tokens"):
            assert ordered[figure] == ours[figure]
    for each in point["rounds"]:
        check_latencies(each)


def test_bench_serving_itself_sees_what_the_bench_sees(measured_with_all: dict[str, Any]) -> None:
    runs = {run["arm"]: run["result"] for run in measured_with_all["sglang.bench_serving"]}
    stock, unmarked, marked = (
        runs[arm] for arm in ("stock/fcfs", "obcache/fcfs, prompts unmarked", "tova/obcache-v/uniform@0.85")
    )
    assert len(runs) == 8  # two stock servers; two of ours, unmarked and with each arm
    for run in runs.values():
        assert run["completed"] == DOCUMENTS * QUESTIONS
        assert run["total_output_tokens"] == 4 * DOCUMENTS * QUESTIONS
    hit_rates = [run["cache_report"]["cache_hit_rate_pct"] for run in (stock, unmarked, marked)]
    # Nothing is compressed unless a prompt says where its document ends.
    assert hit_rates[0] == pytest.approx(hit_rates[1], abs=5)
    assert hit_rates[2] > 40 > hit_rates[1]


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
