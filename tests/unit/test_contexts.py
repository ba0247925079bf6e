"""ContextCache on SGLang's own radix tree, allocator and pools: every slot is accounted for at every step."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.events import KvEventLoraNames
from sglang.srt.mem_cache.radix_cache import RadixKey

from obcache_sglang.kv.context import FIRST_VIRTUAL_ID, Context, ContextState, Namespace
from obcache_sglang.scheduler import context_cache as contexts
from obcache_sglang.scheduler.context_cache import ContextCache, context_id
from obcache_sglang.scheduler.kv_events import VisibleEvents
from obcache_sglang.scheduler.lineage import longest_prefix
from obcache_sglang.scheduler.room import make_way_for_pin
from obcache_sglang.scheduler.tree import context_key, radix_key
from obcache_sglang.settings import CompressionSettings
from tests.unit.engine import HALF, KEPT, make_tree

POOL = 200
HERE = Namespace(None, None, None)
UNEVEN = CompressionSettings.resolve({"compression_ratio": 0.5, "budget": "adakv"})


@pytest.fixture
def cache() -> ContextCache:
    return ContextCache(make_tree(POOL), max_contexts=3)


def accounts(cache: ContextCache) -> tuple[int, int, int]:
    """(available, evictable, protected); they always sum to the pool."""
    parts = cache.allocator.available_size(), cache.tree.evictable_size(), cache.tree.protected_size()
    assert sum(parts) == POOL
    return parts


def tokens(first: int, count: int = 40) -> array[int]:
    return array("q", range(first, first + count))


def make(cache: ContextCache, ids: array[int], namespace: Namespace = HERE, settings: CompressionSettings = HALF) -> Context:
    context = cache.obtain(namespace, settings, ids)
    assert cache.reserve(context) is not None
    cache.publish(context, KEPT)
    return context


def leave_behind(cache: ContextCache, context: Context, suffix: list[int]) -> None:
    """What a finished request leaves in the tree: its prompt behind the context."""
    match = cache.tree.match_prefix(MatchPrefixParams(key=context_key(context, array("q", suffix))))
    own = cache.allocator.alloc(context.num_slots + len(suffix) - match.device_prefix_len)
    held = cache.tree.path_device_indices(match.last_device_node)
    value = torch.cat([held, own.to(torch.int64)])
    cache.tree.insert(
        InsertParams(key=context_key(context, array("q", suffix)), value=value, prev_prefix_len=match.device_prefix_len)
    )
    cache.remember_suffix(context, array("q", suffix))


def test_a_context_holds_its_slots_and_gives_them_back(cache: ContextCache) -> None:
    context = cache.obtain(HERE, HALF, tokens(0))
    assert accounts(cache) == (POOL, 0, 0)
    cache.reserve(context)
    assert context.state is ContextState.COMPRESSING
    assert accounts(cache) == (POOL - 20, 0, 20)  # 40 tokens at ratio 0.5; locked while it is made
    assert not cache.is_resident(context)
    cache.publish(context, KEPT)
    assert accounts(cache) == (POOL - 20, 20, 0)
    assert cache.is_resident(context)
    cache.delete(context)
    cache.sweep(set())
    assert accounts(cache) == (POOL, 0, 0)
    assert cache.get(context.id) is None


def test_a_compression_that_fails_leaves_nothing(cache: ContextCache) -> None:
    context = cache.obtain(HERE, HALF, tokens(0))
    cache.reserve(context)
    cache.withdraw(context)
    assert accounts(cache) == (POOL, 0, 0)
    assert context.state is ContextState.ABSENT
    cache.reserve(context)  # and can be tried again
    cache.publish(context, KEPT)
    assert cache.is_resident(context)


def test_deleting_frees_what_is_cached_behind_the_context_too(cache: ContextCache) -> None:
    context, other = make(cache, tokens(0)), make(cache, tokens(100))
    for suffix in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 9, 9], [7], [1, 2, 9, 5]):
        leave_behind(cache, context, suffix)
    assert accounts(cache)[1] == 20 + 20 + 4 + 3 + 1 + 1
    cache.delete(context)
    cache.sweep(set())
    assert accounts(cache) == (POOL - 20, 20, 0)
    assert cache.is_resident(other)


def test_what_is_cached_behind_a_context_can_go_without_it(cache: ContextCache) -> None:
    context, other = make(cache, tokens(0)), make(cache, tokens(100))
    for suffix in ([1, 2, 3, 4], [1, 2, 3], [7], [1, 2, 9, 5]):
        leave_behind(cache, context, suffix)
    leave_behind(cache, other, [1])
    cache.remember_suffix(context, array("q", [8, 8]))  # never came into the tree
    cache.drop_suffixes(context)
    assert accounts(cache) == (POOL - 41, 41, 0)
    assert cache.is_resident(context)
    leave_behind(cache, context, [7])
    cache.delete(context)
    cache.sweep(set())
    assert accounts(cache) == (POOL - 21, 21, 0)


@pytest.mark.parametrize(("limit", "of"), [("MAX_TRACKED_SUFFIXES", 3), ("MAX_TRACKED_TOKENS", 9)])
def test_what_is_remembered_behind_a_context_is_bounded(
    cache: ContextCache, monkeypatch: pytest.MonkeyPatch, limit: str, of: int
) -> None:
    monkeypatch.setattr(contexts, limit, of)
    context = make(cache, tokens(0))
    for last in range(20):
        leave_behind(cache, context, [1, 2, last])
    assert len(context.suffixes) == 3
    cache.delete(context)
    cache.sweep(set())
    # What is not remembered is ordinary content of the tree, which goes when there is no room. Nobody is served it again.
    assert accounts(cache)[0] < POOL
    again = cache.obtain(HERE, HALF, tokens(0))
    assert again is not context and not cache.is_resident(again)
    assert cache.reserve(again) is not None
    assert (
        cache.tree.match_prefix(MatchPrefixParams(key=context_key(again, array("q", [1, 2, 0])))).device_prefix_len
        == again.num_slots
    )
    cache.withdraw(again)
    cache.tree.evict(EvictParams(num_tokens=POOL))
    assert accounts(cache) == (POOL, 0, 0)


def test_what_is_locked_behind_a_context_stays_and_is_known(cache: ContextCache) -> None:
    context = make(cache, tokens(0))
    for suffix in ([1, 2, 3], [1, 2, 4, 5], [6]):
        leave_behind(cache, context, suffix)
    lock = cache.tree.lock(
        cache.tree.match_prefix(MatchPrefixParams(key=context_key(context, array("q", [1, 2, 3])))).last_device_node
    )
    cache.drop_suffixes(context)
    assert accounts(cache) == (POOL - 23, 0, 23)
    cache.drop_node(context)
    assert accounts(cache) == (POOL - 23, 0, 23)
    cache.tree.unlock(lock)
    cache.drop_node(context)
    assert accounts(cache) == (POOL, 0, 0)


def test_a_context_in_use_is_deleted_when_its_readers_are_gone(cache: ContextCache) -> None:
    context = make(cache, tokens(0))
    lock = cache.tree.lock(cache.tree.match_prefix(MatchPrefixParams(key=context_key(context))).last_device_node)
    cache.delete(context)
    cache.sweep({context.id})
    assert cache.get(context.id) is context
    assert cache.obtain(HERE, HALF, tokens(0)) is context  # DELETING: nobody starts on it
    cache.tree.unlock(lock)
    cache.sweep(set())
    assert accounts(cache) == (POOL, 0, 0)


def test_dropping_a_locked_node_is_refused_not_a_panic(cache: ContextCache) -> None:
    context = make(cache, tokens(0))
    lock = cache.tree.lock(cache.tree.match_prefix(MatchPrefixParams(key=context_key(context))).last_device_node)
    cache.drop_node(context)
    assert accounts(cache) == (POOL - 20, 0, 20)
    cache.tree.unlock(lock)
    cache.drop_node(context)
    assert accounts(cache) == (POOL, 0, 0)


def test_pins_hold_against_eviction_and_others_go(cache: ContextCache) -> None:
    pinned, other = make(cache, tokens(0)), make(cache, tokens(100))
    cache.pin(pinned)
    assert cache.pinned_slots == 20
    cache.tree.evict(EvictParams(num_tokens=POOL))
    assert cache.is_resident(pinned)
    assert not cache.is_resident(other)
    assert other.state is ContextState.ABSENT
    cache.unpin(pinned)
    assert accounts(cache) == (POOL - 20, 20, 0)


def test_namespaces_and_settings_are_part_of_the_identity() -> None:
    ids = tokens(0)
    quarter = CompressionSettings.resolve({"compression_ratio": 0.75})
    namespaces = [HERE, Namespace("a", None, None), Namespace(None, "a", None), Namespace("a", None, "a")]
    identities = {context_id(namespace, settings, ids) for namespace in namespaces for settings in (HALF, quarter)}
    assert len(identities) == 8
    assert context_id(HERE, HALF, ids) == context_id(HERE, HALF, array("q", ids))
    assert context_id(HERE, HALF, ids) != context_id(HERE, HALF, tokens(1))
    assert len({context_id(HERE, HALF, ids, judges) for judges in ((), (1,), (2,), (1, 2), (12,))}) == 5


def test_contexts_that_nobody_scores_are_shared_whoever_asks(cache: ContextCache) -> None:
    """Judges tell contexts apart only where the method asks the queries behind a context."""
    ids, judges = tokens(0), array("q", [7])
    for wish, asks in (({"method": "tova"}, True), ({"method": "streaming"}, False), ({"method": "replay"}, False)):
        settings = CompressionSettings.resolve(wish)
        assert (cache.obtain(HERE, settings, ids, judges) is not cache.obtain(HERE, settings, ids)) == asks


def test_a_salt_never_matches_another_salts_node(cache: ContextCache) -> None:
    mine = make(cache, tokens(0), Namespace(None, "mine", None))
    yours = cache.obtain(Namespace(None, "yours", None), HALF, tokens(0))
    assert cache.is_resident(mine)
    assert not cache.is_resident(yours)


def test_a_prompt_finds_the_longest_context_it_starts_with(cache: ContextCache) -> None:
    short, long = make(cache, tokens(0, 20)), make(cache, tokens(0, 40))
    assert longest_prefix(cache, HERE, [HALF], tokens(0, 50)) is long
    assert longest_prefix(cache, HERE, [HALF], tokens(0, 40)) is short  # something must be left to generate from
    assert longest_prefix(cache, HERE, [HALF], tokens(1, 50)) is None
    assert longest_prefix(cache, Namespace("x", None, None), [HALF], tokens(0, 50)) is None


@pytest.mark.parametrize("settings", [HALF, UNEVEN], ids=["even", "uneven"])
def test_what_is_forgotten_is_evicted_and_never_taken_for_another_compression(
    cache: ContextCache, settings: CompressionSettings
) -> None:
    first = make(cache, tokens(0), settings=settings)
    leave_behind(cache, first, [1, 2])
    old_key = context_key(first)
    identity = cache.capability(first, tokens(0, 0))
    lock = cache.tree.lock(cache.tree.match_prefix(MatchPrefixParams(key=old_key)).last_device_node)
    for start in (100, 200, 300):
        make(cache, tokens(start, 20))
    assert cache.get(first.id) is None  # max_contexts is 3
    assert cache.by_capability(identity) is None
    assert accounts(cache) == (POOL - 20 - 30, 30, 20)  # a request reads it still; what stood behind it is gone
    again = cache.obtain(HERE, settings, tokens(0))
    assert again is not None and again.id == first.id
    assert not cache.is_resident(again)
    assert cache.reserve(again) is not None
    assert context_key(again).token_ids != old_key.token_ids
    cache.publish(again, KEPT)
    assert cache.is_resident(again)
    cache.tree.unlock(lock)
    assert accounts(cache)[2] == 0


def test_a_node_that_another_content_left_is_never_taken_for_a_contexts_own(cache: ContextCache, monkeypatch) -> None:
    """Whatever the virtual ids are drawn from: two contexts whose ids begin alike stay apart."""
    drawn = iter([7, 7, 8])

    class Drawn:
        def digest(self) -> bytes:
            return next(drawn).to_bytes(8)

    monkeypatch.setattr(contexts.hashlib, "blake2b", lambda *args, **kwargs: Drawn())
    one, two = (Context(name, HERE, HALF, tokens(start), 20) for name, start in (("ab" * 16, 0), ("ab" * 8 + "cd" * 8, 100)))
    assert cache.reserve(one) is not None
    cache.publish(one, KEPT)
    assert not cache.is_resident(two)
    assert cache.reserve(two) is not None
    assert one.engine_ids[0] + 1 == two.engine_ids[0]
    assert one.node != two.node
    assert accounts(cache) == (POOL - 40, 20, 20)


def test_ids_of_nodes_are_never_used_again(cache: ContextCache) -> None:
    """What residency rests on: a node's id says which compression's content it is."""
    seen: set[int] = set()
    for start in range(0, 1000, 100):
        context = make(cache, tokens(start))
        assert context.node not in seen
        seen.add(context.node)
        cache.tree.evict(EvictParams(num_tokens=POOL))
        assert not cache.is_resident(context)
    cache.tree.reset()
    cache.allocator.clear()
    assert make(cache, tokens(5000)).node not in seen


def test_looking_at_a_context_is_no_use_of_it(cache: ContextCache) -> None:
    """Else a monitor would decide what is evicted."""
    older, newer = make(cache, tokens(0)), make(cache, tokens(100))
    assert cache.is_resident(older)
    cache.tree.evict(EvictParams(num_tokens=20))
    assert not cache.is_resident(older)
    assert cache.is_resident(newer)


@pytest.mark.parametrize("step", ["insert", "lock"])
def test_a_reservation_that_raises_loses_no_slot(cache: ContextCache, monkeypatch, step: str) -> None:
    context = cache.obtain(HERE, HALF, tokens(0))
    original = getattr(cache.tree, step)

    def fail_once(*args: object) -> None:
        monkeypatch.setattr(cache.tree, step, original)
        raise RuntimeError("injected")

    monkeypatch.setattr(cache.tree, step, fail_once)
    with pytest.raises(RuntimeError, match="injected"):
        cache.reserve(context)
    assert accounts(cache) == (POOL, 0, 0)
    assert context.state is ContextState.ABSENT
    assert cache.reserve(context) is not None


def test_pins_leave_room_for_compressions(cache: ContextCache) -> None:
    """Of three contexts one may be pinned: the others make way for new ones."""
    for start in (0, 100, 200):
        context = make(cache, tokens(start, 4))
        if make_way_for_pin(cache, context, POOL):
            cache.pin(context)
    assert [context.pinned for context in cache] == [True, False, False]
    assert cache.obtain(HERE, HALF, tokens(300, 4)) is not None
    assert [context.pinned for context in cache] == [True, False, False]


def test_who_pins_most_makes_way_for_who_pins_less(cache: ContextCache) -> None:
    cache.max_contexts = 20
    mine, yours = (Namespace(None, salt, None) for salt in ("mine", "yours"))

    def pinned(namespace: Namespace, start: int) -> bool:
        context = make(cache, tokens(start), namespace)
        if make_way_for_pin(cache, context, 80):
            cache.pin(context)
        return context.pinned

    assert [pinned(mine, start) for start in range(0, 500, 100)] == [True, True, True, True, False]
    assert [pinned(yours, start) for start in range(500, 800, 100)] == [True, True, False]
    held = [context.namespace for context in cache if context.pinned]
    assert held.count(mine) == held.count(yours) == 2
    assert not pinned(mine, 900)


def test_no_record_can_be_had_where_all_are_pinned_or_being_made(cache: ContextCache) -> None:
    for start in (0, 100, 200):
        cache.obtain(HERE, HALF, tokens(start)).is_queued = True
    assert cache.obtain(HERE, HALF, tokens(300)) is None
    assert cache.obtain(HERE, HALF, tokens(100)) is not None


def test_a_deadline_goes_with_what_it_was_set_for(cache: ContextCache) -> None:
    context = make(cache, tokens(0))
    context.ttl_seconds, context.expires_at = 5.0, 1.0
    cache.tree.evict(EvictParams(num_tokens=POOL))
    assert not cache.is_resident(context)
    assert (context.ttl_seconds, context.expires_at) == (None, None)


def test_a_context_id_brings_the_tokens_behind_the_last_whole_page(cache: ContextCache) -> None:
    context = make(cache, tokens(0))
    whole, one, other = (cache.capability(context, tail) for tail in (tokens(0, 0), tokens(7, 3), tokens(8, 3)))
    assert len({whole, one, other, context.id}) == 4
    assert cache.capability(context, tokens(7, 3)) == one
    assert cache.by_capability(one) == (context, tokens(7, 3))
    assert cache.by_capability(context.id) is None
    for start in range(1000):
        cache.capability(context, tokens(start, 2))
    assert len(context.tails) == len(cache._capabilities) == contexts.MAX_TAILS
    cache.delete(context)
    assert cache.by_capability(one) is None and not cache._capabilities


def test_nothing_that_opens_a_context_can_be_computed_without_the_secret() -> None:
    ids = tokens(0)
    assert context_id(HERE, HALF, ids, secret=b"a") != context_id(HERE, HALF, ids, secret=b"b") != context_id(HERE, HALF, ids)


def test_no_room_is_none_and_changes_nothing(cache: ContextCache) -> None:
    pinned = make(cache, tokens(0, 300)[:300])
    cache.pin(pinned)
    before = accounts(cache)
    assert cache.reserve(cache.obtain(HERE, HALF, tokens(1000, 200))) is None
    assert accounts(cache) == before


def test_kv_events_never_show_virtual_tokens(cache: ContextCache) -> None:
    """Also not of what is stored behind a context, or removed, long after it."""
    events = VisibleEvents()
    context = make(cache, tokens(0))
    cleared, *recorded = cache.tree.take_events()
    assert isinstance(cleared, AllBlocksCleared)
    assert any(event.token_ids[0] >= FIRST_VIRTUAL_ID for event in recorded)
    assert events.of([cleared, *recorded]) == [cleared]
    leave_behind(cache, context, [1, 2, 3])
    slots = cache.allocator.alloc(5).to(torch.int64)
    plain = RadixKey(tokens(50, 5))
    cache.tree.insert(InsertParams(key=plain, value=slots))
    leave_behind(cache, context, [1, 2, 3, 4, 5])
    recorded = cache.tree.take_events()
    assert {token for event in recorded for token in event.token_ids} >= {1, 2, 3, 4, 5}
    shown = events.of(recorded)
    assert [token for event in shown for token in event.token_ids] == list(tokens(50, 5))
    cache.tree.evict(EvictParams(num_tokens=POOL))
    removed = events.of(cache.tree.take_events())
    assert {block for event in removed for block in event.block_hashes} == {
        block for event in shown for block in event.block_hashes
    }
    assert not events._hidden


def stored(events: list[Any]) -> dict[int, tuple[int | None, list[int]]]:
    """Of each block by its hash: the one before it, and its tokens. As a router that follows the events knows it."""
    known: dict[int, tuple[int | None, list[int]]] = {}
    for event in events:
        if isinstance(event, BlockStored):
            assert event.parent_block_hash is None or event.parent_block_hash in known
            before, size = event.parent_block_hash, event.block_size
            for number, block in enumerate(event.block_hashes):
                known[block] = before, list(event.token_ids[number * size : (number + 1) * size])
                before = block
        elif isinstance(event, BlockRemoved):
            for block in event.block_hashes:
                known.pop(block, None)
        else:
            known.clear()
    return known


ADAPTER = Namespace("key" + "0" * 32, None, "0" * 32)


def lora_names() -> KvEventLoraNames:
    """As SGLang keeps them: of the adapters that it was started with, and of the namespaces that were asked in."""
    names = KvEventLoraNames()
    names.register(SimpleNamespace(lora_id=ADAPTER.lora_id, extra_key=ADAPTER.extra_key), "adapter")
    return names


@pytest.mark.parametrize("dynamo", [False, True], ids=["", "dynamo"])
@pytest.mark.parametrize("namespace", [HERE, Namespace(None, "salt", None), Namespace("key", None, None), ADAPTER])
def test_routers_see_the_real_tokens_of_a_context_while_it_is_there(namespace: Namespace, dynamo: bool) -> None:
    names = lora_names()
    cache = ContextCache(make_tree(POOL, lora_names=names, dynamo_events=dynamo), max_contexts=3)
    events, seen = VisibleEvents(names, dynamo_format=dynamo), []

    def router() -> dict[int, tuple[int | None, list[int]]]:
        seen.extend(events.of(cache.tree.take_events(), cache))
        return stored(seen)

    def cache_exactly(ids: array[int]) -> None:
        slots = cache.allocator.alloc(len(ids)).to(torch.int64)
        cache.tree.insert(InsertParams(key=radix_key(namespace, ids), value=slots))

    # What the tree itself says of these tokens, cached exactly.
    cache_exactly(tokens(0))
    exact = router()
    assert [token for _, page in exact.values() for token in page] == list(tokens(0))
    context = make(cache, tokens(0), namespace=namespace)
    assert router() == exact
    lock = cache.tree.lock(context.node)
    cache.tree.evict(EvictParams(num_tokens=POOL))
    assert router() == exact, "what goes exactly stays compressed"
    other = make(cache, tokens(0)[:20], namespace=namespace)
    cache.tree.unlock(lock)
    assert router() == exact
    cache.drop_node(context)
    assert list(router()) == list(exact)[:20]
    assert {each.lora_name for each in seen if isinstance(each, BlockStored)} == {"adapter" if namespace is ADAPTER else None}
    cache_exactly(tokens(0)[:10])
    cache.drop_node(other)
    assert list(router()) == list(exact)[:10], "these are cached exactly again"
    cache.tree.evict(EvictParams(num_tokens=POOL))
    assert router() == {} and not events._held and not events._shown


def test_a_flush_clears_what_routers_know(cache: ContextCache) -> None:
    events = VisibleEvents()
    make(cache, tokens(0))
    seen = events.of(cache.tree.take_events(), cache)
    assert len(stored(seen)) == len(tokens(0))
    cache.tree.reset()
    cache.clear()
    assert stored(seen + events.of(cache.tree.take_events(), cache)) == {} and not events._shown
