"""Contexts that HiCache moves to host memory and back, on SGLang's own tree and pools: cell by cell, and with every slot accounted for."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, StorageMedium
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams

from obcache_sglang.kv.cells import KeptTokens, KVSpace
from obcache_sglang.kv.context import FIRST_VIRTUAL_ID, SHARED, Context, ContextState
from obcache_sglang.scheduler import host_memory, tree
from obcache_sglang.scheduler.hooks import around_add_one_req, around_attach_hicache_storage
from obcache_sglang.scheduler.kv_events import VisibleEvents
from obcache_sglang.scheduler.lineage import find_again, longest_prefix
from obcache_sglang.scheduler.requests import MAX_LOSSES, CompressionJob
from obcache_sglang.scheduler.wiring import Wiring
from tests.unit.engine import Driven, make_tree
from tests.unit.test_segments import make_all, the_job

POLICIES = pytest.mark.parametrize("policy", ["write_through", "write_back"])
LAYERS, HEADS, POOL = 2, 2, 200
EVEN = KeptTokens(torch.arange(20, dtype=torch.int32).repeat(LAYERS * HEADS), torch.arange(LAYERS * HEADS + 1) * 20)
UNEVEN = KeptTokens(torch.arange(80, dtype=torch.int32), torch.tensor([0, 35, 40, 50, 80]))


def tokens(first: int, count: int = 40) -> array[int]:
    return array("q", range(first, first + count))


def driven(policy: str, *, host_ratio: float = 2.0, budget: str = "uniform", **settings: Any) -> Driven:
    return Driven(POOL, tree=make_tree(POOL, LAYERS, HEADS, host=policy, host_ratio=host_ratio), budget=budget, **settings)


def buffers(drive: Driven) -> list[torch.Tensor]:
    pool = drive.engine.tree.token_to_kv_pool_allocator.get_kvcache()
    return [*pool.k_buffer, *pool.v_buffer]


def slots(drive: Driven, context: Context) -> torch.Tensor:
    found = tree.compressed_slots(drive.engine.tree, context)
    assert found is not None
    return found[1]


def content(drive: Driven, context: Context) -> torch.Tensor:
    """[layers, K and V, slots, heads, dim]: all that a context has in its slots."""
    return torch.stack([buffer[slots(drive, context)] for buffer in buffers(drive)])


def compress(drive: Driven, ids: array[int], kept: KeptTokens = EVEN, **plan: Any) -> tuple[Context, torch.Tensor]:
    """A context that is compressed for a question, which then leaves; and its content, in which every number is another one."""
    req = drive.ask(ids, **plan)
    (job,) = [each for each in drive.step() if isinstance(each, CompressionJob)]
    drive.forward(job, kept)
    context = job.context
    wanted = torch.rand(len(buffers(drive)), context.num_slots, HEADS, 8)
    for buffer, numbers in zip(buffers(drive), wanted, strict=True):
        buffer[slots(drive, context)] = numbers
    drive.end(job)
    drive.step()
    drive.engine.queue.remove(req)
    settle(drive)
    return context, wanted


def settle(drive: Driven) -> None:
    """Copies under way are done."""
    for _ in range(2):
        drive.engine.tree.check_hicache_events()


def evict(drive: Driven, *contexts: Context) -> None:
    """All that can be evicted is, and what lay in slots that are free now is gone. contexts: that must be in host memory then."""
    settle(drive)
    drive.evict_all()
    allocator = drive.engine.tree.token_to_kv_pool_allocator
    free = allocator.alloc(allocator.available_size())
    for buffer in buffers(drive):
        buffer[free] = -1
    allocator.free(free)
    assert all(drive.manager.cache.is_on_host(each) for each in contexts)


def check_accounts(drive: Driven) -> None:
    engine = drive.engine
    held = sum(len(each) for each in engine._held.values())
    assert engine.free_slots() + engine.tree.evictable_size() + engine.tree.protected_size() + held == POOL
    engine.tree.sanity_check()


@POLICIES
def test_a_context_goes_to_host_memory_and_comes_back_for_its_question(policy: str) -> None:
    drive = driven(policy)
    context, wanted = compress(drive, tokens(0))
    evict(drive, context)
    assert (context.state, context.describe()["tier"], context.describe()["slots"]) == (ContextState.ON_HOST, "host", 0)
    req = drive.ask(tokens(0))
    assert drive.step() == [] and not context.is_queued, "it is held, and nothing is compressed"
    assert drive.step() == [req]
    assert (context.state, req.tier, req.is_virtual, req.reads) == (ContextState.RESIDENT, "host", True, context.resident)
    assert torch.equal(content(drive, context), wanted)
    again = drive.ask(tokens(0), question=8)
    assert drive.step() == [req, again] and again.tier == "device"
    counters = drive.manager.metrics.to_dict()
    assert (counters["compressions"], counters["host_loads"], counters["host_slots_loaded"]) == (1, 1, 20)
    drive.step()
    assert context.tree_lock is None
    check_accounts(drive)


@POLICIES
def test_heads_that_keep_different_tokens_find_them_in_the_new_slots(policy: str) -> None:
    drive = driven(policy, budget="adakv")
    context, _ = compress(drive, tokens(0), UNEVEN)
    space = KVSpace.of(drive.engine.tree.token_to_kv_pool_allocator.get_kvcache())
    assert space is not None
    before = UNEVEN.rows_in(space, slots(drive, context))
    wanted = space.k[before].clone()
    evict(drive, context)
    # Other text takes the slots that it had.
    taken = drive.engine.tree.token_to_kv_pool_allocator.alloc(30)
    drive.ask(tokens(0))
    drive.step()
    drive.step()
    assert context.kept is not None and context.kept.rows is not None
    rows = context.kept.rows.to(torch.int64)
    assert not torch.equal(rows, before) and torch.equal(rows, UNEVEN.rows_in(space, slots(drive, context)))
    assert torch.equal(space.k[rows], wanted)
    drive.engine.tree.token_to_kv_pool_allocator.free(taken)


def test_what_is_not_computed_yet_is_not_copied() -> None:
    drive = driven("write_through")
    cache = drive.manager.cache
    context = cache.obtain(SHARED, drive.manager.settings.compression, tokens(0))
    assert context is not None and cache.reserve(context) is not None
    settle(drive)
    assert not drive.engine.tree.is_backuped(context.node)
    cache.publish(context, EVEN)
    assert drive.engine.tree.is_backuped(context.node)
    settle(drive)
    assert context.tree_lock is None and drive.engine.tree.protected_size() == 0


@POLICIES
def test_those_that_come_back_do_not_push_each_other_out_before_they_are_read(policy: str) -> None:
    drive = driven(policy)
    made = [compress(drive, tokens(100 * number)) for number in range(4)]
    evict(drive, *(context for context, _ in made))
    allocator = drive.engine.tree.token_to_kv_pool_allocator
    taken = allocator.alloc(POOL - 45)  # room for two
    reqs = [drive.ask(tokens(100 * number), question=7 + number) for number in range(4)]
    assert drive.step() == []
    assert drive.step() == reqs[:2]
    for req in reqs[:2]:
        drive.engine.queue.remove(req)
    assert drive.step() == []
    assert drive.step() == reqs[2:]
    for context, wanted in made[2:]:
        assert torch.equal(content(drive, context), wanted)
    assert drive.manager.metrics.to_dict()["compressions"] == 4
    allocator.free(taken)


def test_nobody_reads_it_before_its_copy_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = driven("write_back")
    context, _ = compress(drive, tokens(0))
    evict(drive, context)
    req = drive.ask(tokens(0))
    with monkeypatch.context() as patch:
        patch.setattr(drive.engine.tree, "loading_check", lambda finish_count=None: None)
        assert drive.step() == [] and drive.step() == [] and drive.step() == []
        assert tree.place(drive.engine.tree, context) == "device" and not drive.manager.cache.is_resident(context)
    assert drive.step() == [req]


@pytest.mark.parametrize("runs", [False, True])
def test_what_finds_no_room_is_compressed_anew_in_the_end(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "MOST_WAITING_PASSES", 3)
    drive = driven("write_back")
    context, _ = compress(drive, tokens(0))
    other, _ = compress(drive, tokens(100))
    evict(drive, context, other)
    allocator = drive.engine.tree.token_to_kv_pool_allocator
    taken = allocator.alloc(POOL - 10)
    if runs:
        drive.engine.running.append(drive.ask(tokens(300, 3)))
        drive.engine.queue.clear()
    reqs = [drive.ask(tokens(0)), drive.ask(tokens(100), question=8)]
    for _ in range(3 if runs else 0):
        assert drive.step() == [] and drive.manager.cache.is_on_host(context), "it waits as long as something runs"
    assert drive.step() == [] and context.state is ContextState.ABSENT
    admitted = drive.step()
    jobs = [each for each in admitted if isinstance(each, CompressionJob)]
    assert context in [each.context for each in jobs] and context.state is ContextState.ABSENT
    assert not any(each in admitted for each in reqs)
    allocator.free(taken)


def test_a_context_that_is_deleted_while_it_comes_back_is_gone() -> None:
    drive = driven("write_back")
    context, _ = compress(drive, tokens(0))
    evict(drive, context)
    req = drive.ask(tokens(0))
    drive.step()
    drive.manager.cache.delete(context)
    drive.manager.sweep()
    drive.step()
    assert drive.manager.cache.get(context.id) is not context
    drive.engine.queue.clear()
    drive.step()
    assert req.exact_reason in ("deleted", None) and not req.is_virtual
    check_accounts(drive)


@pytest.mark.parametrize("is_own", [True, False])
def test_what_one_rank_cannot_read_is_compressed_anew_on_all(is_own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [True]
    drive = driven("write_back", agree=lambda is_able: is_able and others[0])
    context, _ = compress(drive, tokens(0))
    evict(drive, context)
    drive.ask(tokens(0))
    drive.step()
    if is_own:
        monkeypatch.setattr(tree, "compressed_slots", lambda *args: None)
    others[0] = is_own
    settle(drive)
    drive.manager.stored.advance()
    assert context.state is ContextState.ABSENT
    others[0] = True
    monkeypatch.undo()
    assert [type(each) for each in drive.step()] == [CompressionJob]
    check_accounts(drive)


def test_a_flush_while_it_comes_back_forgets_it() -> None:
    drive = driven("write_back")
    context, _ = compress(drive, tokens(0))
    evict(drive, context)
    drive.ask(tokens(0))
    drive.step()
    drive.engine.queue.clear()
    flush(drive)
    assert context.state is ContextState.ABSENT
    drive.step()
    assert drive.engine.free_slots() == POOL
    req = drive.ask(tokens(0))
    assert [type(each) for each in drive.step()] == [CompressionJob] and req.tier is None


def flush(drive: Driven) -> None:
    """As SGLang does when nothing is in flight."""
    settle(drive)
    drive.engine.tree.reset()
    drive.engine.tree.token_to_kv_pool_allocator.clear()
    drive.manager.after_flush()


@POLICIES
def test_what_host_memory_has_lost_is_absent(policy: str) -> None:
    drive = driven(policy, host_ratio=0.5)
    first, _ = compress(drive, tokens(0))
    evict(drive, first)
    for number in range(1, 7):
        evict(drive, compress(drive, tokens(100 * number))[0])
    assert not drive.manager.cache.has(first) and first.state is ContextState.ABSENT
    assert drive.manager.metrics.to_dict()["evictions"] >= 1


def test_the_nearest_of_what_is_compressed_is_found() -> None:
    """Of one text on two rungs; and the beginning of a longer prompt."""
    drive = driven("write_back")
    half = drive.manager.settings.compression
    smaller = replace(half, compression_ratio=0.75)
    near, _ = compress(drive, tokens(0))
    far, _ = compress(
        drive,
        tokens(0),
        KeptTokens(torch.zeros(40, dtype=torch.int32), torch.arange(5) * 10),
        settings=smaller,
    )
    cache = drive.manager.cache
    absent = Context("0" * 32, near.namespace, replace(half, compression_ratio=0.9), near.tokens, 4)
    evict(drive, near, far)
    assert find_again(cache, absent, [half, smaller]) is near
    assert find_again(cache, far, [half]) is None, "it is in host memory itself"
    assert longest_prefix(cache, SHARED, [half], tokens(0, 50)) is near
    drive.ask(tokens(0), settings=smaller)
    drive.step()
    drive.step()
    assert cache.is_resident(far) and find_again(cache, absent, [half, smaller]) is far


def test_a_beginning_in_host_memory_is_gone_on_from() -> None:
    settings = {"method": "gate", "gates": "smollm2-135m", "budget": "uniform"}
    drive = Driven(900, tree=make_tree(900, LAYERS, HEADS, host="write_back"), **settings)
    drive.ask(tokens(0, 200))
    assert make_all(drive) == [200]
    drive.engine.queue.clear()
    evict(drive)
    req = drive.ask(tokens(0, 500), boundaries=(200,))
    assert drive.step() == [] and req.context is not None and not req.context.is_queued
    job = the_job(drive.step())
    assert job.base is not None and job.base.num_tokens == 200
    assert drive.manager.metrics.to_dict()["host_loads"] == 1
    assert make_all(drive) == [300]


@POLICIES
def test_what_is_dropped_gives_its_slots_back_wherever_its_copies_are(policy: str) -> None:
    """A context, with a question's text behind it that is in host memory alone; and a context that another one replaces."""
    drive = driven(policy)
    context, _ = compress(drive, tokens(0))
    cache, cache_tree = drive.manager.cache, drive.engine.tree
    leave_behind(drive, context, 7)
    drive.tree_evict(1)  # the text behind goes first, and the context stays
    settle(drive)
    assert cache.is_resident(context) and tree.path(cache_tree, context.node)[-1].num_children == 1
    cache.delete(context)
    cache.sweep(set())
    assert drive.engine.free_slots() == POOL
    check_accounts(drive)
    old, _ = compress(drive, tokens(100))
    new, wanted = compress(drive, tokens(200))
    cache.replaced(old, new)
    assert drive.engine.free_slots() == POOL - new.num_slots and torch.equal(content(drive, new), wanted)
    check_accounts(drive)


