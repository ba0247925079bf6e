"""Room in the KV pool: which compression waits, and what gives way."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection

from obcache_sglang.kv.context import Context, ContextState
from obcache_sglang.scheduler.context_cache import ContextCache
from obcache_sglang.scheduler.engine_view import EngineView
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq

logger = logging.getLogger(__name__)

TIGHT_POOL = 0.1
"""A pool with less than this share of its KV slots free is tight: with when=idle a context is compressed although the engine is busy."""


class Room:
    """max_pinned_slots: KV slots that pinned contexts may hold together; None for half of the pool."""

    def __init__(self, engine: EngineView, cache: ContextCache, max_pinned_slots: int | None) -> None:
        self.engine = engine
        self.cache = cache
        self.tight_slots = int(TIGHT_POOL * engine.pool_slots)
        self.max_pinned_slots = engine.pool_slots // 2 if max_pinned_slots is None else min(max_pinned_slots, engine.pool_slots)
        self._one_waits = False

    def begin_pass(self) -> None:
        """Who waited in the pass before is asked again."""
        self._one_waits = False

    @property
    def is_tight(self) -> bool:
        return self.engine.free_slots() <= self.tight_slots

    def must_wait(self, context: Context, jobs: Collection[CompressionJob]) -> bool:
        """True if starting this compression now would evict compressed contexts, because running compressions still hold their exact KV.

        Each that is evicted must be compressed again, and evicts others then. Those under way give their exact KV back soon.
        """
        if self._one_waits:
            return True  # in the order of the queue, so that small ones do not overtake a large one for ever
        if not jobs:
            return False
        needed = sum(slots_to_compress(each) for each in (context, *(job.context for job in jobs)))
        spare = self.tight_slots  # for the questions that are being answered
        if needed <= spare:
            return False
        held = sum(job.kv.kv_allocated_len + (0 if job.slots is None else job.context.num_slots) for job in jobs)
        kept = sum(each.num_slots for each in self.cache if each.state is ContextState.RESIDENT and each.tree_lock is None)
        self.make(needed - held + spare)
        room = self.engine.free_slots() + max(0, self.cache.tree.evictable_size() - kept)
        self._one_waits = needed - held + spare > room
        return self._one_waits

    def has_spare(self, num_slots: int) -> bool:
        """Whether so many can be taken past SGLang's admission, which has promised what is free to the requests that run."""
        return bool(self.engine.free_slots() + self.cache.tree.evictable_size() - num_slots >= self.tight_slots)

    def make(self, num_slots: int) -> None:
        """Frees what answered questions left after contexts, from the least recently used on, until so many slots are free.

        By last use alone the tree would evict idle contexts before: a question's own tokens are newer than every context but one,
        and are rarely asked for again.
        """
        if self.engine.free_slots() >= num_slots:
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
                if self.engine.free_slots() >= num_slots:
                    return

    def readers(self) -> Counter[str]:
        """Requests that use each context now, by context id."""
        readers: Counter[str] = Counter()
        for req in {*self.engine.in_flight(), *self.engine.waiting()}:
            if isinstance(req, ContextReq) and req.is_virtual and req.context is not None and not req.finished():
                readers[req.context.id] += 1
        return readers

    def pin(self, context: Context) -> None:
        """Pins a context, if there is room for one more pin."""
        if not context.pinned and self.cache.make_way_for_pin(context, self.max_pinned_slots):
            self.cache.pin(context)

    def release_a_pin(self) -> None:
        """Nothing hangs: where nothing runs and nothing fits, pinned contexts yield, the least recently used first, one a pass."""
        for context in self.cache:
            if context.pinned:
                self.cache.unpin(context)
                logger.warning(
                    "obcache: unpinned context %s: nothing runs, and no waiting request fits beside the pinned contexts",
                    context.id,
                )
                return


def slots_to_compress(context: Context) -> int:
    """About so many are taken by the exact KV of a context, what is replayed after it, and its kept tokens.

    Asked of waiting requests in each pass: what `Jobs.make` knows exactly would take the replay's prompts.
    """
    replayed = context.settings.replay_chunk if context.settings.is_replay else 0
    return context.num_tokens + min(replayed, context.num_tokens) + context.num_slots
