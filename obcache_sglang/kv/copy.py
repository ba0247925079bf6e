"""Copies of kept tokens' K and V, from the slots where they were computed to those of their context."""

from __future__ import annotations

import torch

from obcache_sglang.kv.cells import KVSpace


def copy_tokens(buffer: torch.Tensor, sources: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
    """Copies K or V of one layer where all heads keep as many tokens: each stays in its layer and lane.

    buffer: [pool slots, num_kv_heads, head_dim], whose row `slots[m]` becomes, in lane h, row `sources[positions[h, m]]`.
    sources: [tokens] int64, where the context was computed. positions: [num_kv_heads, M] int32 or int64. slots: [M] int64, the context's.
    """
    num_heads, num_slots = positions.shape
    lanes = torch.arange(num_heads, device=positions.device)
    # One flat index_select: several times faster on a CPU than indexing with rows and heads.
    chosen = (sources[positions.t()] * num_heads + lanes).reshape(-1)
    buffer.index_copy_(0, slots, buffer.view(-1, buffer.shape[-1]).index_select(0, chosen).view(num_slots, num_heads, -1))


def copy_cells(
    space: KVSpace,
    sources: torch.Tensor,
    positions: torch.Tensor,
    offsets: torch.Tensor,
    slots: torch.Tensor,
    *,
    first_head: int,
    first_cell: int,
) -> None:
    """Copies K and V of kept tokens to the cells of a context from `first_cell` on, where heads keep different numbers of them.

    sources: [tokens] int64, where the context was computed. positions: [kept tokens] int32 and offsets: [heads + 1] int64, as in
    `cells.KeptTokens`, of some heads. slots: [M] int64, the context's, which are other ones than sources: nothing is read after it was
    overwritten. first_head: of all heads of all layers, the one that `offsets` begins with.
    """
    num_heads, num_cells = len(offsets) - 1, positions.numel()
    heads = torch.arange(first_head, first_head + num_heads, device=positions.device)
    heads = heads.repeat_interleave(offsets.diff(), output_size=num_cells)
    # One layer's worth at a time bounds the scratch memory.
    step = len(slots) * space.num_kv_heads
    for first in range(0, num_cells, step):
        part = slice(first, first + step)
        layers, lanes = heads[part] // space.num_kv_heads, heads[part] % space.num_kv_heads
        rows = space.rows(layers, sources[positions[part]], lanes)
        cells = space.cell_rows(slots, first_cell + first, first_cell + min(first + step, num_cells))
        for buffer in (space.k, space.v):
            buffer.index_copy_(0, cells, buffer.index_select(0, rows))
