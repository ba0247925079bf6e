"""Token scores from the queries of an observation window, in plain torch on any device.

The formulas are those of :mod:`obcache_sglang.scoring.reference` (OBCache, arXiv 2510.07651), rearranged so that a score
costs two matrix products over ``[queries, tokens]`` and no ``[queries, tokens, head_dim]`` tensor. With
``a = A_ij`` and ``b = A_ij z_ij``, the summand of query i for token j is

    attention    a
    obcache-v    a^2 ||v_j||^2
    obcache-k    ||b (v_j - o_i)||^2       = b^2 ||v_j||^2 + b^2 ||o_i||^2 - 2 b^2 v_j.o_i
    obcache-kv   ||a v_j + b (v_j - o_i)||^2 = (a+b)^2 ||v_j||^2 + b^2 ||o_i||^2 - 2 (a+b) b v_j.o_i

and the sum over i of ``w_ij v_j.o_i`` is ``v_j . (w^T o)_j``, one more matrix product.

On a CPU the first two need no weights in memory at all. With l_i the log-sum-exp of query i, ``A_ij^p = exp(p z_ij - p l_i)``: the
logarithm of its sum over i is the log-sum-exp of an attention in which tokens look at queries. PyTorch's flash attention
returns that. And the largest ``A_ij`` is ``exp(max_i z_ij - l_i)``.
"""

from typing import Any

import torch

from obcache_sglang.config import SCORES
from obcache_sglang.cpu.sdpa import attention_with_lse, causal_attention_with_lse

# Logit of a token the query cannot see. Finite, so that A z is 0 there (0 * -inf would be NaN), and low enough that
# its softmax weight is exactly 0 in float32.
_MASKED_LOGIT = -1e30

# Of a tile of weights: small enough for a core's own cache, large enough for matrix products. Rows are an odd number of cache lines,
# else they fall into the same few cache sets.
_TILE_QUERIES, _TILE_TOKENS = 384, 496

# Queries score each other in blocks of this many: what a block's tokens cannot see is masked inside it, and left out behind it.
_OWN_BLOCK = 256


def accumulate_scores(
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    start: int,
    scale: float,
    score: str,
    o: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    reduce: str = "sum",
) -> None:
    """Add the scores that the queries at positions ``start .. start + rows - 1`` give to the tokens they see.

    scores: [num_kv_heads, context_len] float32; changed in place. The first context_len tokens are scored, however many more
        the queries see; where they see fewer, the scores of the others stay.
    q: [rows, num_q_heads, head_dim], any float dtype, after RoPE.
    k, v: [start + rows, num_kv_heads, head_dim], any float dtype and strides: the tokens at positions
        ``0 .. start + rows - 1``, keys after RoPE. Attention is causal: the query at position p sees tokens 0 .. p.
    scale: factor of the logits ``q.k``, usually ``head_dim ** -0.5``.
    score: one of ``config.SCORES``.
    o: [rows, num_q_heads, head_dim], any float dtype: the attention outputs of these queries, if the caller has them. Only
        obcache-k and obcache-kv read them.
    lse: [rows, num_q_heads] float32: the natural log-sum-exps of these queries' logits, if the caller has them. Without them, or
        without outputs that are read, the attention of these queries is computed again.
    reduce: "sum" adds to each token the sum of its scores over queries, averaged over the query heads that share its KV head
        (GQA); "max" leaves it the largest of its scores from any query and query head, and of what it had (KVzip's statistic,
        arXiv 2505.23416; score "attention" only).

    Every query's contribution is complete, so a window that spans prefill chunks is one call per chunk. The inputs are
    read only and computed with in float32.

    Scratch, whatever the number of queries: float32 copies of one KV head's scored K and V, and three tiles (of 190,464 float32). Sums
    of attention and obcache-v on a CPU instead: about as much as k, q and two blocks of ``num_q_heads * 2**16`` float32. Where
    attention is computed again: two to three times q, in float32 for scores that read outputs, and then k and v in float32 too;
    on other devices than CPUs twice [rows, start + rows] float32.

    Raises ValueError when score or reduce is unknown or the shapes do not fit together.
    """
    rows, num_q_heads, head_dim = q.shape
    num_tokens, num_kv_heads, _ = k.shape
    check_statistic(score, reduce)
    if v.shape != k.shape or k.shape[2] != head_dim or num_q_heads % num_kv_heads or num_tokens != start + rows:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} and start={start} do not fit: k and v need shape "
            "[start + rows, num_kv_heads, head_dim], and num_q_heads must be a multiple of num_kv_heads"
        )
    if o is not None and o.shape != q.shape:
        raise ValueError(f"o {list(o.shape)} must have the shape of q, {list(q.shape)}")
    if scores.dtype != torch.float32 or scores.shape[0] != num_kv_heads:
        raise ValueError(f"scores is {list(scores.shape)} {scores.dtype}; it must be float32 [{num_kv_heads}, tokens]")

    if lse is not None and (lse.dtype != torch.float32 or lse.shape != q.shape[:2]):
        raise ValueError(f"lse is {list(lse.shape)} {lse.dtype}; it must be float32 {list(q.shape[:2])}")

    if not needs_outputs(score):
        o = None
    if needs_outputs(score) and o is None:
        # In float32: where o_i is near v_j, a score is a small difference of large terms.
        o, lse = _attend(q.float(), k.float(), v.float(), start, scale)
    elif lse is None:
        lse = _attend(q, k, v, start, scale)[1]
    if _has_flash_attention(q) and reduce == "sum" and o is None:
        _accumulate_weight_sums(scores, q, k, v, start, scale, score, lse)
    else:
        _accumulate_tiles(scores, q, k, v, start, scale, score, o, lse, reduce)


