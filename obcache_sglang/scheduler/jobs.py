"""The compressions under way: how one begins, goes on from pass to pass, and ends.

Ranks of one tensor-parallel group run this in step. `agree` is a collective: all come to it, or none.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from obcache_sglang.compress.measurement import Measurement
from obcache_sglang.compress.replay import ReplayPass, ReplayPrompts
from obcache_sglang.kv.context import Context, ContextState
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.context_cache import ContextCache
from obcache_sglang.scheduler.engine_view import EngineView
from obcache_sglang.scheduler.metrics import Metrics
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from obcache_sglang.scheduler.reservation import Reservation
from obcache_sglang.scheduler.room import Room, most_slots, segment_slots

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from obcache_sglang.compress.compression import Compression
    from obcache_sglang.kv.cells import KeptTokens

logger = logging.getLogger(__name__)

MAX_REPLAY_FACTOR = 4
"""Tokens that a replay may read for each token of its context, its prompts included."""


class Jobs:
    """Of one scheduler. agree: whether all ranks say True. secret: what request ids cannot be guessed without.

    on_published: called with each context that questions may read from then on.
    """

    def __init__(
        self,
        engine: EngineView,
        cache: ContextCache,
        room: Room,
        metrics: Metrics,
        *,
        agree: Callable[[bool], bool],
        secret: bytes,
    ) -> None:
        self.engine = engine
        self.cache = cache
        self.room = room
        self.metrics = metrics
        self.agree = agree
        self.on_published: Callable[[Context], None] = lambda context: None
        self.reservation = Reservation(engine, cache, agree)
        self._secret = secret
        self._num_jobs = 0
        self._by_context: dict[str, CompressionJob] = {}
        self._started_now: list[CompressionJob] = []
        self._prompts: ReplayPrompts | None = None

    def get(self, context: Context) -> CompressionJob | None:
        """The job of a context: that of its segment under way, where it has several."""
        return self._by_context.get(context.id)

    def all(self) -> list[CompressionJob]:
        """Those under way, the longest first."""
        return list(self._by_context.values())

    def await_another(self, context: Context) -> bool:
        """Whether a context, or a beginning that it is to be compressed after, is being made. From now on a client waits for that."""
        made = {context.id, *(identity for _, identity in self.cache.beginnings(context))}
        under_way = [
            job
            for job in self.all()
            if job.context.id in made or job.target.id in made or (job.reads_exact and job.context.begins_like(context))
        ]
        for job in under_way:
            job.unattended = False
        return context.is_queued or bool(under_way)

    def engine_is_idle(self) -> bool:
        """Whether no client waits for anything. Only within a pass."""
        waits = any(not (isinstance(req, CompressionJob) and req.unattended) for req in self.engine.waiting())
        return not waits and not self.engine.runs_something

    # --- beginning --------------------------------------------------------------------------------------------------

    def make(self, like: ContextReq, context: Context) -> tuple[CompressionJob | None, str]:
        """The compression of a context for `like`, or None and why it cannot be. The caller puts it into the queue."""
        if context.settings.is_replay and self.engine.tokenizer is None:
            return None, "no_tokenizer"
        passes = self._replay_passes(context)
        if passes is None:
            return None, "no_room_to_replay"
        if sum(len(each.tokens) for each in passes) > MAX_REPLAY_FACTOR * context.num_tokens:
            return None, "replay_too_long"
        base = self.cache.longest_beginning(context)
        first, page_size = 0 if base is None else base.num_tokens, self.cache.page_size
        longest = max((len(each.tokens) for each in passes), default=len(context.judges))
        if not self.room.can_hold(most_slots(context.settings, first, context.num_tokens, page_size) + longest):
            return None, "pool_too_small"
        if base is not None:
            self.cache.share(base, context)
        segment = self.cache.next_segment(context, base)
        if segment is None:
            return None, "too_many_contexts"
        if segment.state is ContextState.DELETING:
            return None, "deleted"
        job = self._make(segment, like, passes, base=base, target=context)
        self.room.make(self._new_slots(job) + longest)
        if job.window < context.settings.window:
            logger.warning(
                "obcache: context %s keeps only %d slots, so its window of %d tokens shrinks to %d",
                context.id, context.num_slots, context.settings.window, job.window,
            )  # fmt: skip
        return job, ""

    def make_measuring(self, like: Any, measurement: Measurement) -> tuple[CompressionJob | None, str]:
        """A job that only reads a context, and scores it where its method replays, or None and why it cannot be. No request waits for it.

        like: as a request has these fields.
        """
        context = measurement.context
        passes = self._replay_passes(context)
        if passes is None:
            return None, "no_room_to_replay"
        longest = max((len(each.tokens) for each in passes), default=0)
        if not self.room.can_hold(context.num_tokens + longest):
            return None, "pool_too_small"
        job = self._make(context, like, passes, compression=measurement)
        job.unattended = True
        return job, ""

    def give_up(self, job: CompressionJob, reason: str) -> None:
        """Ends a job that nobody wants any more: at once, or with the prefill that is under way."""
        job.error = reason
        if not job.kv.holds_kv:
            self._dequeue(job)
            self.end(job, completed=False)

    def _make(
        self,
        context: Context,
        like: Any,
        passes: Sequence[ReplayPass] = (),
        *,
        base: Context | None = None,
        target: Context | None = None,
        compression: Compression | None = None,
    ) -> CompressionJob:
        self._num_jobs += 1
        rid = hashlib.blake2b(str(self._num_jobs).encode(), digest_size=16, key=self._secret, person=b"job").hexdigest()
        has_read = isinstance(like, CompressionJob) and like.reads_exact  # SGLang caches it when that has given its KV back
        is_missing = base is None and not has_read and tree.exact_beginning(self.cache.tree, context) is None
        job = CompressionJob(
            context, like, rid=rid, passes=passes, base=base, target=target, compression=compression, reads_exact=is_missing
        )
        self._hold_exact(job)
        self._by_context[job.target.id] = job
        context.is_queued = job.target.is_queued = True
        if base is not None:
            self.cache.hold(base)
            job.holds_base = True
        job.time_stats.set_wait_queue_entry_time()
        return job

    def _hold_exact(self, job: CompressionJob) -> None:
        """Keeps the exact tokens that a job reads from being evicted, once they are cached: those that its context begins with; for a local
        pass, which alone would hold no more than it stands after, the whole context."""
        is_local = job.local_pass is not None
        needs = is_local or (job.context.num_exact > 0 and job.base is None and not job.reads_exact)
        find = tree.exact_slots if is_local else tree.exact_beginning
        if needs and job.exact_lock is None and (exact := find(self.cache.tree, job.context)) is not None:
            job.exact_lock = self.cache.tree.lock(exact[0])

    def _replay_passes(self, context: Context) -> list[ReplayPass] | None:
        """What method replay reads after the context; None where the model's context length leaves no room for it."""
        if not context.settings.is_replay:
            return []
        if self._prompts is None:
            self._prompts = ReplayPrompts(self.engine.tokenizer)
        room = self.engine.context_len - context.num_tokens - self._prompts.num_tokens - 1
        chunk, local = min(context.settings.replay_chunk, room), context.settings.replay_attention == "local"
        return self._prompts.passes(context.tokens, chunk, local=local, page_size=self.cache.page_size) if chunk > 0 else None

    def started(self, job: CompressionJob) -> None:
        """The pass under way starts it: it is not in the queue yet."""
        self._started_now.append(job)

    def end_pass(self) -> None:
        """What the pass started is in the queue now, or under way."""
        self._started_now = []

    # --- under way --------------------------------------------------------------------------------------------------

    def is_alive(self, job: CompressionJob) -> bool:
        """Whether it is queued or holds KV; else SGLang has dropped it."""
        return job.kv.holds_kv or any(req is job for req in (*self.engine.queue, *self._started_now))

    def is_awaited(self, job: CompressionJob) -> bool:
        """Whether a client waits for it, or, where none does, nobody needs the engine idle."""
        if job.unattended:
            return not self.engine.must_become_idle
        return any(isinstance(req, ContextReq) and req.context is job.target for req in self.engine.waiting())

    def end_dead(self) -> None:
        """Ends those that SGLang has dropped."""
        for dead in [each for each in self.all() if not self.is_alive(each)]:
            self.end(dead, completed=False)

    def end_unawaited(self) -> None:
        """After an abort: ends the jobs nobody waits for any more."""
        for job in self.all():
            if not self.is_alive(job):  # all were aborted, and it with them
                self.end(job, completed=False)
                continue
            if not self.is_awaited(job):
                self._end_before_next_chunk(job)

    def forget_adapter(self, lora_id: str) -> None:
        """A LoRA adapter was unloaded. No client waits for anything of it, or SGLang would not have done so."""
        for job in self.all():
            if job.lora_id == lora_id:
                self._end_before_next_chunk(job)

    def _end_before_next_chunk(self, job: CompressionJob) -> None:
        """At once, if it waits. One whose last chunk runs is let finish: the work is done."""
        if job is self.engine.chunked_req:
            self.engine.abort_after_chunk(job)
        elif not job.kv.holds_kv:
            self._dequeue(job)
            self.end(job, completed=False)

    def stop_unattended(self) -> None:
        """Takes compressions that no client waits for out of the queue; they are due again when they are asked about.

        One whose prefill is under way ends with that.
        """
        for job in [req for req in self.engine.queue if isinstance(req, CompressionJob) and req.unattended]:
            self._dequeue(job)
            self.end(job, completed=False)

    def give_engine_back(self) -> None:
        """The cache is to be flushed, or weights were changed: a compression that nobody waits for ends at once."""
        self.stop_unattended()
        jobs = [job for job in self.all() if job.unattended]
        if not jobs or any(req not in jobs and not req.finished() for req in {*self.engine.in_flight(), *self.engine.waiting()}):
            return
        # The forward under way ends, and its result is taken, before anything is given back.
        self.engine.finish_forwards()
        job = self.engine.chunked_req
        if isinstance(job, CompressionJob) and job.unattended:
            self.engine.end_chunked("the cache is flushed")
        self.stop_unattended()
        self.engine.forget_last_batch()

    @staticmethod
    def slots_to_admit(req: Req) -> int:
        """KV slots that a request takes when it is admitted, beside those that SGLang counts: a final prefill's kept tokens."""
        if not isinstance(req, CompressionJob) or not req.is_final or req.slots is not None:
            return 0
        return req.context.num_slots if req.owns_exact else req.context.own_slots

    def reserve(self, batch: ScheduleBatch) -> None:
        """Reserves the slots of jobs whose final prefill begins in this batch, after the batch's own allocation.

        Not later: while a long prefill goes on, chunk after chunk, other requests would take them. All ranks come to the votes: one
        at the first chunk, about the slots, and one at the last, since scoring may have failed on one of them in between.
        """
        for req in batch.reqs:
            if not isinstance(req, CompressionJob) or not req.is_final:
                continue
            is_first = req.slots is None and req.error is None
            if not is_first and req.extend_end != len(req.origin_input_ids):
                continue
            if self.get(req.target) is not req:
                req.error = "replaced"  # a second node of the same context would free the first one's slots
                continue
            if is_first:
                req.slots = self.reservation.on_all_ranks(req.context, may_own_exact=req.owns_exact)
                req.error = None if req.slots is not None else "no_slots"
            elif not self.agree(req.slots is not None and req.error is None):
                req.error, req.slots = req.error or "no_slots", None
                self.reservation.give_back_contained(req.context)

    def release(self, job: CompressionJob, *, checkpoint: bool) -> None:
        """It gives its KV back: it ends, or starts over after retraction."""
        if job.finished():
            self.end(job, completed=checkpoint and not isinstance(job.finished_reason, FINISH_ABORT))
            return
        if self.get(job.target) is job:
            self.reservation.give_back(job.context)
        job.reset()

    # --- ending -----------------------------------------------------------------------------------------------------

    def end(self, job: CompressionJob, *, completed: bool) -> None:
        """Publishes what a job made, or takes it back and lets its questions be served exactly.

        completed: its prefill ran to the end (else it was aborted: its questions may compress again).
        """
        context = job.context
        if self.get(job.target) is not job:
            self._release_base(job)
            return  # another one has taken its place
        del self._by_context[job.target.id]
        context.is_queued = job.target.is_queued = False
        done = False
        try:
            done = completed and self._go_on_or_publish(job)
        except Exception:
            job.error = job.error or "error"
            logger.exception("obcache: finishing the compression of context %s failed", context.id)
        if completed and job.error is not None:
            # What was computed of the context is worth caching exactly.
            job.skip_radix_cache_insert = job.replay is not None or job.base is not None
            self.refuse(job.target, job.error)
        if not done:
            self.reservation.give_back(context)
        self._release_base(job)
        if completed:
            self._count(job, published=done and job.is_final and context is job.target)

    def _release_base(self, job: CompressionJob) -> None:
        lock, job.exact_lock = job.exact_lock, None  # once, also where it raises
        self.cache.tree.unlock(lock)
        if job.holds_base and job.base is not None:
            job.holds_base = False  # once, also where it raises
            self.cache.release(job.base)

    def refuse(self, context: Context, reason: str) -> None:
        """Lets the questions that wait for a context be served exactly."""
        for req in self.engine.queue:
            if isinstance(req, ContextReq) and req.context is context:
                req.exact_reason = reason

    def publish(self, context: Context, kept: KeptTokens) -> None:
        """Questions may read a context from now on; it is pinned if one asked for that while it was served exactly."""
        self.cache.publish(context, kept)
        self.on_published(context)
        if context.is_wanted_pinned:
            context.is_wanted_pinned = False
            self.room.pin(context)

    def ask_again(self, context: Context, instead_of: Context | None) -> None:
        """Questions that were to be served exactly until a context is compressed, or after the one that it stands instead of, are decided on
        anew: it is compressed now."""
        for req in self.engine.queue:
            if isinstance(req, ContextReq) and req.is_virtual and req.context is instead_of:
                req.decided = False
            if not isinstance(req, ContextReq) or req.exact_reason not in ("deferred", "no_context"):
                continue
            if req.namespace == context.namespace and context.begins(req.prompt_ids):
                req.exact_reason, req.decided = None, False

    def _go_on_or_publish(self, job: CompressionJob) -> bool:
        """What follows a prefill of a job that ran to the end; False where nothing does, with the reason in `job.error` if it failed.

        All ranks come to the votes: nothing that could raise on one of them alone stands before.
        """
        context = job.context
        if not job.is_final:
            if not self.is_awaited(job):  # its client left while this pass ran
                return False
            if self.agree(job.error is None):
                if isinstance(job.compression, Measurement) and not job.passes:
                    job.compression.scored()
                else:
                    # First in the queue: the next pass finds the context's exact KV still there.
                    self.engine.queue.insert(0, self._make(context, job))
                return True
            job.error = job.error or "error"
        kept = job.compression.kept
        if job.slots is not None:
            scored = job.error is None and kept is not None
            if not self.agree(scored):
                job.error = job.error or ("error" if scored else "not_scored")
        if job.error is not None:
            return False
        assert kept is not None
        self.publish(context, kept)
        if context is job.target or not self.is_awaited(job):
            return True
        following = self.cache.next_segment(job.target, context)
        if following is None or following.state is ContextState.DELETING or (following.is_queued and following is not job.target):
            job.error = "too_many_contexts" if following is None else "replaced"
            return False
        self.engine.queue.insert(0, self._make(following, job, base=context, target=job.target))
        return True

    def make_room_for_segments(self) -> None:
        """What gives way first for the next segment of each context, once: what its last job held is given back by now."""
        for job in self.all():
            self._hold_exact(job)
            if job.holds_base and not job.has_room and job.base is not None and not job.kv.holds_kv:
                job.has_room = True
                self.room.make(self._new_slots(job))

    def forget_bases(self) -> None:
        """The tree was reset: jobs after a base, or after exact tokens, cannot run any more."""
        for job in [each for each in self.all() if each.base is not None or each.exact_lock is not None]:
            job.exact_lock = None
            self._dequeue(job)
            self.end(job, completed=False)

    def _count(self, job: CompressionJob, *, published: bool) -> None:
        """Metrics and log of a prefill that ran to the end. Whatever fails here on one rank changes no decision."""
        context = job.context
        try:
            if job.replay is not None:
                self.metrics.replayed(len(job.replay.tokens), time.perf_counter() - job.pass_started_at)
            if job.error is not None:
                logger.warning("obcache: context %s is not compressed and is served exactly: %s", context.id, job.error)
            if not published:
                return
            self.metrics.published(context, job.started_at, job.scoring_seconds, job.context_cached_tokens, self.cache)
        except Exception:
            logger.exception("obcache: updating the metrics for context %s failed", context.id)

    def discard_orphans(self) -> None:
        """Takes back what jobs have left that failed to end."""
        for context in [each for each in self.cache if not each.is_queued]:
            self.reservation.give_back(context)

    def _dequeue(self, job: CompressionJob) -> None:
        self.engine.queue = [req for req in self.engine.queue if req is not job]

    def _new_slots(self, job: CompressionJob) -> int:
        """KV slots that a job takes, beside those of its base."""
        first, held = (0, 0) if job.base is None else (job.base.num_tokens, job.base.num_slots)
        return segment_slots(job.context.settings, first, job.context.num_tokens, self.cache.page_size) - held
