"""The manager, driven through its EngineView: arrival, hold, compression, eviction, retraction, abort, flush, pins."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.runtime_context import get_parallel

from obcache_sglang.compress.replay import ReplayPass
from obcache_sglang.kv.context import ContextState
from obcache_sglang.scheduler import control_calls, idle
from obcache_sglang.scheduler.hooks import around_add_one_req
from obcache_sglang.scheduler.jobs import Jobs
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from obcache_sglang.scheduler.room import Room
from obcache_sglang.scheduler.starvation import MAX_STARVED_PASSES
from obcache_sglang.scheduler.wiring import Wiring
from tests.unit.engine import KEPT, Driven, sleeps

DOCUMENT = array("q", range(100, 140))
ABORTED = FINISH_ABORT("its client left")


def report(req: ContextReq) -> dict[str, Any]:
    assert req.customized_info is not None
    (only,) = req.customized_info["obcache"]
    return only


def test_a_question_waits_for_its_compression_and_is_served_from_it() -> None:
    driven = Driven()
    req = driven.ask(DOCUMENT)
    (job,) = driven.step()
    assert isinstance(job, CompressionJob) and driven.engine.queue == [job, req]  # the question is held, in its place
    assert driven.step() == [job]  # and starts nothing again
    driven.forward(job)
    assert driven.accounts() == (200 - 40 - 20, 0, 20)  # the exact KV, and the context's own, locked
    driven.end(job)
    assert driven.accounts() == (180, 20, 0)
    assert driven.step() == [req]
    assert (report(req)["status"], req.is_virtual, req.position_offset) == ("compressed", True, 20)
    later = driven.ask(DOCUMENT, question=8)
    assert driven.step() == [req, later] and report(later)["status"] == "reused"


def test_questions_on_one_context_share_one_job() -> None:
    driven = Driven()
    reqs = [driven.ask(DOCUMENT, question) for question in range(3)]
    jobs = driven.step()
    assert len(jobs) == 1 and driven.engine.queue == [*jobs, *reqs]


def test_a_context_that_is_evicted_before_its_reader_runs_is_made_again_and_then_served_exactly() -> None:
    driven = Driven()
    req = driven.ask(DOCUMENT)
    for _ in range(2):
        (job,) = [each for each in driven.step() if isinstance(each, CompressionJob)]
        driven.forward(job)
        driven.end(job)
        driven.evict_all()
    assert driven.step() == [req]
    assert (report(req)["status"], report(req)["reason"], req.is_virtual) == ("exact", "evicted", False)


def test_a_retracted_job_starts_over_and_leaves_nothing() -> None:
    driven = Driven()
    driven.ask(DOCUMENT)
    (job,) = driven.step()
    driven.forward(job)
    driven.manager.before_release(job, checkpoint=False)  # retracted: not finished
    driven.engine.give_back(job)
    assert driven.accounts() == (200, 0, 0)
    driven.engine.queue.insert(0, job)
    assert driven.step() == [job]
    driven.forward(job)
    driven.end(job)
    assert job.context.state is ContextState.RESIDENT


def test_a_retracted_question_is_decided_again() -> None:
    driven = Driven()
    context = driven.compress(DOCUMENT)
    req = driven.ask(DOCUMENT, 8)
    driven.step()
    driven.engine.take(req)
    assert req.prefix_len == 20  # the context's slots, found in the tree
    driven.manager.before_release(req, checkpoint=True)
    driven.engine.give_back(req)
    driven.evict_all()
    driven.engine.queue.append(req)
    (job,) = driven.step()
    assert isinstance(job, CompressionJob) and job.context is context and not req.is_virtual


@pytest.mark.parametrize("running", [False, True])
def test_an_abort_ends_a_compression_that_nobody_waits_for(running: bool) -> None:
    driven = Driven()
    req = driven.ask(DOCUMENT)
    (job,) = driven.step()
    driven.engine.queue.remove(req)  # SGLang took it out
    if running:
        driven.forward(job)
        driven.manager.jobs.end_unawaited()
        driven.end(job, ABORTED)
    else:
        driven.manager.jobs.end_unawaited()
    assert driven.engine.queue == [] and driven.accounts() == (200, 0, 0)
    assert job.context.state is ContextState.ABSENT and not job.context.is_queued


def test_a_failed_compression_lets_its_questions_be_served_exactly() -> None:
    driven = Driven()
    req = driven.ask(DOCUMENT)
    (job,) = driven.step()
    driven.forward(job)
    job.error = "error"
    driven.end(job)
    assert driven.step() == [req] and report(req)["reason"] == "error"
    assert driven.accounts() == (200, 0, 0)


def test_ranks_that_do_not_agree_serve_exactly() -> None:
    votes = iter([True, False])
    driven = Driven(agree=lambda mine: next(votes))  # for the slots, and for what was scored
    req = driven.ask(DOCUMENT)
    (job,) = driven.step()
    driven.forward(job)
    driven.end(job)
    assert driven.step() == [req] and report(req)["status"] == "exact"
    assert driven.accounts() == (200, 0, 0)


def test_a_flush_forgets_what_was_resident() -> None:
    driven = Driven()
    context = driven.compress(DOCUMENT)
    driven.engine.tree.reset()
    driven.engine.tree.token_to_kv_pool_allocator.clear()
    driven.manager.after_flush()
    assert context.state is ContextState.ABSENT
    driven.ask(DOCUMENT)
    (job,) = driven.step()
    assert isinstance(job, CompressionJob) and job.context is context


def test_a_context_that_could_not_be_taken_back_is_when_anybody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect must not lock slots for good: what it left is tried again with the next request or control call."""
    driven = Driven()
    driven.ask(DOCUMENT)
    (job,) = driven.step()
    driven.forward(job)
    job.error = "error"
    with monkeypatch.context() as patched:
        patched.setattr(driven.manager.cache, "withdraw", lambda context: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            driven.end(job)
        driven.engine.give_back(job)
    assert driven.accounts() == (180, 0, 20)
    control_calls.answer(driven.manager, {"op": "status"})
    assert driven.accounts() == (200, 0, 0) and job.context.state is ContextState.ABSENT


def test_a_compression_waits_where_its_exact_kv_would_evict_compressed_contexts() -> None:
    driven = Driven(size=160)
    for first in range(3):
        driven.compress(array("q", range(1000 * first, 1000 * first + 60)))
    reqs = [driven.ask(array("q", range(1000 * first, 1000 * first + 60))) for first in (7, 8)]
    jobs = driven.step()
    assert [job.context for job in jobs] == [reqs[0].context]  # the second would need the first one's exact KV
    assert driven.engine.queue == [*jobs, *reqs]


@pytest.mark.parametrize(("free", "admitted"), [(55, False), (61, False), (62, True)])
def test_a_compression_is_admitted_when_its_kept_tokens_fit_too(free: int, admitted: bool) -> None:
    """By SGLang's own count, its 40 tokens and a page are enough."""
    driven = Driven(size=100)
    tree = driven.engine.tree
    Wiring.hang_on(cast(Any, SimpleNamespace(manager=driven.manager)), tree)
    driven.ask(DOCUMENT)
    (job,) = driven.step()
    tree.token_to_kv_pool_allocator.alloc(100 - free)
    job.init_next_round_input(tree)
    adder = PrefillAdder(1, tree, tree.token_to_kv_pool_allocator, None, 1.0, 1000, None)
    around_add_one_req(PrefillAdder.add_one_req, adder, job, has_chunked_req=False, truncation_align_size=None)
    assert (adder.can_run_list == [job]) == admitted
    assert adder.memory_budget.total_offset == (40 + 1 + 20 if admitted else 0)


def test_contexts_that_wait_for_an_idle_engine_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "MAX_DEFERRED", 2)
    driven = Driven(size=400, when="idle")
    reqs = [driven.ask(array("q", range(1000 * first, 1000 * first + 40)), num_tokens=2) for first in range(3)]
    assert driven.step() == reqs and {report(req)["reason"] for req in reqs} == {"deferred"}
    driven.engine.queue = []
    made = []
    while jobs := driven.step():
        (job,) = jobs
        made.append(job.context)
        driven.forward(job)
        driven.end(job)
    assert made == [req.context for req in reqs[1:]]  # the first to come was given up


