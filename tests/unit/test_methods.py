"""A method is one row of the table and, where no query scores for it, one function: this test adds one."""

from __future__ import annotations

from array import array

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from obcache_sglang.compress.compression import Compression, Compressor, ScoringRows
from obcache_sglang.compress.ranking import position_scores
from obcache_sglang.errors import InvalidValue
from obcache_sglang.kv.cells import KVSpace
from obcache_sglang.kv.context import Context, Namespace
from obcache_sglang.settings import METHODS, ServerSettings
from obcache_sglang.settings.methods import Method
from tests.unit.engine import OneSpacePool

LAYERS, HEADS, TOKENS = 2, 2, 12


def even_positions(num_kv_heads: int, context_len: int, seed: int, device: torch.device | str) -> torch.Tensor:
    """Prefers even positions, the later ones first."""
    positions = torch.arange(context_len, dtype=torch.float32, device=device)
    return torch.where(positions % 2 == 0, positions, -1.0).repeat(num_kv_heads, 1)


@pytest.fixture
def every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method("nobody", "every other token", {"window": 1}, position_scores=f"{__name__}:even_positions")
    monkeypatch.setitem(METHODS, "every-other", row)


def test_a_row_is_all_that_a_setting_needs(every_other: None) -> None:
    settings = ServerSettings.resolve({"method": "every-other", "compression_ratio": 0.5})
    assert (settings.compression.method, settings.compression.window) == ("every-other", 1)
    assert settings.compression_for({"method": "snapkv"}).window == 64  # and is no row's but its own
    with pytest.raises(InvalidValue, match="every-other"):
        ServerSettings.resolve({"method": "every-third"})


@pytest.mark.parametrize("budget", ["uniform", "adakv", "global"])
def test_and_its_function_all_that_a_compression_does(every_other: None, budget: str) -> None:
    settings = ServerSettings.resolve(
        {"method": "every-other", "compression_ratio": 0.5, "budget": budget, "sink_tokens": 1}
    ).compression
    pool = OneSpacePool(40, 1, torch.float32, HEADS, 4, layer_num=LAYERS, device="cpu", enable_memory_saver=False)
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer.normal_()
    tokens = array("q", range(TOKENS))
    context = Context("0" * 32, Namespace(None, None, None), settings, tokens, settings.kept_slots(TOKENS, 1))
    compression = Compression(context)
    compressor = Compressor(pool, KVSpace.of(pool), lanes=(0, HEADS))
    assert not compression.reads_queries
    sources, slots = torch.arange(1, TOKENS + 1), torch.arange(20, 20 + context.num_slots)
    rows = ScoringRows(0, 0, TOKENS - 1, sources, last=True)
    for layer_id in range(LAYERS):
        layer = RadixAttention(HEADS, 4, 0.5, HEADS, layer_id=layer_id)
        scores = compression.score(compressor, rows, layer)
        assert scores is not None
        compression.keep(compressor, rows, scores, layer, slots)
    assert compression.kept is not None
    # The sink, the last token, and the latest even ones.
    assert compression.kept.positions.view(-1, 6).tolist() == [[0, 4, 6, 8, 10, 11]] * (LAYERS * HEADS)
    copied = pool.k_buffer[1][slots] if budget == "uniform" else None
    assert copied is None or torch.equal(copied, pool.k_buffer[1][sources[torch.tensor([0, 4, 6, 8, 10, 11])]])


def test_a_method_with_queries_has_no_scores_by_position() -> None:
    with pytest.raises(ValueError, match="needs queries"):
        position_scores("tova", 2, 10, 0, "cpu")
