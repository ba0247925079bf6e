"""What stands where in one scheduler process: the manager, the plan of the forward, and the wrappers around attention.

Everything hangs on SGLang's own objects, and is found from there (`Wiring.of`): on the model runner, and on the scheduler and its
tree. Nothing is global, and a draft model has none.

Around the attention backend's `forward` stand, from the inside out:

    1. `gpu.attention_lse.leave_lse`   asks the backend for its log-sum-exps too. First, because it calls the backend's own function.
    2. `HeadOverlay.over`              replaces the rows of requests after contexts with per-head budgets, which the backend got wrong.
    3. `forward.score_after`           scores and copies. Last, because scores read the right outputs, and copies what they overwrite.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.disaggregation.kv_events import uses_dynamo_format
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_parallel

from obcache_sglang.compress.head_gains import head_gains
from obcache_sglang.compress.rotary import attention_layers, attentions
from obcache_sglang.compress.scores import accumulate_scores_in_slots
from obcache_sglang.cpu.attention import CpuAttentionBackend
from obcache_sglang.errors import HostError
from obcache_sglang.host import use
from obcache_sglang.kv.files import DTYPES
from obcache_sglang.kv.folder import Folder
from obcache_sglang.scheduler.context_files import ContextFiles
from obcache_sglang.scheduler.engine_view import EngineView
from obcache_sglang.scheduler.forward import ForwardPlan, score_after
from obcache_sglang.scheduler.kv_events import VisibleEvents
from obcache_sglang.scheduler.manager import CompressionManager
from obcache_sglang.scheduler.metrics import Metrics
from obcache_sglang.scheduler.rank_gates import RankGates, read_back_keys
from obcache_sglang.scheduler.served_model import choosers, served_model
from obcache_sglang.settings import ServerSettings, server_secret

if TYPE_CHECKING:
    from obcache_sglang.gpu.head_graphs import HeadGraphs
    from obcache_sglang.gpu.overlay import HeadOverlay

logger = logging.getLogger(__name__)

_ATTRIBUTE = "obcache_wiring"


class Wiring:
    """Of one model runner, and of the scheduler that has it.

    plan: what happens in the current forward. overlay, graphs: attention over per-head budgets on a GPU, where there is one.
    manager: once the scheduler is complete. events: of the scheduler's tree.
    """

    def __init__(self, plan: ForwardPlan, overlay: HeadOverlay | None = None, graphs: HeadGraphs | None = None) -> None:
        self.plan = plan
        self.overlay = overlay
        self.graphs = graphs
        self.manager: CompressionManager | None = None
        self.events = VisibleEvents()

    @staticmethod
    def of(owner: Any) -> Wiring | None:
        """What hangs on one of SGLang's objects; None where it has none of ours."""
        return getattr(owner, _ATTRIBUTE, None)

    def hang_on(self, *owners: Any) -> None:
        for owner in owners:
            setattr(owner, _ATTRIBUTE, self)

    # --- the model's side -------------------------------------------------------------------------------------------

    @classmethod
    def for_model(cls, model_runner: Any, settings: ServerSettings) -> Wiring:
        """Puts our wrappers around this model's attention calls."""
        plan = ForwardPlan(
            model_runner.token_to_kv_pool,
            model_runner.req_to_token_pool,
            _scoring(model_runner),
            head_gains(model_runner.model, model_runner.dtype),
        )
        if settings.gates is not None:
            read_back_keys(plan.compressor, model_runner)
        if settings.hidden_gates is not None:
            _watch_hidden_states(model_runner.model, plan)
        overlay = _head_overlay(plan, model_runner, settings)
        backends = {id(b): b for b in (model_runner.attn_backend, model_runner.decode_attn_backend) if b is not None}.values()
        for backend in backends:
            if isinstance(backend, CpuAttentionBackend):
                backend.plan = plan
            elif torch.device(model_runner.device).type == "cuda":
                from obcache_sglang.gpu.attention_lse import leave_lse

                backend.forward = leave_lse(backend, plan)
            if overlay is not None:
                backend.forward = overlay.over(backend.forward)
            backend.forward = score_after(backend.forward, plan)
        plan.attends_uneven_heads = overlay is not None or all(isinstance(b, CpuAttentionBackend) for b in backends)
        return cls(plan, overlay)

    def capture_graphs(self, model_runner: Any, settings: ServerSettings) -> None:
        """Captures decode graphs for per-head budgets where they are wanted and SGLang captured its own."""
        if self.overlay is None:
            return
        if model_runner.decode_cuda_graph_runner is None and settings.decode_graphs != "on":
            return  # no batch of this server decodes in graphs
        if not settings.captures_decode_graphs:
            if settings.compression.budget != "uniform":
                logger.warning(
                    "obcache: decode batches with per-head budgets (--obcache-budget %s) run eagerly and several times slower. Set "
                    "--obcache-decode-graphs on, with --obcache-head-attention triton, to capture CUDA graphs for them. "
                    "--obcache-budget uniform needs none.",
                    settings.compression.budget,
                )
            return
        from obcache_sglang.gpu.head_graphs import HeadGraphs
        from obcache_sglang.gpu.triton_heads import TritonHeads

        if not HeadGraphs.possible(model_runner):
            logger.warning(
                "obcache: CUDA graphs are off for contexts with per-head budgets: SGLang captured no decode graphs, or LoRA or DP "
                "attention is enabled. Such batches run eagerly and several times slower."
            )
            return
        assert isinstance(self.overlay.heads, TritonHeads), "settings exclude others"
        logger.info("obcache: capturing decode graphs for contexts with per-head budgets")
        try:
            self.graphs = HeadGraphs.capture(self.plan, self.overlay.heads, model_runner)
        except Exception:
            logger.exception("obcache: capturing decode graphs failed; decode batches with per-head budgets run eagerly")

    def may_run_graph(self, can_run_graph: Callable[..., bool], runner: Any, forward_batch: Any) -> bool:
        """SGLang's graphs were captured without scoring, and with one length for all heads."""
        if not (self.plan.is_scored(forward_batch) or self.plan.uneven_contexts(forward_batch)):
            return bool(can_run_graph(runner, forward_batch))
        if self.graphs is None or runner is not self.graphs.beside or not can_run_graph(runner, forward_batch):
            return False
        try:
            return self.graphs.prepare(forward_batch)
        except Exception:
            logger.exception("obcache: preparing a decode graph failed; its batch runs eagerly")
            return False

    def graphs_for(self, runner: Any, forward_batch: Any) -> Any | None:
        """The runner of our graphs for a batch that `may_run_graph` prepared; None for all others."""
        graphs = self.graphs
        if graphs is not None and runner is graphs.beside and self.plan.uneven_contexts(forward_batch):
            return graphs.runner
        return None

    # --- the scheduler's side ---------------------------------------------------------------------------------------

    def add_manager(self, scheduler: Any, settings: ServerSettings) -> None:
        """Makes the scheduler's manager. Raises HostError where the pool or the tree cannot hold compressed contexts."""
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        if type(pool) is not MHATokenToKVPool or type(scheduler.tree_cache) is not UnifiedRadixCache:
            raise HostError(
                f"--obcache needs SGLang's MHATokenToKVPool and UnifiedRadixCache, but this server has {type(pool).__name__} and "
                f"{type(scheduler.tree_cache).__name__}. Serve a model with ordinary attention, and leave the radix cache on."
            )
        refusal = _uneven_refusal(self.plan, scheduler.server_args)
        if refusal is not None and settings.compression.budget != "uniform":
            raise HostError(
                f"--obcache-budget={settings.compression.budget} cannot be served here: {refusal}. Set --obcache-budget uniform."
            )
        compressor = self.plan.compressor
        num_heads = scheduler.model_config.get_total_num_kv_heads()
        # As SGLang divides them; where there are fewer heads than ranks, several ranks have the same one.
        first = get_parallel().attn_tp_rank * num_heads // get_parallel().attn_tp_size
        compressor.lanes = (first, first + pool.head_num)
        rank_gates = RankGates(scheduler, compressor)
        rank_gates.load(settings)
        group_size = scheduler.attn_tp_group.world_size
        self.plan.agree = _agreement(scheduler.attn_tp_cpu_group, group_size)
        if group_size > 1:
            self.plan.mean_over_ranks = lambda tensor: scheduler.attn_tp_group.all_reduce(tensor) / group_size
        reporter = scheduler.metrics_reporter
        labels = dict(scheduler.metrics_collector.labels) if reporter.enable_metrics else {}
        self.manager = CompressionManager(
            EngineView(scheduler),
            settings,
            Metrics.create(reporter.enable_metrics, labels),
            uneven_refusal=refusal,
            agree=self.plan.agree,
            clock=time.time if group_size == 1 else None,
            secret=server_secret(),
            layers=attention_layers(scheduler.tp_worker.model_runner.model),
            compress_layer=self.plan.compress_layer,
            rank_gates=rank_gates,
            files=self._files(scheduler, settings, pool),
        )
        is_dynamo = uses_dynamo_format(scheduler.server_args.kv_events_config)
        self.events = VisibleEvents(scheduler.kv_event_lora_names, dynamo_format=is_dynamo)
        self.manager.calibration.begin_if_asked(settings)
        if settings.preload:
            self.manager.stored.preload()

    def _files(self, scheduler: Any, settings: ServerSettings, pool: MHATokenToKVPool) -> ContextFiles | None:
        """Where this rank's files of contexts lie. Raises ConfigError where they cannot."""
        if settings.folder is None:
            return None
        served = served_model(scheduler, pool)
        if served.dtype not in DTYPES:
            raise HostError(
                f"--obcache-folder cannot write a KV cache of {pool.dtype}. Set --kv-cache-dtype auto, or leave the folder out."
            )
        most_bytes = None if settings.folder_gb is None else int(settings.folder_gb * 1e9)
        folder = Folder.opened(settings.folder)
        return ContextFiles(folder, served, choosers(settings), pool, self.plan.space, settings.save, most_bytes)


