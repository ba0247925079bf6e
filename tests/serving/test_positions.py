"""The positions a real server keeps: KVPress's own, and the same whether or not the window spans two prefill chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.server import Server
from obcache_sglang.config import CompressionSettings
from obcache_sglang.scoring.ops import accumulate_scores
from obcache_sglang.scoring.selection import select_positions
from tests.unit.test_kvpress import CONTEXT_LEN, FIXTURE, METHODS, Layer, layers, share_in_common

__all__ = ["layers"]  # a fixture


def kept_by_server(server: Server, **settings: Any) -> list[list[set[int]]]:
    made = server.post("/obcache/compress", {"input_ids": FIXTURE["token_ids"], **settings})
    positions = server.get(f"/obcache/contexts/{made['id']}", params={"positions": "true"})["positions"]
    return [[set(head) for head in layer] for layer in positions]


@pytest.mark.parametrize("run", FIXTURE["runs"], ids=lambda run: f"{run['press']}-{run['compression_ratio']}")
def test_the_server_keeps_what_kvpress_keeps(server: Server, run: dict[str, Any]) -> None:
    """0.6 % are left for scores that differ by float32 noise and swap places at the edge of the kept set."""
    kept = kept_by_server(
        server,
        preset="kvpress",
        method=METHODS[run["press"]],
        score="attention",
        compression_ratio=run["compression_ratio"],
    )
    assert share_in_common(kept, run) >= 0.994


@pytest.mark.parametrize(("method", "window"), [("snapkv", 400), ("h2o", "all")])
def test_a_window_that_spans_two_chunks_scores_as_one(
    server: Server, layers: list[Layer], method: str, window: int | str
) -> None:
    """The server prefills 841 tokens in chunks of 512; transformers in one piece."""
    wish = {"method": method, "window": window, "compression_ratio": 0.5, "preset": "kvpress", "score": "obcache-kv"}
    settings = CompressionSettings.resolve(wish)
    start = CONTEXT_LEN - settings.window if settings.window else 0
    assert start < 512
    common = total = 0
    for (q, k, v, scale), heads in zip(layers, kept_by_server(server, **wish), strict=True):
        scores = torch.zeros(k.shape[1], CONTEXT_LEN)
        accumulate_scores(scores, q[start:], k, v, start=start, scale=scale, score=settings.score)
        expected = select_positions(
            scores,
            settings.kept_tokens(CONTEXT_LEN),
            window=settings.window,
            sink_tokens=settings.sink_tokens,
            pooling=settings.pooling,
            kernel_size=settings.kernel_size,
            heads=settings.heads,
            shrink_window=False,
        )
        for ours, theirs in zip(heads, expected.tolist(), strict=True):
            common += len(ours & set(theirs))
            total += len(theirs)
    assert common / total >= 0.994
