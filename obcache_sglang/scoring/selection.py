"""From token scores to the positions that are kept. Scores and positions are per KV head; KV slots are not known here."""

import torch
import torch.nn.functional as F

from obcache_sglang.config import HEADS, POOLINGS


def effective_window(window: int, num_slots: int, shrink: bool) -> int:
    """The observation window in tokens once it has made room for other tokens.

    With shrink, a window larger than half of num_slots becomes half of it (at least 1), since the window is always kept
    and would leave nothing to choose. A window of 0 stays 0.
    """
    return min(window, max(1, num_slots // 2)) if shrink else window


def static_scores(method: str, num_kv_heads: int, context_len: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """Scores [num_kv_heads, context_len] float32 of the methods that look at no query.

    "streaming" prefers later tokens (StreamingLLM, arXiv 2309.17453, once sinks are protected). "random" draws uniformly
    for each head, the same for equal seeds on every device.
    """
    if method == "streaming":
        # float32 counts exactly up to 2**24 tokens.
        return torch.arange(context_len, dtype=torch.float32, device=device).repeat(num_kv_heads, 1)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(num_kv_heads, context_len, generator=generator).to(device)
    raise ValueError(f"method {method!r} needs queries; static scores exist for streaming, random")


def select_positions(
    scores: torch.Tensor,
    num_slots: int,
    *,
    window: int,
    sink_tokens: int,
    pooling: str,
    kernel_size: int,
    heads: str,
    shrink_window: bool,
) -> torch.Tensor:
    """Positions to keep, per KV head.

    scores: [num_kv_heads, context_len] float32, higher is kept; not modified.
    num_slots: positions kept per head, window and sinks included; 1 <= num_slots <= context_len.
    window: the last positions, always kept; shrink_window applies :func:`effective_window` first.
    sink_tokens: the first positions, always kept (attention sinks, arXiv 2309.17453). If sinks and window exceed
        num_slots, the sinks come first and the window keeps its latest positions.
    pooling: "none", "average" or "max" over kernel_size (odd) neighbouring scores, before the window only. "average" is
        SnapKV in KVPress (zeros beyond the ends count); "max" is the OBCache paper's.
    heads: "per-head", or "shared": all heads keep the positions chosen by the mean score over heads.

    Returns [num_kv_heads, num_slots] int64 positions, ascending. Equal scores: the earlier position wins. No step waits
    for the device.
    """
    num_kv_heads, context_len = scores.shape
    if not 1 <= num_slots <= context_len:
        raise ValueError(f"num_slots={num_slots} is outside 1 .. {context_len}, the tokens of the context")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
    if heads not in HEADS:
        raise ValueError(f"heads {heads!r} is unknown; choose one of {', '.join(HEADS)}")
    if num_slots == context_len:
        return torch.arange(context_len, device=scores.device).repeat(num_kv_heads, 1)

    window = min(effective_window(window, num_slots, shrink_window), context_len)
    before_window = context_len - window
    num_sinks = min(sink_tokens, num_slots)
    num_recent = min(window, num_slots - num_sinks)
    if heads == "shared":
        scores = scores.mean(0, keepdim=True)

    # Window positions that lost their place to sinks rank last: then sinks and window fill all slots anyway.
    ranked = torch.full_like(scores, float("-inf"))
    if before_window:
        ranked[:, :before_window] = _pool(scores[:, :before_window], pooling, kernel_size)
    ranked[:, :num_sinks] = float("inf")
    ranked[:, context_len - num_recent :] = float("inf")
    return _top_positions(ranked, num_slots).expand(num_kv_heads, -1).contiguous()


def _top_positions(ranked: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending positions [rows, count] of the count highest of each row of ranked [rows, tokens]; the earlier of equals.

    A threshold and a running count do what two sorts would, several times as fast, and fixed shapes keep it free of
    device synchronisation (nonzero would wait). NaN, which compares with nothing, ranks last.
    """
    ranked = ranked.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    threshold = torch.topk(ranked, count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = ranked > threshold, ranked == threshold
    equal_wanted = count - above.sum(-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(-1) <= equal_wanted))

    # Kept position -> its column; all others -> one column behind, which is cut off.
    column = torch.where(keep, keep.cumsum(-1) - 1, count)
    positions = torch.empty(ranked.shape[0], count + 1, dtype=torch.int64, device=ranked.device)
    positions.scatter_(1, column, torch.arange(ranked.shape[1], device=ranked.device).expand_as(column))
    return positions[:, :count]


def _pool(scores: torch.Tensor, pooling: str, kernel_size: int) -> torch.Tensor:
    """Pool each row of scores [rows, tokens] over neighbours; the shape stays."""
    if pooling == "none":
        return scores
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} is even; pooling needs an odd one to be centred on its token")
    pool = F.avg_pool1d if pooling == "average" else F.max_pool1d
    return pool(scores, kernel_size, stride=1, padding=kernel_size // 2)
