"""What is done with contexts when the engine has nothing else to do.

With `--obcache-when idle` they are compressed; until then their questions are served exactly. With `--obcache-when pressure` those that were
compressed for want of room, and are asked about again, are read exactly again once there is room: then they are as they were before.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace

from obcache_sglang.compress.measurement import Measurement
from obcache_sglang.kv.context import Context
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.pressure import UnderPressure
from obcache_sglang.scheduler.requests import ContextReq

logger = logging.getLogger(__name__)

MAX_DEFERRED = 256
"""Contexts that wait until the engine is idle; of more the first to come is given up, until it is asked about again."""


class WhenIdle:
    """Of one scheduler. Ranks of one tensor-parallel group run this in step.

    under_pressure: what compresses those whose exact KV is cached, and what has compressed for want of room. Its jobs compress the others.
    """

    def __init__(self, under_pressure: UnderPressure) -> None:
        self.under_pressure = under_pressure
        self.in_place, self.jobs = under_pressure.in_place, under_pressure.jobs
        self._deferred: OrderedDict[str, tuple[Context, ContextReq]] = OrderedDict()
        # Served compressed for want of room, the one asked about last stands last.
        self._lossy: OrderedDict[str, tuple[Context, ContextReq]] = OrderedDict()
        # What is read exactly again, as long as its job goes on.
        self._reading: tuple[Context, ContextReq] | None = None

    def add(self, context: Context, req: ContextReq) -> None:
        """req: a question about it, served exactly for now."""
        if context.is_queued:
            return
        self._deferred.setdefault(context.id, (context, req))
        if len(self._deferred) > MAX_DEFERRED:
            self._deferred.popitem(last=False)

    def used(self, context: Context, req: ContextReq) -> None:
        """req: a question that reads it compressed, or who wants it so."""
        if req.plan.action != "ask":
            self.under_pressure.shrunk.discard(context.id)
        if context.id not in self.under_pressure.shrunk or not context.reuses:
            return
        self._lossy[context.id] = context, req
        self._lossy.move_to_end(context.id)
        if len(self._lossy) > MAX_DEFERRED:
            self._lossy.popitem(last=False)

    @property
    def is_due(self) -> bool:
        """Whether something may start now, if the engine is idle or its pool tight."""
        jobs = self.jobs
        wanted = self._deferred or self._lossy or self._reading is not None
        return bool(wanted) and not (jobs.all() or self.in_place.is_busy or jobs.engine.must_become_idle)

    def advance(self) -> None:
        """Starts one thing at a time: the compression of the context that waits for longest, or the reading of one."""
        jobs = self.jobs
        if not self.is_due:
            return
        reading, self._reading = self._reading, None
        try:
            if reading is not None:
                self._read(*reading)
            if self._deferred and (jobs.engine_is_idle() or jobs.room.is_tight):
                self._compress(*self._deferred.popitem(last=False)[1])
            elif self._lossy and jobs.engine_is_idle() and not self.under_pressure.is_pressed:
                self._read_exactly(*self._lossy.popitem()[1])
        except Exception:
            logger.exception("obcache: what was to be done while nobody waits failed")

    def _compress(self, context: Context, req: ContextReq) -> None:
        jobs = self.jobs
        if jobs.cache.get(context.id) is not context or context.is_queued or jobs.cache.has(context):
            return
        if self.in_place.start(context):
            self.in_place.advance()  # nothing else may call for another pass
            return
        job, refusal = jobs.make(req, context)
        if job is None:
            logger.warning("obcache: context %s is not compressed: %s", context.id, refusal)
        else:
            job.unattended = True
            jobs.engine.queue.insert(0, job)

    def _read_exactly(self, context: Context, req: ContextReq) -> None:
        """Where it does not fit, nothing happens until it is asked about again."""
        jobs, going = self.jobs, self._making_room(context)
        # All ranks come to the vote, and nothing has changed before it.
        if not jobs.agree(going is not None) or going is None:
            return
        for node in going:
            tree.evict_leaf(jobs.cache.tree, node)
        # Not the context's own id: its questions do not wait, and are served from what it keeps meanwhile. Nor what it begins with by itself.
        settings = replace(context.settings, exact_tokens=0)
        read = Context(f"{context.id}-exact", context.namespace, settings, context.tokens, context.num_slots)
        job, _ = jobs.make_measuring(req, Measurement(read, lambda: None))
        if job is not None:
            jobs.engine.queue.insert(0, job)
            self._reading = context, req

    def _making_room(self, context: Context) -> list[int] | None:
        """What goes for a context's exact tokens; None where they do not fit, it is not to be read, or a defect of this rank keeps it from knowing."""
        cache = self.jobs.cache
        try:
            if not cache.is_resident(context) or context.pinned:
                return None
            missing = context.num_tokens - tree.match_exact(cache.tree, context)[0]
            return self.under_pressure.text_before(context, missing + self.jobs.room.tight_slots)
        except Exception:
            logger.exception("obcache: planning to read context %s again failed", context.id)
            return None

    def _read(self, context: Context, req: ContextReq) -> None:
        """The job of a reading has ended. Where all of the context is cached exactly, it is what stays exact until there is pressure again."""
        cache = self.jobs.cache
        num_tokens, _ = tree.match_exact(cache.tree, context)
        if num_tokens < context.num_tokens or not cache.is_resident(context):
            return
        # Not on the step of the ladder that it has reached.
        settings = replace(context.settings, compression_ratio=req.plan.settings.compression_ratio)
        first = cache.obtain(context.namespace, settings, context.tokens, context.judges, keep=(context,))
        if first is None:
            return
        cache.retire(context)
        self.under_pressure.add(first)
        self.jobs.metrics.restored(cache)
        logger.info("obcache: context %s, %d tokens, is cached exactly again", context.id, context.num_tokens)

    def forget(self) -> None:
        """The tree was reset."""
        self._deferred.clear()
        self._lossy.clear()
        self._reading = None
