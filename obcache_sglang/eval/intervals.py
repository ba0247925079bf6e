"""Means of answers, paired differences, and the 95 % intervals of both.

Answers that are right or wrong are counted: a mean has Wilson's interval, a paired difference Newcombe's (Statistics in Medicine
17:2635, 1998, method 10: Wilson's intervals of both proportions, joined with the correlation of the pairs), and is taken for one
only if McNemar's exact test agrees. Everything else has Student's t. Where all samples are alike, which is no spread but no proof
either, the bound is the largest share of other samples that would go unseen in one run of twenty.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import scipy.stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95

FEWEST_PAIRS = 6
"""With fewer pairs of right-or-wrong answers McNemar's test cannot reach 0.05, even if all pairs differ in the same direction."""

Interval = tuple[float, float]
Pair = tuple[float, float]
"""An arm's value and the other arm's, of the same question."""
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A mean, or a paired difference of means, with its 95 % interval.

    low, high: None from fewer than two samples of a task. samples: contexts, whatever the number of their questions.
    equal: of a difference: no sample's two values differ. p: of McNemar's exact test, for pairs that are right or wrong.
    """

    mean: float
    low: float | None
    high: float | None
    samples: int
    equal: bool = False
    p: float | None = None

    @property
    def can_tell(self) -> bool:
        """Whether there are enough samples for a difference to be seen at all."""
        return self.low is not None and (self.samples >= FEWEST_PAIRS or (self.p is None and not self.equal))

    @property
    def resolved(self) -> bool:
        """Whether this difference is one: its interval excludes 0, and McNemar's test, where there is one, agrees."""
        if not self.can_tell or self.low is None or self.high is None:
            return False
        return not self.low <= 0 <= self.high and (self.p is None or self.p < 1 - CONFIDENCE)


def estimate(values: Mapping[str, Mapping[int, Sequence[float]]], *, bounded: bool) -> Estimate | None:
    """The mean of values[task][sample][question], or None without values. bounded: all are from 0 to 1.

    Questions about one context are not independent, so a sample counts once, with the mean of its questions. Tasks count
    equally, whatever their number of samples; they were chosen, not drawn, so only the spread inside tasks is an error. All sums
    are rounded once, so that the order of answers, which differs in a resumed run, changes no digit.
    """
    tasks = [[statistics.fmean(questions) for questions in samples.values()] for samples in values.values() if samples]
    if not tasks:
        return None

    def counted(samples: Sequence[float]) -> Interval | None:
        return wilson(round(math.fsum(samples)), len(samples)) if {*samples} <= {0.0, 1.0} else None

    interval = _interval(tasks, lambda value: value, counted, (0.0, 1.0) if bounded else None)
    low, high = interval or (None, None)
    return Estimate(_mean(tasks), low, high, sum(map(len, tasks)))


def difference(pairs: Mapping[str, Mapping[int, Sequence[Pair]]], *, bounded: bool) -> Estimate | None:
    """The mean of what pairs[task][sample][question] differ by, otherwise as `estimate`."""
    tasks = [
        [
            (statistics.fmean(one for one, _ in questions), statistics.fmean(two for _, two in questions))
            for questions in samples.values()
        ]
        for samples in pairs.values()
        if samples
    ]
    if not tasks:
        return None

    def counted(samples: Sequence[Pair]) -> Interval | None:
        differ = any(one != two for one, two in samples)
        return newcombe(Counter(samples)) if differ and {each for pair in samples for each in pair} <= {0.0, 1.0} else None

    interval = _interval(tasks, _change, counted, (-1.0, 1.0) if bounded else None)
    low, high = interval or (None, None)
    every = [pair for task in tasks for pair in task]
    right_or_wrong = bounded and {each for pair in every for each in pair} <= {0.0, 1.0}
    return Estimate(
        _mean([[*map(_change, task)] for task in tasks]),
        low,
        high,
        samples=len(every),
        equal=all(one == two for one, two in every),
        p=mcnemar(Counter(every)) if right_or_wrong else None,
    )


def _change(pair: Pair) -> float:
    return pair[0] - pair[1]


