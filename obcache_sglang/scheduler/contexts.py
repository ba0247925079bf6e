"""Compressed contexts, and the nodes that hold them in SGLang's radix tree.

A context of L tokens that keeps M slots is, for the engine, a prefix of M virtual tokens: ids no tokenizer produces, drawn
from a hash of what the context is (namespace, settings, tokens, judges). Its node in the radix tree holds the M slots, and is
matched, locked, evicted and leak-checked like any other. A context is matched whole or not at all, since each head of each
layer keeps tokens of its own.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from obcache_sglang.cells import KeptTokens
from obcache_sglang.config import CompressionSettings

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from obcache_sglang.scheduler.requests import CompressionJob

FIRST_VIRTUAL_ID = 1 << 61
"""Virtual ids are drawn from [2**61, 2**62 + 2**61): far above any vocabulary, and room for a long run below 2**63."""

MAX_TRACKED_SUFFIXES = 4096
"""Prefixes cached behind one context that are remembered, so that deleting it can free them at once."""


class ContextState(Enum):
    ABSENT = "absent"
    """Known (its tokens can be compressed again), but holding no slots."""
    COMPRESSING = "compressing"
    RESIDENT = "resident"
    DELETING = "deleting"
    """Deleted by a client; its slots go when its readers have ended."""


@dataclass(frozen=True)
class Namespace:
    """Who may share a context: requests that agree in all of these. lora_id is already part of extra_key (as in SGLang)."""

    extra_key: str | None
    cache_salt: str | None
    lora_id: str | None


@dataclass(eq=False)
class Context:
    """One compressed context.

    id: 32 hexadecimal digits, from (namespace, settings, tokens, judges). tokens: its L real token ids. judges: the tokens behind it
    that score it as its own last ones do, and are no part of it. num_slots: M.
    kept: which tokens this rank's heads keep, and where; None unless resident, and when the node of an even context was found
    in the tree without it. seconds: wall time of its compression; scoring_seconds: the part spent on scoring,
    selecting and copying, as the host saw it; job_cached_tokens: its tokens found in the exact cache. tree_lock: held while it is compressed or pinned. suffixes: what requests left
    in the tree behind it, as token ids; suffixes_complete: whether that is all of it.
    """

    id: str
    namespace: Namespace
    settings: CompressionSettings
    tokens: array[int]
    num_slots: int
    virtual_ids: array[int]
    judges: array[int] = field(default_factory=lambda: array("q"))
    state: ContextState = ContextState.ABSENT
    job: CompressionJob | None = None
    tree_lock: Any = None
    pinned: bool = False
    ttl_seconds: float | None = None
    expires_at: float | None = None
    kept: KeptTokens | None = None
    created_at: float = field(default_factory=time.time)
    seconds: float | None = None
    scoring_seconds: float | None = None
    job_cached_tokens: int = 0
    reuses: int = 0
    suffixes: dict[bytes, None] = field(default_factory=dict)
    suffixes_complete: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def position_offset(self) -> int:
        """What must be added to the engine's positions behind the context: L - M."""
        return len(self.tokens) - self.num_slots

    @property
    def is_uneven(self) -> bool:
        """Whether its heads may keep different numbers of tokens, so that only attention that knows of it can read them."""
        return self.settings.budget != "uniform" and self.num_slots < len(self.tokens)

    def describe(self) -> dict[str, Any]:
        """JSON-safe facts for the control endpoints."""
        return {
            "id": self.id,
            "state": self.state.value,
            "context_tokens": self.num_tokens,
            "kept_tokens": self.num_slots,
            "slots": self.num_slots if self.state in (ContextState.RESIDENT, ContextState.DELETING) else 0,
            "settings": self.settings.to_dict(),
            "pinned": self.pinned,
            "ttl_seconds": self.ttl_seconds,
            "reuses": self.reuses,
            "seconds": self.seconds,
            "scoring_seconds": self.scoring_seconds,
            "age_seconds": time.time() - self.created_at,
        }


def context_id(namespace: Namespace, settings: CompressionSettings, tokens: array[int], judges: Sequence[int] = ()) -> str:
    """The identity of a context, equal in every process: never a counter, since external caches outlive one."""
    head = json.dumps([namespace.extra_key, namespace.cache_salt, namespace.lora_id, settings.fingerprint(), *judges])
    return hashlib.blake2b(tokens.tobytes(), digest_size=16, key=hashlib.blake2b(head.encode()).digest()).hexdigest()


def virtual_ids(identity: str, count: int) -> array[int]:
    """`count` consecutive ids that no tokenizer produces, unique to the identity (at least 16 hexadecimal digits)."""
    base = FIRST_VIRTUAL_ID + int(identity[:16], 16) % (1 << 62)
    return array("q", range(base, base + count))


