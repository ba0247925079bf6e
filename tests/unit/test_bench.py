"""The bench without servers: its workload, its numbers, its report, and what it says to wrong arguments."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from obcache_sglang.bench.__main__ import Bench, _parser, main
from obcache_sglang.bench.cases import Case
from obcache_sglang.bench.client import ClientRun, SharedPrefixClient, read_result
from obcache_sglang.bench.kvpress import KvpressArm, parse_press
from obcache_sglang.bench.report import Point, client_findings, findings, write_report
from obcache_sglang.bench.rounds import (
    Answer,
    Cost,
    Round,
    against,
    fastest,
    latencies_ms,
    latency,
    percentile,
    stream_times,
    summarise,
)
from obcache_sglang.bench.served import ServedArm, Stock, fp8_dtype, parse_bench_arms, parse_stock, sampling_params
from obcache_sglang.bench.workload import Workload, make_workload, pool_size
from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import EXACT
from obcache_sglang.local_server import Client

FCFS, LPM = Stock("fcfs").name, Stock("lpm").name
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
    with pytest.raises(ConfigError, match=re.escape("--pool-share 0.1 of 12 documents")):
        pool_size(workload, 0.1)
    # Room for one document to work on, and for what is kept of another: 1.3 documents, where 30 % are kept.
    assert pool_size(workload, 0.13, kept=0.0) == int(sum(ask.context_len for ask in workload.asks[::3]) * 0.13)
    with pytest.raises(ConfigError, match=r"--pool-share 0\.1 "):
        pool_size(workload, 0.1, kept=0.3)


def test_answers_of_an_exact_number_of_tokens(tokenizer: object) -> None:
    workload = make_workload(tokenizer, documents=1, tokens=400, questions=2, seed=0, answer_tokens=128, ignore_eos=True)
    ask = workload.asks[0]
    assert (ask.ignore_eos, ask.question.max_new_tokens) == (True, 128)
    arm = parse_bench_arms([ARM])[0]
    assert sampling_params(EXACT, 400, 128, ignore_eos=True) == {"max_new_tokens": 128, "temperature": 0, "ignore_eos": True}
    assert sampling_params(arm, 400, 128, ignore_eos=True)["custom_params"]["obcache"]["context_len"] == 400


# --- numbers ------------------------------------------------------------------------------------------------------------


def test_a_round_in_numbers() -> None:
    answers = [
        Answer(0, 1.0, 1.0, 4, 100, 0, 0.5, 30),
        Answer(0, 0.0, 3.0, 6, 120, 90, 0.1, 30),
        Answer(1, 1.0, 2.0, 5, 80, 60, 0.2, 50),
    ]
    got = summarise("arm", 2, answers, 4.0, resident=1, replayed_tokens=7)
    assert got == Round("arm", 2, 3, 4.0, 0.75, 3.75, 0.5, 157, 40.0, 1, pytest.approx(2 / 3), latencies_ms(answers))
    assert (got.latencies["median_ttft_ms"], got.latencies["median_e2e_latency_ms"]) == (200.0, 2000.0)
    whole = summarise("arm", 0, [replace(each, ttft=None, slots=None) for each in answers], 4.0)
    assert (whole.slots, whole.resident) == (None, None)
    # Answers that come whole have no first token, and no time for each.
    assert list(whole.latencies) == ["mean_e2e_latency_ms", "median_e2e_latency_ms", "p99_e2e_latency_ms"]


def test_latencies_by_hand() -> None:
    """bench_serving's: TPOT is (end-to-end - TTFT) / (tokens - 1), an answer of one token has none; ITL counts every gap."""
    answers = [
        Answer(0, 1.0, 3.0, 5, 9, 0, 1.0, None, (0.25, 0.25, 0.5, 1.0)),  # TPOT 0.5
        Answer(0, 1.0, 2.0, 3, 9, 0, 0.5, None, (0.5, 1.0)),  # TPOT 0.75
        Answer(0, 1.0, 4.0, 1, 9, 0, 4.0, None, ()),
    ]
    assert [answer.tpot for answer in answers] == [0.5, 0.75, None]
    got = latencies_ms(answers)
    assert got == {
        "mean_ttft_ms": pytest.approx(5500 / 3),
        "median_ttft_ms": 1000.0,
        "p99_ttft_ms": pytest.approx(1000 + 0.98 * 3000),
        "mean_tpot_ms": 625.0,
        "median_tpot_ms": 625.0,
        "p99_tpot_ms": pytest.approx(500 + 0.99 * 250),
        "mean_itl_ms": pytest.approx(3500 / 6),
        "median_itl_ms": 500.0,
        "p99_itl_ms": pytest.approx(1000.0),  # of .25 .25 .5 .5 1 1 the fifth to the sixth
        "mean_e2e_latency_ms": 3000.0,
        "median_e2e_latency_ms": 3000.0,
        "p99_e2e_latency_ms": pytest.approx(3000 + 0.98 * 1000),
    }


