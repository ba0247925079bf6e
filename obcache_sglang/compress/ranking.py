"""From token scores to the positions that are kept. Scores and positions are per KV head; KV slots are not known here."""

import pkgutil

import torch
import torch.nn.functional as F

from obcache_sglang.settings import METHODS, POOLINGS


def effective_window(window: int, num_slots: int, shrink: bool) -> int:
    """The observation window in tokens once it has made room for other tokens.

    With shrink, a window larger than half of num_slots becomes half of it (at least 1), since the window is always kept
    and would leave nothing to choose. A window of 0 stays 0.
    """
    return min(window, max(1, num_slots // 2)) if shrink else window


def position_scores(method: str, num_kv_heads: int, context_len: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """Scores [num_kv_heads, context_len] float32 of a method that looks at no query, by the function that its row names.

    seed: for methods that draw. Raises ValueError for a method whose queries score.
    """
    name = METHODS[method].position_scores
    if name is None:
        raise ValueError(f"method {method!r} needs queries: positions alone give it no scores")
    scores: torch.Tensor = pkgutil.resolve_name(name)(num_kv_heads, context_len, seed, device)
    return scores


def latest_first(num_kv_heads: int, context_len: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """Prefers later tokens: StreamingLLM (arXiv 2309.17453), once sinks are protected. As `position_scores`: [num_kv_heads, context_len] float32."""
    # float32 counts exactly up to 2**24 tokens.
    return torch.arange(context_len, dtype=torch.float32, device=device).repeat(num_kv_heads, 1)


def random_scores(num_kv_heads: int, context_len: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """Drawn uniformly for each head, the same for equal seeds on every device: [num_kv_heads, context_len] float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_kv_heads, context_len, generator=generator).to(device)


def rank_positions(
    scores: torch.Tensor,
    num_slots: int,
    *,
    window: int,
    sink_tokens: int,
    pooling: str,
    kernel_size: int,
    shrink_window: bool,
) -> torch.Tensor:
    """The scores that `keep_per_head` and `keep_across_heads` choose by: pooled, with what is always kept above all others.

    scores: [num_kv_heads, context_len] float32, higher is kept; not modified. -inf: a token that the head no longer has.
    num_slots: positions that a head keeps of an even share, 1 <= num_slots <= context_len.
    window: the last positions, always kept; shrink_window applies :func:`effective_window` first.
    sink_tokens: the first positions, always kept (attention sinks, arXiv 2309.17453). If sinks and window exceed
        num_slots, the sinks come first and the window keeps its latest positions.
    pooling: "none", "average" or "max" over kernel_size (odd) neighbouring scores, before the window only. "average" is
        SnapKV in KVPress (zeros beyond the ends count); "max" is the OBCache paper's.

    Returns [num_kv_heads, context_len] float32: +inf for at most num_slots positions of a head, its sinks and its window; the lowest
    number for window positions that lost their place; -inf for tokens that the head no longer has. Raises ValueError. No step waits for the device.
    """
    context_len = scores.shape[1]
    _check("num_slots", num_slots, 1, context_len, "the tokens of the context")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")

    window = min(effective_window(window, num_slots, shrink_window), context_len)
    before_window = context_len - window
    num_sinks = min(sink_tokens, num_slots)
    num_recent = min(window, num_slots - num_sinks)

    # Window positions that lost their place to sinks rank last of all that there are.
    ranked = torch.full_like(scores, torch.finfo(scores.dtype).min)
    if before_window:
        # A score that overflowed must not rank with what is always kept.
        pooled = _pool(scores[:, :before_window], pooling, kernel_size).clamp(max=torch.finfo(scores.dtype).max)
        ranked[:, :before_window] = pooled
    ranked[:, :num_sinks] = float("inf")
    ranked[:, context_len - num_recent :] = float("inf")
    return ranked.masked_fill_(scores == float("-inf"), float("-inf"))


def protect_recent(ranked: torch.Tensor, recent: list[int]) -> torch.Tensor:
    """The ranks [rows, context_len] float32 with the last recent[i] positions of each row i above all others, but for those at -inf.

    ranked: as of :func:`rank_positions`; not modified. The caller keeps as many of each row, and its sinks. No step waits for the device.
    """
    if not any(recent):
        return ranked
    first = torch.tensor([ranked.shape[1] - each for each in recent]).to(ranked.device, non_blocking=True).unsqueeze(1)
    is_recent = torch.arange(ranked.shape[1], device=ranked.device) >= first
    return ranked.masked_fill(is_recent & (ranked != float("-inf")), float("inf"))


def keep_per_head(ranked: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The num_slots highest positions of each head: a uniform budget.

    ranked: [num_kv_heads, context_len], of :func:`rank_positions`. Returns [num_kv_heads, num_slots] int64, ascending.
    Equal ranks: the earlier position; NaN ranks last. Raises ValueError. No step waits for the device.
    """
    num_kv_heads, context_len = ranked.shape
    _check("num_slots", num_slots, 1, context_len, "the tokens of the context")
    keep = _highest(comparable(ranked), num_slots)
    return torch.nonzero_static(keep, size=num_kv_heads * num_slots)[:, 1].view(num_kv_heads, num_slots)


def keep_across_heads(ranked: torch.Tensor, total: int, *, safe_per_head: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The total highest tokens of all rows together: heads with higher ranks keep more of them.

    ranked: [rows, context_len] float, of :func:`rank_positions`; one row is one KV head of one layer (adakv) or of all
        layers (global). +inf is always kept where no row has more of them than total // rows, as `rank_positions` sees to.
    safe_per_head: each row's own highest tokens that it keeps before any row competes (AdaKV's safeguard, arXiv 2407.11550).
    total: tokens kept in all, from rows * safe_per_head to rows * context_len.

    Returns positions [total] int32, row by row and ascending in each, and offsets [rows + 1] int64: row i keeps
    ``positions[offsets[i]:offsets[i + 1]]``. Equal ranks: the earlier row, then the earlier position; NaN ranks last.
    Raises ValueError. No step waits for the device.
    """
    rows, context_len = ranked.shape
    _check("safe_per_head", safe_per_head, 0, context_len, "the tokens of the context")
    _check("total", total, rows * safe_per_head, rows * context_len, "the safeguards and all tokens of all heads")
    ranked = comparable(ranked)
    safe = _highest(ranked, safe_per_head)
    others = _highest(ranked.reshape(1, -1), total - rows * safe_per_head, taken=safe.reshape(1, -1))
    keep = safe | others.view(rows, context_len)
    positions = torch.nonzero_static(keep, size=total)[:, 1].to(torch.int32)
    return positions, F.pad(keep.sum(-1).cumsum(0), (1, 0))


def keep_counts(ranked: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The counts[i] highest tokens of each row i: a budget that is known beforehand, as from a head profile.

    ranked: [rows, context_len] float, of :func:`rank_positions`. counts: one for each row, 0 to context_len.

    Returns positions [sum(counts)] int32, row by row and ascending in each, and offsets [rows + 1] int64: row i keeps
    ``positions[offsets[i]:offsets[i + 1]]``. Equal ranks: the earlier position; NaN ranks last. Raises ValueError. No step
    waits for the device.
    """
    rows, context_len = ranked.shape
    if len(counts) != rows:
        raise ValueError(f"counts has {len(counts)} values; ranked has {rows} rows")
    for count in counts:
        _check("count", count, 0, context_len, "the tokens of the context")
    ranked = comparable(ranked)
    wanted = torch.tensor(counts).to(ranked.device, non_blocking=True).unsqueeze(1)
    # At least one, so that there is a threshold; a row that keeps nothing has no equals either.
    highest = torch.topk(ranked, max(1, *counts), dim=-1).values
    keep = _down_to(ranked, highest.gather(1, (wanted - 1).clamp_min(0)), wanted)
    positions = torch.nonzero_static(keep, size=sum(counts))[:, 1].to(torch.int32)
    return positions, F.pad(wanted.view(-1).cumsum(0), (1, 0))


def _check(name: str, value: int, lowest: int, highest: int, bounds: str) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"{name}={value} is outside {lowest} .. {highest}, {bounds}")


def comparable(ranked: torch.Tensor) -> torch.Tensor:
    """ranked, [rows, tokens] float32, with NaN as -inf: NaN compares with nothing, and must rank last."""
    return ranked.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def _highest(ranked: torch.Tensor, count: int, taken: torch.Tensor | None = None) -> torch.Tensor:
    """Which are the count highest of each row of ranked [rows, tokens] (no NaN), the earlier of equals: bool [rows, tokens].

    taken: bool [rows, tokens], tokens that are not to be chosen; at least count of each row remain.

    A threshold and a running count do what two sorts would, several times as fast, and fixed shapes keep it free of
    device synchronisation (nonzero would wait).
    """
    if count == 0:
        return torch.zeros_like(ranked, dtype=torch.bool)
    # As -inf, taken tokens do not raise the threshold; where that is -inf itself, only the mask tells them from the others.
    free = ranked if taken is None else ranked.masked_fill(taken, float("-inf"))
    threshold = torch.topk(free, count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return _down_to(free, threshold, count, taken)


def _down_to(
    free: torch.Tensor, threshold: torch.Tensor, count: int | torch.Tensor, taken: torch.Tensor | None = None
) -> torch.Tensor:
    """Which of free [rows, tokens] are above their row's threshold [rows, 1], and the earlier of those equal to it up to count.

    count: of each row, an int or [rows, 1]. taken: bool [rows, tokens], never chosen as equals. Returns bool [rows, tokens].
    """
    above, equal = free > threshold, free == threshold
    if taken is not None:
        equal &= ~taken
    equal_wanted = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= equal_wanted))


def _pool(scores: torch.Tensor, pooling: str, kernel_size: int) -> torch.Tensor:
    """Pool each row of scores [rows, tokens] over neighbours; the shape stays."""
    if pooling == "none":
        return scores
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is even; pooling needs an odd one to be centred on its token")
    pool = F.avg_pool1d if pooling == "average" else F.max_pool1d
    return pool(scores, kernel_size, stride=1, padding=kernel_size // 2)
