"""What SGLang's scheduler is to our manager, on SGLang's own radix tree, allocator and pools, without a model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.events import KvEventLoraNames
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from obcache_sglang.compress.measurement import Measurement
from obcache_sglang.cpu.host_pool import serve_host_pools
from obcache_sglang.cpu.platform import IO_BACKEND, LAYOUT
from obcache_sglang.kv.cells import KeptTokens, create_one_space
from obcache_sglang.kv.context import Context
from obcache_sglang.messages import Plan
from obcache_sglang.scheduler.context_files import ContextFiles
from obcache_sglang.scheduler.engine_view import EngineView
from obcache_sglang.scheduler.hooks import around_maybe_sleep_on_idle
from obcache_sglang.scheduler.manager import CompressionManager
from obcache_sglang.scheduler.metrics import Metrics
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from obcache_sglang.scheduler.tree import context_key, match, match_exact
from obcache_sglang.scheduler.wiring import Wiring
from obcache_sglang.settings import CompressionSettings, ServerSettings

KEPT = KeptTokens(torch.arange(20), torch.tensor([0, 20]))
HALF = CompressionSettings.resolve({"compression_ratio": 0.5, "budget": "uniform"})


def exact_slots_before(tree: UnifiedRadixCache, key: RadixKey, num_tokens: int) -> torch.Tensor:
    """The slots [num_tokens] int64 of a prompt's first tokens, which the tree has."""
    _, node = match(tree, key)
    return tree.tree_core.collect_full_device_indices(node, tree.root_node_handle(key.extra_key)).to(torch.int64)[:num_tokens]


class OneSpacePool(MHATokenToKVPool):
    """With all layers in one allocation, as contexts with per-head budgets need it."""

    def _create_buffers_normal(self) -> None:
        assert create_one_space(self)


def make_tree(
    size: int,
    layers: int = 1,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    host: str | None = None,
    host_ratio: float = 2.0,
    lora_names: KvEventLoraNames | None = None,
    dynamo_events: bool = False,
) -> UnifiedRadixCache:
    """SGLang's tree over a pool of `size` slots, by default one layer of one head; several lie in one space.

    host: the policy by which HiCache copies nodes to host memory; None without it. host_ratio: slots there for each of the pool.
    lora_names: of KV events. dynamo_events: whether these have Dynamo's format.
    """
    serve_host_pools()
    server_args = ServerArgs(
        model_path="dummy",
        device="cpu",
        enable_hierarchical_cache=host is not None,
        hicache_ratio=host_ratio,
        hicache_write_policy=host or "write_through",
        hicache_io_backend=IO_BACKEND,
        hicache_mem_layout=LAYOUT,
    )
    set_global_server_args_for_scheduler(server_args)
    pools = {"device": "cpu", "enable_memory_saver": False}
    kind = OneSpacePool if layers * heads > 1 else MHATokenToKVPool
    kv_pool = kind(size=size, page_size=1, dtype=dtype, head_num=heads, head_dim=8, layer_num=layers, **pools)
    params = CacheInitParams(
        req_to_token_pool=ReqToTokenPool(size=4, max_context_len=size, **pools),
        token_to_kv_pool_allocator=TokenToKVPoolAllocator(
            size=size, dtype=torch.float32, device="cpu", kvcache=kv_pool, need_sort=False
        ),
        page_size=1,
        disable=False,
        tree_components=(ComponentType.FULL,),
        enable_kv_cache_events=True,
        kv_event_lora_names=lora_names or KvEventLoraNames(),
        dynamo_kv_event_format=dynamo_events,
    )
    tree = UnifiedRadixCache(params=params)
    if host is not None:
        tree.init_hicache(server_args, params)
    return tree


