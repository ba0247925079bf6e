"""Contexts that stay exact until the pool needs their room, and prefixes that are found without marking, on SGLang's own radix tree."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
from sglang.srt.mem_cache.radix_cache import RadixKey

from obcache_sglang.errors import InvalidValue
from obcache_sglang.kv.context import ContextState, Namespace
from obcache_sglang.scheduler import control_calls, shared_prefixes, tree
from obcache_sglang.scheduler.pressure import UnderPressure
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from obcache_sglang.scheduler.shared_prefixes import SharedPrefixes
from tests.unit.engine import KEPT, Driven
from tests.unit.test_in_place import CONTEXT, LAYERS, busy, cache_exactly, driven
from tests.unit.test_manager import report

OTHER = array("q", range(300, 340))
THIRD = array("q", range(500, 540))
WIDE = array("q", range(700, 800))
"""A prompt for which a pool of 200 with three contexts has no room."""


def under_pressure(**settings: Any) -> Driven:
    drive, _ = driven(**{"when": "pressure", **settings})
    return drive


def cached(drive: Driven, tokens: array[int]) -> int:
    return tree.match(drive.engine.tree, RadixKey(tokens, None))[0]


def answered(drive: Driven, context: array[int], **plan: Any) -> ContextReq:
    """A question about a context, which is cached exactly; it is admitted and leaves."""
    cache_exactly(drive, context)
    req = drive.ask(context, num_tokens=2, **plan)
    assert drive.step() == [req]
    drive.engine.queue.remove(req)
    return req


def three_answered(**settings: Any) -> Driven:
    """The first asked about is the first to go."""
    drive = under_pressure(**settings)
    for context in (CONTEXT, OTHER, THIRD):
        answered(drive, context)
    return drive


def press(drive: Driven, tokens: array[int] = WIDE) -> ContextReq:
    """A long prompt that nobody else shares arrives first of all, and is admitted."""
    req = drive.ask(tokens[:-1], question=tokens[-1], exact="below_min_tokens")
    drive.engine.queue = [req, *drive.engine.queue[:-1]]
    drive.step()
    drive.engine.queue.remove(req)
    return req


def compressions(drive: Driven) -> int:
    return drive.manager.metrics.to_dict()["compressions"]


def state(drive: Driven, *contexts: array[int]) -> list[str]:
    """What of each is there."""
    held = {each.tokens.tobytes() for each in drive.manager.cache if drive.manager.cache.is_resident(each)}
    return [
        "exact" if cached(drive, each) == len(each) else "compressed" if each.tobytes() in held else "gone" for each in contexts
    ]


def test_what_has_room_stays_exact() -> None:
    drive = three_answered()
    assert drive.step() == [] and compressions(drive) == 0  # an idle pass
    assert state(drive, CONTEXT, OTHER, THIRD) == ["exact"] * 3
    req = drive.ask(CONTEXT, num_tokens=drive.engine.free_slots())  # all that is free, and no more
    assert drive.step() == [req] and compressions(drive) == 0
    assert (report(req)["status"], report(req)["reason"]) == ("exact", "deferred")


def test_a_forward_needs_no_more_than_it_reads() -> None:
    drive = three_answered(chunk=60)
    press(drive)
    assert compressions(drive) == 0  # SGLang reads 60 of these 100 tokens at once
    press(drive, array("q", range(1000, 1090)))
    assert compressions(drive) == 0


def test_the_least_recently_used_context_is_compressed_where_the_tree_would_evict_it() -> None:
    drive = three_answered()
    again = drive.ask(CONTEXT, num_tokens=2)
    drive.engine.take(again)  # its use makes it the newest
    drive.engine.give_back(again)
    waits = press(drive)
    assert state(drive, CONTEXT, OTHER, THIRD) == ["exact", "compressed", "compressed"]
    assert drive.engine.free_slots() >= len(WIDE)
    drive.engine.take(waits)
    drive.engine.give_back(waits)
    # What the tree would have lost answers now, compressed; the other stays exact.
    for context, status in ((OTHER, "reused"), (THIRD, "reused"), (CONTEXT, "exact")):
        req = drive.ask(context, num_tokens=2)
        assert drive.step() == [req] and report(req)["status"] == status
        drive.engine.queue.remove(req)


def test_text_that_is_no_context_goes_as_it_always_did() -> None:
    drive = under_pressure()
    cache_exactly(drive, OTHER)
    answered(drive, CONTEXT)
    cache_exactly(drive, THIRD)
    press(drive)
    assert cached(drive, OTHER) == 0  # older than the context
    assert cached(drive, CONTEXT) == len(CONTEXT) and compressions(drive) == 0


def test_before_a_compressed_context_goes_the_exact_ones_are_compressed() -> None:
    drive = three_answered()
    press(drive)
    assert state(drive, CONTEXT, OTHER, THIRD) == ["compressed", "compressed", "exact"]
    press(drive, array("q", range(1000, 1130)))
    assert state(drive, CONTEXT, OTHER, THIRD) == ["compressed"] * 3
    assert drive.manager.metrics.to_dict()["evictions"] == 0


def test_a_context_that_is_read_is_not_touched() -> None:
    drive = three_answered()
    (node, _) = tree.match(drive.engine.tree, RadixKey(CONTEXT, None))[1], None
    lock = drive.engine.tree.lock(node)
    press(drive)
    assert state(drive, CONTEXT, OTHER, THIRD) == ["exact", "compressed", "compressed"]
    drive.engine.tree.unlock(lock)


def test_what_is_about_to_be_read_is_not_what_makes_the_room() -> None:
    drive = three_answered()
    req = drive.ask(CONTEXT, num_tokens=2)
    press(drive)
    assert state(drive, CONTEXT, OTHER, THIRD) == ["exact", "compressed", "compressed"]
    assert report(req)["status"] == "exact" and drive.accounts()[2] == 0


@pytest.mark.parametrize("left", [30, 60])
def test_what_a_prefill_has_still_to_read_is_not_taken_by_what_is_compressed(left: int) -> None:
    """Of 200 slots 120 hold contexts. SGLang would end the process where it finds no slot for the next chunk."""
    drive = three_answered()
    drive.engine.is_read_in_chunks(drive.ask(array("q", range(2000, 2000 + left + 9)), exact="no_context"), 10)
    drive.engine.most_prefill_tokens = 60
    assert (drive.engine.free_slots(), drive.engine.chunk_rest) == (70, left)
    press(drive, array("q", range(5000, 5100)))
    assert drive.engine.free_slots() >= left
    assert (compressions(drive) > 0) == (left == 30)


def test_a_context_that_would_not_be_smaller_goes_as_it_always_did() -> None:
    """Behind a long beginning that others share, a short document has fewer tokens of its own than are kept of both."""
    drive = under_pressure()
    begins = array("q", range(900, 960))
    documents = [begins + array("q", range(1000 * number, 1000 * number + 20)) for number in range(3)]
    for document in documents:
        answered(drive, document)
    press(drive, array("q", range(3000, 3100)))
    assert state(drive, *documents) == ["gone", "exact", "exact"] and compressions(drive) == 0
    press(drive, array("q", range(4000, 4130)))  # then nobody shares it any more
    assert state(drive, *documents) == ["gone", "gone", "compressed"]


def test_contexts_that_others_stand_on_are_not_compressed_first() -> None:
    drive = under_pressure(size=300)
    system = array("q", range(900, 930))
    answered(drive, system)
    documents = [system + array("q", range(1000 * number, 1000 * number + 60)) for number in (1, 2, 3)]
    for document in documents:
        answered(drive, document)
    press(drive, array("q", range(5000, 5110)))
    assert state(drive, system) == ["exact"] and "gone" not in state(drive, *documents)


def test_of_a_conversation_the_whole_is_compressed_and_not_each_turn() -> None:
    drive = under_pressure()
    for turns in (20, 40, 60, 80):
        answered(drive, array("q", range(2000, 2000 + turns)))
    press(drive, array("q", range(5000, 5130)))
    assert [each.num_tokens for each in drive.manager.cache if each.state is ContextState.RESIDENT] == [80]
    assert compressions(drive) == 1 and drive.engine.free_slots() >= 130


OLD = array("q", range(8000, 8040))


def compressed_long_ago(size: int = 200, **settings: Any) -> Driven:
    """OLD is compressed, and would be evicted next. Half of the pool is free."""
    drive = under_pressure(size=size, **settings)
    answered(drive, OLD)
    press(drive, array("q", range(size - 35)))
    assert state(drive, OLD) == ["compressed"]
    return drive


@pytest.mark.parametrize(("share", "left"), [(0.5, "compressed"), (0.05, "gone")])
def test_compressed_contexts_are_spared_while_they_hold_little(monkeypatch: pytest.MonkeyPatch, share: float, left: str) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.SPARED_SHARE", share)
    drive = compressed_long_ago()
    for first in (9000, 9100):  # text of others, that was used since
        cache_exactly(drive, array("q", range(first, first + 60)))
    press(drive, array("q", range(70)))
    assert state(drive, OLD) == [left]


def test_a_new_prompt_waits_for_what_runs_rather_than_take_a_compressed_context() -> None:
    drive = compressed_long_ago()
    cache_exactly(drive, CONTEXT)
    lock = drive.engine.tree.lock(tree.match(drive.engine.tree, RadixKey(CONTEXT, None))[1])  # something reads it
    fits, waits = (
        drive.ask(array("q", range(first, first + 80)), exact="below_min_tokens", question=number)
        for number, first in enumerate((9000, 9200))
    )
    busy(drive)
    assert drive.step() == [fits] and state(drive, OLD) == ["compressed"]
    drive.engine.running = []  # nothing else will end: then it goes
    assert drive.step() == [fits, waits] and state(drive, OLD) == ["gone"]
    drive.engine.tree.unlock(lock)


def test_with_a_context_go_the_answers_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.SPARED_SHARE", 0)
    drive = compressed_long_ago()
    answered(drive, CONTEXT)
    for number in range(4):  # two of them begin alike
        cache_exactly(drive, CONTEXT + array("q", [7, number // 2, number]))
    free = drive.engine.free_slots()
    press(drive, array("q", range(free + 5)))
    assert state(drive, OLD, CONTEXT) == ["compressed"] * 2 and cached(drive, CONTEXT) == 0
    assert drive.accounts() == (200 - 20 - 20, 40, 0)


def test_the_one_not_asked_about_for_longest_is_compressed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnderPressure, "_to_compress_next", lambda pressure: 0)
    drive = compressed_long_ago()
    for context in (CONTEXT, OTHER, CONTEXT):
        answered(drive, context)
    press(drive, array("q", range(drive.engine.free_slots() + 1)))
    assert state(drive, OLD, CONTEXT, OTHER) == ["compressed", "exact", "compressed"]


def test_what_others_stand_on_is_not_compressed_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnderPressure, "_to_compress_next", lambda pressure: 0)
    drive = compressed_long_ago(size=300)
    system = array("q", range(900, 930))
    documents = [system + array("q", range(1000 * number, 1000 * number + 60)) for number in (1, 2)]
    for context in (system, *documents):
        answered(drive, context)
    press(drive, array("q", range(drive.engine.free_slots() + 1)))
    assert state(drive, OLD, system, *documents) == ["compressed", "exact", "compressed", "exact"]


def test_new_requests_wait_while_room_is_made_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.in_place.STEP_TOKENS", len(CONTEXT))
    monkeypatch.setattr("obcache_sglang.scheduler.in_place.PRESSURE_STEPS", 1)
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.DECODE_STEPS", 1)
    drive = three_answered()
    busy(drive)
    req = drive.ask(WIDE[:-1], question=WIDE[-1], exact="below_min_tokens")
    passes = 0
    while drive.step() == []:
        passes += 1
        assert passes < 20
    assert passes >= len(LAYERS) - 1
    assert drive.engine.free_slots() >= len(WIDE) and req.exact_reason == "below_min_tokens"


def test_room_is_made_for_what_decodes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.DECODE_STEPS", 100)
    drive = three_answered()
    busy(drive)
    monkeypatch.setattr(type(drive.engine), "admits_nobody", lambda engine: True)
    for _ in range(10):
        drive.step()
    assert state(drive, CONTEXT) == ["compressed"]


def test_a_question_that_waits_reads_what_was_compressed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.WAITING_SEEN", 1)
    drive = three_answered()
    req = drive.ask(CONTEXT, num_tokens=2)
    drive.step()
    assert report(req)["status"] == "exact"
    wide = drive.ask(WIDE[:-1], question=WIDE[-1], exact="below_min_tokens")
    drive.engine.queue = [wide, req]
    assert drive.step() == [wide]  # what req was to read is gone
    drive.engine.queue = [req]
    assert drive.step() == [req] and req.is_virtual and report(req)["status"] == "reused"
    assert drive.manager.metrics.to_dict()["exact"]["deferred"] == 4  # the first answers, and req, once


def test_where_both_are_cached_the_exact_one_is_read() -> None:
    drive = three_answered()
    press(drive)
    first = drive.ask(CONTEXT, num_tokens=2)
    drive.step()
    assert first.is_virtual
    cache_exactly(drive)
    second = drive.ask(CONTEXT, num_tokens=2)
    drive.step()
    assert report(second)["status"] == "exact" and not second.is_virtual
    assert report(first)["status"] == "reused" and first.is_virtual  # it was decided on
    # A prompt that fits into the pool only after its compressed context has no choice.
    third = drive.ask(CONTEXT, num_tokens=2)
    third.must_be_compressed = True
    drive.step()
    assert third.is_virtual


def test_what_the_pool_has_lost_comes_back_compressed() -> None:
    drive = three_answered()
    drive.evict_all()
    there_is_room = drive.ask(CONTEXT, num_tokens=2)
    assert drive.step() == [there_is_room] and report(there_is_room)["reason"] == "deferred"
    drive.engine.queue = []
    # There is room for one of them, beside what is left free.
    cache_exactly(drive, array("q", range(9000, 9101)))
    reqs = [drive.ask(OTHER, num_tokens=2), drive.ask(CONTEXT, num_tokens=2)]
    assert isinstance(drive.step()[-1], CompressionJob) and report(reqs[0])["reason"] == "deferred"
    drive = three_answered()
    drive.evict_all()
    cache_exactly(drive, array("q", range(9500, 9670)))  # other text, that was used since
    first, second = drive.ask(CONTEXT, num_tokens=2), drive.ask(CONTEXT, question=8, num_tokens=2)
    (job,) = drive.step()
    assert isinstance(job, CompressionJob) and job.context is first.context is second.context
    drive.forward(job)
    drive.end(job)
    assert drive.step() == [first, second]
    assert (report(first)["status"], report(second)["status"]) == ("compressed", "reused")


@pytest.mark.parametrize(("passes", "exact"), [(0, False), (3, True)])
def test_after_pressure_a_lost_context_needs_ample_room(monkeypatch: pytest.MonkeyPatch, passes: int, exact: bool) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.PRESSED_PASSES", 2)
    drive = three_answered()
    press(drive)
    drive.evict_all()
    cache_exactly(drive, array("q", range(9500, 9570)))
    for _ in range(passes):
        drive.step()
    req = drive.ask(CONTEXT, num_tokens=2)  # 130 are free
    assert (drive.step() == [req]) == exact


def test_what_a_question_asked_for_holds_when_its_context_is_compressed() -> None:
    drive = under_pressure()
    req = answered(drive, CONTEXT, pin=True, ttl_seconds=60)
    for context in (OTHER, THIRD):
        answered(drive, context)
    busy(drive)  # else pins yield to what waits
    press(drive)
    assert req.context is not None and req.context.pinned and state(drive, CONTEXT) == ["compressed"]
    drive.now += 61
    answered(drive, THIRD)
    assert drive.manager.cache.get(req.context.id) is None


def test_one_rank_that_cannot_plan_keeps_all_from_compressing(monkeypatch: pytest.MonkeyPatch) -> None:
    votes: list[bool] = []

    def agree(mine: bool) -> bool:
        votes.append(mine)
        return mine

    drive, _ = driven(agree=agree, when="pressure")
    for context in (CONTEXT, OTHER, THIRD):
        answered(drive, context)

    def defect(*args: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as broken:
        broken.setattr(tree, "next_victims", defect)
        press(drive)
    assert votes == [False] and compressions(drive) == 0
    press(drive)
    assert compressions(drive) == 2  # nothing was forgotten


def test_contexts_that_are_gone_are_not_looked_for_again() -> None:
    drive = three_answered()
    drive.evict_all()
    cache_exactly(drive, array("q", range(9000, 9120)))
    waits = drive.ask(THIRD, num_tokens=2)
    press(drive)
    assert list(drive.manager.under_pressure._candidates.values()) in ([], [waits.context])
    drive.engine.queue = []
    for number in range(50):  # of a thousand different ones, none is remembered that is not there
        answered(drive, array("q", range(10000 + 100 * number, 10040 + 100 * number)))
        drive.evict_all()
    cache_exactly(drive, array("q", range(9000, 9150)))
    press(drive)
    assert len(drive.manager.under_pressure._candidates) <= 1


def test_a_failed_compression_loses_nothing_but_what_the_tree_would_have_evicted() -> None:
    drive, layers = driven(when="pressure")
    for context in (CONTEXT, OTHER, THIRD):
        answered(drive, context)
    layers.fails_at = "second"
    press(drive)
    assert compressions(drive) == 0 and len(layers.done) <= 3 * len(LAYERS)
    assert drive.engine.free_slots() >= len(WIDE)
    assert sum(drive.accounts()) == 200


LADDER = {"compression_ratio": 0.5, "ladder": (0.75, 0.9)}


def ratios(drive: Driven) -> list[tuple[int, float]]:
    """(first token, ratio) of the contexts that are held."""
    held = [each for each in drive.manager.cache if drive.manager.cache.is_resident(each)]
    return sorted((each.tokens[0], each.settings.compression_ratio) for each in held)


def test_lasting_pressure_compresses_further_before_anything_goes() -> None:
    drive = three_answered(**LADDER)
    press(drive, array("q", range(1000, 1120)))  # 140 with the room that compressing takes: all three are compressed
    assert ratios(drive) == [(100, 0.5), (300, 0.5), (500, 0.5)]
    press(drive, array("q", range(2000, 2155)))  # 60 slots are held; 45 may be
    assert ratios(drive) == [(100, 0.75), (300, 0.75), (500, 0.5)]
    press(drive, array("q", range(3000, 3180)))
    assert ratios(drive) == [(100, 0.9), (300, 0.9), (500, 0.75)]
    assert sum(drive.accounts()) == 200
    # Whoever asks reads what is there, by its tokens and by the id that the first rung had.
    req = drive.ask(CONTEXT, num_tokens=2)
    assert drive.step() == [req]
    assert (report(req)["status"], report(req)["compression_ratio"], report(req)["kept_tokens"]) == (
        "reused",
        0.9,
        int(40 * (1 - 0.9)),
    )
    press(drive, array("q", range(4000, 4195)))
    assert ratios(drive) == [(100, 0.9)]  # nothing was left to compress; it was asked about last


def test_the_lowest_rung_goes_up_first() -> None:
    drive = three_answered(**LADDER)
    press(drive, array("q", range(1000, 1120)))
    press(drive, array("q", range(2000, 2155)))
    assert ratios(drive) == [(100, 0.75), (300, 0.75), (500, 0.5)]
    press(drive, array("q", range(3000, 3161)))
    assert ratios(drive) == [(100, 0.75), (300, 0.75), (500, 0.75)]


def test_a_question_that_waits_follows_its_context_up_the_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.pressure.WAITING_SEEN", 1)
    drive = three_answered(**LADDER)
    press(drive, array("q", range(1000, 1120)))
    waits = drive.ask(CONTEXT, num_tokens=2)
    drive.step()
    assert waits.is_virtual and waits.context is not None and waits.context.num_slots == 20
    wide = drive.ask(array("q", range(2000, 2174)), question=5, exact="below_min_tokens")
    drive.engine.queue = [wide, waits]
    assert drive.step() == [wide]  # the other one is decided on in the next pass
    assert waits in drive.step() and waits.context.num_slots < 20
    assert waits.origin_input_ids[: waits.context.num_slots] == waits.context.engine_ids


def test_a_rung_that_fails_is_not_tried_for_ever() -> None:
    drive, layers = driven(when="pressure", **LADDER)
    for context in (CONTEXT, OTHER, THIRD):
        answered(drive, context)
    press(drive, array("q", range(1000, 1120)))
    layers.fails_at = "second"
    done = len(layers.done)
    press(drive, array("q", range(2000, 2180)))
    assert drive.engine.free_slots() >= 180
    assert len(layers.done) - done <= 3 * len(LAYERS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"when": "first", "ladder": "0.75"}, "has no effect with when=first"),
        ({"ladder": "0.4,0.75"}, "begins below compression_ratio=0.5"),
        ({"ladder": "0.9,0.75"}, "does not ascend"),
        ({"ladder": "0.9,x"}, "has 'x'"),
        ({"ladder": [1.0]}, "has 1.0"),
        ({"ladder": 3}, "is not a list of ratios"),
        ({"method": "tova"}, "needs method=gate"),
    ],
)
def test_settings_that_have_no_effect_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        under_pressure(**{"compression_ratio": 0.5, **settings})


def test_what_was_compressed_and_evicted_can_be_compressed_again() -> None:
    drive = three_answered()
    press(drive)
    assert state(drive, CONTEXT) == ["compressed"]
    drive.evict_all()
    for context in (CONTEXT, OTHER, THIRD):
        answered(drive, context)
    press(drive)
    assert state(drive, CONTEXT) == ["compressed"]


def test_a_context_that_failed_is_tried_again_when_it_is_asked_about() -> None:
    drive, layers = driven(when="pressure")
    for fails_at, found in (("second", "gone"), ("", "compressed")):
        layers.fails_at = fails_at
        for context in (CONTEXT, OTHER, THIRD):
            answered(drive, context)
        press(drive)
        assert state(drive, CONTEXT) == [found]
        drive.evict_all()


def test_a_flush_forgets_who_asked() -> None:
    drive = three_answered()
    drive.engine.tree.reset()
    drive.engine.tree.token_to_kv_pool_allocator.clear()
    drive.manager.after_flush()
    for context in (CONTEXT, OTHER, THIRD):  # as plain text
        cache_exactly(drive, context)
    press(drive)
    assert compressions(drive) == 0


def test_methods_that_read_contexts_anew_do_not_wait_for_pressure() -> None:
    drive = under_pressure()
    cache_exactly(drive)
    plan = drive.manager.settings.compression_for({"method": "tova"})
    fields = {"rid": "q", "origin_input_text": "", "origin_input_ids": CONTEXT + array("q", [7, 7])}
    from sglang.srt.sampling.sampling_params import SamplingParams

    from obcache_sglang.messages import Plan

    req = drive.manager.create_request({**fields, "sampling_params": SamplingParams()}, Plan(len(CONTEXT), plan).to_dict())
    drive.engine.queue.append(req)
    (job,) = drive.step()
    assert job.context is req.context


# --- prefixes that prompts share -----------------------------------------------------------------------------------------

NOBODY = Namespace(None, None, None)


@pytest.fixture
def prefixes(monkeypatch: pytest.MonkeyPatch) -> SharedPrefixes:
    monkeypatch.setattr(shared_prefixes, "BLOCK_TOKENS", 8)
    return SharedPrefixes(b"secret")


def prompt(*parts: int) -> array[int]:
    """Of parts of 8 tokens, by number; a negative one is a single token."""
    return array("q", [token for part in parts for token in ([part] if part < 0 else range(100 * part, 100 * part + 8))])


def test_prompts_that_part_show_where(prefixes: SharedPrefixes) -> None:
    assert prefixes.boundary(NOBODY, prompt(*range(20), -1), 8)[0] == 0
    assert prefixes.boundary(NOBODY, prompt(*range(20), -2), 8)[0] == 160
    assert prefixes.boundary(NOBODY, prompt(*range(20), -3, -4), 8)[0] == 160


def test_the_same_prompt_again_shows_nothing(prefixes: SharedPrefixes) -> None:
    for _ in range(3):
        assert prefixes.boundary(NOBODY, prompt(*range(20), -1), 8)[0] == 0


def test_a_conversation_that_goes_on_shows_what_came_before(prefixes: SharedPrefixes) -> None:
    assert prefixes.boundary(NOBODY, prompt(*range(20)), 8)[0] == 0
    assert prefixes.boundary(NOBODY, prompt(*range(30)), 8)[0] == 160
    assert prefixes.boundary(NOBODY, prompt(*range(40)), 8)[0] == 240


def test_documents_behind_one_system_prompt_have_boundaries_of_their_own(prefixes: SharedPrefixes) -> None:
    system, first, second = range(10), range(10, 30), range(40, 60)
    assert prefixes.boundary(NOBODY, prompt(*system, *first, -1), 8)[0] == 0
    assert prefixes.boundary(NOBODY, prompt(*system, *second, -1), 8)[0] == 80  # what they share: the system prompt
    assert prefixes.boundary(NOBODY, prompt(*system, *first, -2), 8)[0] == 240
    assert prefixes.boundary(NOBODY, prompt(*system, *second, -2), 8)[0] == 240


def test_what_begins_many_contexts_is_told_from_what_a_conversation_says_again(prefixes: SharedPrefixes) -> None:
    system = range(10)
    documents = [range(first, first + 6) for first in (20, 30, 40, 50)]
    for document in documents:
        assert prefixes.boundary(NOBODY, prompt(*system, *document, -1), 8)[1] == 0
    # That a document is shared shows when it is asked about again.
    assert [prefixes.boundary(NOBODY, prompt(*system, *document, -2), 8) for document in documents] == [(128, 0)] * 3 + [
        (128, 80)
    ]
    assert prefixes.boundary(NOBODY, prompt(*system, *documents[0], -3), 8) == (128, 80)
    # A document with less than a context's tokens is one with its system prompt.
    assert prefixes.boundary(NOBODY, prompt(*system, *documents[1], -3), 49) == (128, 0)
    for turn in range(70, 80):
        assert prefixes.boundary(NOBODY, prompt(*range(60, turn)), 8)[1] == 0


def test_many_questions_do_not_make_a_document_the_beginning_of_many(prefixes: SharedPrefixes) -> None:
    document = range(20)
    for question in range(1, 8):
        prefixes.boundary(NOBODY, prompt(*document, -question), 8)
    # One conversation about it, turn by turn.
    for turn in range(30, 40):
        assert prefixes.boundary(NOBODY, prompt(*document, *range(30, turn)), 8)[1] == 0


def test_questions_that_begin_alike_do_not_move_the_boundary(prefixes: SharedPrefixes) -> None:
    document = range(20)
    prefixes.boundary(NOBODY, prompt(*document, 30, -1), 8)
    prefixes.boundary(NOBODY, prompt(*document, 31, -1), 8)
    assert prefixes.boundary(NOBODY, prompt(*document, 30, -2), 8)[0] == 160
    assert prefixes.boundary(NOBODY, prompt(*document, 30, -3), 8)[0] == 160


def test_short_prefixes_are_not_contexts(prefixes: SharedPrefixes) -> None:
    prefixes.boundary(NOBODY, prompt(*range(4), -1), 33)
    assert prefixes.boundary(NOBODY, prompt(*range(4), -2), 33)[0] == 0
    assert prefixes.boundary(NOBODY, prompt(*range(4), -2), 32)[0] == 32


def test_a_token_follows_the_boundary(prefixes: SharedPrefixes) -> None:
    prefixes.boundary(NOBODY, prompt(*range(4), 9), 8)
    assert prefixes.boundary(NOBODY, prompt(*range(4)), 8)[0] == 0
    assert prefixes.boundary(NOBODY, prompt(*range(4), -1), 8)[0] == 32


@pytest.mark.parametrize("other", [Namespace("x", None, None), Namespace(None, "x", None), Namespace("x", None, "x")])
def test_namespaces_know_nothing_of_each_other(prefixes: SharedPrefixes, other: Namespace) -> None:
    prefixes.boundary(NOBODY, prompt(*range(20), -1), 8)
    assert prefixes.boundary(other, prompt(*range(20), -2), 8)[0] == 0
    assert prefixes.boundary(other, prompt(*range(20), -3), 8)[0] == 160


def test_a_million_prompts_are_not_remembered(prefixes: SharedPrefixes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "MAX_BLOCKS", 50)
    for number in range(1000):
        prefixes.boundary(NOBODY, prompt(number, number + 1, number + 2), 8)
        prefixes.boundary(NOBODY, prompt(5000, 5001, -number), 8)
    assert len(prefixes) == 50
    assert prefixes.boundary(NOBODY, prompt(5000, 5001, 5002), 8)[0] == 16


def test_unmarked_questions_become_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "BLOCK_TOKENS", 8)
    drive = under_pressure(mode="auto")

    def ask(context: array[int], question: int) -> ContextReq:
        req = drive.ask(context, question=question, num_tokens=2, finds_boundary=True)
        drive.step()
        drive.engine.queue.remove(req)
        return req

    cache_exactly(drive)
    first = ask(CONTEXT, 7)
    assert (report(first)["reason"], report(first)["context_tokens"]) == ("no_context", 0)
    second = ask(CONTEXT, 8)
    assert (report(second)["reason"], report(second)["context_tokens"]) == ("deferred", len(CONTEXT))
    answered(drive, OTHER)
    answered(drive, THIRD)
    press(drive)
    assert second.context is not None and second.context.state is ContextState.RESIDENT
    third = ask(CONTEXT, 9)
    assert report(third)["status"] == "reused" and third.is_virtual
    # An unmarked question that wants log-probabilities of the document gets them, exactly.
    req = drive.ask(CONTEXT, num_tokens=2, finds_boundary=True)
    req.return_logprob, req.logprob_start_len = True, 3
    drive.step()
    assert (report(req)["status"], report(req)["reason"]) == ("exact", "input_logprobs")


def test_a_short_beginning_that_is_compressed_does_not_hide_a_long_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "BLOCK_TOKENS", 8)
    drive = under_pressure(mode="auto", size=400)
    system, document = CONTEXT[:16], CONTEXT
    drive.manager.in_place.start(drive.manager.cache.obtain(NOBODY, drive.manager.settings.compression, system))  # type: ignore[arg-type]
    cache_exactly(drive, system)
    drive.ask(system, num_tokens=2, action="compress")
    drive.step()
    found = []
    for question in (7, 8, 9):
        req = drive.ask(document, question=question, num_tokens=2, finds_boundary=True)
        drive.step()
        found.append((report(req)["status"], report(req)["context_tokens"]))
        drive.engine.queue.remove(req)
    # Once it is known that the document is shared it is read exactly, so that all of it can be compressed.
    assert found == [("exact", 16), ("exact", 40), ("exact", 40)]


def test_documents_behind_a_longer_system_prompt_are_compressed_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone they are shorter than what would be kept of both."""
    monkeypatch.setattr(shared_prefixes, "BLOCK_TOKENS", 8)
    drive = under_pressure(mode="auto", size=500)
    system = array("q", range(5000, 5096))
    documents = [system + array("q", range(first, first + 48)) for first in (6000, 7000, 8000, 9000)]
    for question in (7, 8, 9):
        for document in documents:
            req = drive.ask(document, question=question, num_tokens=2, finds_boundary=True)
            drive.step()
            cache_exactly(drive, document)
            drive.engine.queue.remove(req)
    answered(drive, OTHER)
    press(drive, array("q", range(20_000, 20_220)))
    compressed = [each for each in drive.manager.cache if each.state is ContextState.RESIDENT]
    assert compressed and {(each.num_tokens, each.num_exact, each.own_slots) for each in compressed} == {(144, 96, 24)}
    assert all(drive.matched_exactly(each) == 96 for each in compressed), "their own exact KV went"
    again = drive.ask(documents[documents.index(compressed[0].tokens)], question=10, num_tokens=2, finds_boundary=True)
    drive.step()
    assert report(again)["status"] == "reused" and again.origin_input_ids[:96] == system
    # Nothing makes room by compressing the text that they stand behind: they would go with it.
    drive.manager.under_pressure.forget()
    alone = drive.manager.cache.obtain(NOBODY, drive.manager.settings.compression, system)
    assert alone is not None
    drive.manager.under_pressure.add(alone)
    assert not drive.manager.under_pressure._exact() and alone.id in drive.manager.under_pressure._candidates


def test_what_the_ladder_has_made_goes_with_what_it_was_made_of() -> None:
    """Clients know the context by the id of what they had compressed. What somebody else had compressed at another ratio stays."""
    drive = under_pressure(ladder=(0.75,), size=400)
    cache = drive.manager.cache
    own = drive.manager.settings.compression
    first, rung, other = (
        cache.obtain(NOBODY, replace(own, compression_ratio=ratio), CONTEXT) for ratio in (own.compression_ratio, 0.75, 0.6)
    )
    assert first is not None and rung is not None and other is not None
    for context in (rung, other):
        assert cache.reserve(context) is not None
        cache.publish(context, KEPT)
    first.ttl_seconds, first.expires_at = 60.0, drive.now + 60
    cache.replaced(first, rung)
    assert (rung.ttl_seconds, rung.expires_at) == (60.0, drive.now + 60)
    identity = cache.capability(first, array("q"))
    assert control_calls.answer(drive.manager, {"op": "delete", "context_id": identity, "namespace": None})["ok"]
    assert cache.get(rung.id) is None and cache.is_resident(other)
