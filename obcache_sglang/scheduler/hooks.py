"""Where SGLang's scheduler process calls us: one table of hooks, each a few lines. Without `--obcache` none is registered.

Whatever fails in a hook is logged, and SGLang goes on as if the hook were not there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from http import HTTPStatus
from typing import Any, TypeVar

from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput, GetInternalStateReqOutput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.runtime_context import get_parallel

from obcache_sglang.errors import RequestError
from obcache_sglang.host import Touch, scheduler_hook, use
from obcache_sglang.messages import KEY, control_call
from obcache_sglang.scheduler import control_calls
from obcache_sglang.scheduler.requests import REQ_POSITIONAL, CompressionJob, client_view, is_decided
from obcache_sglang.scheduler.start_hooks import hooks_in_place
from obcache_sglang.scheduler.wiring import Wiring, manager_of
from obcache_sglang.support import NO_HICACHE_STORAGE

logger = logging.getLogger(__name__)

BUSY_SLEEP_MILLISECONDS = 2
"""An idle scheduler sleeps so long between two steps of what it does then: files, which threads read and write meanwhile, compressions and calibration."""

Hook = TypeVar("Hook", bound=Callable[..., Any])


def _contained(what: str) -> Callable[[Hook], Hook]:
    """An after hook whose failure is logged, and changes nothing: a defect of ours must not end the scheduler."""

    def decorate(hook: Hook) -> Hook:
        @wraps(hook)
        def contained(result: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(result, *args, **kwargs)
            except Exception:
                logger.exception("obcache: %s failed", what)
                return result

        return contained  # type: ignore[return-value]

    return decorate


# --- requests ----------------------------------------------------------------------------------------------------------------


def around_create_generation_req(create: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Req:
    """A request with a plan becomes a ContextReq; all others are SGLang's own.

    One that names its context by id gets the document or an error: its prompt is the question alone.
    """
    params = recv_req.sampling_params.custom_params
    plan = params.get(KEY) if isinstance(params, dict) else None
    manager = manager_of(scheduler)
    if manager is None or not isinstance(plan, dict):
        return create(scheduler, recv_req, *args, **kwargs)
    try:
        # A session calls with keywords only.
        return manager.create_request({**dict(zip(REQ_POSITIONAL, args, strict=False)), **kwargs}, plan)
    except RequestError as error:
        message, status_code = str(error), error.status_code
    except Exception as error:
        logger.exception("obcache: creating request %s with its context failed", recv_req.rid)
        message = f"The context of this request could not be used: internal error, {type(error).__name__}. Send the whole prompt."
        status_code = 500
        if plan.get("context_id") is None:
            return create(scheduler, recv_req, *args, **kwargs)
    req = create(scheduler, recv_req, *args, **kwargs)
    req.set_finish_with_abort(message, status_code=HTTPStatus(status_code))
    return req


def around_get_new_batch_prefill_raw(pick: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    manager = manager_of(scheduler)
    if manager is None:
        return pick(scheduler, *args, **kwargs)
    picked = False

    def pick_once(**kw: Any) -> Any:
        nonlocal picked
        picked = True
        return pick(scheduler, *args, **kw)

    try:
        return manager.schedule(pick_once, **kwargs)
    except Exception:
        if picked:  # SGLang's own failure, or a batch that would be lost
            raise
        logger.exception("obcache: a scheduling pass failed; SGLang picks the batch without it")
        return pick(scheduler, *args, **kwargs)


def around_maybe_sleep_on_idle(sleep: Any, scheduler: Any) -> None:
    """With `--sleep-on-idle` an idle scheduler makes one pass a second: what is done then would be done at one step a second."""
    manager, is_busy = manager_of(scheduler), False
    try:
        is_busy = manager is not None and (
            manager.stored.is_busy or manager.in_place.is_busy or manager.when_idle.is_due or manager.calibration.is_due
        )
    except Exception:
        logger.exception("obcache: asking what an idle scheduler has to do failed")
    if is_busy and scheduler.idle_sleeper is not None:
        # A request ends it at once, as it ends SGLang's own sleep.
        scheduler.idle_sleeper.poller.poll(BUSY_SLEEP_MILLISECONDS)
    else:
        sleep(scheduler)


def around_add_one_req(add_one_req: Any, adder: Any, req: Req, *args: Any, **kwargs: Any) -> Any:
    """SGLang counts the slots that a request's own tokens take; the final prefill of a compression takes those of its kept tokens too."""
    if not is_decided(req):
        # Its context went while the batch was picked: it stays in the queue, and the next pass decides.
        return AddReqResult.CONTINUE
    manager, more = manager_of(adder.tree_cache), 0
    try:
        more = 0 if manager is None else manager.jobs.slots_to_admit(req)
    except Exception:
        logger.exception("obcache: counting the slots of request %s failed", req.rid)
    adder.memory_budget.total_offset += more
    try:
        return add_one_req(adder, req, *args, **kwargs)
    finally:
        if more and not any(each is req for each in adder.can_run_list):
            adder.memory_budget.total_offset -= more