class Engine(EngineView):
    """The view of a scheduler that has no model: a test makes its forwards."""

    def __init__(
        self,
        size: int = 200,
        context_len: int | None = None,
        chunk: int | None = None,
        tree: UnifiedRadixCache | None = None,
    ) -> None:
        """tree: of `make_tree`, over so many slots. context_len: of the model; as long as the pool if not given. chunk: tokens that one forward reads of prompts."""
        context_len = context_len or size
        tree = tree or make_tree(size)
        self._held: dict[Req, torch.Tensor] = {}
        self.running: list[Req] = []
        self.answered: list[Req] = []
        super().__init__(
            SimpleNamespace(
                tree_cache=tree,
                token_to_kv_pool_allocator=tree.token_to_kv_pool_allocator,
                max_total_num_tokens=size,
                chunked_prefill_size=chunk,
                max_req_input_len=min(size, context_len) - 6,
                server_args=SimpleNamespace(allow_auto_truncate=False),
                model_config=SimpleNamespace(context_len=context_len, hf_eos_token_id=None, vocab_size=1000),
                tokenizer=None,
                waiting_queue=[],
                grammar_manager=SimpleNamespace(grammar_queue=[]),
                collect_inflight_reqs=lambda: {*self.running, *self._held},
                chunked_req=None,
                flush_wrapper=SimpleNamespace(_pending=None),
                output_streamer=SimpleNamespace(stream_output=lambda reqs, return_logprob: self.answered.extend(reqs)),
                enable_priority_preemption=False,
                enable_priority_scheduling=False,
                enable_overlap=False,
                device="cpu",
            )
        )

    def running_batch_now(self) -> Any:
        """SGLang's running batch, as far as it is read."""
        return SimpleNamespace(reqs=self.running, is_empty=lambda: not self.running, batch_is_full=False)

    def is_read_in_chunks(self, req: Req, num_tokens: int) -> None:
        """A request is between two chunks of its prefill: SGLang has read so many tokens of it, beside what was cached, and admitted all."""
        self.queue = [each for each in self.queue if each is not req]
        req.init_next_round_input(self.tree)
        slots = self.tree.token_to_kv_pool_allocator.alloc(num_tokens)
        assert slots is not None
        self._held[req] = slots
        req.kv.req_pool_idx, req.kv.kv_committed_len = 0, req.prefix_len + num_tokens
        self._scheduler.chunked_req = req

    def take(self, req: Req) -> None:
        """SGLang admits a request: it gets slots for what the tree does not hold of its prompt."""
        self.queue = [each for each in self.queue if each is not req]
        req.init_next_round_input(self.tree)
        needed = len(req.origin_input_ids) - req.prefix_len
        if self.free_slots() < needed:
            self.evict(needed)
        slots = self.tree.token_to_kv_pool_allocator.alloc(needed)
        assert slots is not None, "the test's pool is too small"
        self._held[req] = slots
        req.kv.req_pool_idx = 0
        req.kv.kv_allocated_len = len(req.origin_input_ids)

    def give_back(self, req: Req, *, caches: bool = False) -> None:
        """caches: whether what it computed stays in the tree."""
        held = self._held.pop(req)
        if caches:
            key = RadixKey(req.origin_input_ids, req.extra_key, cache_salt=req.cache_salt)
            found = exact_slots_before(self.tree, key, req.prefix_len)
            self.tree.insert(InsertParams(key=key, value=torch.cat([found, held]), prev_prefix_len=req.prefix_len))
        else:
            self.tree.token_to_kv_pool_allocator.free(held)
        req.kv.req_pool_idx = None


