"""One round of one arm, in numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LATENCIES = ("ttft", "tpot", "itl", "e2e_latency")
"""As `sglang.bench_serving` names and defines them: `Answer` says how. In a report: "mean_ttft_ms" and so on."""

STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "p99": lambda values: percentile(values, 99),
}
"""Of each of `LATENCIES`, over all answers of a round; of itl, over all gaps between their tokens."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    accuracy: from 0 to 1.
    seconds: from the question to the end of the answer, its end-to-end latency.
    ttft: seconds to the first text; None where answers come whole.
    slots: KV slots that its document holds; None where nothing is known of it.
    itls: seconds between one token and the next, after the first text.
    """

    document: int
    accuracy: float
    seconds: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    ttft: float | None = None
    slots: int | None = None
    itls: tuple[float, ...] = ()

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None where there is none, or no first one was seen."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.seconds - self.ttft) / (self.output_tokens - 1)


def stream_times(events: Iterable[tuple[float, str, int]]) -> tuple[float | None, tuple[float, ...]]:
    """`ttft` and `itls` of a streamed answer; ttft is None if no event has text.

    events: seconds since the question, text so far, tokens so far. Several tokens in one event share its gap evenly.
    """
    ttft, before, known = None, 0.0, 0
    itls: list[float] = []
    for seconds, text, num_tokens in events:
        if not text or (ttft is not None and num_tokens == known):
            continue
        if ttft is None:
            ttft = seconds
        else:
            new = num_tokens - known
            itls += [(seconds - before) / new] * new
        before, known = seconds, num_tokens
    return ttft, tuple(itls)


@dataclass(frozen=True)
class Round:
    """What an arm did in one round.

    seconds: from the first question to the last answer.
    hit_rate: cached tokens of all prompt tokens.
    prefilled_tokens: prompt tokens that were not cached, and those re-read by replay.
    slots: KV slots per document, the mean; None where an arm has no such number.
    resident: documents in the pool at the end; None where an arm has no such number.
    latencies: `latencies_ms` of its answers.
    """

    arm: str
    index: int
    questions: int
    seconds: float
    questions_per_second: float
    output_tokens_per_second: float
    hit_rate: float
    prefilled_tokens: int
    slots: float | None
    resident: int | None
    accuracy: float
    latencies: Mapping[str, float]


def summarise(
    arm: str, index: int, answers: Sequence[Answer], seconds: float, *, resident: int | None = None, replayed_tokens: int = 0
) -> Round:
    """The round in which `answers` were given, in `seconds` from the first question to the last answer."""
    slots = {answer.document: answer.slots for answer in answers if answer.slots is not None}
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    cached_tokens = sum(answer.cached_tokens for answer in answers)
    return Round(
        arm,
        index,
        len(answers),
        seconds,
        len(answers) / seconds,
        sum(answer.output_tokens for answer in answers) / seconds,
        cached_tokens / prompt_tokens,
        prompt_tokens - cached_tokens + replayed_tokens,
        statistics.fmean(slots.values()) if slots else None,
        resident,
        statistics.fmean(answer.accuracy for answer in answers),
        latencies_ms(answers),
    )


def latencies_ms(answers: Iterable[Answer]) -> dict[str, float]:
    """`STATISTICS` of `LATENCIES` in milliseconds, under `sglang.bench_serving`'s names; what no answer has is left out."""
    answers = list(answers)
    values = {
        "ttft": [answer.ttft for answer in answers if answer.ttft is not None],
        "tpot": [tpot for answer in answers if (tpot := answer.tpot) is not None],
        "itl": [itl for answer in answers for itl in answer.itls],
        "e2e_latency": [answer.seconds for answer in answers],
    }
    return {
        f"{statistic}_{name}_ms": 1000 * compute(values[name])
        for name in LATENCIES
        if values[name]
        for statistic, compute in STATISTICS.items()
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """What `percent` % of `values` do not exceed, interpolated between two of them as numpy and `sglang.bench_serving` do."""
    return float(np.percentile(values, percent))


@dataclass(frozen=True)
class Cost:
    """What compressing a document costs: medians over some. read: seconds of an exact prefill of it, on the stock server."""

    arm: str
    tokens: int
    slots: int
    seconds: float
    scoring_seconds: float
    read_seconds: float


@dataclass(frozen=True)
class Ratios:
    """Of one arm's value to another's, round by round."""

    low: float
    median: float
    high: float
    rounds: int

    @property
    def spread(self) -> str:
        return "one round" if self.rounds == 1 else f"{self.low:.2f} to {self.high:.2f}"


def questions_per_second(each: Round) -> float | None:
    return each.questions_per_second


def latency(name: str) -> Callable[[Round], float | None]:
    """name: of one of `Round.latencies`."""
    return lambda each: each.latencies.get(name)


def against(
    rounds: Sequence[Round], arm: str, other: str, value: Callable[[Round], float | None] = questions_per_second
) -> Ratios | None:
    """`value` of `arm` over that of `other`, round by round; None where they have no round with it together."""
    values = {(each.arm, each.index): number for each in rounds if (number := value(each)) is not None}
    indices = [index for name, index in values if name == arm and (other, index) in values]
    ratios = [values[arm, index] / values[other, index] for index in indices]
    return Ratios(min(ratios), statistics.median(ratios), max(ratios), len(ratios)) if ratios else None


def fastest(rounds: Iterable[Round], arms: Sequence[str]) -> str:
    """The one of `arms` with the most questions per second, by its median over rounds; of equal ones the first."""
    rounds = list(rounds)
    rates = {arm: statistics.median(each.questions_per_second for each in rounds if each.arm == arm) for arm in arms}
    return max(arms, key=rates.__getitem__)
