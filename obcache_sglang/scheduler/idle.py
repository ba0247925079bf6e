"""Contexts that are compressed when the engine has nothing else to do (`--obcache-when idle`). Until then their questions are served exactly."""

from __future__ import annotations

import logging

from obcache_sglang.kv.context import Context
from obcache_sglang.scheduler.in_place import InPlace
from obcache_sglang.scheduler.requests import ContextReq

logger = logging.getLogger(__name__)

MAX_DEFERRED = 256
"""Contexts that wait to be compressed when the engine is idle; of more the first to come is given up, until it is asked about again."""


class WhenIdle:
    """Of one scheduler. in_place: what compresses those whose exact KV is cached; its jobs compress the others."""

    def __init__(self, in_place: InPlace) -> None:
        self.in_place, self.jobs = in_place, in_place.jobs
        self._deferred: dict[str, tuple[Context, ContextReq]] = {}

    def add(self, context: Context, req: ContextReq) -> None:
        """req: a question about it, served exactly for now."""
        if context.is_queued:
            return
        self._deferred.setdefault(context.id, (context, req))
        if len(self._deferred) > MAX_DEFERRED:
            del self._deferred[next(iter(self._deferred))]

    @property
    def is_due(self) -> bool:
        """Whether a compression may start now, if the engine is idle or its pool tight."""
        jobs = self.jobs
        return bool(self._deferred) and not (jobs.all() or self.in_place.is_busy or jobs.engine.must_become_idle)

    def advance(self) -> None:
        """Starts the compression of the context that waits for longest, one at a time."""
        jobs = self.jobs
        if not self.is_due or not (jobs.engine_is_idle() or jobs.room.is_tight):
            return
        context, req = self._deferred.pop(next(iter(self._deferred)))
        if jobs.cache.get(context.id) is not context or context.is_queued or jobs.cache.has(context):
            return
        try:
            if self.in_place.start(context):
                self.in_place.advance()  # nothing else may call for another pass
                return
            job, refusal = jobs.make(req, context)
            if job is None:
                logger.warning("obcache: context %s is not compressed: %s", context.id, refusal)
            else:
                job.unattended = True
                jobs.engine.queue.insert(0, job)
        except Exception:
            logger.exception("obcache: starting the compression of context %s failed", context.id)

    def forget(self) -> None:
        """The tree was reset."""
        self._deferred.clear()
