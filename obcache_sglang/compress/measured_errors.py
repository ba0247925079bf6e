"""Budget global of a replay: how many tokens each head keeps, by the error that removing its others really makes.

A token's OBCache score estimates the error of removing it alone. Where most tokens go, their errors add up or cancel, and the
softmax is taken over what is left: tens of small scores may stand for no error in one head and for a large one in another. So
scores only order the tokens of a head. Of some queries the attention output is computed without the tokens that come last in
this order, for a row of kept numbers, and the kept tokens are divided where they take away most error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch

from obcache_sglang.kv.attention_with_lse import merge_attention

NUM_QUERIES = 32
"""Queries of a context that errors are measured with, about. Four times as many divide no better (README, Results)."""

_GROWTH = 1.25
"""From one number of kept tokens that is measured to the next."""

_LARGEST_STEP = 4096
"""Tokens between two such numbers, at most: it bounds the scratch memory."""


@dataclass(frozen=True)
class SampledQueries:
    """Some queries of one layer that stand after a context, and what they see there. group = num_q_heads / num_kv_heads.

    q: [num_kv_heads, group, queries, head_dim] float32, after RoPE and times the scale of the logits.
    weights: [num_kv_heads, group, queries] float32, what a squared error counts, as of `scores.relative_error_weights`.
    output, lse: of attention to the tokens after the context alone: outputs as q, log-sum-exps [num_kv_heads, group, queries].
    """

    q: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def take(
        cls, q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float
    ) -> SampledQueries:
        """Copies the queries.

        q: [queries, num_q_heads, head_dim], any float dtype; weights: [queries, num_q_heads] float32.
        keys, values: [tokens, num_kv_heads, head_dim], any float dtype, of the tokens after the context.
        seen: [queries], how many of these each query sees, at least 1. scale: factor of the logits.
        """
        queries = (q.float() * scale).transpose(0, 1).unflatten(0, (keys.shape[1], -1)).contiguous()
        unseen = torch.arange(len(keys), device=q.device) >= seen[:, None]
        after = _attend(queries, keys.float().transpose(0, 1), values.float().transpose(0, 1), unseen)
        return cls(queries, weights.T.unflatten(0, (keys.shape[1], -1)).contiguous(), *after)

    @classmethod
    def joined(cls, samples: Sequence[SampledQueries]) -> SampledQueries:
        """The queries of all, of one layer."""
        return cls(*(torch.cat([getattr(each, field.name) for each in samples], dim=2) for field in fields(cls)))


def sampled_rows(first: int, num_rows: int, num_queries: int) -> slice:
    """Of num_rows rows, which begin with query `first` of num_queries, those that are sampled: evenly spread over all queries."""
    stride = max(1, num_queries // NUM_QUERIES)
    return slice(min(num_rows, -(first + 1) % stride), num_rows, stride)


def kept_numbers(fewest: int, context_len: int) -> list[int]:
    """The numbers of kept tokens for which errors are measured, from fewest >= 1 up to context_len."""
    numbers = [fewest]
    while numbers[-1] < context_len:
        step = min(max(1, math.floor(numbers[-1] * (_GROWTH - 1))), _LARGEST_STEP)
        numbers.append(min(numbers[-1] + step, context_len))
    return numbers


def pruning_errors(
    sample: SampledQueries,
    order: torch.Tensor,
    numbers: list[int],
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The squared error of each head's output when it keeps only its first tokens: OBCache's objective (arXiv 2510.07651,
    ``||o_i - o'_i||^2``) for all removed tokens together, where its scores expand it for one.

    order: [num_kv_heads, context_len] int64, the positions of each head from the first that it keeps to the last.
    numbers: of kept tokens, ascending, the last of them context_len.
    keys, values: [pool slots, num_kv_heads, head_dim], contiguous, any float dtype; slots: [context_len] where the context lies.

    What stands after the context is never removed. Returns [num_kv_heads, len(numbers)] float32: weighted, summed over queries
    and the query heads of a KV head.
    """
    num_kv_heads = len(order)
    rows = slots[order] * num_kv_heads + torch.arange(num_kv_heads, device=order.device)[:, None]
    output, lse = sample.output, sample.lse
    outputs = []
    for first, last in zip([0, *numbers[:-1]], numbers, strict=True):
        some = rows[:, first:last]
        k, v = (each.view(-1, each.shape[-1]).index_select(0, some.flatten()).float() for each in (keys, values))
        of_some = _attend(sample.q, k.view(*some.shape, -1), v.view(*some.shape, -1))
        output, lse = merge_attention(output, lse, *of_some)
        outputs.append(output)
    squares = (torch.stack(outputs, dim=1) - output[:, None]).square_().sum(-1)  # [num_kv_heads, numbers, group, queries]
    return (squares * sample.weights[:, None]).sum((2, 3))


def divide_by_errors(errors: torch.Tensor, numbers: list[int], total: int) -> list[int]:
    """How many tokens each head keeps, total in all, so that the sum of the errors is small.

    errors: [heads, len(numbers)], with numbers as in `pruning_errors`; a head keeps numbers[0] at least. Between the numbers a
    head's error is taken as the largest convex curve below what was measured, and the steepest pieces of all curves are taken
    first: of these curves no other division has a smaller sum. This is where the errors leave the device: the one wait for it.

    Returns the kept tokens of each head. Raises ValueError where total is less than all heads keep at least, or more than all, and
    where an error is not a finite number: whatever went wrong, no number of kept tokens would make up for it.
    """
    if not len(errors) * numbers[0] <= total <= len(errors) * numbers[-1]:
        raise ValueError(
            f"total={total} is outside {len(errors) * numbers[0]} .. {len(errors) * numbers[-1]}, what heads can keep"
        )
    pieces = []  # (slope, head, tokens)
    for head, measured in enumerate(errors.double().tolist()):
        if not all(map(math.isfinite, measured)):
            raise ValueError(f"the errors of head {head} of {len(errors)} are not finite numbers")
        curve: list[tuple[int, float]] = []
        for point in zip(numbers, measured, strict=True):
            while len(curve) > 1 and _slope(curve[-2], curve[-1]) >= _slope(curve[-2], point):
                curve.pop()
            curve.append(point)
        pieces += [(_slope(*ends), head, ends[1][0] - ends[0][0]) for ends in pairwise(curve)]
    counts = [numbers[0]] * len(errors)
    left = total - sum(counts)
    for _, head, tokens in sorted(pieces, key=lambda piece: piece[0]):  # stable: a curve's pieces stay in order
        taken = min(tokens, left)
        counts[head] += taken
        left -= taken
    return counts


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, unseen: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q, as in `SampledQueries`, to keys and values [num_kv_heads, tokens, head_dim] float32.

    unseen: bool [queries, tokens], which tokens a query cannot see, never all. Returns outputs and log-sum-exps, of the shapes in
    `SampledQueries`.
    """
    logits = (q.flatten(1, 2) @ keys.transpose(1, 2)).view(*q.shape[:3], keys.shape[1])
    if unseen is not None:
        logits.masked_fill_(unseen, float("-inf"))
    lse = logits.logsumexp(-1)
    output = logits.sub_(lse[..., None]).exp_().flatten(1, 2) @ values
    return output.view(q.shape), lse
