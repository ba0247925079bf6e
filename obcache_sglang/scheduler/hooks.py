"""Where SGLang's scheduler process calls us. Every hook is short, and without a manager (no --obcache) none is registered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from sglang.srt.managers.io_struct import GetInternalStateReqOutput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_parallel

from obcache_sglang.compress.head_gains import head_gains
from obcache_sglang.compress.head_profile import HeadProfile
from obcache_sglang.compress.scores import accumulate_scores_in_slots
from obcache_sglang.cpu.attention import CpuAttentionBackend
from obcache_sglang.errors import HostError, RequestError
from obcache_sglang.host import Touch, hook_in_place, hook_rows
from obcache_sglang.kv.cells import create_one_space
from obcache_sglang.messages import KEY, control_call
from obcache_sglang.scheduler.forward import ForwardPlan, score_after
from obcache_sglang.scheduler.kv_events import VisibleEvents
from obcache_sglang.scheduler.manager import CompressionManager
from obcache_sglang.scheduler.metrics import Metrics
from obcache_sglang.scheduler.requests import CompressionJob, client_view
from obcache_sglang.settings import published_settings, server_secret

if TYPE_CHECKING:
    from obcache_sglang.gpu.head_graphs import HeadGraphs
    from obcache_sglang.gpu.overlay import HeadOverlay

logger = logging.getLogger(__name__)

Hook = TypeVar("Hook", bound=Callable[..., Any])

_manager: CompressionManager | None = None
_plan: ForwardPlan | None = None
_overlay: HeadOverlay | None = None
_graphs: HeadGraphs | None = None
_events = VisibleEvents()


def _contained(what: str) -> Callable[[Hook], Hook]:
    """An after hook whose failure is logged, and changes nothing: a defect of ours must not end the scheduler."""

    def decorate(hook: Hook) -> Hook:
        @wraps(hook)
        def contained(result: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(result, *args, **kwargs)
            except Exception:
                logger.exception("obcache: %s", what)
                return result

        return contained  # type: ignore[return-value]

    return decorate


def after_scheduler_init(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Makes this process's manager. Raises HostError where the pool or the tree cannot hold compressed contexts."""
    global _manager
    settings = published_settings()
    assert settings is not None, "scheduler hooks are registered only with settings"
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if type(pool) is not MHATokenToKVPool or type(scheduler.tree_cache) is not UnifiedRadixCache:
        raise HostError(
            f"--obcache needs SGLang's MHATokenToKVPool and UnifiedRadixCache, this server has {type(pool).__name__} and "
            f"{type(scheduler.tree_cache).__name__}; serve a model with ordinary attention, with the radix cache on."
        )
    assert _plan is not None, "attention backends are made before the scheduler is complete"
    refusal = _uneven_refusal(_plan, scheduler.server_args)
    if refusal is not None and settings.compression.budget != "uniform":
        raise HostError(
            f"--obcache-budget={settings.compression.budget} cannot be served here: {refusal}; set --obcache-budget uniform."
        )
    if settings.head_profile is not None:
        _plan.compressor.head_profile = HeadProfile.load(settings.head_profile)
        _plan.compressor.head_profile.check_model(scheduler.model_config.hf_config)
        num_heads = scheduler.model_config.get_total_num_kv_heads()
        # As SGLang divides them; where there are fewer heads than ranks, several ranks have the same one.
        first = get_parallel().attn_tp_rank * num_heads // get_parallel().attn_tp_size
        _plan.compressor.lanes = (first, first + pool.head_num)
    cpu_group, group_size = scheduler.attn_tp_cpu_group, scheduler.attn_tp_group.world_size

    def agree(verdict: bool) -> bool:
        if group_size == 1:
            return verdict
        votes = torch.tensor([int(verdict)])
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=cpu_group)
        return bool(votes.item())

    _plan.agree = agree
    if group_size > 1:
        _plan.mean_over_ranks = lambda tensor: scheduler.attn_tp_group.all_reduce(tensor) / group_size
    reporter = scheduler.metrics_reporter
    labels = dict(scheduler.metrics_collector.labels) if reporter.enable_metrics else {}
    _manager = CompressionManager(
        scheduler,
        settings,
        Metrics.create(reporter.enable_metrics, labels),
        uneven_refusal=refusal,
        agree=agree,
        clock=time.time if group_size == 1 else None,
        secret=server_secret(),
    )


