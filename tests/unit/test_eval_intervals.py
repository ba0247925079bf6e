"""Intervals and pairing rules of the evaluation against published and hand-worked cases."""

from __future__ import annotations

import math

import pytest

from obcache_sglang.eval.intervals import (
    FEWEST_PAIRS,
    Estimate,
    difference,
    estimate,
    mcnemar,
    newcombe,
    student,
    unseen_share,
    wilson,
)
from obcache_sglang.eval.words import difference_words, mean_words, unseen_words

Z = 1.959964
BENTUR = {(1.0, 1.0): 1, (1.0, 0.0): 1, (0.0, 1.0): 7, (0.0, 0.0): 12}
"""Airway hyper-responsiveness before and after stem cell transplantation (Bentur et al. 2009), the pairs that Fagerland, Lydersen and
Laake (Statistics in Medicine 33:2850) work through: Newcombe's interval is -0.507 to -0.026, McNemar's exact p 0.070."""


def samples(*tasks: list) -> dict:
    """Tasks whose samples have one question each."""
    return {str(task): {i: [value] for i, value in enumerate(values)} for task, values in enumerate(tasks)}


def pairs(ours: str, theirs: str) -> list[tuple[float, float]]:
    return [(float(one), float(two)) for one, two in zip(ours, theirs, strict=True)]


# --- one proportion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "number"), [(0, 10), (3, 8), (10, 10)])
def test_wilson(right: int, number: int) -> None:
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    p, share = right / number, Z**2 / number
    middle, reach = p + share / 2, Z * math.sqrt(p * (1 - p) / number + share / (4 * number))
    expected = ((middle - reach) / (1 + share), (middle + reach) / (1 + share))
    assert wilson(right, number) == pytest.approx(expected, abs=1e-6)


def test_right_or_wrong_answers_of_tasks_with_as_many_samples_are_counted_together() -> None:
    found = estimate(samples([1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]), bounded=True)
    assert found is not None
    assert (found.mean, found.samples) == (0.75, 8)
    assert (found.low, found.high) == wilson(6, 8)


def test_all_right_is_not_certain() -> None:
    """10 of 10: Wilson's lower end is 1 / (1 + z^2 / 10)."""
    found = estimate(samples([1.0] * 10), bounded=True)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(1 / (1 + Z**2 / 10), abs=1e-6), 1.0)


# --- paired proportions -------------------------------------------------------------------------------------------------


def test_newcombe_as_published() -> None:
    low, high = newcombe(BENTUR)
    assert (round(low, 3), round(high, 3)) == (-0.507, -0.026)
    assert mcnemar(BENTUR) == pytest.approx(2 * (1 + 8) / 2**8)


def test_newcombe_with_positive_correlation() -> None:
    """8 pairs both right, 2 only the second, 2 both wrong: 8/12 and 10/12. 8 * 2 - 0 * 2 = 16, less 12 / 2 for continuity: 10; margins
    8, 4, 10, 2: correlation 10 / sqrt(640)."""
    correlation = 10 / math.sqrt(640)
    (one_low, one_high), (two_low, two_high) = wilson(8, 12), wilson(10, 12)
    below, above = (8 / 12 - one_low, two_high - 10 / 12), (one_high - 8 / 12, 10 / 12 - two_low)
    ends = [math.sqrt(a * a - 2 * correlation * a * b + b * b) for a, b in (below, above)]
    assert newcombe({(1.0, 1.0): 8, (0.0, 1.0): 2, (0.0, 0.0): 2}) == pytest.approx((-2 / 12 - ends[0], -2 / 12 + ends[1]))


def test_newcombe_without_a_margin_has_no_correlation() -> None:
    """Three pairs that all differ alike: 0 of 3 and 3 of 3, Wilson's ends of both joined at right angles."""
    reach = math.hypot(wilson(0, 3)[1], 1 - wilson(3, 3)[0])
    assert newcombe({(0.0, 1.0): 3}) == pytest.approx((-1, -1 + reach))


def test_an_interval_and_the_exact_test_must_agree() -> None:
    """Five pairs of ten that differ alike: Newcombe's interval excludes 0, but 2 / 2**5 is over 0.05. Six: 2 / 2**6 is not."""
    five = difference(samples(pairs("1111100000", "1111111111")), bounded=True)
    six = difference(samples(pairs("1111000000", "1111111111")), bounded=True)
    assert five is not None and six is not None
    assert (five.mean, five.p) == (-0.5, pytest.approx(1 / 16)) and five.high is not None and five.high < 0
    assert (six.mean, six.p) == (-0.6, pytest.approx(1 / 32))
    assert (five.resolved, six.resolved) == (False, True)


def test_the_exact_test_counts_both_directions() -> None:
    """Six against two: 2 * (1 + 8 + 28) / 2**8."""
    found = difference(samples(pairs("00000011" + "1" * 8, "11111100" + "1" * 8)), bounded=True)
    assert found is not None and found.p == pytest.approx(74 / 256)


@pytest.mark.parametrize("number", [2, FEWEST_PAIRS - 1, FEWEST_PAIRS])
def test_fewer_than_six_pairs_cannot_tell(number: int) -> None:
    found = difference(samples(pairs("0" * number, "1" * number)), bounded=True)
    assert found is not None
    assert found.can_tell == found.resolved == (number >= FEWEST_PAIRS)


