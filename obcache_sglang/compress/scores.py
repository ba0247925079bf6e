"""Token scores from the queries of an observation window, in plain torch on any device.

The formulas are those of :mod:`obcache_sglang.compress.reference` (OBCache, arXiv 2510.07651), rearranged so that a score
costs three passes of matrix products over ``[queries, tokens]`` and no ``[queries, tokens, head_dim]`` tensor. With
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

from dataclasses import dataclass, replace

import torch

from obcache_sglang.kv.attention_with_lse import attention_with_lse, causal_attention_with_lse
from obcache_sglang.settings import SCORES

# Logit of a token the query cannot see. Finite, so that A z is 0 there (0 * -inf would be NaN), and low enough that
# its softmax weight is exactly 0 in float32.
_MASKED_LOGIT = -1e30

# Elements of one [queries, tokens] buffer (8 MiB of float32), as long as one query's row fits. Smaller tiles make thinner
# matrix products, which cost more than the better cache use gains.
_TILE_ELEMENTS = 1 << 21

# Queries score each other in blocks of this many: what a block's tokens cannot see is masked inside it, and left out after it.
_OWN_BLOCK = 256


@dataclass(frozen=True)
class ScoringQueries:
    """The queries of one layer that score the tokens they see. Raises ValueError when the tensors do not fit together.

    q: [rows, num_q_heads, head_dim], any float dtype, after RoPE, of positions ``start .. start + rows - 1``. Attention is causal:
        the query at position p sees tokens 0 .. p.
    scale: factor of the logits ``q.k``, usually ``head_dim ** -0.5``.
    o: like q, the attention outputs of these queries, if the caller has them. Read for obcache-k and obcache-kv: `accumulate_scores`
        saves one of three matrix products with them, GPU kernels need them.
    lse: [rows, num_q_heads] float32: the natural log-sum-exps of these queries' logits, if the caller has them.
    weights: [rows, num_q_heads] float32, positive: what each query's squared errors are multiplied with, as of
        `relative_error_weights`; None for 1.
    """

    q: torch.Tensor
    start: int
    scale: float
    o: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.o is not None and self.o.shape != self.q.shape:
            raise ValueError(f"o {list(self.o.shape)} must have the shape of q, {list(self.q.shape)}")
        for name, tensor in (("lse", self.lse), ("weights", self.weights)):
            check_row_heads(name, tensor, self.q)


def accumulate_scores(
    scores: torch.Tensor, queries: ScoringQueries, k: torch.Tensor, v: torch.Tensor, *, score: str, reduce: str = "sum"
) -> None:
    """Add the scores that queries give to the tokens they see.

    scores: [num_kv_heads, context_len] float32; changed in place. The first context_len tokens are scored, however many more
        the queries see; where they see fewer, the scores of the others stay.
    queries: their log-sum-exps save attention and obcache-v on a CPU up to half of their work; nothing else reads them. Their weights
        are for the obcache scores.
    k, v: [start + rows, num_kv_heads, head_dim], any float dtype and strides: the tokens at positions
        ``0 .. start + rows - 1``, keys after RoPE.
    score: one of ``config.SCORES``.
    reduce: "sum" adds to each token the sum of its scores over queries, averaged over the query heads that share its KV head
        (GQA); "max" leaves it the largest of its scores from any query and query head, and of what it had (KVzip's statistic,
        arXiv 2505.23416; score "attention" only).

    Every query's contribution is complete, so a window that spans prefill chunks is one call per chunk. The inputs are
    read only and computed with in float32.

    Scratch, whatever the number of queries: float32 copies of one KV head's K and V, and two buffers (three for
    obcache-kv) of about ``max(2**21, group * (start + rows))`` float32, group = num_q_heads / num_kv_heads. Sums of attention and
    obcache-v on a CPU instead: about as much as k, q and two blocks of ``num_q_heads * 2**16`` float32; maxima there: one of the two
    buffers; both, with rows that see tokens before the first and no lse, twice q in float32.

    Raises ValueError when score or reduce is unknown or the shapes do not fit together.
    """
    q, start, o, lse = queries.q, queries.start, queries.o, queries.lse
    rows, num_q_heads, head_dim = q.shape
    num_tokens, num_kv_heads, _ = k.shape
    check_statistic(score, reduce, weighted=queries.weights is not None)
    if v.shape != k.shape or k.shape[2] != head_dim or num_q_heads % num_kv_heads or num_tokens != start + rows:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} and start={start} do not fit: k and v need shape "
            "[start + rows, num_kv_heads, head_dim], and num_q_heads must be a multiple of num_kv_heads"
        )
    if scores.dtype != torch.float32 or scores.shape[0] != num_kv_heads:
        raise ValueError(f"scores is {list(scores.shape)} {scores.dtype}; it must be float32 [{num_kv_heads}, tokens]")

    if q.device.type == "cpu" and score in ("attention", "obcache-v"):
        if lse is None:
            rows_q, keys, values = _in_one_dtype(q, k.transpose(0, 1), v.transpose(0, 1))
            lse = causal_attention_with_lse(rows_q, keys, values, queries.scale)[1]
        if reduce == "max":
            _accumulate_weight_maxima(scores, replace(queries, lse=lse), k)
        else:
            _accumulate_weight_sums(scores, replace(queries, lse=weighted_lse(lse, queries.weights)), k, v, score)
        return
    group = num_q_heads // num_kv_heads
    tile_rows = min(rows, max(1, _TILE_ELEMENTS // (group * _row_stride(num_tokens))))
    buffers = torch.empty(2, tile_rows * group * _row_stride(num_tokens), dtype=torch.float32, device=q.device)

    for head in range(num_kv_heads):
        k_head = k[:, head].float()
        v_head = torch.empty(head_dim, num_tokens, dtype=torch.float32, device=q.device).copy_(v[:, head].T)
        v_sq = v_head.square().sum(0)
        # A sum is scaled when it is complete; a maximum can be taken in place.
        total = torch.zeros_like(scores[head]) if reduce == "sum" else scores[head]
        for first in range(0, rows, tile_rows):
            last = min(rows, first + tile_rows)
            visible = start + last  # no query of this tile sees further
            num_queries = (last - first) * group
            stride = _row_stride(visible)
            logits, weights = buffers[:, : num_queries * stride].view(2, num_queries, stride).unbind()

            heads = slice(head * group, (head + 1) * group)
            tile = q[first:last, heads].float().mul(queries.scale).reshape(num_queries, head_dim)
            torch.mm(tile, k_head[:visible].T, out=logits[:, :visible])
            _mask_unseen(logits.view(last - first, group, stride), visible)
            torch.softmax(logits, dim=-1, out=weights)
            scored = min(visible, scores.shape[1])
            if reduce == "max":
                torch.maximum(total[:scored], weights[:, :scored].amax(0), out=total[:scored])
            else:
                o_tile = None if o is None else o[first:last, heads].float().reshape(num_queries, head_dim)
                if queries.weights is None:
                    roots = None
                else:
                    roots = queries.weights[first:last, heads].sqrt().reshape(num_queries, 1)
                total[:scored] += _tile_scores(logits, weights, v_head[:, :visible], v_sq[:scored], o_tile, roots, score)
        if reduce == "sum":
            scores[head].add_(total, alpha=1.0 / group)


def _accumulate_weight_sums(scores: torch.Tensor, scoring: ScoringQueries, k: torch.Tensor, v: torch.Tensor, score: str) -> None:
    """Adds sums of attention or obcache-v to scores [num_kv_heads, L] float32, by PyTorch's flash attention for CPUs.

    scoring: with their lse, weighted; k, v: [start + rows, num_kv_heads, head_dim].
    """
    q, start, lse = scoring.q, scoring.start, scoring.lse
    assert lse is not None
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
        """Adds what rows first_row ... last_row - 1 give to `tokens`.

        mask: [tokens, (last_row - first_row) * group] float32, 0 or -inf; None where the rows see all of these tokens.
        """
        if tokens.start == tokens.stop or first_row == last_row:
            return
        seen_by = slice(first_row * group, last_row * group)
        added = bias[..., seen_by] if mask is None else bias[..., seen_by] + mask
        added = added.expand(-1, -1, tokens.stop - tokens.start, -1)
        seen = queries[:, :, seen_by]
        sums[:, tokens] += attention_with_lse(keys[None, :, tokens], seen, seen, power * scoring.scale, added)[1][0].exp_()

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


def _accumulate_weight_maxima(scores: torch.Tensor, scoring: ScoringQueries, k: torch.Tensor) -> None:
    """Raises scores [num_kv_heads, L] float32 to the largest attention weights, without a softmax: one product and one exponential a token.

    scoring: with their lse; k: [start + rows, num_kv_heads, head_dim].
    """
    q, start, lse = scoring.q, scoring.start, scoring.lse
    assert lse is not None
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads, scored = k.shape[1], min(k.shape[0], scores.shape[1])
    group, stride = num_q_heads // num_kv_heads, _row_stride(scored)
    tile_rows = min(rows, max(1, _TILE_ELEMENTS // (group * stride)))
    buffer = torch.empty(tile_rows * group * stride, dtype=torch.float32)
    for head in range(num_kv_heads):
        k_head, heads = k[:scored, head].float().T, slice(head * group, (head + 1) * group)
        largest = torch.full((scored,), float("-inf"))
        for first in range(0, rows, tile_rows):
            last = min(rows, first + tile_rows)
            seen, num_queries = min(start + last, scored), (last - first) * group
            logits = buffer[: num_queries * stride].view(num_queries, stride)[:, :seen]
            queries = q[first:last, heads].float().mul(scoring.scale).reshape(num_queries, head_dim)
            torch.mm(queries, k_head[:, :seen], out=logits)
            _mask_unseen(logits.unflatten(0, (-1, group)), start + last)
            logits.sub_(lse[first:last, heads].reshape(num_queries, 1))
            torch.maximum(largest[:seen], logits.amax(0), out=largest[:seen])
        torch.maximum(scores[head, :scored], largest.exp_(), out=scores[head, :scored])


def _in_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, of any shapes, as they are, or in float32 where their dtypes differ."""
    return tensors if len({each.dtype for each in tensors}) == 1 else tuple(each.float() for each in tensors)


