"""Attention over per-head budgets: each KV head of each request is a sequence of its own.

A backend lives as long as the server: `TritonHeads` (obcache_sglang.gpu.triton_heads) or `FlashInferHeads`. Each forward pass
takes a `HeadStep` from it, whose `attend` is called once per layer when the K and V of the new tokens are in the pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from obcache_sglang.gpu.head_tables import HeadBatch, HeadTables
from obcache_sglang.kv.cells import KVSpace


class HeadPool:
    """A KV pool as a pool of heads."""

    def __init__(self, space: KVSpace, req_to_token: torch.Tensor, num_q_heads: int) -> None:
        """req_to_token: [rows, max tokens] int32, the engine's; num_q_heads: this rank's, a multiple of space.num_kv_heads."""
        self.space = space
        self.req_to_token = req_to_token
        self.group_size = num_q_heads // space.num_kv_heads
        self.head_dim = space.k.shape[1]
        # Kernels take [tokens, KV heads, head_dim]: here rows are tokens, with one head each.
        self.keys, self.values = space.k.unsqueeze(1), space.v.unsqueeze(1)


class HeadStep(ABC):
    """One forward pass over a `HeadBatch`."""

    def __init__(self, pool: HeadPool, batch: HeadBatch, index_dtype: torch.dtype) -> None:
        self._pool = pool
        self._head_major = batch.head_major
        self._tables = HeadTables(pool.space, pool.req_to_token, batch, index_dtype)

    def attend(self, q: torch.Tensor, layer: int, scale: float, out: torch.Tensor) -> None:
        """Attention of the new tokens in one layer, counted from the pool's first.

        q: [new tokens of all requests, query heads * head_dim], after RoPE, no more rows than that; out: the same shape and
        dtype, contiguous, overwritten.
        """
        pool = self._pool
        shape = (-1, pool.space.num_kv_heads, pool.group_size, pool.head_dim)
        queries = q.view(shape)
        if not self._head_major:
            # A view of out or an error: the kernel must not write into a copy.
            self._run(layer, queries.flatten(0, 1), scale, out.view(-1, *shape[2:]))
            return
        queries = queries.transpose(0, 1).contiguous()
        result = torch.empty_like(queries)
        self._run(layer, queries.flatten(0, 1), scale, result.view(-1, *shape[2:]))
        out.view(shape).copy_(result.transpose(0, 1))

    @abstractmethod
    def _run(self, layer: int, queries: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """queries, out: [rows, query heads of a KV head, head_dim], contiguous, the sequences one after the other."""
