"""Token scores against the float64 reference."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from obcache_sglang.compress import scores as ops
from obcache_sglang.compress.reference import attention, score_tokens
from obcache_sglang.compress.scores import ScoringQueries, accumulate_scores, relative_error_weights
from obcache_sglang.settings import SCORES

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5
STATISTICS = [*((score, "sum") for score in SCORES), ("attention", "max")]
each_statistic = pytest.mark.parametrize(("score", "reduce"), STATISTICS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and waiting for one on a busy machine costs seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_qkv(
    num_tokens: int, window: int, *, num_kv_heads: int = 2, group: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """q of the last min(window, num_tokens) positions, k and v of all, and the first query's position.

    Queries are scaled up so that logits reach about 15, as those of real models do, and attention is peaked.
    """
    rows = min(window, num_tokens)
    generator = torch.Generator().manual_seed(seed)
    q = 4 * torch.randn(rows, num_kv_heads * group, HEAD_DIM, generator=generator)
    k = torch.randn(num_tokens, num_kv_heads, HEAD_DIM, generator=generator)
    v = torch.randn(num_tokens, num_kv_heads, HEAD_DIM, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype), num_tokens - rows


def computed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, score: str, reduce: str = "sum", num_scored: int | None = None
) -> torch.Tensor:
    """Scores of the first num_scored tokens; of all without it."""
    scores = torch.zeros(k.shape[1], k.shape[0] if num_scored is None else num_scored)
    accumulate_scores(scores, ScoringQueries(q, start, SCALE), k, v, score=score, reduce=reduce)
    return scores


def exact_outputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """Attention outputs in float64, in the shape of q."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    heads = range(q.shape[1])
    return torch.stack(
        [attention(q[:, h], k[:, h // group], v[:, h // group], start=start, scale=SCALE)[2] for h in heads], dim=1
    )


def exact_lse(q: torch.Tensor, k: torch.Tensor, start: int) -> torch.Tensor:
    """Log-sum-exps [rows, num_q_heads] float32, from float64."""
    z = torch.einsum("ihd,jhd->ihj", SCALE * q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1))
    unseen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu_(start + 1)
    return z.masked_fill_(unseen[:, None], float("-inf")).logsumexp(-1).float()


def assert_agrees(
    actual: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    score: str,
    reduce: str = "sum",
    query_weights: torch.Tensor | None = None,
) -> None:
    """Within float32 noise of the float64 reference, token by token, for the first tokens that actual has.

    A logit of 15 summed in float32 is off by a few 1e-6, which the exponential turns into a relative error of the score;
    squaring doubles it: 5e-5 of the score. Where o_i comes close to v_j, the expanded ||v_j - o_i||^2 cancels: 1e-6 of the
    terms that cancel. bfloat16 inputs are exact in float32; only PyTorch's flash attention, from which a CPU has the log-sum-exps and
    the sums of attention and obcache-v, takes an exponential for them that is off by 5e-5, up to three times in a score.
    """
    expected = score_tokens(q, k, v, start=start, scale=SCALE, score=score, query_weights=query_weights, reduce=reduce)
    by_flash_attention = score in ("attention", "obcache-v")
    tolerance = (2e-4 if by_flash_attention and q.dtype == torch.bfloat16 else 5e-5) * expected
    if score in ("obcache-k", "obcache-kv"):
        group = q.shape[1] // k.shape[1]
        for q_head in range(q.shape[1]):
            v_head = v[:, q_head // group].double()
            z, weights, o = attention(q[:, q_head].double(), k[:, q_head // group].double(), v_head, start=start, scale=SCALE)
            norms = v_head.square().sum(-1) + o.square().sum(-1, keepdim=True)
            if query_weights is not None:
                norms *= query_weights[:, q_head, None]
            tolerance[q_head // group] += 1e-6 * ((weights * (1 + z.abs())).square() * norms).sum(0) / group
    excess = (actual - expected[:, : actual.shape[1]]).abs() / tolerance[:, : actual.shape[1]].clamp_min(1e-30)
    assert excess.max() <= 1, f"error is {excess.max():.2f} times the tolerance at [head, token] {excess.argmax().item()}"


@each_statistic
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("num_tokens", "window", "group"),
    [
        *itertools.product([67], [1], [1, 3, 7, 8]),
        *itertools.product([129], [63], [1, 3, 7, 8]),
        *itertools.product([301], [64], [1, 8]),
        (577, 500, 8),  # two blocks of the window's own tokens, and two tiles: a small group has one of 500 rows
        *itertools.product([37], [64], [1, 3, 7, 8]),
        *itertools.product([1], [64], [1, 8]),
    ],
    ids=lambda size: str(size),
)
def test_agrees_with_reference(num_tokens: int, window: int, group: int, dtype: torch.dtype, score: str, reduce: str) -> None:
    q, k, v, start = make_qkv(num_tokens, window, group=group, dtype=dtype)
    assert_agrees(computed(q, k, v, start, score, reduce), q, k, v, start, score, reduce)


@each_statistic
def test_window_over_two_chunks_equals_one_call(score: str, reduce: str) -> None:
    q, k, v, start = make_qkv(131, 63)
    scores = torch.zeros(2, 131)
    for first, last in ((0, 22), (22, 63)):
        seen = start + last
        chunk = k[:seen], v[:seen]
        accumulate_scores(scores, ScoringQueries(q[first:last], start + first, SCALE), *chunk, score=score, reduce=reduce)
    assert_agrees(scores, q, k, v, start, score, reduce)


@each_statistic
@pytest.mark.parametrize("tile_elements", [1, 5000], ids=lambda elements: f"tile{elements}")
def test_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, tile_elements: int, score: str, reduce: str) -> None:
    monkeypatch.setattr(ops, "_OWN_BLOCK", 64)
    monkeypatch.setattr(ops, "_TILE_ELEMENTS", tile_elements)  # one query row per tile, and a few with a ragged last one
    q, k, v, start = make_qkv(259, 259)
    assert_agrees(computed(q, k, v, start, score, reduce), q, k, v, start, score, reduce)


@each_statistic
@pytest.mark.parametrize("tile_elements", [5000, 1 << 21], ids=lambda elements: f"tile{elements}")
@pytest.mark.parametrize("num_scored", [1, 50, 128, 150, 257], ids=lambda num_scored: f"scored{num_scored}")
def test_only_the_first_tokens_score(
    monkeypatch: pytest.MonkeyPatch, num_scored: int, tile_elements: int, score: str, reduce: str
) -> None:
    """The queries see all tokens, with a complete softmax and complete outputs, but only some get scores: a few, all before
    the queries, or some of the queries' own, which the first tiles do not come to."""
    monkeypatch.setattr(ops, "_TILE_ELEMENTS", tile_elements)
    q, k, v, start = make_qkv(257, 129)
    assert_agrees(computed(q, k, v, start, score, reduce, num_scored), q, k, v, start, score, reduce)
    scores = torch.zeros(2, num_scored)
    o = exact_outputs(q, k, v, start).float()
    accumulate_scores(scores, ScoringQueries(q, start, SCALE, o=o), k, v, score=score, reduce=reduce)
    assert_agrees(scores, q, k, v, start, score, reduce)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_statistic
def test_any_strides(score: str, reduce: str, dtype: torch.dtype) -> None:
    """Head-major tensors, and every other row of a pool that holds K and V side by side."""
    q, k, v, start = make_qkv(97, 33, dtype=dtype)
    expected = computed(q, k, v, start, score, reduce)
    head_major = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, k, v)]
    pool = torch.full((2 * 97, 2, 2, 2 * HEAD_DIM), float("nan"), dtype=dtype)
    pool[::2, 0, :, ::2], pool[::2, 1, :, ::2] = k, v
    for q_view, k_view, v_view in (head_major, (q, pool[::2, 0, :, ::2], pool[::2, 1, :, ::2])):
        assert not k_view.is_contiguous()
        torch.testing.assert_close(computed(q_view, k_view, v_view, start, score, reduce), expected, rtol=1e-5, atol=1e-7)


@each_statistic
def test_accumulates_in_place_and_leaves_the_rest(score: str, reduce: str) -> None:
    q, k, v, start = make_qkv(40, 9)
    inputs = [tensor.clone() for tensor in (q, k, v)]
    expected = computed(q, k, v, start, score, reduce)
    had = expected.mean().item()  # less than some of them, more than others
    scores = torch.full((2, 53), had)
    scores[:, 40:] = float("nan")  # tokens no query has come to
    accumulate_scores(scores, ScoringQueries(q, start, SCALE), k, v, score=score, reduce=reduce)
    torch.testing.assert_close(scores[:, :40], expected + had if reduce == "sum" else expected.clamp_min(had))
    assert scores[:, 40:].isnan().all()
    assert all(torch.equal(tensor, before) for tensor, before in zip((q, k, v), inputs, strict=True))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_the_caller_has(dtype: torch.dtype, score: str) -> None:
    """The engine's outputs, rounded to its dtype, take the place of computed ones. Rounding moves o_i by at most 2^-8 of
    itself in bfloat16, and ||v_j - o_i||^2 by about twice that."""
    q, k, v, start = make_qkv(129, 63, dtype=dtype)
    scores = torch.zeros(2, 129)
    o = exact_outputs(q, k, v, start).to(dtype)
    accumulate_scores(scores, ScoringQueries(q, start, SCALE, o=o), k, v, score=score)
    expected = computed(q, k, v, start, score)
    if dtype == torch.float32 or score in ("attention", "obcache-v"):
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6 * expected.mean().item())
    else:
        torch.testing.assert_close(scores, expected, rtol=2e-2, atol=2e-3 * expected.mean().item())
        assert not torch.equal(scores, expected)  # the rounded outputs were really used


@pytest.mark.parametrize("num_scored", [50, 129])
@pytest.mark.parametrize("score", SCORES)
def test_log_sum_exps_the_caller_has(score: str, num_scored: int) -> None:
    """They give the same scores; and where they are read, they are not computed again: a wrong one shows."""
    q, k, v, start = make_qkv(129, 63)
    lse = exact_lse(q, k, start)
    scores, doubled = torch.zeros(2, 2, num_scored).unbind()
    accumulate_scores(scores, ScoringQueries(q, start, SCALE, lse=lse), k, v, score=score)
    assert_agrees(scores, q, k, v, start, score)
    accumulate_scores(doubled, ScoringQueries(q, start, SCALE, lse=lse - torch.tensor(2.0).log()), k, v, score=score)
    factor = {"attention": 2, "obcache-v": 4}.get(score, 1)
    torch.testing.assert_close(doubled, factor * scores, rtol=1e-4, atol=0)


@pytest.mark.parametrize("given", ["nothing", "lse", "outputs", "both"])
@pytest.mark.parametrize("score", SCORES[1:])
def test_queries_of_different_weight(score: str, given: str) -> None:
    q, k, v, start = make_qkv(129, 63)
    query_weights = torch.logspace(-2, 2, 63 * 6).view(6, 63).T
    known = {
        "lse": exact_lse(q, k, start) if given in ("lse", "both") else None,
        "o": exact_outputs(q, k, v, start).float() if given in ("outputs", "both") else None,
    }
    scores = torch.zeros(2, 129)
    accumulate_scores(scores, ScoringQueries(q, start, SCALE, weights=query_weights, **known), k, v, score=score)
    assert_agrees(scores, q, k, v, start, score, query_weights=query_weights)


def test_relative_errors_are_shares_of_what_the_layer_gives() -> None:
    """Of errors as large as the outputs themselves, weighted, each query's are 1 over its heads, and go by their gains."""
    torch.manual_seed(0)
    o, gains = torch.randn(9, 6, HEAD_DIM).bfloat16() * torch.logspace(-3, 3, 9)[:, None, None], torch.rand(6) + 0.1
    weights = relative_error_weights(o, gains)
    assert weights.shape == (9, 6) and weights.dtype == torch.float32
    torch.testing.assert_close((weights * o.float().square().sum(-1)).sum(-1), torch.ones(9))
    torch.testing.assert_close(weights / weights[:, :1], (gains / gains[0]).expand(9, 6))
    torch.testing.assert_close(relative_error_weights(o, 7 * gains), weights)
    torch.testing.assert_close(relative_error_weights(o), relative_error_weights(o, torch.ones(6)))
    assert relative_error_weights(torch.zeros(1, 6, HEAD_DIM), gains).isfinite().all()


def test_queries_of_another_dtype_than_the_cache() -> None:
    q, k, v, start = make_qkv(129, 63)
    k, v = k.bfloat16(), v.bfloat16()
    for score in SCORES:
        assert_agrees(computed(q, k, v, start, score), q, k, v, start, score)


def test_attention_of_each_query_sums_to_one() -> None:
    q, k, v, start = make_qkv(211, 64)
    torch.testing.assert_close(computed(q, k, v, start, "attention").sum(-1), torch.full((2,), 64.0))


@pytest.mark.parametrize("score", ["obcache-k", "obcache-kv"])
def test_a_token_with_all_the_attention(score: str) -> None:
    """An attention sink: o_i is v_j to within 1e-9, and nearly all of ||v_j - o_i||^2 cancels."""
    q, k, v, start = make_qkv(65, 16, num_kv_heads=1, group=1)
    q[:] = q[0]
    k[0] = 8 * q[0] / q[0].norm()
    assert SCALE * (q[0, 0] @ k[0, 0]) > 25
    assert_agrees(computed(q, k, v, start, score), q, k, v, start, score)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "obcache"}, "score 'obcache' is unknown; choose one of attention, obcache-v"),
        ({"start": 30}, r"start=30 do not fit: k and v need shape \[start \+ rows"),
        ({"q": torch.zeros(9, 5, HEAD_DIM)}, "num_q_heads must be a multiple of num_kv_heads"),
        ({"v": torch.zeros(40, 1, HEAD_DIM)}, "do not fit"),
        ({"o": torch.zeros(9, 2, HEAD_DIM)}, r"o \[9, 2, 16\] must have the shape of q, \[9, 6, 16\]"),
        ({"lse": torch.zeros(6, 9)}, r"lse is \[6, 9\] torch.float32; it must be float32 \[9, 6\]"),
        ({"weights": torch.ones(9, 6)}, "weights cannot be used with score 'attention'"),
        ({"weights": torch.ones(9, 2), "score": "obcache-v"}, r"weights is \[9, 2\] torch.float32; .* \[9, 6\]"),
        ({"scores": torch.zeros(3, 40)}, r"scores is \[3, 40\] torch.float32; it must be float32 \[2, tokens\]"),
        ({"scores": torch.zeros(2, 40, dtype=torch.bfloat16)}, "must be float32"),
        ({"reduce": "mean"}, "reduce 'mean' of score 'attention' is unknown; choose sum, or max with attention"),
        ({"reduce": "max", "score": "obcache-v"}, "reduce 'max' of score 'obcache-v' is unknown"),
    ],
    ids=[
        "score",
        "start",
        "q-heads",
        "v-shape",
        "o-shape",
        "lse-shape",
        "weights-of-attention",
        "weights-shape",
        "scores-heads",
        "scores-dtype",
        "reduce",
        "max-of-obcache",
    ],
)
def test_refuses(change: dict, message: str) -> None:
    q, k, v, start = make_qkv(40, 9)
    of_queries = {"q": q, "start": start, "scale": SCALE}

    def score(**given: Any) -> None:
        queries = ScoringQueries(
            **{name: given.pop(name) for name in ("q", "start", "scale", "o", "lse", "weights") if name in given}
        )
        accumulate_scores(queries=queries, **given)

    arguments = {"scores": torch.zeros(2, 40), "k": k, "v": v, "score": "attention"} | of_queries | change
    with pytest.raises(ValueError, match=message):
        score(**arguments)