@_contained("adding a request to the queue while a batch was picked")
def after_add_request_to_queue(result: None, scheduler: Any, req: Req, *args: Any, **kwargs: Any) -> None:
    if (manager := manager_of(scheduler)) is not None:
        manager.queued(req)


@_contained("ending compressions after an abort")
def after_abort_request(result: None, scheduler: Any, recv_req: Any) -> None:
    if (manager := manager_of(scheduler)) is not None:
        manager.jobs.end_unawaited()


def around_release_kv_cache(release: Any, req: Req, tree_cache: Any, *, checkpoint: bool) -> None:
    manager = manager_of(tree_cache)
    if manager is not None and type(req) is not Req and req.kv.holds_kv:
        try:
            manager.before_release(req, checkpoint=checkpoint)
        except Exception:
            logger.exception("obcache: releasing request %s failed", req.rid)
    release(req, tree_cache, checkpoint=checkpoint)


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
                    logger.exception("obcache: answers could not be corrected, and count virtual tokens")
                super().stream_output(shown, *args, **kwargs)

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == KEY or super().is_request_level_customized_info_key(key)

    return ObcacheOutputStreamer


# --- the forward -------------------------------------------------------------------------------------------------------------


@_contained("reserving slots")
def after_prepare_for_extend(result: None, batch: Any) -> None:
    if (manager := manager_of(batch.tree_cache)) is not None:
        manager.jobs.reserve(batch)


