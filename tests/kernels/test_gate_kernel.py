"""The kernel that scores by gates, against float64 written out from K before RoPE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding import get_rope

from obcache_sglang.compress.compression import gate_scores_in_slots
from obcache_sglang.compress.gates import Gates, features, num_features
from obcache_sglang.compress.rotary import InverseRotary
from obcache_sglang.gpu.gate_kernel import gate_scores_paged
from tests.kernels.conftest import DEVICE

HEADS, POOL, LAYERS = 2, 300, 2
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attn_factor": 1.7}
KINDS: dict[str, dict[str, Any]] = {
    "neox": {},
    "gpt-j": {"is_neox_style": False},
    "partial": {"partial_rotary_factor": 0.5},
    "partial gpt-j": {"partial_rotary_factor": 0.25, "is_neox_style": False},
    "yarn": {"rope_scaling": YARN},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 130), (128, 64), (96, 1)])
def test_scores_are_those_of_k_before_rope(kind: str, head_dim: int, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rotary = get_rope(head_dim, head_dim, 256, 10000, **{"dtype": torch.float32, **KINDS[kind]})
    before = torch.randn(tokens, HEADS, head_dim)
    positions = torch.arange(tokens)
    _, rotated = rotary.forward_native(positions, torch.zeros(tokens, HEADS * head_dim), before.view(tokens, -1).clone())
    rotary = rotary.to(DEVICE)
    keys, values = torch.randn(2, POOL, HEADS, head_dim, dtype=dtype, device=DEVICE)
    slots = torch.randperm(POOL)[:tokens].to(DEVICE)
    keys[slots] = rotated.view_as(before).to(DEVICE, dtype)
    gates = Gates(torch.randn(LAYERS, HEADS, num_features(head_dim)) / 10, torch.randn(LAYERS, HEADS)).to(DEVICE)
    given = InverseRotary(rotary), 1, keys, values, slots
    scores = gate_scores_paged(gates, *given)
    assert (scores.shape, scores.dtype) == ((HEADS, tokens), torch.float32)
    torch.testing.assert_close(scores, gate_scores_in_slots(gates, *given), rtol=1e-4, atol=1e-4)
    later = tokens // 2  # a part of them, whose first position is not 0
    tail = gate_scores_paged(gates, *given[:-1], slots[later:], later)
    torch.testing.assert_close(tail, scores[:, later:])
    torch.testing.assert_close(tail, gate_scores_in_slots(gates, *given[:-1], slots[later:], later), rtol=1e-4, atol=1e-4)
    found = features(before.transpose(0, 1).double(), values[slots].cpu().transpose(0, 1).double()).double()
    wanted = (found * gates.weights[1].cpu().double()[:, None]).sum(-1) + gates.bias[1].cpu()[:, None]
    off = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(scores.cpu().double(), wanted, rtol=off, atol=off)