def _has_flash_attention(tensor: torch.Tensor) -> bool:
    """Whether `obcache_sglang.cpu.sdpa` runs on the tensor's device."""
    return tensor.device.type == "cpu"


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and natural log-sum-exps of causal attention; arguments as of `accumulate_scores`."""
    q, k, v = _in_one_dtype(q, k, v)
    if _has_flash_attention(q):
        return causal_attention_with_lse(q, k.transpose(0, 1), v.transpose(0, 1), scale)
    outputs, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    group = q.shape[1] // k.shape[1]
    unseen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu_(diagonal=start + 1)
    for head in range(q.shape[1]):
        logits = (q[:, head].float() @ k[:, head // group].float().T).mul_(scale).masked_fill_(unseen, float("-inf"))
        lse[:, head] = logits.logsumexp(-1)
        outputs[:, head] = logits.softmax(-1) @ v[:, head // group].float()
    return outputs, lse


def _accumulate_weight_sums(
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    scale: float,
    score: str,
    lse: torch.Tensor,
) -> None:
    """Sums of attention and obcache-v by PyTorch's flash attention for CPUs."""
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads, scored = k.shape[1], min(k.shape[0], scores.shape[1])
    group, power = num_q_heads // num_kv_heads, 1 if score == "attention" else 2
    q, k = _in_one_dtype(q, k)
    keys = k.transpose(0, 1)
    # Queries as the keys of their KV head's tokens: [num_kv_heads, rows * group ...
    queries = q.reshape(rows, num_kv_heads, group, head_dim).transpose(0, 1).reshape(1, num_kv_heads, rows * group, head_dim)
    bias = lse.view(rows, num_kv_heads, group).transpose(0, 1).reshape(1, num_kv_heads, 1, rows * group) * -power
    sums = torch.zeros(num_kv_heads, scored, dtype=torch.float32)

    def add(tokens: slice, first_row: int, last_row: int, mask: torch.Tensor | None = None) -> None:
        if tokens.start == tokens.stop or first_row == last_row:
            return
        seen_by = slice(first_row * group, last_row * group)
        added = bias[..., seen_by] if mask is None else bias[..., seen_by] + mask
        added = added.expand(-1, -1, tokens.stop - tokens.start, -1)
        rows_of = queries[:, :, seen_by]
        sums[:, tokens] += attention_with_lse(keys[None, :, tokens], rows_of, rows_of, power * scale, added)[1][0].exp_()

    add(slice(0, min(start, scored)), 0, rows)
    for first in range(0, scored - start, _OWN_BLOCK):
        last = min(first + _OWN_BLOCK, rows)
        tokens = slice(start + first, min(start + last, scored))
        unseen = torch.ones(tokens.stop - tokens.start, last - first, dtype=torch.bool).tril_(diagonal=-1)
        mask = torch.zeros(unseen.shape).masked_fill_(unseen, float("-inf")).repeat_interleave(group, dim=1)
        add(tokens, first, last, mask)
        add(tokens, last, rows)
    if score == "obcache-v":
        sums *= torch.linalg.vector_norm(v[:scored], dim=-1, dtype=torch.float32).square_().T
    scores[:, :scored].add_(sums, alpha=1.0 / group)


