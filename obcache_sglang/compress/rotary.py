"""K as it was before RoPE, read back from the cache: the inverse of a model's rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding

from obcache_sglang.errors import HostError
from obcache_sglang.host import use


class InverseRotary:
    """Undoes SGLang's RotaryEmbedding, of any scaling, partial or whole, in NeoX's order (halves) or GPT-J's (neighbours).

    Whatever factor the embedding has (YaRN's attention factor) is divided out too.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        """Raises HostError for an embedding that rotates in another way, as of several axes or of chunks."""
        if getattr(type(rotary), "forward_native", None) is not RotaryEmbedding.forward_native:
            raise HostError(
                f"--obcache-gates cannot read back what the model's {type(rotary).__name__} has rotated. Serve without gates."
            )
        # Not its table: SGLang replaces it when a longer context comes.
        self._rotary = rotary

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return int(self._rotary.rotary_dim)

    @property
    def is_neox_style(self) -> bool:
        return bool(self._rotary.is_neox_style)

    def table(self, num_positions: int) -> torch.Tensor:
        """Cosines, and after them sines, of the first positions: [num_positions, rotary_dim], any float dtype."""
        table: torch.Tensor = self._rotary.cos_sin_cache[:num_positions]
        return table

    def __call__(self, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """K before RoPE, [tokens, heads, head_dim] float32.

        k: [tokens, heads, head_dim], any float dtype, rotated to positions [tokens] int64.
        """
        cos, sin = self._rotary.cos_sin_cache.index_select(0, positions).chunk(2, dim=-1)
        return rotated_back(k, cos, sin, is_neox_style=self.is_neox_style)


def rotated_back(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_neox_style: bool = True) -> torch.Tensor:
    """K before RoPE, [tokens, heads, head_dim] float32.

    k: [tokens, heads, head_dim], any float dtype. cos, sin: [tokens, rotary_dim / 2], any float dtype, with whatever factor the
    embedding has. is_neox_style: whether halves are rotated, not neighbours.
    """
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    squares = cos.square() + sin.square()  # 1, or the square of a factor, or nearly so in a table of 16 bits
    cos, sin = cos / squares, sin / squares
    before = k.float()
    if before is k:
        before = k.clone()
    turned = before[..., : 2 * cos.shape[-1]]
    if is_neox_style:
        first, second = turned.chunk(2, dim=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
    unturned = first * cos + second * sin, second * cos - first * sin
    first.copy_(unturned[0])
    second.copy_(unturned[1])
    return before


def inverse_rotaries(model: torch.nn.Module, num_layers: int) -> dict[int, InverseRotary]:
    """Those of a model's layers, by layer id.

    model: SGLang's, loaded. num_layers: that have a KV cache. Raises HostError where a layer's K cannot be read back.
    """
    found = {}
    for name, module in attentions(model):
        rotary = getattr(module, "rotary_emb", None)
        if rotary is None:
            raise HostError(f"--obcache-gates needs a model with rotary embeddings; {name} has none. Serve without gates.")
        found[module.attn.layer_id] = InverseRotary(rotary)
    if len(found) != num_layers:
        raise HostError(
            f"--obcache-gates found the attention of {len(found)} of {num_layers} layers in {type(model).__name__}. It needs SGLang's own "
            "implementation of a Llama or Qwen model (not --model-impl transformers). Serve without gates."
        )
    return found


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """SGLang's attention of each layer of a model, in order."""
    return sorted((module.attn for _, module in attentions(model)), key=lambda layer: int(layer.layer_id))


def attentions(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of a model that hold a RadixAttention as `attn`, with their names."""
    return ((name, each) for name, each in model.named_modules() if isinstance(getattr(each, "attn", None), RadixAttention))


_ROTARY = "sglang.srt.layers.rotary_embedding.RotaryEmbedding"

TOUCHES = (
    use(_ROTARY, "read", "cos_sin_cache, rotary_dim, is_neox_style: reads K back to its position"),
    use(f"{_ROTARY}.forward_native", "read", "a rotary embedding with its own is not read back"),
)
