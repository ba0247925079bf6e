"""Compressed contexts, and the nodes that hold them in SGLang's radix tree.

A context of L tokens that keeps M slots is, for the engine, a prefix of M virtual tokens: ids no tokenizer produces. Its node in
the radix tree holds the M slots, and is matched, locked, evicted and leak-checked like any other. A context is matched whole or
not at all, since each head of each layer keeps tokens of its own.

Three things are never confused:
- `Context.id`: what the context is, a keyed hash of (namespace, settings, tokens, judges). Operators see it as its *name*. It opens
  nothing.
- the *context id* that clients hold (`ContextCache.capability`): stands for the context in a prompt, so whoever has it can read
  the document. It is told to the client that sent the text, and to nobody else.
- the virtual ids: drawn anew whenever the context is compressed, so that a node in the tree is this record's own or nobody's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache

from obcache_sglang.host import use
from obcache_sglang.kv.cells import KeptTokens
from obcache_sglang.kv.context import FIRST_VIRTUAL_ID, Context, ContextState, Namespace
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.identity import beginnings, context_id
from obcache_sglang.scheduler.tree import context_key
from obcache_sglang.settings import CompressionSettings

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

MAX_TRACKED_SUFFIXES = 4096
"""Prefixes cached after one context that are remembered, so that deleting it can free them at once."""

MAX_TRACKED_TOKENS = 1 << 19
"""Tokens of all these prefixes of one context, 8 bytes each: long ones that share a beginning hold few slots, and would be remembered whole."""

MAX_TAILS = 256
"""Different ends of a context after its last whole page that context ids are remembered for; the oldest is forgotten first."""


class ContextCache:
    """The contexts of one scheduler, least recently used first, and their nodes in its radix tree.

    secret: of this server, 0 to 64 bytes, the same on every rank; context ids and virtual ids cannot be guessed without it.
    on_evicted: called when a resident context is found gone. on_deleted: with each context that is deleted.
    """

    def __init__(
        self, tree_cache: UnifiedRadixCache, max_contexts: int, secret: bytes = b"", on_evicted: Callable[[], None] = lambda: None
    ) -> None:
        self.tree = tree_cache
        self.allocator = tree_cache.token_to_kv_pool_allocator
        self.page_size: int = tree_cache.page_size
        self.max_contexts = max_contexts
        self.on_evicted = on_evicted
        self.on_deleted: Callable[[Context], None] = lambda context: None
        self._secret = secret
        self._contexts: OrderedDict[str, Context] = OrderedDict()
        self._deleting: dict[str, Context] = {}
        self._capabilities: dict[str, Context] = {}
        self._num_reserved = 0

    def __iter__(self) -> Iterator[Context]:
        yield from self._contexts.values()
        yield from self._deleting.values()

    def get(self, identity: str) -> Context | None:
        return self._contexts.get(identity) or self._deleting.get(identity)

    def capability(self, context: Context, tail: array[int]) -> str:
        """The context id that stands for this context and the tokens after its last whole page: 32 hexadecimal digits.

        tail: fewer than a page of tokens, which two texts of one context may have different.
        """
        message = context.id.encode() + tail.tobytes()
        identity = hashlib.blake2b(message, digest_size=16, key=self._secret, person=b"context id").hexdigest()
        if identity not in context.tails:
            context.tails[identity] = tail
            self._capabilities[identity] = context
            if len(context.tails) > MAX_TAILS:
                del self._capabilities[context.tails.popitem(last=False)[0]]
        return identity

    def by_capability(self, identity: str) -> tuple[Context, array[int]] | None:
        """The context that a context id stands for, and the tokens between its last whole page and the question."""
        context = self._capabilities.get(identity)
        return None if context is None else (context, context.tails[identity])

    def identity(self, namespace: Namespace, settings: CompressionSettings, tokens: array[int], judges: array[int]) -> str:
        """The id of a context, made or not. settings: as far as they are of these tokens (`CompressionSettings.within`)."""
        return context_id(namespace, settings, tokens, judges, secret=self._secret)

    def obtain(
        self,
        namespace: Namespace,
        settings: CompressionSettings,
        tokens: array[int],
        judges: array[int] | None = None,
        *,
        is_segment: bool = False,
        keep: Collection[Context] = (),
    ) -> Context | None:
        """The context of these tokens (whole pages), made on first sight. judges: as in Context, where its method asks any.

        is_segment: whether a longer context asks. keep: whose records must not make way. None where as many contexts are pinned or being
        compressed as may be remembered.
        """
        if judges is None or not settings.own_queries_score:
            judges = array("q")
        settings = settings.within(len(tokens), self.page_size)
        identity = self.identity(namespace, settings, tokens, judges)
        if (context := self._deleting.get(identity)) is not None:
            return context
        context = self._contexts.get(identity)
        if context is None:
            if not self._forget_oldest(keep):
                return None
            num_slots = settings.kept_slots(len(tokens), self.page_size)
            context = Context(identity, namespace, settings, tokens, num_slots, judges=judges, is_segment=is_segment)
            self._contexts[identity] = context
        context.is_segment &= is_segment
        self._contexts.move_to_end(identity)
        return context

    def beginnings(self, context: Context) -> list[tuple[int, str]]:
        """As `Context.beginnings`."""
        if context.beginnings is None:
            context.beginnings = beginnings(context, self.page_size, secret=self._secret)
        return context.beginnings

    def longest_beginning(self, context: Context) -> Context | None:
        """The longest of its beginnings that is resident."""
        for _, identity in reversed(self.beginnings(context)):
            found = self._contexts.get(identity)
            if found is not None and self.is_resident(found):
                return found
        return None

    def used(self, context: Context) -> None:
        """It is the one that was used last."""
        self._contexts.move_to_end(context.id)

    @staticmethod
    def share(beginning: Context, target: Context) -> None:
        """Notes for which context one is made that ends at a boundary of it."""
        if beginning.num_tokens in target.settings.boundaries:
            beginning.targets.add(target.id)

    def _forsaken(self, context: Context) -> list[Context]:
        """The inverse of `share`: a context's beginnings that are remembered, none of which is held for it any more."""
        known = [each for _, identity in context.beginnings or () if (each := self._contexts.get(identity)) is not None]
        for each in known:
            each.targets.discard(context.id)
        return known

    def next_segment(self, target: Context, base: Context | None) -> Context | None:
        """What is compressed for target after base: its next beginning, or itself. None where no record can be had."""
        first = 0 if base is None else base.num_tokens
        for start, _ in self.beginnings(target):
            if start > first:
                keep = (target,) if base is None else (target, base)
                found = self.obtain(target.namespace, target.settings, target.tokens[:start], is_segment=True, keep=keep)
                if found is not None:
                    self.share(found, target)
                return found
        return target

    def replaced(self, context: Context, by: Context) -> None:
        """Another compression of the same tokens takes a context's place, and lives as long: its node goes, with what follows it."""
        by.ttl_seconds, by.expires_at = context.ttl_seconds, context.expires_at
        if context.node is not None:
            tree.drop_branch(self.tree, context.node)
        self._mark_absent(context)

    def is_resident(self, context: Context) -> bool:
        """Whether the tree holds the context's slots, with the content that this record's compression left there.

        Looks at the node alone: costs the same for every length, and does not count as a use.
        """
        if context.state is not ContextState.RESIDENT:
            return False
        if self.holds(context):
            return True
        if tree.place(self.tree, context) == "host" and context.kept is not None:
            # What readers look at lies on the device, and host memory may hold more contexts than that has room for.
            context.state, context.kept_away, context.kept = ContextState.ON_HOST, context.kept.on("cpu"), None
        else:
            self._mark_absent(context)
            self.on_evicted()
        return False

    def is_on_host(self, context: Context) -> bool:
        """Whether the tree has moved the context's content to host memory (SGLang's HiCache), from where it can come back."""
        if self.is_resident(context) or context.state is not ContextState.ON_HOST or tree.place(self.tree, context) is not None:
            return context.state is ContextState.ON_HOST
        self._mark_absent(context)
        self.on_evicted()
        return False

    def has(self, context: Context) -> bool:
        """Whether the context's content is in its slots, or in host memory."""
        return self.is_resident(context) or self.is_on_host(context)

    def holds(self, context: Context) -> bool:
        """As `is_resident`, but one that is found gone is not marked: for what one rank alone looks at."""
        return context.state is ContextState.RESIDENT and tree.place(self.tree, context) == "device"

    def returned(self, context: Context, kept: KeptTokens) -> None:
        """Its content is in slots again, other ones than before, and held once (`hold`). kept: with these."""
        context.state, context.kept, context.kept_away = ContextState.RESIDENT, kept, None
        self.hold(context)

    def reserve(self, context: Context, *, may_own_exact: bool = False) -> torch.Tensor | None:
        """Allocates the context's own slots, evicting from the tree if needed, and inserts its node, locked, after its exact tokens.

        Returns all its slots, [num_slots] int64, those of its exact tokens first; None where the pool has no room, or the tree has not
        these tokens. With may_own_exact they get slots of its own then. The node is in the tree before its content is, so that the pool's
        accounts always hold; nothing can match it, since its state is not RESIDENT yet. Whatever raises here leaves the pool as it was.
        """
        assert context.tree_lock is None, "it has slots"
        exact = tree.exact_beginning(self.tree, context)
        if exact is None and may_own_exact:
            context.owns_exact = True
            exact = tree.exact_beginning(self.tree, context)
        if exact is None:
            return None
        # What is evicted for the context is not what it stands on.
        lock = self.tree.lock(exact[0]) if context.num_shared else None
        try:
            evict_from_tree_cache(self.tree, context.own_slots)
            allocated = self.allocator.alloc(context.own_slots)
            if allocated is None:
                context.owns_exact = False
                return None
            own: torch.Tensor = allocated.to(torch.int64)
            slots = torch.cat([exact[1], own]) if context.num_shared else own
            try:
                context.engine_ids = self._unused_ids(context)
                # As if it had been inserted before: what is not there yet must not be copied to host memory.
                known = {"prev_prefix_len": context.num_shared, "inserted_len": context.num_slots}
                self.tree.insert(InsertParams(key=context_key(context), value=slots, **known))
                self._lock(context)
            except Exception:
                self._take_back(context, own)
                raise
        finally:
            self.tree.unlock(lock)
        context.state = ContextState.COMPRESSING
        return slots

    def _unused_ids(self, context: Context) -> array[int]:
        """[num_slots] ids: the exact tokens', and consecutive virtual ids that nothing in the tree has after them. All ranks draw the same ones."""
        exact = context.tokens[: context.num_shared]
        while True:
            self._num_reserved += 1
            message = f"{context.id} {self._num_reserved}".encode()
            drawn = hashlib.blake2b(message, digest_size=8, key=self._secret, person=b"virtual ids").digest()
            base = FIRST_VIRTUAL_ID + int.from_bytes(drawn) % (1 << 62)
            context.engine_ids = exact + array("q", range(base, base + context.own_slots))
            if self.tree.match_prefix(MatchPrefixParams(key=context_key(context))).device_prefix_len == len(exact):
                return context.engine_ids

    def _take_back(self, context: Context, own: torch.Tensor) -> None:
        """After an insertion that raised: the slots [own_slots] int64 go back, from the tree if they came that far."""
        match = self.tree.match_prefix(MatchPrefixParams(key=context_key(context)))
        if match.device_prefix_len != context.num_slots:
            self.allocator.free(own)
        else:
            self.unlock(context)
            tree.drop_leaf(self.tree, match.last_device_node)
        context.engine_ids, context.node, context.owns_exact = array("q"), None, False

    def publish(self, context: Context, kept: KeptTokens) -> None:
        """The content is in the slots: from now on requests may match the context."""
        context.kept = kept
        context.state = ContextState.RESIDENT
        context.failed_in_place = False
        tree.copy_to_host(self.tree, context.node)
        if not context.pinned:
            self.unlock(context)

    def withdraw(self, context: Context) -> None:
        """The compression did not come about: its slots go back to the pool."""
        self.unlock(context)
        self.drop_node(context)
        self._mark_absent(context)

    def retire(self, context: Context) -> None:
        """What a resident context keeps is out of date: it goes as if it were evicted, and whoever asks about it next has it made anew."""
        pinned, ttl_seconds, expires_at = context.pinned, context.ttl_seconds, context.expires_at
        self.withdraw(context)
        context.is_wanted_pinned |= pinned
        context.ttl_seconds, context.expires_at = ttl_seconds, expires_at

    def pin(self, context: Context) -> None:
        """Keeps a resident context from being evicted."""
        context.pinned = True
        if context.tree_lock is None and context.state is ContextState.RESIDENT:
            self._lock(context)

    def unpin(self, context: Context) -> None:
        context.pinned = False
        if context.state is not ContextState.COMPRESSING and not context.num_holders:
            self.unlock(context)

    def hold(self, context: Context) -> None:
        """Keeps a resident context from being evicted while a longer one is compressed after it."""
        if context.tree_lock is None:
            self._lock(context)
        context.num_holders += 1

    def release(self, context: Context) -> None:
        """The inverse of `hold`."""
        if context.num_holders == 0:
            return  # the tree was reset
        context.num_holders -= 1
        if not context.num_holders and not context.pinned:
            self.unlock(context)

    def _lock(self, context: Context) -> None:
        context.node = self.tree.match_prefix(MatchPrefixParams(key=context_key(context))).last_device_node
        context.tree_lock = self.tree.lock(context.node)

    def unlock(self, context: Context) -> None:
        lock, context.tree_lock = context.tree_lock, None  # never twice, also where it raises
        self.tree.unlock(lock)

    @property
    def pinned_slots(self) -> int:
        return sum(context.num_slots for context in self if context.pinned)

    @property
    def has_deleted(self) -> bool:
        """Whether `sweep` has anything to free."""
        return bool(self._deleting)

    def delete(self, context: Context) -> None:
        """No new request finds the context, nor the beginnings it was made of; their slots go with `sweep`, once they have no readers."""
        left = self._forsaken(context)
        unused = [each for each in left if each.is_segment and not (each.targets or each.is_queued or each.num_holders)]
        for each in (context, *unused):
            self.unpin(each)
            self._drop_record(each)
            each.state = ContextState.DELETING
            self._deleting[each.id] = each
            self.on_deleted(each)

    def drop_segment(self, context: Context) -> None:
        """Forgets a beginning that only a longer context has asked for."""
        self.withdraw(context)
        self._drop_record(context)

    def sweep(self, in_use: set[str]) -> None:
        """Frees what was deleted and is not among the ids `in_use`."""
        for context in [c for c in self._deleting.values() if c.id not in in_use]:
            self.drop_node(context)
            del self._deleting[context.id]
            self._mark_absent(context)

    def remember_suffix(self, context: Context, suffix: array[int], *, instead_of: array[int] | None = None) -> None:
        """A request leaves `suffix`, or a beginning of it, in the tree after the context.

        instead_of: a beginning of it, remembered before.
        """
        if instead_of is not None:
            context.suffixes.pop(instead_of.tobytes(), None)
        raw = suffix.tobytes()
        most = MAX_TRACKED_TOKENS * suffix.itemsize - len(raw)
        if len(context.suffixes) < MAX_TRACKED_SUFFIXES and sum(map(len, context.suffixes)) <= most:
            context.suffixes[raw] = None
        else:
            context.suffixes_complete = False

    def drop_node(self, context: Context) -> None:
        """Evicts the context's node and what is cached after it, as far as no request has it locked.

        What is left (locked, or after more requests than are tracked) is ordinary evictable content.
        """
        if context.engine_ids and context.suffixes_complete:
            tree.drop_ends(self.tree, context, [array("q", raw) for raw in context.suffixes] + [array("q")])

    def drop_suffixes(self, context: Context) -> None:
        """Evicts what is cached after a context that no request uses; the context itself stays."""
        if context.suffixes and context.suffixes_complete:
            left = tree.drop_ends(self.tree, context, [array("q", raw) for raw in context.suffixes])
            context.suffixes = dict.fromkeys(suffix.tobytes() for suffix in left)

    def clear(self) -> None:
        """The tree was reset: every node and lock is gone."""
        for context in self:
            context.tree_lock = None
            context.num_holders = 0
            context.pinned = False
            if not context.is_queued:
                self._mark_absent(context)
        self._deleting.clear()

    def _mark_absent(self, context: Context) -> None:
        context.state, context.kept, context.kept_away = ContextState.ABSENT, None, None
        context.suffixes, context.suffixes_complete = {}, True
        context.node, context.engine_ids, context.owns_exact = None, array("q"), False
        context.pinned = False
        for each in self._forsaken(context):
            if each.is_segment and not each.targets and each.expires_at is None:
                each.ttl_seconds, each.expires_at = context.ttl_seconds, context.expires_at
        # Whoever makes it again says anew how long it is to live.
        context.ttl_seconds = context.expires_at = None
        self.unlock(context)

    def _forget_oldest(self, keep: Collection[Context]) -> bool:
        """Makes room for one more record; False where none can go. What goes is evicted, as far as no request reads it."""
        if len(self._contexts) < self.max_contexts:
            return True
        stay = {each.id for each in keep}
        idle = [
            each for each in self._contexts.values() if not (each.is_queued or each.pinned or each.num_holders or each.id in stay)
        ]
        oldest = next((each for each in idle if each.gives_way), idle[0] if idle else None)
        if oldest is None:
            return False
        if self.is_resident(oldest):
            self.drop_node(oldest)
        self._drop_record(oldest)
        return True

    def _drop_record(self, context: Context) -> None:
        self._contexts.pop(context.id, None)
        self._forsaken(context)
        for identity in context.tails:
            self._capabilities.pop(identity, None)
        context.tails.clear()


TOUCHES = (
    use("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.insert", "call", "a context's node", ("params",)),
    use(
        "sglang.srt.mem_cache.base_prefix_cache.InsertParams",
        "call",
        "likewise",
        ("key", "value", "prev_prefix_len", "inserted_len"),
    ),
)
