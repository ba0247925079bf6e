"""What scoring costs on a CPU:  python -m launch.bench_scoring

Our scores (`compress.scores`) of one layer against the same formulas written out in plain torch, and against one
scaled_dot_product_attention call with the same queries over the same K and V: time, paired run by run, and peak scratch memory.
Shapes of SmolLM2-135M (9 query and 3 KV heads of 64), bfloat16.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from launch.bench_serving import spread
from obcache_sglang.compress.scores import ScoringQueries, accumulate_scores
from obcache_sglang.kv.attention_with_lse import causal_attention_with_lse
from obcache_sglang.settings import SCORES

# Score and reduction over queries.
STATISTICS = [*((score, "sum") for score in SCORES), ("attention", "max")]
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
SCALE = HEAD_DIM**-0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each measurement (default: 7)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="context lengths (default: 4096 16384)")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512], help="queries that score (default: 64 512)")
    arguments = parser.parse_args()
    print("tokens  rows  score           ms  time / plain (min median max)  memory MB  plain MB   time / SDPA (min median max)")
    for rows in arguments.rows:
        for tokens in arguments.tokens:
            for score, reduce in STATISTICS:
                print(measure(tokens, rows, score, reduce, arguments.repeats), flush=True)


def measure(tokens: int, rows: int, score: str, reduce: str, repeats: int) -> str:
    torch.manual_seed(0)
    q, o = torch.randn(2, rows, NUM_Q_HEADS, HEAD_DIM, dtype=torch.bfloat16).unbind()
    k, v = torch.randn(2, tokens, NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16).unbind()
    scores = torch.zeros(NUM_KV_HEADS, tokens)
    mask = torch.ones(rows, tokens, dtype=torch.bool).tril(tokens - rows)

    lse = causal_attention_with_lse(q, k.transpose(0, 1), v.transpose(0, 1), SCALE)[1]

    def ours() -> None:  # given what the CPU attention backend gives: outputs and log-sum-exps
        accumulate_scores(scores, ScoringQueries(q, tokens - rows, SCALE, o, lse), k, v, score=score, reduce=reduce)

    def plain() -> None:
        plain_scores(scores, q, k, v, o, mask, score, reduce)

    def sdpa() -> None:
        query, key, value = (each.transpose(0, 1)[None] for each in (q, k, v))
        scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True)

    for warm_up in (ours, plain, sdpa):
        warm_up()
    seconds = [[timed(run) for run in (ours, plain, sdpa)] for _ in range(repeats)]
    memory = [peak_bytes(run) / 2**20 for run in (ours, plain)]
    statistic, median = score if reduce == "sum" else f"max {score}", sorted(each[0] for each in seconds)[repeats // 2]
    return (
        f"{tokens:6d} {rows:5d}  {statistic:13s} {median * 1e3:5.1f}  "
        f"{spread([a / b for a, b, _ in seconds]):>28s}  {memory[0]:9.1f} {memory[1]:9.1f}  "
        f"{spread([a / c for a, _, c in seconds]):>28s}"
    )


def plain_scores(
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    mask: torch.Tensor,
    score: str,
    reduce: str = "sum",
) -> None:
    """The formulas as one writes them first: all heads at once, in float32. Tensors as of `accumulate_scores`.

    mask: bool [rows, tokens], which tokens a row sees.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (each.float().repeat_interleave(group, 1) for each in (k, v))
    z = torch.einsum("ihd,jhd->hij", q.float(), keys) * q.shape[-1] ** -0.5
    a = torch.softmax(z.masked_fill(~mask, float("-inf")), -1)
    v_sq = values.square().sum(-1).T[:, None]
    if score == "attention":
        each = a
    elif score == "obcache-v":
        each = a.square() * v_sq
    else:
        b = a * z
        dot = torch.einsum("ihd,jhd->hij", o.float(), values)
        o_sq = o.float().square().sum(-1).T[:, :, None]
        if score == "obcache-k":
            each = b.square() * (v_sq + o_sq - 2 * dot)
        else:
            each = (a + b).square() * v_sq + b.square() * o_sq - 2 * (a + b) * b * dot
    each = each.view(k.shape[1], group, *each.shape[1:])
    if reduce == "max":
        torch.maximum(scores, each.amax((1, 2)), out=scores)
    else:
        scores += each.sum(2).mean(1)


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], None]) -> int:
    """The most memory that the tensors made by `run` held at once."""
    with _LiveTensors() as live:
        run()
    return int(live.peak)


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known | self._seen:
                self._seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.data_ptr(), storage.nbytes())
        return result

    def _free(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self.now -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


if __name__ == "__main__":
    main()
