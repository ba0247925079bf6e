"""The definition of the scores: float64, one query and one formula at a time, no tricks.

Production runs :mod:`obcache_sglang.compress.scores`; this module is what it is compared with.

The scores come from Optimal Brain Damage (LeCun et al., 1989) applied to the KV cache, as in OBCache
(arXiv 2510.07651). Removing token j perturbs the output ``o_i = sum_j A_ij v_j`` of query i. With ``z_ij`` the scaled
logit and the perturbation "v_j becomes 0", "k_j becomes 0" (so ``z_ij`` becomes 0) or both, the output changes to first
order by

    value   d_ij = -A_ij v_j
    key     d_ij = -A_ij z_ij (v_j - o_i)
    joint   the sum of the two

The output error ``E = sum_i ||o_i - o'_i||^2`` is zero and flat at the unpruned cache, so its second-order Taylor term,
``1/2 d' H d``, is exactly ``sum_i ||d_ij||^2``: the score of token j.
"""

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, start: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention of one head for the queries at positions ``start .. start + rows - 1``.

    q: [rows, head_dim]; k, v: [start + rows, head_dim].
    Returns (z, A, o): scaled logits with 0 where query i cannot see token j, attention weights (both
    [rows, start + rows]), outputs [rows, head_dim].
    """
    visible = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril(diagonal=start)
    z = scale * q @ k.T
    weights = torch.softmax(z.masked_fill(~visible, float("-inf")), dim=-1)
    return z.masked_fill(~visible, 0.0), weights, weights @ v


def pair_scores(z: torch.Tensor, weights: torch.Tensor, o: torch.Tensor, v: torch.Tensor, score: str) -> torch.Tensor:
    """Score [rows, tokens] that each query gives each token. z, weights, o: from :func:`attention`; v: [tokens, head_dim]."""
    if score == "attention":
        return weights
    v_sq = v.square().sum(-1)  # ||v_j||^2, [tokens]
    value = weights.square() * v_sq
    if score == "obcache-v":
        return value
    distance_sq = (v[None] - o[:, None]).square().sum(-1)  # ||v_j - o_i||^2, [rows, tokens]
    key = (weights * z).square() * distance_sq
    if score == "obcache-k":
        return key
    if score == "obcache-kv":
        return value + key + 2 * weights.square() * z * (v_sq - o @ v.T)
    raise ValueError(f"score {score!r} is unknown")


def score_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    start: int,
    scale: float,
    score: str,
    query_weights: torch.Tensor | None = None,
    reduce: str = "sum",
) -> torch.Tensor:
    """Scores of all tokens for all KV heads, in float64.

    q: [rows, num_q_heads, head_dim], the queries at positions ``start .. start + rows - 1``, after RoPE.
    k, v: [start + rows, num_kv_heads, head_dim], the tokens at positions ``0 .. start + rows - 1``.
    scale: factor of the logits, usually ``head_dim ** -0.5``. score: one of ``config.SCORES``.
    query_weights: [rows, num_q_heads], what each query's scores are multiplied with; None for 1.
    Returns [num_kv_heads, start + rows]: with reduce "sum" summed over queries and averaged over the query heads of a KV
    head, with "max" the largest over both.
    """
    q, k, v = q.double(), k.double(), v.double()
    num_kv_heads = k.shape[1]
    group = q.shape[1] // num_kv_heads
    result = torch.zeros(num_kv_heads, k.shape[0], dtype=torch.float64, device=q.device)
    for q_head in range(q.shape[1]):
        head = q_head // group
        z, weights, o = attention(q[:, q_head], k[:, head], v[:, head], start=start, scale=scale)
        scores = pair_scores(z, weights, o, v[:, head], score)
        if query_weights is not None:
            scores = scores * query_weights[:, q_head, None].double()
        if reduce == "max":
            result[head] = torch.maximum(result[head], scores.amax(0))
        else:
            result[head] += scores.sum(0) / group
    return result


def pruning_errors(weights: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``||o_i - o'_i||^2`` of each query, the error that the scores expand, when only kept tokens are left: [rows].

    weights: [rows, tokens] from :func:`attention`; v: [tokens, head_dim]; kept: bool [tokens], some of which each query sees.
    """
    left = weights * kept
    return (weights @ v - left @ v / left.sum(-1, keepdim=True)).square().sum(-1)
