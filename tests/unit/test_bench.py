"""The bench without servers: its workload, its numbers, its report, and what it says to wrong arguments."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from obcache_sglang.bench.__main__ import main
from obcache_sglang.bench.kvpress import KvpressArm, parse_press
from obcache_sglang.bench.report import Point, findings, write_report
from obcache_sglang.bench.rounds import Answer, Cost, Round, against, percentile, summarise
from obcache_sglang.bench.served import STOCK, parse_bench_arms
from obcache_sglang.bench.workload import Workload, make_workload, pool_size
from obcache_sglang.errors import ConfigError

ARM = "snapkv/obcache-k/adakv@0.7"


@pytest.fixture(scope="module")
def tokenizer(model_dir_bf16: Path) -> object:
    return AutoTokenizer.from_pretrained(model_dir_bf16)


def make(tokenizer: object, seed: int = 0, documents: int = 4) -> Workload:
    return make_workload(tokenizer, documents=documents, tokens=400, questions=3, seed=seed, answer_tokens=5)


@pytest.fixture(scope="module")
def workload(tokenizer: object) -> Workload:
    return make(tokenizer)


# --- workload -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_workload(tokenizer: object, workload: Workload) -> None:
    again, other = make(tokenizer), make(tokenizer, seed=1)
    assert again == workload
    assert [again.order(i) for i in range(3)] == [workload.order(i) for i in range(3)]
    assert again.digest == workload.digest != other.digest


def test_questions_about_a_document_share_its_tokens_and_nothing_more(workload: Workload) -> None:
    assert [ask.document for ask in workload.asks] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for one, other in itertools.pairwise(workload.asks):
        if one.document == other.document:
            assert one.context_len == other.context_len
            assert one.input_ids[: one.context_len] == other.input_ids[: one.context_len]
            assert one.input_ids != other.input_ids
        else:
            assert one.input_ids[:100] != other.input_ids[:100]
    assert all(400 <= ask.context_len + 30 < 460 for ask in workload.asks)
    assert {ask.question.max_new_tokens for ask in workload.asks} == {5}


def test_questions_arrive_interleaved_in_another_order_each_round(workload: Workload) -> None:
    def key(ask: object) -> str:
        return str(ask)

    first, second = workload.order(0), workload.order(1)
    assert sorted(first, key=key) == sorted(second, key=key) == sorted(workload.asks, key=key)
    assert first != second
    documents = [ask.document for ask in first]
    assert sum(a != b for a, b in itertools.pairwise(documents)) > len(workload.samples)


def test_the_pool_holds_the_share(tokenizer: object) -> None:
    workload = make(tokenizer, documents=12)
    slots = sum(ask.context_len for ask in workload.asks[::3])
    assert pool_size(workload, 0.5) == slots // 2
    with pytest.raises(ConfigError, match="--pool-share 0.1 of 12 documents"):
        pool_size(workload, 0.1)


# --- numbers ------------------------------------------------------------------------------------------------------------


def test_a_round_in_numbers() -> None:
    answers = [
        Answer(0, 1.0, 1.0, 4, 100, 0, 0.5, 30),
        Answer(0, 0.0, 3.0, 6, 120, 90, 0.1, 30),
        Answer(1, 1.0, 2.0, 5, 80, 60, 0.2, 50),
    ]
    got = summarise("arm", 2, answers, 4.0, resident=1, replayed_tokens=7)
    assert got == Round("arm", 2, 3, 4.0, 0.75, 0.2, 0.5, 2.0, 3.75, 0.5, 157, 40.0, 1, pytest.approx(2 / 3))
    whole = summarise("arm", 0, [replace(each, first_seconds=None, slots=None) for each in answers], 4.0)
    assert (whole.first_token_median, whole.first_token_p99, whole.slots, whole.resident) == (None, None, None, None)


def test_percentiles_by_nearest_rank() -> None:
    values = [float(value) for value in range(200, 0, -1)]
    assert (percentile(values, 99), percentile(values, 50), percentile([3.0], 99)) == (198.0, 100.0, 3.0)


def rounds(arm: str, rates: list[float], accuracy: float = 1.0) -> list[Round]:
    return [Round(arm, i, 8, 8 / rate, rate, 0.1, 0.2, 0.3, 9.0, 0.5, 400, 30.0, 2, accuracy) for i, rate in enumerate(rates)]


def test_ratios_are_round_by_round() -> None:
    # The machine slows down by half each round: means and medians of either arm alone would not show the ratio.
    measured = rounds(STOCK, [4.0, 2.0, 1.0]) + rounds(ARM, [8.0, 3.0, 2.5])
    ratios = against(measured, ARM, STOCK)
    assert ratios is not None
    assert (ratios.low, ratios.median, ratios.high) == (1.5, 2.0, 2.5)
    assert against(measured, ARM, "kvpress") is None


# --- report -------------------------------------------------------------------------------------------------------------


def point(rates: list[float], accuracy: float = 1.0) -> Point:
    peer = "kvpress adakv@0.7"
    measured = rounds(STOCK, [2.0, 2.0]) + rounds(ARM, rates, accuracy) + rounds(peer, [0.5, 0.2])
    cost = Cost(ARM, 400, 120, 0.5, 0.1, 0.25)
    return Point(4, 400, 3, 1000, 2, "digest", (STOCK, ARM), (peer,), measured, [cost])


def test_where_compression_hurts_comes_first() -> None:
    assert findings([point([4.0, 6.0])])[0] == f"helps: {ARM} is faster, 2.50x stock's questions/s (2.00 to 3.00)."
    slower = findings([point([1.0, 1.5], accuracy=0.5)])
    assert slower[0] == f"HURTS: {ARM} is slower, 0.62x stock's questions/s (0.50 to 0.75)."
    assert slower[1] == f"HURTS: {ARM} answers 50% right, stock 100%."
    assert findings([point([4.0, 6.0], accuracy=0.5)])[0].startswith("HURTS")
    assert findings([point([1.9, 2.1])])[0].startswith("no clear difference")
    assert f"{ARM} has 19.0x the questions/s of kvpress adakv@0.7 (8.0 to 30.0)." in findings([point([4.0, 6.0])])


def test_the_report_names_what_its_figures_rest_on(tmp_path: Path) -> None:
    facts = {"command": "python -m obcache_sglang.bench x", "machine": "m"}
    shown = write_report(tmp_path, facts, [point([1.0, 1.5], 0.5)], ["a note"])
    markdown = (tmp_path / "bench.md").read_text()
    assert shown.startswith("HURTS")
    assert markdown.startswith("# Speed\n\n- HURTS")
    for text in ("`python -m obcache_sglang.bench x`", "| snapkv/obcache-k/adakv@0.7 |", "0.50 0.62 0.75", "- a note", "2.00x"):
        assert text in markdown
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert measured["facts"] == facts
    assert measured["points"][0]["workload"] == "digest"
    assert len(measured["points"][0]["rounds"]) == 6


def test_a_report_of_several_workloads_plots_their_cost(tmp_path: Path) -> None:
    points = [replace(point([1.0, 1.5]), documents=n, costs=[]) for n in (1, 4)] + [replace(point([0.5, 0.5]), tokens=800)]
    shown = write_report(tmp_path, {}, points)
    assert "(1 documents of 400 tokens)" in shown
    assert "2.000" in shown  # seconds per question
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


# --- KVPress's share, and arguments -------------------------------------------------------------------------------------


def test_kvpress_is_asked_a_part_of_a_round_and_grouped_whole_documents(workload: Workload) -> None:
    asks = workload.order(0)

    class Fake:
        def __init__(self) -> None:
            self.calls: list[tuple[int, int]] = []

        def ask(self, asks: list, context: str) -> dict:
            self.calls.append((asks[0].document, len(asks)))
            assert context == workload.samples[asks[0].document].context
            return {"answers": [ask.question.references[0] for ask in asks], "seconds": 2.0, "slots": 9}

    class Words:
        def encode(self, text: str, **kwargs: object) -> list[str]:
            return text.split()

    fake = Fake()

    def arm(grouped: bool) -> KvpressArm:
        return KvpressArm(fake, "kvpress", workload, Words(), 6, grouped=grouped)  # type: ignore[arg-type]

    one, many = arm(False), arm(True)
    got = one.run(0, one.part(asks), lambda: None)
    assert fake.calls == [(ask.document, 1) for ask in asks[:6]]
    assert (got.questions, got.seconds, got.hit_rate, got.accuracy, got.slots) == (6, 12.0, 0.0, 1.0, 9.0)
    fake.calls.clear()
    got = many.run(0, many.part(asks), lambda: None)
    assert [number for _, number in fake.calls] == [3, 3]
    assert fake.calls[0][0] == asks[0].document
    assert got.questions_per_second == pytest.approx(6 / 4)
    assert 0.5 < got.hit_rate < 0.7


def test_arms_with_several_ratios() -> None:
    arms = parse_bench_arms(["snapkv/obcache-k/adakv@0.7,0.85", "kvzip@0.5"])
    assert [(arm.method, arm.ratio) for arm in arms] == [("snapkv", 0.7), ("snapkv", 0.85), ("kvzip", 0.5)]
    assert parse_press("kvzip@0.5") == ("kvzip", 0.5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--arms", "snapkv/obcache-k/adakv"], "at which ratio"),
        (["--arms", "snapkv/nonsense/adakv@0.5"], "nonsense"),
        (["--arms", "snapkv/obcache-k/adakv@1.5"], "1.5"),
        (["--arms", "snapkv/obcache-k/profile@0.5"], "--obcache-head-profile"),
        (["--kvpress", "nonsense@0.5"], "--kvpress nonsense@0.5"),
        (["--kvpress", "adakv"], "PRESS@RATIO"),
        (["--documents", "0"], "--documents 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--pool-share", "-1"], "--pool-share -1"),
        (["--documents", "4", "--tokens", "400", "--questions", "2"], "raise --pool-share"),
    ],
)
def test_wrong_arguments_are_named_before_a_server_starts(
    model_dir_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], named: str
) -> None:
    assert main([str(model_dir_bf16), "--output", str(tmp_path / "out"), *given]) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