def test_a_scheduler_stays_awake_while_contexts_wait_for_it_to_be_idle() -> None:
    driven = Driven(size=400, when="idle")
    assert sleeps(driven)
    driven.ask(DOCUMENT, num_tokens=2)
    driven.step()
    driven.engine.queue = []
    assert not sleeps(driven), "the next pass compresses it"
    (job,) = driven.step()
    driven.forward(job)
    driven.end(job)
    assert sleeps(driven)


def test_what_a_pool_of_its_own_cannot_hold_is_refused_and_not_waited_for() -> None:
    for size, refused in ((61, True), (62, False)):
        driven = Driven(size=size)
        req = driven.ask(DOCUMENT)
        (first,) = driven.step()
        assert (first is req and report(req)["reason"] == "pool_too_small") == refused


def test_the_kept_tokens_of_a_long_prefill_are_reserved_with_its_first_chunk() -> None:
    votes: list[bool] = []
    driven = Driven(size=100, agree=lambda mine: votes.append(mine) or mine)
    allocator = driven.engine.tree.token_to_kv_pool_allocator
    driven.ask(DOCUMENT)
    (job,) = driven.step()
    driven.engine.take(job)
    for end in (10, 30, 40):
        job.extend_end = end
        driven.manager.jobs.reserve(SimpleNamespace(reqs=[job]))
        if end == 10:
            assert allocator.alloc(40) is not None  # other requests take all that is left
            assert driven.engine.free_slots() == 0
    assert votes == [True, True]  # about the slots, and about the scores of earlier chunks
    assert job.slots is not None and job.error is None
    job.compression.kept = KEPT
    driven.end(job)
    assert job.context.state is ContextState.RESIDENT


