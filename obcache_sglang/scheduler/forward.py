"""Inside the model's forward: positions of requests that use a context, and the scoring attention calls of jobs.

`ForwardBatch` is copied between its making and the attention calls, so what a forward needs is planned when the batch is
made (`plan_forward`), row by row: a row's context and job are those of the request that SGLang put there, whatever it is called.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from obcache_sglang.compress.measured_errors import SampledQueries, divide_by_errors, kept_numbers, pruning_errors, sampled_rows
from obcache_sglang.compress.ranking import (
    comparable,
    effective_window,
    keep_across_heads,
    keep_counts,
    keep_per_head,
    rank_positions,
    static_scores,
)
from obcache_sglang.compress.scores import accumulate_scores_in_slots, relative_error_weights
from obcache_sglang.errors import HostError
from obcache_sglang.kv.cells import KeptTokens, KVSpace
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq, joined

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from obcache_sglang.compress.head_profile import HeadProfile
    from obcache_sglang.scheduler.context_cache import Context

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ScoringRows:
    """The rows of one forward that belong to one job.

    first_row: row of the query at position `first_position` in the forward's q; num_rows may be 0 for methods without
    queries. slots: int64, the rows in the KV pool of all tokens whose K and V are there after this forward's attention. last:
    whether the context is scored to the end, so that tokens are selected and copied.
    """

    job: CompressionJob
    first_row: int
    num_rows: int
    first_position: int
    slots: torch.Tensor
    last: bool


class ForwardPlan:
    """What our hooks do in the current forward of this process.

    accumulate: scores the tokens in slots of the pool; as `compress.scores.accumulate_scores_in_slots`. space: where the heads of
    uneven contexts lie; None where the pool cannot hold such. attends_uneven_heads: whether the attention backends read them.
    head_gains: of `compress.head_gains.head_gains`, for budget global. head_profile, lanes: for budget profile; which KV heads of a layer
    this rank has. serial: of the current forward. mean_over_ranks: averages a tensor over the ranks that share a layer's KV heads;
    None with one rank. agree: whether all of these say True. Both are collectives: called by all ranks, or by none. row_lse: [rows, query heads] float32, the natural log-sum-exps of the attention call that ended last, from
    a backend that gives them.
    """

    def __init__(
        self,
        kv_pool: MHATokenToKVPool,
        req_to_token_pool: ReqToTokenPool,
        accumulate: Callable[..., None] = accumulate_scores_in_slots,
        head_gains: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self._accumulate = accumulate
        self._head_gains = head_gains or {}
        self.kv_pool = kv_pool
        self.req_to_token_pool = req_to_token_pool
        self.space = KVSpace.of(kv_pool)
        self.attends_uneven_heads = False
        self.head_profile: HeadProfile | None = None
        self.lanes = (0, kv_pool.head_num)
        self.mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.agree: Callable[[bool], bool] = bool
        self.serial = 0
        self.row_lse: torch.Tensor | None = None
        self._rows: list[ScoringRows] = []
        self._rids: list[str] | None = None
        self._contexts: list[Context | None] = []

    def plan_forward(self, forward_batch: ForwardBatch, batch: ScheduleBatch) -> None:
        """Offsets the positions of requests behind a context, and plans the scoring of jobs.

        Where that fails, on this rank or another one, the requests behind contexts end with an error: their positions are wrong.
        """
        self.serial += 1
        self._rows, self._contexts, self._rids = [], [], forward_batch.rids
        contexts = [req.context if isinstance(req, ContextReq) and req.is_virtual else None for req in batch.reqs]
        jobs = [req for req in batch.reqs if isinstance(req, CompressionJob)]
        if not jobs and not any(contexts):
            return
        planned = False
        try:
            self._plan(forward_batch, batch, contexts)
            planned = True
        except Exception:
            logger.exception("obcache: a forward could not be planned")
        if not self.agree(planned):
            self._rows, self._contexts = [], []
            _end_unplanned(batch)

    def _plan(self, forward_batch: ForwardBatch, batch: ScheduleBatch, contexts: list[Context | None]) -> None:
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
                    self._rows.append(rows)
            first_row += extend_len

    def contexts(self, forward_batch: ForwardBatch) -> list[Context | None] | None:
        """The compressed context before each request of the batch; None where there is none at all.

        Raises HostError for a part of the planned batch: nobody could say whose rows it has.
        """
        if not self._contexts or forward_batch.rids is None:
            return None
        if forward_batch.rids != self._rids:
            raise HostError(
                "SGLang runs another batch than the one that was planned, and compressed contexts cannot be told apart in it: "
                "turn off what splits batches, or start without --obcache."
            )
        return self._contexts

    def uneven_contexts(self, forward_batch: ForwardBatch) -> list[tuple[int, Context]]:
        """Those of `contexts` whose heads may keep different numbers of tokens, each with its request's row."""
        contexts = self.contexts(forward_batch) or ()
        return [(row, context) for row, context in enumerate(contexts) if context is not None and context.is_uneven]

    def scores(self, forward_batch: ForwardBatch) -> bool:
        """Whether a context of the batch is scored in this forward."""
        return bool(self._rows) and forward_batch.rids == self._rids

    def _scoring_rows(self, job: CompressionJob, first_row: int, start: int, end: int) -> ScoringRows | None:
        last = job.is_final and end == len(job.origin_input_ids)
        if last and job.slots is None:
            job.error = "not_reserved"
            return None
        first_position = max(start, job.first_scoring_position)
        if first_position >= end or not (last or job.scores_context):
            return None
        slots = self.req_to_token_pool.req_to_token[job.kv.req_pool_idx, :end].to(torch.int64)
        num_rows = end - first_position if job.scores_context else 0
        return ScoringRows(job, first_row + first_position - start, num_rows, first_position, slots, last)

    def after_attention(self, q: torch.Tensor, output: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        """Scores this layer for the jobs in the forward; in their last chunk also selects and copies. Never raises.

        q: [rows, num_q_heads * head_dim] after RoPE; output: the attention's, of the same shape.
        """
        lse, self.row_lse = self.row_lse, None
        if not self.scores(forward_batch):
            return
        for rows in self._rows:
            started_at = time.perf_counter()
            scores = self._contained(rows.job, self._add_scores, rows, q, output, lse, layer)
            if rows.last and rows.job.context.settings.heads == "shared" and self.mean_over_ranks is not None:
                # A collective: every rank takes part, also one that has failed and has nothing to give.
                failed = scores is None
                given = torch.zeros(1, rows.job.context.num_tokens, device=q.device) if scores is None else scores
                scores = self.mean_over_ranks(given)
                scores = None if failed else scores
            if rows.last and scores is not None:
                self._contained(rows.job, self._keep, rows, scores, layer)
            rows.job.scoring_seconds += time.perf_counter() - started_at

    @staticmethod
    def _contained(job: CompressionJob, step: Callable[..., T], *args: Any) -> T | None:
        """A step of a job; None where it raised, or one before it did. Whatever it is, the context must be served exactly."""
        if job.error is not None:
            return None
        try:
            return step(*args)
        except Exception:
            job.error = "error"
            logger.exception("obcache: context %s is served exactly", job.context.id)
            return None

    def _add_scores(
        self, rows: ScoringRows, q: torch.Tensor, output: torch.Tensor, lse: torch.Tensor | None, layer: RadixAttention
    ) -> torch.Tensor | None:
        """The scores of this layer's tokens, [num_kv_heads, L] float32, or [1, L] for heads that keep the same ones.

        None before the last chunk, where the job keeps them. q, output: as in `after_attention`; lse: [rows, num_q_heads] float32.
        """
        job, settings = rows.job, rows.job.context.settings
        if layer.logit_cap > 0 or layer.is_cross_attention:
            job.error = "unsupported_attention"
            return None
        scores = self._score_layer(rows, q, output, lse, layer)
        if not rows.last:
            job.scores[layer.layer_id] = scores
            return None
        scores = joined(scores, job.earlier.get(layer.layer_id), settings.reduce)
        return scores.mean(0, keepdim=True) if settings.heads == "shared" else scores

    def _keep(self, rows: ScoringRows, scores: torch.Tensor, layer: RadixAttention) -> None:
        """Chooses the tokens that this layer's heads keep, and copies their K and V; with budget global once all layers are scored.

        scores: as `_add_scores` gives them.
        """
        job, context, settings = rows.job, rows.job.context, rows.job.context.settings
        ranked = rank_positions(
            scores.expand(layer.tp_k_head_num, -1),
            context.num_slots,
            window=settings.kept_window,
            sink_tokens=settings.sink_tokens,
            pooling=settings.pooling,
            kernel_size=settings.kernel_size,
            shrink_window=settings.shrinks_window,
        )
        if context.is_uneven and settings.budget == "global":
            job.ranked.append(ranked)
            if settings.measures_errors:
                job.errors.append(self._measure_errors(rows, ranked, layer))
            if len(job.ranked) == self.kv_pool.layer_num:
                self._keep_across_layers(rows)
        elif context.is_uneven and settings.budget == "profile":
            self._keep_by_profile(rows, ranked)
        elif context.is_uneven:
            self._keep_across_heads(rows, ranked)
        else:
            self._keep_evenly(rows, ranked, layer)
        if len(job.chosen) == self.kv_pool.layer_num:
            job.kept = KeptTokens.of_layers(job.chosen)
        # GPU kernels find the rows by themselves.
        on_cpu = self.space is not None and self.space.k.device.type == "cpu"
        if job.kept is not None and context.is_uneven and on_cpu:
            assert self.space is not None and job.slots is not None
            job.kept = replace(job.kept, rows=self.space.cell_rows(job.slots).to(torch.int32))

    def _score_layer(
        self, rows: ScoringRows, q: torch.Tensor, output: torch.Tensor, lse: torch.Tensor | None, layer: RadixAttention
    ) -> torch.Tensor:
        """The scores [num_kv_heads, L] float32 of this layer from all queries so far, this forward's included."""
        job, context, settings = rows.job, rows.job.context, rows.job.context.settings
        if not job.scores_context:
            seed = int(context.id[:8], 16) + layer.layer_id
            return static_scores(settings.method, layer.tp_k_head_num, context.num_tokens, seed, q.device)
        scores = job.scores.pop(layer.layer_id, None)
        if scores is None:
            scores = torch.zeros(layer.tp_k_head_num, context.num_tokens, dtype=torch.float32, device=q.device)
        scoring = slice(rows.first_row, rows.first_row + rows.num_rows)
        outputs = output.view(-1, layer.tp_q_head_num, layer.v_head_dim)[scoring]
        lse = None if lse is None else lse[scoring]
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)[scoring]
        error_weights = None
        if settings.weighs_queries or settings.measures_errors:
            error_weights = relative_error_weights(outputs, self._head_gains.get(layer.layer_id))
        if settings.measures_errors:
            assert error_weights is not None
            self._sample_queries(rows, queries, error_weights, layer)
        visible, scored, start = rows.slots, scores, rows.first_position
        if settings.preset == "kvzip" and job.replay is not None:
            # Its queries see the sinks, the chunk they repeat and each other, and score the chunk.
            chunk, num_sinks = slice(job.replay.first, job.replay.last), min(settings.sink_tokens, job.replay.first)
            visible = torch.cat([visible[:num_sinks], visible[chunk], visible[context.num_tokens :]])
            start, lse = len(visible) - rows.num_rows, None
            scored = torch.nn.functional.pad(scored[:, chunk], (num_sinks, 0))
        self._accumulate(
            scored,
            queries,
            self.kv_pool.get_key_buffer(layer.layer_id),
            self.kv_pool.get_value_buffer(layer.layer_id),
            visible,
            start=start,
            scale=layer.scaling,
            score=settings.score,
            o=outputs,
            lse=lse,
            query_weights=error_weights if settings.weighs_queries else None,
            reduce=settings.reduce,
        )
        if scored is not scores:
            scores[:, chunk] = scored[:, num_sinks:]
        return scores

    def _sample_queries(self, rows: ScoringRows, q: torch.Tensor, weights: torch.Tensor, layer: RadixAttention) -> None:
        """Takes some of these rows of a replay, q [num_rows, num_q_heads, head_dim], for `_measure_errors`."""
        job, num_tokens = rows.job, rows.job.context.num_tokens
        assert job.replay is not None
        first = rows.first_position - num_tokens
        chosen = sampled_rows(job.replay.first + first, rows.num_rows, num_tokens)
        if chosen.start == chosen.stop:
            return
        seen = torch.arange(first + 1, first + rows.num_rows + 1, device=q.device)[chosen]
        behind = rows.slots[num_tokens:]
        keys, values = (get(layer.layer_id)[behind] for get in (self.kv_pool.get_key_buffer, self.kv_pool.get_value_buffer))
        sample = SampledQueries.take(q[chosen], weights[chosen], keys, values, seen, layer.scaling)
        job.samples.setdefault(layer.layer_id, []).append(sample)

    def _measure_errors(self, rows: ScoringRows, ranked: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """What this layer's heads lose for each number of kept tokens, as `pruning_errors`."""
        job, context = rows.job, rows.job.context
        return pruning_errors(
            SampledQueries.joined(job.all_samples(layer.layer_id)),
            comparable(ranked).argsort(dim=-1, descending=True, stable=True),
            kept_numbers(_fewest_kept(context), context.num_tokens),
            self.kv_pool.get_key_buffer(layer.layer_id),
            self.kv_pool.get_value_buffer(layer.layer_id),
            rows.slots[: context.num_tokens],
        )

    def _keep_evenly(self, rows: ScoringRows, ranked: torch.Tensor, layer: RadixAttention) -> None:
        """Every head keeps as many tokens: each goes to a slot's own layer and lane, where any attention backend finds it."""
        positions = keep_per_head(ranked, rows.job.context.num_slots)
        assert rows.job.slots is not None
        for buffer in (self.kv_pool.get_key_buffer(layer.layer_id), self.kv_pool.get_value_buffer(layer.layer_id)):
            _copy_tokens(buffer, rows.slots, positions, rows.job.slots)
        offsets = torch.arange(len(positions) + 1, device=positions.device) * positions.shape[1]
        rows.job.chosen.append((positions.reshape(-1).to(torch.int32), offsets))

    def _keep_across_heads(self, rows: ScoringRows, ranked: torch.Tensor) -> None:
        """Budget adakv: the heads of this layer share its cells."""
        num_slots = rows.job.context.num_slots
        safe = rows.job.context.settings.safeguarded_tokens(num_slots)
        chosen = keep_across_heads(ranked, num_slots * len(ranked), safe_per_head=safe)
        first_head = len(rows.job.chosen) * len(ranked)
        self._copy_cells(rows, *chosen, first_head=first_head, first_cell=first_head * num_slots)
        rows.job.chosen.append(chosen)

    def _keep_by_profile(self, rows: ScoringRows, ranked: torch.Tensor) -> None:
        """Budget profile: what each head keeps is known before; a layer's cells begin behind those of the layers before."""
        job, context = rows.job, rows.job.context
        if job.counts is None:
            assert self.head_profile is not None
            fewest = _fewest_kept(context)
            job.counts = self.head_profile.counts(context.num_tokens, context.num_slots, fewest, self.lanes)
        first_head = len(job.chosen) * len(ranked)
        chosen = keep_counts(ranked, job.counts[first_head : first_head + len(ranked)])
        self._copy_cells(rows, *chosen, first_head=first_head, first_cell=sum(job.counts[:first_head]))
        job.chosen.append(chosen)

    def _keep_across_layers(self, rows: ScoringRows) -> None:
        """Budget global: all heads of all layers share all cells. Called when the last layer's scores are known."""
        job, num_slots = rows.job, rows.job.context.num_slots
        ranked = torch.cat(job.ranked)
        total = num_slots * len(ranked)
        if job.errors:
            numbers = kept_numbers(_fewest_kept(job.context), job.context.num_tokens)
            chosen = keep_counts(ranked, divide_by_errors(torch.cat(job.errors), numbers, total))
        else:
            chosen = keep_across_heads(ranked, total)
        job.ranked, job.errors = [], []
        self._copy_cells(rows, *chosen, first_head=0, first_cell=0)
        job.kept = KeptTokens(*chosen)

    def _copy_cells(
        self, rows: ScoringRows, positions: torch.Tensor, offsets: torch.Tensor, *, first_head: int, first_cell: int
    ) -> None:
        """Copies K and V of kept tokens, ordered as in KeptTokens, to the cells from `first_cell` on.

        first_head: of all heads of all layers, the one that `offsets` begins with. The context's slots are other ones than
        those its tokens were computed in: nothing is read after it was overwritten.
        """
        space = self.space
        assert space is not None and rows.job.slots is not None
        num_heads, num_cells = len(offsets) - 1, positions.numel()
        heads = torch.arange(first_head, first_head + num_heads, device=positions.device)
        heads = heads.repeat_interleave(offsets.diff(), output_size=num_cells)
        # One layer's worth at a time bounds the scratch memory.
        step = rows.job.context.num_slots * space.num_kv_heads
        for first in range(0, num_cells, step):
            part = slice(first, first + step)
            layers, lanes = heads[part] // space.num_kv_heads, heads[part] % space.num_kv_heads
            sources = space.rows(layers, rows.slots[positions[part]], lanes)
            cells = space.cell_rows(rows.job.slots, first_cell + first, first_cell + min(first + step, num_cells))
            for buffer in (space.k, space.v):
                buffer.index_copy_(0, cells, buffer.index_select(0, sources))


def _end_unplanned(batch: ScheduleBatch) -> None:
    """Requests whose forward runs without a plan: those behind a context end with an error and leave nothing in the tree."""
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    for req in batch.reqs:
        if isinstance(req, CompressionJob):
            req.error = req.error or "error"
        elif isinstance(req, ContextReq) and req.is_virtual:
            req.skip_radix_cache_insert = True
            req.to_finish = FINISH_ABORT(
                "The request could not be continued behind its compressed context; send it again.", status
            )


def _fewest_kept(context: Context) -> int:
    """Tokens that each head keeps at least, where heads keep different numbers: what is always kept, and one."""
    settings = context.settings
    window = effective_window(settings.kept_window, context.num_slots, settings.shrinks_window)
    return min(context.num_slots, max(1, settings.sink_tokens + window))


def _copy_tokens(buffer: torch.Tensor, sources: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
    """Row `slots[m]` of buffer [rows, heads, dim] becomes, in lane h, row `sources[positions[h, m]]`."""
    num_heads, num_slots = positions.shape
    lanes = torch.arange(num_heads, device=positions.device)
    # One flat index_select: several times faster on a CPU than indexing with rows and heads.
    chosen = (sources[positions.t()] * num_heads + lanes).reshape(-1)
    buffer.index_copy_(0, slots, buffer.view(-1, buffer.shape[-1]).index_select(0, chosen).view(num_slots, num_heads, -1))


def offset_positions(forward_batch: ForwardBatch, contexts: list[Context | None], extend_lens: list[int] | None) -> None:
    """Adds L - M to the positions of requests that stand behind a context; out of place, the tensor may be a graph's.

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
        output = attention_forward(q, k, v, layer, forward_batch, *args, **kwargs)
        plan.after_attention(q, output, layer, forward_batch)
        return output

    return forward
