"""The reference scores are second-order Optimal Brain Damage terms of the attention output error (arXiv 2510.07651).

For a removal that moves some parameters by d, OBD's saliency is 1/2 d' H d, with H the Hessian of the error at the
unpruned cache. Both tests take the error itself, E = sum over queries of ||o - o'||^2, from a plain attention of their own
and derive H d numerically: nothing here knows the closed forms.
"""

from collections.abc import Callable

import pytest
import torch

from obcache_sglang.compress.reference import score_tokens

HEAD_DIM = 4
SCALE = HEAD_DIM**-0.5
REMOVED = {"obcache-v": ("v",), "obcache-k": ("k",), "obcache-kv": ("k", "v")}  # what becomes 0
# (tokens, queries): the later tokens of a window are hidden from its earlier queries.
SHAPES = [(7, 3), (6, 6), (9, 1)]
GROUP = 2


def make_qkv(num_tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [rows, GROUP, HEAD_DIM], k and v [num_tokens, HEAD_DIM] of one KV head, float64."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((rows, GROUP, HEAD_DIM), (num_tokens, HEAD_DIM), (num_tokens, HEAD_DIM))
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return q, k, v


def outputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention outputs of the last rows, one query at a time: [rows, GROUP, HEAD_DIM]."""
    first = k.shape[0] - q.shape[0]
    return torch.stack(
        [torch.softmax(SCALE * query @ k[: first + i + 1].T, dim=-1) @ v[: first + i + 1] for i, query in enumerate(q)]
    )


def error_of_removing(
    token: int, removed: tuple[str, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """E as a function of a displacement of what is removed, and the displacement that removes it.

    The displacement is [len(removed) * HEAD_DIM]. The error is averaged over the query heads of the group, as scores are.
    """
    unpruned = outputs(q, k, v)
    row = torch.zeros(k.shape[0], 1, dtype=torch.float64)
    row[token] = 1

    def error(displacement: torch.Tensor) -> torch.Tensor:
        moved = {"k": k, "v": v}
        for name, delta in zip(removed, displacement.split(HEAD_DIM), strict=True):
            moved[name] = moved[name] + row * delta
        return (outputs(q, moved["k"], moved["v"]) - unpruned).square().sum() / GROUP

    return error, torch.cat([-{"k": k, "v": v}[name][token] for name in removed])


@pytest.mark.parametrize("score", REMOVED)
@pytest.mark.parametrize(("num_tokens", "rows"), SHAPES, ids=lambda size: str(size))
def test_score_is_half_d_hessian_d(num_tokens: int, rows: int, score: str) -> None:
    q, k, v = make_qkv(num_tokens, rows)
    scores = score_tokens(q, k[:, None], v[:, None], start=num_tokens - rows, scale=SCALE, score=score)[0]
    for token in range(num_tokens):
        error, removal = error_of_removing(token, REMOVED[score], q, k, v)
        _, curved = torch.autograd.functional.hvp(error, torch.zeros_like(removal), removal)
        # Exact up to float64 rounding.
        torch.testing.assert_close(scores[token], removal @ curved / 2, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("score", REMOVED)
@pytest.mark.parametrize(("num_tokens", "rows"), SHAPES, ids=lambda size: str(size))
def test_score_is_the_curvature_by_finite_differences(num_tokens: int, rows: int, score: str) -> None:
    q, k, v = make_qkv(num_tokens, rows)
    scores = score_tokens(q, k[:, None], v[:, None], start=num_tokens - rows, scale=SCALE, score=score)[0]
    step = 1e-4
    for token in range(num_tokens):
        error, removal = error_of_removing(token, REMOVED[score], q, k, v)
        # E is 0 and flat at 0, so E(h d) = h^2 (1/2 d' H d) + O(h^3), and the odd term drops out of the two sides' mean.
        curvature = (error(step * removal) + error(-step * removal)) / (2 * step**2)
        torch.testing.assert_close(scores[token], curvature, rtol=1e-5, atol=1e-9)


def test_value_removal_is_exact() -> None:
    """The error is quadratic in V, so for values the score is the whole error, not only its second-order term."""
    q, k, v = make_qkv(7, 3)
    scores = score_tokens(q, k[:, None], v[:, None], start=4, scale=SCALE, score="obcache-v")[0]
    for token in range(7):
        error, removal = error_of_removing(token, ("v",), q, k, v)
        torch.testing.assert_close(scores[token], error(removal))


def test_joint_score_is_not_the_sum() -> None:
    """Keys and values interact: the joint score holds the Hessian's cross terms too."""
    q, k, v = make_qkv(9, 4)
    value, key, joint = (score_tokens(q, k[:, None], v[:, None], start=5, scale=SCALE, score=score)[0] for score in REMOVED)
    assert ((joint - value - key).abs() > 0.01 * joint).any()
