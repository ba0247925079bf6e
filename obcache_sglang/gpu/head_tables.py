"""Index tables for attention kernels in which each KV head of each request is a sequence of its own.

The kernels see K and V as `KVSpace` rows with one head each. The sequence of a (request, KV head) in a layer is: the ordinary rows of
the exact tokens that the context begins with, the cells the head owns (obcache_sglang.kv.cells), then the ordinary rows of every later
token in this layer and lane. Everything is computed on
the device from the batch's tables, in shapes that the host knows: nothing waits, and all of it can be in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from obcache_sglang.kv.cells import KVSpace

if TYPE_CHECKING:
    from obcache_sglang.kv.context import KeptContext

# Entries that a program writes at a time, and programs that share a sequence at most; a longer sequence takes them more rounds.
_BLOCK = 512
_MAX_PROGRAMS = 16


@dataclass(frozen=True)
class HeadBatch:
    """The B requests of one forward pass, on the device. H = num_layers * num_kv_heads of the `KVSpace`.

    req_pool_indices: [B], their rows of req_to_token; seq_lens: [B], the engine's lengths: virtual tokens and all others up to
    the new ones; num_slots: [B], the M tokens of a request's context, 0 for a request without one; num_exact: [B], the first of these,
    which are exact;
    offsets: [B, H + 1], the contexts' `KeptTokens.offsets`, zeros where num_slots is 0; num_new: [B], new tokens per request,
    each at least 1, or None where all have one, as in decode. All int32 or int64, the last dimension contiguous.
    max_new: no num_new is greater. max_entries: no layer reads more K/V pairs: the sum over requests of
    num_kv_heads * (seq_lens - num_slots), plus what the contexts keep in that layer. Both are bounds, not checked, and
    a smaller figure is an access out of bounds. num_kv_heads * seq_lens is exact when no cell leaves its layer;
    num_kv_heads * (a request's real tokens) is always enough.
    """

    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    num_slots: torch.Tensor
    num_exact: torch.Tensor
    offsets: torch.Tensor
    max_entries: int
    num_new: torch.Tensor | None = None
    max_new: int = 1

    @property
    def head_major(self) -> bool:
        """Whether sequences are ordered by head, then request; else by request, then head.

        The queries of a sequence must lie one after the other. With one query each, they do as the model leaves them.
        """
        return self.num_new is not None


def count_entries(total_length: int, contexts: Iterable[KeptContext], num_kv_heads: int) -> int:
    """`HeadBatch.max_entries` of requests whose seq_lens add up to total_length. contexts: those after which they stand."""
    most = num_kv_heads * total_length
    for context in contexts:
        assert context.kept is not None, "a context that is read is resident"
        most += context.kept.largest_layer(num_kv_heads) - num_kv_heads * context.num_slots
    return most


def sequence_lengths(space: KVSpace, batch: HeadBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The K/V pairs of each (request, KV head) of a batch in each layer, where its tensors are.

    Returns lengths [num_layers, B * num_kv_heads] and their running sums [num_layers, B * num_kv_heads + 1], both int32.
    """
    cells = batch.offsets.diff().view(-1, space.num_layers, space.num_kv_heads)
    lengths = cells + (batch.seq_lens - batch.num_slots).view(-1, 1, 1)
    lengths = lengths.permute(1, 2, 0) if batch.head_major else lengths.transpose(0, 1)
    lengths = lengths.reshape(space.num_layers, -1).int()
    return lengths, pad(lengths.cumsum(1, dtype=torch.int32), (1, 0))


def align_rows(table: torch.Tensor) -> torch.Tensor:
    """A [rows, columns] table of 4-byte elements with each row at a multiple of 16 bytes.

    Triton compiles a kernel once for pointers at such addresses and once more for others: layers would differ.
    """
    columns = table.shape[1]
    return pad(table, (0, -columns % 4))[:, :columns]


class HeadTables:
    """The tables of one forward pass over a `HeadBatch`, as FlashInfer's and SGLang's kernels take them.

    lengths, indptr: see `sequence_lengths`; the rows of indptr are aligned.
    buffer: [batch.max_entries] index_dtype, in which the layers' indices take turns.
    """

    def __init__(self, space: KVSpace, req_to_token: torch.Tensor, batch: HeadBatch, index_dtype: torch.dtype) -> None:
        """req_to_token: [rows, max tokens] int32, with the slot of each token of each request."""
        self._space = space
        self._req_to_token = req_to_token
        self._batch = batch
        self.lengths, indptr = sequence_lengths(space, batch)
        self.indptr = align_rows(indptr)
        self.buffer = torch.empty(batch.max_entries, dtype=index_dtype, device=self.lengths.device)
        num_requests = batch.seq_lens.numel()
        self._strides = (1, num_requests) if batch.head_major else (space.num_kv_heads, 1)
        mean_length = batch.max_entries // (num_requests * space.num_kv_heads)
        self._grid = (num_requests, space.num_kv_heads, min(triton.cdiv(mean_length, _BLOCK) + 1, _MAX_PROGRAMS))

    def indices(self, layer: int) -> torch.Tensor:
        """Fills `buffer` [batch.max_entries] with the rows of all sequences of a layer, counted from the pool's first, and returns it.

        What lies after the last sequence is undefined.
        """
        batch, space = self._batch, self._space
        _write_indices[self._grid](
            self.buffer,
            self.indptr[layer],
            self._req_to_token,
            batch.req_pool_indices,
            batch.num_slots,
            batch.num_exact,
            batch.offsets,
            layer,
            *self._strides,
            self._req_to_token.stride(0),
            batch.offsets.stride(0),
            space.layer_stride,
            NUM_KV_HEADS=space.num_kv_heads,
            BLOCK=_BLOCK,
        )
        return self.buffer


# The layer and the batch size vary from launch to launch: compiled once for all of them, not again for 1 and multiples of 16.
@triton.jit(do_not_specialize=["layer", "request_stride", "head_stride"])
def _write_indices(
    indices: tl.tensor,
    indptr: tl.tensor,
    req_to_token: tl.tensor,
    req_pool_indices: tl.tensor,
    num_slots: tl.tensor,
    num_exact: tl.tensor,
    offsets: tl.tensor,
    layer: tl.tensor,
    request_stride: tl.tensor,
    head_stride: tl.tensor,
    req_to_token_stride: tl.tensor,
    offsets_stride: tl.tensor,
    layer_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program (b, h, i) writes blocks i, i + programs, ... of the sequence of request b and KV head h."""
    request, head = tl.program_id(0), tl.program_id(1)
    sequence = request * request_stride + head * head_stride
    start = tl.load(indptr + sequence)
    length = tl.load(indptr + sequence + 1) - start
    slots = tl.load(num_slots + request)
    exact = tl.load(num_exact + request)
    own_lane = layer * NUM_KV_HEADS + head
    own_offset = offsets + request.to(tl.int64) * offsets_stride + own_lane
    first_kept = tl.load(own_offset)
    num_kept = tl.load(own_offset + 1) - first_kept
    # Of this head's cells, less those that heads before it would have for the exact tokens.
    first_cell = first_kept - own_lane * exact
    tokens = req_to_token + tl.load(req_pool_indices + request).to(tl.int64) * req_to_token_stride
    for block in range(tl.program_id(2) * BLOCK, length, tl.num_programs(2) * BLOCK):
        entry = block + tl.arange(0, BLOCK)
        inside = entry < length
        is_cell = (entry >= exact) & (entry < num_kept)
        cell = first_cell + entry - exact
        # A request without a context has no cells and no slots to divide by.
        context_slots = tl.maximum(slots - exact, 1)
        token = tl.where(entry < num_kept, entry, slots + entry - num_kept)
        token = tl.where(is_cell, exact + cell % context_slots, token)
        lane = tl.where(is_cell, cell // context_slots, own_lane)
        slot = tl.load(tokens + token, mask=inside, other=0).to(tl.int64)
        row = (slot + (lane // NUM_KV_HEADS).to(tl.int64) * layer_stride) * NUM_KV_HEADS + lane % NUM_KV_HEADS
        tl.store(indices + start + entry, row, mask=inside)
