"""Which positions are kept, on cases small enough to work out by hand, and against a plain sort."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from obcache_sglang.compress.ranking import (
    effective_window,
    keep_across_heads,
    keep_counts,
    keep_per_head,
    position_scores,
    rank_positions,
)

PLAIN: dict[str, Any] = {
    "window": 0,
    "sink_tokens": 0,
    "pooling": "none",
    "kernel_size": 5,
    "shrink_window": False,
}


def select(scores: list[list[float]], num_slots: int, **changes: Any) -> list[list[int]]:
    ranked = rank_positions(torch.tensor(scores, dtype=torch.float32), num_slots, **(PLAIN | changes))
    return keep_per_head(ranked, num_slots).tolist()


def across(ranked: torch.Tensor | list[list[float]], total: int, safe_per_head: int = 0) -> list[list[int]]:
    """`keep_across_heads` as a list of positions for each row."""
    ranked = torch.as_tensor(ranked, dtype=torch.float32)
    positions, offsets = keep_across_heads(ranked, total, safe_per_head=safe_per_head)
    assert positions.shape == (total,) and positions.dtype == torch.int32
    assert offsets.shape == (len(ranked) + 1,) and offsets.dtype == torch.int64
    bounds = offsets.tolist()
    assert bounds[0] == 0 and bounds[-1] == total
    return [positions[first:last].tolist() for first, last in itertools.pairwise(bounds)]


def across_plainly(ranked: torch.Tensor, total: int, safe_per_head: int) -> list[list[int]]:
    """What `keep_across_heads` promises, by sorting Python floats."""
    cells = [
        (-math.inf if math.isnan(rank) else rank, row, position)
        for row, ranks in enumerate(ranked.double().tolist())
        for position, rank in enumerate(ranks)
    ]
    cells.sort(key=lambda cell: (-cell[0], cell[1], cell[2]))
    safe = {cell for row in range(len(ranked)) for cell in [c for c in cells if c[1] == row][:safe_per_head]}
    kept = [*safe, *[cell for cell in cells if cell not in safe][: total - len(safe)]]
    return [sorted(position for _, row, position in kept if row == head) for head in range(len(ranked))]


@pytest.mark.parametrize(
    ("window", "num_slots", "shrink", "expected"),
    [(64, 128, True, 64), (64, 127, True, 63), (64, 100, False, 64), (64, 1, True, 1), (0, 10, True, 0), (1, 1, True, 1)],
)
def test_effective_window(window: int, num_slots: int, shrink: bool, expected: int) -> None:
    assert effective_window(window, num_slots, shrink) == expected


def test_highest_scores_in_ascending_order() -> None:
    assert select([[1, 9, 2, 8, 3], [5, 4, 3, 2, 1]], 2) == [[1, 3], [0, 1]]


def test_equal_scores_keep_the_earlier() -> None:
    assert select([[0, 7, 7, 7, 7, 9]], 3) == [[1, 2, 5]]
    assert select([[0.0] * 6], 4) == [[0, 1, 2, 3]]


def test_window_and_sinks_are_kept() -> None:
    scores = [[0, 0, 5, 9, 7, 8, 0, 0]]
    assert select(scores, 5, window=2, sink_tokens=1) == [[0, 3, 5, 6, 7]]
    assert select(scores, 4, window=2, sink_tokens=2) == [[0, 1, 6, 7]]


@pytest.mark.parametrize(
    ("num_slots", "window", "sink_tokens", "expected"),
    [
        (4, 6, 1, [0, 5, 6, 7]),  # the window keeps its latest positions
        (3, 2, 4, [0, 1, 2]),  # sinks come first
        (1, 8, 0, [7]),
        (7, 50, 2, [0, 1, 3, 4, 5, 6, 7]),  # a window longer than the context
        (7, 8, 4, [0, 1, 2, 3, 5, 6, 7]),  # a window over the sinks
    ],
)
def test_sinks_and_window_beyond_the_slots(num_slots: int, window: int, sink_tokens: int, expected: list[int]) -> None:
    assert select([[0, 0, 0, 0, 99, 0, 0, 0]], num_slots, window=window, sink_tokens=sink_tokens) == [expected]


def test_shrunk_window_leaves_room_and_pools_to_its_own_edge() -> None:
    scores = [[3, 9, 8, 1, 7, 6, 0, 0]]
    assert select(scores, 4, window=6, shrink_window=True) == [[1, 2, 6, 7]]
    assert select(scores, 4, window=6, shrink_window=False) == [[4, 5, 6, 7]]


def test_all_positions_when_nothing_is_removed() -> None:
    assert select([[1, 2, 3], [3, 2, 1]], 3, window=1, pooling="max") == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize(("context_len", "window"), [(43, 8), (10, 8), (43, 0)])
def test_pooling_before_the_window_only(context_len: int, window: int, kernel_size: int, pooling: str) -> None:
    """Against pooling one position at a time, on whole numbers: float32 sums are exact, and equal ones stay equal."""
    generator = torch.Generator().manual_seed(kernel_size)
    scores = torch.randint(0, 50, (2, context_len), generator=generator).float()
    scores[:, context_len - window :] = 1000  # must not leak into its neighbours
    half, before, num_slots = kernel_size // 2, context_len - window, window + 2 if context_len < 20 else 20
    expected = []
    for row in scores.tolist():
        pooled = []
        for position in range(before):
            near = row[max(0, position - half) : min(before, position + half + 1)]
            pooled.append(
                max(near) if pooling == "max" else sum(near)
            )  # always divided by kernel_size: zeros beyond the ends count
        best = sorted(range(before), key=lambda position: (-pooled[position], position))[: num_slots - window]
        expected.append(sorted(best) + list(range(before, context_len)))
    assert select(scores.tolist(), num_slots, window=window, pooling=pooling, kernel_size=kernel_size) == expected


@pytest.mark.parametrize("context_len", [1, 2, 63, 500])
@pytest.mark.parametrize("levels", [2, 10**6], ids=["ties", "distinct"])
def test_agrees_with_a_stable_sort(context_len: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(context_len)
    scores = torch.randint(0, levels, (3, context_len), generator=generator).float()
    untouched = scores.clone()
    for num_slots in {1, context_len // 3 + 1, context_len}:
        positions = keep_per_head(rank_positions(scores, num_slots, **PLAIN), num_slots)
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :num_slots].sort(dim=-1).values
        assert positions.dtype == torch.int64
        assert torch.equal(positions, best)
    assert torch.equal(scores, untouched)


def test_not_a_number_ranks_last_and_breaks_nothing() -> None:
    nan, inf = float("nan"), float("inf")
    assert select([[nan, 1, nan, 2, 0]], 2) == [[1, 3]]
    assert select([[nan, nan, nan, nan, nan]], 3) == [[0, 1, 2]]
    assert select([[nan, inf, nan, 2, 0]], 3, sink_tokens=1) == [[0, 1, 3]]


def test_overflowed_scores_do_not_rank_with_what_is_always_kept() -> None:
    inf = float("inf")
    assert select([[0, inf, inf, inf, inf, 0]], 3, window=1, sink_tokens=1) == [[0, 1, 5]]
    assert select([[0, inf, inf, inf, inf, 0]], 3, window=1, pooling="average", kernel_size=3) == [[0, 1, 5]]


@pytest.mark.parametrize(
    ("num_slots", "changes", "message"),
    [
        (0, {}, r"num_slots=0 is outside 1 \.\. 3"),
        (4, {}, r"num_slots=4 is outside 1 \.\. 3"),
        (2, {"pooling": "mean"}, "'mean' is unknown; choose one of none, average, max"),
        (2, {"pooling": "max", "kernel_size": 4}, "kernel_size=4 is even"),
    ],
)
def test_refuses(num_slots: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select([[1, 2, 3]], num_slots, **changes)


def test_heads_with_higher_ranks_keep_more() -> None:
    ranked = [[1, 2, 9, 8], [7, 3, 0, 0], [0, 0, 0, 1]]
    assert across(ranked, 4) == [[2, 3], [0, 1], []]
    assert across(ranked, 4, safe_per_head=1) == [[2, 3], [0], [3]]
    assert across(ranked, 3, safe_per_head=1) == [[2], [0], [3]]


def test_equal_ranks_keep_the_earlier_head_and_position() -> None:
    assert across([[0, 5, 5], [5, 5, 0]], 3) == [[1, 2], [0]]
    assert across([[0, 0, 0], [0, 0, 0]], 4) == [[0, 1, 2], [0]]
    assert across([[0, 0, 0], [0, 0, 0]], 4, safe_per_head=1) == [[0, 1, 2], [0]]
    assert across([[0, 0, 0], [0, 0, 0]], 5, safe_per_head=2) == [[0, 1, 2], [0, 1]]


def test_the_lowest_ranks_are_told_from_the_safeguards() -> None:
    """-inf is what the safeguards' own cells look like to the threshold, and what NaN ranks as."""
    lost, nan = float("-inf"), float("nan")
    assert across([[lost] * 3, [lost] * 3], 4, safe_per_head=1) == [[0, 1, 2], [0]]
    assert across([[nan, lost, 1], [nan, 2, nan]], 4, safe_per_head=2) == [[0, 2], [0, 1]]
    assert across([[nan, lost, 1], [nan, 2, nan]], 5, safe_per_head=2) == [[0, 1, 2], [0, 1]]