def _mean(tasks: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(map(statistics.fmean, tasks))


def _interval(
    tasks: Sequence[Sequence[T]],
    value: Callable[[T], float],
    counted: Callable[[Sequence[T]], Interval | None],
    limits: Interval | None,
) -> Interval | None:
    """The interval of the mean over tasks of the mean over samples of `value`. None where a task has fewer than two samples.

    counted: the interval of samples that can be counted, None for others. limits: within which values are; None where they can be
    anything.
    """
    if min(map(len, tasks)) < 2:
        return None

    def certain(samples: Sequence[T]) -> Interval | None:
        """The interval of samples that can be counted or, where values have limits, are all alike."""
        found = counted(samples) if limits is not None else None
        values = [*map(value, samples)]
        if found is None and limits is not None and len({*values}) == 1:
            reach = unseen_share(len(values)) * max(values[0] - limits[0], limits[1] - values[0])
            found = values[0] - reach, values[0] + reach
        return found

    if len({*map(len, tasks)}) == 1:  # then the mean over tasks is the mean over all samples
        pooled = certain([sample for task in tasks for sample in task])
        if pooled is not None:
            return _within(pooled, limits)
    of_tasks = [certain(task) for task in tasks]
    numbers = [[*map(value, task)] for task in tasks]
    if not any(of_tasks):
        return _within(student(numbers), limits)
    # Each side's distances from the means are joined as standard errors are (MOVER: Zou and Donner, Statistics in Medicine 27:1693).
    means = [*map(statistics.fmean, numbers)]
    ends = [known or student([task]) for known, task in zip(of_tasks, numbers, strict=True)]
    below = math.hypot(*(mean - low for mean, (low, _) in zip(means, ends, strict=True))) / len(tasks)
    above = math.hypot(*(high - mean for mean, (_, high) in zip(means, ends, strict=True))) / len(tasks)
    return _within((_mean(numbers) - below, _mean(numbers) + above), limits)


def _within(interval: Interval, limits: Interval | None) -> Interval:
    return interval if limits is None else (max(interval[0], limits[0]), min(interval[1], limits[1]))


def wilson(right: int, number: int) -> Interval:
    """Wilson's interval of a proportion, `right` of `number`."""
    interval = scipy.stats.binomtest(right, number).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe(pairs: Mapping[Pair, int]) -> Interval:
    """Newcombe's interval of the difference of two paired proportions, the first minus the second.

    pairs: how many pairs have each (first, second) of (1, 1), (1, 0), (0, 1) and (0, 0).
    """
    both, first, second, neither = (pairs.get(pair, 0) for pair in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)))
    number = both + first + second + neither
    one, two = (both + first) / number, (both + second) / number
    (one_low, one_high), (two_low, two_high) = wilson(both + first, number), wilson(both + second, number)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    product = both * neither - first * second
    # A positive correlation narrows the interval, so it is corrected for continuity.
    correlation = (max(0.0, product - number / 2) if product > 0 else product) / math.sqrt(margins) if margins else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    return one - two - joined(one - one_low, two_high - two), one - two + joined(one_high - one, two - two_low)


def mcnemar(pairs: Mapping[Pair, int]) -> float:
    """The exact p-value, two-sided, of McNemar's test: are pairs that differ as likely to do so in either direction?"""
    first, second = pairs.get((1.0, 0.0), 0), pairs.get((0.0, 1.0), 0)
    return float(scipy.stats.binomtest(first, first + second).pvalue) if first + second else 1.0


def student(tasks: Sequence[Sequence[float]]) -> Interval:
    """Student's t interval of the mean over tasks of their samples' means, with Welch's and Satterthwaite's degrees of freedom."""
    variances = [statistics.variance(samples) / len(samples) / len(tasks) ** 2 for samples in tasks]
    total, mean = math.fsum(variances), _mean(tasks)
    if not total:
        return mean, mean
    freedom = total**2 / math.fsum(variance**2 / (len(samples) - 1) for variance, samples in zip(variances, tasks, strict=True))
    reach = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)
    return mean - reach, mean + reach


def unseen_share(number: int) -> float:
    """The share of other samples that `number` samples, all alike, leave possible: the exact one-sided 95 % bound."""
    return float(scipy.stats.binomtest(0, number, alternative="less").proportion_ci(CONFIDENCE, method="exact").high)
