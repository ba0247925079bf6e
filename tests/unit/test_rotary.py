"""K read back to what it was before RoPE, against SGLang's own rotary embeddings, kind by kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding import get_rope

from obcache_sglang.compress.rotary import InverseRotary, inverse_rotaries
from obcache_sglang.errors import HostError

HEAD_DIM, LONGEST = 64, 4096

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt-j's order": {"is_neox_style": False},
    "partial": {"partial_rotary_factor": 0.5},
    "partial, gpt-j's order": {"partial_rotary_factor": 0.25, "is_neox_style": False},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic ntk": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn with an attention factor": {"rope_scaling": {**YARN, "attn_factor": 1.7}},
}


def rope(dtype: torch.dtype = torch.float32, **kind: Any) -> Any:
    return get_rope(HEAD_DIM, HEAD_DIM, LONGEST, 10000, **{"dtype": dtype, **kind})


@pytest.mark.parametrize("kind", KINDS)
def test_k_is_what_it_was_before_rope(kind: str) -> None:
    rotary = rope(**KINDS[kind])
    positions = torch.randint(0, LONGEST, (200,))
    k = torch.randn(200, 3, HEAD_DIM)
    _, rotated = rotary.forward_native(positions, torch.zeros(200, 3 * HEAD_DIM), k.view(200, -1).clone())
    rotated = rotated.view_as(k)
    assert (rotated - k).abs().max() > 0.1
    given = rotated.clone()
    torch.testing.assert_close(InverseRotary(rotary)(rotated, positions), k, rtol=1e-5, atol=1e-5)
    assert torch.equal(rotated, given)


def test_yarns_attention_factor_is_divided_out() -> None:
    rotary = rope(**KINDS["yarn with an attention factor"])
    assert rotary.cos_sin_cache[0, 0] > 1.5
    k = torch.randn(1, 1, HEAD_DIM)
    _, rotated = rotary.forward_native(torch.tensor([0]), torch.zeros(1, HEAD_DIM), k.view(1, -1).clone())
    torch.testing.assert_close(InverseRotary(rotary)(rotated.view_as(k), torch.tensor([0])), k)


def test_in_16_bits_only_the_rounding_of_k_is_lost() -> None:
    rotary = rope(torch.bfloat16)
    positions = torch.arange(LONGEST)
    k = torch.randn(LONGEST, 2, HEAD_DIM).to(torch.bfloat16)
    _, rotated = rotary.forward_native(positions, torch.zeros(LONGEST, 2 * HEAD_DIM).to(k), k.view(LONGEST, -1).clone())
    back = InverseRotary(rotary)(rotated.view_as(k), positions)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, k.float(), rtol=0.02, atol=0.02)


def test_a_model_whose_layers_are_not_all_found_is_refused() -> None:
    """As with --model-impl transformers, whose attention modules hold no RadixAttention."""
    with pytest.raises(HostError, match="0 of 2 layers in Sequential"):
        inverse_rotaries(torch.nn.Sequential(torch.nn.Linear(2, 2)), 2)


def test_an_embedding_of_another_kind_is_refused_by_name() -> None:
    long_rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": [4.0] * 32,
        "original_max_position_embeddings": 1024,
        "factor": 4.0,
    }
    with pytest.raises(HostError, match="Phi3LongRoPEScaledRotaryEmbedding"):
        InverseRotary(rope(rope_scaling=long_rope))
    sections = {"rope_type": "default", "mrope_section": [16, 8, 8]}
    with pytest.raises(HostError, match="MRotaryEmbedding"):
        InverseRotary(rope(rope_scaling=sections))
