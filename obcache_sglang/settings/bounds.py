"""Lowest and highest values of numbers in settings and requests."""

from __future__ import annotations

# Clients may send any number: none may overflow, or cost other clients much. Numbers of tokens are bounded by the longest
# contexts that models serve today.
_LONGEST_CONTEXT = 1 << 24
BOUNDS: dict[str, tuple[float, float, str]] = {
    "window": (1, 8192, "every further query reads the whole context again"),
    "kernel_size": (1, 127, "wider smoothing would keep whatever is near"),
    "sink_tokens": (0, _LONGEST_CONTEXT, "no context is longer"),
    "recent_tokens": (0, _LONGEST_CONTEXT, "no context is longer"),
    "max_kept_tokens": (1, _LONGEST_CONTEXT, "no context is longer"),
    "segment_tokens": (128, _LONGEST_CONTEXT, "each segment is a compression of its own, which shorter ones would not be worth"),
    "exact_segments": (0, 256, "a context that stays exact for longer needs no compression"),
    "replay_chunk": (32, 1 << 20, "each pass also reads a prompt of its own, which would outweigh shorter chunks"),
    "keep_last_turns": (1, 4096, "no prompt has more boundaries"),
    "context_len": (1, _LONGEST_CONTEXT, "no context is longer"),
    "ttl_seconds": (1, 366 * 86400, "at most a year"),
    "wait_seconds": (0, 600, "at most ten minutes"),
    "min_tokens": (1, _LONGEST_CONTEXT, "no context is longer"),
    "max_contexts": (1, 1 << 20, "the tokens of each stay in memory"),
    "folder_gb": (0.001, 1e9, "a folder that holds no context is of no use"),
    "max_pinned_slots": (0, 1 << 40, "no KV pool is larger"),
}
"""Lowest and highest value of every number that is not a fraction, and the reason for the bound."""