def _uneven_refusal(plan: ForwardPlan, server_args: Any) -> str | None:
    """Why heads of different length cannot be served in this process, or None."""
    if plan.space is None:
        return f"the KV pool (layout {plan.kv_pool.kv_cache_layout}) does not hold all layers in one address space"
    if plan.space.k.dtype.itemsize < 2:
        return f"a KV cache of {plan.space.k.dtype} has scales that heads of different length are not attended with"
    if not plan.attends_uneven_heads:
        return f"attention backend {server_args.attention_backend} on {plan.kv_pool.device} has one length for all heads"
    return None


def around_create_buffers_normal(create: Any, pool: Any) -> None:
    if type(pool) is not MHATokenToKVPool or not create_one_space(pool):
        create(pool)


def after_init_attention_backends(result: None, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """Puts our scoring behind this model's attention calls."""
    global _plan, _overlay
    if model_runner.is_draft_worker:
        return
    _plan = ForwardPlan(
        model_runner.token_to_kv_pool,
        model_runner.req_to_token_pool,
        _scoring(model_runner),
        head_gains(model_runner.model, model_runner.dtype),
    )
    backends = {id(b): b for b in (model_runner.attn_backend, model_runner.decode_attn_backend) if b is not None}.values()
    _overlay = overlay = _head_overlay(_plan, model_runner)
    for backend in backends:
        if isinstance(backend, CpuAttentionBackend):
            backend.plan = _plan
        elif torch.device(model_runner.device).type == "cuda":
            from obcache_sglang.gpu.attention_lse import leave_lse

            backend.forward = leave_lse(backend, _plan)
        if overlay is not None:
            backend.forward = overlay.over(backend.forward)
        backend.forward = score_after(backend.forward, _plan)
    _plan.attends_uneven_heads = overlay is not None or all(isinstance(b, CpuAttentionBackend) for b in backends)


def _scoring(model_runner: Any) -> Callable[..., None]:
    """How tokens in the pool are scored: on GPUs by a kernel that reads them where they lie."""
    if torch.device(model_runner.device).type != "cuda":
        return accumulate_scores_in_slots
    # Not every machine can import kernels.
    from obcache_sglang.gpu.score_kernel import accumulate_scores_paged

    return accumulate_scores_paged


def _head_overlay(plan: ForwardPlan, model_runner: Any) -> HeadOverlay | None:
    """Attention over heads of different length for a GPU; None where there is none, or no such heads can be."""
    if plan.space is None or plan.space.k.device.type != "cuda":
        return None
    # These import kernels, which not every machine can.
    from obcache_sglang.gpu.flashinfer_heads import FlashInferHeads
    from obcache_sglang.gpu.overlay import HeadOverlay
    from obcache_sglang.gpu.triton_heads import TritonHeads

    settings = published_settings()
    table, space = model_runner.req_to_token_pool.req_to_token, plan.space
    num_heads = model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size
    if settings is not None and settings.head_attention == "flashinfer":
        workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=space.k.device)
        return HeadOverlay(plan, FlashInferHeads(space, table, num_heads, model_runner.dtype, workspace))
    return HeadOverlay(plan, TritonHeads(space, table, num_heads))