def after_init_new(forward_batch: Any, cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    if (wiring := Wiring.of(model_runner)) is not None:
        wiring.plan.plan_forward(forward_batch, batch)


def around_can_run_graph(can_run_graph: Any, runner: Any, forward_batch: Any) -> bool:
    wiring = Wiring.of(runner.model_runner)
    if wiring is None:
        return bool(can_run_graph(runner, forward_batch))
    return wiring.may_run_graph(can_run_graph, runner, forward_batch)


def around_execute_graph(execute: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    wiring = Wiring.of(runner.model_runner)
    ours = None if wiring is None else wiring.graphs_for(runner, forward_batch)
    if ours is not None:
        return ours.execute(forward_batch, *args, **kwargs)
    return execute(runner, forward_batch, *args, **kwargs)


# --- the cache ---------------------------------------------------------------------------------------------------------------


def around_flush_cache(flush: Any, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    manager = manager_of(scheduler)
    if manager is None:
        return bool(flush(scheduler, *args, **kwargs))
    try:
        manager.before_flush()
    except Exception:
        logger.exception("obcache: preparing a cache flush failed")
    flushed = bool(flush(scheduler, *args, **kwargs))
    if flushed:
        try:
            manager.after_flush()
        except Exception:
            logger.exception("obcache: cleaning up after a cache flush failed")
    return flushed


@_contained("forgetting the contexts of an unloaded LoRA adapter")
def after_unload_lora_adapter(result: Any, scheduler: Any, recv_req: Any) -> Any:
    if (manager := manager_of(scheduler)) is not None and recv_req.lora_id is not None:
        manager.forget_adapter(recv_req.lora_id)
    return result


def before_weight_update(updater: Any, *args: Any, **kwargs: Any) -> None:
    try:
        if (manager := manager_of(updater.scheduler)) is not None:
            manager.stored.turn_off("the model's weights were updated")
            manager.calibration.give_up("The model's weights were updated meanwhile. Calibrate again.")
    except Exception:
        logger.exception("obcache: turning the files of contexts off failed")


@_contained("filtering KV events")
def after_take_events(events: list[Any], tree_cache: Any) -> list[Any]:
    """KV events without virtual tokens, and with the real ones of the contexts that are held."""
    wiring, manager = Wiring.of(tree_cache), manager_of(tree_cache)
    return events if wiring is None else wiring.events.of(events, None if manager is None else manager.cache)


def around_attach_hicache_storage(attach: Any, scheduler: Any, recv_req: Any) -> Any:
    """What is refused when the server starts is refused later too: storage would hold virtual tokens, under names that mean nothing."""
    if manager_of(scheduler) is None:
        return attach(scheduler, recv_req)
    return AttachHiCacheStorageReqOutput(success=False, message=f"--obcache cannot be used with it: {NO_HICACHE_STORAGE}.")


def around_get_internal_state(get_internal_state: Any, scheduler: Any, recv_req: Any) -> Any:
    call = None
    try:
        call, manager = control_call(recv_req.rid), manager_of(scheduler)
        if manager is None or call is None:
            return get_internal_state(scheduler, recv_req)
        answer = control_calls.answer(manager, call)
        if call["op"] == "status":
            answer["hooks"] = hooks_in_place()
    except Exception as error:
        # Not the call itself: whoever has a whole context id can open the context.
        logger.exception("obcache: control call %s failed", call.get("op") if isinstance(call, dict) else "that cannot be read")
        answer = {"ok": False, "status_code": 500, "error": f"{type(error).__name__}: {error}"}
    answer["dp_rank"] = get_parallel().dp_rank or 0
    return GetInternalStateReqOutput(internal_state=answer)


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_DECODE_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"


TOUCHES: tuple[Touch, ...] = (
    scheduler_hook(
        f"{_SCHEDULER}._create_generation_req",
        "around",
        around_create_generation_req,
        "a request that asks for compression becomes a ContextReq",
        ("recv_req",),
    ),
    scheduler_hook(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        "around",
        around_get_new_batch_prefill_raw,
        "decides for waiting requests, starts jobs, holds back who waits for one",
        ("prefill_delayer_single_pass", "running_batch"),
    ),
    scheduler_hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        "around",
        around_add_one_req,
        "a compression is admitted when its kept tokens fit as well",
        ("req",),
    ),
    scheduler_hook(f"{_SCHEDULER}.abort_request", "after", after_abort_request, "ends jobs nobody waits for", ("recv_req",)),
    scheduler_hook(
        f"{_SCHEDULER}.flush_cache",
        "around",
        around_flush_cache,
        "what nobody waits for makes way; and the tree was reset: every context is gone",
    ),
    scheduler_hook(
        f"{_SCHEDULER}._add_request_to_queue",
        "after",
        after_add_request_to_queue,
        "what comes into the queue while a batch is picked (structured output, preemption) waits for a decision",
        ("req",),
    ),
    scheduler_hook(
        f"{_SCHEDULER}.unload_lora_adapter",
        "after",
        after_unload_lora_adapter,
        "an adapter's contexts go with it",
        ("recv_req",),
    ),
    scheduler_hook(
        f"{_SCHEDULER}.attach_hicache_storage_wrapped",
        "around",
        around_attach_hicache_storage,
        "storage cannot hold compressed contexts",
        ("recv_req",),
    ),
    *(
        scheduler_hook(
            f"sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.{name}",
            "before",
            before_weight_update,
            "files of contexts are of the weights that the server began with",
        )
        for name in (
            "update_weights_from_disk",
            "update_weights_from_distributed",
            "update_weights_from_tensor",
            "update_weights_from_ipc",
        )
    ),
    scheduler_hook(
        f"{_SCHEDULER}.get_internal_state", "around", around_get_internal_state, "control calls of the endpoints", ("recv_req",)
    ),
    scheduler_hook(
        f"{_SCHEDULER}.get_output_streamer_class",
        "around",
        around_get_output_streamer_class,
        "clients see real prompts, real cached-token counts and no jobs",
    ),
    scheduler_hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        "after",
        after_prepare_for_extend,
        "reserves a job's slots before its final prefill runs",
    ),
    scheduler_hook(
        "sglang.srt.mem_cache.common.release_kv_cache",
        "around",
        around_release_kv_cache,
        "a job ends here: publish the context, or take it back",
        ("req", "tree_cache", "checkpoint"),
    ),
    scheduler_hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        after_init_new,
        "offsets positions after a context, plans the scoring",
        ("batch", "model_runner"),
    ),
    scheduler_hook(
        f"{_DECODE_GRAPHS}.can_run_graph",
        "around",
        around_can_run_graph,
        "decode batches with per-head budgets do not run in SGLang's graphs",
        ("forward_batch",),
    ),
    scheduler_hook(f"{_DECODE_GRAPHS}.execute", "around", around_execute_graph, "but in ours", ("forward_batch",)),
    scheduler_hook(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph",
        "around",
        around_can_run_graph,
        "prefill batches with such heads run eagerly, and those that compress",
        ("forward_batch",),
    ),
    scheduler_hook(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.take_events",
        "after",
        after_take_events,
        "KV events never carry virtual tokens",
    ),
    scheduler_hook(
        f"{_SCHEDULER}.maybe_sleep_on_idle",
        "around",
        around_maybe_sleep_on_idle,
        "sleeps shortly while files are read or written, contexts compressed when idle, or gates made",
    ),
    use(
        "sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper",
        "read",
        "poller: what an idle scheduler waits for; idle_sleeper of the scheduler",
    ),
    use("sglang.srt.managers.schedule_policy.AddReqResult.CONTINUE", "read", "a request that is not admitted, and ends nothing"),
    use(
        "sglang.srt.mem_cache.prefill_budget.PrefillBudget.remaining_total",
        "read",
        "total_offset: slots that are spoken for; can_run_list: whom the adder has taken",
    ),
    use(
        "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer",
        "subclass",
        "stream_output, is_request_level_customized_info_key",
    ),
)