class ContextCache:
    """The contexts of one scheduler, least recently used first, and their nodes in its radix tree."""

    def __init__(self, tree_cache: UnifiedRadixCache, max_contexts: int) -> None:
        self.tree = tree_cache
        self.allocator = tree_cache.token_to_kv_pool_allocator
        self.page_size: int = tree_cache.page_size
        self.max_contexts = max_contexts
        self._contexts: OrderedDict[str, Context] = OrderedDict()
        self._deleting: dict[str, Context] = {}
        self._num_uneven = 0

    def __iter__(self) -> Iterator[Context]:
        yield from self._contexts.values()
        yield from self._deleting.values()

    def get(self, identity: str) -> Context | None:
        return self._contexts.get(identity) or self._deleting.get(identity)

    def obtain(
        self, namespace: Namespace, settings: CompressionSettings, tokens: array[int], judges: array[int] | None = None
    ) -> Context:
        """The context of these tokens (whole pages), made on first sight. judges: as in Context, where its method asks any."""
        if judges is None or not settings.own_queries_score:
            judges = array("q")
        identity = context_id(namespace, settings, tokens, judges)
        if (context := self._deleting.get(identity)) is not None:
            return context
        context = self._contexts.get(identity)
        if context is None:
            num_slots = settings.kept_slots(len(tokens), self.page_size)
            context = Context(identity, namespace, settings, tokens, num_slots, virtual_ids(identity, num_slots), judges)
            if context.is_uneven:
                # What such a node holds can be read only with `kept`, which goes with this record: another record of the
                # same context must not find it in the tree. All ranks count alike.
                self._num_uneven += 1
                node = hashlib.blake2b(f"{identity} {self._num_uneven}".encode()).hexdigest()
                context.virtual_ids = virtual_ids(node, num_slots)
            self._contexts[identity] = context
            self._forget_oldest()
        self._contexts.move_to_end(identity)
        return context

    def find_prefix(self, namespace: Namespace, settings: CompressionSettings, tokens: array[int]) -> Context | None:
        """The longest resident context, made with these settings, that `tokens` starts with and goes on behind."""
        best: Context | None = None
        for context in self._contexts.values():
            length = context.num_tokens
            if (
                context.state is ContextState.RESIDENT
                and context.settings == settings
                and context.namespace == namespace
                and length < len(tokens)
                and (best is None or length > best.num_tokens)
                and tokens[:length] == context.tokens
            ):
                best = context
        return best

    def key(self, context: Context, suffix: array[int] | None = None) -> RadixKey:
        """The radix key of a context, or of what is cached behind it."""
        ids = context.virtual_ids if suffix is None else context.virtual_ids + suffix
        return RadixKey(ids, context.namespace.extra_key, cache_salt=context.namespace.cache_salt)

    def is_resident(self, context: Context) -> bool:
        """Whether the tree still holds all of the context's slots. Counts as a use for the tree's eviction order."""
        if context.state in (ContextState.COMPRESSING, ContextState.DELETING):
            return False
        if context.is_uneven and context.kept is None:
            return False
        held = self.tree.match_prefix(MatchPrefixParams(key=self.key(context))).device_prefix_len == context.num_slots
        if held and context.state is ContextState.ABSENT:
            # Made before its record was dropped: the same id is the same content.
            context.state = ContextState.RESIDENT
            context.suffixes_complete = False
        elif not held and context.state is ContextState.RESIDENT:
            self._mark_absent(context)
        return held

    def reserve(self, context: Context) -> torch.Tensor | None:
        """Allocates the context's slots, evicting from the tree if needed, and inserts its node, locked.

        Returns the slots, [num_slots] int64, or None where the pool has no room. The node is in the tree before its content
        is, so that the pool's accounts always hold; nothing can match it, since its state is not RESIDENT yet.
        """
        evict_from_tree_cache(self.tree, context.num_slots)
        slots = self.allocator.alloc(context.num_slots)
        if slots is None:
            return None
        slots = slots.to(torch.int64)
        self.tree.insert(InsertParams(key=self.key(context), value=slots))
        self._lock(context)
        context.state = ContextState.COMPRESSING
        return slots

    def publish(self, context: Context, kept: KeptTokens) -> None:
        """The content is in the slots: from now on requests may match the context."""
        context.kept = kept
        context.state = ContextState.RESIDENT
        if not context.pinned:
            self.unlock(context)

    def withdraw(self, context: Context) -> None:
        """The compression did not come about: its slots go back to the pool."""
        self.unlock(context)
        self.drop_node(context)
        self._mark_absent(context)

    def pin(self, context: Context) -> None:
        """Keeps a resident context from being evicted."""
        context.pinned = True
        if context.tree_lock is None and context.state is ContextState.RESIDENT:
            self._lock(context)

    def unpin(self, context: Context) -> None:
        context.pinned = False
        if context.state is not ContextState.COMPRESSING:
            self.unlock(context)

    def _lock(self, context: Context) -> None:
        node = self.tree.match_prefix(MatchPrefixParams(key=self.key(context))).last_device_node
        context.tree_lock = self.tree.lock(node)

    def unlock(self, context: Context) -> None:
        self.tree.unlock(context.tree_lock)
        context.tree_lock = None

    @property
    def pinned_slots(self) -> int:
        return sum(context.num_slots for context in self if context.pinned)

    @property
    def has_deleted(self) -> bool:
        """Whether `sweep` has anything to free."""
        return bool(self._deleting)

    def delete(self, context: Context) -> None:
        """No new request finds the context; its slots go with `sweep`, once it has no readers."""
        self.unpin(context)
        self._contexts.pop(context.id, None)
        context.state = ContextState.DELETING
        self._deleting[context.id] = context

    def sweep(self, in_use: set[str]) -> None:
        """Frees what was deleted and is not among the ids `in_use`."""
        for context in [c for c in self._deleting.values() if c.id not in in_use]:
            self.drop_node(context)
            del self._deleting[context.id]
            self._mark_absent(context)

    def remember_suffix(self, context: Context, suffix: array[int], *, instead_of: array[int] | None = None) -> None:
        """A request leaves `suffix`, or a beginning of it, in the tree behind the context.

        instead_of: a beginning of it, remembered before.
        """
        if instead_of is not None:
            context.suffixes.pop(instead_of.tobytes(), None)
        if len(context.suffixes) < MAX_TRACKED_SUFFIXES:
            context.suffixes[suffix.tobytes()] = None
        else:
            context.suffixes_complete = False

    def drop_node(self, context: Context) -> None:
        """Evicts the context's node and what is cached behind it, as far as no request has it locked.

        What is left (locked, or behind more than MAX_TRACKED_SUFFIXES requests) is ordinary evictable content.
        """
        if context.suffixes_complete:
            self._drop_ends(context, [array("q", raw) for raw in context.suffixes] + [array("q")])

    def drop_suffixes(self, context: Context) -> None:
        """Evicts what is cached behind a context that no request uses; the context itself stays."""
        if context.suffixes and context.suffixes_complete:
            left = self._drop_ends(context, [array("q", raw) for raw in context.suffixes])
            context.suffixes = dict.fromkeys(suffix.tobytes() for suffix in left)

    def _drop_ends(self, context: Context, suffixes: list[array[int]]) -> list[array[int]]:
        """Evicts the paths of suffixes, of all that are in the tree, up to the context; an empty one is the context's own node.

        Returns those of which a part is left. The tree can drop unlocked leaves only (its Rust core panics on any other node),
        and cannot list a node's children: so the deepest end of all suffixes goes first, which must be a leaf, or locked, as is
        then every node that it has in common with others.
        """
        left = []
        # Of each suffix, minus the depth at which it ends at the latest.
        heap = [(-(context.num_slots + len(suffix)), index) for index, suffix in enumerate(suffixes)]
        heapq.heapify(heap)
        while heap:
            bound, index = heapq.heappop(heap)
            match = self.tree.match_prefix(MatchPrefixParams(key=self.key(context, suffixes[index])))
            depth = match.device_prefix_len
            if depth < context.num_slots:
                return []  # the context's node itself is gone, and with it everything behind it
            if depth == context.num_slots and suffixes[index]:
                continue  # nothing of this suffix is left
            if -depth != bound:
                heapq.heappush(heap, (-depth, index))
            elif not self._drop_leaf(match.last_device_node):
                left.append(suffixes[index])
            elif depth > context.num_slots:
                heapq.heappush(heap, (1 - depth, index))  # what is left of this suffix ends before
        return left

    def clear(self) -> None:
        """The tree was reset: every node and lock is gone."""
        for context in self:
            context.tree_lock = None
            context.pinned = False
            if context.job is None:
                self._mark_absent(context)
        self._deleting.clear()

    def _drop_leaf(self, node: int) -> bool:
        before = self.tree.evictable_size()
        lock = self.tree.lock(node)
        unlocked = self.tree.evictable_size() < before
        self.tree.unlock(lock)
        # Locking an unlocked path shrinks what is evictable; a node that a request holds shrinks nothing.
        if not unlocked:
            return False
        return self.tree._drop_subtree_no_host(node, {ComponentType.FULL: 0})

    def _mark_absent(self, context: Context) -> None:
        context.state = ContextState.ABSENT
        context.kept = None
        context.suffixes.clear()
        context.suffixes_complete = True
        self.unlock(context)
        context.pinned = False

    def _forget_oldest(self) -> None:
        for context in list(self._contexts.values()):
            if len(self._contexts) <= self.max_contexts:
                return
            if context.job is None and not context.pinned:
                del self._contexts[context.id]  # its node stays in the tree, as content that ages out
