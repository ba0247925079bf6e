"""Attention over per-head budgets with FlashInfer's paged wrapper: pages of one row, one KV head.

FlashInfer plans on the host, and heads have other lengths in each layer: a layer has a wrapper and a plan of its own. A single
wrapper planned again for each layer would be cheaper in memory, and wrong: a plan is copied to the device from a pinned buffer of
the wrapper's, which the next plan would overwrite while the copy waits for the layers before.
"""

from __future__ import annotations

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from torch.nn.functional import pad

from obcache_sglang.gpu.head_attention import HeadPool, HeadStep
from obcache_sglang.gpu.head_tables import HeadBatch, sequence_lengths
from obcache_sglang.kv.cells import KVSpace


class FlashInferHeads(HeadPool):
    """Attention with FlashInfer's FA2 kernels, which take any number of query heads per KV head, in decode too."""

    def __init__(
        self, space: KVSpace, req_to_token: torch.Tensor, num_q_heads: int, q_dtype: torch.dtype, workspace: torch.Tensor
    ) -> None:
        """workspace: [bytes] uint8, zero at first, on the device, for partial results; SGLang's own will do. A layer adds 8 MiB.

        Raises ValueError when the pool has more rows than FlashInfer's int32 indices can tell apart.
        """
        super().__init__(space, req_to_token, num_q_heads)
        if space.k.shape[0] > torch.iinfo(torch.int32).max:
            raise ValueError(f"{space.k.shape[0]} K rows do not fit FlashInfer's int32 indices")
        self.q_dtype = q_dtype
        self.wrappers = [BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2") for _ in range(space.num_layers)]

    def step(self, batch: HeadBatch, host: HeadBatch) -> HeadStep:
        """For one forward pass. host: the same batch with its tensors on the CPU, so that no plan waits for the device."""
        return _FlashInferStep(self, batch, host)


class _FlashInferStep(HeadStep):
    def __init__(self, pool: FlashInferHeads, batch: HeadBatch, host: HeadBatch) -> None:
        super().__init__(pool, batch, torch.int32)
        self._wrappers = pool.wrappers
        lengths, indptr = sequence_lengths(pool.space, host)
        one_each = torch.ones(lengths.shape[1], dtype=torch.int32)
        num_new = one_each if host.num_new is None else host.num_new.int().repeat(pool.space.num_kv_heads)
        q_indptr = pad(num_new.cumsum(0, dtype=torch.int32), (1, 0))
        for layer, wrapper in enumerate(self._wrappers):
            wrapper.plan(
                q_indptr,
                indptr[layer],
                self._tables.buffer,
                one_each,
                num_qo_heads=pool.group_size,
                num_kv_heads=1,
                head_dim_qk=pool.head_dim,
                page_size=1,
                causal=True,
                sm_scale=1.0,
                q_data_type=pool.q_dtype,
                kv_data_type=pool.space.k.dtype,
            )

    def _run(self, layer: int, queries: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """As `HeadStep._run`."""
        self._tables.indices(layer)
        # The scale of the softmax is q_scale times the plan's.
        self._wrappers[layer].run(queries, (self._pool.keys, self._pool.values), q_scale=scale, out=out)
