"""The scoring kernels for GPUs, against the float64 reference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from obcache_sglang.compress.reference import attention, pair_scores
from obcache_sglang.compress.scores import ScoringQueries, accumulate_scores
from obcache_sglang.gpu import score_kernel, score_lse
from obcache_sglang.gpu.paged_contexts import PagedCache, PagedContexts
from obcache_sglang.gpu.score_kernel import accumulate_scores_paged, needs_outputs, score_tokens_paged
from obcache_sglang.gpu.score_lse import SPLIT_TOKENS, row_lse
from obcache_sglang.settings import SCORES
from tests.kernels.conftest import DEVICE

NUM_KV_HEADS = 2
NAN = float("nan")
# Relative. Weights of 16-bit inputs become bfloat16: rounded by GPUs, cut off by the interpreter.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1.2e-2, torch.bfloat16: 1.2e-2}
STATISTICS = [*((score, "sum") for score in SCORES), ("attention", "max")]
each_statistic = pytest.mark.parametrize(("score", "reduce"), STATISTICS)


def pair_slack(z: torch.Tensor, weights: torch.Tensor, o: torch.Tensor, v: torch.Tensor, score: str) -> torch.Tensor:
    """How far a key score may be off where its terms cancel (v near o): float32 is right to a part of these.

    Arguments as of `pair_scores`.
    """
    if not needs_outputs(score):
        return torch.zeros_like(weights)
    return 1e-6 * (weights * (1 + z.abs()) * (v.norm(dim=-1) + o.norm(dim=-1, keepdim=True))).square()


@dataclass(frozen=True)
class Context:
    """rows at positions start, start + 1, ...; later: tokens behind them, in the pool; scored: of all, None for all."""

    rows: int
    start: int
    later: int = 0
    scored: int | None = None

    @property
    def tokens(self) -> int:
        return self.start + self.rows + self.later

    @property
    def num_scored(self) -> int:
        return self.tokens if self.scored is None else self.scored


class Batch:
    """Contexts in a paged pool in which all that no row may see is NaN, as are q, o and lse of rows of no context."""

    def __init__(
        self,
        contexts: list[Context],
        *,
        group: int = 2,
        head_dim: int = 16,
        page_size: int = 1,
        layout: str = "NHD",
        dtype: torch.dtype = torch.float32,
        fp8: bool = False,
        num_kv_heads: int = NUM_KV_HEADS,
        index_dtype: torch.dtype = torch.int32,
    ) -> None:
        random = torch.Generator().manual_seed(11)
        self.list, self.group, self.dtype, self.scale = contexts, group, dtype, head_dim**-0.5
        pages = [-(-each.tokens // page_size) for each in contexts]
        num_pages = sum(pages) + 3
        order = torch.randperm(num_pages, generator=random)[: sum(pages)]
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        factors = (0.5, 2.0) if fp8 else (1.0, 1.0)
        stored = torch.float8_e4m3fn if fp8 else dtype
        k, v = torch.full(shape, NAN).to(stored), torch.full(shape, NAN).to(stored)
        self.k, self.v = [], []
        first_page = 0
        for each, count in zip(contexts, pages, strict=True):
            seen = each.start + each.rows
            places = [(order[first_page + token // page_size], token % page_size) for token in range(seen)]
            first_page += count
            for pool, copies, factor in ((k, self.k, factors[0]), (v, self.v, factors[1])):
                values = torch.randn(seen, num_kv_heads, head_dim, generator=random).to(stored)
                for token, (page, offset) in enumerate(places):
                    pool[page, offset] = values[token]
                copies.append(values.double() * factor)
        if layout == "HND":
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        self.cache = PagedCache(k.to(DEVICE), v.to(DEVICE), layout, *factors)
        # Two rows before the first context's and one behind the last's are not theirs, nor are the pages around.
        rows = [2, *(each.rows for each in contexts)]
        self.bounds = torch.tensor(rows).cumsum(0)
        num_rows = int(self.bounds[-1]) + 1
        # As a fused projection leaves them.
        fused = torch.full((num_rows, (num_kv_heads * group + 2) * head_dim), NAN)
        self.q = fused[:, : num_kv_heads * group * head_dim].view(num_rows, num_kv_heads * group, head_dim)
        self.q[2:-1] = 3 * torch.randn(self.q[2:-1].shape, generator=random)
        self.q = self.q.to(dtype)
        indices = torch.cat([torch.full((3,), 2**30), order, torch.full((3,), 2**30)])
        last = [(each.tokens - 1) % page_size + 1 for each in contexts]
        scored = [each.num_scored for each in contexts]

        def table(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=index_dtype).to(DEVICE)

        # [rows, query heads], what their scores are multiplied with.
        self.query_weights: torch.Tensor | None = None
        self.tables = PagedContexts(
            q_indptr=table(self.bounds.tolist()),
            starts=table([each.start for each in contexts]),
            kv_indices=table(indices.tolist()),
            kv_indptr=table([3 + sum(pages[:i]) for i in range(len(pages) + 1)]),
            kv_last_page_len=table(last),
            score_indptr=table([5 + sum(scored[:i]) for i in range(len(scored) + 1)]),
            max_rows=max(each.rows for each in contexts),
            max_tokens=max(each.tokens for each in contexts),
            max_scored=max(scored),
        )
        self.attend()

    def attend(self) -> None:
        """Outputs and log-sum-exp as a backend gives them; logits, weights of each (context, query head)."""
        self.o = torch.full(self.q.shape, NAN, dtype=self.dtype)
        self.lse = torch.full(self.q.shape[:2], NAN)
        self.attention: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for number, each in enumerate(self.list):
            rows = slice(self.bounds[number], self.bounds[number + 1])
            q, heads = self.q[rows].double(), []
            for head in range(q.shape[1]):
                k, v = (side[number][:, head // self.group] for side in (self.k, self.v))
                z, weights, o = attention(q[:, head], k, v, start=each.start, scale=self.scale)
                hidden = torch.ones(z.shape, dtype=torch.bool).triu(each.start + 1)
                self.o[rows, head] = o.to(self.dtype)
                self.lse[rows, head] = z.masked_fill(hidden, -math.inf).logsumexp(-1).float()
                heads.append((z, weights))
            self.attention.append(heads)

    def expected(self, score: str, reduce: str, pair: Callable[..., torch.Tensor] = pair_scores) -> list[torch.Tensor]:
        """For each context [num_kv_heads, num_scored], from the outputs as the kernel gets them. pair: what a pair counts."""
        result = []
        # The kernel keeps float16 outputs as bfloat16.
        o = self.o.to(torch.bfloat16) if self.dtype == torch.float16 else self.o
        for number, each in enumerate(self.list):
            rows = slice(self.bounds[number], self.bounds[number + 1])
            scores = torch.zeros(self.k[number].shape[1], each.tokens, dtype=torch.float64)
            for head, (z, weights) in enumerate(self.attention[number]):
                own = head // self.group
                pairs = pair(z, weights, o[rows, head].double(), self.v[number][:, own], score)
                if self.query_weights is not None:
                    pairs = pairs * self.query_weights[rows, head, None]
                visible = slice(0, pairs.shape[1])
                if reduce == "max":
                    scores[own, visible] = torch.maximum(scores[own, visible], pairs.amax(0))
                else:
                    scores[own, visible] += pairs.sum(0) / self.group
            result.append(scores[:, : each.num_scored])
        return result

    def computed(self, score: str, reduce: str = "sum", lse_base: str | None = "2", before: float | None = None) -> torch.Tensor:
        """Into NaN, or added to `before`; [num_kv_heads, 5 + all scored + 5]."""
        size = int(self.tables.score_indptr[-1]) + 5
        scores = torch.full((self.cache.num_kv_heads, size), NAN if before is None else before, device=DEVICE)
        lse = None if lse_base is None else self.lse / (math.log(2) if lse_base == "2" else 1)
        score_tokens_paged(
            scores,
            self.q.to(DEVICE),
            self.cache,
            self.tables,
            scale=self.scale,
            score=score,
            o=self.o.to(DEVICE) if needs_outputs(score) else None,
            lse=None if lse is None else lse.to(DEVICE),
            lse_base=lse_base or "2",
            query_weights=None if self.query_weights is None else self.query_weights.to(DEVICE),
            reduce=reduce,
            accumulate=before is not None,
        )
        return scores.cpu()

    def check(self, score: str, reduce: str = "sum", lse_base: str | None = "2", before: float | None = None) -> None:
        scores = self.computed(score, reduce, lse_base, before)
        untouched = torch.full((scores.shape[0], 5), NAN if before is None else before)
        torch.testing.assert_close(scores[:, :5], untouched, equal_nan=True)
        torch.testing.assert_close(scores[:, -5:], untouched, equal_nan=True)
        expected = torch.cat(self.expected(score, reduce), dim=1)
        if before is not None:
            expected = expected.clamp_min(before) if reduce == "max" else expected + before
        slack = torch.cat(self.expected(score, reduce, pair_slack), dim=1)
        allowed = TOLERANCE[self.dtype] * expected + slack + 1e-6 * float(expected.max())
        off = ((scores[:, 5:-5].double() - expected).abs() / allowed).nan_to_num(nan=math.inf)
        assert off.max() <= 1, f"{off.max():.2f} of what is allowed, at {int(off.argmax())}"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty() gives NaN and the largest integers: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 as integers."""
    builder = interpreter.InterpreterBuilder
    create_dot, cast = builder.create_dot, interpreter._convert_float

    def exact(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(cast(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *others: create_dot(self, exact(a), exact(b), *others))


# Ends within pages, blocks and tiles; a context that ends before its rows' block, one of a single token, one scored in part.
RAGGED = [Context(63, 70), Context(1, 0), Context(5, 250, later=9), Context(1, 132, scored=60), Context(64, 0, later=70)]


@each_statistic
def test_ragged_batch(score: str, reduce: str) -> None:
    Batch(RAGGED, group=3, page_size=16).check(score, reduce)


CASES = {
    "group-1-dim-64-page-1": ([Context(64, 129)], {"group": 1, "head_dim": 64}),
    "group-7-dim-80-page-64": ([Context(63, 66)], {"group": 7, "head_dim": 80, "page_size": 64}),
    "group-8-dim-128-page-16": ([Context(1, 300), Context(3, 14)], {"group": 8, "head_dim": 128, "page_size": 16}),
    "group-3-dim-256-page-16": ([Context(30, 41)], {"group": 3, "head_dim": 256, "page_size": 16, "layout": "HND"}),
    "200-rows": ([Context(200, 45)], {"group": 1, "page_size": 64, "layout": "HND"}),
    "float16": ([Context(40, 70)], {"dtype": torch.float16, "page_size": 16}),
    "bfloat16": ([Context(40, 70)], {"dtype": torch.bfloat16, "index_dtype": torch.int64}),
    "float8-float16": ([Context(17, 70)], {"dtype": torch.float16, "fp8": True, "page_size": 16, "layout": "HND"}),
    "float8-bfloat16": ([Context(17, 70)], {"dtype": torch.bfloat16, "fp8": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_dtypes(case: str) -> None:
    contexts, options = CASES[case]
    batch = Batch(contexts, **options)
    batch.check("obcache-kv")
    batch.check("attention", "max", lse_base="e")


@pytest.mark.long
@each_statistic
@pytest.mark.parametrize("rows", [1, 63, 64, 500])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 80), (7, 128), (8, 256)])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_all_shapes(rows: int, group: int, head_dim: int, page_size: int, score: str, reduce: str) -> None:
    contexts = [Context(rows, 131), Context(1, 17, later=3), Context(9, 60, scored=33)]
    layout = "HND" if page_size == 16 else "NHD"
    Batch(contexts, group=group, head_dim=head_dim, page_size=page_size, layout=layout).check(score, reduce)


@pytest.mark.long
@each_statistic
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_dtypes(dtype: torch.dtype, fp8: bool, score: str, reduce: str) -> None:
    Batch(RAGGED, group=3, head_dim=80, page_size=16, dtype=dtype, fp8=fp8).check(score, reduce)


@pytest.mark.parametrize("score", ["obcache-k", "obcache-kv"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_keeps_small_differences(dtype: torch.dtype, score: str) -> None:
    """One token gets nearly all attention: its value is nearly the output, and its key's score the difference."""
    batch = Batch([Context(8, 90)], dtype=dtype, num_kv_heads=1)
    batch.q[2:10] = 1.5 + batch.q[2:10] / 10
    batch.k[0][20] = 1.75
    batch.cache.k[batch.tables.kv_indices[3 + 20]] = 1.75
    batch.attend()
    assert all(0.9 < weight < 0.9999 for _, weights in batch.attention[0] for weight in weights[:, 20])
    batch.check(score)


@each_statistic
def test_accumulates(score: str, reduce: str) -> None:
    batch = Batch(RAGGED)
    batch.check(score, reduce, before=0.0)
    batch.check(score, reduce, before=0.25)


@pytest.mark.parametrize("score", ["attention", "obcache-kv"])
def test_lse_to_either_base_or_none(score: str) -> None:
    batch = Batch(RAGGED)
    for base in ("2", "e", None):
        batch.check(score, lse_base=base)


@pytest.mark.parametrize("lse_base", ["2", "e", None])
@pytest.mark.parametrize("score", ["obcache-v", "obcache-k", "obcache-kv"])
def test_queries_of_different_weight(score: str, lse_base: str | None) -> None:
    batch = Batch(RAGGED)
    batch.query_weights = torch.logspace(-2, 2, batch.lse.numel()).view(batch.lse.T.shape).T
    batch.check(score, lse_base=lse_base)


def test_lse_by_head_and_row() -> None:
    """As FlashAttention gives it, [heads, rows]."""
    batch = Batch(RAGGED)
    batch.lse = batch.lse.T.contiguous().T
    batch.check("obcache-v")


def test_every_float8() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    batch = Batch([Context(1, 253)], dtype=torch.float16, fp8=True, num_kv_heads=1)
    values = codes.view(torch.float8_e4m3fn)
    order = batch.tables.kv_indices[3:-3].long().cpu()
    for buffer, copy, factor in ((batch.cache.k, batch.k[0], 0.5), (batch.cache.v, batch.v[0], 2.0)):
        buffer.view(torch.uint8)[order.to(DEVICE), 0, 0, 0] = codes.to(DEVICE)
        copy[:, 0, 0] = values.double() * factor
    batch.q[:, :, 0] *= 2**-6
    batch.attend()
    batch.check("obcache-kv", lse_base=None)


def test_queries_are_more_than_the_tokens() -> None:
    """A page table that ends before its rows do, and an empty one; a batch without contexts."""
    batch = Batch([Context(20, 12, scored=40), Context(3, 0)], page_size=16)
    indptr, last_page_len = batch.tables.kv_indptr.clone(), batch.tables.kv_last_page_len.clone()
    indptr[2], last_page_len[0] = indptr[1], 4
    tables = replace(batch.tables, kv_indptr=indptr, kv_last_page_len=last_page_len)
    scores = torch.full((NUM_KV_HEADS, 5 + 40 + 3), NAN, device=DEVICE)
    q, lse = batch.q.to(DEVICE), batch.lse.to(DEVICE)
    score_tokens_paged(scores, q, batch.cache, tables, scale=1.0, score="attention", lse=lse)
    assert (scores[:, 5:25] > 0).all() and (scores[:, 25:] == 0).all()
    assert (row_lse(q, batch.cache, tables, scale=1.0)[22:25] == -math.inf).all()
    before = scores.clone()
    none = replace(tables, starts=tables.starts[:0])
    score_tokens_paged(scores, q, batch.cache, none, scale=1.0, score="attention")
    torch.testing.assert_close(scores, before, equal_nan=True)


@pytest.mark.parametrize(
    ("contexts", "options"),
    [
        ([Context(40, 2 * SPLIT_TOKENS - 20), Context(2, 5, later=4)], {"num_kv_heads": 1, "page_size": 16}),
        ([Context(200, 0)], {"group": 7, "dtype": torch.bfloat16}),
        ([Context(1, 66)], {"head_dim": 256, "page_size": 64, "layout": "HND", "fp8": True}),
    ],
    ids=["splits", "bfloat16", "wide"],
)
def test_lse_equals_float64(contexts: list[Context], options: dict) -> None:
    batch = Batch(contexts, **options)
    lse = row_lse(batch.q.to(DEVICE), batch.cache, batch.tables, scale=batch.scale).cpu()
    torch.testing.assert_close(lse[2:-1], batch.lse[2:-1] / math.log(2), rtol=1e-5, atol=1e-5 if DEVICE == "cpu" else 1e-3)


@each_statistic
def test_adapter_equals_torch(score: str, reduce: str) -> None:
    """A context in chunks, of which 90 tokens are scored: one call per chunk, on a pool's slots."""
    random = torch.Generator().manual_seed(3)
    k, v = torch.full((2, 200, 2, 16), NAN)
    slots = torch.randperm(200, generator=random)[:150]
    k[slots], v[slots] = torch.randn(2, 150, 2, 16, generator=random)
    q = 3 * torch.randn(110, 6, 16, generator=random)
    expected, computed = torch.zeros(2, 2, 90)
    k, v = k.to(DEVICE), v.to(DEVICE)
    for first, last in ((40, 100), (100, 150)):
        rows, visible = q[first - 40 : last - 40], slots[:last]
        copies = k.cpu()[visible], v.cpu()[visible]
        accumulate_scores(expected, ScoringQueries(rows, first, 0.25), *copies, score=score, reduce=reduce)
        o = torch.cat(
            [attention(rows[:, h], *(x[:, h // 3] for x in copies), start=first, scale=0.25)[2] for h in range(6)], dim=1
        ).view_as(rows)
        scores = computed.to(DEVICE)
        queries = ScoringQueries(rows.to(DEVICE), first, 0.25, o.to(DEVICE))
        accumulate_scores_paged(scores, queries, k, v, visible.to(DEVICE), score=score, reduce=reduce)
        computed = scores.cpu()
    torch.testing.assert_close(computed, expected, rtol=TOLERANCE[torch.float32], atol=1e-6 * float(expected.max()))


def test_rows_beyond_32_bits() -> None:
    """Page 3 begins 3 * 2**30 elements behind the first; the memory between is never touched."""
    if DEVICE == "cuda":
        pytest.skip("its 3 GB would be real")
    memory = torch.from_numpy(np.zeros(3 * 2**30 + 64, dtype=np.uint8)).view(torch.float8_e4m3fn)
    pages = memory.as_strided((4, 2, 1, 16), (2**30, 16, 16, 1))
    pages[3] = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    table = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    contexts = PagedContexts(table[[0, 2]], table[:1], table[3:], table[:2], table[2:3], table[[0, 2]], 2, 2, 2)
    q = torch.ones(2, 1, 16)
    scores = torch.empty(1, 2)
    score_tokens_paged(scores, q, PagedCache(pages, pages), contexts, scale=0.1, score="obcache-v")
    near = PagedCache(pages[3:].clone(), pages[3:].clone())
    expected = torch.empty(1, 2)
    score_tokens_paged(expected, q, near, replace(contexts, kv_indices=table[:1]), scale=0.1, score="obcache-v")
    assert torch.equal(scores, expected) and (scores > 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_waits_for_the_device(score: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the meta device have no values: whoever asks for one, or for a shape that depends on one, gets an error."""
    launches: list[tuple[int, ...]] = []

    def launch(grid: tuple[int, ...]) -> object:
        launches.append(grid)
        return lambda *args, **kwargs: None

    for module, name in ((score_kernel, "_score_tokens"), (score_lse, "_split_lse"), (score_lse, "_merge_lse")):
        kernel = type("Kernel", (defaultdict,), {"__missing__": lambda self, grid: launch(grid)})()
        monkeypatch.setattr(module, name, kernel)
    pool = torch.empty(5000, 2, 16, dtype=dtype, device="meta")
    q = torch.empty(64, 6, 16, dtype=dtype, device="meta")
    slots, scores = torch.empty(4100, dtype=torch.int64, device="meta"), torch.empty(2, 4000, device="meta")
    accumulate_scores_paged(scores, ScoringQueries(q, 4036, 1.0, q), pool, pool, slots, score=score)
    assert launches == [(3, 5, 2), (3,), (32, 2, 1)]


def test_refuses_what_does_not_fit() -> None:
    batch = Batch([Context(2, 5)])
    scores, q = torch.zeros(2, 12, device=DEVICE), batch.q.to(DEVICE)
    good = {"scale": 1.0, "score": "attention", "o": None}
    for wrong, message in (
        ({"score": "snapkv"}, "score 'snapkv'"),
        ({"score": "obcache-k"}, "needs the attention outputs"),
        ({"score": "obcache-k", "o": q[:, :2]}, "o is"),
        ({"score": "obcache-k", "reduce": "max"}, "reduce 'max'"),
        ({"lse_base": "10"}, "lse_base '10'"),
        ({"lse": torch.zeros(3, 4)}, "lse is"),
    ):
        with pytest.raises(ValueError, match=message):
            score_tokens_paged(scores, q, batch.cache, batch.tables, **{**good, **wrong})
    for other_scores, other_q, message in (
        (scores.double(), q, "scores is"),
        (scores[:1], q, "scores is"),
        (scores, q[:, :3], "must be"),
        (scores, q.half(), "does not go with"),
    ):
        with pytest.raises(ValueError, match=message):
            score_tokens_paged(other_scores, other_q, batch.cache, batch.tables, **good)
    k = batch.cache.k
    for arguments, message in (
        ((k, k[:1]), "one dtype and shape"),
        ((k, k, "NDH"), "layout 'NDH'"),
        ((k.int(), k.int()), "not supported"),
        ((k[..., ::2], k[..., ::2]), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedCache(*arguments)
    with pytest.raises(ValueError, match="start \\+ rows"):
        accumulate_scores_paged(scores, ScoringQueries(q, 3, 1.0), k[:, 0], k[:, 0], torch.zeros(4), score="attention")