# --- pairs that are all equal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "points"), [(10, "25.9"), (45, "6.5"), (60, "4.9")])
def test_equal_pairs_are_bounded_not_certain(number: int, points: str) -> None:
    """What happens in 1 - 0.05 ** (1 / n) of pairs is not seen among n of them in one run of twenty."""
    found = difference(samples(pairs("1" * (number - 3) + "000", "1" * (number - 3) + "000")), bounded=True)
    bound = 1 - 0.05 ** (1 / number)
    assert unseen_share(number) == pytest.approx(bound)
    assert found == Estimate(0.0, pytest.approx(-bound), pytest.approx(bound), number, equal=True, p=1.0)
    assert found is not None and not found.resolved
    assert (
        difference_words("accuracy", found) == unseen_words("accuracy", found) == f"no pair differs (95 %: under {points} points)"
    )


def test_equal_pairs_of_several_tasks_are_one_run() -> None:
    found = difference(samples(*[pairs("1" * 15, "1" * 15)] * 3), bounded=True)
    assert found is not None and found.high == pytest.approx(1 - 0.05 ** (1 / 45))


def test_few_equal_pairs_cannot_tell() -> None:
    found = difference(samples(pairs("11", "11")), bounded=True)
    assert found is not None
    assert difference_words("accuracy", found) == "no pair differs (too few samples to tell)"
    assert unseen_words("accuracy", found) == "too few samples to tell"
    unbounded = difference(samples([(2.0, 2.0), (3.0, 3.0)]), bounded=False)
    assert unbounded is not None and unseen_words("nll", unbounded) == "too few samples to tell"


def test_samples_that_are_alike_but_not_countable_are_bounded_too() -> None:
    """Ten means of 0.5 from many questions: another sample is from 0 to 1, so up to 0.5 away."""
    found = estimate({"a": {i: [0.0, 1.0] for i in range(10)}}, bounded=True)
    reach = 0.5 * (1 - 0.05**0.1)
    assert found == Estimate(0.5, pytest.approx(0.5 - reach), pytest.approx(0.5 + reach), 10)
    changed = difference({"a": {i: [(0.0, 1.0), (1.0, 1.0)] for i in range(10)}}, bounded=True)
    assert changed is not None and changed.high == pytest.approx(-0.5 + 1.5 * (1 - 0.05**0.1))


# --- all else -----------------------------------------------------------------------------------------------------------


def test_student_with_few_samples() -> None:
    """0, 1, 1: mean 2/3, standard error 1/3, t with 2 degrees of freedom 4.302653."""
    assert student([[0.0, 1.0, 1.0]]) == pytest.approx((2 / 3 - 4.302653 / 3, 2 / 3 + 4.302653 / 3), abs=1e-6)


def test_student_of_two_tasks() -> None:
    """1, 3 (mean 2, squared error 1) and 0, 0, 3 (mean 1, squared error 1): mean 1.5, error sqrt(2 / 4), degrees of freedom
    2**2 / (1/1 + 1/2) = 8/3, between t(2) = 4.3027 and t(3) = 3.1824: 3.4198."""
    low, high = student([[1.0, 3.0], [0.0, 0.0, 3.0]])
    assert (low + high) / 2 == pytest.approx(1.5)
    reach = (high - low) / 2
    assert 3.1824 < reach / math.sqrt(0.5) < 4.3027
    assert reach / math.sqrt(0.5) == pytest.approx(3.4198, abs=1e-4)


def test_intervals_of_shares_stay_within_their_limits() -> None:
    found = estimate({"a": {0: [0.0, 0.0], 1: [1.0, 0.5]}}, bounded=True)
    assert found is not None and (found.low, found.high) == (0.0, 1.0)
    free = estimate({"a": {0: [0.0], 1: [0.75]}}, bounded=False)
    assert free is not None and free.low is not None and free.low < -4


def test_tasks_of_different_kinds_join_their_distances() -> None:
    """Task a is counted (6 of 8), task b is not (0.25, 0.75: Student's reach is 12.7062 * 0.25): distances from the means are joined
    as errors are."""
    found = estimate(samples([1.0] * 6 + [0.0] * 2, [0.25, 0.75]), bounded=True)
    assert found is not None and found.mean == 0.625
    assert (found.low, found.high) == (0.0, 1.0)
    wide = estimate(samples([1.0] * 6 + [0.0] * 2, [0.25, 0.75] * 20), bounded=True)
    low, high = wilson(6, 8)
    reach = 2.022691 * math.sqrt(0.0625 * 40 / 39 / 40)
    assert wide is not None
    assert wide.low == pytest.approx(0.625 - math.hypot(0.75 - low, reach) / 2, abs=1e-6)
    assert wide.high == pytest.approx(0.625 + math.hypot(high - 0.75, reach) / 2, abs=1e-6)


def test_one_sample_of_a_task_gives_no_interval() -> None:
    found = difference(samples(pairs("0", "1"), pairs("0101", "1111")), bounded=True)
    assert found is not None and (found.low, found.high, found.resolved) == (None, None, False)
    assert difference_words("accuracy", found) == "−0.750 (too few samples to tell)"
    assert mean_words("accuracy", Estimate(0.5, None, None, 1)) == "0.500 (too few samples to tell)"


def test_words() -> None:
    assert difference_words("kl", Estimate(-0.00001, -0.0002, 0.00314, 9)) == "0.0000 (−0.0002 to +0.0031)"
    assert mean_words("accuracy", Estimate(0.75, 0.5, 1.0, 9)) == "0.750 (0.500 to 1.000)"
    assert unseen_words("accuracy", Estimate(0.1, -0.0334, 0.2, 9)) == "up to 0.033"
    assert unseen_words("nll", Estimate(0.1, -0.0334, 0.2, 9)) == "up to 0.200"
