"""Contexts that are compressed from their cached KV: what the manager does between two batches, on SGLang's own radix tree."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from obcache_sglang.kv.context import ContextState, Namespace
from obcache_sglang.scheduler import control_calls, tree
from obcache_sglang.scheduler.forward import _context_before
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from tests.unit.engine import KEPT, Driven
from tests.unit.test_manager import report

CONTEXT = array("q", range(100, 140))
LAYERS = ("first", "second", "third")


class Layers:
    """Stands for `ForwardPlan.compress_layer`: what it is asked, and what it does."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fails_at = ""

    def __call__(self, job: Any, rows: Any, layer: str) -> None:
        read = len(job.context.tokens) if job.base is None else job.base.num_slots
        assert rows.last and rows.num_rows == 0 and len(rows.slots) == read
        self.done.append(layer)
        if layer == self.fails_at:
            job.error = "unsupported_attention"
        if layer == LAYERS[-1] and job.error is None:
            job.compression.kept = KEPT


def driven(agree: Any = bool, size: int = 200, **settings: Any) -> tuple[Driven, Layers]:
    """A manager whose model has three layers, and method gate."""
    layers = Layers()
    settings = {"method": "gate", "gates": "smollm2-135m", **settings}
    return Driven(size, agree=agree, layers=LAYERS, compress_layer=layers, **settings), layers


def cache_exactly(driven: Driven, tokens: array[int] = CONTEXT) -> None:
    slots = driven.engine.tree.token_to_kv_pool_allocator.alloc(len(tokens))
    driven.engine.tree.insert(InsertParams(key=RadixKey(tokens, None), value=slots))


def busy(driven: Driven) -> None:
    """Some request decodes."""
    driven.engine.running = [object()]  # type: ignore[list-item]


def one_step_done(monkeypatch: pytest.MonkeyPatch) -> tuple[Driven, ContextReq]:
    """A question waits for a context, of which the first layer is compressed."""
    monkeypatch.setattr("obcache_sglang.scheduler.in_place.STEP_TOKENS", len(CONTEXT))
    drive, _ = driven()
    cache_exactly(drive)
    busy(drive)
    req = drive.ask(CONTEXT)
    drive.step()
    return drive, req


def test_a_cached_context_is_compressed_in_the_pass_that_wants_it() -> None:
    drive, layers = driven()
    cache_exactly(drive)
    req = drive.ask(CONTEXT)
    assert drive.step() == [req]
    assert layers.done == list(LAYERS)
    assert req.is_virtual
    assert report(req)["status"] == "compressed"
    assert drive.manager.metrics.to_dict()["in_place"] == drive.manager.metrics.to_dict()["compressions"] == 1
    # The exact tokens stay cached, and can be evicted; so can the context.
    assert drive.accounts() == (200 - 40 - 20, 60, 0)


