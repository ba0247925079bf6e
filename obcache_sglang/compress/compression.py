"""The compression of one context, layer by layer: score, rank, divide, copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from obcache_sglang.compress.budgets import Budget, Division, Part, budget_of
from obcache_sglang.compress.measured_errors import SampledQueries, pruning_errors, sampled_rows
from obcache_sglang.compress.ranking import comparable, position_scores, rank_positions
from obcache_sglang.compress.scores import ScoringQueries, accumulate_scores_in_slots, relative_error_weights
from obcache_sglang.kv.cells import KeptTokens, KVSpace, heads_of
from obcache_sglang.kv.copy import Sources, copy_cells, copy_tokens

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from obcache_sglang.compress.gates import Gates
    from obcache_sglang.compress.head_profile import HeadProfile
    from obcache_sglang.compress.hidden_gates import HiddenGates
    from obcache_sglang.compress.replay import ReplayPass
    from obcache_sglang.compress.rotary import InverseRotary
    from obcache_sglang.kv.context import Context


class UnsupportedAttention(Exception):
    """A layer's attention is not what scores are defined for: capped logits, cross attention, or hidden states in another form."""


def gate_scores_in_slots(
    gates: Gates,
    rotary: InverseRotary,
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    first_position: int = 0,
) -> torch.Tensor:
    """The scores [num_kv_heads, L] float32 that gates give the tokens of a context in the pool.

    keys, values: [pool slots, num_kv_heads, head_dim], any float dtype, K after RoPE at positions from `first_position` on.
    slots: [L] int64.
    """
    positions = torch.arange(first_position, first_position + len(slots), device=slots.device)
    return gates.scores(layer, rotary(keys[slots], positions), values[slots])


@dataclass
class Compressor:
    """What all compressions of a process share.

    kv_pool: the model's. space: where cells lie; None where the pool cannot hold contexts with per-head budgets.
    accumulate: scores the tokens in slots of the pool; as `scores.accumulate_scores_in_slots`.
    head_gains: of `head_gains.head_gains`, by layer id. head_profile: for budget profile.
    lanes: (first, last + 1) of a layer's KV heads that this rank has.
    gates: of this rank's heads, for method gate. rotaries: what reads K back to before RoPE for them, by layer id.
    gate_scores: scores the tokens in slots of the pool by gates; as `gate_scores_in_slots`.
    hidden_gates: of this rank's heads, for method hidden-gate.
    """

    kv_pool: MHATokenToKVPool
    space: KVSpace | None
    accumulate: Callable[..., None] = accumulate_scores_in_slots
    head_gains: Mapping[int, torch.Tensor] = field(default_factory=dict)
    head_profile: HeadProfile | None = None
    lanes: tuple[int, int] = (0, 0)
    gates: Gates | None = None
    rotaries: Mapping[int, InverseRotary] = field(default_factory=dict)
    gate_scores: Callable[..., torch.Tensor] = gate_scores_in_slots
    hidden_gates: HiddenGates | None = None


