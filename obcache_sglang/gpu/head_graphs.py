"""Decode batches with per-head budgets in CUDA graphs.

SGLang's own decode graphs read one length for all heads. A second set of them, captured by SGLang's runner with this attention
backend in the place of its own, reads each request through head tables; ordinary requests are ones whose heads have no cells.
A replay finds what changes from batch to batch in tensors that stay where they are: SGLang's, and the contexts' tables here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

from obcache_sglang.gpu.head_tables import HeadBatch, count_entries
from obcache_sglang.gpu.triton_heads import TritonHeads

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from obcache_sglang.kv.batch import BatchContexts
    from obcache_sglang.kv.cells import KeptTokens
    from obcache_sglang.kv.context import KeptContext

# A graph's index table holds this many times all tokens of the pool: requests that share a context read it several times over.
# Larger batches run eagerly. At 8 bytes per token and KV head, 1 to 3 % of what the pool itself takes.
POOLS_PER_BATCH = 2


class HeadGraphBackend(AttentionBackend):
    """Attention of all requests of a decode batch over per-head budgets; only within graphs."""

    needs_cpu_seq_lens = False

    def __init__(self, heads: TritonHeads, kv_pool: MHATokenToKVPool) -> None:
        self.heads = heads
        self.kv_pool = kv_pool
        self.max_entries = POOLS_PER_BATCH * kv_pool.size * heads.space.num_kv_heads
        self._loaded: list[KeptTokens | None] = []

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Tables of up to max_bs contexts, for the graphs of all batch sizes."""
        device = self.heads.space.k.device
        self._num_slots, self._num_exact = torch.zeros(2, max_bs, dtype=torch.int64, device=device).unbind()
        self._offsets = torch.zeros(max_bs, self.heads.space.num_heads + 1, dtype=torch.int64, device=device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def shared_read_ends(self, forward_mode: Any) -> SharedReadEnds:
        # Each layer reads the page table again.
        return SharedReadEnds.POST_REPLAY

    def load(self, contexts: list[tuple[int, KeptContext]], num_requests: int) -> None:
        """For the next replay. contexts: the uneven ones, each with the row of a request after it."""
        kept: list[KeptTokens | None] = [None] * num_requests
        num_slots, num_exact = [0] * num_requests, [0] * num_requests
        for row, context in contexts:
            kept[row], num_slots[row], num_exact[row] = context.kept, context.num_slots, context.num_exact
        # Most steps have the requests of the step before.
        if len(kept) == len(self._loaded) and all(a is b for a, b in zip(kept, self._loaded, strict=True)):
            return
        for table, values in ((self._num_slots, num_slots), (self._num_exact, num_exact)):
            table.zero_()
            table[:num_requests].copy_(torch.tensor(values), non_blocking=True)
        self._offsets.zero_()
        for row, tokens in enumerate(kept):
            if tokens is not None:
                self._offsets[row].copy_(tokens.offsets)
        self._loaded = kept

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        num_requests = forward_batch.batch_size
        batch = HeadBatch(
            req_pool_indices=forward_batch.req_pool_indices,
            seq_lens=forward_batch.seq_lens,
            num_slots=self._num_slots[:num_requests],
            num_exact=self._num_exact[:num_requests],
            offsets=self._offsets[:num_requests],
            max_entries=self.max_entries,
        )
        self._step = self.heads.step(batch)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q: [requests, query heads * head_dim]; k, v: of the new tokens. Returns the outputs, in the shape of q."""
        if save_kv_cache:
            self.kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v, layer.k_scale, layer.v_scale)
        queries = q.reshape(len(q), -1).contiguous()
        output = torch.empty_like(queries)
        self._step.attend(queries, layer.layer_id - self.kv_pool.start_layer, layer.scaling, output)
        return output


class HeadGraphs:
    """Decode graphs for batches with contexts with per-head budgets, beside those that SGLang captured."""

    def __init__(self, plan: BatchContexts, backend: HeadGraphBackend, beside: Any, runner: Any) -> None:
        """backend: the attention in them. beside: SGLang's own runner, whose batches they take over; runner: that which has ours."""
        self.plan = plan
        self.backend = backend
        self.beside = beside
        self.runner = runner

    @classmethod
    def capture(cls, plan: BatchContexts, heads: TritonHeads, model_runner: Any) -> HeadGraphs:
        """Captures them: seconds, and as much memory as SGLang's own. Raises what the capture raises."""
        backend = HeadGraphBackend(heads, plan.kv_pool)
        runner = DecodeCudaGraphRunner(model_runner, attn_backend=backend)
        return cls(plan, backend, model_runner.decode_cuda_graph_runner, runner)

    @staticmethod
    def possible(model_runner: Any) -> bool:
        """Whether SGLang captured plain decode graphs of this model, one for each batch size, and pads no batch over ranks."""
        plain = type(model_runner.decode_cuda_graph_runner) is DecodeCudaGraphRunner and model_runner.lora_manager is None
        return plain and not model_runner.server_args.enable_dp_attention

    def prepare(self, forward_batch: ForwardBatch) -> bool:
        """Loads the contexts of a batch that SGLang's graphs could take but for them. False: it must run eagerly."""
        contexts = self.plan.uneven_contexts(forward_batch)
        lengths = forward_batch.seq_lens if forward_batch.seq_lens_cpu is None else forward_batch.seq_lens_cpu
        num_kv_heads = self.backend.heads.space.num_kv_heads
        entries = count_entries(int(lengths.sum()), (context for _, context in contexts), num_kv_heads)
        if entries > self.backend.max_entries:
            return False
        self.backend.load(contexts, forward_batch.batch_size)
        return True