def after_init_cuda_graphs(result: None, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """Captures decode graphs for heads of different length where they are wanted and SGLang captured its own."""
    global _graphs
    settings = published_settings()
    if settings is None or _plan is None or _overlay is None or model_runner.is_draft_worker:
        return
    if model_runner.decode_cuda_graph_runner is None and settings.decode_graphs != "on":
        return  # no batch of this server decodes in graphs
    if not settings.captures_decode_graphs:
        if settings.compression.budget != "uniform":
            logger.warning(
                "obcache: batches that decode behind contexts of budget %s run outside CUDA graphs, a step of them takes several times "
                "as long: --obcache-decode-graphs on (with --obcache-head-attention triton) captures graphs for them, "
                "--obcache-budget uniform needs none.",
                settings.compression.budget,
            )
        return
    from obcache_sglang.gpu.head_graphs import HeadGraphs
    from obcache_sglang.gpu.triton_heads import TritonHeads

    if not HeadGraphs.possible(model_runner):
        logger.warning(
            "obcache: no decode graphs for heads of different length, such batches run eagerly: SGLang captured none of the plain kind, "
            "or serves LoRA adapters or DP attention"
        )
        return
    assert isinstance(_overlay.heads, TritonHeads), "settings exclude others"
    logger.info("obcache: capturing decode graphs for heads of different length")
    try:
        _graphs = HeadGraphs(_plan, _overlay.heads, model_runner)
    except Exception:
        logger.exception("obcache: no decode graphs for heads of different length; such batches run eagerly")


def around_can_run_graph(can_run_graph: Any, runner: Any, forward_batch: Any) -> bool:
    """SGLang's graphs were captured without scoring, and with one length for all heads."""
    if _plan is None or not (_plan.is_scored(forward_batch) or _plan.uneven_contexts(forward_batch)):
        return bool(can_run_graph(runner, forward_batch))
    if _graphs is None or runner is not _graphs.beside or not can_run_graph(runner, forward_batch):
        return False
    try:
        return _graphs.prepare(forward_batch)
    except Exception:
        logger.exception("obcache: a batch runs eagerly")
        return False


def around_execute_graph(execute: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """A batch that `around_can_run_graph` prepared is replayed by our graphs."""
    if _graphs is not None and runner is _graphs.beside and _graphs.plan.uneven_contexts(forward_batch):
        return _graphs.runner.execute(forward_batch, *args, **kwargs)
    return execute(runner, forward_batch, *args, **kwargs)


def after_get_init_info(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Tells the launcher that compression is active here; without this entry it refuses to serve."""
    hooks = hooks_in_place()
    if _manager is None or _plan is None or not all(hooks.values()):
        return info
    return {**info, "obcache": {"hooks": hooks}}


def hooks_in_place() -> dict[str, bool]:
    """Of this process: each hook's target, and whether it is really called."""
    return {touch.target: hook_in_place(touch) for touch in hook_rows("scheduler")}


_REQ_POSITIONAL = ("rid", "origin_input_text", "origin_input_ids", "sampling_params")


def around_create_generation_req(create: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Req:
    """A request with a plan becomes a ContextReq; all others are SGLang's own.

    One that names its context by id gets the document or an error: its prompt is the question alone.
    """
    params = recv_req.sampling_params.custom_params
    plan = params.get(KEY) if isinstance(params, dict) else None
    if _manager is None or not isinstance(plan, dict):
        return create(scheduler, recv_req, *args, **kwargs)
    try:
        # A session calls with keywords only.
        return _manager.create_request({**dict(zip(_REQ_POSITIONAL, args, strict=False)), **kwargs}, plan)
    except RequestError as error:
        message, status_code = str(error), error.status_code
    except Exception as error:
        logger.exception("obcache: request %s", recv_req.rid)
        message, status_code = f"the context of this request cannot be had: {type(error).__name__}", 500
        if plan.get("context_id") is None:
            return create(scheduler, recv_req, *args, **kwargs)
    req = create(scheduler, recv_req, *args, **kwargs)
    req.set_finish_with_abort(message, status_code=HTTPStatus(status_code))
    return req


def around_get_new_batch_prefill_raw(pick: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    if _manager is None:
        return pick(scheduler, *args, **kwargs)
    picked = False

    def pick_once(**kw: Any) -> Any:
        nonlocal picked
        picked = True
        return pick(scheduler, *args, **kw)

    try:
        return _manager.schedule(pick_once, **kwargs)
    except Exception:
        if picked:  # SGLang's own failure, or a batch that would be lost
            raise
        logger.exception("obcache: a scheduling pass without decisions")
        return pick(scheduler, *args, **kwargs)


@_contained("a request that came into the queue while a batch was picked")
def after_add_request_to_queue(result: None, scheduler: Any, req: Req, *args: Any, **kwargs: Any) -> None:
    if _manager is not None:
        _manager.queued(req)


@_contained("reserving slots")
def after_prepare_for_extend(result: None, batch: Any) -> None:
    if _manager is not None:
        _manager.before_forward(batch)


def after_init_new(forward_batch: Any, cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    if _plan is not None and not model_runner.is_draft_worker:
        _plan.plan_forward(forward_batch, batch)


def around_release_kv_cache(release: Any, req: Req, tree_cache: Any, *, checkpoint: bool) -> None:
    if _manager is not None and type(req) is not Req and req.kv.holds_kv:
        try:
            _manager.before_release(req, checkpoint=checkpoint)
        except Exception:
            logger.exception("obcache: releasing request %s", req.rid)
    release(req, tree_cache, checkpoint=checkpoint)


@_contained("after an abort")
def after_abort_request(result: None, scheduler: Any, recv_req: Any) -> None:
    if _manager is not None:
        _manager.after_abort()


def around_flush_cache(flush: Any, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    if _manager is None:
        return bool(flush(scheduler, *args, **kwargs))
    try:
        _manager.before_flush()
    except Exception:
        logger.exception("obcache: before a flush")
    flushed = bool(flush(scheduler, *args, **kwargs))
    if flushed:
        try:
            _manager.after_flush()
        except Exception:
            logger.exception("obcache: after a flush")
    return flushed


@_contained("after a LoRA adapter was unloaded")
def after_unload_lora_adapter(result: Any, scheduler: Any, recv_req: Any) -> Any:
    if _manager is not None and recv_req.lora_id is not None:
        _manager.forget_adapter(recv_req.lora_id)
    return result


def around_get_internal_state(get_internal_state: Any, scheduler: Any, recv_req: Any) -> Any:
    try:
        call = control_call(recv_req.rid)
        if _manager is None or call is None:
            return get_internal_state(scheduler, recv_req)
        answer = _manager.answer(call)
        if call["op"] == "status":
            answer["hooks"] = hooks_in_place()
    except Exception as error:
        logger.exception("obcache: control call %s", recv_req.rid)
        answer = {"ok": False, "status_code": 500, "error": f"{type(error).__name__}: {error}"}
    answer["dp_rank"] = get_parallel().dp_rank or 0
    return GetInternalStateReqOutput(internal_state=answer)


def around_get_output_streamer_class(get_class: Any, scheduler: Any) -> type:
    """SGLang's own extension point: a streamer that never shows jobs or virtual tokens."""
    streamer_class = get_class(scheduler)

    class ObcacheOutputStreamer(streamer_class):  # type: ignore[misc, valid-type]
        __slots__ = ()

        def stream_output(self, reqs: list[Req], *args: Any, **kwargs: Any) -> None:
            shown = [req for req in reqs if not isinstance(req, CompressionJob)]
            with ExitStack() as view:
                try:
                    view.enter_context(client_view(shown))
                except Exception:
                    logger.exception("obcache: answers count virtual tokens")
                super().stream_output(shown, *args, **kwargs)

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == KEY or super().is_request_level_customized_info_key(key)

    return ObcacheOutputStreamer


@_contained("KV events")
def after_take_events(events: list[Any], tree_cache: Any) -> list[Any]:
    """KV events without virtual tokens, and without what is cached behind them: routers could do nothing with them."""
    return _events.of(events)


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_REQ = "sglang.srt.managers.schedule_batch.Req"
_POOL = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"
_DECODE_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"


def _hook(target: str, kind: Any, hook: Any, why: str, parameters: tuple[str, ...] = ()) -> Touch:
    return Touch(target, kind, why, parameters, "scheduler", hook)


def _use(target: str, kind: Any, why: str, parameters: tuple[str, ...] = ()) -> Touch:
    return Touch(target, kind, why, parameters, "scheduler")


SCHEDULER_TOUCHES: tuple[Touch, ...] = (
    _hook(f"{_SCHEDULER}.__init__", "after", after_scheduler_init, "makes the manager of this process"),
    _hook(f"{_SCHEDULER}.get_init_info", "after", after_get_init_info, "proves to the launcher that the hooks are in place"),
    _hook(
        f"{_SCHEDULER}._create_generation_req",
        "around",
        around_create_generation_req,
        "a request that asks for compression becomes a ContextReq",
        ("recv_req",),
    ),
    _hook(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        "around",
        around_get_new_batch_prefill_raw,
        "decides for waiting requests, starts jobs, holds back who waits for one",
        ("prefill_delayer_single_pass", "running_batch"),
    ),
    _hook(f"{_SCHEDULER}.abort_request", "after", after_abort_request, "ends jobs nobody waits for", ("recv_req",)),
    _hook(
        f"{_SCHEDULER}.flush_cache",
        "around",
        around_flush_cache,
        "what nobody waits for makes way; and the tree was reset: every context is gone",
    ),
    _hook(
        f"{_SCHEDULER}._add_request_to_queue",
        "after",
        after_add_request_to_queue,
        "what comes into the queue while a batch is picked (structured output, preemption) waits for a decision",
        ("req",),
    ),
    _hook(
        f"{_SCHEDULER}.unload_lora_adapter",
        "after",
        after_unload_lora_adapter,
        "an adapter's contexts go with it",
        ("recv_req",),
    ),
    _hook(
        f"{_SCHEDULER}.get_internal_state", "around", around_get_internal_state, "control calls of the endpoints", ("recv_req",)
    ),
    _hook(
        f"{_SCHEDULER}.get_output_streamer_class",
        "around",
        around_get_output_streamer_class,
        "clients see real prompts, real cached-token counts and no jobs",
    ),
    _hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        "after",
        after_prepare_for_extend,
        "reserves a job's slots before its last chunk runs",
    ),
    _hook(
        "sglang.srt.mem_cache.common.release_kv_cache",
        "around",
        around_release_kv_cache,
        "a job ends here: publish the context, or take it back",
        ("req", "tree_cache", "checkpoint"),
    ),
    _hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        after_init_new,
        "offsets positions behind a context, plans the scoring",
        ("batch", "model_runner"),
    ),
    _hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",
        "after",
        after_init_attention_backends,
        "scoring runs after the attention backend's forward",
    ),
    _hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs",
        "after",
        after_init_cuda_graphs,
        "decode graphs for heads of different length",
    ),
    _hook(
        f"{_DECODE_GRAPHS}.can_run_graph",
        "around",
        around_can_run_graph,
        "decode batches with heads of different length do not run in SGLang's graphs",
        ("forward_batch",),
    ),
    _hook(f"{_DECODE_GRAPHS}.execute", "around", around_execute_graph, "but in ours", ("forward_batch",)),
    _hook(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph",
        "around",
        around_can_run_graph,
        "prefill batches with such heads run eagerly, and those that compress",
        ("forward_batch",),
    ),
    _use(_DECODE_GRAPHS, "call", "captures our decode graphs", ("model_runner", "attn_backend")),
    _use(
        "sglang.srt.layers.attention.base_attn_backend.AttentionBackend",
        "subclass",
        "the attention in them: init_cuda_graph_state, get_cuda_graph_seq_len_fill_value, shared_read_ends, "
        "init_forward_metadata_in_graph, forward_decode",
    ),
    _use(
        "sglang.srt.layers.attention.base_attn_backend.SharedReadEnds.POST_REPLAY", "read", "they read the page table to the end"
    ),
    _hook(
        f"{_POOL}._create_buffers_normal",
        "around",
        around_create_buffers_normal,
        "all layers' K and V in one address space, for heads of different length",
    ),
    _hook(f"{_TREE}.take_events", "after", after_take_events, "KV events never carry virtual tokens"),
    _use(_REQ, "subclass", "ContextReq, CompressionJob; fields origin_input_ids, full_untruncated_fill_ids, kv, cached_tokens"),
    _use(
        f"{_REQ}.init_next_round_input", "subclass", "the last check that virtual ids are resident", ("tree_cache", "cow_mamba")
    ),
    _use(f"{_REQ}._compute_max_prefix_len", "subclass", "leaves the window to be computed", ("input_len",)),
    _use(f"{_REQ}.__init__", "call", "our requests", (*_REQ_POSITIONAL, "extra_key", "cache_salt", "lora_id")),
    _use(f"{_REQ}.set_finish_with_abort", "call", "answers a wrong request", ("error_msg", "status_code")),
    _use(f"{_SCHEDULER}.collect_inflight_reqs", "call", "the readers of a context"),
    _use(f"{_TREE}.match_prefix", "call", "what of a context and its suffixes is in the tree", ("params",)),
    _use(
        "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface.collect_path_info",
        "call",
        "whether a context's node is still there, without using it; ids of nodes are never used again",
        ("end_node_ids",),
    ),
    _use(f"{_TREE}.insert", "call", "a context's node", ("params",)),
    _use(f"{_TREE}.lock", "call", "holds a node while it is made or pinned", ("node_id",)),
    _use(f"{_TREE}.unlock", "call", "lets it be evicted", ("lock",)),
    _use(f"{_TREE}.evictable_size", "call", "whether a node is locked by a request"),
    _use(f"{_TREE}._drop_subtree_no_host", "call", "frees a context's slots", ("node_id", "tracker")),
    _use("sglang.srt.mem_cache.common.evict_from_tree_cache", "call", "room for a context's slots", ("tree_cache", "num_tokens")),
    _use(
        "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer",
        "subclass",
        "stream_output, is_request_level_customized_info_key",
    ),
    _use(
        "sglang.srt.managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper",
        "read",
        "_pending: somebody waits for the engine to become idle",
    ),
    _use("sglang.srt.disaggregation.utils.prepare_abort", "call", "ends a job that makes way", ("req", "error_message")),
    _use(
        "sglang.srt.managers.schedule_batch.FINISH_ABORT",
        "call",
        "ends a request whose forward failed",
        ("message", "status_code"),
    ),
    _use(f"{_SCHEDULER}.process_batch_result", "call", "takes the result of a forward before a flush"),
    _use("sglang.srt.disaggregation.kv_events.BlockStored", "read", "block_hashes, parent_block_hash, token_ids"),
    _use("sglang.srt.disaggregation.kv_events.BlockRemoved", "read", "block_hashes"),
    _use("sglang.srt.managers.schedule_batch.FINISH_LENGTH", "call", "ends a request that only compresses", ("length",)),
    _use(f"{_POOL}.get_key_buffer", "call", "K of a layer, [slots, heads, dim]", ("layer_id",)),
    _use(f"{_POOL}.get_value_buffer", "call", "V of a layer", ("layer_id",)),
    _use(f"{_POOL}._kv_buffer_shapes", "call", "the shapes of a layer's K and V"),
    _use(
        f"{_POOL}.set_kv_buffer",
        "call",
        "new K and V, where our attention is the only one",
        ("layer", "loc_info", "cache_k", "cache_v"),
    ),
    *(
        _use(f"sglang.srt.models.{module}.{name}Attention", "read", "attn, and the gains of o_proj: scores across layers")
        for module, name in (
            ("llama", "Llama"),
            ("qwen2", "Qwen2"),
            ("qwen3", "Qwen3"),
            ("qwen2_moe", "Qwen2Moe"),
            ("qwen3_moe", "Qwen3Moe"),
        )
    ),
    _use(
        "sglang.srt.layers.quantization.base_config.LinearMethodBase.apply",
        "call",
        "unit vectors through o_proj",
        ("layer", "x", "bias"),
    ),
    _use("sglang.srt.mem_cache.memory_pool.KVWriteLoc", "call", "where new K and V go", ("loc", "swa_loc")),
    _use(
        "sglang.kernels.ops.attention.decode_attention.decode_attention_fwd",
        "call",
        "decode over heads of different length on GPUs",
        (
            "q",
            "k_buffer",
            "v_buffer",
            "o",
            "kv_indptr",
            "kv_indices",
            "attn_logits",
            "attn_lse",
            "num_kv_splits",
            "max_kv_splits",
        ),
    ),
    _use(
        "sglang.kernels.ops.attention.extend_attention.extend_attention_fwd_unified",
        "call",
        "prefill over heads of different length on GPUs",
        ("q", "o", "k_buffer", "v_buffer", "k_scale", "v_scale", "qo_indptr", "kv_indptr", "kv_indices", "prefix_lens"),
    ),
    _use(
        "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend",
        "read",
        "the log-sum-exps of prefill_wrapper_ragged and forward_metadata.prefill_wrappers",
    ),
    _use("sglang.srt.constants.GPU_MEMORY_TYPE_KV_CACHE", "read", "the memory saver's region for the pool"),
)