def check_statistic(score: str, reduce: str, *, weighted: bool) -> None:
    """Raises ValueError when there is no such score, or it cannot be reduced so over queries. weighted: whether these have weights."""
    if score not in SCORES:
        raise ValueError(f"score {score!r} is unknown; choose one of {', '.join(SCORES)}")
    if reduce not in ("sum", "max") or (reduce == "max" and score != "attention"):
        raise ValueError(f"reduce {reduce!r} of score {score!r} is unknown; choose sum, or max with attention")
    if weighted and score == "attention":
        raise ValueError("weights cannot be used with score 'attention', which is comparable without them")


def check_row_heads(name: str, tensor: torch.Tensor | None, q: torch.Tensor) -> None:
    """Raises ValueError when there is a tensor, and it is not one number for each row and head of q [rows, num_q_heads, head_dim]."""
    if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != q.shape[:2]):
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}; it must be float32 {list(q.shape[:2])}")


def relative_error_weights(o: torch.Tensor, head_gains: torch.Tensor | None = None) -> torch.Tensor:
    """The query weights with which an obcache score is relative to what its layer gives: then layers and heads can be compared.

    A squared error of head h at query i is divided by the squared norm of all that the layer's attention adds to the residual
    stream there, both after the output projection, where head h's squares are `head_gains[h]` times as large on average:
    ``w_ih = g_h / sum_h' g_h' ||o_ih'||^2``.

    o: [rows, num_q_heads, head_dim], any float dtype: attention outputs. head_gains: [num_q_heads] float32, positive up to a
    common factor; None where they are not known, for equal ones. Returns [rows, num_q_heads] float32.
    """
    squares = torch.linalg.vector_norm(o, dim=-1, dtype=torch.float32).square_()
    gains = squares.new_ones(o.shape[1]) if head_gains is None else head_gains
    weights: torch.Tensor = gains / (squares @ gains).clamp_min_(torch.finfo(torch.float32).tiny)[:, None]
    return weights