def leave_behind(drive: Driven, context: Context, question: int) -> None:
    """What a question leaves in the tree after a context."""
    suffix = array("q", [question, question])
    found = drive.engine.tree.match_prefix(MatchPrefixParams(key=tree.context_key(context, suffix)))
    own = drive.engine.tree.token_to_kv_pool_allocator.alloc(context.num_slots + 2 - found.device_prefix_len)
    value = torch.cat([drive.engine.tree.path_device_indices(found.last_device_node), own.to(torch.int64)])
    key, known = tree.context_key(context, suffix), found.device_prefix_len
    drive.engine.tree.insert(InsertParams(key=key, value=value, prev_prefix_len=known))
    drive.manager.cache.remember_suffix(context, suffix)
    settle(drive)


def test_exact_text_that_is_coming_back_is_read_when_it_is_there() -> None:
    """SGLang has queued its copy for a request that it did not admit: nothing has begun, and the tree says that it is in its slots."""
    seen: list[torch.Tensor] = []
    drive = Driven(
        600,
        tree=make_tree(600, LAYERS, HEADS, host="write_back"),
        layers=range(LAYERS),
        compress_layer=lambda job, rows, layer: seen.append(buffers(drive)[layer][rows.slots].clone()),
        method="gate",
        gates="smollm2-135m",
        budget="uniform",
    )
    allocator, cache_tree = drive.engine.tree.token_to_kv_pool_allocator, drive.engine.tree
    own = allocator.alloc(40).to(torch.int64)
    wanted = torch.rand(40, HEADS, 8)
    for buffer in buffers(drive):
        buffer[own] = wanted
    key = tree.radix_key(SHARED, tokens(0))
    cache_tree.insert(InsertParams(key=key, value=own))
    evict(drive)
    found = cache_tree.match_prefix(MatchPrefixParams(key=key))
    assert (found.device_prefix_len, found.host_hit_length) == (0, 40)
    assert cache_tree.load_back(found.best_match_node) and cache_tree.cache_controller.load_queue
    drive.ask(tokens(0))
    drive.step()
    assert len(seen) == LAYERS and all(torch.equal(each, wanted) for each in seen)


