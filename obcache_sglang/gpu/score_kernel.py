"""Token scores on GPUs: the formulas of :mod:`obcache_sglang.compress.scores`, on K and V where they lie in a paged pool.

A program owns a block of positions of one KV head of one context. It goes through all queries that share the head, with two
matrix products per block of them, and holds what the scores need of the others: sums over queries, and the [positions, head_dim]
accumulator of ``w^T o``. So K and V are read once, nothing of size [queries, tokens] is ever in memory, and as no two programs
write the same score, results do not depend on their order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from obcache_sglang.compress.scores import ScoringQueries, check_row_heads, check_statistic, weighted_lse
from obcache_sglang.gpu.paged_contexts import PagedCache, PagedContexts, load_tokens, num_tokens
from obcache_sglang.gpu.score_lse import MAX_REGISTERS, row_lse

# Multiplied with this, a log-sum-exp becomes one to base 2.
LSE_BASES = {"2": 1.0, "e": math.log2(math.e)}


def needs_outputs(score: str) -> bool:
    """Whether the formula of a score contains the attention outputs."""
    return score in ("obcache-k", "obcache-kv")


def score_config(head_dim: int, group: int, max_rows: int, element_size: int) -> dict[str, int]:
    """Block sizes and warps of `_score_tokens`. group: query heads per KV head; element_size: of q, in bytes.

    q and o are read again by each block of positions: large blocks, as far as registers reach (`gpu.kernel_report`), and shared
    memory does (float32 beyond head_dim 128).
    """
    row_bytes = head_dim * element_size
    return {
        "BLOCK_M": 16 if group * max_rows <= 16 or group == 1 or row_bytes > 512 else 32,
        "BLOCK_N": 128 if row_bytes <= 256 else 64 if row_bytes <= 512 else 16,
        "num_warps": 8,
        "num_stages": 2,
        "maxnreg": MAX_REGISTERS,
    }


def score_tokens_paged(
    scores: torch.Tensor,
    q: torch.Tensor,
    cache: PagedCache,
    contexts: PagedContexts,
    *,
    scale: float,
    score: str,
    o: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: str = "2",
    query_weights: torch.Tensor | None = None,
    reduce: str = "sum",
    accumulate: bool = False,
) -> None:
    """Scores the tokens of several contexts, each from its own query rows, in one launch.

    scores: [num_kv_heads, score_indptr[C]] float32, any strides but of the last dimension, which is contiguous; the scores of
        context c are at score_indptr[c] ... score_indptr[c + 1] - 1. All of these are written, 0 where no row sees the token.
    q: [rows, num_q_heads, head_dim], after RoPE; float32, float16 or bfloat16, the dtype of K unless that is float8. The last
        dimension is contiguous.
    scale: factor of the logits ``q.k``, usually ``head_dim ** -0.5``; without cache.k_scale.
    score: one of ``config.SCORES``.
    o: shape and dtype of q: the attention outputs of these rows. Needed by obcache-k and obcache-kv, not read otherwise.
    lse: [rows, num_q_heads] float32, any strides: the log-sum-exp of the rows' scaled logits, to base lse_base: "2" as from
        FlashInfer, "e" as from SGLang's Triton kernels and FlashAttention. Without it K is read once more (`row_lse`).
    query_weights: [rows, num_q_heads] float32, positive: what each query's scores are multiplied with; None for 1. For the obcache
        scores.
    reduce: "sum": summed over rows, averaged over the query heads of a KV head; "max" (score "attention"): the largest of all.
    accumulate: whether scores are added to what is there (reduce "max": are the larger of both), or overwrite it.

    Computed with in float32, with matrix products on tensor cores: exact products of 16-bit inputs, TF32 in three passes for
    float32. Weights are rounded to bfloat16 where they meet 16-bit outputs, as are float16 outputs: an error of about 2**-9 of a
    score.
    Nothing waits for the device; results are the same in each run. Raises ValueError when arguments do not fit together.
    """
    check_statistic(score, reduce, weighted=query_weights is not None)
    if lse_base not in LSE_BASES:
        raise ValueError(f"lse_base {lse_base!r} is unknown; choose one of {', '.join(LSE_BASES)}")
    cache.check_queries("q", q)
    _, num_q_heads, head_dim = q.shape
    if scores.dtype != torch.float32 or scores.dim() != 2 or scores.shape[0] != cache.num_kv_heads or scores.stride(1) != 1:
        raise ValueError(f"scores is {list(scores.shape)} {scores.dtype}; it must be float32 [{cache.num_kv_heads}, positions]")
    check_row_heads("lse", lse, q)
    check_row_heads("query_weights", query_weights, q)
    if lse is None:
        lse, lse_base = row_lse(q, cache, contexts, scale=scale), "2"
    lse = weighted_lse(lse, query_weights, lse_base)
    o_sq = None
    if not needs_outputs(score):
        o = None
    elif o is None:
        raise ValueError(f"score {score!r} needs the attention outputs o")
    elif o.shape != q.shape or o.dtype != q.dtype or o.stride(2) != 1:
        raise ValueError(f"o is {list(o.shape)} {o.dtype}; it must be {q.dtype} {list(q.shape)}, the last dimension contiguous")
    else:
        # Weights are squared: far beyond the range of float16.
        o = o.to(torch.bfloat16) if o.dtype == torch.float16 else o
        o_sq = torch.linalg.vector_norm(o, dim=-1, dtype=torch.float32).square_()
    if not contexts.num_contexts or not contexts.max_scored:
        return
    group = num_q_heads // cache.num_kv_heads
    config = score_config(head_dim, group, contexts.max_rows, q.element_size())
    _score_tokens[triton.cdiv(contexts.max_scored, config["BLOCK_N"]), cache.num_kv_heads, contexts.num_contexts](
        scores,
        contexts.score_indptr,
        q,
        o,
        o_sq,
        lse,
        contexts.q_indptr,
        contexts.starts,
        *cache.kernel_arguments(cache.k),
        *cache.kernel_arguments(cache.v),
        contexts.kv_indices,
        contexts.kv_indptr,
        contexts.kv_last_page_len,
        scale * cache.k_factor * LSE_BASES["e"],
        cache.v_factor,
        LSE_BASES[lse_base],
        scores.stride(0),
        *q.stride()[:2],
        *(q if o is None else o).stride()[:2],
        *lse.stride(),
        int(accumulate),
        SCORE=score,
        MAX=reduce == "max",
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        PAGE_SIZE=cache.page_size,
        **config,
    )


def accumulate_scores_paged(
    scores: torch.Tensor,
    queries: ScoringQueries,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    *,
    score: str,
    reduce: str = "sum",
) -> None:
    """`compress.scores.accumulate_scores_in_slots`, by the kernel: with the dtypes of `score_tokens_paged`.

    k, v: [pool slots, num_kv_heads, head_dim], the pool's; slots: [start + rows] int32 or int64: where the tokens at positions
    ``0 .. start + rows - 1`` lie. obcache-k and obcache-kv need the queries' o. Raises ValueError when arguments do not fit together.
    """
    q, start = queries.q, queries.start
    if len(slots) != start + len(q):
        raise ValueError(f"{len(slots)} slots, {len(q)} rows and start={start} do not fit: there must be start + rows slots")
    score_tokens_paged(
        scores,
        q,
        PagedCache.of_slots(k, v),
        PagedContexts.one(slots, rows=len(q), start=start, num_scored=scores.shape[1]),
        scale=queries.scale,
        score=score,
        o=queries.o,
        lse=queries.lse,
        lse_base="e",
        query_weights=queries.weights,
        reduce=reduce,
        accumulate=True,
    )


# What varies from launch to launch is compiled once for all of its values, not again for 1 and multiples of 16.
@triton.jit(do_not_specialize=["scores_stride", "lse_row_stride", "lse_head_stride", "accumulate"])
def _score_tokens(
    scores: tl.tensor,
    score_indptr: tl.tensor,
    q: tl.tensor,
    o: tl.tensor,
    o_sq: tl.tensor,
    lse: tl.tensor,
    q_indptr: tl.tensor,
    starts: tl.tensor,
    k_cache: tl.tensor,
    k_page_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_cache: tl.tensor,
    v_page_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    kv_indices: tl.tensor,
    kv_indptr: tl.tensor,
    kv_last_page_len: tl.tensor,
    scale_log2: tl.tensor,
    v_factor: tl.tensor,
    lse_factor: tl.tensor,
    scores_stride: tl.tensor,
    q_row_stride: tl.tensor,
    q_head_stride: tl.tensor,
    o_row_stride: tl.tensor,
    o_head_stride: tl.tensor,
    lse_row_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    accumulate: tl.tensor,
    SCORE: tl.constexpr,
    MAX: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Program (i, h, c): the i-th BLOCK_N positions of KV head h of context c."""
    LN2: tl.constexpr = 0.6931471805599453
    head, context = tl.program_id(1), tl.program_id(2)
    first_score = tl.load(score_indptr + context)
    num_scored = tl.load(score_indptr + context + 1) - first_score
    first = tl.program_id(0) * BLOCK_N
    if first < num_scored:
        first_row = tl.load(q_indptr + context)
        num_rows = tl.load(q_indptr + context + 1) - first_row
        start = tl.load(starts + context)
        pages = kv_indices + tl.load(kv_indptr + context)
        position = first + tl.arange(0, BLOCK_N)
        # Seen by a row, and scored.
        seen = tl.minimum(num_tokens(kv_indptr, kv_last_page_len, context, PAGE_SIZE), start + num_rows)
        inside = position < tl.minimum(seen, num_scored)
        dims = tl.arange(0, BLOCK_D)
        in_dim = dims < HEAD_DIM
        k = load_tokens(
            k_cache,
            pages,
            position,
            inside,
            head,
            k_page_stride,
            k_token_stride,
            k_head_stride,
            q.dtype.element_ty,
            HEAD_DIM,
            BLOCK_D,
            PAGE_SIZE,
        )
        # The score of a token is w_vv ||v||^2 + w_oo - 2 v.w_vo, or w_vv alone.
        w_vv = tl.zeros([BLOCK_N], tl.float32)
        w_oo = tl.zeros([BLOCK_N], tl.float32)
        w_vo = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

        num_queries = num_rows * GROUP
        # The first that sees this block, at a multiple of BLOCK_M.
        first_query = tl.maximum(first - start, 0) * GROUP // BLOCK_M * BLOCK_M
        for block in range(first_query, num_queries, BLOCK_M):
            query = block + tl.arange(0, BLOCK_M)
            is_query = query < num_queries
            row, q_head = (first_row + query // GROUP).to(tl.int64), head * GROUP + query % GROUP
            q_mask = is_query[:, None] & in_dim[None, :]
            q_block = tl.load(q + (row * q_row_stride + q_head * q_head_stride)[:, None] + dims[None, :], mask=q_mask, other=0)
            # Where there is no query, weights are exp2(-inf).
            row_lse = tl.load(lse + row * lse_row_stride + q_head * lse_head_stride, mask=is_query, other=float("inf"))
            logits = tl.dot(k, q_block.T, input_precision="tf32x3") * scale_log2
            visible = position[:, None] <= (start + query // GROUP)[None, :]
            a = tl.where(visible, tl.exp2(logits - (row_lse * lse_factor)[None, :]), 0.0)
            if SCORE == "attention":
                if MAX:
                    w_vv = tl.maximum(w_vv, tl.max(a, 1))
                else:
                    w_vv += tl.sum(a, 1)
            elif SCORE == "obcache-v":
                w_vv += tl.sum(a * a, 1)
            else:
                o_block = tl.load(
                    o + (row * o_row_stride + q_head * o_head_stride)[:, None] + dims[None, :], mask=q_mask, other=0
                )
                o_sq_block = tl.load(o_sq + row * (tl.num_programs(1) * GROUP) + q_head, mask=is_query, other=0)
                b = a * (logits * LN2)
                # The tensor cores take the weight of v.o rounded. The score of a token with v near o is the small
                # difference of large terms: it comes out right if the same is added to the weights of ||v||^2 and ||o||^2,
                # so that the error is the rounding times ||v - o||^2.
                if SCORE == "obcache-k":
                    w = (b * b).to(o_block.dtype)
                    w_vv_block = w.to(tl.float32)
                    w_oo_block = w_vv_block
                else:
                    exact = (a + b) * b
                    w = exact.to(o_block.dtype)
                    error = w.to(tl.float32) - exact
                    w_vv_block = (a + b) * (a + b) + error
                    w_oo_block = b * b + error
                w_vv += tl.sum(w_vv_block, 1)
                w_oo += tl.sum(w_oo_block * o_sq_block[None, :], 1)
                w_vo = tl.dot(w, o_block, w_vo, input_precision="tf32x3")

        if SCORE == "attention":
            result = w_vv
        else:
            v = load_tokens(
                v_cache,
                pages,
                position,
                inside,
                head,
                v_page_stride,
                v_token_stride,
                v_head_stride,
                tl.float32,
                HEAD_DIM,
                BLOCK_D,
                PAGE_SIZE,
            )
            v *= v_factor
            result = w_vv * tl.sum(v * v, 1)
            if SCORE != "obcache-v":
                result += w_oo - 2 * tl.sum(v * w_vo, 1)
        result = tl.where(inside, result, 0.0)
        out = scores + head.to(tl.int64) * scores_stride + first_score + position
        is_scored = position < num_scored
        before = tl.load(out, mask=is_scored & (accumulate != 0), other=0)
        if MAX:
            result = tl.maximum(result, before)
        else:
            result = result / GROUP + before
        tl.store(out, result, mask=is_scored)
