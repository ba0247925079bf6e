"""Contexts that were compressed for want of room, and are read exactly again when nobody waits. On SGLang's own radix tree."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.radix_cache import RadixKey

from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from tests.unit.engine import Driven, sleeps
from tests.unit.test_in_place import CONTEXT, busy, cache_exactly
from tests.unit.test_manager import report
from tests.unit.test_pressure import OTHER, THIRD, answered, cached, compressions, press, state, three_answered

LATER = array("q", range(2000, 2080))


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pressure is over with the next pass."""
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.PRESSED_PASSES", 0)


def pressed(**settings: Any) -> Driven:
    """Two of three contexts were compressed, then the long prompt that needed the room went."""
    drive = three_answered(**settings)
    press(drive)
    assert state(drive, CONTEXT, OTHER, THIRD) == ["compressed", "compressed", "exact"]
    return drive


def asked(drive: Driven, context: array[int], status: str = "reused", **plan: Any) -> ContextReq:
    """A question is answered."""
    req = drive.ask(context, num_tokens=2, **plan)
    assert req in drive.step() and report(req)["status"] == status
    drive.engine.take(req)
    drive.engine.give_back(req)
    return req


def reading(drive: Driven) -> CompressionJob:
    """What an idle pass begins."""
    (job,) = drive.step()
    assert isinstance(job, CompressionJob) and job.unattended
    return job


def read(drive: Driven, job: CompressionJob) -> None:
    drive.engine.take(job)
    drive.end(job)
    assert drive.step() == []


def restored(drive: Driven) -> int:
    return drive.manager.metrics.to_dict()["restored"]


def test_what_is_asked_about_again_is_exact_again() -> None:
    drive = pressed()
    assert drive.step() == [] and sleeps(drive), "nobody has asked since"
    asked(drive, CONTEXT)
    assert not sleeps(drive)
    job = reading(drive)
    assert list(job.origin_input_ids) == list(CONTEXT) and not job.is_final
    asked(drive, CONTEXT)  # meanwhile it is served from what is left
    read(drive, job)
    assert state(drive, CONTEXT, OTHER) == ["exact", "compressed"] and restored(drive) == 1 and sleeps(drive)
    assert drive.manager.cache.get(report(asked(drive, CONTEXT, "exact"))["context_id"] or "") is None
    # And is compressed from its cache when the room is needed, before it goes.
    before = compressions(drive)
    press(drive, array("q", range(1000, 1130)))
    assert state(drive, CONTEXT) == ["compressed"] and compressions(drive) > before


def test_what_it_begins_with_is_read_with_it() -> None:
    """Where that stays exact, too."""
    drive = three_answered()
    begun = replace(drive.manager.settings.compression, exact_tokens=10)
    context = array("q", range(900, 940))
    answered(drive, context, settings=begun)
    for first in (1000, 1200):
        press(drive, array("q", range(first, first + 150)))
    asked(drive, context, settings=begun)
    job = reading(drive)
    assert list(job.origin_input_ids) == list(context)
    read(drive, job)
    assert state(drive, context) == ["exact"]


def test_while_somebody_waits_nothing_is_read() -> None:
    drive = pressed()
    asked(drive, CONTEXT)
    busy(drive)
    assert drive.step() == [] == drive.manager.jobs.all()
    drive.engine.running = []
    reading(drive)


def test_under_pressure_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.PRESSED_PASSES", 5)
    drive = pressed()
    asked(drive, CONTEXT)
    passes = 0
    while not drive.step():
        passes += 1
    assert passes == 4


def test_what_somebody_wanted_compressed_stays_so() -> None:
    drive = pressed()
    for context in (CONTEXT, array("q", range(900, 940))):
        cache_exactly(drive, context)
        made = drive.ask(context, action="compress")
        drive.step()
        assert report(made)["status"] in ("compressed", "reused")
        tree.drop_branch(drive.engine.tree, tree.match(drive.engine.tree, RadixKey(context, None))[1])
        asked(drive, context)
        assert drive.step() == []


