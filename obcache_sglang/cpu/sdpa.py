"""PyTorch's flash attention for CPUs, in the form that also returns each query's log-sum-exp."""

from __future__ import annotations

import torch


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


def causal_attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last tokens of a sequence over all of it, each over what stands before it and itself.

    q: [rows, num_q_heads, head_dim]; k, v: [num_kv_heads, tokens, head_dim], tokens >= rows, dtype of q, any strides.
    Returns the outputs, shaped like q, and their natural log-sum-exps, [rows, num_q_heads] float32.

    What stands before the rows and what is among them are attended apart and merged: without a mask over all tokens this takes
    two thirds of the time.
    """
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads, num_tokens, _ = k.shape
    group, before = num_q_heads // num_kv_heads, num_tokens - rows
    grouped = q.view(rows, num_kv_heads, group, head_dim)

    # Query heads that share a KV head stand in the batch dimension, where K and V repeat without a copy.
    own_k, own_v = (kv[None, :, before:].expand(group, -1, -1, -1) for kv in (k, v))
    output, lse = attention_with_lse(grouped.permute(2, 1, 0, 3), own_k, own_v, scale, is_causal=True)
    output, lse = output.permute(2, 1, 0, 3), lse.permute(2, 1, 0)  # [rows, num_kv_heads, group ...
    if before:
        # Here they are further rows of the KV head's: it is read once for all of them.
        queries = grouped.transpose(0, 1).reshape(1, num_kv_heads, rows * group, head_dim)
        of_prefix, prefix_lse = attention_with_lse(queries, k[None, :, :before], v[None, :, :before], scale)
        of_prefix = of_prefix.view(num_kv_heads, rows, group, head_dim).transpose(0, 1)
        prefix_lse = prefix_lse.view(num_kv_heads, rows, group).transpose(0, 1)
        share = torch.sigmoid(prefix_lse - lse).unsqueeze(-1)
        output = torch.lerp(output.float(), of_prefix.float(), share).to(q.dtype)
        lse = torch.logaddexp(lse, prefix_lse)
    return output.reshape(q.shape), lse.reshape(rows, num_q_heads)
