"""How a report writes numbers, means and differences."""

from __future__ import annotations

import math

from obcache_sglang.eval.intervals import Estimate
from obcache_sglang.eval.results import METRICS

TOO_FEW = "too few samples to tell"


def plain(metric: str, value: float) -> str:
    """A number with the metric's decimals; never "-0.000"."""
    digits = METRICS[metric].digits
    return f"{round(value, digits) + 0.0:.{digits}f}"


def signed(metric: str, value: float) -> str:
    text = plain(metric, abs(value))
    return text if not float(text) else f"{'+' if value > 0 else '−'}{text}"


def mean_words(metric: str, estimate: Estimate) -> str:
    """ "0.750 (0.348 to 0.966)": a mean with its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{plain(metric, estimate.mean)} ({TOO_FEW})"
    return f"{plain(metric, estimate.mean)} ({plain(metric, estimate.low)} to {plain(metric, estimate.high)})"


def difference_words(metric: str, estimate: Estimate) -> str:
    """ "−0.250 (−0.482 to −0.012)", "no pair differs (95 %: under 6.5 points)", "+0.500 (too few samples to tell)"."""
    if estimate.equal:
        if not estimate.can_tell:
            return f"no pair differs ({TOO_FEW})"
        return f"no pair differs (95 %: under {_points(estimate)} points)" if METRICS[metric].bounded else "no pair differs"
    if not estimate.can_tell or estimate.low is None or estimate.high is None:
        return f"{signed(metric, estimate.mean)} ({TOO_FEW})"
    return f"{signed(metric, estimate.mean)} ({signed(metric, estimate.low)} to {signed(metric, estimate.high)})"


def unseen_words(metric: str, estimate: Estimate) -> str:
    """ "under 6.5 points", "up to 0.333": the largest change for the worse that an estimate which shows none leaves possible."""
    if not estimate.can_tell or estimate.low is None or estimate.high is None:
        return TOO_FEW
    if estimate.equal:
        return difference_words(metric, estimate)
    return f"up to {plain(metric, unseen_loss(metric, estimate))}"


def unseen_loss(metric: str, estimate: Estimate) -> float:
    """The end of an estimate's interval on the bad side, as a size; 0 where the interval is on the good side."""
    assert estimate.low is not None and estimate.high is not None
    return max(0.0, -estimate.low if METRICS[metric].higher_is_better else estimate.high)


def _points(estimate: Estimate) -> str:
    """The bound of an estimate whose pairs are all equal, in points of 100, rounded up: less than that is what was shown."""
    assert estimate.high is not None
    return f"{math.ceil(round(1000 * estimate.high, 6)) / 10:.1f}"