def test_times_of_a_stream_by_hand() -> None:
    """The first text counts, not the first event; tokens that come together share their gap; an event without new ones is none."""
    events = [(0.5, "", 1), (1.0, "a", 2), (1.5, "ab", 3), (1.75, "ab", 3), (3.5, "abcd", 7)]
    assert stream_times(events) == (1.0, (0.5, 0.5, 0.5, 0.5, 0.5))
    assert stream_times([(1.0, "", 1)]) == (None, ())
    assert stream_times([(1.0, "a", 1)]) == (1.0, ())


def test_latencies_are_those_that_bench_serving_computes() -> None:
    """SGLang's own function, given the same answers."""
    from sglang.benchmark.serving import RequestFuncOutput, calculate_metrics

    class NoWords:
        def encode(self, text: str, **kwargs: object) -> list[int]:
            return []

    times = [(0.5, 2.0, [0.1, 0.4, 1.0]), (0.2, 0.9, [0.3, 0.4]), (1.0, 1.0, [])]
    answers = [Answer(0, 1.0, end, len(itls) + 1, 9, 0, first, None, tuple(itls)) for first, end, itls in times]
    outputs = [
        RequestFuncOutput(success=True, ttft=first, latency=end, itl=itls, output_len=len(itls) + 1) for first, end, itls in times
    ]
    theirs, _ = calculate_metrics(None, outputs, 2.0, NoWords(), "sglang")  # type: ignore[arg-type]
    ours = latencies_ms(answers)
    assert len(ours) == 12
    for name, value in ours.items():
        assert value == pytest.approx(getattr(theirs, name)), name


def test_percentiles_are_interpolated() -> None:
    values = [float(value) for value in range(200, 0, -1)]
    # 199 steps: 99 % of them is 197.01 behind the least.
    assert percentile(values, 99) == pytest.approx(198.01)
    assert (percentile(values, 50), percentile([3.0], 99)) == (100.5, 3.0)


def rounds(arm: str, rates: list[float], accuracy: float = 1.0, tpot: float = 20.0) -> list[Round]:
    latencies = {"median_ttft_ms": 100.0, "median_tpot_ms": tpot, "median_e2e_latency_ms": 300.0}
    return [Round(arm, i, 8, 8 / rate, rate, 9.0, 0.5, 400, 30.0, 2, accuracy, latencies) for i, rate in enumerate(rates)]


def test_ratios_are_round_by_round() -> None:
    # The machine slows down by half each round: means and medians of either arm alone would not show the ratio.
    measured = rounds(FCFS, [4.0, 2.0, 1.0]) + rounds(ARM, [8.0, 3.0, 2.5], tpot=30.0)
    ratios = against(measured, ARM, FCFS)
    assert ratios is not None
    assert (ratios.low, ratios.median, ratios.high, ratios.rounds) == (1.5, 2.0, 2.5, 3)
    assert ratios.spread == "1.50 to 2.50"
    assert against(measured, ARM, "kvpress") is None
    slower = against(measured, ARM, FCFS, latency("median_tpot_ms"))
    assert slower is not None
    assert slower.median == 1.5
    assert against(measured, ARM, FCFS, latency("median_itl_ms")) is None


def test_stock_at_its_best_is_the_policy_with_more_questions_per_second() -> None:
    # By medians, 2 and 3: fcfs has the fastest round.
    measured = rounds(FCFS, [9.0, 2.0, 1.0]) + rounds(LPM, [3.0, 3.0, 2.0]) + rounds(ARM, [6.0, 6.0, 6.0])
    assert fastest(measured, [FCFS, LPM]) == LPM
    assert fastest(measured, [FCFS]) == FCFS
    assert fastest(rounds(FCFS, [2.0]) + rounds(LPM, [2.0]), [FCFS, LPM]) == FCFS


# --- report -------------------------------------------------------------------------------------------------------------


