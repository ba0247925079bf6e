"""What heads lose without their last tokens, against the definition in float64, and how a budget is divided by it."""

from __future__ import annotations

import itertools

import pytest
import torch

from obcache_sglang.scoring import reference
from obcache_sglang.scoring.head_budgets import SampledQueries, divide_by_errors, kept_numbers, pruning_errors, sampled_rows

KV_HEADS, GROUP, HEAD_DIM, CONTEXT, BEHIND = 2, 3, 16, 57, 9


@pytest.mark.parametrize("positions", [[CONTEXT + 2, CONTEXT + 3, CONTEXT + BEHIND - 1], [3, 40, CONTEXT - 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_those_of_the_pruned_attention(positions: list[int], dtype: torch.dtype) -> None:
    """Queries behind the context, and queries of the context itself that see a part of it."""
    torch.manual_seed(0)
    total = CONTEXT + BEHIND
    slots = torch.randperm(100)[:total]
    keys, values = (torch.randn(100, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    q = (3 * torch.randn(len(positions), KV_HEADS * GROUP, HEAD_DIM)).to(dtype)
    weights = torch.rand(len(positions), KV_HEADS * GROUP)
    order = torch.stack([torch.cat([torch.tensor([0]), torch.randperm(CONTEXT - 1) + 1]) for _ in range(KV_HEADS)])
    numbers = kept_numbers(4, CONTEXT)
    samples = [
        SampledQueries.take(
            q[some],
            torch.tensor(positions)[some],
            weights[some],
            keys[slots[CONTEXT:]],
            values[slots[CONTEXT:]],
            context_len=CONTEXT,
            scale=0.25,
        )
        for some in (slice(0, 1), slice(1, None))
    ]
    errors = pruning_errors(SampledQueries.joined(samples), order, numbers, keys, values, slots[:CONTEXT])
    expected = torch.zeros(KV_HEADS, len(numbers), dtype=torch.float64)
    for row, position in enumerate(positions):
        for head in range(KV_HEADS * GROUP):
            lane = head // GROUP
            k, v = (each[slots, lane][: position + 1].double() for each in (keys, values))
            _, seen, _ = reference.attention(q[row : row + 1, head].double(), k, v, start=position, scale=0.25)
            for column, number in enumerate(numbers):
                kept = torch.ones(total, dtype=torch.bool)
                kept[order[lane, number:]] = False
                (error,) = reference.pruning_errors(seen, v, kept[: position + 1])
                expected[lane, column] += weights[row, head] * error
    assert (errors[:, -1] == 0).all() and (errors[:, 0] > 0.1).all()
    torch.testing.assert_close(errors.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_query_that_is_left_with_nothing_spoils_no_error() -> None:
    """Where the tokens kept first are all behind it."""
    torch.manual_seed(0)
    q, keys, values = torch.randn(1, 1, HEAD_DIM), torch.randn(8, 1, HEAD_DIM), torch.randn(8, 1, HEAD_DIM)
    none = keys[:0]
    sample = SampledQueries.take(q, torch.tensor([3]), torch.ones(1, 1), none, none, context_len=8, scale=0.25)
    order = torch.arange(7, -1, -1)[None]
    errors = pruning_errors(sample, order, list(range(1, 9)), keys, values, torch.arange(8))
    assert errors.isfinite().all() and errors[0, -1] == 0 and (errors[0, :4] > 0).all()


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


def test_errors_that_cannot_be_compared_still_divide() -> None:
    errors = torch.tensor([[float("nan")] * 3, [1.0, 0.5, 0.0], [float("inf"), 3.0, 0.0]])
    assert divide_by_errors(errors, [1, 2, 3], 6) == [1, 2, 3]
    assert divide_by_errors(errors, [1, 2, 3], 8) == [2, 3, 3]


@pytest.mark.parametrize("total", [3, 13])
def test_refuses_totals_that_cannot_be(total: int) -> None:
    with pytest.raises(ValueError, match=rf"total={total} is outside 4 \.\. 12"):
        divide_by_errors(torch.zeros(2, 3), [2, 4, 6], total)
