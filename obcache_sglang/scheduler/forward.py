"""Inside the model's forward: positions of requests that use a context, and the scoring attention calls of jobs.

`ForwardBatch` is copied between its making and the attention calls, so what a forward needs is planned when the batch is
made (`plan_forward`), row by row: a row's context and job are those of the request that SGLang put there, whatever it is called.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from obcache_sglang.compress.compression import AttentionCall, Compressor, ScoringRows, UnsupportedAttention
from obcache_sglang.compress.scores import accumulate_scores_in_slots
from obcache_sglang.host import use
from obcache_sglang.kv.batch import BatchContexts
from obcache_sglang.kv.cells import KeptTokens
from obcache_sglang.kv.context import KeptContext
from obcache_sglang.scheduler.in_place import CachedCompression
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ForwardPlan(BatchContexts):
    """What our hooks do in the current forward of this process.

    compressor: what all compressions share. attends_uneven_heads: whether the attention backends read contexts with per-head
    budgets. mean_over_ranks: averages a tensor over the ranks that share a layer's KV heads; None with one rank. agree: whether all
    of these say True. Both are collectives: called by all ranks, or by none.
    """

    def __init__(
        self,
        kv_pool: MHATokenToKVPool,
        req_to_token_pool: ReqToTokenPool,
        accumulate: Callable[..., None] = accumulate_scores_in_slots,
        head_gains: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """accumulate: as in `Compressor`. head_gains: likewise, [tp_q_head_num] float32 by layer id."""
        super().__init__(kv_pool)
        self.compressor = Compressor(kv_pool, self.space, accumulate, head_gains or {}, lanes=(0, kv_pool.head_num))
        self.req_to_token_pool = req_to_token_pool
        self.attends_uneven_heads = False
        self.mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.agree: Callable[[bool], bool] = bool
        self._rows: list[tuple[CompressionJob, ScoringRows]] = []
        self._hidden_states: torch.Tensor | None = None

    def plan_forward(self, forward_batch: ForwardBatch, batch: ScheduleBatch) -> None:
        """Offsets the positions of requests after a context, and plans the scoring of jobs.

        Where that fails, on this rank or another one, the requests after contexts end with an error: their positions are wrong.
        """
        self.serial += 1
        self._rows, self._contexts, self._rids, self._has_scored_rows = [], [], forward_batch.rids, False
        contexts = [_context_before(req) for req in batch.reqs]
        jobs = [req for req in batch.reqs if isinstance(req, CompressionJob)]
        if not jobs and not any(contexts):
            return
        planned = False
        try:
            self._plan(forward_batch, batch, contexts)
            planned = True
        except Exception:
            logger.exception("obcache: planning a forward pass failed; requests after a compressed context end with an error")
        if not self.agree(planned):
            self._rows, self._contexts, self._has_scored_rows = [], [], False
            _end_unplanned(batch)

    def _plan(self, forward_batch: ForwardBatch, batch: ScheduleBatch, contexts: list[KeptContext | None]) -> None:
        contexts = [self._seen_by_local_pass(req) or context for req, context in zip(batch.reqs, contexts, strict=True)]
        if any(contexts):
            offset_positions(forward_batch, contexts, batch.extend_lens)
            self._contexts = contexts
        if not forward_batch.forward_mode.is_extend():
            return
        first_row = 0
        for req, prefix_len, extend_len in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            if isinstance(req, CompressionJob) and (req.error is None or req.slots is not None):
                rows = self._scoring_rows(req, first_row, prefix_len, prefix_len + extend_len)
                if rows is not None:
                    self._rows.append((req, rows))
            first_row += extend_len
        self._has_scored_rows = bool(self._rows)

    def _scoring_rows(self, job: CompressionJob, first_row: int, start: int, end: int) -> ScoringRows | None:
        last = job.is_final and end == len(job.origin_input_ids)
        if last and job.slots is None:
            job.error = "not_reserved"
            return None
        first_position = max(start, job.first_scoring_position)
        if first_position >= end or not (last or job.compression.reads_rows):
            return None
        slots = self.req_to_token_pool.req_to_token[job.kv.req_pool_idx, :end].to(torch.int64)
        num_rows = end - first_position if job.compression.reads_rows else 0
        return ScoringRows(first_row + first_position - start, num_rows, first_position, slots, last)

    def _seen_by_local_pass(self, req: Req) -> KeptContext | None:
        """What a local pass of a replay sees of its context before `ReplayPass.first_seen`, as if a compression had left that; None for others."""
        if not isinstance(req, CompressionJob) or req.local_pass is None or req.error == "evicted":
            return None
        assert self.space is not None, "settings allow it only where heads may keep different numbers of tokens"
        num_sinks, first_seen, num_heads = req.local_pass.num_sinks, req.local_pass.first_seen, self.space.num_heads
        device = self.space.k.device
        positions = torch.arange(num_sinks, dtype=torch.int32, device=device).repeat(num_heads)
        kept = KeptTokens(positions, torch.arange(num_heads + 1, device=device) * num_sinks, num_exact=num_sinks)
        return KeptContext(first_seen, num_sinks, req.position_offset, first_seen > num_sinks, kept)

    def before_attention(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of a layer's attention module, for jobs that hidden states score. Never raises."""
        if self._has_scored_rows:
            self._hidden_states = kwargs.get("hidden_states")

    def after_attention(self, q: torch.Tensor, output: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        """Scores this layer for the jobs in the forward; in their last chunk also selects and copies. Never raises.

        q: [rows, num_q_heads * head_dim] after RoPE; output: the attention's, of the same shape.
        """
        lse, self.row_lse = self.row_lse, None
        hidden_states, self._hidden_states = self._hidden_states, None
        if not self.is_scored(forward_batch):
            return
        call = AttentionCall(q, output, lse, hidden_states)
        for job, rows in self._rows:
            self.compress_layer(job, rows, layer, call)

    def compress_layer(
        self,
        job: CompressionJob | CachedCompression,
        rows: ScoringRows,
        layer: RadixAttention,
        call: AttentionCall | None = None,
    ) -> None:
        """Scores one layer for a job; in its last chunk also selects and copies. Never raises. call: as in `Compression.score`."""
        started_at = time.perf_counter()
        scores = self._contained(job, job.compression.score, self.compressor, rows, layer, call)
        if rows.last and job.context.settings.heads == "shared" and self.mean_over_ranks is not None:
            # A collective: every rank takes part, also one that has failed and has nothing to give.
            failed = scores is None
            given = torch.zeros(1, job.context.num_tokens, device=self.kv_pool.device) if scores is None else scores
            scores = self.mean_over_ranks(given)
            scores = None if failed else scores
        if rows.last and scores is not None:
            self._contained(job, job.compression.keep, self.compressor, rows, scores, layer, job.slots)
        job.scoring_seconds += time.perf_counter() - started_at

    @staticmethod
    def _contained(job: CompressionJob | CachedCompression, step: Callable[..., T], *args: Any) -> T | None:
        """A step of a job; None where it raised, or one before it did. Whatever it is, the context must be served exactly."""
        if job.error is not None:
            return None
        try:
            return step(*args)
        except UnsupportedAttention:
            job.error = "unsupported_attention"
        except Exception:
            job.error = "error"
            logger.exception("obcache: compressing context %s failed; it is served exactly", job.context.id)
        return None


def _context_before(req: Req) -> KeptContext | None:
    """The compressed context that a request's own tokens come after."""
    if isinstance(req, CompressionJob):
        return req.reads if req.error != "evicted" else None  # then its ids are not those of the base either
    return req.reads if isinstance(req, ContextReq) and req.is_virtual else None


def _end_unplanned(batch: ScheduleBatch) -> None:
    """Requests whose forward runs without a plan: those after a context end with an error and leave nothing in the tree."""
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    for req in batch.reqs:
        if isinstance(req, CompressionJob):
            req.error = req.error or "error"
        elif isinstance(req, ContextReq) and req.is_virtual:
            req.skip_radix_cache_insert = True
            req.to_finish = FINISH_ABORT(
                "The request could not be continued after its compressed context. Send it again.", status
            )


def offset_positions(forward_batch: ForwardBatch, contexts: list[KeptContext | None], extend_lens: list[int] | None) -> None:
    """Adds L - M to the positions of requests that stand after a context; out of place, the tensor may be a graph's.

    contexts: of each request of the batch.
    """
    if forward_batch.positions is None:
        return
    offsets = torch.tensor([c.position_offset if c else 0 for c in contexts], dtype=forward_batch.positions.dtype)
    if forward_batch.forward_mode.is_extend():  # mixed batches carry decode rows as extends of one token
        offsets = offsets.repeat_interleave(torch.tensor(extend_lens))
    forward_batch.positions = forward_batch.positions + offsets.to(forward_batch.positions.device, non_blocking=True)


def score_after(attention_forward: Callable[..., Any], plan: ForwardPlan) -> Callable[..., Any]:
    """The attention backend's `forward`, followed by our scoring: the one door of all backends, whichever class they are."""

    def forward(
        q: torch.Tensor, k: Any, v: Any, layer: RadixAttention, forward_batch: ForwardBatch, *args: Any, **kwargs: Any
    ) -> Any:
        """As the backend's. q: [rows, query heads * head_dim]; returns the outputs, like q."""
        output = attention_forward(q, k, v, layer, forward_batch, *args, **kwargs)
        plan.after_attention(q, output, layer, forward_batch)
        return output

    return forward


TOUCHES = (
    use(
        "sglang.srt.managers.schedule_batch.FINISH_ABORT",
        "call",
        "ends a request whose forward failed",
        ("message", "status_code"),
    ),
)
