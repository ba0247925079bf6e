"""Contexts that SGLang's HiCache has moved to host memory (`--enable-hierarchical-cache`): they come back to slots before they are read.

A context is a node of the tree, and HiCache copies and moves nodes: whole slots of all layers, in their order, so that every head finds
its tokens again. What is not in slots stays with the record of the context: positions, and how many each head keeps. SGLang brings a node
back while the batch runs that reads it, layer by layer; attention over heads that keep different tokens cannot wait so, and questions
are held until all of it is there.

Ranks of one tensor-parallel group have equal trees, and SGLang counts together which copies are done. Only what a defect of one rank could
keep from being read is voted on: `agree` is a collective, to which all come.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from obcache_sglang.host import use
from obcache_sglang.kv.cells import KeptTokens
from obcache_sglang.kv.context import Context, KeptContext
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.jobs import Jobs
from obcache_sglang.scheduler.requests import ContextReq

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

MOST_WAITING_PASSES = 512
"""For room beside what runs, before a context is compressed anew, which SGLang admits in its turn."""

ADMITTED_SEEN = 16
"""Requests that may run in a pass, and whose contexts stay for it: the next pass sees the others."""


class HostMemory:
    """Of one scheduler."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.engine, self.cache, self.metrics = jobs, jobs.engine, jobs.cache, jobs.metrics
        # What questions of the pass under way wait for, in the order of the queue.
        self._wanted: dict[str, Context] = {}
        # By context id, with the time of `time.perf_counter` at which each began to come back.
        self._coming: dict[str, tuple[Context, float]] = {}
        # Held for the pass in which they are back, so that one does not go for the next before its question is admitted.
        self._held: list[Context] = []
        # Those that no question has read yet.
        self._fresh: dict[str, KeptContext] = {}
        self._waited: Counter[str] = Counter()

    def awaits(self, context: Context) -> bool:
        """Whether a question waits for its context to come back, or for the longest compressed one that this begins with."""
        if context.is_queued or not tree.has_host_tier(self.cache.tree):
            return False
        known = [self.cache.get(identity) for _, identity in reversed(self.cache.beginnings(context))]
        for each in (context, *known):
            if each is None or each.is_queued:
                continue
            if self.cache.is_resident(each):
                return False
            if self.cache.is_on_host(each):
                self._wanted[each.id] = each
                return True
        return False

    def is_fresh(self, context: Context) -> bool:
        """Whether it has come back for the question that reads it now, the first one."""
        kept = self._fresh.pop(context.id, None)
        return kept is not None and kept is context.resident

    def bring(self, admitted: Sequence[Req]) -> None:
        """Begins to bring back what questions wait for. admitted: the requests that may run now; what the first of them read stays.

        After all decisions of a pass: none of them is undone by it.
        """
        self.engine.keep_a_load_place()
        wanted, self._wanted = self._wanted, {}
        self._waited = Counter({each: self._waited[each] for each in wanted if each in self._waited})
        if not wanted:
            return
        if self.cache.tree.cache_controller.load_queue:
            # Of a request that SGLang has not admitted: its batch would not wait for what begins with ours.
            self.engine.wait_for_loads()
        read = [req.context for req in admitted[:ADMITTED_SEEN] if isinstance(req, ContextReq) and req.is_virtual]
        held = [each for each in read if each is not None and self.cache.is_resident(each)]
        for each in held:
            self.cache.hold(each)
        try:
            for each in wanted.values():
                if each.id not in self._coming and not self._begun(each, is_busy=bool(held)):
                    return  # in the order of the queue, so that small ones do not overtake a large one for ever
        finally:
            for each in held:
                self.cache.release(each)

    def _begun(self, context: Context, *, is_busy: bool) -> bool:
        """Whether the next one may be begun too. is_busy: whether something is about to run that will give room back."""
        cache, engine = self.cache, self.engine
        if context.node is None or not engine.may_load():
            return False
        self.jobs.room.make(context.num_slots)
        has_room = engine.free_slots() + cache.tree.evictable_size() >= context.num_slots
        if not engine.runs_something or self.jobs.room.has_spare(context.num_slots):
            if cache.tree.load_back(context.node):
                cache.tree.ready_to_load_host_cache()
                if context.num_shared:  # others may read the exact text before it at once
                    engine.wait_for_loads()
                self._coming[context.id] = context, time.perf_counter()
                return True
            if has_room:
                self._give_up(context, "HiCache refuses")
                return True
        self._waited[context.id] += 1
        waits = engine.runs_something or is_busy or self._coming or self._held
        if not waits or self._waited[context.id] > MOST_WAITING_PASSES:
            self._give_up(context, "there is no room")
        return False

    def _give_up(self, context: Context, why: str) -> None:
        logger.warning("obcache: context %s does not come back from host memory, and is compressed anew: %s", context.id, why)
        self.cache.retire(context)

    def advance(self) -> None:
        """What has come back is there from now on. Called at the same points on all ranks."""
        self._release()
        for identity, (context, started_at) in list(self._coming.items()):
            if context.node is not None and context.node in self.cache.tree.ongoing_load_back:
                continue
            del self._coming[identity]
            if self.cache.get(identity) is not context or context.is_queued or not self.cache.is_on_host(context):
                continue
            if tree.place(self.cache.tree, context) != "device":
                continue  # whoever asks for it has it looked for again
            kept = self._located(context)
            if self.jobs.agree(kept is not None) and kept is not None:
                self._returned(context, kept, started_at)
            else:
                self.cache.retire(context)

    def _located(self, context: Context) -> KeptTokens | None:
        """Where its tokens are now; None where a defect of this rank keeps it from knowing."""
        try:
            found = tree.compressed_slots(self.cache.tree, context)
            assert found is not None and context.kept_away is not None
            kept = context.kept_away.on(found[1].device)
            return kept.located(self.engine.kv_space, found[1]) if context.is_uneven else kept
        except Exception:
            logger.exception("obcache: context %s, back from host memory, cannot be read and is compressed anew", context.id)
            return None

    def _returned(self, context: Context, kept: KeptTokens, started_at: float) -> None:
        self.cache.returned(context, kept)
        self._held.append(context)
        assert context.resident is not None
        self._fresh[context.id] = context.resident
        try:  # as in `Jobs`: whatever fails here on one rank changes no decision
            self.metrics.came_back(time.perf_counter() - started_at, context.own_slots)
            self.metrics.set_gauges(self.cache)
        except Exception:
            logger.exception("obcache: updating the metrics for context %s failed", context.id)

    def _release(self) -> None:
        for context in self._held:
            self.cache.release(context)
        self._held = []

    def deleted(self, context: Context) -> None:
        """Its slots are to go as soon as it has no readers."""
        self._fresh.pop(context.id, None)
        if context in self._held:
            self._held.remove(context)
            self.cache.release(context)

    def forget(self) -> None:
        """The tree was reset. Before the cache is told so."""
        for each in (self._wanted, self._coming, self._held, self._fresh, self._waited):
            each.clear()


TOUCHES = (
    use("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.load_back", "call", "brings a node back", ("node_id",)),
)
