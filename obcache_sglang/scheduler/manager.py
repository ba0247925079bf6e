"""The decisions of one scheduler: which context a waiting request uses, and when a compression starts and ends.

Ranks of one tensor-parallel group run this in step: everything is decided from the requests and the pool, which they
share, never from clocks of their own.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_LENGTH

from obcache_sglang.errors import RequestError
from obcache_sglang.host import use
from obcache_sglang.kv.context import Context, ContextState
from obcache_sglang.messages import Plan
from obcache_sglang.scheduler.calibration import Calibration
from obcache_sglang.scheduler.calibration_run import settings_with
from obcache_sglang.scheduler.context_cache import ContextCache
from obcache_sglang.scheduler.context_files import ContextFiles
from obcache_sglang.scheduler.engine_view import EngineView
from obcache_sglang.scheduler.idle import WhenIdle
from obcache_sglang.scheduler.in_place import InPlace
from obcache_sglang.scheduler.jobs import Jobs
from obcache_sglang.scheduler.lineage import find_again, known_settings, longest_prefix
from obcache_sglang.scheduler.metrics import Metrics
from obcache_sglang.scheduler.named import named, namespace_of
from obcache_sglang.scheduler.pressure import UnderPressure
from obcache_sglang.scheduler.requests import MAX_COMPRESSIONS_PER_REQUEST, CompressionJob, ContextReq, Verdict, is_decided
from obcache_sglang.scheduler.room import Room
from obcache_sglang.scheduler.shared_prefixes import SharedPrefixes
from obcache_sglang.scheduler.starvation import end_a_waiting_segment, not_starved
from obcache_sglang.scheduler.stored import StoredContexts
from obcache_sglang.settings import ServerSettings

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from obcache_sglang.scheduler.rank_gates import RankGates

logger = logging.getLogger(__name__)


class CompressionManager:
    """Compresses contexts for one SGLang scheduler.

    uneven_refusal: why budgets other than uniform cannot be served here; None where they can.
    agree: whether all ranks of this scheduler's tensor-parallel group say True; called by all of them at the same point.
    clock: seconds since the epoch; None with several ranks, whose clocks differ: then the stamps that requests carry tell the time.
    secret: as in ContextCache.
    layers, compress_layer: as in InPlace. files: of the contexts that last, with --obcache-folder.
    rank_gates: where gates that this server makes are made and take effect; None where there is no model.
    """

    def __init__(
        self,
        engine: EngineView,
        settings: ServerSettings,
        metrics: Metrics,
        *,
        uneven_refusal: str | None,
        agree: Callable[[bool], bool],
        clock: Callable[[], float] | None,
        secret: bytes = b"",
        layers: Sequence[Any] = (),
        compress_layer: Callable[..., None] | None = None,
        rank_gates: RankGates | None = None,
        files: ContextFiles | None = None,
    ) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.uneven_refusal, self.clock = uneven_refusal, clock
        self.cache = ContextCache(engine.tree, settings.max_contexts, secret, on_evicted=metrics.evicted)
        self.room = Room(engine, self.cache, settings.max_pinned_slots)
        self.jobs = Jobs(engine, self.cache, self.room, metrics, agree=agree, secret=secret)
        self.in_place = InPlace(self.jobs, layers, compress_layer)
        self.stored = StoredContexts(self.jobs, files)
        self.under_pressure = UnderPressure(self.in_place, settings)
        self.when_idle = WhenIdle(self.under_pressure)
        self.calibration = Calibration(self.in_place, rank_gates, self._use_gates)
        self._prefixes, self._now = SharedPrefixes(secret), 0.0

    # --- arrival ----------------------------------------------------------------------------------------------------

    def create_request(self, fields: dict[str, Any], plan: dict[str, Any]) -> ContextReq:
        """The request of a plan. fields: the arguments of SGLang's Req, by name. A context id is replaced by the context's own tokens.

        Raises RequestError where the id names no context of the request's namespace, or this server cannot serve the budget.
        """
        self.advance_clock(float(plan.get("now", 0.0)))
        settled = Plan.from_dict(plan)
        if settled.finds_boundary and settled.exact is None:
            settled = self._prefixes.plan(settled, namespace_of(fields), fields["origin_input_ids"], self.settings.min_tokens)
        if settled.context_id is not None:
            settled, fields = named(self.cache, settled, fields)
        elif settled.settings.budget != "uniform" and self.uneven_refusal is not None:
            raise RequestError(
                f"budget={settled.settings.budget!r} cannot be served here: {self.uneven_refusal}. Set budget=uniform."
            )
        self.calibration.offer(settled, namespace_of(fields), fields["origin_input_ids"])
        req = ContextReq(**fields, plan=settled, count_exact=self.metrics.exact)
        self.room.let_pass(req)
        return req

    # --- a scheduling pass ------------------------------------------------------------------------------------------

    def schedule(self, pick_prefill_batch: Callable[..., Any], running_batch: ScheduleBatch, **kwargs: Any) -> Any:
        """One pass of SGLang's prefill admission, in which requests that wait for a compression are left out.

        They stay where aborts, timeouts and the idle check look for them: in the waiting queue, in their order. What comes into the
        queue during the pass waits for the next one.
        """
        started_at = time.perf_counter()
        engine = self.engine
        engine.running_batch, engine.late = running_batch, []
        order = admitted = engine.queue
        try:
            if admitted:
                self.jobs.make_room_for_segments()
                self.room.make(self.room.tight_slots)
            self.in_place.advance()
            self.calibration.advance()
            self.stored.advance()
            if not engine.admits_nobody():
                order, admitted = self._decide()
                # What was compressed in this pass changes what others read: these are decided on in the next one.
                admitted = [req for req in self.under_pressure.relieve(admitted) if is_decided(req)]
                self.stored.host.bring(admitted)
            else:
                self.under_pressure.relieve([])
            self.room.keep_for_chunk(self.stored.yields, self.in_place.gives_way)
        except Exception:  # a defect of ours must not end the scheduler
            logger.exception("obcache: a scheduling pass failed; all its requests are served exactly")
            order = admitted = [req for req in engine.queue if self._is_admitted_exactly(req)]
        engine.queue, seconds = admitted, time.perf_counter() - started_at
        try:
            result = pick_prefill_batch(running_batch=running_batch, **kwargs)
        finally:
            taken = {id(req) for req in admitted} - {id(req) for req in engine.queue}
            known = {id(req) for req in order}
            requeued = [req for req in engine.queue if id(req) not in known]
            engine.queue = [req for req in order if id(req) not in taken] + requeued + engine.late
            engine.running_batch = engine.late = None
            self.jobs.end_pass()
        try:
            # What came in during the pass was not asked to run.
            self._give_way_if_starved(result, asked=any(id(req) not in taken and is_decided(req) for req in admitted))
            if self.metrics.pass_decided(seconds, engine.pool_slots - engine.free_slots()):
                self.metrics.set_gauges(self.cache)
        except Exception:
            logger.exception("obcache: what follows a scheduling pass failed")
        return result

    def _decide(self) -> tuple[list[Req], list[Req]]:
        """(the queue with the jobs that start now, those of it that may be admitted), in order."""
        self.jobs.end_dead()
        if self.engine.must_become_idle:
            self.jobs.stop_unattended()
        self.room.begin_pass()
        self.under_pressure.begin_pass()
        self.when_idle.advance()
        queue = self.engine.queue
        order: list[Req] = []
        admitted: list[Req] = []
        num_held = 0
        unattended_wait = not self.jobs.engine_is_idle() and not self.room.is_tight
        for req in queue:
            if isinstance(req, ContextReq):
                verdict, job = self._resolve_contained(req)
                req.decided = verdict is Verdict.ADMIT
                num_held += self._count_wait(req, held=verdict is Verdict.HOLD)
                if job is not None:
                    self.jobs.started(job)
                    order.append(job)
                    admitted.append(job)
                if verdict is Verdict.DONE:
                    continue
                if verdict is Verdict.ADMIT:
                    admitted.append(req)
            elif not (isinstance(req, CompressionJob) and req.unattended and not req.in_turn and unattended_wait):
                admitted.append(req)
            order.append(req)
        self.metrics.waiting(num_held)
        return order, admitted

    def _count_wait(self, req: ContextReq, *, held: bool) -> bool:
        """Keeps account of how long a request waits for compressions. Returns held."""
        if held:
            req.held_since = req.held_since or time.perf_counter()
        elif req.held_since is not None:
            self.metrics.waited(time.perf_counter() - req.held_since)
            req.held_since = None
        return held

    def _is_admitted_exactly(self, req: Req) -> bool:
        if isinstance(req, ContextReq):
            req.decided = self._serve_exact_contained(req) is Verdict.ADMIT
        return is_decided(req)

    def queued(self, req: Req) -> None:
        """SGLang has put a request into the waiting queue: one of ours that comes while a batch is picked is not decided yet."""
        engine = self.engine
        if engine.late is not None and isinstance(req, ContextReq) and engine.queue[-1:] == [req]:
            req.decided = False
            engine.late.append(engine.queue.pop())

    def _resolve_contained(self, req: ContextReq) -> tuple[Verdict, CompressionJob | None]:
        try:
            return self._resolve(req)
        except Exception:  # a defect of ours must not end the scheduler
            logger.exception("obcache: resolving the context of request %s failed; it is served exactly", req.rid)
            return self._serve_exact_contained(req), None

    def _serve_exact_contained(self, req: ContextReq) -> Verdict:
        """After a defect; one that cannot be served exactly either is answered with an error, so that its client does not wait for ever."""
        try:
            return self._serve_exact(req, "error")
        except Exception:
            logger.exception("obcache: serving request %s exactly failed as well; it ends with an error", req.rid)
            req.end_with_error(
                "The request could not be served, neither with compression nor exactly.", HTTPStatus.INTERNAL_SERVER_ERROR
            )
            return Verdict.ADMIT

    def _resolve(self, req: ContextReq) -> tuple[Verdict, CompressionJob | None]:
        """Decides at every pass, not once: a context may be evicted, and a retracted request waits again.

        Mostly nothing has changed, so that costs the same for every length of context.
        """
        if req.to_finish is not None or req.finished():
            req.use_real_ids()
            return Verdict.ADMIT, None
        if req.exact_reason is not None:
            if not req.is_reported_exact or req.is_virtual or req.plan.action == "compress":
                return self._serve_exact(req, req.exact_reason), None
            return Verdict.ADMIT, None
        context = req.context
        if context is None or self.cache.get(context.id) is not context:
            req.use_real_ids()
            context = req.context = self._find_context(req)
        if context is None:
            return self._serve_exact(req, req.exact_reason or "no_context"), None
        if context.state is ContextState.DELETING:
            return self._serve_exact(req, "deleted"), None
        if not self.cache.is_resident(context) and (
            again := find_again(self.cache, context, self.settings.rungs(context.settings))
        ):
            req.use_real_ids()
            context = req.context = again
        if self.cache.is_resident(context):
            if self.settings.when == "pressure" and self.under_pressure.has_no_need(req, context):
                req.report_exact("deferred")
                return Verdict.ADMIT, None
            return self._serve_resident(req, context), None
        req.use_real_ids()
        defers = self._may_defer(req, context)
        if not (defers and self.settings.when == "pressure") and self.stored.awaits(req, context):
            return Verdict.HOLD, None
        if defers:
            if self.settings.when == "idle":
                self.when_idle.add(context, req)
            else:
                self.under_pressure.add(context)
            if req.plan.ttl_seconds is not None:
                self._set_ttl(context, req.plan.ttl_seconds, made_now=True)
            context.is_wanted_pinned |= req.plan.pin
            return self._serve_exact(req, "deferred"), None
        if self.jobs.await_another(context) or self.room.must_wait(context, self.jobs.all()):
            return Verdict.HOLD, None
        self.jobs.reservation.give_back(context)  # what a job has left that failed to end
        if req.compressions_started < MAX_COMPRESSIONS_PER_REQUEST and self.in_place.start(context):
            req.compressions_started += 1
            self.in_place.advance()
            return (Verdict.HOLD, None) if context.is_queued else self._resolve(req)
        return self._start_job(req, context)

    def _may_defer(self, req: ContextReq, context: Context) -> bool:
        """Whether a question is served exactly for now: not where it is the only one its context can have."""
        plan, when = req.plan, self.settings.when
        if plan.action != "ask" or plan.context_len >= len(req.prompt_ids) - 1 or req.must_be_compressed or when == "first":
            return False
        return when == "idle" or self.under_pressure.stays_exact(context)

    def _find_context(self, req: ContextReq) -> Context | None:
        """The context of a request by its boundary, or the longest resident one that its prompt starts with."""
        plan, prompt = req.plan, req.origin_input_ids
        boundary = plan.boundary(len(prompt), self.cache.page_size)
        if plan.context_len == 0 or plan.finds_boundary:
            whole = replace(plan.settings, exact_tokens=0)
            context = longest_prefix(self.cache, req.namespace, (whole, *self.settings.rungs(whole)), prompt)
            # Rather all of a long document exactly, so that it can be compressed, than a short beginning of it, or what is to stay exact.
            if context is not None and context.num_tokens >= max(boundary / 2, plan.settings.exact_tokens + 1):
                context.is_segment = False
                req.context_id = self.cache.capability(context, array("q"))
                return context
            if plan.context_len == 0:
                return None
        if plan.settings.within(boundary, self.cache.page_size).exact_tokens >= boundary:
            req.exact_reason = "exact_segments" if boundary else "shorter_than_a_page"
            return None
        judges = prompt[boundary:] if plan.judged_by_rest else plan.judges
        own, tokens = plan.settings, prompt[:boundary]
        settings = own if plan.context_id is not None else known_settings(self.cache, req.namespace, own, tokens)
        context = self.cache.obtain(req.namespace, settings, tokens, judges)
        if context is None:
            req.exact_reason = "too_many_contexts"
        elif plan.context_id is None and context.state is not ContextState.DELETING:
            req.context_id = self.cache.capability(context, prompt[boundary : min(plan.context_len, len(prompt))])
        return context

    def _serve_resident(self, req: ContextReq, context: Context) -> Verdict:
        if req.return_logprob and not req.is_virtual and 0 <= req.logprob_start_len < context.num_tokens:
            if req.plan.finds_boundary or self.settings.when == "pressure":  # it is answered, whatever is compressed by now
                return self._serve_exact(req, "input_logprobs")
            req.set_finish_with_abort(
                f"logprob_start_len={req.logprob_start_len} lies inside the compressed context of {context.num_tokens} tokens, "
                f"whose log-probabilities are not available. Give {context.num_tokens} or more, give -1 for none, "
                'or turn compression off (custom_params={"obcache": false}).'
            )
            return Verdict.ADMIT
        if not req.is_virtual:
            compressed_now = req.compressions_started > 0
            if req.plan.pin:
                self.room.pin(context)
                self.metrics.set_gauges(self.cache)
            if req.plan.ttl_seconds is not None:
                self._set_ttl(context, req.plan.ttl_seconds, made_now=compressed_now)
            elif req.plan.action == "compress":
                # Whoever asks for a context ahead and names no end must not find it gone because of somebody who did.
                context.ttl_seconds = context.expires_at = None
            if not compressed_now:
                context.reuses += 1
                self.metrics.reused(context.num_tokens)
            self.when_idle.used(context, req)
            req.tier = self.stored.read(context, again=not compressed_now)
            req.report("compressed" if compressed_now else "reused")
            if req.plan.action == "compress":
                return self._finish_without_forward(req)
            spared = context.job_cached_tokens if compressed_now else context.num_tokens
            req.use_context(context, cached_tokens=spared)
        if req.suffix_known != len(req.output_ids):
            self.cache.remember_suffix(context, req.suffix_ids())
            req.suffix_known = len(req.output_ids)
        return Verdict.ADMIT

    def _serve_exact(self, req: ContextReq, reason: str) -> Verdict:
        req.serve_exact(reason)
        return self._finish_without_forward(req) if req.plan.action == "compress" and req.to_finish is None else Verdict.ADMIT

    def _finish_without_forward(self, req: ContextReq) -> Verdict:
        """Answers a request that only wanted the context made."""
        req.finished_reason = FINISH_LENGTH(length=0)
        self.engine.answer(req)
        return Verdict.DONE

    def _give_way_if_starved(self, result: Any, *, asked: bool) -> None:
        """Something of ours yields where nothing runs, and nothing of what was asked to run fits. result: (new batch, running batch)."""
        batch, running_batch = result
        if batch is not None or not running_batch.is_empty():
            not_starved(self.jobs)
        if asked and batch is None and self.engine.queue and running_batch.is_empty():
            if not (self.stored.yields() or self.room.release_a_pin()):
                end_a_waiting_segment(self.jobs)
            self.metrics.set_gauges(self.cache)

    def _start_job(self, req: ContextReq, context: Context) -> tuple[Verdict, CompressionJob | None]:
        if req.compressions_started >= MAX_COMPRESSIONS_PER_REQUEST:
            return self._serve_exact(req, "evicted"), None
        job, refusal = self.jobs.make(req, context)
        if job is None:
            return self._serve_exact(req, refusal), None
        req.compressions_started += 1
        return Verdict.HOLD, job

    # --- what else SGLang tells us ----------------------------------------------------------------------------------

    def before_release(self, req: Req, *, checkpoint: bool) -> None:
        """A request gives its KV back: a job ends, or starts over after retraction; a question leaves its suffix."""
        if isinstance(req, CompressionJob):
            self.jobs.release(req, checkpoint=checkpoint)
        elif isinstance(req, ContextReq):
            req.decided = False  # a retracted one waits again
            if req.is_virtual and checkpoint:
                assert req.context is not None
                self.cache.remember_suffix(req.context, req.suffix_ids(), instead_of=req.prompt_suffix_ids())

    def before_flush(self) -> None:
        """What nobody waits for makes way."""
        self.calibration.before_flush()
        self.jobs.give_engine_back()
        self.engine.finish_loads()

    def after_flush(self) -> None:
        """The tree was reset: every context is gone."""
        self.in_place.forget()
        self.calibration.forget()
        self.stored.forget()
        self.cache.clear()
        self.jobs.forget_bases()
        self.when_idle.forget()
        self.under_pressure.forget()
        self.metrics.set_gauges(self.cache)

    def _use_gates(self, name: str) -> bool:
        """This server has gates from now on, and files of contexts say of none that they are theirs. Whether requests that give no method use them."""
        settings, follows = settings_with(self.settings, name, uneven_refusal=self.uneven_refusal, on_cpu=self.engine.on_cpu)
        self.settings = self.under_pressure.settings = settings
        self.stored.turn_off("this server has made gates of its own")
        return follows

    def forget_adapter(self, lora_id: str) -> None:
        """A LoRA adapter was unloaded: its contexts are deleted, since another one may be loaded under the same name."""
        self.in_place.cancel(lora_id)
        for context in [each for each in self.cache if each.namespace.lora_id == lora_id]:
            if not context.is_queued and context.state is not ContextState.DELETING:
                self.cache.delete(context)
        self.sweep()

    # --- time to live, deletion -------------------------------------------------------------------------------------

    def _set_ttl(self, context: Context, ttl_seconds: float, *, made_now: bool) -> None:
        """Sets how long a context lives, from now. Only whoever has it made may limit that; others can prolong it, not shorten it."""
        if context.expires_at is None and not made_now:
            return
        expires_at = (self.clock() if self.clock else self._now) + ttl_seconds
        if context.expires_at is None or expires_at > context.expires_at:
            context.ttl_seconds, context.expires_at = ttl_seconds, expires_at

    def advance_clock(self, now: float) -> None:
        """A stamp that a request carries: all ranks see the same. Contexts whose time to live has passed are deleted."""
        self._now = max(self._now, now)
        for context in list(self.cache):
            if context.expires_at is not None and context.expires_at <= self._now and context.is_made:
                self.cache.delete(context)
        self.sweep()

    def sweep(self) -> None:
        """Frees what was deleted and has no readers left, and what a defect has left."""
        self.jobs.discard_orphans()
        if self.cache.has_deleted:
            self.cache.sweep(set(self.room.readers()))
            self.metrics.set_gauges(self.cache)


TOUCHES = (use("sglang.srt.managers.schedule_batch.FINISH_LENGTH", "call", "ends a request that only compresses", ("length",)),)