@POLICIES
def test_a_leaf_is_evicted_to_host_memory(policy: str) -> None:
    drive = driven(policy)
    context, wanted = compress(drive, tokens(0))
    node = context.node
    lock = drive.engine.tree.lock(node)
    assert not tree.evict_leaf(drive.engine.tree, node)
    drive.engine.tree.unlock(lock)
    assert tree.evict_leaf(drive.engine.tree, node)
    assert drive.manager.cache.is_on_host(context) and drive.engine.free_slots() == POOL
    drive.ask(tokens(0))
    drive.step()
    drive.step()
    assert torch.equal(content(drive, context), wanted)
    check_accounts(drive)


def test_a_leaf_that_host_memory_has_no_room_for_is_dropped() -> None:
    drive = driven("write_back", host_ratio=0.05)
    context, _ = compress(drive, tokens(0))
    assert tree.evict_leaf(drive.engine.tree, context.node)
    assert not drive.manager.cache.has(context) and drive.engine.free_slots() == POOL
    check_accounts(drive)


def test_out_of_date_and_out_of_time() -> None:
    """What was made with other gates is not read again, and a lifetime ends in host memory too."""
    drive = driven("write_back")
    old, _ = compress(drive, tokens(0))
    short, _ = compress(drive, tokens(100), ttl_seconds=10)
    evict(drive, old, short)
    drive.manager.cache.retire(old)
    assert old.state is ContextState.ABSENT
    drive.manager.advance_clock(drive.now + 11)
    assert drive.manager.cache.get(short.id) is None
    check_accounts(drive)