@dataclass(frozen=True)
class ScoringRows:
    """The rows of one forward that belong to one compression.

    first_row: row of the token at position `first_position` in the forward. num_rows: 0 for methods that read no rows.
    slots: [tokens] int64, the rows in the KV pool of all tokens whose K and V are there after this forward's attention; with a base
        (`Compression`), the base's come first.
    last: whether the context is scored to the end, so that tokens are chosen and copied.
    """

    first_row: int
    num_rows: int
    first_position: int
    slots: torch.Tensor
    last: bool

    @property
    def mine(self) -> slice:
        """These rows, among the forward's."""
        return slice(self.first_row, self.first_row + self.num_rows)


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention call in a forward took and gave, row by row.

    q, output: [rows, num_q_heads * head_dim], q after RoPE. lse: [rows, num_q_heads] float32; None where the backend does not give it.
    hidden_states: [rows, hidden_size], what the layer's projections of queries, keys and values took; None where nobody reads them.
    """

    q: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


class Compression:
    """One context's. It lives over the chunks of its prefill, and over all passes of a replay.

    base: where a context is compressed segment by segment, the compressed context of its tokens before the last segment: each head chooses
    among what it kept there and the new tokens, or with `segment_ratios` among these alone. None for a context that is compressed whole.
    kept: what every head keeps, and where; None until the last layer is done.
    """

    def __init__(self, context: Context, base: Context | None = None) -> None:
        self.context = context
        self.base = base
        self._base_kept = None if base is None else base.kept  # the base may be forgotten meanwhile; its slots are locked
        stays = (base.num_tokens, base.num_slots) if base is not None and context.settings.segment_ratios else (0, 0)
        self._part = Part(context, stays)
        self.replay: ReplayPass | None = None
        # By layer id: of the passes before this one, and of this one, for its chunks to come.
        self._earlier: dict[int, torch.Tensor] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._earlier_samples: dict[int, list[SampledQueries]] = {}
        self._samples: dict[int, list[SampledQueries]] = {}
        self.restart_pass()

    def next_pass(self, replay: ReplayPass) -> None:
        """What was scored so far stays; `replay` is read now, after the context."""
        self._earlier = {layer: self._joined(layer, scores) for layer, scores in self._scores.items()}
        for layer, samples in self._samples.items():
            self._earlier_samples.setdefault(layer, []).extend(samples)
        self.replay = replay
        self.restart_pass()

    def restart_pass(self) -> None:
        """Forgets what this pass scored: it was retracted, and is read again."""
        self._scores, self._samples = {}, {}
        self._budget: Budget | None = None
        self._divisions: list[Division] = []
        self.kept: KeptTokens | None = None

    @property
    def _num_divided_heads(self) -> int:
        return sum(len(offsets) - 1 for _, offsets in self._divisions)

    @property
    def reads_queries(self) -> bool:
        """Whether the queries of this pass score."""
        return self.context.settings.own_queries_score or self.replay is not None

    @property
    def reads_rows(self) -> bool:
        """Whether the rows of this pass score: their queries or their hidden states."""
        return self.reads_queries or self.context.settings.reads_hidden_states

    def score(
        self, compressor: Compressor, rows: ScoringRows, layer: RadixAttention, call: AttentionCall | None = None
    ) -> torch.Tensor | None:
        """The scores of this layer's tokens, [num_kv_heads, L] float32, or [1, L] for heads that keep the same ones.

        None before the last chunk: they are kept here. call: None for methods whose scores need no rows. Raises UnsupportedAttention.
        """
        if layer.logit_cap > 0 or layer.is_cross_attention:
            raise UnsupportedAttention
        if self.reads_queries:
            assert call is not None
            scores = self._add(compressor, rows, self._queries(compressor, rows, call, layer), layer)
        elif self.context.settings.reads_hidden_states:
            scores = self._hidden_scores(compressor, rows, call, layer)
        elif self.context.settings.uses_gates:
            scores = self._gate_scores(compressor, rows, layer)
        else:
            seed = int(self.context.id[:8], 16) + layer.layer_id
            method, num_tokens = self.context.settings.method, self.context.num_tokens
            scores = position_scores(method, layer.tp_k_head_num, num_tokens, seed, rows.slots.device)
        if not rows.last:
            self._scores[layer.layer_id] = scores
            return None
        scores = self._joined(layer.layer_id, scores)
        return scores.mean(0, keepdim=True) if self.context.settings.heads == "shared" else scores

    def keep(
        self, compressor: Compressor, rows: ScoringRows, scores: torch.Tensor, layer: RadixAttention, slots: torch.Tensor
    ) -> None:
        """Chooses the tokens that this layer's heads keep, and copies their K and V; some budgets choose with the last layer.

        scores: as `score` gives them. slots: [M] int64, the context's, those of its exact tokens first.
        """
        context, settings, part = self.context, self.context.settings, self._part
        if context.owns_exact:
            exact, pool = slice(context.num_exact), compressor.kv_pool
            for buffer in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)):
                buffer[slots[exact]] = buffer[rows.slots[exact]]
        ranked = rank_positions(
            scores[:, part.before[0] :].expand(layer.tp_k_head_num, -1),
            part.num_slots,
            window=settings.kept_window,
            sink_tokens=part.num_sinks,
            pooling=settings.pooling,
            kernel_size=settings.kernel_size,
            shrink_window=settings.shrinks_window,
        )

        def measure(ranked: torch.Tensor, numbers: list[int]) -> torch.Tensor:
            """The errors [num_kv_heads, len(numbers)] float32 of this layer. ranked: [num_kv_heads, L] float32."""
            return self._measured_errors(compressor, rows, ranked, numbers, layer)

        if self._budget is None:
            base = None if self.base is None or self._base_kept is None else (self.base.num_tokens, self._base_kept)
            num_layers, profile, lanes = compressor.kv_pool.layer_num, compressor.head_profile, compressor.lanes
            self._budget = budget_of(part, base, num_layers=num_layers, head_profile=profile, lanes=lanes)
        division = self._budget.divide(ranked, measure)
        if division is None:
            return
        self._copy(compressor, rows, division, layer, slots)
        self._divisions.append(division)
        if self._num_divided_heads == layer.tp_k_head_num * compressor.kv_pool.layer_num:
            self.kept = self._kept(compressor, slots)

    def _gate_scores(self, compressor: Compressor, rows: ScoringRows, layer: RadixAttention) -> torch.Tensor:
        """The scores [num_kv_heads, L] float32 that gates give this layer's tokens."""
        assert compressor.gates is not None
        pool, layer_id, sources = compressor.kv_pool, layer.layer_id, self._sources(rows)
        keys, values = pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id)
        gates, rotary = compressor.gates, compressor.rotaries[layer_id]
        if len(sources.slots):
            new = compressor.gate_scores(gates, rotary, layer_id, keys, values, sources.slots, sources.first)
        else:  # a context is compressed again, and nothing comes to it
            new = torch.empty(layer.tp_k_head_num, 0, device=rows.slots.device)
        if sources.kept is None or sources.kept_slots is None:
            return new
        if self._part.before[0]:  # they stay
            return torch.nn.functional.pad(new, (sources.first, 0))
        # What the layer's heads have kept, in the order of the cells.
        first_head = (layer_id - pool.start_layer) * len(new)
        bounds, offsets = sources.kept.bounds, sources.kept.offsets[first_head : first_head + len(new) + 1]
        first, last = bounds[first_head], bounds[first_head + len(new)]
        heads = heads_of(offsets, last - first)
        positions = sources.kept.positions[first:last].to(torch.int64)
        if compressor.space is None:  # then all heads keep as many, each in its own layer and lane
            k, v = (each[sources.kept_slots].transpose(0, 1).flatten(0, 1) for each in (keys, values))
        else:
            kept_rows = sources.kept.rows_in(compressor.space, sources.kept_slots, first_head, first_head + len(new))
            k, v = compressor.space.k[kept_rows], compressor.space.v[kept_rows]
        # What a head no longer has ranks below all that it has, whatever that scores.
        new = new.nan_to_num(nan=torch.finfo(torch.float32).min)
        scores = torch.nn.functional.pad(new, (sources.first, 0), value=float("-inf"))
        scores[heads, positions] = gates.cell_scores(layer_id, heads, rotary(k.unsqueeze(1), positions).squeeze(1), v)
        return scores

    def _hidden_scores(
        self, compressor: Compressor, rows: ScoringRows, call: AttentionCall | None, layer: RadixAttention
    ) -> torch.Tensor:
        """The scores [num_kv_heads, L] float32 that hidden gates give this layer's tokens so far; 0 for those to come."""
        assert compressor.hidden_gates is not None and call is not None
        hidden = call.hidden_states
        if not isinstance(hidden, torch.Tensor) or hidden.shape != (len(call.q), compressor.hidden_gates.hidden_size):
            raise UnsupportedAttention
        scores = self._scores_so_far(layer, hidden.device)
        tokens = slice(rows.first_position, rows.first_position + rows.num_rows)
        scores[:, tokens] = compressor.hidden_gates.scores(layer.layer_id, hidden[rows.mine])
        return scores

    def _sources(self, rows: ScoringRows) -> Sources:
        """Where the K and V of the context's tokens lie."""
        if self.base is None:
            return Sources(rows.slots[: self.context.num_tokens])
        num_kept, new = self.base.num_slots, self.context.num_tokens - self.base.num_tokens
        return Sources(rows.slots[num_kept : num_kept + new], self.base.num_tokens, self._base_kept, rows.slots[:num_kept])

    def _queries(
        self,
        compressor: Compressor,
        rows: ScoringRows,
        call: AttentionCall,
        layer: RadixAttention,
    ) -> ScoringQueries:
        """Those of this compression, [num_rows, num_q_heads, head_dim], out of a forward's."""
        settings, mine = self.context.settings, rows.mine
        outputs = call.output.view(-1, layer.tp_q_head_num, layer.v_head_dim)[mine]
        weights = None
        if settings.weighs_queries or settings.measures_errors:
            weights = relative_error_weights(outputs, compressor.head_gains.get(layer.layer_id))
        queries, lse = call.q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)[mine], None if call.lse is None else call.lse[mine]
        return ScoringQueries(queries, rows.first_position, layer.scaling, outputs, lse, weights)

    def _add(self, compressor: Compressor, rows: ScoringRows, queries: ScoringQueries, layer: RadixAttention) -> torch.Tensor:
        """The scores [num_kv_heads, L] float32 of this layer from all queries of this pass so far, these included."""
        context, settings, pool = self.context, self.context.settings, compressor.kv_pool
        scores = self._scores_so_far(layer, queries.q.device)
        if settings.measures_errors:
            self._sample(compressor, rows, queries, layer)
        visible, scored = rows.slots, scores
        if self.replay is not None and (self.replay.is_local or settings.replay_sees_chunk_only):
            # Its queries score the chunk that they repeat. They see it, what is before it, and each other.
            chunk = slice(self.replay.first, self.replay.last)
            num_sinks, first_seen = self.replay.num_sinks, self.replay.first_seen
            if not self.replay.is_local:  # KVzip's queries see all, and share their softmax as if they did not
                num_sinks, first_seen = min(settings.sink_tokens, chunk.start), chunk.start
                queries = replace(queries, lse=None)
            own = visible[self.replay.num_before(context.num_tokens) :]
            visible = torch.cat([visible[:num_sinks], visible[first_seen : chunk.stop], own])
            queries = replace(queries, start=len(visible) - rows.num_rows)
            num_unscored = num_sinks + chunk.start - first_seen
            scored = torch.nn.functional.pad(scored[:, chunk], (num_unscored, 0))
        if not settings.weighs_queries:
            queries = replace(queries, weights=None)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        compressor.accumulate(scored, queries, keys, values, visible, score=settings.score, reduce=settings.reduce)
        if scored is not scores:
            scores[:, chunk] = scored[:, num_unscored:]
        return scores

    def _scores_so_far(self, layer: RadixAttention, device: torch.device) -> torch.Tensor:
        """Taken out of those of this pass: [num_kv_heads, L] float32, 0 in its first chunk."""
        scores = self._scores.pop(layer.layer_id, None)
        if scores is None:
            scores = torch.zeros(layer.tp_k_head_num, self.context.num_tokens, dtype=torch.float32, device=device)
        return scores

    def _sample(self, compressor: Compressor, rows: ScoringRows, queries: ScoringQueries, layer: RadixAttention) -> None:
        """Takes some of a replay's queries, for `_measured_errors`."""
        assert self.replay is not None and queries.weights is not None
        num_before, device = self.replay.num_before(self.context.num_tokens), queries.q.device
        first = rows.first_position - num_before
        chosen = sampled_rows(self.replay.first + first, rows.num_rows, self.context.num_tokens)
        if chosen.start == chosen.stop:
            return
        seen = torch.arange(first + 1, first + rows.num_rows + 1, device=device)[chosen]
        after = rows.slots[num_before:]
        pool = compressor.kv_pool
        keys, values = (get(layer.layer_id)[after] for get in (pool.get_key_buffer, pool.get_value_buffer))
        sample = SampledQueries.take(queries.q[chosen], queries.weights[chosen], keys, values, seen, queries.scale)
        self._samples.setdefault(layer.layer_id, []).append(sample)

    def _measured_errors(
        self, compressor: Compressor, rows: ScoringRows, ranked: torch.Tensor, numbers: list[int], layer: RadixAttention
    ) -> torch.Tensor:
        """What this layer's heads lose for each number of kept tokens, as `pruning_errors`. ranked: [num_kv_heads, L] float32."""
        samples = [*self._earlier_samples.get(layer.layer_id, ()), *self._samples.get(layer.layer_id, ())]
        return pruning_errors(
            SampledQueries.joined(samples),
            comparable(ranked).argsort(dim=-1, descending=True, stable=True),
            numbers,
            compressor.kv_pool.get_key_buffer(layer.layer_id),
            compressor.kv_pool.get_value_buffer(layer.layer_id),
            rows.slots[: self.context.num_tokens],
        )

    def _copy(
        self, compressor: Compressor, rows: ScoringRows, division: Division, layer: RadixAttention, slots: torch.Tensor
    ) -> None:
        """Copies what the next heads keep to the context's slots, after what is there.

        slots: [M] int64, the context's. What stays exact lies in the first of them already.
        """
        positions, offsets = division
        num_exact = self.context.num_exact
        if self.context.is_uneven:
            assert compressor.space is not None
            first_cell = sum(len(each) for each, _ in self._divisions) - num_exact * self._num_divided_heads
            if num_exact:
                positions, offsets = _without_exact(positions, offsets, num_exact)
            copy_cells(
                compressor.space,
                self._sources(rows),
                positions,
                offsets,
                slots[num_exact:],
                first_head=self._num_divided_heads,
                first_cell=first_cell,
            )
            return
        # Each goes to a slot's own layer and lane, where any attention backend finds it.
        pool, positions = compressor.kv_pool, positions.view(layer.tp_k_head_num, -1)[:, num_exact:]
        chosen = self._sources(rows).lane_slots(positions, self._num_divided_heads)
        for buffer in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)):
            copy_tokens(buffer, chosen, slots[num_exact:])

    def _kept(self, compressor: Compressor, slots: torch.Tensor) -> KeptTokens:
        """What all heads keep, once every layer is divided. slots: [M] int64, the context's."""
        kept = replace(KeptTokens.of_layers(self._divisions), num_exact=self.context.num_exact)
        return kept.located(compressor.space, slots) if self.context.is_uneven else kept

    def _joined(self, layer_id: int, scores: torch.Tensor) -> torch.Tensor:
        """A layer's scores of this pass with those of the passes before, [num_kv_heads, L] float32."""
        earlier = self._earlier.get(layer_id)
        if earlier is None:
            return scores
        return torch.maximum(scores, earlier) if self.context.settings.reduce == "max" else scores + earlier


def _without_exact(positions: torch.Tensor, offsets: torch.Tensor, num_exact: int) -> Division:
    """A division without the first num_exact tokens of each head. positions: [kept tokens] int32, offsets: [heads + 1] int64."""
    others = offsets - num_exact * torch.arange(len(offsets), device=offsets.device)
    # The host knows how many are left: nothing waits for the device.
    num_left = len(positions) - num_exact * (len(offsets) - 1)
    heads = heads_of(others, num_left)
    return positions[torch.arange(num_left, device=offsets.device) + (heads + 1) * num_exact], others