@pytest.mark.parametrize("parts", [1, 2])
def test_text_that_was_used_last_before_it_makes_room(parts: int) -> None:
    """parts: nodes of the tree, as a prompt and its answer are two."""
    drive = pressed()
    cache_exactly(drive, LATER[: len(LATER) // parts])
    if parts > 1:
        req = drive.ask(LATER[:-1], question=LATER[-1], exact="below_min_tokens")
        drive.engine.take(req)
        drive.engine.give_back(req, caches=True)
        drive.engine.queue.clear()
    asked(drive, CONTEXT)
    taken = drive.engine.tree.token_to_kv_pool_allocator.alloc(drive.engine.free_slots())
    read(drive, reading(drive))
    assert cached(drive, LATER) == 0 and state(drive, CONTEXT, OTHER, THIRD) == ["exact", "compressed", "exact"]
    drive.engine.tree.token_to_kv_pool_allocator.free(taken)


def test_text_that_was_used_after_it_does_not() -> None:
    drive = pressed()
    asked(drive, CONTEXT)
    cache_exactly(drive, LATER)
    drive.engine.tree.token_to_kv_pool_allocator.alloc(drive.engine.free_slots())
    assert drive.step() == [] and sleeps(drive)
    assert cached(drive, LATER) == len(LATER) and state(drive, CONTEXT, OTHER, THIRD) == ["compressed", "compressed", "exact"]


def test_a_rank_that_cannot_plan_says_so_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    drive, votes = pressed(), []
    asked(drive, CONTEXT)
    monkeypatch.setattr(drive.manager.jobs, "agree", lambda mine: votes.append(mine) or mine)
    monkeypatch.setattr(drive.manager.under_pressure, "text_before", lambda *args: 1 / 0)
    assert drive.step() == [] and votes == [False] and state(drive, CONTEXT) == ["compressed"]


def test_where_that_is_not_enough_nothing_goes() -> None:
    drive = pressed()
    cache_exactly(drive, LATER[:30])
    asked(drive, CONTEXT)
    drive.engine.tree.token_to_kv_pool_allocator.alloc(drive.engine.free_slots())
    assert drive.step() == [] and cached(drive, LATER) == 30


def test_who_had_it_compressed_is_not_another_use() -> None:
    """The pool has lost it, and had no room for it."""
    drive = three_answered()
    lost = array("q", range(900, 940))
    taken = drive.engine.tree.token_to_kv_pool_allocator.alloc(drive.engine.free_slots() - 30)
    req = drive.ask(lost, num_tokens=2)
    (job,) = (each for each in drive.step() if isinstance(each, CompressionJob))
    drive.engine.tree.token_to_kv_pool_allocator.free(taken)
    drive.forward(job)
    drive.end(job)
    assert drive.step() == [req] and report(req)["status"] == "compressed"
    drive.engine.queue.remove(req)
    assert drive.step() == [] == drive.manager.jobs.all()
    asked(drive, lost)
    read(drive, reading(drive))
    assert state(drive, lost) == ["exact"]


def test_the_ladder_begins_anew() -> None:
    drive = pressed(ladder=(0.75,))
    for first in (1000, 1200):
        press(drive, array("q", range(first, first + 160)))
    assert report(asked(drive, CONTEXT))["compression_ratio"] == 0.75
    read(drive, reading(drive))
    assert state(drive, CONTEXT) == ["exact"]
    press(drive, array("q", range(1400, 1540)))
    assert report(asked(drive, CONTEXT))["compression_ratio"] == 0.5


@pytest.mark.parametrize("how", ["aborted", "flushed", "evicted"])
def test_a_reading_that_comes_to_nothing_changes_nothing(how: str) -> None:
    drive = pressed()
    asked(drive, CONTEXT)
    job = reading(drive)
    drive.engine.take(job)
    if how == "flushed":
        drive.end(job, FINISH_ABORT())
        drive.evict_all()
        drive.engine.tree.reset()
        drive.manager.after_flush()
        assert drive.step() == [] and sleeps(drive) and state(drive, CONTEXT) == ["gone"]
        return
    drive.end(job, FINISH_ABORT() if how == "aborted" else None)
    if how == "evicted":
        tree.drop_branch(drive.engine.tree, tree.match(drive.engine.tree, RadixKey(CONTEXT, None))[1])
    assert drive.step() == [] and restored(drive) == 0 and state(drive, CONTEXT) == ["compressed"]
    asked(drive, CONTEXT)
    read(drive, reading(drive))
    assert state(drive, CONTEXT) == ["exact"]


@pytest.mark.parametrize("where", ["queue", "chunk"])
def test_what_nobody_waits_for_ends_with_its_adapter(where: str) -> None:
    """SGLang unloads one when none of its requests is left, and a prefill with it would end the scheduler."""
    drive = pressed()
    asked(drive, CONTEXT)
    job = reading(drive)
    job.lora_id = "an adapter"
    drive.manager.forget_adapter("another adapter")
    assert drive.manager.jobs.all() == [job]
    scheduler = drive.engine._scheduler
    scheduler.last_batch = others = object()
    if where == "chunk":
        drive.engine.is_read_in_chunks(job, 10)
    drive.manager.forget_adapter("an adapter")
    assert scheduler.last_batch is others, "requests of others were in it, too, and run on"
    if where == "chunk":  # SGLang ends it before it picks another batch
        assert scheduler._pending_chunked_abort_req is job
        scheduler.chunked_req = None
        drive.end(job, FINISH_ABORT())
    assert drive.manager.jobs.all() == [] and job not in drive.engine.queue and drive.engine.chunked_req is None
    assert drive.step() == []