def test_a_question_that_was_decided_before_its_context_went_and_came_reads_no_slots_of_others() -> None:
    drive = driven("write_back")
    context, _ = compress(drive, tokens(0))
    req = drive.ask(tokens(0))
    assert drive.step() == [req] and req.is_virtual
    evict(drive, context)
    # As if the pass that looks at it had been left out.
    host = drive.manager.stored.host
    assert host.awaits(context)
    host.bring([])
    assert drive.matched(context) == context.num_slots, "it has slots again, and nothing in them yet"
    adder, taken = SimpleNamespace(tree_cache=SimpleNamespace(), can_run_list=[]), list[Any]()
    adder.memory_budget = SimpleNamespace(total_offset=0)

    def add_one_req(adder: Any, req: Any) -> AddReqResult:
        taken.append(req)
        return AddReqResult.CONTINUE

    for _ in range(MAX_LOSSES):
        req.init_next_round_input(drive.engine.tree)
        assert not req.is_virtual and not req.decided
        assert around_add_one_req(add_one_req, adder, req) is AddReqResult.CONTINUE and not taken, "it is decided on anew"
        settle(drive)
        assert drive.step() == [req] and req.is_virtual
        req.reads = None
    req.init_next_round_input(drive.engine.tree)
    assert not req.is_virtual and req.exact_reason == "evicted", "in the end it is served exactly"
    assert around_add_one_req(add_one_req, adder, req) is AddReqResult.CONTINUE and taken == [req]