def test_its_progress_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drive, req = one_step_done(monkeypatch)
    call = {"op": "progress", "rid": req.rid}
    assert control_calls.answer(drive.manager, call) == {"ok": True, "tokens": len(CONTEXT) // 3, "of": len(CONTEXT)}
    drive.step()
    assert control_calls.answer(drive.manager, call)["tokens"] == 2 * len(CONTEXT) // 3


def test_what_is_not_all_cached_is_prefilled() -> None:
    drive, layers = driven()
    cache_exactly(drive, CONTEXT[:-1])
    req = drive.ask(CONTEXT)
    (job,) = drive.step()
    assert isinstance(job, CompressionJob)
    assert not layers.done
    assert not req.decided


def test_methods_that_need_queries_are_prefilled() -> None:
    drive, layers = driven(method="tova")
    cache_exactly(drive)
    drive.ask(CONTEXT)
    (job,) = drive.step()
    assert isinstance(job, CompressionJob)
    assert not layers.done


def test_while_requests_run_it_goes_on_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.in_place.STEP_TOKENS", len(CONTEXT))
    drive, layers = driven()
    cache_exactly(drive)
    busy(drive)
    first, second = drive.ask(CONTEXT), drive.ask(CONTEXT, question=8)
    for done in (1, 2):
        assert drive.step() == []
        assert layers.done == list(LAYERS[:done])
        # Nobody may evict what is read, nor what is written.
        drive.evict_all()
        assert drive.accounts()[2] == 60
    assert drive.step() == [first, second]
    assert layers.done == list(LAYERS)
    assert [report(each)["status"] for each in (first, second)] == ["compressed", "reused"]


def test_steps_on_a_gpu_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.in_place.GPU_STEP_TOKENS", 2 * len(CONTEXT))
    drive, layers = driven()
    monkeypatch.setattr(drive.engine, "on_cpu", False)
    monkeypatch.setattr(drive.engine, "wait_for_forwards", lambda: None)
    cache_exactly(drive)
    busy(drive)
    drive.ask(CONTEXT)
    drive.step()
    assert layers.done == list(LAYERS[:2])


def test_one_that_fails_gives_all_back_and_is_served_exactly() -> None:
    drive, layers = driven()
    layers.fails_at = "second"
    cache_exactly(drive)
    req = drive.ask(CONTEXT)
    assert drive.step() == [req]
    assert (report(req)["status"], report(req)["reason"]) == ("exact", "unsupported_attention")
    assert drive.accounts() == (160, 40, 0)


def test_a_defect_gives_all_back_and_is_served_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    drive, _ = driven()
    cache_exactly(drive)

    def defect(*args: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Layers, "__call__", defect)
    req = drive.ask(CONTEXT)
    assert drive.step() == [req]
    assert (report(req)["status"], report(req)["reason"]) == ("exact", "error")
    assert drive.accounts() == (160, 40, 0)
    assert not drive.manager.in_place.is_busy


def test_ranks_that_do_not_agree_give_all_back() -> None:
    votes = iter((False, True, False))
    drive, layers = driven(agree=lambda verdict: next(votes))
    cache_exactly(drive)
    drive.ask(CONTEXT)
    # About its slots: then it is prefilled, which may find room.
    (job,) = drive.step()
    assert isinstance(job, CompressionJob)
    assert not layers.done
    assert drive.accounts() == (160, 40, 0)
    # About its content.
    other, layers = driven(agree=lambda verdict: next(votes))
    cache_exactly(other)
    req = other.ask(CONTEXT)
    assert other.step() == [req]
    assert report(req)["status"] == "exact"
    assert other.accounts() == (160, 40, 0)


def test_running_requests_keep_the_room_that_was_promised_to_them() -> None:
    drive, layers = driven(size=64)
    cache_exactly(drive)
    busy(drive)
    drive.ask(CONTEXT)
    # 64 slots less 40 that are read and 20 that are kept: 4 are left, under a tenth of the pool.
    (job,) = drive.step()
    assert isinstance(job, CompressionJob)
    assert not layers.done
    assert drive.accounts() == (24, 40, 0)
    # Nothing runs: nobody needs them.
    alone, layers = driven(size=64)
    cache_exactly(alone)
    req = alone.ask(CONTEXT)
    assert alone.step() == [req]
    assert layers.done == list(LAYERS)


def chunked(drive: Driven, num_read: int, num_left: int) -> None:
    """A prompt that nobody shares is between two chunks of its prefill."""
    drive.engine.is_read_in_chunks(
        drive.ask(array("q", range(2000, 2000 + num_read + num_left - 1)), exact="no_context"), num_read
    )
    assert drive.engine.chunk_rest == num_left


@pytest.mark.parametrize(("left", "status"), [(100, "compressed"), (120, "waits")])
def test_what_a_prefill_has_still_to_read_is_not_taken(left: int, status: str) -> None:
    """SGLang has admitted it, reads on whatever is free, and ends the process where it finds no slot."""
    drive, _ = driven()
    cache_exactly(drive)  # 40 of 200, which would become 20
    chunked(drive, 10, left)
    assert drive.engine.free_slots() == 150
    context = drive.manager.cache.obtain(Namespace(None, None, None), drive.manager.settings.compression, CONTEXT)
    assert context is not None
    drive.manager.in_place.start(context)
    assert drive.manager.in_place.is_busy == (status == "compressed")


def test_what_holds_slots_gives_way_to_a_prefill_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """First a compression from cached KV, then pins; and nothing, where it has its room."""
    drive, _ = one_step_done(monkeypatch)
    assert drive.manager.in_place.is_busy
    drive.engine.running = []
    pinned = drive.manager.cache.obtain(
        Namespace(None, None, None), drive.manager.settings.compression, array("q", range(500, 540))
    )
    assert pinned is not None and drive.manager.cache.reserve(pinned) is not None
    drive.manager.cache.publish(pinned, KEPT)
    drive.manager.room.pin(pinned)
    free = drive.engine.free_slots()
    chunked(drive, 10, free - 10)
    drive.manager.room.keep_for_chunk(drive.manager.stored.yields, drive.manager.in_place.gives_way)
    assert drive.manager.in_place.is_busy and pinned.pinned
    for more, busy_then, pinned_then in ((15, False, True), (70, False, False)):
        drive.engine.chunked_req.kv.kv_committed_len -= more
        drive.manager.room.keep_for_chunk(drive.manager.stored.yields, drive.manager.in_place.gives_way)
        assert (drive.manager.in_place.is_busy, pinned.pinned) == (busy_then, pinned_then)


def test_a_metric_that_fails_changes_no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the ranks of a group whose metrics work would read what this one does not."""
    drive, _ = driven()
    cache_exactly(drive)

    def defect(*args: Any) -> None:
        raise RuntimeError("a defect")

    for name in ("compressed_in_place", "compressed", "set_gauges"):
        monkeypatch.setattr(drive.manager.metrics, name, defect)
    req = drive.ask(CONTEXT)
    assert drive.step() == [req]
    assert req.is_virtual and req.context is not None and req.context.state is ContextState.RESIDENT
    assert drive.accounts() == (200 - 40 - 20, 60, 0)


def test_ranks_that_do_not_agree_about_slots_have_evicted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank evicts for a context and has its slots; on the other one a defect comes before that."""
    left = []
    for fails in (False, True):
        drive, _ = driven(size=100, agree=lambda verdict: False)
        cache_exactly(drive)
        cache_exactly(drive, array("q", range(500, 550)))
        if fails:

            def defect(context: Any) -> None:
                raise RuntimeError("a defect")

            monkeypatch.setattr(drive.manager.cache, "reserve", defect)
        drive.ask(CONTEXT)
        drive.step()
        left.append(drive.accounts())
    assert left[0] == left[1]
    assert left[0][1] < 90  # the first has evicted


def test_a_flush_in_between_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drive, req = one_step_done(monkeypatch)
    assert drive.manager.in_place.is_busy
    context = req.context
    assert context is not None
    drive.engine.queue.remove(req)
    drive.engine.running = []
    drive.engine.tree.reset()
    drive.engine.tree.token_to_kv_pool_allocator.clear()
    drive.manager.after_flush()
    assert context.state is ContextState.ABSENT
    assert not context.is_queued
    cache_exactly(drive)
    again = drive.ask(CONTEXT)
    assert drive.step() == [again]
    assert isinstance(again, ContextReq) and again.is_virtual


def test_a_context_of_an_unloaded_adapter_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    drive, req = one_step_done(monkeypatch)
    assert drive.manager.in_place.is_busy and req.context is not None
    object.__setattr__(req.context.namespace, "lora_id", "an adapter")
    drive.manager.forget_adapter("another adapter")
    assert drive.manager.in_place.is_busy
    drive.engine.queue.remove(req)
    drive.manager.forget_adapter("an adapter")
    assert not drive.manager.in_place.is_busy
    assert drive.accounts() == (160, 40, 0)


def test_idle_engines_compress_what_was_served_exactly_from_its_cache() -> None:
    drive, layers = driven(when="idle")
    cache_exactly(drive)
    req = drive.ask(CONTEXT, num_tokens=3)
    assert drive.step() == [req]
    assert report(req)["reason"] == "deferred"
    assert not layers.done
    drive.engine.queue.remove(req)
    assert drive.step() == []  # and SGLang sleeps until somebody asks
    assert layers.done == list(LAYERS)
    again = drive.ask(CONTEXT, num_tokens=3)
    assert drive.step() == [again]
    assert report(again)["status"] == "reused"


@pytest.mark.parametrize(
    ("size", "others", "runs"), [(50, 0, True), (60, 0, True), (70, 0, True), (122, 2, False), (200, 0, False)]
)
def test_a_rank_that_cannot_read_its_slots_votes_and_evicts_as_the_others_do(
    monkeypatch: pytest.MonkeyPatch, size: int, others: int, runs: bool
) -> None:
    """The others, which can, hear that one of them cannot."""
    texts = [CONTEXT, *(array("q", range(1000 * number, 1000 * number + 40)) for number in range(1, others + 1))]

    def rank(fails: bool) -> tuple[list[bool], list[int], Any]:
        votes: list[bool] = []

        def agree(mine: bool) -> bool:
            votes.append(mine)
            return False

        drive, _ = driven(agree=agree, size=size)
        for text in texts:
            cache_exactly(drive, text)
        if runs:
            busy(drive)
        with monkeypatch.context() as patched:
            if fails:
                patched.setattr("obcache_sglang.scheduler.tree.exact_slots", lambda *_: 1 / 0)
            drive.ask(CONTEXT)
            drive.step()
        cached = [tree.match(drive.engine.tree, RadixKey(text, None))[0] for text in texts]
        return votes, cached, drive.accounts()

    (votes, *left), (failing_votes, *failing_left) = rank(False), rank(True)
    assert len(votes) == len(failing_votes) and left == failing_left
    assert not any(failing_votes)


@pytest.mark.parametrize("how", ["the ladder", "calibration"])
def test_a_reader_keeps_what_it_reads(how: str) -> None:
    """It holds the slots, and what lies where must not change under it: not when they are given up, nor when the context is made anew elsewhere."""
    drive, _ = driven()
    cache_exactly(drive)
    req = drive.ask(CONTEXT)
    assert drive.step() == [req] and req.is_virtual
    context, read = req.context, _context_before(req)
    assert context is not None and read is not None and read.kept is context.kept
    if how == "the ladder":
        drive.manager.cache.replaced(context, replace(context))
    else:
        drive.manager.cache.retire(context)
    assert context.kept is None
    assert _context_before(req) is read and (read.num_slots, read.position_offset) == (20, 20) and read.is_uneven
    context.kept = replace(read.kept, offsets=read.kept.offsets + 1)
    assert _context_before(req) is read and read.kept is not context.kept