class Driven:
    """A manager, and the engine whose steps a test takes."""

    def __init__(
        self,
        size: int = 200,
        agree: Any = bool,
        layers: Sequence[Any] = (),
        compress_layer: Any = None,
        context_len: int | None = None,
        chunk: int | None = None,
        rank_gates: Any = None,
        tree: UnifiedRadixCache | None = None,
        files: ContextFiles | None = None,
        **settings: Any,
    ) -> None:
        """layers, compress_layer, rank_gates, files: as in CompressionManager. chunk, tree: as in Engine. settings: of the server."""
        self.engine = Engine(size, context_len, chunk, tree)
        self.now = 1000.0
        given = {"min_tokens": 4, "compression_ratio": 0.5, "method": "tova", **settings}
        self.manager = CompressionManager(
            self.engine,
            ServerSettings.resolve(given),
            Metrics.create(False, {}),
            uneven_refusal=None,
            agree=agree,
            clock=lambda: self.now,
            secret=b"of the test",
            layers=layers,
            compress_layer=compress_layer,
            rank_gates=rank_gates,
            files=files,
        )

    def ask(
        self, context: array[int], question: int = 7, num_tokens: int = 1, boundaries: tuple[int, ...] = (), **plan: Any
    ) -> ContextReq:
        """A question of one token, or several times the same, on a context arrives. boundaries: of the context's segments."""
        fields = {
            "rid": f"question-{question}",
            "origin_input_text": "",
            "origin_input_ids": context + array("q", [question] * num_tokens),
            "sampling_params": SamplingParams(max_new_tokens=4),
        }
        length = 0 if plan.get("finds_boundary") else len(context)
        settings = replace(plan.pop("settings", self.manager.settings.compression), boundaries=boundaries)
        wish = Plan(length, settings, now=self.now, **plan)
        req = self.manager.create_request(fields, wish.to_dict())
        self.engine.queue.append(req)
        return req

    def step(self) -> list[Req]:
        """One scheduling pass; what SGLang could admit, of which it admits nothing."""
        admitted: list[Req] = []

        def pick(running_batch: Any) -> tuple[None, Any]:
            admitted.extend(self.engine.queue)
            return None, running_batch

        if self.engine.tree.cache_controller is not None:
            self.engine.tree.check_hicache_events()
        self.manager.schedule(pick, self.engine.running_batch_now())
        return admitted

    def forward(self, job: CompressionJob, kept: KeptTokens | None = KEPT) -> None:
        """The job's prefill, in one chunk, up to its end."""
        self.engine.take(job)
        job.extend_end = len(job.origin_input_ids)
        self.manager.jobs.reserve(SimpleNamespace(reqs=[job]))
        job.compression.kept = kept if job.slots is not None else None

    def end(self, req: Req, reason: Any = None) -> None:
        """A request is done, or aborted, and gives its KV back."""
        req.finished_reason = reason or FINISH_LENGTH(length=0)
        completed = not isinstance(reason, FINISH_ABORT)
        self.manager.before_release(req, checkpoint=completed)
        reads = isinstance(req, CompressionJob) and (
            req.reads_exact or (isinstance(req.compression, Measurement) and req.replay is None and not req.passes)
        )
        self.engine.give_back(req, caches=completed and reads)

    def compress(self, context: array[int]) -> Context:
        """A context that is compressed for a question, which then leaves."""
        req = self.ask(context)
        (job,) = [each for each in self.step() if isinstance(each, CompressionJob)]
        self.forward(job)
        self.end(job)
        self.step()
        self.engine.queue.remove(req)
        assert req.context is not None
        return req.context

    def evict_all(self) -> None:
        self.tree_evict(self.engine.pool_slots)

    def tree_evict(self, num_slots: int) -> None:
        self.engine.tree.evict(EvictParams(num_tokens=num_slots))

    def accounts(self) -> tuple[int, int, int]:
        """Slots (free, evictable, locked); what requests hold is none of these."""
        tree = self.engine.tree
        return self.engine.free_slots(), tree.evictable_size(), tree.protected_size()

    def matched(self, context: Context) -> int:
        """Slots of the context that the tree holds."""
        return self.engine.tree.match_prefix(MatchPrefixParams(key=context_key(context))).device_prefix_len

    def matched_exactly(self, context: Context) -> int:
        """Tokens of the context that the tree holds exactly."""
        return match_exact(self.engine.tree, context)[0]


def sleeps(drive: Driven) -> bool:
    """Whether an idle scheduler with `--sleep-on-idle` sleeps as long as SGLang has it, and not shortly."""
    scheduler = SimpleNamespace(idle_sleeper=SimpleNamespace(poller=Mock()))
    wiring = Wiring(plan=None)  # type: ignore[arg-type]
    wiring.manager = drive.manager
    wiring.hang_on(scheduler)
    slept: list[Any] = []
    around_maybe_sleep_on_idle(slept.append, scheduler)
    assert bool(slept) != scheduler.idle_sleeper.poller.poll.called
    return slept == [scheduler]
