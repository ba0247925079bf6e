"""Contexts that are compressed when the pool needs their room (`--obcache-when pressure`): SGLang's radix cache with a lossy tier.

As long as there is room everything stays exact. Where a pass needs more than is free, this makes the room before SGLang does: it evicts
leaf by leaf, in the tree's own order, with three exceptions. A leaf where a context ends that may be compressed is compressed, from its
cached KV, before it goes. Compressed contexts are spared while they hold less than `SPARED_SHARE` of the pool. Before one goes, those that
still are exact are compressed, the one not asked about for longest first; and then compressed ones are again, from what they kept, as far
as the ladder goes (`--obcache-ladder`).

Ranks of one tensor-parallel group run this in step: their trees, queues and pools are equal. `agree` is a collective: all come to it, or none.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.radix_cache import RadixKey

from obcache_sglang.kv.context import Context, ContextState
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.in_place import InPlace
from obcache_sglang.scheduler.requests import ContextReq
from obcache_sglang.settings import ServerSettings

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

WAITING_SEEN = 16
"""Waiting requests for which room is made at once: the next pass sees the others."""

SPARED_SHARE = 0.5
"""Of the pool: as long as compressed contexts hold less, other text makes the room. A slot of theirs stands for several tokens, so evicting by last use
alone would give ten documents for one."""

LEAVES_AT_ONCE = 32
"""Leaves that are evicted between two looks at the order of the tree, which takes a look at all leaves."""

MOST_STEPS = 256
"""Of one pass, so that it ends. SGLang evicts what it needs beyond."""

PRESSED_PASSES = 1024
"""Of the scheduler, for which a pool counts as under pressure after room had to be made."""

DECODE_STEPS = 8
"""Tokens that each running request may generate before the next pass that looks."""


@dataclass
class _Step:
    """What comes next: leaves that go, or a context that is compressed, from its exact KV or from `base`. Neither: nothing can be done.

    loses_spared: whether it takes a compressed context that would be spared.
    """

    leaves: list[int] = field(default_factory=list)
    loses_spared: bool = False
    context: Context | None = None
    base: Context | None = None


class UnderPressure:
    """Of one scheduler. in_place: what compresses."""

    def __init__(self, in_place: InPlace, settings: ServerSettings) -> None:
        self.in_place, self.settings = in_place, settings
        self.engine, self.cache, self.jobs = in_place.engine, in_place.cache, in_place.jobs
        # Served exactly until now, the one asked about last stands last.
        self._candidates: OrderedDict[str, Context] = OrderedDict()
        self._cached_exactly: dict[str, bool] = {}
        self.shrunk: set[str] = set()
        """Ids of contexts that were compressed for want of room, and not since somebody asked for it."""
        self._promised = 0
        self._passes_since = PRESSED_PASSES + 1

    def add(self, context: Context) -> None:
        """A context whose questions are served exactly as long as there is room."""
        context.failed_in_place = False
        self._candidates[context.id] = context
        self._candidates.move_to_end(context.id)
        if len(self._candidates) > self.cache.max_contexts:
            self._candidates.popitem(last=False)

    def _note_shrunk(self, context: Context) -> None:
        if len(self.shrunk) > self.cache.max_contexts:
            self.shrunk &= {each.id for each in self.cache}
        self.shrunk.add(context.id)

    def forget(self) -> None:
        """The tree was reset: nothing is cached."""
        self._candidates.clear()
        self.shrunk.clear()
        self._passes_since = PRESSED_PASSES + 1

    def begin_pass(self) -> None:
        """What is cached may have changed."""
        self._cached_exactly.clear()
        self._promised = 0
        self._passes_since += 1

    def has_no_need(self, req: ContextReq, context: Context) -> bool:
        """Whether a question need not put up with its compressed context, since the exact one is cached as well. It costs nothing then."""
        if req.is_virtual or req.plan.action != "ask" or req.compressions_started or req.must_be_compressed:
            return False
        if context.id not in self._cached_exactly:  # asked of every waiting request in every pass
            num_tokens, _ = tree.match_exact(self.cache.tree, context)
            self._cached_exactly[context.id] = num_tokens == context.num_tokens
        return self._cached_exactly[context.id]

    def stays_exact(self, context: Context) -> bool:
        """Whether a question about a context that is not compressed is served exactly: it is cached, or there is room to read it beside what
        the pass has promised to others; half of the pool, where room had to be made not long ago. Else one that the pool has lost comes back
        compressed.
        """
        if context.is_queued or not self.in_place.can_compress(context.settings, context.num_tokens):
            return False
        num_tokens, _ = tree.match_exact(self.cache.tree, context)
        missing = context.num_tokens - num_tokens
        margin = SPARED_SHARE * self.engine.pool_slots if self.is_pressed else self.jobs.room.tight_slots
        if missing and self.engine.free_slots() < self._promised + missing + margin:
            self._note_shrunk(context)
            return False
        self._promised += missing
        return True

    @property
    def is_pressed(self) -> bool:
        """Whether room had to be made not long ago."""
        return self._passes_since <= PRESSED_PASSES

    def text_before(self, context: Context, num_slots: int) -> list[int] | None:
        """Nodes, each before the one that it is behind, with which so many slots become free: text that is no context and was not used for
        longer than a resident one. None where there is not enough."""
        room, going = self.engine.free_slots(), []
        contexts = {*self._exact(), *(each.node for each in self.cache if each.state is ContextState.RESIDENT)}
        for path in tree.next_victims(self.cache.tree, MOST_STEPS):
            if room >= num_slots or any(each.node_id == context.node for each in path):
                break
            for each in reversed(path):
                # With a leaf goes what is followed by nothing else.
                if each.node_id in contexts or each.num_children > (each is not path[-1]):
                    break
                going.append(each.node_id)
                room += each.path_end - each.path_start
        return going if room >= num_slots else None

    def relieve(self, admitted: list[Req]) -> list[Req]:
        """Makes room for what a pass is to admit and for what decodes. Returns those that may be admitted now: none, where a compression that
        makes the room goes on in the next pass.
        """
        if self.settings.when != "pressure" or self.engine.must_become_idle:
            return admitted
        if not self._candidates and not any(each.state is ContextState.RESIDENT for each in self.cache):
            return admitted
        first = admitted[:WAITING_SEEN]
        needed = self._needed(first)
        if self.engine.free_slots() >= needed:
            return admitted
        self._passes_since = 0
        if self.in_place.is_busy:
            return []
        self.jobs.room.make(needed)  # what answered questions left after compressed contexts is rarely asked for again
        with self._held(first):
            for _ in range(MOST_STEPS):
                step = self._planned(needed)
                if not self.jobs.agree(step is not None) or step is None:
                    break
                if step.loses_spared and self.engine.runs_something:
                    return self._that_fit(admitted)  # the others wait for what runs
                spare = self.engine.free_slots() - needed
                # Beyond what is needed, nothing is lost: only compressed.
                if spare >= (self._to_compress_next() if step.context is not None else 0) or not self._take(step):
                    break
                if self.in_place.is_busy:
                    return []
        return admitted

    def _needed(self, waiting: list[Req]) -> int:
        """KV slots that a pass may take."""
        under_way, most = self._needed_by_running(), self.engine.most_prefill_tokens
        uncached = 0
        for req in waiting:
            if uncached >= most:
                break
            uncached += self._needed_by(req)
        return under_way + min(uncached, most)

    def _needed_by_running(self) -> int:
        engine = self.engine
        running = 0 if engine.running_batch is None else DECODE_STEPS * len(engine.running_batch.reqs)
        return running + min(engine.chunk_rest, engine.most_prefill_tokens)

    def _needed_by(self, req: Req) -> int:
        num_tokens, _ = tree.match(self.cache.tree, _key(req))
        return len(req.origin_input_ids) - num_tokens + self.jobs.slots_to_admit(req)

    def _that_fit(self, admitted: list[Req]) -> list[Req]:
        """Those, in their order, that together take no more than is free."""
        room = self.engine.free_slots() - self._needed_by_running()
        for number, req in enumerate(admitted):
            room -= self._needed_by(req)
            if room < 0:
                return admitted[:number]
        return admitted

    @contextmanager
    def _held(self, waiting: list[Req]) -> Iterator[None]:
        """What is about to be read is not what makes the room."""
        locks: list[Any] = []
        try:
            for req in waiting:
                num_tokens, node = tree.match(self.cache.tree, _key(req))
                if num_tokens:
                    locks.append(self.cache.tree.lock(node))
            yield
        finally:
            for lock in locks:
                self.cache.tree.unlock(lock)

    def _to_compress_next(self) -> int:
        """Slots that stay free in a pool under pressure, so that the next context can be compressed before it goes."""
        return max((each.own_slots for each in self._candidates.values() if self._may_shrink(each)), default=0)

    def _may_shrink(self, context: Context) -> bool:
        known = self.cache.get(context.id) is context
        return known and context.state is ContextState.ABSENT and not context.is_queued

    # --- what comes next ----------------------------------------------------------------------------------------------------------

    def _planned(self, needed: int) -> _Step | None:
        """None where a defect of this rank keeps it from knowing: then no rank does anything."""
        try:
            return self._plan(needed)
        except Exception:
            logger.exception("obcache: making room by compression failed; SGLang evicts")
            return None

    def _plan(self, needed: int) -> _Step:
        step, room = _Step(), self.engine.free_slots()
        exact = self._exact()
        compressed = {each.node: each.own_slots for each in self.cache if each.state is ContextState.RESIDENT}
        are_spared = sum(compressed.values()) <= SPARED_SHARE * self.engine.pool_slots
        spared: list[int] = []
        for path in tree.next_victims(self.cache.tree, LEAVES_AT_ONCE + len(compressed)):
            leaf = path[-1]
            if leaf.node_id in compressed and are_spared:
                spared.append(leaf.node_id)
                continue
            smaller = None
            if leaf.node_id in exact:
                smaller = self._of(exact, [leaf.node_id, *exact])
            elif leaf.node_id in compressed:
                smaller = self._of(exact, exact) or self._further()
            if smaller is not None:
                return step if step.leaves else smaller
            step.leaves.append(leaf.node_id)
            room += leaf.path_end - leaf.path_start
            # Else look again: what they leave may be a leaf then, or may free more than it did.
            if room >= needed or (len(path) > 1 and path[-2].num_children <= 2):
                break
        if not step.leaves and spared:
            return self._of(exact, exact) or self._further() or _Step(leaves=spared[:1], loses_spared=True)
        return step

    def _exact(self) -> OrderedDict[int, tuple[Context, int]]:
        """By the node where they end: contexts that are cached exactly, each with the slots that its going would free. Longest not asked about first.

        Without those that others stand on, compressed or not: what is compressed goes with all that follows it.
        """
        found: OrderedDict[int, tuple[Context, int]] = OrderedDict()
        inner: set[int] = set()
        for each in self.cache:
            if each.num_shared and each.node is not None:
                inner |= {above.node_id for above in tree.path(self.cache.tree, each.node)[:-1]}
        asked: set[str] | None = None
        for identity, context in list(self._candidates.items()):
            if not self._may_shrink(context):
                del self._candidates[identity]
                continue
            num_tokens, node = tree.match_exact(self.cache.tree, context)
            if num_tokens < context.num_tokens:
                # Evicted, or not read yet: what nobody waits for would only be looked for in vain.
                asked = self._asked() if asked is None else asked
                if identity not in asked:
                    del self._candidates[identity]
                continue
            path = tree.path(self.cache.tree, node)
            inner |= {each.node_id for each in path[:-1]}
            known = found.get(node)
            if known is None or known[0].num_tokens <= context.num_tokens:
                found[node] = context, tree.own_tokens(path)
        return OrderedDict((node, each) for node, each in found.items() if node not in inner)

    def _asked(self) -> set[str]:
        """The contexts of requests that are under way."""
        reqs = (*self.engine.in_flight(), *self.engine.waiting())
        return {req.context.id for req in reqs if isinstance(req, ContextReq) and req.context is not None}

    def _of(self, exact: Mapping[int, tuple[Context, int]], nodes: Iterable[int]) -> _Step | None:
        """The first of these contexts that nobody reads, and that takes less room compressed."""
        for node in nodes:
            context, gained = exact[node]
            fits = context.own_slots <= self._free_to_take() and context.own_slots < gained
            if fits and not context.failed_in_place and not tree.is_locked(self.cache.tree, node):
                return _Step(context=context)
        return None

    def _free_to_take(self) -> int:
        """KV slots that are free and not promised to the prefill under way."""
        return self.engine.free_slots() - self.engine.chunk_rest

    def _further(self) -> _Step | None:
        """A compressed context on its next rung: of those on the lowest one the one that was not asked about for longest."""
        resident = [each for each in list(self.cache) if self.cache.is_resident(each) and each.tree_lock is None]
        for context in sorted(resident, key=lambda each: each.settings.compression_ratio):
            rungs = self.settings.rungs(context.settings)
            if not rungs or not self.in_place.can_compress(context.settings, context.num_tokens):
                continue
            num_slots = rungs[0].kept_slots(context.num_tokens, self.cache.page_size) - context.num_shared
            if not num_slots < context.own_slots or num_slots > self._free_to_take():
                continue
            if context.node is None or tree.is_locked(self.cache.tree, context.node):
                continue
            smaller = self.cache.obtain(context.namespace, rungs[0], context.tokens, context.judges, keep=(context,))
            # One that failed would be begun for ever, and requests wait meanwhile.
            if smaller is not None and not smaller.failed_in_place and self._may_shrink(smaller):
                return _Step(context=smaller, base=context)
        return None

    def _take(self, step: _Step) -> bool:
        """Whether anything came of it."""
        if step.context is None:
            gone = [tree.evict_leaf(self.cache.tree, node) for node in step.leaves]
            return any(gone)
        if not self.in_place.start(step.context, base=step.base, makes_room=True):
            step.context.failed_in_place = True
            return True
        self._note_shrunk(step.context)
        if step.base is None:
            self._forget_beginnings(step.context)
        self.in_place.advance()
        return True

    def _forget_beginnings(self, context: Context) -> None:
        """Contexts that this one goes on from, as in a conversation: they go as any text does, unless they are asked about again."""
        for identity, each in list(self._candidates.items()):
            if each.num_tokens > context.num_tokens or each.namespace != context.namespace:
                continue
            if each.begins(context.tokens):
                del self._candidates[identity]


def _key(req: Req) -> RadixKey:
    return RadixKey(req.origin_input_ids, req.extra_key, cache_salt=req.cache_salt)