def test_a_rank_that_failed_to_score_an_earlier_chunk_ends_the_reservation_on_all() -> None:
    driven = Driven()
    driven.ask(DOCUMENT)
    (job,) = driven.step()
    driven.engine.take(job)
    for end in (10, 40):
        job.extend_end = end
        driven.manager.jobs.reserve(SimpleNamespace(reqs=[job]))
        job.error = "error"
    assert job.slots is None and driven.accounts() == (160, 0, 0)


# --- pins ---------------------------------------------------------------------------------------------------------------


def test_pins_yield_to_a_request_that_does_not_fit() -> None:
    driven = Driven()
    context = driven.compress(DOCUMENT)
    driven.manager.room.pin(context)
    driven.ask(array("q", range(500, 540)))
    driven.step()  # the engine admits nothing, and nothing runs
    assert not context.pinned


def test_pins_do_not_yield_to_a_request_that_came_during_the_pass() -> None:
    """So does one whose grammar became ready: it is asked to run in the next pass."""
    driven = Driven()
    context = driven.compress(DOCUMENT)
    driven.manager.room.pin(context)
    late = driven.ask(array("q", range(500, 540)))
    driven.engine.queue = []

    def pick(running_batch: Any) -> tuple[None, Any]:
        driven.engine.queue.append(late)
        driven.manager.queued(late)
        return None, running_batch

    driven.manager.schedule(pick, driven.engine.running_batch_now())
    assert driven.engine.queue == [late] and not late.decided
    assert context.pinned


def test_a_defect_after_the_batch_was_picked_loses_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven()
    driven.ask(DOCUMENT)
    monkeypatch.setattr(driven.manager, "_give_way_if_starved", lambda result, asked: 1 / 0)
    (job,) = driven.step()
    assert isinstance(job, CompressionJob)


# --- ways into the queue ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["retracted", "preempted", "its grammar is ready"])
def test_whoever_comes_into_the_queue_during_a_pass_is_decided_in_the_next(way: str) -> None:
    """SGLang puts them there while it picks a batch, and could admit them in the same pass, undecided."""
    driven = Driven()
    driven.compress(DOCUMENT)
    late = driven.ask(DOCUMENT, 9)
    if way != "its grammar is ready":  # it ran before, and gives its KV back
        driven.step()
        driven.engine.take(late)
        driven.manager.before_release(late, checkpoint=False)
        driven.engine.give_back(late)
    driven.engine.queue = []
    seen: list[Any] = []

    def pick(running_batch: Any) -> tuple[None, Any]:
        driven.engine.queue.append(late)
        driven.manager.queued(late)
        seen.extend(driven.engine.queue)
        return None, running_batch

    driven.manager.schedule(pick, driven.engine.running_batch_now())
    assert seen == [] and driven.engine.queue == [late]
    assert driven.step() == [late] and late.decided and report(late)["status"] == "reused"


def test_an_undecided_request_that_is_prefilled_all_the_same_is_exact_and_says_so() -> None:
    driven = Driven()
    driven.compress(DOCUMENT)
    req = driven.ask(DOCUMENT, 9)
    driven.engine.take(req)  # no pass before it
    assert (report(req)["status"], report(req)["reason"], req.is_virtual) == ("exact", "undecided", False)
    assert req.decided, "it is admitted"