def manager_of(owner: Any) -> CompressionManager | None:
    """The manager of a scheduler, or of its tree; None where there is none."""
    wiring = Wiring.of(owner)
    return None if wiring is None else wiring.manager


def _agreement(cpu_group: Any, group_size: int) -> Callable[[bool], bool]:
    """Whether all ranks say True: a collective on the host."""

    def agree(verdict: bool) -> bool:
        if group_size == 1:
            return verdict
        votes = torch.tensor([int(verdict)])
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=cpu_group)
        return bool(votes.item())

    return agree


def _uneven_refusal(plan: ForwardPlan, server_args: Any) -> str | None:
    """Why per-head budgets cannot be served in this process, or None."""
    if plan.space is None:
        return f"the KV pool (layout {plan.kv_pool.kv_cache_layout}) does not hold all layers in one address space"
    if plan.space.k.dtype.itemsize < 2:
        return f"attention over per-head budgets does not apply the scales of a {plan.space.k.dtype} KV cache"
    if not plan.attends_uneven_heads:
        return f"attention backend {server_args.attention_backend} on {plan.kv_pool.device} does not support per-head budgets"
    return None


def _watch_hidden_states(model: torch.nn.Module, plan: ForwardPlan) -> None:
    """The plan sees what each layer's attention takes in. Raises HostError for a model that does not pass it by that name."""
    for name, module in attentions(model):
        if "hidden_states" not in inspect.signature(module.forward).parameters:
            raise HostError(
                f"--obcache-hidden-gates reads hidden states, which {type(module).__name__} ({name}) does not take. It needs SGLang's own "
                "implementation of a Llama or Qwen model. Serve without hidden gates."
            )
        module.register_forward_pre_hook(plan.before_attention, with_kwargs=True)


