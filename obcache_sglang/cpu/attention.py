"""Attention on the CPU over SGLang's paged KV pool, with PyTorch's scaled_dot_product_attention.

SGLang's ``torch_native`` pads the queries of an extend batch to the whole sequence, so a question of 64 tokens on a cached
prefix of 4096 costs as much as a prompt of 4160. Here only the new tokens are computed. Three more things are cheaper:
rows of the pool are gathered with index_select, query heads share their KV head's rows without copies of them, and the
lengths are read once for a batch, not once for a layer and request.

Behind a compressed context two more things differ. Its heads may keep different numbers of tokens (`obcache_sglang.kv.cells`): each
is then attended by itself. And requests that decode after the same context read it together, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from obcache_sglang.kv.attention_with_lse import attend_as_rows, attention_with_lse, causal_attention_with_lse, merge_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from obcache_sglang.kv.batch import BatchContexts
    from obcache_sglang.kv.cells import KeptTokens
    from obcache_sglang.kv.context import KeptContext


@dataclass(frozen=True)
class _Sequence:
    """One request of the batch. slots: [sequence length] int32, its rows of the KV pool; num_new: its query rows.

    kept: the kept tokens of the context before it, when its heads keep different numbers of them; suffix_rows, then:
    [KV heads, tokens after the context] int32, rows of those tokens in the first layer of the pool's `KVSpace`.
    """

    slots: torch.Tensor
    num_new: int
    kept: KeptTokens | None = None
    suffix_rows: torch.Tensor | None = None


@dataclass(frozen=True)
class _Readers:
    """The requests of a decode batch that stand after one context: its K and V are read once for all of them.

    rows: [requests] int64, their rows in the batch. kept: as in _Sequence; slots: [M] int32, the context's.
    suffix_slots: [requests, longest suffix] int32, padded with slots of their own; suffix_mask: [requests, 1, 1, longest suffix],
    0 where a token stands and -inf past the end.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    kept: KeptTokens | None
    suffix_slots: torch.Tensor
    suffix_mask: torch.Tensor


