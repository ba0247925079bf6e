"""Room in the KV pool: which compression waits, and what gives way."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from itertools import pairwise

from obcache_sglang.kv.context import Context, ContextState, Namespace
from obcache_sglang.scheduler.context_cache import ContextCache
from obcache_sglang.scheduler.engine_view import EngineView
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from obcache_sglang.settings import CompressionSettings

logger = logging.getLogger(__name__)

PROMPT_MARGIN = 6
"""By so many tokens SGLang's longest prompt is shorter than the model's context length."""

TIGHT_POOL = 0.1
"""A pool with less than this share of its KV slots free is tight: with when=idle a context is compressed although the engine is busy."""

PINNED_SHARE = 0.5
"""Of the contexts that are remembered at once, so many may be pinned: compression goes on with the others."""


class Room:
    """max_pinned_slots: KV slots that pinned contexts may hold together; None for half of the pool."""

    def __init__(self, engine: EngineView, cache: ContextCache, max_pinned_slots: int | None) -> None:
        self.engine = engine
        self.cache = cache
        self.tight_slots = int(TIGHT_POOL * engine.pool_slots)
        self.max_pinned_slots = engine.pool_slots // 2 if max_pinned_slots is None else min(max_pinned_slots, engine.pool_slots)
        self._one_waits = False

    def let_pass(self, req: ContextReq) -> None:
        """A prompt that the pool holds only after its context is compressed, segment by segment, is not refused for its length."""
        engine, num_tokens = self.engine, len(req.origin_input_ids)
        if not engine.prompt_limit <= num_tokens < engine.context_len - PROMPT_MARGIN or engine.truncates_prompts:
            return
        boundary = req.plan.boundary(num_tokens, self.cache.page_size)
        settings = req.plan.settings.within(boundary, self.cache.page_size)
        if req.plan.exact is not None or req.return_logprob or settings.segment_start(boundary, self.cache.page_size) == 0:
            return
        after_context = settings.kept_slots(boundary, self.cache.page_size) + num_tokens - boundary
        if after_context < engine.prompt_limit and self.can_hold(most_slots(settings, 0, boundary, self.cache.page_size)):
            req.stand_in(after_context, most_new_tokens=engine.context_len - num_tokens - 2)

    def can_hold(self, num_slots: int) -> bool:
        """Whether SGLang admits so many to an empty pool: with a page more, they are less than it has."""
        return num_slots + self.cache.page_size < self.engine.pool_slots

    def begin_pass(self) -> None:
        """Who waited in the pass before is asked again."""
        self._one_waits = False

    @property
    def is_tight(self) -> bool:
        return self.engine.free_slots() <= self.tight_slots

    def must_wait(self, context: Context, jobs: Collection[CompressionJob]) -> bool:
        """True if starting this compression now would evict compressed contexts, because running compressions still hold their exact KV.

        Each that is evicted must be compressed again, and evicts others then. Those under way give their exact KV back soon. One that nobody
        waits for gives nothing back before it runs, and runs when this one does not wait any more.
        """
        if self._one_waits:
            return True  # in the order of the queue, so that small ones do not overtake a large one for ever
        jobs = [job for job in jobs if job.kv.holds_kv or not job.unattended]
        if not jobs:
            return False
        needed = sum(slots_to_compress(each) for each in (context, *(job.target for job in jobs)))
        spare = self.tight_slots  # for the questions that are being answered
        if needed <= spare:
            return False
        held = sum(job.kv.kv_allocated_len + (0 if job.slots is None else job.context.own_slots) for job in jobs)
        self.make(needed - held + spare, keep={identity for _, identity in self.cache.beginnings(context)})
        kept = sum(each.own_slots for each in self._idle() if not each.gives_way)
        room = self.engine.free_slots() + max(0, self.cache.tree.evictable_size() - kept)
        self._one_waits = needed - held + spare > room
        return self._one_waits

    def has_spare(self, num_slots: int) -> bool:
        """Whether so many can be taken past SGLang's admission, which has promised what is free to the requests that run."""
        return self._left_by_chunk(self.engine.chunk_rest) - num_slots >= self.tight_slots

    def _left_by_chunk(self, num_tokens: int) -> int:
        """KV slots that are free, or become so, once the request between two chunks has read so many tokens."""
        return int(self.engine.free_slots() + self.cache.tree.evictable_size() - num_tokens)

    def keep_for_chunk(self, *ways: Callable[[], bool]) -> None:
        """What we hold gives way to the next chunk of a prefill, one after the other, and pins at last (`EngineView.chunk_rest`).

        ways: each gives one thing up; whether there was one.
        """
        chunk = min(self.engine.chunk_rest, self.engine.most_prefill_tokens)
        while chunk and self._left_by_chunk(chunk) < 0 and (any(way() for way in ways) or self.release_a_pin()):
            logger.warning("obcache: something gave way to a prefill under way, which would have found no KV slots")

    def _idle(self) -> list[Context]:
        """Contexts that can be evicted, as far as nobody reads them."""
        return [each for each in self.cache if each.state is ContextState.RESIDENT and each.tree_lock is None]

    def make(self, num_slots: int, keep: Collection[str] = ()) -> None:
        """Frees what answered questions left after contexts, from the least recently used on, until so many slots are free. If that and
        what else is cached exactly is not enough, beginnings go that only longer contexts have asked for.

        keep: ids of beginnings that stay.

        By last use alone the tree would evict idle contexts before: a question's own tokens are newer than every context but one,
        and are rarely asked for again.
        """
        if self.engine.free_slots() >= num_slots:
            return
        # A pool full of cached text is an ordinary state, and this runs in each pass of it: mostly there is nothing to drop.
        followed = [context for context in self.cache if context.suffixes and context.state is ContextState.RESIDENT]
        segments = [context for context in self._idle() if context.gives_way and context.id not in keep]
        if not followed and not segments:
            return
        # What these will leave is not in the tree yet.
        readers = self.readers()
        for context in followed:
            if context.id not in readers:
                self.cache.drop_suffixes(context)
                if self.engine.free_slots() >= num_slots:
                    return
        exact = max(0, self.cache.tree.evictable_size() - sum(each.own_slots for each in self._idle()))
        for context in segments:
            if self.engine.free_slots() + exact >= num_slots:
                return
            if context.id not in readers:
                self.cache.drop_segment(context)

    def readers(self) -> Counter[str]:
        """Requests that use each context now, by context id."""
        readers: Counter[str] = Counter()
        for req in {*self.engine.in_flight(), *self.engine.waiting()}:
            if isinstance(req, ContextReq) and req.is_virtual and req.context is not None and not req.finished():
                readers[req.context.id] += 1
            elif isinstance(req, CompressionJob) and req.base is not None:
                readers[req.base.id] += 1
        return readers

    def pin(self, context: Context) -> None:
        """Pins a context, if there is room for one more pin."""
        if not context.pinned and make_way_for_pin(self.cache, context, self.max_pinned_slots):
            self.cache.pin(context)

    def release_a_pin(self) -> bool:
        """Nothing hangs: where nothing runs and nothing fits, or the prefill under way does not, pinned contexts yield, the least recently used first, one a pass.

        Whether there was one.
        """
        for context in self.cache:
            if context.pinned:
                self.cache.unpin(context)
                logger.warning(
                    "obcache: unpinned context %s: what runs or waits does not fit beside the pinned contexts",
                    context.id,
                )
                return True
        return False