def _in_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as they are, in float32 where their dtypes differ."""
    return tensors if len({each.dtype for each in tensors}) == 1 else tuple(each.float() for each in tensors)


def _accumulate_tiles(
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    scale: float,
    score: str,
    o: torch.Tensor | None,
    lse: torch.Tensor,
    reduce: str,
) -> None:
    """Any statistic, from tiles of attention weights."""
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads, scored = k.shape[1], min(k.shape[0], scores.shape[1])
    group = num_q_heads // num_kv_heads
    tile_rows = min(rows, max(1, _TILE_QUERIES // group))
    buffers = torch.empty(3, tile_rows * group * _TILE_TOKENS, dtype=torch.float32, device=q.device)
    for head in range(num_kv_heads):
        heads = slice(head * group, (head + 1) * group)
        k_head, v_head = k[:scored, head].float(), v[:scored, head].float()
        v_sq = v_head.square().sum(1)
        total = torch.full_like(v_sq, float("-inf") if reduce == "max" else 0.0)
        for first in range(0, rows, tile_rows):
            last = min(rows, first + tile_rows)
            num_queries, seen = (last - first) * group, min(start + last, scored)
            queries = q[first:last, heads].float().mul(scale).reshape(num_queries, head_dim)
            row_lse = lse[first:last, heads].reshape(num_queries, 1)
            outputs = None if o is None else o[first:last, heads].float().reshape(num_queries, head_dim)
            positions = torch.arange(start + first, start + last, device=q.device)
            for begin in range(0, seen, _TILE_TOKENS):
                tokens = slice(begin, min(begin + _TILE_TOKENS, seen))
                tile = buffers[:, : num_queries * (tokens.stop - begin)].view(3, num_queries, -1)
                logits = torch.mm(queries, k_head[tokens].T, out=tile[0])
                if tokens.stop > start + first + 1:
                    unseen = torch.arange(begin, tokens.stop, device=q.device) > positions[:, None]
                    logits.view(last - first, group, -1).masked_fill_(unseen.unsqueeze(1), _MASKED_LOGIT)
                if reduce == "max":
                    torch.maximum(total[tokens], logits.sub_(row_lse).amax(0), out=total[tokens])
                else:
                    total[tokens] += _tile_scores(tile, row_lse, v_head[tokens].T, v_sq[tokens], outputs, score)
        if reduce == "max":
            torch.maximum(scores[head, :scored], total.exp_(), out=scores[head, :scored])
        else:
            scores[head, :scored].add_(total, alpha=1.0 / group)


def _tile_scores(
    tile: torch.Tensor, lse: torch.Tensor, v: torch.Tensor, v_sq: torch.Tensor, o: torch.Tensor | None, score: str
) -> torch.Tensor:
    """Scores [tokens] of a tile, summed over its queries.

    tile: [3, queries, tokens], the first the logits, the others scratch; all are overwritten. lse: [queries, 1]. v: [head_dim,
    tokens]; v_sq: [tokens]. o: [queries, head_dim], for the scores whose formula has it.
    """
    logits, weights, product = tile
    torch.sub(logits, lse, out=weights).exp_()
    if score == "attention":
        return weights.sum(0)
    if score == "obcache-v":
        return weights.square_().sum(0).mul_(v_sq)
    assert o is not None
    o_sq = o.square().sum(1, keepdim=True)
    b = logits.mul_(weights)
    if score == "obcache-k":
        # One product for all three sums over queries.
        w_vo, w_oo, w_vv = torch.cat([o, o_sq, torch.ones_like(o_sq)], 1).T.mm(b.square_()).split([len(v), 1, 1])
    else:
        a_plus_b = weights.add_(b)
        w_vo = o.T @ torch.mul(a_plus_b, b, out=product)
        w_oo, w_vv = o_sq.T @ b.square_(), a_plus_b.square_().sum(0)
    return (w_vv * v_sq + w_oo).sub_((w_vo * v).sum(0), alpha=2).view(-1)


def needs_outputs(score: str) -> bool:
    """Whether the formula of a score contains the attention outputs."""
    return score in ("obcache-k", "obcache-kv")


def check_statistic(score: str, reduce: str) -> None:
    """Raises ValueError when there is no such score, or it cannot be reduced so over queries."""
    if score not in SCORES:
        raise ValueError(f"score {score!r} is unknown; choose one of {', '.join(SCORES)}")
    if reduce not in ("sum", "max") or (reduce == "max" and score != "attention"):
        raise ValueError(f"reduce {reduce!r} of score {score!r} is unknown; choose sum, or max with attention")


def accumulate_scores_in_slots(
    scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, **arguments: Any
) -> None:
    """As `accumulate_scores`, of tokens in a pool.

    k, v: [pool slots, num_kv_heads, head_dim]; slots: [start + rows] int32 or int64, where the tokens lie. `arguments` and errors
    are those of `accumulate_scores`.
    """
    accumulate_scores(scores, q, k.index_select(0, slots), v.index_select(0, slots), **arguments)