def _scoring(model_runner: Any) -> Callable[..., None]:
    """How tokens in the pool are scored: on GPUs by a kernel that reads them where they lie."""
    if torch.device(model_runner.device).type != "cuda":
        return accumulate_scores_in_slots
    # Not every machine can import kernels.
    from obcache_sglang.gpu.score_kernel import accumulate_scores_paged

    return accumulate_scores_paged


def _head_overlay(plan: ForwardPlan, model_runner: Any, settings: ServerSettings) -> HeadOverlay | None:
    """Attention over per-head budgets on a GPU; None where there is none, or no such contexts can be."""
    if plan.space is None or plan.space.k.device.type != "cuda":
        return None
    # These import kernels, which not every machine can.
    from obcache_sglang.gpu.flashinfer_heads import FlashInferHeads
    from obcache_sglang.gpu.overlay import HeadOverlay
    from obcache_sglang.gpu.triton_heads import TritonHeads

    table, space = model_runner.req_to_token_pool.req_to_token, plan.space
    num_heads = model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size
    if settings.head_attention == "flashinfer":
        workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=space.k.device)
        return HeadOverlay(plan, FlashInferHeads(space, table, num_heads, model_runner.dtype, workspace))
    return HeadOverlay(plan, TritonHeads(space, table, num_heads))


TOUCHES = (
    use(
        "sglang.srt.model_executor.runner.base_runner.BaseRunner",
        "read",
        "model_runner, on which our wiring of a model hangs",
        ("model_runner",),
    ),
    use(
        "sglang.srt.models.llama.LlamaAttention.forward",
        "read",
        "hidden_states, by keyword: what hidden gates score",
        ("hidden_states",),
    ),
    use("sglang.srt.models.qwen2.Qwen2Attention.forward", "read", "likewise", ("hidden_states",)),
    use("sglang.srt.models.qwen3.Qwen3Attention.forward", "read", "likewise", ("hidden_states",)),
    use("sglang.srt.disaggregation.kv_events.uses_dynamo_format", "call", "the format of KV events", ("kv_events_config",)),
    use(
        "sglang.srt.managers.scheduler.Scheduler.init_kv_event_lora_names",
        "read",
        "kv_event_lora_names: what adapter an event is of",
    ),
    use("sglang.srt.managers.tp_worker.TpModelWorker", "read", "model_runner: the scheduler's way to it"),
)
