"""KV events for routers: the real tokens of contexts while they are resident, and never virtual ones.

A router that follows the events (or counts prefixes by them) sends a question where its document is, compressed or not.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    StorageMedium,
    kv_event_namespace_seed,
    namespaced_block_hash,
)
from sglang.srt.mem_cache.events import KvEventLoraNames
from sglang.srt.mem_cache.utils import get_hash_str, hash_str_to_int64

from obcache_sglang.host import use
from obcache_sglang.kv.context import FIRST_VIRTUAL_ID, Context, Namespace
from obcache_sglang.scheduler import tree

if TYPE_CHECKING:
    from obcache_sglang.scheduler.context_cache import ContextCache

_SALT_SEED = b"sglang-cache-salt-v1\0"


class VisibleEvents:
    """The events of one tree that routers can do something with, and those of the contexts that it holds.

    A block after a hidden one is hidden too, also when it is stored long after: hidden blocks are remembered until they are removed.

    lora_names: the scheduler's, by which SGLang says what adapter a block is of. dynamo_format: as in `--kv-events-config`.
    """

    def __init__(self, lora_names: KvEventLoraNames | None = None, *, dynamo_format: bool = False) -> None:
        self._lora_names, self._dynamo_format = lora_names or KvEventLoraNames(), dynamo_format
        # Each with the media that it lies on: one that HiCache has moved to host memory is not gone.
        self._hidden: dict[int, set[str | None]] = {}
        # The hashes of contexts that were shown as stored, by context id; and of how many contexts each block is a part.
        self._shown: dict[str, tuple[Context, list[int]]] = {}
        self._held: Counter[int] = Counter()

    def of(self, events: list[Any], cache: ContextCache | None = None) -> list[Any]:
        """What is to be seen of events that the tree recorded since the last call, and of what became of contexts. cache: their tree's."""
        shown = [visible for event in events for visible in self._visible(event)]
        if cache is not None:
            shown += self._changes(cache)
        return shown

    def _visible(self, event: Any) -> Iterator[Any]:
        if isinstance(event, BlockStored):
            if event.token_ids[:1] >= [FIRST_VIRTUAL_ID] or event.parent_block_hash in self._hidden:
                for block in event.block_hashes:
                    self._hidden.setdefault(block, set()).add(event.medium)
                return
        elif isinstance(event, BlockRemoved):
            # What goes exactly may stay in a compressed context.
            stays = self._held if event.medium in (None, StorageMedium.GPU) else Counter[int]()
            left = [block for block in event.block_hashes if block not in self._hidden and not stays[block]]
            self._unhide(event)
            if not left:
                return
            event = msgspec.structs.replace(event, block_hashes=left)
        elif isinstance(event, AllBlocksCleared):
            self._hidden.clear()
            self._shown.clear()
            self._held.clear()
        yield event

    def _unhide(self, event: BlockRemoved) -> None:
        for block in event.block_hashes:
            media = self._hidden.get(block, set())
            media.discard(event.medium)
            if not media:
                self._hidden.pop(block, None)

    def _changes(self, cache: ContextCache) -> Iterator[Any]:
        """Contexts that went, and that came."""
        resident = {each.id: each for each in cache if cache.holds(each)}
        for identity in self._shown.keys() - resident.keys():
            context, blocks = self._shown.pop(identity)
            self._held.subtract(blocks)
            exact = tree.match_exact(cache.tree, context)[0] // cache.page_size
            gone = [block for number, block in enumerate(blocks) if self._held[block] <= 0 and number >= exact]
            if gone:
                yield BlockRemoved(block_hashes=gone, medium=StorageMedium.GPU)
        self._held += Counter()  # forgets those that are 0
        for identity, context in resident.items():
            if identity not in self._shown:
                blocks = block_hashes(context, cache.page_size, self._seed(context.namespace))
                self._shown[identity] = context, blocks
                yield from self._stored(context, blocks, cache.page_size)
                self._held.update(blocks)

    def _stored(self, context: Context, blocks: list[int], page_size: int) -> Iterator[BlockStored]:
        """What of a context no other one has shown: each run of blocks in one event, as of a node of the tree."""
        for is_held, run in groupby(range(len(blocks)), lambda number: bool(self._held[blocks[number]])):
            numbers = list(run)
            first, last = numbers[0], numbers[-1] + 1
            if not is_held:
                yield BlockStored(
                    block_hashes=blocks[first:last],
                    parent_block_hash=blocks[first - 1] if first else None,
                    token_ids=list(context.tokens[first * page_size : last * page_size]),
                    block_size=page_size,
                    lora_id=None,
                    medium=StorageMedium.GPU,
                    cache_salt=context.namespace.cache_salt,
                    lora_name=self._lora_name(context.namespace),
                )

    def _lora_name(self, namespace: Namespace) -> str | None:
        names = self._lora_names
        name: str | None = (names.resolve if self._dynamo_format else names.get)(namespace.extra_key)
        return name

    def _seed(self, namespace: Namespace) -> bytes | None:
        """What SGLang's own format has in the hashes of LoRA adapters only, each load with its own, and Dynamo's in those of all namespaces."""
        salt = namespace.cache_salt if self._dynamo_format else None
        is_apart = self._dynamo_format or self._lora_name(namespace) is not None
        seed: bytes | None = kv_event_namespace_seed(extra_key=namespace.extra_key if is_apart else None, cache_salt=salt)
        return seed


def block_hashes(context: Context, page_size: int, namespace_seed: bytes | None) -> list[int]:
    """The hashes [pages] that SGLang's events give the blocks of a context's real tokens."""
    salt = context.namespace.cache_salt
    seed = None if salt is None else hashlib.sha256(_SALT_SEED + salt.encode("utf-8")).hexdigest()
    pages: Iterable[str] = get_hash_str(context.tokens, seed, page_size)
    return [namespaced_block_hash(hash_str_to_int64(each), namespace_seed=namespace_seed) for each in pages]


_EVENTS = "sglang.srt.disaggregation.kv_events"
_UTILS = "sglang.srt.mem_cache.utils"

TOUCHES = (
    use(f"{_EVENTS}.BlockStored", "call", "a context's real tokens", ("block_hashes", "parent_block_hash", "token_ids")),
    use(f"{_EVENTS}.BlockRemoved", "call", "a context went", ("block_hashes", "medium")),
    use(f"{_EVENTS}.kv_event_namespace_seed", "call", "hashes of blocks in a namespace", ("extra_key", "cache_salt")),
    use(f"{_EVENTS}.namespaced_block_hash", "call", "likewise", ("block_hash", "namespace_seed")),
    use("sglang.srt.mem_cache.events.KvEventLoraNames.get", "call", "the adapter of a block's namespace", ("extra_key",)),
    use("sglang.srt.mem_cache.events.KvEventLoraNames.resolve", "call", "likewise, in Dynamo's format", ("extra_key",)),
    use(f"{_EVENTS}.StorageMedium", "read", "GPU, as SGLang calls the device"),
    use(f"{_UTILS}.get_hash_str", "call", "hashes of blocks, as events have them", ("token_ids", "prior_hash", "page_size")),
    use(f"{_UTILS}.hash_str_to_int64", "call", "likewise", ("hash_str",)),
)
