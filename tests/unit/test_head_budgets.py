"""What heads lose without their last tokens, against the definition in float64, and how a budget is divided by it."""

from __future__ import annotations

import itertools

import pytest
import torch

from obcache_sglang.compress import reference
from obcache_sglang.compress.measured_errors import SampledQueries, divide_by_errors, kept_numbers, pruning_errors, sampled_rows

KV_HEADS, GROUP, HEAD_DIM, CONTEXT, BEHIND = 2, 3, 16, 57, 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_those_of_the_pruned_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    total, seen = CONTEXT + BEHIND, torch.tensor([1, 3, 4, BEHIND])
    slots = torch.randperm(100)[:total]
    keys, values = (torch.randn(100, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    q = (3 * torch.randn(len(seen), KV_HEADS * GROUP, HEAD_DIM)).to(dtype)
    weights = torch.rand(len(seen), KV_HEADS * GROUP)
    order = torch.stack([torch.randperm(CONTEXT) for _ in range(KV_HEADS)])
    numbers = kept_numbers(4, CONTEXT)
    behind = slots[CONTEXT:]
    samples = [
        SampledQueries.take(q[some], weights[some], keys[behind], values[behind], seen[some], scale=0.25)
        for some in (slice(0, 1), slice(1, None))
    ]
    errors = pruning_errors(SampledQueries.joined(samples), order, numbers, keys, values, slots[:CONTEXT])
    expected = torch.zeros(KV_HEADS, len(numbers), dtype=torch.float64)
    for row, num_seen in enumerate(seen.tolist()):
        for head in range(KV_HEADS * GROUP):
            lane, end = head // GROUP, CONTEXT + num_seen
            k, v = (each[slots[:end], lane].double() for each in (keys, values))
            _, attended, _ = reference.attention(q[row : row + 1, head].double(), k, v, start=end - 1, scale=0.25)
            for column, number in enumerate(numbers):
                kept = torch.ones(end, dtype=torch.bool)
                kept[order[lane, number:]] = False
                (error,) = reference.pruning_errors(attended, v, kept)
                expected[lane, column] += weights[row, head] * error
    assert (errors[:, -1] == 0).all() and (errors[:, 0] > 0.1).all()
    torch.testing.assert_close(errors.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 300, 1000])
@pytest.mark.parametrize("num_queries", [1, 40, 64, 129, 1000])
def test_as_many_queries_are_sampled_in_chunks_of_any_length(num_queries: int, chunk: int) -> None:
    queries = torch.arange(num_queries)
    sampled = [queries[first : first + chunk] for first in range(0, num_queries, chunk)]
    sampled = [some[sampled_rows(int(some[0]), len(some), num_queries)] for some in sampled]
    whole = queries[sampled_rows(0, num_queries, num_queries)]
    assert torch.equal(torch.cat(sampled), whole)
    assert min(num_queries, 32) <= len(whole) < 64 and len(whole.diff().unique()) <= 1


def test_numbers_grow_to_the_context() -> None:
    numbers = kept_numbers(12, 100_000)
    assert numbers[0] == 12 and numbers[-1] == 100_000
    steps = [last - first for first, last in itertools.pairwise(numbers)]
    assert all(1 <= step <= max(1, number // 4) for step, number in zip(steps, numbers, strict=False)) and max(steps) == 4096
    assert kept_numbers(1, 4) == [1, 2, 3, 4] and kept_numbers(7, 7) == [7]


@pytest.mark.parametrize("total", [6, 7, 11, 17, 23, 24])
def test_no_division_has_a_smaller_error(total: int) -> None:
    """Of convex curves, by trying all."""
    numbers = list(range(2, 9))
    curves = torch.tensor([[9, 5, 3, 2, 1.2, 0.5, 0], [4, 3.9, 3.8, 3.7, 3.6, 3.5, 0], [40, 30, 20, 10, 5, 1, 0]])
    convex = torch.stack([curves[0], torch.linspace(4, 0, 7), curves[2]])  # what each curve is taken for
    counts = divide_by_errors(curves, numbers, total)
    divisions = [each for each in itertools.product(numbers, repeat=3) if sum(each) == total]

    def error(division: tuple[int, ...]) -> float:
        return sum(float(curve[numbers.index(kept)]) for curve, kept in zip(convex, division, strict=True))

    assert sum(counts) == total
    assert error(tuple(counts)) == pytest.approx(min(map(error, divisions)))


def test_between_two_numbers_a_head_may_keep_any() -> None:
    errors = torch.tensor([[8.0, 0.0, 0.0], [4.0, 2.0, 0.0]])
    assert divide_by_errors(errors, [2, 6, 10], 7) == [5, 2]
    assert divide_by_errors(errors, [2, 6, 10], 13) == [6, 7]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_errors_that_are_not_numbers_are_refused(wrong: float, column: int) -> None:
    """A head whose errors overflowed must not get the fewest tokens, as if it lost nothing."""
    errors = torch.tensor([[3.0, 2.0, 0.0], [1.0, 0.5, 0.0], [2.0, 1.0, 0.0]])
    assert divide_by_errors(errors, [1, 2, 3], 6) == [3, 1, 2]
    errors[1, column] = wrong
    with pytest.raises(ValueError, match="errors of head 1 of 3 are not finite"):
        divide_by_errors(errors, [1, 2, 3], 6)


@pytest.mark.parametrize("total", [3, 13])
def test_refuses_totals_that_cannot_be(total: int) -> None:
    with pytest.raises(ValueError, match=rf"total={total} is outside 4 \.\. 12"):
        divide_by_errors(torch.zeros(2, 3), [2, 4, 6], total)
