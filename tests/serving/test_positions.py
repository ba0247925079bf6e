"""The positions a real server keeps: KVPress's own, and the same whether or not the window spans two prefill chunks."""

from __future__ import annotations

from typing import Any

import pytest

from launch.server import Server
from obcache_sglang.config import CompressionSettings
from tests.unit.test_kvpress import CONTEXT_LEN, FIXTURE, Layer, as_asked, kept_by_us, layers, run_name, share_in_common

__all__ = ["layers"]  # a fixture


def kept_by_server(server: Server, **settings: Any) -> list[list[set[int]]]:
    made = server.post("/obcache/compress", {"input_ids": FIXTURE["token_ids"], **settings})
    positions = server.get(f"/obcache/contexts/{made['id']}", params={"positions": "true"})["positions"]
    return [[set(head) for head in layer] for layer in positions]


@pytest.mark.parametrize("run", FIXTURE["runs"], ids=run_name)
def test_the_server_keeps_what_kvpress_keeps(server: Server, run: dict[str, Any]) -> None:
    """0.6 % are left for scores that differ by float32 noise and swap places at the edge of the kept set."""
    assert share_in_common(kept_by_server(server, **as_asked(run)), run) >= 0.994


@pytest.mark.parametrize(("method", "window", "budget"), [("snapkv", 400, "adakv"), ("h2o", "all", "uniform")])
def test_a_window_that_spans_two_chunks_scores_as_one(
    server: Server, layers: list[Layer], method: str, window: int | str, budget: str
) -> None:
    """The server prefills 841 tokens in chunks of 512; transformers in one piece."""
    wish = {
        "method": method,
        "window": window,
        "compression_ratio": 0.5,
        "preset": "kvpress",
        "score": "obcache-kv",
        "budget": budget,
    }
    settings = CompressionSettings.resolve(wish)
    assert settings.window == 0 or CONTEXT_LEN - settings.window < 512
    pairs = [
        pair
        for ours, theirs in zip(kept_by_server(server, **wish), kept_by_us(layers, settings), strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]
    assert sum(len(ours & theirs) for ours, theirs in pairs) >= 0.994 * sum(len(theirs) for _, theirs in pairs)
