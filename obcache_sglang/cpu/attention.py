"""Attention on the CPU over SGLang's paged KV pool, with PyTorch's scaled_dot_product_attention.

SGLang's ``torch_native`` pads the queries of an extend batch to the whole sequence, so a question of 64 tokens on a cached
prefix of 4096 costs as much as a prompt of 4160. Here only the new tokens are computed. Three more things are cheaper:
rows of the pool are gathered with index_select, query heads share their KV head's rows without copies of them, and the
lengths are read once for a batch, not once for a layer and request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

# New tokens of a request with a cached prefix are attended in blocks of this many: a block sees no key behind its last
# query, which skips the masked half, and bounds the mask. Smaller blocks keep SDPA from using its threads well.
QUERY_BLOCK = 256


@dataclass(frozen=True)
class _Sequence:
    """One request of the batch. slots: [sequence length] int32, its rows of the KV pool; num_new: its query rows."""

    slots: torch.Tensor
    num_new: int


class CpuAttentionBackend(TorchNativeAttnBackend):
    """``torch_native`` with decoder self-attention of its own; everything else is inherited.

    Inherited: sliding windows, cross attention, encoders, and K and V of different head dimensions.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._sequences: list[_Sequence] = []
        self._mask = _LowerRightCausalMask(model_runner.dtype)

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
        self._sequences = [
            _Sequence(req_to_token[row, :length], new) for row, length, new in zip(rows, lengths, num_new, strict=True)
        ]

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
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        # [1, heads, tokens, head_dim] views, as SDPA takes them.
        queries = q.view(1, -1, layer.tp_q_head_num, layer.qk_head_dim).transpose(1, 2)
        output = torch.empty_like(q)
        outputs = output.view(1, -1, layer.tp_q_head_num, layer.v_head_dim).transpose(1, 2)
        first_row = 0
        for sequence in self._sequences:
            keys, values = self._gather(sequence, layer, q.dtype)
            rows = slice(first_row, first_row + sequence.num_new)
            self._extend_one(queries[:, :, rows], keys, values, layer.scaling, outputs[:, :, rows])
            first_row = rows.stop
        return output

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of one new token per request; shapes as in forward_extend with one row per request."""
        if not _is_decoder_self_attention(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        # A lone query sees every key, so the query heads of a KV head can stand as its rows.
        queries = q.view(-1, layer.tp_k_head_num, layer.tp_q_head_num // layer.tp_k_head_num, layer.qk_head_dim)
        outputs = torch.empty_like(queries)
        for row, sequence in enumerate(self._sequences):
            keys, values = self._gather(sequence, layer, q.dtype)
            outputs[row] = scaled_dot_product_attention(queries[row : row + 1], keys, values, scale=layer.scaling)[0]
        return outputs.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _save(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> None:
        if save_kv_cache and k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)

    def _gather(self, sequence: _Sequence, layer: RadixAttention, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a sequence as [1, KV heads, tokens, head_dim], in the queries' dtype."""
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id).index_select(0, sequence.slots)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id).index_select(0, sequence.slots)
        return keys.to(dtype).transpose(0, 1)[None], values.to(dtype).transpose(0, 1)[None]

    def _extend_one(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, output: torch.Tensor
    ) -> None:
        """One request: queries [1, heads, n, head_dim] are the last n of the sequence's positions; writes `output`."""
        num_new, length = queries.shape[2], keys.shape[2]
        if num_new == length:
            output.copy_(scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True))
            return
        for start in range(0, num_new, QUERY_BLOCK):
            rows = slice(start, min(start + QUERY_BLOCK, num_new))
            visible = length - num_new + rows.stop
            output[:, :, rows] = scaled_dot_product_attention(
                queries[:, :, rows],
                keys[:, :, :visible],
                values[:, :, :visible],
                attn_mask=self._mask.view(rows.stop - start, visible),
                scale=scale,
                enable_gqa=True,
            )


def _is_decoder_self_attention(layer: RadixAttention) -> bool:
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.sliding_window_size in (None, -1)
        and layer.qk_head_dim == layer.v_head_dim
    )


class _LowerRightCausalMask:
    """Additive masks in which the last row sees every column, the row above it one less, and so on.

    All are views of one buffer: `QUERY_BLOCK` columns of a triangle, behind as many columns of zeros as were ever needed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._triangle = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=dtype).triu(1)
        self._buffer = self._triangle

    def view(self, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] with 0 where seen and -inf elsewhere; rows <= QUERY_BLOCK and rows <= columns."""
        before = self._buffer.shape[1] - QUERY_BLOCK
        if before < columns - rows:
            # Doubled, so that a prefix that grows from batch to batch does not rebuild it each time.
            before = max(columns - rows, 2 * before)
            self._buffer = torch.cat([self._triangle.new_zeros(QUERY_BLOCK, before), self._triangle], dim=1)
        first = before - (columns - rows)
        return self._buffer[:rows, first : before + rows]
