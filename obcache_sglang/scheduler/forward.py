"""Inside the model's forward: positions of requests that use a context, and the scoring attention calls of jobs.

`ForwardBatch` is copied between its making and the attention calls, so what a forward needs is planned when the batch is
made (`plan_forward`) and found again by its request ids.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from obcache_sglang.scoring.ops import accumulate_scores
from obcache_sglang.scoring.selection import select_positions, static_scores

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringRows:
    """The rows of one forward that belong to one job.

    first_row: row of the query at position `first_position` in the forward's q; num_rows may be 0 for methods without
    queries. end: tokens of the context whose K and V are in the pool after this forward's attention. slots: [end] int64,
    their rows in the KV pool. last: whether end is the whole context, so that tokens are selected and copied.
    """

    job: CompressionJob
    first_row: int
    num_rows: int
    first_position: int
    end: int
    slots: torch.Tensor
    last: bool


class ForwardPlan:
    """What our hooks do in the current forward of this process."""

    def __init__(self, kv_pool: MHATokenToKVPool, req_to_token_pool: ReqToTokenPool, mean_over_ranks: Callable | None) -> None:
        """mean_over_ranks: averages a tensor over the ranks that share the KV heads of a layer; None with one rank."""
        self.kv_pool = kv_pool
        self.req_to_token_pool = req_to_token_pool
        self.mean_over_ranks = mean_over_ranks
        self._rows: list[ScoringRows] = []
        self._rids: list[str] = []

    def plan_forward(self, forward_batch: ForwardBatch, batch: ScheduleBatch) -> None:
        """Offsets the positions of requests behind a context, and plans the scoring of jobs."""
        offset_positions(forward_batch, batch.reqs, batch.extend_lens)
        self._rows = []
        if not forward_batch.forward_mode.is_extend():
            return
        first_row = 0
        for req, prefix_len, extend_len in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            if isinstance(req, CompressionJob) and req.error is None:
                rows = self._scoring_rows(req, first_row, prefix_len, prefix_len + extend_len)
                if rows is not None:
                    self._rows.append(rows)
            first_row += extend_len
        self._rids = [req.rid for req in batch.reqs]

    def _scoring_rows(self, job: CompressionJob, first_row: int, start: int, end: int) -> ScoringRows | None:
        last = end == job.context.num_tokens
        if last and job.slots is None:
            job.error = "not_reserved"
            return None
        first_position = max(start, job.first_scoring_position)
        if first_position >= end or not (last or job.context.settings.needs_queries):
            return None
        slots = self.req_to_token_pool.req_to_token[job.kv.req_pool_idx, :end].to(torch.int64)
        num_rows = end - first_position if job.context.settings.needs_queries else 0
        return ScoringRows(job, first_row + first_position - start, num_rows, first_position, end, slots, last)

    def after_attention(self, q: torch.Tensor, output: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        """Scores this layer for the jobs in the forward; in their last chunk also selects and copies. Never raises."""
        if not self._rows or forward_batch.rids != self._rids:
            return
        for rows in self._rows:
            job = rows.job
            if job.error is not None:
                continue
            started_at = time.perf_counter()
            try:
                self._compress_layer(rows, q, output, layer)
            except Exception:  # whatever it is, the context must be served exactly
                job.error = "error"
                logger.exception("obcache: context %s is served exactly", job.context.id)
            job.scoring_seconds += time.perf_counter() - started_at

    def _compress_layer(self, rows: ScoringRows, q: torch.Tensor, output: torch.Tensor, layer: RadixAttention) -> None:
        job, context, settings = rows.job, rows.job.context, rows.job.context.settings
        if layer.logit_cap > 0 or layer.is_cross_attention:
            job.error = "unsupported_attention"
            return
        key_buffer = self.kv_pool.get_key_buffer(layer.layer_id)
        value_buffer = self.kv_pool.get_value_buffer(layer.layer_id)
        k, v = key_buffer.index_select(0, rows.slots), value_buffer.index_select(0, rows.slots)
        if settings.needs_queries:
            scores = job.scores.pop(layer.layer_id, None)
            if scores is None:
                scores = torch.zeros(layer.tp_k_head_num, context.num_tokens, dtype=torch.float32, device=k.device)
            scoring = slice(rows.first_row, rows.first_row + rows.num_rows)
            accumulate_scores(
                scores,
                q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)[scoring],
                k,
                v,
                start=rows.first_position,
                scale=layer.scaling,
                score=settings.score,
                o=output.view(-1, layer.tp_q_head_num, layer.v_head_dim)[scoring],
            )
            if not rows.last:
                job.scores[layer.layer_id] = scores
                return
        else:
            seed = int(context.id[:8], 16) + layer.layer_id
            scores = static_scores(settings.method, layer.tp_k_head_num, context.num_tokens, seed, k.device)
        if settings.heads == "shared" and self.mean_over_ranks is not None:
            scores = self.mean_over_ranks(scores.mean(0, keepdim=True)).expand(layer.tp_k_head_num, -1)
        positions = select_positions(
            scores,
            context.num_slots,
            window=settings.window,
            sink_tokens=settings.sink_tokens,
            pooling=settings.pooling,
            kernel_size=settings.kernel_size,
            heads=settings.heads,
            shrink_window=settings.preset != "kvpress",
        )
        assert job.slots is not None
        _copy_chosen(k, positions, key_buffer, job.slots)
        _copy_chosen(v, positions, value_buffer, job.slots)
        job.positions[layer.layer_id] = positions.to(torch.int32)


def _copy_chosen(source: torch.Tensor, positions: torch.Tensor, buffer: torch.Tensor, slots: torch.Tensor) -> None:
    """Row `slots[m]` of buffer [rows, heads, dim] becomes, in lane h, token `positions[h, m]` of source [tokens, heads, dim].

    One flat index_select: several times faster on a CPU than indexing with tokens and heads.
    """
    num_heads, num_slots = positions.shape
    cells = (positions.t() * num_heads + torch.arange(num_heads, device=positions.device)).reshape(-1)
    chosen = source.reshape(-1, source.shape[-1]).index_select(0, cells).view(num_slots, num_heads, -1)
    buffer.index_copy_(0, slots, chosen)


def offset_positions(forward_batch: ForwardBatch, reqs: list[Req], extend_lens: list[int] | None) -> None:
    """Adds L - M to the positions of requests that stand behind a context; out of place, the tensor may be a graph's."""
    if not any(isinstance(req, ContextReq) and req.position_offset for req in reqs) or forward_batch.positions is None:
        return
    offsets = torch.tensor([getattr(req, "position_offset", 0) for req in reqs], dtype=forward_batch.positions.dtype)
    if forward_batch.forward_mode.is_extend():  # mixed batches carry decode rows as extends of one token
        offsets = offsets.repeat_interleave(torch.tensor(extend_lens))
    forward_batch.positions = forward_batch.positions + offsets.to(forward_batch.positions.device, non_blocking=True)


def score_after(attention_forward: Callable[..., Any], plan: ForwardPlan) -> Callable[..., Any]:
    """The attention backend's `forward`, followed by our scoring: the one door of all backends, whichever class they are."""

    def forward(
        q: torch.Tensor, k: Any, v: Any, layer: RadixAttention, forward_batch: ForwardBatch, *args: Any, **kwargs: Any
    ) -> Any:
        output = attention_forward(q, k, v, layer, forward_batch, *args, **kwargs)
        plan.after_attention(q, output, layer, forward_batch)
        return output

    return forward
