"""PyTorch's flash attention for CPUs, in the form that also returns each query's log-sum-exp."""

from __future__ import annotations

from functools import lru_cache

import torch

# Rows times tokens up to which one call with a mask takes less time than two without: then the calls are most of it.
_MASKED_PAIRS = 1 << 16


def attention_with_lse(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SDPA on [batch, heads, tokens, head_dim] of one dtype and any strides, and the log-sum-exps.

    mask: added to the scaled logits, in the dtype of the queries or float32; broadcasts to [batch, heads, queries, tokens].
    Returns the output, shaped like the queries, and the natural log-sum-exp of each query, [batch, heads, queries] float32.
    """
    # What scaled_dot_product_attention calls on a CPU; only this form returns the log-sum-exp.
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, is_causal=is_causal, attn_mask=mask, scale=scale
    )
    return output, lse


def merge_attention(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all of what two calls with the same queries attended to.

    output, other: [..., head_dim], any float dtype, and lse, other_lse: [...] float32, their natural log-sum-exps. Returns the
    output, interpolated in float32 and in the dtype of the first, and its log-sum-exps.
    """
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(output.float(), other.float(), share).to(output.dtype), torch.logaddexp(lse, other_lse)


def causal_attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last tokens of a sequence over all of it, each over what stands before it and itself.

    q: [rows, num_q_heads, head_dim]; k, v: [num_kv_heads, tokens, head_dim], tokens >= rows, dtype of q, any strides.
    Returns the outputs, shaped like q, and their natural log-sum-exps, [rows, num_q_heads] float32.

    What stands before the rows and what is among them are attended apart and merged: without a mask over all tokens this takes
    two thirds of the time, unless these are few.
    """
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads, num_tokens, _ = k.shape
    group, before = num_q_heads // num_kv_heads, num_tokens - rows
    grouped = q.view(rows, num_kv_heads, group, head_dim)
    if before and rows * num_tokens <= _MASKED_PAIRS:
        output, lse = attend_as_rows(grouped, k, v, scale, _causal_mask(rows, num_tokens, group))
        return output.reshape(q.shape), lse.reshape(rows, num_q_heads)

    # Query heads that share a KV head stand in the batch dimension, where K and V repeat without a copy.
    own_k, own_v = (kv[None, :, before:].expand(group, -1, -1, -1) for kv in (k, v))
    output, lse = attention_with_lse(grouped.permute(2, 1, 0, 3), own_k, own_v, scale, is_causal=True)
    output, lse = output.permute(2, 1, 0, 3), lse.permute(2, 1, 0)  # [rows, num_kv_heads, group ...
    if before:
        output, lse = merge_attention(output, lse, *attend_as_rows(grouped, k[:, :before], v[:, :before], scale))
    return output.reshape(q.shape), lse.reshape(rows, num_q_heads)


def attend_as_rows(
    grouped: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query heads as further rows of the KV head they share, which is read once for all of them.

    grouped: [rows, num_kv_heads, group, head_dim]; mask: [rows * group, tokens]. Returns outputs like grouped, and log-sum-exps.
    """
    rows, num_kv_heads, group, head_dim = grouped.shape
    queries = grouped.transpose(0, 1).reshape(1, num_kv_heads, rows * group, head_dim)
    output, lse = attention_with_lse(queries, k[None], v[None], scale, mask)
    output = output.view(num_kv_heads, rows, group, head_dim).transpose(0, 1)
    return output, lse.view(num_kv_heads, rows, group).transpose(0, 1)


@lru_cache(maxsize=8)  # all layers of a forward take the same
def _causal_mask(rows: int, num_tokens: int, group: int) -> torch.Tensor:
    """[rows * group, tokens] float32: -inf where one of the last `rows` tokens stands after the query's own."""
    mask = torch.zeros(rows, group, num_tokens)
    unseen = torch.ones(rows, rows, dtype=torch.bool).triu_(diagonal=1)
    mask[:, :, num_tokens - rows :].masked_fill_(unseen.unsqueeze(1), float("-inf"))
    return mask.view(rows * group, num_tokens)
