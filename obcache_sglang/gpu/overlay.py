"""Requests after contexts with per-head budgets, beside any of SGLang's attention backends.

The backend computes a batch as it always does, and knows nothing of such contexts: what it computed for the requests after one
is replaced. Batches without such a request take the backend's own path alone; batches of nothing else skip it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from obcache_sglang.gpu.flashinfer_heads import FlashInferHeads
from obcache_sglang.gpu.head_tables import HeadBatch, count_entries
from obcache_sglang.gpu.triton_heads import TritonHeads

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from obcache_sglang.gpu.head_attention import HeadStep
    from obcache_sglang.kv.batch import BatchContexts
    from obcache_sglang.kv.context import KeptContext


class HeadOverlay:
    """For one model. heads: attention over per-head budgets in its pool, whose `KVSpace` is plan.space."""

    def __init__(self, plan: BatchContexts, heads: TritonHeads | FlashInferHeads) -> None:
        self.plan = plan
        self.heads = heads
        self._step_of: tuple[int, int] | None = None
        self._step: HeadStep | None = None
        self._rows = torch.empty(0, dtype=torch.int64)

    def over(self, attention_forward: Callable[..., Any]) -> Callable[..., Any]:
        """An attention backend's `forward`, which also reads contexts with per-head budgets."""

        def forward(
            q: torch.Tensor,
            k: torch.Tensor | None,
            v: torch.Tensor | None,
            layer: RadixAttention,
            forward_batch: ForwardBatch,
            save_kv_cache: bool = True,
            **kwargs: Any,
        ) -> Any:
            """As the backend's. q: [rows, query heads * head_dim]; k, v: [rows, KV heads, head_dim]. Returns outputs like q."""
            requests = self.plan.uneven_contexts(forward_batch)
            if not requests:
                return attention_forward(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)
            num_rows = len(requests) if forward_batch.forward_mode.is_decode() else sum(forward_batch.extend_seq_lens_cpu)
            alone = len(requests) == forward_batch.batch_size and q.shape[0] == num_rows  # and no row of padding
            if alone and save_kv_cache and k is not None and v is not None:
                location = KVWriteLoc(forward_batch.out_cache_loc, None)
                self.plan.kv_pool.set_kv_buffer(layer, location, k, v, layer.k_scale, layer.v_scale)
                output = torch.empty_like(q)
            else:
                output = attention_forward(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)
            self._replace(q, layer, forward_batch, output, requests)
            self.plan.row_lse = None  # not of what the replaced rows attend to
            return output

        return forward

    def _replace(
        self,
        q: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        output: torch.Tensor,
        requests: list[tuple[int, KeptContext]],
    ) -> None:
        """Attends for the requests after contexts with per-head budgets, in place of what the backend made of their rows.

        q, output: [rows, query heads * head_dim]. requests: (row in the batch, context) of each.
        """
        step_of = (self.plan.serial, id(forward_batch))
        if self._step is None or self._step_of != step_of:
            self._plan_step(forward_batch, requests, q.device)
            self._step_of = step_of
        assert self._step is not None
        layer_index = layer.layer_id - self.plan.kv_pool.start_layer
        replaced = q.new_empty(len(self._rows), q.shape[-1])
        self._step.attend(q.view(len(q), -1).index_select(0, self._rows), layer_index, layer.scaling, replaced)
        output.view(len(q), -1).index_copy_(0, self._rows, replaced)

    def _plan_step(self, forward_batch: ForwardBatch, requests: list[tuple[int, KeptContext]], device: torch.device) -> None:
        """The tables that all layers share, from what the host knows of these requests."""
        rows, contexts = [row for row, _ in requests], [context for _, context in requests]
        decode = forward_batch.forward_mode.is_decode()
        num_new = [1] * len(forward_batch.seq_lens) if decode else list(forward_batch.extend_seq_lens_cpu)
        lengths = forward_batch.seq_lens if forward_batch.seq_lens_cpu is None else forward_batch.seq_lens_cpu
        own_lengths = lengths.tolist()
        kept = [context.kept for context in contexts if context.kept is not None]
        total_length = sum(own_lengths[row] for row in rows)
        index = torch.tensor(rows)
        host = HeadBatch(
            req_pool_indices=torch.empty(0),
            seq_lens=torch.tensor(own_lengths)[index],
            num_slots=torch.tensor([context.num_slots for context in contexts]),
            num_exact=torch.tensor([context.num_exact for context in contexts]),
            offsets=torch.empty(0),
            max_entries=count_entries(total_length, contexts, self.heads.space.num_kv_heads),
            num_new=None if decode else torch.tensor(num_new)[index],
            max_new=max(num_new[row] for row in rows),
        )
        on_device = index.to(device, non_blocking=True)
        batch = HeadBatch(
            req_pool_indices=forward_batch.req_pool_indices[on_device],
            seq_lens=forward_batch.seq_lens[on_device],
            num_slots=host.num_slots.to(device, non_blocking=True),
            num_exact=host.num_exact.to(device, non_blocking=True),
            offsets=torch.stack([each.offsets for each in kept]),
            max_entries=host.max_entries,
            num_new=None if host.num_new is None else host.num_new.to(device, non_blocking=True),
            max_new=host.max_new,
        )
        if isinstance(self.heads, FlashInferHeads):
            offsets = torch.tensor([each.bounds for each in kept])
            self._step = self.heads.step(batch, replace(host, offsets=offsets))
        else:
            self._step = self.heads.step(batch)
        starts = torch.tensor(num_new).cumsum(0) - torch.tensor(num_new)
        queries = [torch.arange(int(starts[row]), int(starts[row]) + num_new[row]) for row in rows]
        self._rows = torch.cat(queries).to(device, non_blocking=True)
