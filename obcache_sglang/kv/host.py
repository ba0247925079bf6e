"""Whole slots of one layer, from the KV pool to host memory and back. The cells of a context keep their order, whatever its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


def to_host(pool: MHATokenToKVPool, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of a layer's K and V in `slots` [M] int64: [M, bytes of a slot] uint8 each, on the host. layer: counted from the pool's first."""
    k, v = (_bytes(buffer).index_select(0, slots).to("cpu") for buffer in _buffers(pool, layer))
    return k, v


def to_pool(pool: MHATokenToKVPool, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """The inverse of `to_host`. From pinned memory nothing waits on the host. k, v: [M, bytes of a slot] uint8; slots: [M] int64."""
    for buffer, raw in zip(_buffers(pool, layer), (k, v), strict=True):
        _bytes(buffer).index_copy_(0, slots, raw.to(buffer.device, non_blocking=raw.is_pinned()))


def _buffers(pool: MHATokenToKVPool, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a layer, [pool slots, num_kv_heads, head_dim] each."""
    return pool.get_key_buffer(pool.start_layer + layer), pool.get_value_buffer(pool.start_layer + layer)


def _bytes(buffer: torch.Tensor) -> torch.Tensor:
    """[pool slots, bytes of a slot] uint8 of [pool slots, num_kv_heads, head_dim]: quantized types have no copies of their own."""
    return buffer.view(torch.uint8).flatten(1)