class CpuAttentionBackend(TorchNativeAttnBackend):
    """``torch_native`` with decoder self-attention of its own; everything else is inherited.

    Inherited: sliding windows, cross attention, encoders, and K and V of different head dimensions.
    plan: tells which requests stand after a compressed context; None without compression.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._sequences: list[_Sequence | None] = []
        self._readers: list[_Readers] = []
        self.plan: BatchContexts | None = None
        self._dtype = model_runner.dtype

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        # Tensors are on the CPU: tolist() waits for nothing.
        rows = forward_batch.req_pool_indices.tolist()
        lengths = forward_batch.seq_lens.tolist()
        if forward_batch.forward_mode.is_decode_or_idle() or forward_batch.extend_seq_lens is None:
            num_new = [1] * len(rows)
        else:
            num_new = forward_batch.extend_seq_lens.tolist()
        req_to_token = self.req_to_token_pool.req_to_token
        slots = [req_to_token[row, :length] for row, length in zip(rows, lengths, strict=True)]
        contexts = (self.plan and self.plan.contexts(forward_batch)) or [None] * len(rows)
        self._sequences = [self._sequence(*each) for each in zip(slots, num_new, contexts, strict=True)]
        self._readers = []
        if not forward_batch.forward_mode.is_decode():
            return
        together: dict[KeptContext, list[int]] = {}
        for row, context in enumerate(contexts):
            if context is not None:
                together.setdefault(context, []).append(row)
        for context, group in together.items():
            if len(group) > 1:
                self._readers.append(self._group(context, group, [slots[row] for row in group]))
                for row in group:
                    self._sequences[row] = None

    def _sequence(self, slots: torch.Tensor, num_new: int, context: KeptContext | None) -> _Sequence:
        """One request. slots: [tokens] int64, all that it sees; num_new: the last of them, whose queries attend."""
        if context is None or not context.is_uneven:
            return _Sequence(slots, num_new)
        assert self.plan is not None and self.plan.space is not None
        if len(context.kept.positions) == context.num_exact * self.plan.space.num_heads:
            # No head has more of it than what stays exact: ordinary rows, for all heads at once.
            return _Sequence(torch.cat([slots[: context.num_exact], slots[context.num_slots :]]), num_new)
        lanes = torch.arange(self.plan.space.num_kv_heads, dtype=torch.int32)
        return _Sequence(slots, num_new, context.kept, self.plan.space.rows(0, slots[context.num_slots :], lanes[:, None]))

    def _group(self, context: KeptContext, rows: list[int], slots: list[torch.Tensor]) -> _Readers:
        """The readers of one context. rows: theirs in the batch. slots: of each, [tokens] int64, the context's first."""
        suffixes = [each[context.num_slots :] for each in slots]
        longest = max(len(suffix) for suffix in suffixes)
        padded = torch.stack([torch.cat([suffix, suffix[-1:].expand(longest - len(suffix))]) for suffix in suffixes])
        lengths = torch.tensor([len(suffix) for suffix in suffixes])
        mask = torch.zeros(len(rows), 1, 1, longest, dtype=self._dtype)
        mask.masked_fill_(torch.arange(longest) >= lengths[:, None, None, None], float("-inf"))
        kept = context.kept if context.is_uneven else None
        return _Readers(torch.tensor(rows), slots[0][: context.num_slots], kept, padded, mask)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of the new tokens over the cached prefix and themselves.

        q: [new tokens of all requests, query heads * head_dim], after RoPE. k, v: [new tokens, KV heads (*) head_dim],
        written to the pool when save_kv_cache. Returns an array like q.
        """
        if not _is_decoder_self_attention(layer):
            inherited: torch.Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
            return inherited
        self._save(k, v, layer, forward_batch, save_kv_cache)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        outputs = torch.empty_like(queries)
        lse = torch.empty(queries.shape[:2], dtype=torch.float32)
        first_row, group = 0, layer.tp_q_head_num // layer.tp_k_head_num
        for sequence in self._sequences:
            assert sequence is not None
            rows = slice(first_row, first_row + sequence.num_new)
            for kv_heads, keys, values in self._gather(sequence, layer, q.dtype):
                heads = slice(kv_heads.start * group, kv_heads.stop * group)
                outputs[rows, heads], lse[rows, heads] = causal_attention_with_lse(
                    queries[rows, heads], keys[0], values[0], layer.scaling
                )
            first_row = rows.stop
        if self.plan is not None:
            self.plan.row_lse = lse
        return outputs.view_as(q)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of one new token per request; shapes as in `forward_extend`, with one row per request."""
        if not _is_decoder_self_attention(layer):
            output: torch.Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            return output
        self._save(k, v, layer, forward_batch, save_kv_cache)
        # A lone query sees every key, so the query heads of a KV head can stand as its rows.
        queries = q.view(-1, layer.tp_k_head_num, layer.tp_q_head_num // layer.tp_k_head_num, layer.qk_head_dim)
        outputs = torch.empty_like(queries)
        for row, sequence in enumerate(self._sequences):
            if sequence is None:
                continue
            one = slice(row, row + 1)
            for heads, keys, values in self._gather(sequence, layer, q.dtype):
                outputs[one, heads] = scaled_dot_product_attention(queries[one, heads], keys, values, scale=layer.scaling)
        for readers in self._readers:
            outputs[readers.rows] = self._decode_after_context(queries[readers.rows], readers, layer)
        return outputs.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _save(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> None:
        """Writes the new tokens' k and v, [new tokens, KV heads, head_dim] or flat, to the pool."""
        if save_kv_cache and k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)

    def _decode_after_context(self, queries: torch.Tensor, readers: _Readers, layer: RadixAttention) -> torch.Tensor:
        """Attention of one query for each reader over their context and its own suffix, merged by the log-sum-exps.

        queries: [readers, KV heads, group, head_dim]; returns the same shape.
        """
        num_readers = len(queries)
        keys, values = self._gather_slots(readers.suffix_slots.reshape(-1), layer, queries.dtype)
        keys, values = (kv[0].unflatten(1, (num_readers, -1)).transpose(0, 1) for kv in (keys, values))
        output, lse = attention_with_lse(queries, keys, values, layer.scaling, readers.suffix_mask)
        context = _Sequence(readers.slots, 0, readers.kept)
        for heads, keys, values in self._gather(context, layer, queries.dtype):
            if keys.shape[2] == 0:
                continue  # a head that keeps nothing
            of_context = attend_as_rows(queries[:, heads], keys[0], values[0], layer.scaling)
            output[:, heads], _ = merge_attention(output[:, heads], lse[:, heads], *of_context)
        return output

    def _gather_slots(self, slots: torch.Tensor, layer: RadixAttention, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of slots as [1, KV heads, tokens, head_dim], in the queries' dtype."""
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id).index_select(0, slots)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id).index_select(0, slots)
        return keys.to(dtype).transpose(0, 1)[None], values.to(dtype).transpose(0, 1)[None]

    def _gather(
        self, sequence: _Sequence, layer: RadixAttention, dtype: torch.dtype
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """K and V of a sequence for each run of KV heads that have as many tokens: (the heads, K, V).

        K, V: [1, the run's heads, tokens, head_dim], in the queries' dtype.
        """
        if sequence.kept is None:
            yield slice(0, layer.tp_k_head_num), *self._gather_slots(sequence.slots, layer, dtype)
            return
        kept, suffix_rows = sequence.kept, sequence.suffix_rows
        assert self.plan is not None and self.plan.space is not None and kept.rows is not None
        space, num_heads = self.plan.space, layer.tp_k_head_num
        layer_index = layer.layer_id - self.token_to_kv_pool.start_layer
        bounds = kept.bounds[layer_index * num_heads : (layer_index + 1) * num_heads + 1]
        num_suffix = 0
        rows = kept.rows[bounds[0] : bounds[-1]]
        if suffix_rows is not None:
            # One gather for all heads, each head's context and suffix side by side.
            num_suffix = suffix_rows.shape[1]
            suffixes = suffix_rows + layer_index * space.layer_stride * num_heads
            pieces = []
            for head, (first, last) in enumerate(pairwise(bounds)):
                pieces += [kept.rows[first:last], suffixes[head]]
            rows = torch.cat(pieces)
        keys, values = space.k.index_select(0, rows).to(dtype), space.v.index_select(0, rows).to(dtype)
        start = 0
        for head, (first, last) in enumerate(pairwise(bounds)):
            tokens = slice(start, start + last - first + num_suffix)
            yield slice(head, head + 1), keys[None, None, tokens], values[None, None, tokens]
            start = tokens.stop


def _is_decoder_self_attention(layer: RadixAttention) -> bool:
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.sliding_window_size in (None, -1)
        and layer.qk_head_dim == layer.v_head_dim
    )
