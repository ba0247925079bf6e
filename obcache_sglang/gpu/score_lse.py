"""The log-sum-exp of the rows that score, for attention backends that do not give it.

K is read in splits of a fixed number of tokens, so that one long context and few rows fill a GPU, and a row's result does not
depend on the batch it is in.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from obcache_sglang.gpu.paged_contexts import PagedCache, PagedContexts, load_tokens, num_tokens

SPLIT_TOKENS = 1024
"""Tokens that a program reads."""

MAX_REGISTERS = 255
"""Of a thread, by hardware. Told no limit, ptxas may spill a few bytes to fit one more block on an SM."""

_MERGE_BLOCK = 128


def lse_config(head_dim: int, group: int, max_rows: int, element_size: int) -> dict[str, int]:
    """Block sizes and warps of `_split_lse`. group: query heads per KV head; element_size: of q, in bytes."""
    row_bytes = head_dim * element_size
    wide = row_bytes > 256
    return {
        "BLOCK_M": 16 if group * max_rows <= 16 or row_bytes > 512 else 64,
        "BLOCK_N": 32 if wide else 64,
        "num_warps": 4,
        "num_stages": 2 if wide else 3,
        "maxnreg": MAX_REGISTERS,
    }


def row_lse(q: torch.Tensor, cache: PagedCache, contexts: PagedContexts, *, scale: float) -> torch.Tensor:
    """Log-sum-exp, to base 2, of the scaled logits of all rows over the tokens they see; -inf where that is none.

    q: [rows, num_q_heads, head_dim], after RoPE, in the dtype of K, or any float dtype where that is float8.
    Returns [rows, num_q_heads] float32; rows of no context are undefined. Scratch: as many floats per SPLIT_TOKENS tokens of the
    longest context. Nothing waits for the device. Raises ValueError when q and K do not fit together.
    """
    cache.check_queries("q", q)
    num_rows, num_q_heads, head_dim = q.shape
    num_splits = max(triton.cdiv(contexts.max_tokens, SPLIT_TOKENS), 1)
    partial = torch.empty(num_splits, num_rows, num_q_heads, dtype=torch.float32, device=q.device)
    result = torch.empty(num_rows, num_q_heads, dtype=torch.float32, device=q.device)
    group = num_q_heads // cache.num_kv_heads
    config = lse_config(head_dim, group, contexts.max_rows, q.element_size())
    row_blocks = triton.cdiv(contexts.max_rows * group, config["BLOCK_M"])
    if not row_blocks or not contexts.num_contexts:
        return result
    _split_lse[row_blocks, num_splits, cache.num_kv_heads * contexts.num_contexts](
        partial,
        q,
        contexts.q_indptr,
        contexts.starts,
        *cache.kernel_arguments(cache.k),
        contexts.kv_indices,
        contexts.kv_indptr,
        contexts.kv_last_page_len,
        scale * cache.k_factor * math.log2(math.e),
        num_rows,
        cache.num_kv_heads,
        *q.stride()[:2],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        PAGE_SIZE=cache.page_size,
        SPLIT=SPLIT_TOKENS,
        **config,
    )
    _merge_lse[triton.cdiv(result.numel(), _MERGE_BLOCK),](result, partial, result.numel(), num_splits, BLOCK=_MERGE_BLOCK)
    return result


@triton.jit(do_not_specialize=["num_rows", "num_kv_heads"])
def _split_lse(
    partial: tl.tensor,
    q: tl.tensor,
    q_indptr: tl.tensor,
    starts: tl.tensor,
    k_cache: tl.tensor,
    k_page_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    kv_indices: tl.tensor,
    kv_indptr: tl.tensor,
    kv_last_page_len: tl.tensor,
    scale_log2: tl.tensor,
    num_rows: tl.tensor,
    num_kv_heads: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Program (i, s, c * num_kv_heads + h): the i-th queries of head h's group in context c, over the s-th split of its tokens."""
    split = tl.program_id(1)
    context, head = tl.program_id(2) // num_kv_heads, tl.program_id(2) % num_kv_heads
    first_row = tl.load(q_indptr + context)
    num_queries = (tl.load(q_indptr + context + 1) - first_row) * GROUP
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < num_queries:
        is_query = query < num_queries
        position = tl.load(starts + context) + query // GROUP
        row, q_head = (first_row + query // GROUP).to(tl.int64), head * GROUP + query % GROUP
        dims = tl.arange(0, BLOCK_D)
        queries = tl.load(
            q + (row * q_row_stride + q_head * q_head_stride)[:, None] + dims[None, :],
            mask=is_query[:, None] & (dims < HEAD_DIM)[None, :],
            other=0,
        )
        pages = kv_indices + tl.load(kv_indptr + context)
        seen = tl.minimum(num_tokens(kv_indptr, kv_last_page_len, context, PAGE_SIZE), tl.max(position, 0) + 1)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, seen), BLOCK_N):
            token = first + tl.arange(0, BLOCK_N)
            inside = token < seen
            k = load_tokens(
                k_cache,
                pages,
                token,
                inside,
                head,
                k_page_stride,
                k_token_stride,
                k_head_stride,
                queries.dtype,
                HEAD_DIM,
                BLOCK_D,
                PAGE_SIZE,
            )
            logits = tl.dot(queries, k.T, input_precision="tf32x3") * scale_log2
            visible = inside[None, :] & (token[None, :] <= position[:, None])
            logits = tl.where(visible, logits, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(logits, 1))
            # A query that has seen nothing yet has no highest logit: inf - inf would be NaN.
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
            highest = new_highest
        out = (split.to(tl.int64) * num_rows + row) * (num_kv_heads * GROUP) + q_head
        tl.store(partial + out, highest + tl.log2(total), mask=is_query)


@triton.jit(do_not_specialize=["size", "num_splits"])
def _merge_lse(result: tl.tensor, partial: tl.tensor, size: tl.tensor, num_splits: tl.tensor, BLOCK: tl.constexpr) -> None:
    """result [size] from partial [num_splits, size], BLOCK elements a program."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    source = partial + element
    for _ in range(num_splits):
        lse = tl.load(source, mask=element < size, other=float("-inf"))
        source += size
        new_highest = tl.maximum(highest, lse)
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        total = total * tl.exp2(highest - base) + tl.exp2(lse - base)
        highest = new_highest
    tl.store(result + element, highest + tl.log2(total), mask=element < size)
