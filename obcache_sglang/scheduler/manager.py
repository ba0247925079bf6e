"""The decisions of one scheduler: which context a waiting request uses, and when a compression starts and ends.

Ranks of one tensor-parallel group run this in step: everything is decided from the requests and the pool, which they
share, never from clocks of their own.
"""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.utils import prepare_abort
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.common import evict_from_tree_cache

from obcache_sglang import __version__
from obcache_sglang.compress.replay import ReplayPass, ReplayPrompts
from obcache_sglang.errors import ContextNotFound, RequestError
from obcache_sglang.kv.context import Context, ContextState, Namespace
from obcache_sglang.messages import Plan
from obcache_sglang.scheduler.context_cache import ContextCache
from obcache_sglang.scheduler.metrics import Metrics
from obcache_sglang.scheduler.requests import (
    MAX_COMPRESSIONS_PER_REQUEST,
    CompressionJob,
    ContextReq,
)
from obcache_sglang.settings import ServerSettings

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


MAX_DEFERRED = 256
"""Contexts that wait to be compressed when the engine is idle; of more the first to come is given up, until it is asked about again."""

MAX_REPLAY_FACTOR = 4
"""Tokens that a replay may read for each token of its context, its prompts included."""

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
    secret: as in ContextCache.
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
        secret: bytes = b"",
    ) -> None:
        self.scheduler = scheduler
        self.settings = settings
        self.metrics = metrics
        self.uneven_refusal = uneven_refusal
        self.agree = agree
        self.clock = clock
        self.cache = ContextCache(scheduler.tree_cache, settings.max_contexts, secret)
        self._secret = secret
        self.num_kv_heads: int = scheduler.token_to_kv_pool_allocator.get_kvcache().head_num
        self.pool_slots: int = scheduler.max_total_num_tokens
        self.tight_slots = int(TIGHT_POOL * self.pool_slots)
        self.max_pinned_slots = (
            self.pool_slots // 2 if settings.max_pinned_slots is None else min(settings.max_pinned_slots, self.pool_slots)
        )
        self._num_jobs = 0
        self._jobs: dict[str, CompressionJob] = {}
        self._replay_prompts: ReplayPrompts | None = None
        self._deferred: dict[str, tuple[Context, ContextReq]] = {}
        self._started_now: list[CompressionJob] = []
        self._one_waits = False
        self._now = 0.0
        # Of the pass under way: SGLang's own attribute is that of the pass before.
        self._running_batch: ScheduleBatch | None = None
        self._late: list[ContextReq] | None = None

    # --- arrival ----------------------------------------------------------------------------------------------------

    def create_request(self, fields: dict[str, Any], plan: dict[str, Any]) -> ContextReq:
        """The request of a plan. fields: the arguments of SGLang's Req, by name. A context id is replaced by the context's own tokens.

        Raises RequestError where the id names no context of the request's namespace, or this server cannot serve the budget.
        """
        self.advance_clock(float(plan.get("now", 0.0)))
        settled = Plan.from_dict(plan)
        if settled.context_id is not None:
            settled, fields = self._named(settled, fields)
        elif settled.settings.budget != "uniform" and self.uneven_refusal is not None:
            raise RequestError(
                f"budget={settled.settings.budget!r} cannot be served here: {self.uneven_refusal}; set budget=uniform."
            )
        return ContextReq(**fields, plan=settled, count_exact=self.metrics.exact)

    def _named(self, plan: Plan, fields: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
        """The plan and the prompt of a request that names its context. Raises RequestError."""
        namespace = Namespace.of(**{name: fields.get(name) for name in ("extra_key", "cache_salt", "lora_id")})
        known = self.cache.by_capability(plan.context_id or "")
        if known is None or known[0].namespace != namespace:
            raise ContextNotFound(
                "This context_id is not known under this cache_salt, extra_key and LoRA adapter: it was forgotten, or deleted, or is of "
                "another server; send the text again, with the marker at its end, or POST /obcache/compress."
            )
        context, tail = known
        before = array("q", plan.before)
        if context.tokens[: len(before)] != before:
            raise RequestError(
                f"The {len(before)} tokens before the marker are not those that the context of this context_id begins with: put the marker "
                "where the context stood, after the same words, or at the very start."
            )
        prompt = context.tokens + tail + array("q", fields["origin_input_ids"])
        plan = replace(plan, context_len=context.num_tokens, settings=context.settings, judges=context.judges)
        return plan, {**fields, "origin_input_ids": prompt}

    # --- a scheduling pass ------------------------------------------------------------------------------------------

    def schedule(self, pick_prefill_batch: Callable[..., Any], running_batch: ScheduleBatch, **kwargs: Any) -> Any:
        """One pass of SGLang's prefill admission, in which requests that wait for a compression are left out.

        They stay where aborts, timeouts and the idle check look for them: in the waiting queue, in their order. What comes into the
        queue during the pass waits for the next one.
        """
        started_at = time.perf_counter()
        self._running_batch = running_batch
        self._late = []
        order = admitted = self.scheduler.waiting_queue
        try:
            if admitted:
                self._make_room(self.tight_slots)
            if not self._admits_nobody():
                order, admitted = self._decide()
        except Exception:  # a defect of ours must not end the scheduler
            logger.exception("obcache: all requests of a scheduling pass are served exactly")
            order = admitted = [req for req in self.scheduler.waiting_queue if self._is_admitted_exactly(req)]
        self.scheduler.waiting_queue = admitted
        self.metrics.pass_decided(time.perf_counter() - started_at)
        try:
            result = pick_prefill_batch(running_batch=running_batch, **kwargs)
        finally:
            taken = {id(req) for req in admitted} - {id(req) for req in self.scheduler.waiting_queue}
            known = {id(req) for req in order}
            requeued = [req for req in self.scheduler.waiting_queue if id(req) not in known]
            self.scheduler.waiting_queue = [req for req in order if id(req) not in taken] + requeued + self._late
            self._running_batch = None
            self._late = None
            self._started_now = []  # they are in the queue now, or under way
        if any(id(req) not in taken for req in admitted):  # what came in during the pass was not asked to run
            self._release_pins_if_starved(result)
        return result

    def _admits_nobody(self) -> bool:
        """Whether SGLang will not look at the queue in this pass, so that nothing has to be decided either."""
        scheduler, running = self.scheduler, self._running_batch
        assert running is not None
        full = running.batch_is_full and not running.is_empty() and not scheduler.enable_priority_preemption
        return bool(full and scheduler.chunked_req is None)

    def _decide(self) -> tuple[list[Req], list[Req]]:
        """(the queue with the jobs that start now, those of it that may be admitted), in order."""
        for dead in [each for each in self._jobs.values() if not self._is_alive(each)]:
            self.end_job(dead, completed=False)
        if self._yields_engine():
            self._stop_unattended()
        self._one_waits = False
        self._compress_deferred()
        queue = self.scheduler.waiting_queue
        order: list[Req] = []
        admitted: list[Req] = []
        unattended_wait = not self._engine_is_idle() and not self._pool_is_tight()
        for req in queue:
            if isinstance(req, ContextReq):
                verdict, job = self._resolve_contained(req)
                req.decided = verdict is Verdict.ADMIT
                if job is not None:
                    self._started_now.append(job)
                    order.append(job)
                    admitted.append(job)
                if verdict is Verdict.DONE:
                    continue
                if verdict is Verdict.ADMIT:
                    admitted.append(req)
            elif not (isinstance(req, CompressionJob) and req.unattended and unattended_wait):
                admitted.append(req)
            order.append(req)
        return order, admitted

    def _is_admitted_exactly(self, req: Req) -> bool:
        if not isinstance(req, ContextReq):
            return True
        verdict = self._serve_exact_contained(req)
        req.decided = verdict is Verdict.ADMIT
        return req.decided

    def queued(self, req: Req) -> None:
        """SGLang has put a request into the waiting queue: one of ours that comes while a batch is picked is not decided yet."""
        if self._late is not None and isinstance(req, ContextReq) and self.scheduler.waiting_queue[-1:] == [req]:
            req.decided = False
            self._late.append(self.scheduler.waiting_queue.pop())

    def _resolve_contained(self, req: ContextReq) -> tuple[Verdict, CompressionJob | None]:
        try:
            return self._resolve(req)
        except Exception:  # a defect of ours must not end the scheduler
            logger.exception("obcache: request %s is served exactly", req.rid)
            return self._serve_exact_contained(req), None

    def _serve_exact_contained(self, req: ContextReq) -> Verdict:
        """After a defect; one that cannot be served exactly either is answered with an error, so that its client does not wait for ever."""
        try:
            return self._serve_exact(req, "error")
        except Exception:
            logger.exception("obcache: request %s ends with an error", req.rid)
            req.real_ids, req.position_offset, req.finished_reason = None, 0, None
            req.full_untruncated_fill_ids = array("q")
            req.set_finish_with_abort(
                "The request could not be served, with or without compression.", HTTPStatus.INTERNAL_SERVER_ERROR
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
        if self.cache.is_resident(context):
            return self._serve_resident(req, context), None
        req.use_real_ids()
        if self._may_defer(req):
            if not context.is_queued:
                self._defer(context, req)
            return self._serve_exact(req, "deferred"), None
        if context.is_queued or self._must_wait(context):
            return Verdict.HOLD, None
        self._discard(context)  # what a job has left that failed to end
        return self._start_job(req, context)

    def _may_defer(self, req: ContextReq) -> bool:
        """Whether a question is served exactly for now: not where it is the only one its context can have."""
        plan = req.plan
        return self.settings.when == "idle" and plan.action == "ask" and plan.context_len < len(req.prompt_ids) - 1

    def _defer(self, context: Context, req: ContextReq) -> None:
        self._deferred.setdefault(context.id, (context, req))
        if len(self._deferred) > MAX_DEFERRED:
            del self._deferred[next(iter(self._deferred))]

    def _compress_deferred(self) -> None:
        """Starts the compression of a context whose questions were served exactly, the longest waiting first, one at a time."""
        if not self._deferred or self._jobs or self._yields_engine():
            return
        if not self._engine_is_idle() and not self._pool_is_tight():
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
                self.scheduler.waiting_queue.insert(0, job)
        except Exception:
            logger.exception("obcache: context %s stays exact", context.id)

    def _engine_is_idle(self) -> bool:
        """Whether no client waits for anything. Only within a pass."""
        scheduler = self.scheduler
        waits = any(not (isinstance(req, CompressionJob) and req.unattended) for req in self._waiting())
        runs = self._running_batch is not None and not self._running_batch.is_empty()
        return not waits and not runs and scheduler.chunked_req is None

    def _pool_is_tight(self) -> bool:
        return bool(self.cache.allocator.available_size() <= self.tight_slots)

    def _yields_engine(self) -> bool:
        """Whether somebody waits for the engine to become idle: what no client waits for must not keep it busy."""
        return self.scheduler.flush_wrapper._pending is not None

    def _stop_unattended(self) -> None:
        """Takes compressions that no client waits for out of the queue; they are due again when they are asked about.

        One whose prefill is under way ends with that.
        """
        for job in [req for req in self.scheduler.waiting_queue if isinstance(req, CompressionJob) and req.unattended]:
            self._dequeue(job)
            self.end_job(job, completed=False)

    def before_flush(self) -> None:
        """The cache is to be flushed, or weights were changed: a compression that nobody waits for gives the engine back at once."""
        scheduler = self.scheduler
        self._stop_unattended()
        jobs = [job for job in self._jobs.values() if job.unattended]
        if not jobs or any(req not in jobs and not req.finished() for req in {*self._in_flight(), *self._waiting()}):
            return
        # As pause_generation does: the forward under way ends, and its result is taken, before anything is given back.
        while scheduler.enable_overlap and scheduler.result_queue:
            scheduler.process_batch_result(*scheduler.result_queue.popleft())
        job = scheduler.chunked_req
        if isinstance(job, CompressionJob) and job.unattended:
            prepare_abort(job, "the cache is flushed")
            # Through the module, where our own hook sits.
            common.release_kv_cache(job, scheduler.tree_cache, checkpoint=False)
            scheduler.chunked_req = None
        self._stop_unattended()
        scheduler.last_batch = None

    def _find_context(self, req: ContextReq) -> Context | None:
        """The context of a request by its boundary, or the longest resident one that its prompt starts with."""
        plan, prompt = req.plan, req.origin_input_ids
        if plan.context_len == 0:
            context = self.cache.find_prefix(req.namespace, plan.settings, prompt)
            if context is not None:
                req.context_id = self.cache.capability(context, array("q"))
            return context
        # A prompt of its context alone still needs one token to generate from; auto-truncation may have cut it shorter.
        longest = len(prompt) if plan.action == "compress" else len(prompt) - 1
        boundary = min(plan.context_len, longest) // self.cache.page_size * self.cache.page_size
        if boundary == 0:
            req.exact_reason = "shorter_than_a_page"
            return None
        judges = prompt[boundary:] if plan.judged_by_rest else plan.judges
        context = self.cache.obtain(req.namespace, plan.settings, prompt[:boundary], judges)
        if context is None:
            req.exact_reason = "too_many_contexts"
        elif plan.context_id is None and context.state is not ContextState.DELETING:
            req.context_id = self.cache.capability(context, prompt[boundary : min(plan.context_len, len(prompt))])
        return context

    def _serve_resident(self, req: ContextReq, context: Context) -> Verdict:
        if req.return_logprob and not req.is_virtual and 0 <= req.logprob_start_len < context.num_tokens:
            req.set_finish_with_abort(
                f"logprob_start_len={req.logprob_start_len} is inside the compressed context of {context.num_tokens} tokens, "
                f"whose log-probabilities are not computed again; ask for {context.num_tokens} or more, "
                'or set custom_params {"obcache": false}.'
            )
            return Verdict.ADMIT
        if not req.is_virtual:
            compressed_now = req.compressions_started > 0
            if req.plan.pin:
                self._pin(context)
            if req.plan.ttl_seconds is not None:
                self._set_ttl(context, req.plan.ttl_seconds, made_now=compressed_now)
            if not compressed_now:
                context.reuses += 1
                self.metrics.reused(context.num_tokens)
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
        try:
            for context in self.cache:
                if context.pinned:
                    self.cache.unpin(context)
                    logger.warning("obcache: unpinned context %s, since nothing else could run", context.id)
                    return
        except Exception:
            logger.exception("obcache: unpinning a context")

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
        jobs = list(self._jobs.values())
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
        if sum(len(each.tokens) for each in passes) > MAX_REPLAY_FACTOR * context.num_tokens:
            return None, "replay_too_long"
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
        rid = hashlib.blake2b(str(self._num_jobs).encode(), digest_size=16, key=self._secret, person=b"job").hexdigest()
        self._jobs[context.id] = job = CompressionJob(context, like, rid=rid, passes=passes)
        context.is_queued = True
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
            if not isinstance(req, CompressionJob) or not req.is_final or req.extend_end != len(req.origin_input_ids):
                continue
            if self._jobs.get(req.context.id) is not req:
                req.error = "replaced"  # a second node of the same context would free the first one's slots
                continue
            slots = None
            try:
                slots = self.cache.reserve(req.context)
            except Exception:
                logger.exception("obcache: no slots for context %s", req.context.id)
            # Every rank takes part, also one whose scoring has failed in an earlier chunk.
            if self.agree(slots is not None and req.error is None):
                req.slots = slots
                continue
            req.error = req.error or "no_slots"
            try:
                self._discard(req.context)
                # Where another rank has evicted for it and this one has not: their trees must stay equal.
                evict_from_tree_cache(self.scheduler.tree_cache, req.context.num_slots)
            except Exception:
                logger.exception("obcache: taking back the slots of context %s", req.context.id)

    def before_release(self, req: Req, *, checkpoint: bool) -> None:
        """A request gives its KV back: a job ends, or starts over after retraction; a question leaves its suffix."""
        if isinstance(req, CompressionJob):
            if req.finished():
                self.end_job(req, completed=checkpoint and not isinstance(req.finished_reason, FINISH_ABORT))
            else:
                if self._jobs.get(req.context.id) is req:
                    self._discard(req.context)
                req.reset()
        elif isinstance(req, ContextReq):
            req.decided = False  # a retracted one waits again
            if req.is_virtual and checkpoint:
                assert req.context is not None
                self.cache.remember_suffix(req.context, req.suffix_ids(), instead_of=req.prompt_suffix_ids())

    def end_job(self, job: CompressionJob, *, completed: bool) -> None:
        """Publishes what a job made, or takes it back and lets its questions be served exactly.

        completed: its prefill ran to the end (else it was aborted: its questions may compress again).
        """
        context = job.context
        if self._jobs.get(context.id) is not job:
            return  # another one has taken its place
        del self._jobs[context.id]
        context.is_queued = False
        done = False
        try:
            done = completed and self._go_on_or_publish(job)
        except Exception:
            job.error = job.error or "error"
            logger.exception("obcache: the end of the compression of context %s", context.id)
        if completed and job.error is not None:
            job.skip_radix_cache_insert = job.replay is not None  # what was computed of the context is worth caching exactly
            for req in self.scheduler.waiting_queue:
                if isinstance(req, ContextReq) and req.context is context:
                    req.exact_reason = job.error
        if not done:
            self._discard(context)
        if completed:
            self._count(job, published=done and job.is_final)

    def _go_on_or_publish(self, job: CompressionJob) -> bool:
        """What follows a prefill of a job that ran to the end; False where nothing does, with the reason in `job.error` if it failed.

        All ranks come to the votes: nothing that could raise on one of them alone stands before.
        """
        context = job.context
        if not job.is_final:
            if not self._is_awaited(job):  # its client left while this pass ran
                return False
            if self.agree(job.error is None):
                # First in the queue: the next pass finds the context's exact KV still there.
                self.scheduler.waiting_queue.insert(0, self._queue_job(context, job))
                return True
            job.error = job.error or "error"
        if job.slots is not None:
            scored = job.error is None and job.compression.kept is not None
            if not self.agree(scored):
                job.error = job.error or ("error" if scored else "not_scored")
        if job.error is not None:
            return False
        assert job.compression.kept is not None
        self.cache.publish(context, job.compression.kept)
        return True

    def _count(self, job: CompressionJob, *, published: bool) -> None:
        """Metrics and log of a prefill that ran to the end. Whatever fails here on one rank changes no decision."""
        context = job.context
        try:
            if job.replay is not None:
                self.metrics.replayed(len(job.replay.tokens), time.perf_counter() - job.pass_started_at)
            if job.error is not None:
                logger.warning("obcache: context %s is served exactly: %s", context.id, job.error)
            if not published:
                return
            context.seconds = time.perf_counter() - job.started_at
            context.scoring_seconds = job.scoring_seconds
            context.job_cached_tokens = job.context_cached_tokens
            self.metrics.compressed(context.seconds, context.num_tokens, context.num_slots)
            self._set_gauges()
            logger.info(
                "obcache: compressed context %s: %d tokens to %d slots in %.3f s (scoring %.3f s), %s %s %s ratio %g",
                context.id, context.num_tokens, context.num_slots, context.seconds, context.scoring_seconds,
                context.settings.method, context.settings.score, context.settings.budget, context.settings.compression_ratio,
            )  # fmt: skip
        except Exception:
            logger.exception("obcache: counting context %s", context.id)

    def _discard(self, context: Context) -> None:
        if context.state is ContextState.COMPRESSING:
            self.cache.withdraw(context)

    def after_abort(self) -> None:
        """Ends the jobs nobody waits for any more. A job whose last chunk runs is let finish: the work is done."""
        for job in list(self._jobs.values()):
            if not self._is_alive(job):  # all were aborted, and it with them
                self.end_job(job, completed=False)
                continue
            if self._is_awaited(job):
                continue
            if job is self.scheduler.chunked_req:
                self.scheduler._pending_chunked_abort_req = job
            elif not job.kv.holds_kv:
                self._dequeue(job)
                self.end_job(job, completed=False)

    def _is_awaited(self, job: CompressionJob) -> bool:
        if job.unattended:
            return not self._yields_engine()
        return any(isinstance(req, ContextReq) and req.context is job.context for req in self._waiting())

    def _dequeue(self, job: CompressionJob) -> None:
        self.scheduler.waiting_queue = [req for req in self.scheduler.waiting_queue if req is not job]

    def _waiting(self) -> Iterable[Req]:
        yield from self.scheduler.waiting_queue
        yield from self._late or ()
        yield from self.scheduler.grammar_manager.grammar_queue

    def _in_flight(self) -> set[Req]:
        """Requests that hold KV: those of the batches under way, and one between two chunks of its prefill."""
        running = self._running_batch.reqs if self._running_batch is not None else ()
        chunked = self.scheduler.chunked_req
        return {*self.scheduler.collect_inflight_reqs(), *running, *((chunked,) if chunked is not None else ())}

    # --- pins, time to live, deletion -------------------------------------------------------------------------------

    def _pin(self, context: Context) -> None:
        if not context.pinned and self.cache.make_way_for_pin(context, self.max_pinned_slots):
            self.cache.pin(context)

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
            if context.expires_at is not None and context.expires_at <= self._now and context.state is ContextState.RESIDENT:
                self.cache.delete(context)
        self.sweep()

    def forget_adapter(self, lora_id: str) -> None:
        """A LoRA adapter was unloaded: its contexts are deleted, since another one may be loaded under the same name."""
        for context in [each for each in self.cache if each.namespace.lora_id == lora_id]:
            if not context.is_queued and context.state is not ContextState.DELETING:
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
        for req in {*self._in_flight(), *self._waiting()}:
            if isinstance(req, ContextReq) and req.is_virtual and req.context is not None and not req.finished():
                counts[req.context.id] = counts.get(req.context.id, 0) + 1
        return counts

    # --- control calls ----------------------------------------------------------------------------------------------

    def answer(self, call: dict[str, Any]) -> dict[str, Any]:
        """Answers one control call of the tokenizer process; op is status, list, get, positions, delete, gone, progress or expire.

        namespace: {"extra_key", "cache_salt", "lora_id"} of whoever asks, None for an operator who sees all. A context is asked for by
        its `context_id`, or by the `name` that lists show.
        """
        self.advance_clock(float(call.get("now", 0.0)))
        match call.get("op"):
            case "status":
                return {"ok": True, **self._status()}
            case "expire":
                due = [context.expires_at for context in self.cache if context.expires_at is not None]
                return {"ok": True, "next": min(due) if due else None}
            case "progress":
                asked = [req for req in self._waiting() if isinstance(req, ContextReq) and req.rid.startswith(call["rid"])]
                jobs = [self._jobs[req.context.id] for req in asked if req.context is not None and req.context.id in self._jobs]
                done, total = jobs[0].progress if jobs else (0, 0)
                return {"ok": True, "tokens": done, "of": total}
            case "gone":
                return {"ok": True, "gone": self.cache.get(call["name"]) is None}
            case "list":
                readers = self.readers()
                visible = [context for context in self.cache if self._is_visible(context, call)]
                held = [each for each in visible if self._is_held(each)]
                return {"ok": True, "contexts": [each.describe() | {"readers": readers.get(each.id, 0)} for each in held]}
        named = self._asked_for(call)
        if named is None:
            wanted = call.get("context_id") or call.get("name")
            return {
                "ok": False,
                "status_code": 404,
                "error": f"no context {wanted!r} is held in this namespace (cache salt, extra key, LoRA adapter)",
            }
        match call.get("op"):
            case "get":
                described = named.describe() | {"readers": self.readers().get(named.id, 0)}
                described["kept_per_head"] = None if named.kept is None else named.kept.counts(self.num_kv_heads)
                return {"ok": True, "context": described}
            case "positions":
                packed = None if named.kept is None else named.kept.packed_layer(int(call["layer"]), self.num_kv_heads)
                return {"ok": True, "positions": packed}
            case "delete":
                if named.is_queued:
                    return {"ok": False, "status_code": 409, "error": "the context is being compressed; delete it afterwards"}
                if named.state is not ContextState.DELETING:
                    self.cache.delete(named)
                self.sweep()
                return {"ok": True, "name": named.id, "gone": self.cache.get(named.id) is None}
        return {"ok": False, "status_code": 400, "error": f"unknown op {call.get('op')!r}"}

    def _asked_for(self, call: dict[str, Any]) -> Context | None:
        if call.get("context_id") is not None:
            known = self.cache.by_capability(call["context_id"])
            context = None if known is None else known[0]
        else:
            context = self.cache.get(call.get("name") or "")
        return context if context is not None and self._is_visible(context, call) and self._is_held(context) else None

    def _is_held(self, context: Context) -> bool:
        return self.cache.is_resident(context) or context.is_queued or context.state is not ContextState.ABSENT

    @staticmethod
    def _is_visible(context: Context, call: dict[str, Any]) -> bool:
        namespace = call.get("namespace")
        return namespace is None or context.namespace == Namespace.of(**namespace)

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
