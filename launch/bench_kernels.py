"""What scoring costs on a GPU:  python -m launch.bench_kernels

One layer of a context in a paged pool (pages of one token, in random order), bfloat16: the scoring kernel against the roofline of
`obcache_sglang.gpu.kernel_report` with this GPU's own bandwidth and arithmetic, against one FlashAttention call of the same queries
over the same K and V, and as a share of the causal FlashAttention of the whole context. FlashAttention is scaled_dot_product_attention
held to its flash kernel; a score needs as much of q k^T as it does. The same formulas in plain torch stand beside them, as one writes them
first: K and V repeated for each query head, in float32, all weights in memory. That is a weak baseline, and a large ratio to it says little.
Medians of `triton.testing.do_bench`, which empties the L2 cache before each run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from launch.bench_scoring import plain_scores
from obcache_sglang.gpu.kernel_report import LLAMA, QWEN, Chip, Model, lse_cost, scoring_cost
from obcache_sglang.gpu.paged_contexts import PagedCache, PagedContexts
from obcache_sglang.gpu.score_kernel import needs_outputs, score_tokens_paged
from obcache_sglang.gpu.score_lse import row_lse
from obcache_sglang.settings import SCORES

# Plain torch keeps several [heads, rows, tokens] float32 tensors.
MAX_PLAIN_ELEMENTS = 2**29


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 131072], help="context lengths")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 2048], help="queries that score (default: 64 2048)")
    parser.add_argument("--milliseconds", type=int, default=100, help="time for the runs of each measurement (default: 100)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("launch.bench_kernels needs a GPU; `python -m obcache_sglang.gpu.kernel_report` predicts without one.")
    chip = measured_chip()
    print(f"{chip.name}: {chip.bandwidth / 1e12:.2f} TB/s copied, {chip.flops / 1e12:.0f} TFLOP/s in a bfloat16 matrix product")
    print(
        "lse us: the log-sum-exp, where the backend gives none. %: what the least time by these two figures is of the time it took."
    )
    print(
        "flash us: FlashAttention of the same rows. % of attention: score and log-sum-exp, of causal FlashAttention of all rows."
    )
    print("plain us: the formulas in plain torch, with K and V repeated for each query head, a weak baseline.")
    print(
        f"{'model':<13}{'tokens':>7}{'rows':>6}  {'score':<11}{'us':>8}{'least us':>9}{'%':>5}{'lse us':>8}{'%':>5}"
        f"{'flash us':>10}{'ours / flash':>13}{'% of attention':>15}{'plain us':>10}"
    )
    for model in (LLAMA, QWEN):
        for tokens in arguments.tokens:
            for rows in arguments.rows:
                for line in measure(model, tokens, rows, chip, arguments.milliseconds):
                    print(line, flush=True)


def median_us(run: Callable[[], object], milliseconds: int) -> float:
    return float(triton.testing.do_bench(run, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")) * 1e3


def measured_chip() -> Chip:
    """This GPU by what it reaches: bytes read and written in a copy of 1 GiB, and a product of two 8192 x 8192 matrices."""
    properties = torch.cuda.get_device_properties(0)
    memory = torch.randn(2**28, device="cuda")
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda").unbind()
    copied = median_us(memory.clone, 200)
    multiplied = median_us(lambda: a @ b, 200)
    return Chip(
        properties.name,
        10 * properties.major + properties.minor,
        properties.shared_memory_per_block,
        2 * memory.numel() * memory.element_size() / copied * 1e6,
        2 * 8192**3 / multiplied * 1e6,
    )


def measure(model: Model, tokens: int, rows: int, chip: Chip, milliseconds: int) -> list[str]:
    torch.manual_seed(0)
    scale = model.head_dim**-0.5
    pool = torch.randn(2, tokens * 5 // 4, model.num_kv_heads, model.head_dim, dtype=torch.bfloat16, device="cuda")
    slots = torch.randperm(pool.shape[1], device="cuda")[:tokens]
    q = torch.randn(tokens, model.num_q_heads, model.head_dim, dtype=torch.bfloat16, device="cuda")
    k, v = (each[slots] for each in pool)

    def attention(rows: int) -> torch.Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (q[-rows:], k, v))
        # Rows that see all tokens: no mask.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=rows == tokens, scale=scale, enable_gqa=True)

    whole, flash_us = (median_us(partial(attention, number), milliseconds) for number in (tokens, rows))
    window = q[-rows:]
    o = attention(rows)[0].transpose(0, 1).contiguous()
    cache = PagedCache.of_slots(pool[0], pool[1])
    contexts = PagedContexts.one(slots, rows=rows, start=tokens - rows, num_scored=tokens)
    scores = torch.zeros(model.num_kv_heads, tokens, device="cuda")
    lse = row_lse(window, cache, contexts, scale=scale)
    lse_us = median_us(lambda: row_lse(window, cache, contexts, scale=scale), milliseconds)
    least_lse = lse_cost(model, tokens, rows).seconds(chip) / model.num_layers * 1e6
    mask = torch.ones(rows, tokens, dtype=torch.bool, device="cuda").tril(tokens - rows)
    lines = []
    for score in SCORES:

        def ours(score: str = score) -> None:
            out = o if needs_outputs(score) else None
            score_tokens_paged(scores, window, cache, contexts, scale=scale, score=score, o=out, lse=lse)

        def plain(score: str = score) -> None:
            plain_scores(scores, window, k, v, o, mask, score)

        us = median_us(ours, milliseconds)
        least = scoring_cost(model, tokens, rows, score).seconds(chip) / model.num_layers * 1e6
        possible = model.num_q_heads * rows * tokens <= MAX_PLAIN_ELEMENTS
        plain_us = median_us(plain, milliseconds) if possible else float("nan")
        lines.append(
            f"{model.name:<13}{tokens:>7}{rows:>6}  {score:<11}{us:>8.0f}{least:>9.0f}{100 * least / us:>5.0f}{lse_us:>8.0f}"
            f"{100 * least_lse / lse_us:>5.0f}{flash_us:>10.0f}{us / flash_us:>13.2f}{100 * (us + lse_us) / whole:>15.1f}{plain_us:>10.0f}"
        )
    return lines


if __name__ == "__main__":
    main()
