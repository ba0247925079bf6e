"""Where the K and V of a compressed context lie with a per-head budget.

A context of M slots has M * num_layers * num_kv_heads *cells*, each of which holds the K and the V of one kept token of one KV
head of one layer. Its kept tokens are ordered layer by layer, head by head, and the cells are numbered in lane-major order:

    cell c  lies in  slot slots[c % M],  with r = c // M:  layer r // num_kv_heads,  lane r % num_kv_heads
    head h of layer l owns cells  offsets[l * num_kv_heads + h] ... offsets[l * num_kv_heads + h + 1]

Where a context begins with tokens that stay exact, these lie in its first slots, each in its own layer and lane. The cells are those of the
other slots alone, and M, kept tokens and offsets are here without them (`KeptTokens` counts them too).

With equal budgets every token lies in its own layer and lane, as SGLang's attention backends expect. With `adakv` a cell never
leaves its layer; with `global` and `profile` it may lie in any. Every cell is a *row* of one address space (`KVSpace`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from obcache_sglang.host import use

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


@dataclass(frozen=True)
class KVSpace:
    """All layers' K and V of one pool as rows of one tensor.

    k: [rows of all layers, head_dim], from the first K on; v: the same from the first V on, so that one index finds both:
    the K and V of slot s, lane h of layer l (counted from the pool's first layer) are rows
    ``(l * layer_stride + s) * num_kv_heads + h``. layer_stride: slots from a layer's K to the next layer's.
    """

    k: torch.Tensor
    v: torch.Tensor
    num_layers: int
    num_kv_heads: int
    layer_stride: int

    @classmethod
    def of(cls, pool: MHATokenToKVPool) -> KVSpace | None:
        """The address space of a pool whose buffers lie at equal distances in one allocation, else None."""
        keys = [pool.get_key_buffer(pool.start_layer + layer) for layer in range(pool.layer_num)]
        values = [pool.get_value_buffer(pool.start_layer + layer) for layer in range(pool.layer_num)]
        first = keys[0]
        if any(buffer.shape != first.shape or not buffer.is_contiguous() for buffer in keys + values):
            return None
        slot_bytes = first[0].nbytes
        v_distance = values[0].data_ptr() - first.data_ptr()
        layer_distance = keys[1].data_ptr() - first.data_ptr() if len(keys) > 1 else 2 * v_distance
        starts = [(first.data_ptr() + layer * layer_distance + i * v_distance) for layer in range(len(keys)) for i in (0, 1)]
        found = [buffer.data_ptr() for pair in zip(keys, values, strict=True) for buffer in pair]
        storage = first.untyped_storage()
        ends = starts[-1] + first.nbytes - storage.data_ptr()
        if found != starts or v_distance < first.nbytes or layer_distance < v_distance + first.nbytes or ends > storage.nbytes():
            return None
        if layer_distance % slot_bytes or v_distance % slot_bytes:
            return None
        _, num_kv_heads, head_dim = first.shape
        num_rows = ((len(keys) - 1) * layer_distance // slot_bytes + first.shape[0]) * num_kv_heads
        flat = [t.as_strided((num_rows, head_dim), (head_dim, 1), t.storage_offset()) for t in (first, values[0])]
        return cls(flat[0], flat[1], len(keys), num_kv_heads, layer_distance // slot_bytes)

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads

    def rows(self, layer: torch.Tensor | int, slots: torch.Tensor, lane: torch.Tensor | int) -> torch.Tensor:
        """Rows of slots in a layer and lane, counted from the pool's first. slots: [tokens], int32 or int64 like the result; all broadcast."""
        return (slots + layer * self.layer_stride) * self.num_kv_heads + lane

    def cell_rows(self, slots: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows of the cells first ... last - 1 of a context in `slots` [M], in order; int64 like slots. Default: all."""
        return self.rows_of_cells(
            slots, torch.arange(first, slots.numel() * self.num_heads if last is None else last, device=slots.device)
        )

    def rows_of_cells(self, slots: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Rows of any cells [cells] int64 of a context in `slots` [M]; int64 like slots."""
        lanes = cells // slots.numel()
        return self.rows(lanes // self.num_kv_heads, slots[cells % slots.numel()], lanes % self.num_kv_heads)


def heads_of(offsets: torch.Tensor, num_tokens: int, first_head: int = 0) -> torch.Tensor:
    """Whose each token is, [num_tokens] int64, where tokens lie head by head.

    offsets: [heads + 1] int64, which may begin anywhere; num_tokens: from its first to its last. first_head: that it begins with.
    """
    heads = torch.arange(first_head, first_head + len(offsets) - 1, device=offsets.device)
    return heads.repeat_interleave(offsets.diff(), output_size=num_tokens)


def create_one_space(pool: MHATokenToKVPool) -> bool:
    """Makes the pool's buffers as SGLang does, but all layers in one allocation, [layers, K and V, slots, heads, head_dim].

    The per-layer views have the shapes, strides and alignment that SGLang's own allocation gives them. Returns False, having
    done nothing, for layouts where K and V have different shapes or slots are not the first dimension.
    """
    from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE

    k_shape, v_shape = pool._kv_buffer_shapes()
    if pool.kv_cache_layout != "nhd" or k_shape != v_shape:
        return False
    num_slots = k_shape[0]
    whole_pages = -(-num_slots // pool.page_size) * pool.page_size
    memory_pool = torch.cuda.use_mem_pool(pool.custom_mem_pool) if pool.enable_custom_mem_pool else nullcontext()
    with pool.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE), memory_pool:
        shape = (pool.layer_num, 2, whole_pages, *k_shape[1:])
        space = torch.zeros(shape, dtype=pool.store_dtype, device=pool.device)
    pool.k_buffer = [layer[0, :num_slots] for layer in space]
    pool.v_buffer = [layer[1, :num_slots] for layer in space]
    return True


@dataclass(frozen=True)
class KeptTokens:
    """What a context keeps, on one rank. H = num_layers * num_kv_heads.

    positions: [M * H] int32, the kept positions, head by head, ascending in each; offsets: [H + 1] int64: head i's are
    ``positions[offsets[i]:offsets[i + 1]]``. Both on the device.
    rows: [M * H] int32, where their K and V lie in the pool's `KVSpace`; None on GPUs, and when all heads keep the same number.
    num_exact: the first positions, which every head keeps, and which lie in the first slots, each in its own layer and lane.
    """

    positions: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor | None = None
    num_exact: int = 0

    @classmethod
    def of_layers(cls, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> KeptTokens:
        """From each layer's positions [kept tokens] int32 and offsets [heads + 1] int64, in the layers' order."""
        offsets, first = [torch.zeros_like(layers[0][1][:1])], 0
        for positions, layer_offsets in layers:
            offsets.append(layer_offsets[1:] + first)
            first += positions.numel()
        return cls(torch.cat([positions for positions, _ in layers]), torch.cat(offsets))

    @cached_property
    def bounds(self) -> list[int]:
        """The offsets on the host."""
        bounds: list[int] = self.offsets.tolist()
        return bounds

    def largest_layer(self, num_kv_heads: int) -> int:
        """The most that the heads of one layer keep together."""
        return max(last - first for first, last in pairwise(self.bounds[::num_kv_heads]))

    def rows_in(self, space: KVSpace, slots: torch.Tensor, first_head: int = 0, last_head: int | None = None) -> torch.Tensor:
        """Rows [kept tokens] int64 in the address space of what the heads first_head ... last_head - 1 keep. Default: all.

        slots: [M] int64, the context's.
        """
        last_head = len(self.bounds) - 1 if last_head is None else last_head
        first, last = self.bounds[first_head], self.bounds[last_head]
        numbers = torch.arange(first, last, device=slots.device)
        if not self.num_exact:
            return space.rows_of_cells(slots, numbers)
        heads = heads_of(self.offsets[first_head : last_head + 1], last - first, first_head)
        return self.rows_of(space, slots, heads, numbers)

    def rows_of(self, space: KVSpace, slots: torch.Tensor, heads: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Rows [tokens] int64 in the address space of some of what is kept.

        slots: [M] int64, the context's. heads: [tokens] int64, whose each is. numbers: [tokens] int64, where each stands in `positions`.
        """
        own = slots[self.num_exact :]
        if not self.num_exact:
            return space.rows_of_cells(own, numbers)
        # Each head's exact tokens stand before its cells.
        inside = numbers - self.offsets[heads]
        exact = space.rows(heads // space.num_kv_heads, slots[inside.clamp_max(self.num_exact - 1)], heads % space.num_kv_heads)
        if not len(own):
            return exact
        cells = (numbers - (heads + 1) * self.num_exact).clamp_min(0)
        return torch.where(inside < self.num_exact, exact, space.rows_of_cells(own, cells))

    def located(self, space: KVSpace | None, slots: torch.Tensor) -> KeptTokens:
        """The same with `rows`, where attention looks them up: GPU kernels find them by themselves. slots: [M] int64, the context's.

        For heads that may keep different numbers.
        """
        if space is None or space.k.device.type != "cpu":
            return self
        return replace(self, rows=self.rows_in(space, slots).to(torch.int32))

    def on(self, device: torch.device | str) -> KeptTokens:
        """The same on a device, and without `rows`: they are of slots."""
        return replace(self, positions=self.positions.to(device), offsets=self.offsets.to(device), rows=None)

    def counts(self, num_kv_heads: int) -> list[list[int]]:
        """Kept tokens per layer and KV head."""
        counts = [last - first for first, last in pairwise(self.bounds)]
        return [counts[first : first + num_kv_heads] for first in range(0, len(counts), num_kv_heads)]

    def packed_layer(self, layer: int, num_kv_heads: int) -> bytes:
        """The kept positions of one layer, [kept tokens of all its heads] int32 in this machine's byte order, head by head."""
        heads = slice(layer * num_kv_heads, (layer + 1) * num_kv_heads + 1)
        first, *_, last = self.bounds[heads]
        return self.positions[first:last].cpu().numpy().tobytes()


_POOL = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"

TOUCHES = (
    use(f"{_POOL}.get_key_buffer", "call", "K of a layer, [slots, heads, dim]", ("layer_id",)),
    use(f"{_POOL}.get_value_buffer", "call", "V of a layer", ("layer_id",)),
    use(f"{_POOL}._kv_buffer_shapes", "call", "the shapes of a layer's K and V"),
    use("sglang.srt.constants.GPU_MEMORY_TYPE_KV_CACHE", "read", "the memory saver's region for the pool"),
)
