"""Contexts that are compressed when the pool needs their room (`--obcache-when pressure`): SGLang's radix cache with a lossy tier.

As long as there is room everything stays exact. When the tree is about to evict, this lets it, leaf by leaf, in its own order, with two
exceptions. A leaf that holds a context which may be compressed is compressed, from its cached KV, before it goes. Before a compressed
context goes, those that still are exact are compressed, the least recently asked about first; and then compressed ones are again, from
what they kept, as far as the ladder goes (`--obcache-ladder`).

Ranks of one tensor-parallel group run this in step: their trees, queues and pools are equal.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from obcache_sglang.kv.context import Context, ContextState
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.in_place import InPlace
from obcache_sglang.scheduler.requests import ContextReq
from obcache_sglang.settings import ServerSettings

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

WAITING_SEEN = 16
"""Waiting requests for which room is made at once: the next pass sees the others."""

MOST_VICTIMS = 256
"""Leaves that are evicted in one pass of the scheduler, so that it ends; SGLang evicts what it needs beyond."""

LOOKS = 16
"""Contexts that are looked for in the tree in one pass."""

DECODE_STEPS = 8
"""Tokens that each running request may generate before the next pass that looks."""


class UnderPressure:
    """Of one scheduler. in_place: what compresses."""

    def __init__(self, in_place: InPlace, settings: ServerSettings) -> None:
        self.in_place, self.settings = in_place, settings
        self.engine, self.cache = in_place.engine, in_place.cache
        # By the slot of the last token of its exact KV: that stays where it is until it is evicted, however the tree splits its nodes.
        self._by_last_slot: dict[int, Context] = {}
        self._not_seen: dict[str, Context] = {}
        self._tried: set[str] = set()

    def add(self, context: Context) -> None:
        """A context whose questions are served exactly as long as there is room."""
        self._not_seen[context.id] = context

    def forget(self) -> None:
        """The tree was reset: nothing is cached."""
        self._by_last_slot.clear()
        self._not_seen.clear()
        self._tried.clear()

    def relieve(self, admitted: list[Req]) -> list[Req]:
        """Makes room for what a pass is to admit, as the tree would, but for what is compressed first.

        Returns those of them that may be admitted now. The others wait: all for a compression that goes on in the next pass, or some for a
        decision, since what they were to read exactly has been compressed.
        """
        self._look()
        if not (self._by_last_slot or self.settings.ladder) or self.engine.must_become_idle:
            return admitted
        wanted = self._wanted(admitted)
        for _ in range(MOST_VICTIMS):
            if self.engine.free_slots() >= wanted:
                break
            if self.in_place.is_busy:
                return []
            victims = tree.next_victims(self.cache.tree)
            if not victims or not (self._shrink(*victims) or tree.evict_next(self.cache.tree)):
                break
        return [req for req in admitted if not isinstance(req, ContextReq) or req.decided]

    def _wanted(self, admitted: list[Req]) -> int:
        """KV slots that a pass may take, with what compressing the largest context takes first."""
        engine = self.engine
        most = engine.most_prefill_tokens
        running = 0 if engine.running_batch is None else DECODE_STEPS * len(engine.running_batch.reqs)
        largest = max((context.num_slots for context in self._by_last_slot.values()), default=0)
        if engine.free_slots() >= most + running + largest:
            return most + running + largest
        uncached = 0
        chunked = engine.chunked_req
        if chunked is not None:
            uncached += len(chunked.origin_input_ids) - chunked.kv.kv_committed_len
        for req in islice(admitted, WAITING_SEEN):
            if uncached >= most:
                break
            # What is about to be read counts as used, so that it is not what makes room.
            key = RadixKey(req.origin_input_ids, req.extra_key, cache_salt=req.cache_salt)
            match = self.cache.tree.match_prefix(MatchPrefixParams(key=key))
            uncached += len(req.origin_input_ids) - match.device_prefix_len
        return min(uncached, most) + running + largest

    def _look(self) -> None:
        """Finds where some of those not seen yet are cached; that is what the others wait for."""
        for identity in list(islice(self._not_seen, LOOKS)):
            context = self._not_seen.pop(identity)
            if not self._may_shrink(context):
                continue
            cached = tree.exact_slots(self.cache.tree, context)
            if cached is None:
                self._not_seen[identity] = context
            else:
                slot = int(cached[1][-1])
                self._by_last_slot.pop(slot, None)  # the last asked about stands last
                self._by_last_slot[slot] = context
        if len(self._by_last_slot) > 2 * self.cache.max_contexts:
            self._by_last_slot = {slot: each for slot, each in self._by_last_slot.items() if self._may_shrink(each)}

    def _may_shrink(self, context: Context) -> bool:
        known = self.cache.get(context.id) is context
        return known and context.state is ContextState.ABSENT and not context.is_queued

    def _shrink(self, victim: int) -> bool:
        """Begins to compress a context, so that the leaf which the tree would evict need not go, or is not lost. Whether there is one."""
        if any(context.node == victim for context in list(self.cache)):
            return self._shrink_exact(list(self._by_last_slot.values())) or self._shrink_further()
        slots = set(tree.own_slots(self.cache.tree, victim))
        held = [self._by_last_slot[slot] for slot in self._by_last_slot.keys() & slots]
        return self._shrink_exact(sorted(held, key=lambda each: (-each.num_tokens, each.id)))

    def _shrink_exact(self, candidates: list[Context]) -> bool:
        for context in candidates:
            node = self._shrinkable(context)
            if node is not None and self.in_place.start(context, instead_of=node):
                self.in_place.advance()
                return True
        return False

    def _shrink_further(self) -> bool:
        """Begins to compress a compressed context again: the one on the lowest rung that was not asked about for longest."""
        # Each is tried once: what fails would be begun for ever, and requests wait meanwhile.
        self._tried -= {each.id for each in self.cache if each.state is ContextState.RESIDENT}
        resident = [each for each in list(self.cache) if self.cache.is_resident(each) and each.tree_lock is None]
        for context in sorted(resident, key=lambda each: each.settings.compression_ratio):  # else in the order of their use
            rungs = self.settings.rungs(context.settings)
            if not rungs or not self.in_place.can_compress(context.settings, context.num_tokens):
                continue
            if context.node is None or tree.is_locked(self.cache.tree, context.node):
                continue
            smaller = self.cache.obtain(context.namespace, rungs[0], context.tokens, context.judges, keep=(context,))
            if smaller is None or not self._may_shrink(smaller) or smaller.num_slots >= context.num_slots:
                continue
            if smaller.id not in self._tried and self.in_place.start(smaller, base=context):
                self._tried.add(smaller.id)
                self.in_place.advance()
                return True
        return False

    def _shrinkable(self, context: Context) -> int | None:
        """The node where a context's exact KV ends, if nobody reads it and it would take less room compressed."""
        cached = tree.exact_slots(self.cache.tree, context) if self._may_shrink(context) else None
        if cached is None:
            return None
        node, slots = cached
        self._by_last_slot.pop(int(slots[-1]), None)  # once, also where it fails
        gained = len(tree.own_slots(self.cache.tree, node)) - context.num_slots
        return node if gained > 0 and not tree.is_locked(self.cache.tree, node) else None