def point(rates: list[float], accuracy: float = 1.0, peer_rates: tuple[float, ...] = (0.5, 0.2), tpot: float = 20.0) -> Point:
    peer = "kvpress adakv@0.7"
    measured = (
        rounds(FCFS, [1.0, 1.5]) + rounds(LPM, [2.0, 2.0]) + rounds(ARM, rates, accuracy, tpot) + rounds(peer, [*peer_rates])
    )
    cost = Cost(ARM, 400, 120, 0.5, 0.1, 0.25)
    return Point(4, 400, 3, 16, False, 1000, 2, "digest", (FCFS, LPM, ARM), (FCFS, LPM), (peer,), measured, [cost])


def test_ratios_are_against_the_better_policy() -> None:
    """Twice fcfs is what lpm has too: no gain of compression."""
    lines = findings([point([2.0, 2.0])])
    assert lines[0] == f"Compression does not pay here: no arm is faster than {LPM} in every round."
    assert f"no clear difference: {ARM} has 1.00x {LPM}'s questions/s (1.00 to 1.00)." in lines
    assert f"{FCFS} has 0.62x the questions/s of {LPM}, stock at its best (0.50 to 0.75)." in lines


def test_where_compression_hurts_comes_first() -> None:
    faster = findings([point([4.0, 6.0])])
    assert f"helps: {ARM} is faster, 2.50x {LPM}'s questions/s (2.00 to 3.00)." in faster
    assert not any(line.startswith(("HURTS", "Compression does not pay")) for line in faster)
    slower = findings([point([1.0, 1.5], accuracy=0.5)])
    assert slower[0].startswith("Compression does not pay here")
    assert slower[1] == f"HURTS: {ARM} is slower, 0.62x {LPM}'s questions/s (0.50 to 0.75)."
    assert slower[2] == f"HURTS: {ARM} answers 50% right, {LPM} 100%."
    assert findings([point([4.0, 6.0], accuracy=0.5)])[0].startswith("HURTS")
    assert any(line.startswith("no clear difference") for line in findings([point([1.9, 2.1])]))
    assert f"{ARM} has 19.0x the questions/s of kvpress adakv@0.7 (8.00 to 30.00)." in findings([point([4.0, 6.0])])


def test_longer_latencies_hurt_even_where_questions_per_second_help() -> None:
    assert findings([point([4.0, 6.0], tpot=30.0)])[0] == f"HURTS: {ARM} has 1.50x {LPM}'s median TPOT (1.50 to 1.50)."


def test_slower_than_kvpress_hurts() -> None:
    assert findings([point([4.0, 6.0], peer_rates=(8.0, 8.0))])[0] == (
        f"HURTS: {ARM} is slower than kvpress adakv@0.7, 0.62x its questions/s (0.50 to 0.75)."
    )


def test_one_round_says_so() -> None:
    assert f"helps: {ARM} is faster, 2.00x {LPM}'s questions/s (one round)." in findings([point([4.0])])


def test_the_report_names_what_its_figures_rest_on(tmp_path: Path) -> None:
    facts = {"command": "python -m obcache_sglang.bench x", "machine": "m"}
    shown = write_report(tmp_path, facts, [point([1.0, 1.5], 0.5)], ["a note"])
    markdown = (tmp_path / "bench.md").read_text()
    assert shown.startswith("Compression does not pay")
    assert markdown.startswith("# Speed\n\n- Compression does not pay")
    for text in ("`python -m obcache_sglang.bench x`", "| snapkv/obcache-k/adakv@0.7 |", "0.50 0.62 0.75", "- a note", "2.00x"):
        assert text in markdown
    for text in (
        "- HURTS",
        "| stock/fcfs |",
        "| stock/lpm |",
        "x best stock",
        "p99_e2e_latency_ms",
        "answers of at most 16 tokens",
    ):
        assert text in markdown
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert measured["facts"] == facts
    assert measured["points"][0]["workload"] == "digest"
    assert measured["points"][0]["best_stock"] == LPM
    assert len(measured["points"][0]["rounds"]) == 8


def test_each_number_of_output_tokens_has_its_tables(tmp_path: Path) -> None:
    points = [replace(point([1.0, 1.5]), output_tokens=n, ignore_eos=True, costs=[]) for n in (8, 256)]
    shown = write_report(tmp_path, {}, points)
    for tokens in (8, 256):
        assert f"4 documents of 400 tokens, answers of {tokens} tokens, 3 questions each" in shown
        assert f"{LPM}'s questions/s (0.50 to 0.75) (4 documents of 400 tokens, answers of {tokens} tokens)." in shown
    assert not (tmp_path / "scaling.svg").exists()


