"""The positions KVPress keeps, for SnapKV and TOVA, from a real model's queries, keys and values.

tests/fixtures/kvpress.json was recorded by tests/fixtures/record_kvpress.py; here transformers runs the same tokens through
the same model, and our scores and selection, with the settings of the preset ``kvpress``, choose.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from obcache_sglang.config import CompressionSettings
from obcache_sglang.scoring.ops import accumulate_scores
from obcache_sglang.scoring.selection import select_positions

FIXTURE = json.loads((Path(__file__).parent.parent / "fixtures" / "kvpress.json").read_text(encoding="utf-8"))
CONTEXT_LEN = len(FIXTURE["token_ids"])
METHODS = {"SnapKVPress": "snapkv", "TOVAPress": "tova"}

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


@pytest.fixture(scope="module")
def layers(model_dir: Path) -> list[Layer]:
    """Per layer: q [tokens, q heads, dim] and k, v [tokens, kv heads, dim], after RoPE, and the scale of the logits."""
    recorded: list[Layer] = []

    def recording_attention(module: Any, query: Any, key: Any, value: Any, *args: Any, scaling: float, **kwargs: Any) -> Any:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        recorded.append((q, k, v, scaling))
        return sdpa_attention_forward(module, query, key, value, *args, scaling=scaling, **kwargs)

    AttentionInterface.register("recording", recording_attention)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="recording")
    with torch.no_grad():
        model(torch.tensor([FIXTURE["token_ids"]]))
    assert len(recorded) == model.config.num_hidden_layers
    return recorded


def kept_by_kvpress(bits: str) -> set[int]:
    number = int(bits, 16)
    return {position for position in range(CONTEXT_LEN) if number >> position & 1}


def kvpress_settings(press: str, ratio: float) -> CompressionSettings:
    given = {"preset": "kvpress", "method": METHODS[press], "score": "attention", "compression_ratio": ratio}
    return CompressionSettings.resolve(given)


def kept_by_us(layers: list[Layer], settings: CompressionSettings) -> list[list[set[int]]]:
    """Per layer and KV head, the positions that settings of the preset ``kvpress`` keep."""
    start = CONTEXT_LEN - settings.window if settings.window else 0
    kept = []
    for q, k, v, scale in layers:
        scores = torch.zeros(k.shape[1], CONTEXT_LEN)
        accumulate_scores(scores, q[start:], k, v, start=start, scale=scale, score=settings.score)
        positions = select_positions(
            scores,
            settings.kept_tokens(CONTEXT_LEN),
            window=settings.window,
            sink_tokens=settings.sink_tokens,
            pooling=settings.pooling,
            kernel_size=settings.kernel_size,
            heads=settings.heads,
            shrink_window=False,
        )
        kept.append([set(row) for row in positions.tolist()])
    return kept


def share_in_common(ours: list[list[set[int]]], run: dict[str, Any]) -> float:
    """Share of KVPress's kept positions, over all layers and heads, that ours hold too. Both keep equally many."""
    pairs = [
        (head, kept_by_kvpress(bits))
        for heads, recorded in zip(ours, run["kept"], strict=True)
        for head, bits in zip(heads, recorded, strict=True)
    ]
    assert all(len(head) == len(wanted) for head, wanted in pairs)
    return sum(len(head & wanted) for head, wanted in pairs) / sum(len(wanted) for _, wanted in pairs)


@pytest.mark.parametrize("run", FIXTURE["runs"], ids=lambda run: f"{run['press']}-{run['compression_ratio']}")
def test_keeps_what_kvpress_keeps(layers: list[Layer], run: dict[str, Any]) -> None:
    """Both sides compute in float32, with different releases of torch and orders of summation, so two scores that differ by
    float32 noise may swap places at the edge of the kept set: 0.6 % of the positions are left for that (measured: none)."""
    share = share_in_common(kept_by_us(layers, kvpress_settings(run["press"], run["compression_ratio"])), run)
    print(f"{run['press']} at {run['compression_ratio']}: {share:.2%} of the kept positions are the same")
    assert share >= 0.994


def test_the_comparison_can_fail(layers: list[Layer]) -> None:
    """Another method keeps clearly different tokens, so agreement above says something."""
    run = next(run for run in FIXTURE["runs"] if run["press"] == "SnapKVPress" and run["compression_ratio"] == 0.8)
    assert share_in_common(kept_by_us(layers, kvpress_settings("TOVAPress", 0.8)), run) < 0.9
