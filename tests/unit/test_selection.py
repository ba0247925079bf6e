"""Which positions are kept, on cases small enough to work out by hand, and against a plain sort."""

from typing import Any

import pytest
import torch

from obcache_sglang.scoring.selection import (
    effective_window,
    select_positions,
    static_scores,
)

PLAIN: dict[str, Any] = {
    "window": 0,
    "sink_tokens": 0,
    "pooling": "none",
    "kernel_size": 5,
    "heads": "per-head",
    "shrink_window": False,
}


def select(scores: list[list[float]], num_slots: int, **changes: Any) -> list[list[int]]:
    return select_positions(torch.tensor(scores, dtype=torch.float32), num_slots, **(PLAIN | changes)).tolist()


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
    assert select([[1, 2, 3], [3, 2, 1]], 3, window=1, pooling="max", heads="shared") == [[0, 1, 2], [0, 1, 2]]


def test_shared_heads_use_the_mean() -> None:
    scores = [[9, 0, 4, 0], [0, 0, 6, 1]]
    assert select(scores, 1) == [[0], [2]]
    assert select(scores, 1, heads="shared") == [[2], [2]]


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
        positions = select_positions(scores, num_slots, **PLAIN)
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :num_slots].sort(dim=-1).values
        assert positions.dtype == torch.int64
        assert torch.equal(positions, best)
    assert torch.equal(scores, untouched)


def test_not_a_number_ranks_last_and_breaks_nothing() -> None:
    nan, inf = float("nan"), float("inf")
    assert select([[nan, 1, nan, 2, 0]], 2) == [[1, 3]]
    assert select([[nan, nan, nan, nan, nan]], 3) == [[0, 1, 2]]
    assert select([[nan, inf, nan, 2, 0]], 3, sink_tokens=1) == [[0, 1, 3]]


@pytest.mark.parametrize(
    ("num_slots", "changes", "message"),
    [
        (0, {}, r"num_slots=0 is outside 1 \.\. 3"),
        (4, {}, r"num_slots=4 is outside 1 \.\. 3"),
        (2, {"pooling": "mean"}, "'mean' is unknown; choose one of none, average, max"),
        (2, {"heads": "all"}, "'all' is unknown; choose one of per-head, shared"),
        (2, {"pooling": "max", "kernel_size": 4}, "kernel_size=4 is even"),
    ],
)
def test_refuses(num_slots: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select([[1, 2, 3]], num_slots, **changes)


def test_streaming_keeps_sinks_and_the_latest() -> None:
    scores = static_scores("streaming", 2, 10, seed=0, device="cpu")
    assert select_positions(scores, 5, **(PLAIN | {"sink_tokens": 2})).tolist() == [[0, 1, 7, 8, 9]] * 2


def test_random_is_seeded_and_per_head() -> None:
    scores = static_scores("random", 3, 1000, seed=7, device="cpu")
    assert scores.shape == (3, 1000) and scores.dtype == torch.float32
    assert torch.equal(scores, static_scores("random", 3, 1000, seed=7, device="cpu"))
    assert not torch.equal(scores, static_scores("random", 3, 1000, seed=8, device="cpu"))
    assert not torch.equal(scores[0], scores[1])
    assert 0.4 < scores.mean() < 0.6


def test_static_scores_refuse_methods_with_queries() -> None:
    with pytest.raises(ValueError, match="'snapkv' needs queries; static scores exist for streaming, random"):
        static_scores("snapkv", 2, 10, seed=0, device="cpu")