# --- replay -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("awaited", ["", "a question", "POST /obcache/compress"])
def test_passes_go_on_only_while_somebody_waits(awaited: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may leave while a pass runs, when there is no job in the queue that its abort could end."""
    driven = Driven(method="replay")
    driven.engine.tokenizer = object()
    passes = [ReplayPass(array("q", [1]), 0, 20), ReplayPass(array("q", [2]), 20, 40)]
    monkeypatch.setattr(Jobs, "_replay_passes", lambda self, context: passes)
    req = driven.ask(DOCUMENT)
    (job,) = driven.step()
    job.unattended = awaited == "POST /obcache/compress"
    if awaited != "a question":
        driven.engine.queue.remove(req)
    driven.engine.take(job)
    driven.end(job)
    following = [each for each in driven.engine.queue if isinstance(each, CompressionJob)]
    if not awaited:
        assert following == [] and not job.context.is_queued
        return
    assert driven.engine.queue[0] is following[0] and following[0].replay is passes[0]
    assert following[0].compression is job.compression  # what was scored goes on


def local_passes(driven: Driven, monkeypatch: pytest.MonkeyPatch, document: array[int] = DOCUMENT) -> CompressionJob:
    """The first of two local passes, which is in the queue: the context was read before, and is cached."""
    driven.engine.tokenizer = object()
    passes = [ReplayPass(array("q", [1, 2]), 0, 8, True), ReplayPass(array("q", [3]), 8, len(DOCUMENT), True)]
    monkeypatch.setattr(Jobs, "_replay_passes", lambda self, context: passes)
    driven.ask(document, question=document[0])
    (reads_context,) = [req for req in driven.step() if isinstance(req, CompressionJob) and req.context.tokens == document]
    driven.engine.take(reads_context)
    reads_context.finished_reason = FINISH_LENGTH(length=0)
    driven.manager.before_release(reads_context, checkpoint=True)
    driven.engine.give_back(reads_context, caches=True)
    job = driven.engine.queue[0]
    assert isinstance(job, CompressionJob) and job.replay is passes[0]
    return job


def test_the_whole_context_stays_cached_from_local_pass_to_local_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stands after the part of it that ends with its own chunk, at the positions after the whole."""
    driven = Driven(method="replay", replay_attention="local")
    free = driven.accounts()
    first = local_passes(driven, monkeypatch)
    assert first.origin_input_ids == DOCUMENT[:8] + array("q", [1, 2])
    assert (first.position_offset, first.first_scoring_position) == (len(DOCUMENT) - 8, 8)
    assert first.progress[1] - first.progress[0] == 3
    driven.step()
    driven.evict_all()
    assert driven.matched_exactly(first.context) == len(DOCUMENT)
    driven.engine.take(first)
    assert first.prefix_len == 8
    driven.end(first)
    last = driven.engine.queue[0]
    assert isinstance(last, CompressionJob) and last.is_final and last.position_offset == 0
    driven.evict_all()
    assert driven.matched_exactly(last.context) == len(DOCUMENT)
    driven.forward(last)
    assert last.prefix_len == len(DOCUMENT)
    driven.end(last)
    assert last.context.state is ContextState.RESIDENT
    driven.engine.queue.clear()
    driven.step()
    driven.evict_all()
    assert driven.accounts() == free


def test_of_jobs_that_hold_what_others_need_the_latest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing runs and nothing is admitted; the first one has most to lose."""
    driven = Driven(1000, method="replay", replay_attention="local")
    first = local_passes(driven, monkeypatch)
    second = local_passes(driven, monkeypatch, array("q", range(300, 340)))
    driven.engine.queue.sort(key=lambda req: req is first)  # whatever their order
    driven.step()
    assert driven.accounts()[2] == 80, "both hold their contexts"
    for _ in range(MAX_STARVED_PASSES):
        driven.step()
    assert driven.accounts()[2] == 40 and first.exact_lock is not None and second.exact_lock is None
    assert first in driven.engine.queue and second not in driven.engine.queue


def test_a_local_pass_whose_part_of_the_context_is_gone_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it hold anything: the context is compressed anew."""
    driven = Driven(method="replay", replay_attention="local")
    free = driven.accounts()
    job = local_passes(driven, monkeypatch)
    driven.evict_all()  # before a scheduling pass could hold it
    with get_parallel().override(tp_rank=0):
        driven.engine.take(job)
    assert job.error == "evicted" and isinstance(job.to_finish, FINISH_ABORT)
    driven.end(job, job.to_finish)
    assert job.context.state is ContextState.ABSENT and driven.accounts() == free
    (again,) = [each for each in driven.step() if isinstance(each, CompressionJob)]
    assert again.replay is None and again.origin_input_ids == DOCUMENT


def test_room_counts_readers_by_context() -> None:
    driven = Driven()
    context = driven.compress(DOCUMENT)
    reqs = [driven.ask(DOCUMENT, question) for question in (8, 9)]
    driven.step()
    room: Room = driven.manager.room
    assert room.readers() == {context.id: 2}
    driven.engine.take(reqs[0])
    assert room.readers() == {context.id: 2}
    driven.end(reqs[0])
    assert room.readers() == {context.id: 1}
