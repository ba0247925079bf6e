"""SGLang's HiCache (`--enable-hierarchical-cache`) where the device is the host itself: what its host pools ask of an accelerator, in PyTorch.

Nothing is gained by it on such a machine, where both pools lie in the same memory. It is there so that all that contexts do in host memory
can be tried and tested anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.pool_host import base, common, mha

from obcache_sglang.host import use

RESERVE_BYTES = 1 << 30
"""Of the host's memory, left free by the host pool: SGLang's 10 GB are meant for machines with accelerators."""


def serve_host_pools() -> None:
    """In each worker, before its pools are made."""
    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate
    mha.transfer_kv_direct = transfer_kv_direct
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = RESERVE_BYTES


def _allocate(dims: tuple[int, ...], *, dtype: torch.dtype, device: str, allocator: Any, **_: Any) -> torch.Tensor:
    """As SGLang's, without pinning: nothing transfers. Returns a tensor of dims, mostly [2, layers, slots, heads, head_dim]."""
    buffer: torch.Tensor = allocator.allocate(dims, dtype=dtype, device=device)
    return buffer


def transfer_kv_direct(
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """As sgl-kernel's: copies slots src_indices [tokens] int64 of each [slots, heads, head_dim] to slots dst_indices [tokens] of the other.

    page_size: not needed; both name whole pages, slot by slot.
    """
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


_HOST = "sglang.srt.mem_cache.pool_host"

TOUCHES = (
    use(f"{_HOST}.common.ALLOC_MEMORY_FUNCS", "read", "host pools beside a pool on the CPU"),
    use(f"{_HOST}.common.HostTensorAllocator.allocate", "call", "their memory", ("dims", "dtype", "device")),
    use(f"{_HOST}.base.HICACHE_HOST_MEMORY_RESERVE_BYTES", "read", "what they leave free"),
    use(f"{_HOST}.mha.MHATokenToKVPoolHost", "read", "calls transfer_kv_direct of its module, which it has on GPUs only"),
)