@POLICIES
def test_what_comes_back_undoes_no_decision_of_its_pass(policy: str) -> None:
    """The pool is full. A question about a context in it stands before one about a context in host memory."""
    drive = driven(policy)
    away, _ = compress(drive, tokens(0))
    evict(drive, away)
    near, _ = compress(drive, tokens(100))
    newer, _ = compress(drive, tokens(200))
    taken = drive.engine.tree.token_to_kv_pool_allocator.alloc(POOL - 50)
    cache = drive.manager.cache
    lock = drive.engine.tree.lock(newer.node)
    reqs = [drive.ask(tokens(100)), drive.ask(tokens(0), question=8), drive.ask(tokens(100), question=9)]
    assert drive.step() == [reqs[0], reqs[2]]
    assert cache.is_resident(near) and cache.is_on_host(away)
    assert drive.step() == [reqs[0], reqs[2]]
    for each in (reqs[0], reqs[2]):
        drive.engine.queue.remove(each)
    assert drive.step() == []
    assert drive.step() == [reqs[1]] and reqs[1].tier == "host"
    drive.engine.tree.unlock(lock)
    drive.engine.tree.token_to_kv_pool_allocator.free(taken)


def test_a_pin_is_not_given_up_for_a_request_that_is_decided_on_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = driven("write_back")
    pinned, _ = compress(drive, tokens(0))
    drive.manager.cache.pin(pinned)
    req = drive.ask(tokens(100))

    def pick(running_batch: Any) -> tuple[None, Any]:
        req.decided = False  # its context went
        return None, running_batch

    monkeypatch.setattr(drive.manager, "_decide", lambda: ([req], [req]))
    req.decided = True
    drive.manager.schedule(pick, drive.engine.running_batch_now())
    assert pinned.pinned
    req.decided = True
    drive.manager.schedule(lambda running_batch: (None, running_batch), drive.engine.running_batch_now())
    assert not pinned.pinned


