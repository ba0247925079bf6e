"""Attention over per-head budgets with SGLang's Triton kernels.

Shapes depend on what the host knows alone, and nothing is copied to the host: a step, made and used, can be captured in a CUDA
graph. Its tensors must then outlive the graph, and a replay reads the tensors of its `HeadBatch` anew.
"""

from __future__ import annotations

import torch
from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd_unified
from torch.nn.functional import pad

from obcache_sglang.gpu.head_attention import HeadPool, HeadStep
from obcache_sglang.gpu.head_tables import HeadBatch, align_rows

# A decode program reads this many keys of a head, and more when that would split the head into more than MAX_SPLITS.
# Heads of one batch may be 4 and 8000 tokens long, so the split must depend on the head's own length;
# it depends on nothing else, and a request's result does not depend on the batch it is in.
SPLIT_LENGTH = 128
MAX_SPLITS = 16

# int64: the kernels multiply an index by head_dim in the index's own type, and a pool of 4 GB has 2**31 elements.
_INDEX_DTYPE = torch.int64


class TritonHeads(HeadPool):
    """Attention with SGLang's Triton kernels."""

    def step(self, batch: HeadBatch) -> HeadStep:
        """For one forward pass."""
        if batch.num_new is None:
            return _DecodeStep(self, batch)
        return _ExtendStep(self, batch, batch.num_new)


class _DecodeStep(HeadStep):
    def __init__(self, pool: HeadPool, batch: HeadBatch) -> None:
        super().__init__(pool, batch, _INDEX_DTYPE)
        lengths = self._tables.lengths
        self._num_splits = align_rows(((lengths + (SPLIT_LENGTH - 1)) // SPLIT_LENGTH).clamp(1, MAX_SPLITS))
        shape = (lengths.shape[1], pool.group_size, MAX_SPLITS)
        self._partial_out = torch.empty(*shape, pool.head_dim, dtype=torch.float32, device=lengths.device)
        self._partial_lse = torch.empty(shape, dtype=torch.float32, device=lengths.device)

    def _run(self, layer: int, queries: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """As `HeadStep._run`."""
        decode_attention_fwd(
            queries,
            self._pool.keys,
            self._pool.values,
            out,
            self._tables.indptr[layer],
            self._tables.indices(layer),
            self._partial_out,
            self._partial_lse,
            self._num_splits[layer],
            MAX_SPLITS,
            scale,
            k_scale=1.0,
            v_scale=1.0,
        )


class _ExtendStep(HeadStep):
    def __init__(self, pool: HeadPool, batch: HeadBatch, num_new: torch.Tensor) -> None:
        """num_new: [requests] int32 or int64, new tokens of each."""
        super().__init__(pool, batch, _INDEX_DTYPE)
        num_new = num_new.int().repeat(pool.space.num_kv_heads)
        self._prefix_lens = align_rows(self._tables.lengths - num_new)
        self._q_indptr = pad(num_new.cumsum(0), (1, 0))
        self._max_new = batch.max_new

    def _run(self, layer: int, queries: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """As `HeadStep._run`."""
        extend_attention_fwd_unified(
            queries,
            out,
            self._pool.keys,
            self._pool.values,
            1.0,
            1.0,
            self._q_indptr,
            self._tables.indptr[layer],
            self._tables.indices(layer),
            self._prefix_lens[layer],
            self._max_new,
            sm_scale=scale,
        )
