"""Our CPU attention backend against SGLang's torch_native, one layer of SmolLM2-135M, interleaved in one process.

    python launch/bench_attention.py [--dtype bfloat16|float32] [--repeats 20]

Each line: the shape, the fastest time of each backend in milliseconds, and their ratio. The fastest, since a shared
machine only ever adds time; both see the same batches in turn, and must agree before they are timed.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from obcache_sglang.cpu.attention import CpuAttentionBackend

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
# (what, cached tokens, new tokens, requests)
CASES = [
    ("prefill", 0, 1024, 1),
    ("prefill", 0, 4096, 1),
    ("extend", 512, 64, 1),
    ("extend", 2048, 64, 1),
    ("extend", 4096, 64, 1),
    ("decode", 1024, 1, 1),
    ("decode", 4096, 1, 1),
    ("decode", 1024, 1, 8),
]


class Runner:
    """The parts of a model runner that an attention backend reads."""

    device = "cpu"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.req_to_token_pool = ReqToTokenPool(8, 8192, "cpu", enable_memory_saver=False)
        self.token_to_kv_pool = MHATokenToKVPool(
            16384, 1, dtype, NUM_KV_HEADS, HEAD_DIM, layer_num=1, device="cpu", enable_memory_saver=False
        )


def make_batch(runner: Runner, cached: int, new: int, requests: int) -> ForwardBatch:
    length = cached + new
    slots = torch.arange(1, 1 + requests * length, dtype=torch.int32).view(requests, length)
    runner.req_to_token_pool.req_to_token[1 : 1 + requests, :length] = slots
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE if new == 1 else ForwardMode.EXTEND,
        batch_size=requests,
        input_ids=torch.zeros(requests * new, dtype=torch.int64),
        req_pool_indices=torch.arange(1, 1 + requests),
        seq_lens=torch.full((requests,), length),
        out_cache_loc=slots[:, cached:].flatten().long(),
        seq_lens_sum=requests * length,
    )
    batch.extend_prefix_lens = torch.full((requests,), cached)
    batch.extend_seq_lens = torch.full((requests,), new)
    return batch


def attend(
    backend: TorchNativeAttnBackend,
    layer: RadixAttention,
    batch: ForwardBatch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    backend.init_forward_metadata(batch)
    output: torch.Tensor = backend.forward(q, k, v, layer, batch)
    return output


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    runner = Runner(dtype)
    layer = RadixAttention(NUM_HEADS, HEAD_DIM, HEAD_DIM**-0.5, NUM_KV_HEADS, layer_id=0)
    backends = [TorchNativeAttnBackend(runner), CpuAttentionBackend(runner)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}, one layer, ms")
    print(f"{'':8} {'cached':>6} {'new':>5} {'requests':>8} {'torch_native':>12} {'obcache_cpu':>12} {'ratio':>6}")
    for what, cached, new, requests in CASES:
        batch = make_batch(runner, cached, new, requests)
        q = torch.randn(requests * new, NUM_HEADS * HEAD_DIM, dtype=dtype)
        k, v = (torch.randn(requests * new, NUM_KV_HEADS, HEAD_DIM, dtype=dtype) for _ in "kv")
        calls = [partial(attend, backend, layer, batch, q, k, v) for backend in backends]
        torch.testing.assert_close(calls[0](), calls[1](), atol=1e-2, rtol=1e-2)
        rounds = [[milliseconds(call) for call in calls] for _ in range(arguments.repeats)]
        native, ours = (min(times) for times in zip(*rounds, strict=True))
        print(f"{what:8} {cached:6} {new:5} {requests:8} {native:12.2f} {ours:12.2f} {native / ours:6.1f}", flush=True)


if __name__ == "__main__":
    main()