def segment_slots(settings: CompressionSettings, first: int, last: int, page_size: int) -> int:
    """KV slots that compressing a context's tokens first ... last - 1 holds at once, with what is kept of those before."""
    # What is kept exactly of a first segment is among its own tokens.
    kept = settings.kept_slots(last, page_size) - settings.within(last, page_size).exact_tokens
    return last - first + kept + (settings.kept_slots(first, page_size) if first else 0)


def most_slots(settings: CompressionSettings, first: int, num_tokens: int, page_size: int) -> int:
    """The most that a segment of a context holds, as `segment_slots`. first: tokens of its longest beginning that is compressed already."""
    starts = [start for start in settings.segment_starts(num_tokens, page_size) if start > first]
    return max(segment_slots(settings, *ends, page_size) for ends in pairwise([first, *starts, num_tokens]))


def slots_to_compress(context: Context) -> int:
    """About so many are taken by the exact KV of a context, what is replayed after it, and its kept tokens.

    Asked of waiting requests in each pass: what `Jobs.make` knows exactly would take the replay's prompts.
    """
    settings = context.settings
    if context.slots_needed is not None:
        return context.slots_needed
    if settings.segment_start(context.num_tokens, 1) > 0:
        context.slots_needed = most_slots(settings, 0, context.num_tokens, 1)
        return context.slots_needed
    replayed = settings.replay_chunk if settings.is_replay else 0
    return context.num_tokens + min(replayed, context.num_tokens) + context.own_slots


def make_way_for_pin(cache: ContextCache, context: Context, max_slots: int) -> bool:
    """Whether a context may be pinned: not more than max_slots KV slots and PINNED_SHARE of all contexts are.

    Where the room is taken, the namespace that holds most of it gives way to one that would hold less: its least recently used
    pins are undone. So nobody can pin others out.
    """
    pinned = [each for each in cache if each.pinned]
    max_contexts = int(PINNED_SHARE * cache.max_contexts)
    if context.num_slots > max_slots or max_contexts == 0:
        return False
    shares: defaultdict[Namespace, float] = defaultdict(float)

    def share(each: Context) -> float:
        return max(each.num_slots / max_slots, 1 / max_contexts)

    for each in pinned:
        shares[each.namespace] += share(each)
    gives_way: list[Context] = []
    while sum(each.num_slots for each in pinned) + context.num_slots > max_slots or len(pinned) >= max_contexts:
        largest = max(shares, key=lambda namespace: shares[namespace])
        if largest == context.namespace or shares[largest] <= shares[context.namespace] + share(context):
            return False
        oldest = next(each for each in pinned if each.namespace == largest)
        gives_way.append(oldest)
        pinned.remove(oldest)
        shares[largest] -= share(oldest)
    for each in gives_way:
        cache.unpin(each)
    return True