def test_a_report_of_several_workloads_plots_their_cost(tmp_path: Path) -> None:
    points = [replace(point([1.0, 1.5]), documents=n, costs=[]) for n in (1, 4)] + [replace(point([0.5, 0.5]), tokens=800)]
    shown = write_report(tmp_path, {}, points)
    assert "(1 documents of 400 tokens, answers of at most 16 tokens)" in shown
    assert "2.000" in shown  # seconds per question
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


# --- SGLang's own client -------------------------------------------------------------------------------------------------


def client_run(arm: str, rate: float, stock: bool = False, output_tokens: int = 256) -> ClientRun:
    result = {"request_throughput": rate, "output_throughput": 1.0, "completed": 80, "cache_report": {"cache_hit_rate_pct": 50.0}}
    result |= {
        f"{statistic}_{name}_ms": 12.5
        for statistic in ("mean", "median", "p99")
        for name in ("ttft", "tpot", "itl", "e2e_latency")
    }
    return ClientRun(arm, stock, output_tokens, result)


def test_what_bench_serving_says_is_reported_whatever_it_is(tmp_path: Path) -> None:
    runs = [
        client_run(FCFS, 1.0, stock=True),
        client_run(LPM, 2.0, stock=True),
        client_run("obcache/fcfs, prompts unmarked", 1.0),
        client_run(ARM, 3.0),
        client_run(ARM, 9.0, output_tokens=8),  # no stock beside it
    ]
    assert client_findings(runs) == [
        f"HURTS: obcache/fcfs, prompts unmarked has 0.50x {LPM}'s requests/s by sglang.bench_serving, 256 output tokens (one round).",
        f"{ARM} has 1.50x {LPM}'s requests/s by sglang.bench_serving, 256 output tokens (one round).",
    ]
    write_report(tmp_path, {}, [point([4.0, 6.0])], client_runs=runs)
    markdown = (tmp_path / "bench.md").read_text()
    assert "## sglang.bench_serving --dataset-name generated-shared-prefix, 80 prompts, 256 output tokens, one round" in markdown
    assert f"| {ARM} | 3 | 1.50 | 1 | 50 | 12.5 |" in markdown
    assert f"| {ARM} | 9 | - |" in markdown
    assert len(json.loads((tmp_path / "bench.json").read_text())["sglang.bench_serving"]) == 5


def test_the_client_marks_documents_only_for_arms_that_compress(tmp_path: Path) -> None:
    client = SharedPrefixClient("MODEL", Case("", 8, 2048, 10, 0.2, 6), 3, tmp_path)
    command = client.command("http://x:1", "stock/lpm", EXACT, 256)
    given = dict(itertools.pairwise(command))
    expected = {"--gsp-num-groups": "8", "--gsp-prompts-per-group": "10", "--gsp-system-prompt-len": "2048"}
    expected |= {"--gsp-output-len": "256", "--max-concurrency": "6", "--seed": "3", "--base-url": "http://x:1"}
    assert expected.items() <= given.items()
    assert "--extra-request-body" not in given
    marked = dict(itertools.pairwise(client.command("http://x:1", ARM, parse_bench_arms([ARM])[0], 256)))
    params = json.loads(marked["--extra-request-body"])["sampling_params"]
    assert (params["max_new_tokens"], params["ignore_eos"], params["custom_params"]["obcache"]["context_len"]) == (
        256,
        True,
        2048,
    )


def test_the_last_result_of_the_client_counts(tmp_path: Path) -> None:
    file = tmp_path / "results"
    assert read_result(file) is None
    file.write_text('{"completed": 1}\n{"completed": 2, "server_info": {"long": 1}}\n')
    assert read_result(file) == {"completed": 2}


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
    # The pipeline gives words; what it was held to generate is known.
    exactly = [replace(ask, ignore_eos=True) for ask in one.part(asks)]
    assert one.run(0, exactly, lambda: None).output_tokens_per_second == pytest.approx(6 * 5 / 12)


def test_arms_with_several_ratios() -> None:
    arms = parse_bench_arms(["snapkv/obcache-k/adakv@0.7,0.85", "kvzip@0.5"])
    assert [(arm.method, arm.ratio) for arm in arms] == [("snapkv", 0.7), ("snapkv", 0.85), ("kvzip", 0.5)]
    assert parse_press("kvzip@0.5") == ("kvzip", 0.5)