def weighted_lse(lse: torch.Tensor, query_weights: torch.Tensor | None, base: str = "e") -> torch.Tensor:
    """Log-sum-exps [rows, num_q_heads] float32 to a base, "2" or "e", whose attention weights, squared, are query_weights times as large.

    With them the obcache scores, which are quadratic in the attention weights, are so many times as large.
    """
    log = torch.log2 if base == "2" else torch.log
    return lse if query_weights is None else lse - log(query_weights) / 2


def accumulate_scores_in_slots(
    scores: torch.Tensor,
    queries: ScoringQueries,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    *,
    score: str,
    reduce: str = "sum",
) -> None:
    """As `accumulate_scores`, of tokens in a pool.

    k, v: [pool slots, num_kv_heads, head_dim]; slots: [start + rows] int32 or int64, where the tokens lie. The others and the errors
    are those of `accumulate_scores`.
    """
    accumulate_scores(scores, queries, k.index_select(0, slots), v.index_select(0, slots), score=score, reduce=reduce)


def _row_stride(num_tokens: int) -> int:
    """Length of a buffer row for num_tokens tokens: an odd number of 64-byte cache lines.

    Rows a power of two apart fall into the same few cache sets, which makes products over the queries of a 4096-token
    context twice as slow.
    """
    return -(-num_tokens // 16) * 16 | 16


def _mask_unseen(logits: torch.Tensor, visible: int) -> None:
    """Mask, in logits [rows, group, stride], what lies after each query, and the padding after all of them.

    The rows' own positions are the last of the visible tokens; logits may end before them.
    """
    rows = logits.shape[0]
    own = logits[:, :, visible - rows :]
    unseen = torch.ones(rows, own.shape[2], dtype=torch.bool, device=logits.device).triu_(diagonal=1)
    own.masked_fill_(unseen.unsqueeze(1), _MASKED_LOGIT)


def _tile_scores(
    logits: torch.Tensor,
    weights: torch.Tensor,
    v: torch.Tensor,
    v_sq: torch.Tensor,
    o: torch.Tensor | None,
    roots: torch.Tensor | None,
    score: str,
) -> torch.Tensor:
    """Scores [scored] of the first tokens, summed over the queries of one tile.

    logits, weights: [queries, stride], stride >= visible; weights are 0 after what a query sees. Both are overwritten.
    v: [head_dim, visible]; v_sq: [scored], the squared norms of its first columns. o: [queries, head_dim], None to compute it.
    roots: [queries, 1], of the query weights: obcache scores are quadratic in the attention weights.
    """
    visible, scored = v.shape[1], v_sq.shape[0]
    if score == "attention":
        return weights[:, :scored].sum(0)
    if o is None and score != "obcache-v":
        o = weights[:, :visible] @ v.T  # of all that a query sees, scored or not
    if roots is not None:
        weights.mul_(roots)
    if score == "obcache-v":
        return weights[:, :scored].square_().sum(0).mul_(v_sq)

    assert o is not None
    # Padded, so that the rows of a new buffer lie well too.
    width = _row_stride(scored)
    logits, weights = logits[:, :width], weights[:, :width]
    b = logits.mul_(weights)
    if score == "obcache-k":
        w_vv = w_vo = w_oo = b.square_()
    else:
        a_plus_b = weights.add_(b)
        w_vo = a_plus_b * b
        w_vv, w_oo = a_plus_b.square_(), b.square_()
    v_dot_wo = (o.T @ w_vo[:, :scored]).mul_(v[:, :scored]).sum(0)
    o_sq_w = o.square().sum(-1) @ w_oo[:, :scored]
    return w_vv[:, :scored].sum(0).mul_(v_sq).add_(o_sq_w).sub_(v_dot_wo, alpha=2)