class Copy:
    """Of HiCache's, which waits for its event."""

    def __init__(self) -> None:
        self.waits, self.finish_event = 0, self

    def synchronize(self) -> None:
        self.waits += 1


def test_a_place_is_left_for_what_the_next_batch_brings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiCache has three, and ends the scheduler where it has none. A flush waits for all: the slots are somebody else's afterwards."""
    drive = driven("write_back")
    context, _ = compress(drive, tokens(0))
    evict(drive, context)
    copies = [Copy() for _ in range(3)]
    controller = drive.engine.tree.cache_controller
    monkeypatch.setattr(drive.engine.tree, "check_hicache_events", lambda: None)
    controller.ack_load_queue[:] = copies[:2]
    drive.ask(tokens(0))
    assert drive.step() == [] and not drive.manager.stored.host._coming, "the third one is SGLang's"
    assert [each.waits for each in copies] == [0, 0, 0]
    controller.ack_load_queue[:] = copies
    drive.step()
    assert [each.waits for each in copies] == [1, 0, 0]
    drive.manager.before_flush()
    assert [each.waits for each in copies] == [2, 1, 1]
    controller.ack_load_queue.clear()
    assert drive.step() == [] and drive.manager.stored.host._coming


def test_what_is_too_short_for_hicache_to_bring_back_is_compressed_anew_at_once() -> None:
    drive = driven("write_back")
    eight = KeptTokens(torch.zeros(32, dtype=torch.int32), torch.arange(5) * 8)
    context, _ = compress(drive, tokens(0, 16), eight)
    assert context.num_slots == 8
    evict(drive)
    drive.ask(tokens(0, 16))
    assert [type(each) for each in drive.step()] == [CompressionJob]


def test_passes_that_others_waited_are_not_counted_for_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "MOST_WAITING_PASSES", 3)
    drive = driven("write_back")
    context, _ = compress(drive, tokens(0))
    evict(drive, context)
    taken = drive.engine.tree.token_to_kv_pool_allocator.alloc(POOL - 10)
    drive.engine.running.append(drive.ask(tokens(300, 3)))
    drive.engine.queue.clear()
    for _ in range(3):
        drive.ask(tokens(0))
        drive.step()
        drive.step()
        drive.engine.queue.clear()  # its client has given up
        drive.step()
    assert drive.manager.cache.is_on_host(context)
    drive.engine.tree.token_to_kv_pool_allocator.free(taken)


def test_a_context_that_a_file_is_loaded_of_meanwhile_is_left_to_that() -> None:
    drive = driven("write_back")
    context, _ = compress(drive, tokens(0))
    evict(drive, context)
    drive.ask(tokens(0))
    drive.step()
    context.is_queued = True  # as `Loads` does, and reserves slots in the same pass
    drive.step()
    assert context.tree_lock is None and context.state is ContextState.ON_HOST
    slots_of_it = drive.manager.cache.reserve(context)
    assert slots_of_it is not None and context.state is ContextState.COMPRESSING
    with pytest.raises(AssertionError, match="it has slots"):
        drive.manager.cache.reserve(context)
    drive.manager.cache.withdraw(context)
    context.is_queued = False
    drive.evict_all()
    check_accounts(drive)
    assert drive.engine.free_slots() == POOL


def test_storage_is_refused_while_the_server_runs() -> None:
    scheduler, asked = SimpleNamespace(), object()
    assert around_attach_hicache_storage(lambda scheduler, recv_req: recv_req, scheduler, asked) is asked
    wiring = Wiring(plan=None)  # type: ignore[arg-type]
    wiring.manager = driven("write_back").manager
    wiring.hang_on(scheduler)
    answer = around_attach_hicache_storage(lambda scheduler, recv_req: recv_req, scheduler, asked)
    assert not answer.success and "--obcache-folder" in answer.message