def test_arms_that_differ_in_their_options_have_names_of_their_own() -> None:
    arms = parse_bench_arms(["replay/obcache-v/global@0.9", "replay/obcache-v/global+replay_chunk=256@0.9"])
    names = [ServedArm.obcache(Client("http://x:1"), arm, "fcfs", clients=1).name for arm in arms]
    assert names == ["replay/obcache-v/global@0.9", "replay/obcache-v/global+replay_chunk=256@0.9"]


def test_stock_arms_by_policy_and_equal_bytes() -> None:
    fcfs, fp8 = parse_stock(["fcfs", "lpm/fp8", "fcfs"])
    assert (fcfs.name, fp8.name) == ("stock/fcfs", "stock/lpm/fp8")
    assert fcfs.flags(1000) == ["--schedule-policy", "fcfs", "--max-total-tokens", "1000"]
    # Elements of one byte instead of two.
    twice = ["--schedule-policy", "lpm", "--max-total-tokens", "2000", "--kv-cache-dtype", fp8_dtype()]
    assert fp8.flags(1000) == twice


def test_old_gpus_have_one_fp8_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for capability, dtype in (((8, 0), "fp8_e5m2"), ((8, 9), "fp8_e4m3"), ((9, 0), "fp8_e4m3")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda capability=capability: capability)
        assert fp8_dtype() == dtype


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
        (["--output-tokens", "8", "0"], "--output-tokens 0"),
        (["--bench-serving", "-1"], "--bench-serving -1"),
        (["--bench-serving-questions", "0"], "--bench-serving-questions 0"),
        (["--stock", "sjf"], "--stock sjf"),
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


def test_a_platform_without_an_fp8_cache_is_named_and_skipped(
    model_dir_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    class FakeServer:
        def post(self, path: str, body: object) -> None:
            pass

    @contextlib.contextmanager
    def fake_serve(model: str, log_file: Path, flags: list[str]) -> Iterator[FakeServer]:
        if "--kv-cache-dtype" in flags:
            raise RuntimeError("the server exited with 1; the end of log:\nValueError: fp8 is not supported here.\nmore words")
        started.append(flags)
        yield FakeServer()

    monkeypatch.setattr("obcache_sglang.bench.__main__.serve", fake_serve)
    given = [
        str(model_dir_bf16),
        "--documents",
        "12",
        "--tokens",
        "400",
        "--questions",
        "2",
        "--arms",
        ARM,
        "--policies",
        "fcfs",
        "lpm",
    ]
    bench = Bench(_parser().parse_args(given), given)
    with contextlib.ExitStack() as stack:
        arms = bench._start_servers(stack, tmp_path)
    assert [arm.name for arm in arms] == [FCFS, LPM, ARM, f"{ARM}, lpm"]
    assert ["--obcache" in flags for flags in started] == [False, False, True, True]
    pools = {flags[flags.index("--max-total-tokens") + 1] for flags in started}
    assert pools == {str(bench.pool_slots)}
    skipped = "stock/lpm/fp8 was not asked, the platform serves no fp8 KV cache: ValueError: fp8 is not supported here."
    assert bench.skipped == [skipped]
    assert skipped in list(bench._notes())
    # Stock itself must run.
    monkeypatch.setattr("obcache_sglang.bench.served.Stock.flags", lambda *args: ["--kv-cache-dtype", "x"])
    with contextlib.ExitStack() as stack, pytest.raises(RuntimeError, match="not supported here"):
        bench._start_servers(stack, tmp_path)


def test_documents_may_stand_behind_one_system_prompt(tokenizer: object) -> None:
    alone = make(tokenizer, documents=2)
    behind = make_workload(tokenizer, documents=2, tokens=400, questions=3, seed=0, answer_tokens=5, system_tokens=100)
    system = behind.asks[0].input_ids[:100]
    assert [ask.input_ids for ask in behind.asks] == [system + ask.input_ids for ask in alone.asks]
    assert [ask.context_len for ask in behind.asks] == [100 + ask.context_len for ask in alone.asks]
    assert behind.context_tokens == 100 + alone.context_tokens and behind.digest != alone.digest
    with pytest.raises(ConfigError, match=r"--system-tokens 99999999: give 0 to \d+"):
        make_workload(tokenizer, documents=1, tokens=400, questions=1, seed=0, answer_tokens=5, system_tokens=99_999_999)
