"""The gains of heads, measured by projecting unit vectors, against the weights."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn
from torch.nn import functional

from obcache_sglang.compress.head_gains import head_gains

HEADS, HEAD_DIM, HIDDEN = 6, 16, 40


class Projection(nn.Module):
    """As SGLang's row-parallel layers: the method has the weights' meaning, and the module's own forward adds up ranks."""

    def __init__(self) -> None:
        super().__init__()
        # Transposed and scaled, as quantized weights may be.
        self.packed = nn.Parameter(torch.randn(HEADS * HEAD_DIM, HIDDEN) / 7)
        self.quant_method = SimpleNamespace(apply=lambda layer, x, bias: functional.linear(x, 7 * layer.packed.T, bias))


class Adapted(nn.Module):
    """As SGLang's layers with LoRA adapters."""

    def __init__(self, base_layer: Projection) -> None:
        super().__init__()
        self.base_layer = base_layer


class Attention(nn.Module):
    def __init__(self, layer_id: int, projection: nn.Module | None) -> None:
        super().__init__()
        self.attn = RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, 2, layer_id=layer_id)
        self.o_proj = projection


def test_gains_are_the_mean_squares_of_a_heads_columns() -> None:
    torch.manual_seed(0)
    projections = [Projection(), Projection()]
    model = nn.ModuleList([Attention(3, projections[0]), Attention(5, Adapted(projections[1])), nn.Linear(4, 4)])
    gains = head_gains(model, torch.float32)
    assert gains.keys() == {3, 5}
    for gain, projection in zip(gains.values(), projections, strict=True):
        columns = (7 * projection.packed.detach()).view(HEADS, HEAD_DIM, HIDDEN)
        torch.testing.assert_close(gain, columns.square().sum((1, 2)) / HEAD_DIM)
    assert not torch.allclose(gains[3], gains[5])


def test_a_projection_that_fails_leaves_a_model_that_can_be_served(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleList([Attention(0, Projection()), Attention(1, None), Attention(2, Projection())])
    with caplog.at_level(logging.ERROR):
        assert head_gains(model, torch.float32).keys() == {0}
    assert "measuring the head gains of 1 failed" in caplog.text