@POLICIES
def test_routers_see_nothing_virtual_of_it(policy: str) -> None:
    drive = driven(policy, host_ratio=0.5)
    events, shown = VisibleEvents(), []
    cache = drive.manager.cache
    context, _ = compress(drive, tokens(0))
    leave_behind(drive, context, 7)
    shown += events.of(drive.engine.tree.take_events(), cache)
    drive.tree_evict(POOL)
    settle(drive)
    shown += events.of(drive.engine.tree.take_events(), cache)
    drive.ask(tokens(0))
    drive.step()
    drive.step()
    drive.engine.queue.clear()
    leave_behind(drive, context, 8)
    shown += events.of(drive.engine.tree.take_events(), cache)
    for number in range(1, 8):
        evict(drive, compress(drive, tokens(100 * number))[0])
        shown += events.of(drive.engine.tree.take_events(), cache)
    known: set[int] = set()
    for event in shown:
        if isinstance(event, BlockStored):
            assert max(event.token_ids) < FIRST_VIRTUAL_ID and 7 not in event.token_ids[:2]
            known |= set(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            assert set(event.block_hashes) <= known
    assert any(isinstance(event, BlockStored) and list(event.token_ids) == list(tokens(0)) for event in shown)


def test_exact_text_that_leaves_host_memory_is_shown_to_have_left_it() -> None:
    """Also where a compressed context, in the pool, stands for the same text."""
    drive, events = driven("write_back"), VisibleEvents()
    context, _ = compress(drive, tokens(0))
    shown = events.of(drive.engine.tree.take_events(), drive.manager.cache)
    blocks = [block for event in shown if isinstance(event, BlockStored) for block in event.block_hashes]
    assert context.state is ContextState.RESIDENT and len(blocks) == 40
    gone = [BlockRemoved(block_hashes=blocks, medium=medium) for medium in (StorageMedium.GPU, StorageMedium.CPU)]
    assert events.of(gone) == gone[1:]


@POLICIES
@pytest.mark.parametrize("seed", range(4))
def test_a_random_walk_mixes_nothing_up(policy: str, seed: int) -> None:
    """Contexts come, are asked about, evicted, deleted, replaced and flushed, in a host pool for few: what is read is what was written."""
    chosen = random.Random(seed)
    drive = driven(policy, host_ratio=chosen.choice([0.4, 1.0, 3.0]))
    cache, known = drive.manager.cache, dict[str, tuple[Context, torch.Tensor]]()
    tiers: list[str | None] = []
    for _ in range(150):
        ids = tokens(100 * chosen.randrange(9))
        match chosen.choice(["ask"] * 6 + ["evict"] * 3 + ["suffix"] * 3 + ["delete", "drop", "leaf", "flush"]):
            case "ask":
                req = drive.ask(ids)
                admitted = drive.step()
                for _ in range(6):
                    if admitted:
                        break
                    admitted = drive.step()
                (first, *_) = admitted
                drive.engine.queue.clear()
                if isinstance(first, CompressionJob):
                    drive.manager.jobs.end(first, completed=False)
                    context, wanted = compress(drive, ids)
                    known[context.id] = context, wanted
                else:
                    assert req.context is not None and req.is_virtual
                    tiers.append(req.tier)
                    assert torch.equal(content(drive, req.context), known[req.context.id][1])
            case "evict":
                drive.tree_evict(chosen.randrange(60))
            case "suffix":
                resident = [context for context, _ in known.values() if cache.is_resident(context)]
                if resident and drive.engine.free_slots() > 5:
                    leave_behind(drive, chosen.choice(resident), chosen.randrange(1000, 1020))
            case "delete":
                for context, _ in list(known.values())[:1]:
                    cache.delete(context)
                    cache.sweep(set())
                    del known[context.id]
            case "drop":
                for context, _ in known.values():
                    if cache.is_resident(context):
                        cache.drop_suffixes(context)
            case "leaf":
                for path in tree.next_victims(drive.engine.tree, 2):
                    tree.evict_leaf(drive.engine.tree, path[-1].node_id)
            case "flush":
                if chosen.random() < 0.2:
                    flush(drive)
        settle(drive)
        check_accounts(drive)
        for context, wanted in known.values():
            if cache.holds(context):
                assert torch.equal(content(drive, context), wanted)
    assert tiers.count("host") > 3
