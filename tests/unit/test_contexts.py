"""ContextCache on SGLang's own radix tree, allocator and pools: every slot is accounted for at every step."""

from __future__ import annotations

from array import array

import pytest
import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from obcache_sglang.cells import KeptTokens
from obcache_sglang.config import CompressionSettings
from obcache_sglang.scheduler.contexts import FIRST_VIRTUAL_ID, Context, ContextCache, ContextState, Namespace, context_id
from obcache_sglang.scheduler.hooks import after_take_events

POOL = 200
HERE = Namespace(None, None, None)
HALF = CompressionSettings.resolve({"compression_ratio": 0.5, "budget": "uniform"})
UNEVEN = CompressionSettings.resolve({"compression_ratio": 0.5, "budget": "adakv"})
KEPT = KeptTokens(torch.arange(20), torch.tensor([0, 20]))


@pytest.fixture
def cache() -> ContextCache:
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    pools = {"device": "cpu", "enable_memory_saver": False}
    kv_pool = MHATokenToKVPool(size=POOL, page_size=1, dtype=torch.float32, head_num=1, head_dim=8, layer_num=1, **pools)
    tree = UnifiedRadixCache(
        params=CacheInitParams(
            req_to_token_pool=ReqToTokenPool(size=4, max_context_len=POOL, **pools),
            token_to_kv_pool_allocator=TokenToKVPoolAllocator(
                size=POOL, dtype=torch.float32, device="cpu", kvcache=kv_pool, need_sort=False
            ),
            page_size=1,
            disable=False,
            tree_components=(ComponentType.FULL,),
            enable_kv_cache_events=True,
        )
    )
    return ContextCache(tree, max_contexts=3)


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
    match = cache.tree.match_prefix(MatchPrefixParams(key=cache.key(context, array("q", suffix))))
    own = cache.allocator.alloc(context.num_slots + len(suffix) - match.device_prefix_len)
    held = cache.tree.path_device_indices(match.last_device_node)
    value = torch.cat([held, own.to(torch.int64)])
    cache.tree.insert(
        InsertParams(key=cache.key(context, array("q", suffix)), value=value, prev_prefix_len=match.device_prefix_len)
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


def test_what_is_locked_behind_a_context_stays_and_is_known(cache: ContextCache) -> None:
    context = make(cache, tokens(0))
    for suffix in ([1, 2, 3], [1, 2, 4, 5], [6]):
        leave_behind(cache, context, suffix)
    lock = cache.tree.lock(
        cache.tree.match_prefix(MatchPrefixParams(key=cache.key(context, array("q", [1, 2, 3])))).last_device_node
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
    lock = cache.tree.lock(cache.tree.match_prefix(MatchPrefixParams(key=cache.key(context))).last_device_node)
    cache.delete(context)
    cache.sweep({context.id})
    assert cache.get(context.id) is context
    assert cache.obtain(HERE, HALF, tokens(0)) is context  # DELETING: nobody starts on it
    cache.tree.unlock(lock)
    cache.sweep(set())
    assert accounts(cache) == (POOL, 0, 0)


def test_dropping_a_locked_node_is_refused_not_a_panic(cache: ContextCache) -> None:
    context = make(cache, tokens(0))
    lock = cache.tree.lock(cache.tree.match_prefix(MatchPrefixParams(key=cache.key(context))).last_device_node)
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
    assert cache.find_prefix(HERE, HALF, tokens(0, 50)) is long
    assert cache.find_prefix(HERE, HALF, tokens(0, 40)) is short  # something must be left to generate from
    assert cache.find_prefix(HERE, HALF, tokens(1, 50)) is None
    assert cache.find_prefix(Namespace("x", None, None), HALF, tokens(0, 50)) is None


def test_forgotten_records_leave_nodes_that_are_found_again(cache: ContextCache) -> None:
    first = make(cache, tokens(0))
    leave_behind(cache, first, [1, 2])
    for start in (100, 200, 300):
        make(cache, tokens(start, 20))
    assert cache.get(first.id) is None  # max_contexts is 3
    again = cache.obtain(HERE, HALF, tokens(0))
    assert again is not first
    assert cache.is_resident(again)
    cache.delete(again)  # what stands behind it is not known: nothing may panic, and it stays evictable
    cache.sweep(set())
    assert accounts(cache)[2] == 0


def test_what_an_uneven_context_left_in_the_tree_is_not_found_without_its_record(cache: ContextCache) -> None:
    """Without the record nobody knows how many tokens each head keeps there."""
    first = make(cache, tokens(0), settings=UNEVEN)
    assert cache.is_resident(first)
    leave_behind(cache, first, [1, 2])
    for start in (100, 200, 300):
        make(cache, tokens(start, 20))
    assert cache.get(first.id) is None  # max_contexts is 3
    again = cache.obtain(HERE, UNEVEN, tokens(0))
    assert again.id == first.id
    assert not cache.is_resident(again)
    assert cache.reserve(again) is not None  # beside what is left of the first, which ages out
    cache.publish(again, KEPT)
    assert cache.is_resident(again)
    assert accounts(cache)[2] == 0


def test_no_room_is_none_and_changes_nothing(cache: ContextCache) -> None:
    pinned = make(cache, tokens(0, 300)[:300])
    cache.pin(pinned)
    before = accounts(cache)
    assert cache.reserve(cache.obtain(HERE, HALF, tokens(1000, 200))) is None
    assert accounts(cache) == before


def test_kv_events_never_show_virtual_tokens(cache: ContextCache) -> None:
    context = make(cache, tokens(0))
    leave_behind(cache, context, [1, 2, 3])
    slots = cache.allocator.alloc(5).to(torch.int64)
    plain = cache.key(context)
    plain.token_ids = tokens(50, 5)
    cache.tree.insert(InsertParams(key=plain, value=slots))
    events = cache.tree.take_events()
    stored = [event for event in events if getattr(event, "token_ids", None)]
    assert any(event.token_ids[0] >= FIRST_VIRTUAL_ID for event in stored)
    shown = after_take_events(events, cache.tree)
    assert [event.token_ids for event in shown if getattr(event, "token_ids", None)] == [list(tokens(50, 5))]
