"""One round of one arm, in numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One answer. accuracy: from 0 to 1. first_seconds: to the first token, None where answers come whole; slots: KV slots that
    its document holds, None where nothing is known of it."""

    document: int
    accuracy: float
    seconds: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    first_seconds: float | None = None
    slots: int | None = None


@dataclass(frozen=True)
class Round:
    """What an arm did in one round.

    seconds: from the first question to the last answer. hit_rate: cached tokens of all prompt tokens. prefilled_tokens: prompt tokens
    that were not cached, and those re-read by replay. slots: KV slots per document, the mean. resident: documents in the pool
    at the end. None where an arm has no such number.
    """

    arm: str
    index: int
    questions: int
    seconds: float
    questions_per_second: float
    first_token_median: float | None
    first_token_p99: float | None
    answer_median: float
    output_tokens_per_second: float
    hit_rate: float
    prefilled_tokens: int
    slots: float | None
    resident: int | None
    accuracy: float


def summarise(
    arm: str, index: int, answers: Sequence[Answer], seconds: float, *, resident: int | None = None, replayed_tokens: int = 0
) -> Round:
    """The round in which `answers` were given, in `seconds` from the first question to the last answer."""
    firsts = [answer.first_seconds for answer in answers if answer.first_seconds is not None]
    slots = {answer.document: answer.slots for answer in answers if answer.slots is not None}
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    cached_tokens = sum(answer.cached_tokens for answer in answers)
    return Round(
        arm,
        index,
        len(answers),
        seconds,
        len(answers) / seconds,
        statistics.median(firsts) if firsts else None,
        percentile(firsts, 99) if firsts else None,
        statistics.median(answer.seconds for answer in answers),
        sum(answer.output_tokens for answer in answers) / seconds,
        cached_tokens / prompt_tokens,
        prompt_tokens - cached_tokens + replayed_tokens,
        statistics.fmean(slots.values()) if slots else None,
        resident,
        statistics.fmean(answer.accuracy for answer in answers),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that `percent` % of them do not exceed."""
    return sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]


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
    """questions per second against stock, pair by pair in each round."""

    low: float
    median: float
    high: float


def against(rounds: Sequence[Round], arm: str, other: str) -> Ratios | None:
    """Questions per second of `arm` over those of `other`, round by round; None where they have no round together."""
    rates: dict[tuple[str, int], float] = {(each.arm, each.index): each.questions_per_second for each in rounds}
    pairs: list[Any] = [(rates[arm, each.index], each.questions_per_second) for each in rounds if each.arm == other]
    ratios = [mine / theirs for mine, theirs in pairs]
    return Ratios(min(ratios), statistics.median(ratios), max(ratios)) if ratios else None
