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

from obcache_sglang.host import use
from obcache_sglang.kv.cells import KeptTokens
from obcache_sglang.kv.context import Context
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.jobs import Jobs

logger = logging.getLogger(__name__)

MOST_WAITING_PASSES = 512
"""For room beside what runs, before a context is compressed anew, which SGLang admits in its turn."""


class HostMemory:
    """Of one scheduler. fresh: ids of the contexts that came back, and that no question has read yet."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.engine, self.cache, self.metrics = jobs, jobs.engine, jobs.cache, jobs.metrics
        self.fresh: set[str] = set()
        # By context id, with the time of `time.perf_counter` at which each began to come back.
        self._coming: dict[str, tuple[Context, float]] = {}
        # Held for the pass in which they are back, so that one does not go for the next before its question is admitted.
        self._held: list[Context] = []
        self._waited: Counter[str] = Counter()
        self._one_waits = False

    def awaits(self, context: Context) -> bool:
        """Whether a question waits for its context to come back, or for the longest compressed one that this begins with. Begins that."""
        if not tree.has_host_tier(self.cache.tree):
            return False
        known = [self.cache.get(identity) for _, identity in reversed(self.cache.beginnings(context))]
        for each in (context, *known):
            if each is None:
                continue
            if self.cache.is_resident(each):
                return False
            if self.cache.is_on_host(each):
                return self._bring(each)
        return False

    def _bring(self, context: Context) -> bool:
        """Whether a context is coming back, or will; else it is not in host memory any more."""
        assert context.node is not None
        if context.id in self._coming:
            return True
        # In the order of the queue, so that small ones do not overtake a large one for ever.
        if self._one_waits:
            return True
        self.engine.wait_for_loads()
        if not self.engine.may_load():
            return True
        self.jobs.room.make(context.num_slots)
        waits = self.engine.runs_something and not self.jobs.room.has_spare(context.num_slots)
        if not waits:
            if self.cache.tree.load_back(context.node):
                self.cache.tree.ready_to_load_host_cache()
                if context.num_shared:  # others may read the exact text before it at once
                    self.engine.wait_for_loads()
                self._coming[context.id] = context, time.perf_counter()
                return True
            waits = bool(self.engine.runs_something or self._coming or self._held)
        self._waited[context.id] += 1
        self._one_waits = waits and self._waited[context.id] <= MOST_WAITING_PASSES
        if not self._one_waits:
            del self._waited[context.id]
            logger.warning("obcache: context %s has no room to come back from host memory, and is compressed anew", context.id)
            self.cache.retire(context)
        return self._one_waits

    def advance(self) -> None:
        """What has come back is there from now on. Called at the same points on all ranks."""
        self._release()
        self._one_waits = False
        for identity, (context, started_at) in list(self._coming.items()):
            if context.node is not None and context.node in self.cache.tree.ongoing_load_back:
                continue
            del self._coming[identity]
            self._waited.pop(identity, None)
            if self.cache.get(identity) is not context or not self.cache.is_on_host(context):
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
            found, kept = tree.compressed_slots(self.cache.tree, context), context.kept
            assert found is not None and kept is not None
            return kept.located(self.engine.kv_space, found[1]) if context.is_uneven else kept
        except Exception:
            logger.exception("obcache: context %s, back from host memory, cannot be read and is compressed anew", context.id)
            return None

    def _returned(self, context: Context, kept: KeptTokens, started_at: float) -> None:
        self.cache.returned(context, kept)
        self._held.append(context)
        self.fresh.add(context.id)
        try:  # as in `Jobs`: whatever fails here on one rank changes no decision
            self.metrics.came_back(time.perf_counter() - started_at, context.own_slots)
            self.metrics.set_gauges(self.cache)
        except Exception:
            logger.exception("obcache: updating the metrics for context %s failed", context.id)

    def _release(self) -> None:
        for context in self._held:
            self.cache.release(context)
        self._held = []

    def forget(self) -> None:
        """The tree was reset. Before the cache is told so."""
        self._coming.clear()
        self._held.clear()
        self._waited.clear()
        self.fresh.clear()


_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"

TOUCHES = (use(f"{_TREE}.load_back", "call", "brings a node back", ("node_id",)),)
