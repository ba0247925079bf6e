"""The decisions of one scheduler: which context a waiting request uses, and when a compression starts and ends.

Ranks of one tensor-parallel group run this in step: everything is decided from the requests and the pool, which they
share, never from clocks of their own.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH

from obcache_sglang import __version__
from obcache_sglang.config import ServerSettings
from obcache_sglang.errors import ContextNotFound, RequestError
from obcache_sglang.metrics import Metrics
from obcache_sglang.scheduler.contexts import Context, ContextCache, ContextState, Namespace
from obcache_sglang.scheduler.replay import ReplayPass, ReplayPrompts
from obcache_sglang.scheduler.requests import (
    MAX_COMPRESSIONS_PER_REQUEST,
    CompressionJob,
    ContextReq,
    Plan,
    client_view,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


TIGHT_POOL = 0.1
"""A pool with less than this share of its KV slots free is tight: with when=idle a context is compressed although the engine is busy."""


class Verdict(Enum):
    ADMIT = "admit"
    HOLD = "hold"
    DONE = "done"


class CompressionManager:
    """Compresses contexts for one SGLang scheduler.

    uneven_refusal: why budgets other than uniform cannot be served here; None where they can.
    agree: whether all ranks of this scheduler's tensor-parallel group say True; called by all of them at the same point.
    clock: seconds since the epoch; None with several ranks, whose clocks differ: then the stamps that requests carry tell the time.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        settings: ServerSettings,
        metrics: Metrics,
        *,
        uneven_refusal: str | None,
        agree: Callable[[bool], bool],
        clock: Callable[[], float] | None,
    ) -> None:
        self.scheduler = scheduler
        self.settings = settings
        self.metrics = metrics
        self.uneven_refusal = uneven_refusal
        self.agree = agree
        self.clock = clock
        self.cache = ContextCache(scheduler.tree_cache, settings.max_contexts)
        self.num_kv_heads: int = scheduler.token_to_kv_pool_allocator.get_kvcache().head_num
        self.pool_slots: int = scheduler.max_total_num_tokens
        self.tight_slots = int(TIGHT_POOL * self.pool_slots)
        self.max_pinned_slots = (
            self.pool_slots // 2 if settings.max_pinned_slots is None else min(settings.max_pinned_slots, self.pool_slots)
        )
        self._num_jobs = 0
        self._replay_prompts: ReplayPrompts | None = None
        self._deferred: dict[str, tuple[Context, ContextReq]] = {}
        self._started_now: list[CompressionJob] = []
        self._one_waits = False
        self._now = 0.0

    # --- arrival ----------------------------------------------------------------------------------------------------

    def create_request(self, args: tuple[Any, ...], kwargs: dict[str, Any], plan: dict[str, Any]) -> ContextReq:
        """The request of a plan. args, kwargs: of SGLang's Req. A context id is replaced by the context's own tokens.

        Raises RequestError where the id names no context of the request's namespace, or this server cannot serve the budget.
        """
        self.advance_clock(float(plan.get("now", 0.0)))
        settled = Plan.from_dict(plan)
        if settled.context_id is not None:
            rid, text, input_ids, *rest = args
            namespace = Namespace(
                (kwargs.get("extra_key") or "") + kwargs["lora_id"] if kwargs.get("lora_id") else kwargs.get("extra_key"),
                kwargs.get("cache_salt") or None,
                kwargs.get("lora_id"),
            )
            context = self.cache.get(settled.context_id)
            if context is None or context.namespace != namespace or context.state is ContextState.DELETING:
                raise ContextNotFound(
                    f"context_id={settled.context_id!r} is not known under this cache_salt, extra_key and LoRA adapter; "
                    "GET /obcache/contexts lists the known ones; POST /obcache/compress makes one."
                )
            args = (rid, text, context.tokens + array("q", input_ids), *rest)
            settled = replace(
                settled, context_id=None, context_len=context.num_tokens, settings=context.settings, judges=context.judges
            )
        elif settled.settings.budget != "uniform" and self.uneven_refusal is not None:
            raise RequestError(
                f"budget={settled.settings.budget!r} cannot be served here: {self.uneven_refusal}; set budget=uniform."
            )
        return ContextReq(*args, plan=settled, count_exact=self.metrics.exact, **kwargs)

    # --- a scheduling pass ------------------------------------------------------------------------------------------

    def schedule(self, pick_prefill_batch: Callable[..., Any], **kwargs: Any) -> Any:
        """One pass of SGLang's prefill admission, in which requests that wait for a compression are left out.

        They stay where aborts, timeouts and the idle check look for them: in the waiting queue, in their order.
        """
        self._compress_deferred()
        self._started_now, self._one_waits = [], False
        queue = self.scheduler.waiting_queue
        if queue:
            self._make_room(self.tight_slots)
        if not any(isinstance(req, ContextReq) for req in queue):
            result = pick_prefill_batch(**kwargs)
            self._release_pins_if_starved(result)
            return result
        order: list[Req] = []
        admitted: list[Req] = []
        for req in queue:
            if isinstance(req, ContextReq):
                verdict, job = self._resolve_contained(req)
                if job is not None:
                    self._started_now.append(job)
                    order.append(job)
                    admitted.append(job)
                if verdict is Verdict.DONE:
                    continue
                if verdict is Verdict.ADMIT:
                    admitted.append(req)
            else:
                admitted.append(req)
            order.append(req)
        self.scheduler.waiting_queue = admitted
        try:
            result = pick_prefill_batch(**kwargs)
        finally:
            taken = {id(req) for req in admitted} - {id(req) for req in self.scheduler.waiting_queue}
            known = {id(req) for req in order}
            requeued = [req for req in self.scheduler.waiting_queue if id(req) not in known]
            self.scheduler.waiting_queue = [req for req in order if id(req) not in taken] + requeued
        self._release_pins_if_starved(result)
        return result

    def _resolve_contained(self, req: ContextReq) -> tuple[Verdict, CompressionJob | None]:
        try:
            return self._resolve(req)
        except Exception:  # a defect of ours must not end the scheduler
            logger.exception("obcache: request %s is served exactly", req.rid)
            return self._serve_exact(req, "error"), None

    def _resolve(self, req: ContextReq) -> tuple[Verdict, CompressionJob | None]:
        """Decides at every pass, not once: a context may be evicted, and a retracted request waits again."""
        if req.to_finish is not None or req.finished():
            req.use_real_ids()
            return Verdict.ADMIT, None
        if req.exact_reason is not None:
            return self._serve_exact(req, req.exact_reason), None
        context = req.context
        if context is None or self.cache.get(context.id) is not context:
            req.use_real_ids()
            context = req.context = self._find_context(req)
        if context is None:
            return self._serve_exact(req, req.exact_reason or "no_context"), None
        if context.state is ContextState.DELETING:
            return self._serve_exact(req, "deleted"), None
        if context.job is not None and not self._is_alive(context.job):
            self.end_job(context.job, completed=False)
        if self.cache.is_resident(context):
            return self._serve_resident(req, context), None
        req.use_real_ids()
        if self._may_defer(req):
            if context.job is None:
                self._deferred[context.id] = (context, req)
            return self._serve_exact(req, "deferred"), None
        if context.job is not None or self._must_wait(context):
            return Verdict.HOLD, None
        return self._start_job(req, context)

    def _may_defer(self, req: ContextReq) -> bool:
        """Whether a question is served exactly for now: not where it is the only one its context can have."""
        plan = req.plan
        return self.settings.when == "idle" and plan.action == "ask" and plan.context_len < len(req.prompt_ids) - 1

    def _compress_deferred(self) -> None:
        """Starts the compression of a context whose questions were served exactly, the longest waiting first, one at a time."""
        if not self._deferred or any(context.job is not None for context in self.cache):
            return
        scheduler = self.scheduler
        idle = not scheduler.waiting_queue and scheduler.running_batch.is_empty() and scheduler.chunked_req is None
        if not idle and self.cache.allocator.available_size() > self.tight_slots:
            return
        context, req = self._deferred.pop(next(iter(self._deferred)))
        if self.cache.get(context.id) is not context or self.cache.is_resident(context):
            return
        try:
            job, refusal = self._make_job(req, context)
            if job is None:
                logger.warning("obcache: context %s stays exact: %s", context.id, refusal)
            else:
                job.unattended = True
                scheduler.waiting_queue.insert(0, job)
        except Exception:
            logger.exception("obcache: context %s stays exact", context.id)

    def _find_context(self, req: ContextReq) -> Context | None:
        """The context of a request by its boundary, or the longest resident one that its prompt starts with."""
        plan, prompt = req.plan, req.origin_input_ids
        if plan.context_len == 0:
            return self.cache.find_prefix(req.namespace, plan.settings, prompt)
        # A prompt of its context alone still needs one token to generate from; auto-truncation may have cut it shorter.
        longest = len(prompt) if plan.action == "compress" else len(prompt) - 1
        boundary = min(plan.context_len, longest) // self.cache.page_size * self.cache.page_size
        if boundary == 0:
            req.exact_reason = "shorter_than_a_page"
            return None
        judges = prompt[boundary:] if plan.judged_by_rest else plan.judges
        return self.cache.obtain(req.namespace, plan.settings, prompt[:boundary], judges)

    def _serve_resident(self, req: ContextReq, context: Context) -> Verdict:
        if req.return_logprob and not req.is_virtual and 0 <= req.logprob_start_len < context.num_tokens:
            req.set_finish_with_abort(
                f"logprob_start_len={req.logprob_start_len} is inside the compressed context of {context.num_tokens} tokens, "
                f"whose log-probabilities are not computed again; ask for {context.num_tokens} or more, "
                'or set custom_params {"obcache": false}.'
            )
            return Verdict.ADMIT
        if req.plan.pin:
            self._pin(context)
        if req.plan.ttl_seconds is not None:
            self._set_ttl(context, req.plan.ttl_seconds)
        if not req.is_virtual:
            compressed_now = req.compressions_started > 0
            if not compressed_now:
                context.reuses += 1
                self.metrics.reused(context.num_tokens)
            req.report("compressed" if compressed_now else "reused")
            if req.plan.action == "compress":
                return self._finish_without_forward(req)
            spared = context.job_cached_tokens if compressed_now else context.num_tokens
            req.use_context(context, cached_tokens=spared)
        self.cache.remember_suffix(context, req.suffix_ids())
        return Verdict.ADMIT

    def _serve_exact(self, req: ContextReq, reason: str) -> Verdict:
        req.serve_exact(reason)
        return self._finish_without_forward(req) if req.plan.action == "compress" else Verdict.ADMIT

    def _finish_without_forward(self, req: ContextReq) -> Verdict:
        """Answers a request that only wanted the context made."""
        req.finished_reason = FINISH_LENGTH(length=0)
        self.scheduler.output_streamer.stream_output([req], req.return_logprob)
        return Verdict.DONE

    def _release_pins_if_starved(self, result: Any) -> None:
        """Nothing hangs: where nothing runs and nothing fits, pinned contexts yield, the least recently used first."""
        batch, running_batch = result
        if batch is not None or not self.scheduler.waiting_queue or not running_batch.is_empty():
            return
        for context in self.cache:
            if context.pinned:
                self.cache.unpin(context)
                logger.warning("obcache: unpinned context %s, since nothing else could run", context.id)
                return

    # --- jobs -------------------------------------------------------------------------------------------------------

    def _start_job(self, req: ContextReq, context: Context) -> tuple[Verdict, CompressionJob | None]:
        if req.compressions_started >= MAX_COMPRESSIONS_PER_REQUEST:
            return self._serve_exact(req, "evicted"), None
        job, refusal = self._make_job(req, context)
        if job is None:
            return self._serve_exact(req, refusal), None
        req.compressions_started += 1
        return Verdict.HOLD, job

    def _must_wait(self, context: Context) -> bool:
        """Whether a compression waits for those under way: where its exact KV beside theirs would evict compressed contexts.

        Each that is evicted must be compressed again, and evicts others then. Those under way give their exact KV back soon.
        """
        if self._one_waits:
            return True  # in the order of the queue, so that small ones do not overtake a large one for ever
        jobs = [each.job for each in self.cache if each.job is not None and self._is_alive(each.job)]
        if not jobs:
            return False
        needed = sum(self._slots_to_compress(each) for each in (context, *(job.context for job in jobs)))
        spare = self.tight_slots  # for the questions that are being answered
        if needed <= spare:
            return False
        held = sum(job.kv.kv_allocated_len for job in jobs)
        kept = sum(each.num_slots for each in self.cache if each.state is ContextState.RESIDENT and each.tree_lock is None)
        self._make_room(needed - held + spare)
        room = self.cache.allocator.available_size() + max(0, self.cache.tree.evictable_size() - kept)
        self._one_waits = needed - held + spare > room
        return self._one_waits

    def _slots_to_compress(self, context: Context) -> int:
        """About so many are taken by the exact KV of a context, what is replayed behind it, and its kept tokens.

        Asked of waiting requests in each pass: what `_make_job` knows exactly would take the replay's prompts.
        """
        replayed = context.settings.replay_chunk if context.settings.method == "replay" else 0
        return context.num_tokens + min(replayed, context.num_tokens) + context.num_slots

    def _make_room(self, num_slots: int) -> None:
        """Frees what answered questions left behind contexts, from the least recently used on, until so many slots are free.

        By last use alone the tree would evict idle contexts before: a question's own tokens are newer than every context but one,
        and are rarely asked for again.
        """
        if self.cache.allocator.available_size() >= num_slots:
            return
        # A pool full of cached text is an ordinary state, and this runs in each pass of it: mostly there is nothing to drop.
        followed = [context for context in self.cache if context.suffixes and context.state is ContextState.RESIDENT]
        if not followed:
            return
        # What these will leave is not in the tree yet.
        readers = self.readers()
        for context in followed:
            if context.id not in readers:
                self.cache.drop_suffixes(context)
                if self.cache.allocator.available_size() >= num_slots:
                    return

    def _make_job(self, req: ContextReq, context: Context) -> tuple[CompressionJob | None, str]:
        """The compression of a context for `req`, or None and why it cannot be."""
        if context.settings.method == "replay" and self.scheduler.tokenizer is None:
            return None, "no_tokenizer"
        passes = self._replay_passes(context)
        if passes is None:
            return None, "no_room_to_replay"
        longest = max((len(each.tokens) for each in passes), default=len(context.judges))
        if context.num_tokens + longest + context.num_slots > self.pool_slots:
            return None, "pool_too_small"
        self._make_room(context.num_tokens + longest + context.num_slots)
        job = self._queue_job(context, req, passes)
        if job.window < context.settings.window:
            logger.warning(
                "obcache: context %s keeps %d slots, so its window of %d tokens shrinks to %d",
                context.id, context.num_slots, context.settings.window, job.window,
            )  # fmt: skip
        return job, ""

    def _queue_job(
        self, context: Context, like: ContextReq | CompressionJob, passes: Sequence[ReplayPass] = ()
    ) -> CompressionJob:
        self._num_jobs += 1
        context.job = job = CompressionJob(context, like, number=self._num_jobs, passes=passes)
        job.time_stats.set_wait_queue_entry_time()
        return job

    def _replay_passes(self, context: Context) -> list[ReplayPass] | None:
        """What method replay reads behind the context; None where the model's context length leaves no room for it."""
        if context.settings.method != "replay":
            return []
        if self._replay_prompts is None:
            self._replay_prompts = ReplayPrompts(self.scheduler.tokenizer)
        room = self.scheduler.model_config.context_len - context.num_tokens - self._replay_prompts.num_tokens - 1
        chunk = min(context.settings.replay_chunk, room)
        return self._replay_prompts.passes(context.tokens, chunk) if chunk > 0 else None

    def _is_alive(self, job: CompressionJob) -> bool:
        # A job that this pass has started is not in the queue yet.
        return job.kv.holds_kv or any(req is job for req in (*self.scheduler.waiting_queue, *self._started_now))

    def before_forward(self, batch: ScheduleBatch) -> None:
        """Reserves the slots of jobs whose last chunk is in this batch, after the batch's own allocation."""
        for req in batch.reqs:
            if not isinstance(req, CompressionJob) or not req.is_final or req.error is not None:
                continue
            if req.extend_end != len(req.origin_input_ids):
                continue
            if req.context.job is not req:
                req.error = "replaced"  # a second node of the same context would free the first one's slots
                continue
            try:
                req.slots = self.cache.reserve(req.context)
            except Exception:
                logger.exception("obcache: no slots for context %s", req.context.id)
            if req.slots is None:
                req.error = "no_slots"

    def before_release(self, req: Req, *, checkpoint: bool) -> None:
        """A request gives its KV back: a job ends, or starts over after retraction; a question leaves its suffix."""
        if isinstance(req, CompressionJob):
            if req.finished():
                self.end_job(req, completed=checkpoint and not isinstance(req.finished_reason, FINISH_ABORT))
            else:
                if req.context.job is req:
                    self._discard(req.context)
                req.reset()
        elif isinstance(req, ContextReq) and req.is_virtual and checkpoint:
            assert req.context is not None
            self.cache.remember_suffix(req.context, req.suffix_ids(), instead_of=req.prompt_suffix_ids())

    def end_job(self, job: CompressionJob, *, completed: bool) -> None:
        """Publishes what a job made, or takes it back and lets its questions be served exactly.

        completed: its prefill ran to the end (else it was aborted: its questions may compress again).
        """
        context = job.context
        if context.job is not job:
            return  # another one has taken its place
        context.job = None
        if completed and job.replay is not None:
            self.metrics.replayed(len(job.replay.tokens), time.perf_counter() - job.pass_started_at)
        if completed and not job.is_final:
            if not self._is_awaited(job):  # its client left while this pass ran
                self._discard(context)
                return
            if self.agree(job.error is None):
                # First in the queue: the next pass finds the context's exact KV still there.
                self.scheduler.waiting_queue.insert(0, self._queue_job(context, job))
                return
            job.error = job.error or "error"
        if completed and job.slots is not None:
            scored = job.error is None and job.kept is not None
            if not self.agree(scored):
                job.error = job.error or ("error" if scored else "not_scored")
        if completed and job.error is None:
            assert job.kept is not None
            context.seconds = time.perf_counter() - job.started_at
            context.scoring_seconds = job.scoring_seconds
            context.job_cached_tokens = job.context_cached_tokens
            self.cache.publish(context, job.kept)
            self.metrics.compressed(context.seconds, context.num_tokens, context.num_slots)
            self._set_gauges()
            logger.info(
                "obcache: compressed context %s: %d tokens to %d slots in %.3f s (scoring %.3f s), %s %s %s ratio %g",
                context.id, context.num_tokens, context.num_slots, context.seconds, context.scoring_seconds,
                context.settings.method, context.settings.score, context.settings.budget, context.settings.compression_ratio,
            )  # fmt: skip
            return
        self._discard(context)
        if completed:
            job.skip_radix_cache_insert = job.replay is not None  # what was computed of the context is worth caching exactly
            assert job.error is not None
            logger.warning("obcache: context %s is served exactly: %s", context.id, job.error)
            for req in self.scheduler.waiting_queue:
                if isinstance(req, ContextReq) and req.context is context:
                    req.exact_reason = job.error

    def _discard(self, context: Context) -> None:
        if context.state is ContextState.COMPRESSING:
            self.cache.withdraw(context)

    def after_abort(self) -> None:
        """Ends the jobs nobody waits for any more. A job whose last chunk runs is let finish: the work is done."""
        for context in list(self.cache):
            job = context.job
            if job is None or self._is_awaited(job):
                continue
            if job is self.scheduler.chunked_req:
                self.scheduler._pending_chunked_abort_req = job
            elif not job.kv.holds_kv:
                self.scheduler.waiting_queue = [req for req in self.scheduler.waiting_queue if req is not job]
                self.end_job(job, completed=False)

    def _is_awaited(self, job: CompressionJob) -> bool:
        waiting = (req for req in self._waiting() if isinstance(req, ContextReq))
        return job.unattended or any(req.context is job.context for req in waiting)

    def _waiting(self) -> Iterable[Req]:
        yield from self.scheduler.waiting_queue
        yield from self.scheduler.grammar_manager.grammar_queue

    # --- pins, time to live, deletion -------------------------------------------------------------------------------

    def _pin(self, context: Context) -> None:
        if not context.pinned and self.cache.pinned_slots + context.num_slots <= self.max_pinned_slots:
            self.cache.pin(context)

    def _set_ttl(self, context: Context, ttl_seconds: float) -> None:
        context.ttl_seconds = ttl_seconds
        context.expires_at = (self.clock() if self.clock else self._now) + ttl_seconds

    def advance_clock(self, now: float) -> None:
        """A stamp that a request carries: all ranks see the same. Contexts whose time to live has passed are deleted."""
        self._now = max(self._now, now)
        for context in list(self.cache):
            if context.expires_at is not None and context.expires_at <= self._now and context.state is ContextState.RESIDENT:
                self.cache.delete(context)
        self.sweep()

    def after_flush(self) -> None:
        """The tree was reset: every context is gone."""
        self.cache.clear()
        self._deferred.clear()
        self._set_gauges()

    def sweep(self) -> None:
        """Frees what was deleted and has no readers left."""
        if self.cache.has_deleted:
            self.cache.sweep(set(self.readers()))
            self._set_gauges()

    def _set_gauges(self) -> list[Context]:
        resident = [context for context in self.cache if context.state is ContextState.RESIDENT]
        self.metrics.resident(len(resident), sum(context.position_offset for context in resident))
        return resident

    def readers(self) -> dict[str, int]:
        """Requests that use each context now, by context id."""
        counts: dict[str, int] = {}
        for req in {*self.scheduler.collect_inflight_reqs(), *self._waiting(), self.scheduler.chunked_req}:
            if isinstance(req, ContextReq) and req.is_virtual and req.context is not None and not req.finished():
                counts[req.context.id] = counts.get(req.context.id, 0) + 1
        return counts

    # --- control calls ----------------------------------------------------------------------------------------------

    def answer(self, call: dict[str, Any]) -> dict[str, Any]:
        """Answers one control call of the tokenizer process: op is status, list, get, delete, progress or expire."""
        self.advance_clock(float(call.get("now", 0.0)))
        op = call.get("op")
        if op == "status":
            return {"ok": True, **self._status()}
        if op == "expire":
            return {"ok": True}
        if op == "progress":
            asked = [req for req in self._waiting() if isinstance(req, ContextReq) and req.rid.startswith(call["rid"])]
            jobs = [req.context.job for req in asked if req.context is not None and req.context.job is not None]
            done, total = jobs[0].progress if jobs else (0, 0)
            return {"ok": True, "tokens": done, "of": total}
        salt = call.get("cache_salt") or None
        visible = [context for context in self.cache if context.namespace.cache_salt == salt]
        if op == "list":
            readers = self.readers()
            for context in visible:
                self.cache.is_resident(context)
            held = [c for c in visible if c.state is not ContextState.ABSENT or c.job is not None]
            return {"ok": True, "contexts": [c.describe() | {"readers": readers.get(c.id, 0)} for c in held]}
        named = [c for c in visible if c.id == call.get("id")]
        if not named or not (self.cache.is_resident(named[0]) or named[0].job or named[0].state is ContextState.DELETING):
            return {
                "ok": False,
                "status_code": 404,
                "error": f"no context {call.get('id')!r} is held under this cache_salt; GET /obcache/contexts lists them",
            }
        context = named[0]
        if op == "get":
            described = context.describe() | {"readers": self.readers().get(context.id, 0)}
            kept = context.kept
            described["kept_per_head"] = None if kept is None else kept.counts(self.num_kv_heads)
            if call.get("positions"):
                described["positions"] = None if kept is None else kept.per_head(self.num_kv_heads)
            return {"ok": True, "context": described}
        if op == "delete":
            if context.job is not None:
                return {
                    "ok": False,
                    "status_code": 409,
                    "error": f"context {context.id} is being compressed; delete it afterwards",
                }
            if context.state is not ContextState.DELETING:
                self.cache.delete(context)
            self.sweep()
            return {"ok": True, "state": "deleting" if self.cache.get(context.id) is not None else "deleted"}
        return {"ok": False, "status_code": 400, "error": f"unknown op {op!r}"}

    def _status(self) -> dict[str, Any]:
        for context in self.cache:
            self.cache.is_resident(context)
        resident = self._set_gauges()
        return {
            "version": __version__,
            "settings": self.settings.to_dict(),
            "counters": self.metrics.to_dict(),
            "pool": {
                "slots": self.pool_slots,
                "page_size": self.cache.page_size,
                "contexts": len(resident),
                "context_slots": sum(context.num_slots for context in resident),
                "slots_saved": sum(context.position_offset for context in resident),
                "pinned_slots": self.cache.pinned_slots,
                "max_pinned_slots": self.max_pinned_slots,
            },
        }

    def stream_output(self, stream: Callable[..., None], reqs: list[Req], *args: Any, **kwargs: Any) -> None:
        """SGLang's stream_output, without our jobs, and with what clients sent in place of virtual tokens."""
        shown = [req for req in reqs if not isinstance(req, CompressionJob)]
        with client_view(shown):
            stream(shown, *args, **kwargs)