def ranks_random(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, tokens, generator=generator)


def ranks_tied(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 3, (rows, tokens), generator=generator).float()


def ranks_equal(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((rows, tokens), 0.5)


def ranks_neighbouring(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct float32 numbers as close as they come: any arithmetic on them would merge some."""
    steps = torch.randperm(rows * tokens, generator=generator).view(rows, tokens).to(torch.int32)
    return (torch.tensor(1.0).view(torch.int32) + steps).view(torch.float32)


def ranks_beyond_numbers(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """NaN, infinities and the largest numbers among others."""
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), largest, -largest, 0.0, -0.0, 1.0])
    return values[torch.randint(0, len(values), (rows, tokens), generator=generator)]


def ranks_nan(rows: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((rows, tokens), float("nan"))


@pytest.mark.parametrize("ranks", [ranks_random, ranks_tied, ranks_equal, ranks_neighbouring, ranks_beyond_numbers, ranks_nan])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 7), (3, 8), (5, 13)])
def test_every_total_and_safeguard_agrees_with_a_plain_sort(
    ranks: Callable[[int, int, torch.Generator], torch.Tensor], rows: int, tokens: int
) -> None:
    ranked = ranks(rows, tokens, torch.Generator().manual_seed(rows * tokens))
    untouched = ranked.clone()
    for safe_per_head in {0, 1, tokens // 3, tokens}:
        for total in range(rows * safe_per_head, rows * tokens + 1):
            kept = across(ranked, total, safe_per_head)
            assert kept == across_plainly(ranked, total, safe_per_head), (total, safe_per_head)
            assert all(len(head) >= safe_per_head for head in kept)
    assert torch.equal(ranked.view(torch.int32), untouched.view(torch.int32))


def test_all_heads_of_all_layers_agree_with_a_plain_sort() -> None:
    ranked = ranks_random(90, 200, torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 90)[:, None]
    for total in (1, 1800, 9000, 18000):
        assert across(ranked, total) == across_plainly(ranked, total, 0)


def test_protected_tokens_are_all_that_a_low_head_keeps() -> None:
    """Sinks and window outrank everything under every budget, and a head that nothing protects can lose all its tokens."""
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e30], [0.0], [1.0]])
    num_slots, protected = 10, [0, 1, 37, 38, 39]
    ranked = rank_positions(scores, num_slots, **(PLAIN | {"window": 3, "sink_tokens": 2}))
    for safe_per_head in (0, 2, 5):  # the safeguard counts what is protected
        kept = across(ranked, 3 * num_slots, safe_per_head)
        assert kept[1] == kept[2] == protected
        assert len(kept[0]) == 20
    assert across(ranked, 3 * num_slots, 6)[1] == [0, 1, 2, 37, 38, 39]
    bare = across(rank_positions(scores, num_slots, **PLAIN), 3 * num_slots)
    assert [len(head) for head in bare] == [30, 0, 0]


def test_sinks_and_window_beyond_the_slots_fill_every_head_evenly() -> None:
    """What lost its place ranks last in all heads, so none takes another's."""
    ranked = rank_positions(torch.rand(3, 12), 4, **(PLAIN | {"window": 6, "sink_tokens": 1}))
    for safe_per_head in (0, 1, 4):
        assert across(ranked, 12, safe_per_head) == [[0, 9, 10, 11]] * 3


@pytest.mark.parametrize(
    ("total", "safe_per_head", "message"),
    [
        (-1, 0, r"total=-1 is outside 0 \.\. 6"),
        (7, 0, r"total=7 is outside 0 \.\. 6"),
        (3, 2, r"total=3 is outside 4 \.\. 6"),
        (6, 4, r"safe_per_head=4 is outside 0 \.\. 3"),
        (6, -1, r"safe_per_head=-1 is outside 0 \.\. 3"),
    ],
)
def test_refuses_totals_that_cannot_be(total: int, safe_per_head: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_across_heads(torch.zeros(2, 3), total, safe_per_head=safe_per_head)


def counted(ranked: torch.Tensor | list[list[float]], counts: list[int]) -> list[list[int]]:
    """`keep_counts` as a list of positions for each row."""
    positions, offsets = keep_counts(torch.as_tensor(ranked, dtype=torch.float32), counts)
    assert positions.shape == (sum(counts),) and positions.dtype == torch.int32
    assert offsets.dtype == torch.int64 and offsets.diff().tolist() == counts and offsets[0] == 0
    return [positions[first:last].tolist() for first, last in itertools.pairwise(offsets.tolist())]


def test_each_row_keeps_its_own_count() -> None:
    assert counted([[1, 2, 9, 8], [7, 3, 0, 0], [0, 0, 0, 1]], [3, 0, 1]) == [[1, 2, 3], [], [3]]
    assert counted([[5, 5, 5], [1, 5, 5]], [2, 1]) == [[0, 1], [1]]
    assert counted([[5, 5, 5]], [0]) == [[]]
    lost, nan, inf = float("-inf"), float("nan"), float("inf")
    assert counted([[nan, lost, 1, inf], [nan, 2, nan, nan]], [3, 3]) == [[0, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("ranks", [ranks_random, ranks_tied, ranks_equal, ranks_neighbouring, ranks_beyond_numbers, ranks_nan])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 7), (90, 63)])
def test_counts_agree_with_a_plain_sort(ranks: Callable[..., torch.Tensor], rows: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(rows * tokens)
    ranked = ranks(rows, tokens, generator)
    for _ in range(5):
        counts = torch.randint(0, tokens + 1, (rows,), generator=generator).tolist()
        expected = [across_plainly(ranked[row : row + 1], count, 0)[0] for row, count in enumerate(counts)]
        assert counted(ranked, counts) == expected
    assert counted(ranked, [tokens] * rows) == [list(range(tokens))] * rows


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1], "counts has 1 values; ranked has 2 rows"),
        ([1, 4], r"count=4 is outside 0 \.\. 3"),
        ([-1, 1], r"count=-1 is outside 0 \.\. 3"),
    ],
)
def test_refuses_counts_that_cannot_be(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_counts(torch.zeros(2, 3), counts)


class NoHostSynchronisation(TorchDispatchMode):
    """Raises where an operation would wait for a GPU: it gives the host a value, or a shape that depends on values."""

    WAITING = frozenset({"_local_scalar_dense", "item", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in self.WAITING or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    scores = torch.rand(3, 100)
    with NoHostSynchronisation():
        for pooling in ("none", "average", "max"):
            ranked = rank_positions(scores, 20, window=8, sink_tokens=4, pooling=pooling, kernel_size=5, shrink_window=True)
            keep_per_head(ranked, 20)
            keep_across_heads(ranked, 60)
            keep_across_heads(ranked, 60, safe_per_head=4)
            keep_counts(ranked, [40, 4, 16])
        for waiting in (lambda: scores[scores > 0.5], lambda: scores.max().item(), lambda: scores.nonzero()):
            with pytest.raises(AssertionError, match="waits for the device"):
                waiting()


def test_streaming_keeps_sinks_and_the_latest() -> None:
    scores = position_scores("streaming", 2, 10, seed=0, device="cpu")
    assert select(scores.tolist(), 5, sink_tokens=2) == [[0, 1, 7, 8, 9]] * 2


def test_random_is_seeded_and_per_head() -> None:
    scores = position_scores("random", 3, 1000, seed=7, device="cpu")
    assert scores.shape == (3, 1000) and scores.dtype == torch.float32
    assert torch.equal(scores, position_scores("random", 3, 1000, seed=7, device="cpu"))
    assert not torch.equal(scores, position_scores("random", 3, 1000, seed=8, device="cpu"))
    assert not torch.equal(scores[0], scores[1])
    assert 0.4 < scores.mean() < 0.6


def test_position_scores_refuse_methods_with_queries() -> None:
    with pytest.raises(ValueError, match="'snapkv' needs queries"):
        position_scores("snapkv", 2, 10, seed=0, device="cpu")
