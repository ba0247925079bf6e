"""Copies of kept tokens' K and V, from where they lie to the slots of their context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from obcache_sglang.kv.cells import KeptTokens, KVSpace, heads_of


@dataclass(frozen=True)
class Sources:
    """Where the K and V of a context's tokens lie before they are copied.

    slots: [tokens] int64, those of the tokens from `first` on, which were computed exactly. Of the tokens before, each head has only those
    that an earlier context keeps: `kept`, in the slots `kept_slots` [M] int64; None where first is 0.
    """

    slots: torch.Tensor
    first: int = 0
    kept: KeptTokens | None = None
    kept_slots: torch.Tensor | None = None

    def index(self, first_head: int, last_head: int) -> torch.Tensor | None:
        """What `rows` looks kept tokens up in, [tokens] int64, for the heads first_head ... last_head - 1 of all layers.

        They lie in the order of their cells, which is that of heads and positions, so one number for both is sorted.
        """
        if self.kept is None:
            return None
        first, last = self.kept.bounds[first_head], self.kept.bounds[last_head]
        heads = heads_of(self.kept.offsets[first_head : last_head + 1], last - first, first_head)
        return heads * self.first + self.kept.positions[first:last]

    def _new_slots(self, positions: torch.Tensor) -> torch.Tensor:
        """The slots int64 of tokens from `first` on; any of the pool's for tokens before. positions: int32, of any shape, like the result."""
        if len(self.slots) == 0:  # a context that is compressed again: nothing comes to what is kept
            return torch.zeros_like(positions, dtype=torch.int64)
        return self.slots[(positions - self.first).clamp_min(0)]

    def rows(
        self, space: KVSpace, heads: torch.Tensor, positions: torch.Tensor, index: torch.Tensor | None, first_head: int
    ) -> torch.Tensor:
        """Rows [tokens] int64 in the address space of one token each.

        heads: [tokens] int64, of all heads of all layers. positions: [tokens] int32, that they have. index: of `index`, which begins
        with first_head.
        """
        layers, lanes = heads // space.num_kv_heads, heads % space.num_kv_heads
        rows = space.rows(layers, self._new_slots(positions), lanes)
        if index is None or self.kept is None or self.kept_slots is None:
            return rows
        found = torch.searchsorted(index, heads * self.first + positions).clamp_max(len(index) - 1)
        kept_rows = self.kept.rows_of(space, self.kept_slots, heads, self.kept.bounds[first_head] + found)
        return torch.where(positions < self.first, kept_rows, rows)

    def lane_slots(self, positions: torch.Tensor, first_head: int) -> torch.Tensor:
        """Slots [num_kv_heads, M] int64 of one layer's tokens where all heads keep as many, each in its own layer and lane.

        positions: [num_kv_heads, M] int32, that the layer's heads have, of which first_head is the first of all.
        """
        slots = self._new_slots(positions)
        if self.kept is None or self.kept_slots is None:
            return slots
        first, last = self.kept.bounds[first_head], self.kept.bounds[first_head + len(positions)]
        known = self.kept.positions[first:last].view(len(positions), -1)
        found = torch.searchsorted(known, positions.contiguous()).clamp_max(known.shape[1] - 1)
        return torch.where(positions < self.first, self.kept_slots[found], slots)


def copy_tokens(buffer: torch.Tensor, sources: torch.Tensor, slots: torch.Tensor) -> None:
    """Copies K or V of one layer where all heads keep as many tokens: each stays in its layer and lane.

    buffer: [pool slots, num_kv_heads, head_dim], whose row `slots[m]` becomes, in lane h, row `sources[h, m]`.
    sources: [num_kv_heads, M] int64, where the kept tokens lie. slots: [M] int64, the context's, which are other ones.
    """
    num_heads, num_slots = sources.shape
    lanes = torch.arange(num_heads, device=sources.device)
    # One flat index_select: several times faster on a CPU than indexing with rows and heads.
    chosen = (sources.t() * num_heads + lanes).reshape(-1)
    buffer.index_copy_(0, slots, buffer.view(-1, buffer.shape[-1]).index_select(0, chosen).view(num_slots, *buffer.shape[1:]))


def copy_cells(
    space: KVSpace,
    sources: Sources,
    positions: torch.Tensor,
    offsets: torch.Tensor,
    slots: torch.Tensor,
    *,
    first_head: int,
    first_cell: int,
) -> None:
    """Copies K and V of kept tokens to the cells of a context from `first_cell` on, where heads keep different numbers of them.

    positions: [kept tokens] int32 and offsets: [heads + 1] int64, as in `cells.KeptTokens`, of some heads. slots: [M] int64, the
    context's, which are other ones than the sources': nothing is read after it was overwritten. first_head: of all heads of all layers,
    the one that `offsets` begins with.
    """
    num_heads, num_cells = len(offsets) - 1, positions.numel()
    heads, index = heads_of(offsets, num_cells, first_head), sources.index(first_head, first_head + num_heads)
    # One layer's worth at a time bounds the scratch memory.
    step = len(slots) * space.num_kv_heads
    for first in range(0, num_cells, step):
        part = slice(first, first + step)
        rows = sources.rows(space, heads[part], positions[part], index, first_head)
        cells = space.cell_rows(slots, first_cell + first, first_cell + min(first + step, num_cells))
        for buffer in (space.k, space.v):
            buffer.index_copy_(0, cells, buffer.index_select(0, rows))
