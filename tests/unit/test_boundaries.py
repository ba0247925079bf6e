"""Prompts that say where several segments end: system prompt, document, turns of a conversation. What they share, and what is made anew."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from obcache_sglang.errors import InvalidValue
from obcache_sglang.kv.context import FIRST_VIRTUAL_ID, Namespace
from obcache_sglang.scheduler.lineage import longest_prefix
from obcache_sglang.scheduler.requests import ContextReq
from obcache_sglang.scheduler.room import most_slots
from obcache_sglang.settings import CompressionSettings, ServerSettings
from tests.unit.engine import Driven
from tests.unit.test_manager import report
from tests.unit.test_segments import BASE, HEADS, LAYERS, WHOLE, World, by_head, driven, make_all, the_job

SYSTEM = array("q", range(200))
GATE = CompressionSettings.resolve({"method": "gate", "compression_ratio": 0.5})


def text(first: int, num_tokens: int) -> array[int]:
    return array("q", range(first, first + num_tokens))


@pytest.mark.parametrize(
    ("boundaries", "tokens", "page_size", "starts"),
    [
        ((), 900, 1, []),
        ((200, 500), 900, 1, [200, 500]),
        ((200, 500), 500, 1, [200]),
        ((200, 500), 200, 1, []),
        ((100, 200, 260, 500), 900, 1, [200, 500]),  # each has 128 tokens or more; the last may have few
        ((200, 899), 900, 1, [200, 899]),
        ((207, 510), 896, 16, [192, 496]),
    ],
)
def test_segments_end_at_the_boundaries(boundaries: tuple[int, ...], tokens: int, page_size: int, starts: list[int]) -> None:
    settings = replace(GATE, boundaries=boundaries)
    assert settings.segment_starts(tokens, page_size) == starts
    # What a segment is does not depend on what follows it.
    for start in starts:
        assert settings.within(start, page_size).segment_starts(start, page_size) == [each for each in starts if each < start]


def test_between_boundaries_segments_are_as_long_as_everywhere() -> None:
    settings = replace(GATE, segment_tokens=128, boundaries=(300, 1000))
    starts = settings.segment_starts(1100, 1)
    assert starts == [128, 300, 428, 556, 684, 812, 1000]
    assert all(64 <= last - first <= 192 for first, last in pairwise([0, *starts]))


def test_other_methods_have_one_boundary() -> None:
    with pytest.raises(InvalidValue, match=r"boundaries=\[200\] can be used with method=gate only; with snapkv"):
        CompressionSettings.resolve({"method": "snapkv", "boundaries": (200,)})


def test_settings_without_boundaries_are_what_they_were() -> None:
    assert replace(GATE, boundaries=(200,)).within(200, 1) == GATE
    assert replace(GATE, boundaries=(200,)).within(200, 1).fingerprint() == GATE.fingerprint()
    assert CompressionSettings.from_dict(replace(GATE, boundaries=(200,)).to_dict()) == replace(GATE, boundaries=(200,))


def test_a_system_prompt_is_compressed_once_for_all_documents_behind_it() -> None:
    drive = driven(4000, segment_tokens=None)
    documents = [SYSTEM + text(first, 300) for first in (1000, 2000, 3000)]
    assert drive.ask(documents[0], boundaries=(200,)) and make_all(drive) == [200, 300]
    for document in documents[1:]:
        drive.ask(document, boundaries=(200,))
        assert make_all(drive) == [300]
    # By itself it is a context like any other.
    alone = drive.ask(SYSTEM)
    assert make_all(drive) == [] and report(alone)["status"] == "reused"


def test_a_turn_of_a_conversation_costs_its_own_tokens() -> None:
    drive = driven(6000, segment_tokens=None)
    history, ends = SYSTEM, [200]
    prefilled = []
    for turn in range(5):
        drive.ask(history, boundaries=tuple(ends[:-1]), question=turn)
        prefilled.append(make_all(drive))
        drive.step()
        history = history + text(1000 * (turn + 1), 150 + turn)
        ends.append(len(history))
    assert prefilled == [[200], [150], [151], [152], [153]]


def test_what_others_share_does_not_give_way_to_a_longer_context() -> None:
    drive = driven(4000, segment_tokens=128)
    drive.ask(SYSTEM + text(1000, 300), boundaries=(200,))
    make_all(drive)
    assert {each.num_tokens: each.gives_way for each in drive.manager.cache} == {128: True, 200: True, 328: True, 500: False}
    drive.ask(SYSTEM + text(2000, 300), boundaries=(200,))
    make_all(drive)
    assert [each.gives_way for each in drive.manager.cache if each.num_tokens in (128, 200)] == [True, False]


def test_many_boundaries_cost_others_nothing() -> None:
    """Beginnings that nobody else asks for go before other contexts."""
    drive = driven(6000, segment_tokens=None)
    for number in range(5):
        drive.compress(text(10_000 + 1000 * number, 400))
    others = list(drive.manager.cache)
    drive.ask(text(0, 2500), boundaries=tuple(range(128, 2500, 128)))
    make_all(drive)
    assert all(drive.manager.cache.is_resident(each) for each in others)


def test_segments_of_a_long_context_are_few() -> None:
    for tokens in (33_000, 131_000, 1_000_000):
        settings = replace(GATE, segment_tokens=128, boundaries=tuple(range(128, tokens, 128)))
        assert len(settings.segment_starts(tokens, 1)) < 500


def test_deleting_the_last_of_its_contexts_deletes_a_beginning() -> None:
    drive = driven(6000, segment_tokens=None)
    asked = [drive.ask(SYSTEM + text(first, 300), boundaries=(200, 490)) for first in (1000, 2000)]
    make_all(drive)
    drive.step()
    drive.engine.queue.clear()
    left = []
    for req in asked:
        assert req.context is not None
        drive.manager.cache.delete(req.context)
        drive.manager.sweep()
        left.append(sorted(each.num_tokens for each in drive.manager.cache))
    assert left == [[200, 490, 500], []]


def test_a_context_that_is_forgotten_or_refused_holds_no_beginning() -> None:
    drive = driven(2000, segment_tokens=None, max_contexts=6)
    first = drive.ask(SYSTEM + text(1000, 300), boundaries=(200,))
    make_all(drive)
    refused = drive.ask(SYSTEM + text(4000, 1700), boundaries=(200,))
    assert make_all(drive) == [] and report(refused)["reason"] == "pool_too_small"
    (beginning,) = [each for each in drive.manager.cache if each.num_tokens == 200]
    assert first.context is not None and beginning.targets == {first.context.id}
    drive.engine.queue.clear()
    for number in range(6):
        drive.compress(text(10_000 + 1000 * number, 130))
        drive.ask(SYSTEM)  # it stays in use
        make_all(drive)
        drive.engine.queue.clear()
    assert drive.manager.cache.get(first.context.id) is None and not beginning.targets


def test_of_two_with_the_same_tokens_a_prompt_has_its_own() -> None:
    drive = driven(6000, segment_tokens=None)
    document = SYSTEM + text(1000, 300)
    for boundaries in ((200,), ()):
        drive.ask(document, boundaries=boundaries)
        make_all(drive)
    lineages = []
    for number in range(4):
        req = drive.ask(document, boundaries=(200,), question=number)
        assert make_all(drive) == [] and req.context is not None
        lineages.append(req.context.settings.boundaries)
    assert lineages == [(200,)] * 4


def test_contexts_of_other_methods_are_passed_over() -> None:
    """Those have no boundaries, and could not have any."""
    drive = driven(6000, segment_tokens=None)
    document = SYSTEM + text(1000, 300)
    drive.ask(document, settings=CompressionSettings.resolve({"method": "snapkv", "budget": "uniform", "compression_ratio": 0.5}))
    make_all(drive)
    req = drive.ask(document, boundaries=(200,))
    assert make_all(drive) == [200, 300]
    drive.step()
    assert req.context is not None and req.context.settings.boundaries == (200,)


def test_boundaries_that_move_find_what_is_compressed() -> None:
    """Clients of hosted APIs name the system prompt and the last turns only: what was a turn's end is not named for ever."""
    drive = driven(20_000, segment_tokens=None)
    history = SYSTEM + text(1000, 2000)
    ends = [200, 1000, 1600, 2200]
    prefilled = []
    for turn in range(6):
        req = drive.ask(history[: ends[-1]], boundaries=(200, *ends[-3:-1]), question=turn)
        prefilled.append(sum(make_all(drive)))
        drive.step()
        assert req.is_virtual and req.context is not None and req.context.num_tokens == ends[-1]
        history = history + text(20_000 + 1000 * turn, 600)
        ends.append(ends[-1] + 600)
    assert prefilled == [2200, 600, 600, 600, 600, 600]


def test_who_gives_no_boundary_finds_contexts_that_have_some() -> None:
    drive = driven(4000, segment_tokens=None)
    document = SYSTEM + text(1000, 300)
    drive.ask(document, boundaries=(200,))
    make_all(drive)
    drive.step()
    found = longest_prefix(
        drive.manager.cache, drive.engine.queue[0].namespace, [drive.manager.settings.compression], document + text(9000, 5)
    )
    assert found is not None and found.num_tokens == 500


# --- segments that stay exact -------------------------------------------------------------------------------------------


def test_the_ratio_is_of_what_comes_after_the_exact_segments() -> None:
    settings = replace(GATE, boundaries=(200, 500), exact_segments=1, exact_tokens=200)
    assert [settings.kept_tokens(tokens) for tokens in (150, 200, 201, 300, 500)] == [150, 200, 201, 250, 350]
    assert replace(settings, max_kept_tokens=100).kept_tokens(500) == 201, "of its own it has one, or it were none"
    assert settings.within(150, 1) == replace(settings, boundaries=(), exact_tokens=150)
    assert (settings.segment_starts(900, 1), settings.segment_starts(500, 1)) == ([500], [])
    assert replace(settings, segment_tokens=128).segment_starts(500, 1) == [328]
    with pytest.raises(InvalidValue, match="exact_segments=1 can be used with method=gate only"):
        CompressionSettings.resolve({"method": "tova", "exact_segments": 1})


@pytest.mark.parametrize(("page_size", "short"), [(1, 60), (16, 48), (64, 0)])
def test_an_exact_segment_may_be_short(page_size: int, short: int) -> None:
    """It is no compression of its own. A document behind a short system prompt would stay exact with it."""
    settings = replace(GATE, boundaries=(60, 500), exact_segments=1).within(896, page_size)
    assert (settings.boundaries, settings.exact_tokens) == (
        tuple(each for each in (short, 500 // page_size * page_size) if each),
        short,
    )
    assert settings.within(896, page_size) == settings


# --- a ratio for each segment -------------------------------------------------------------------------------------------

ALL_BUDGETS = [("uniform", True), ("uniform", False), ("adakv", True), ("global", True), ("profile", True)]


def share(num_tokens: int, ratio: float) -> int:
    """What is kept of a segment."""
    return int(num_tokens * (1 - ratio))


@pytest.mark.parametrize(
    ("ratios", "boundaries", "tokens", "own"),
    [
        ((0.0, 0.7), (200, 500), 900, (0.0, 0.7, 0.5)),
        ((0.0, 0.7), (200, 500), 500, (0.0, 0.7)),
        ((0.0, 0.7), (200, 500), 450, (0.0, 0.7)),
        ((0.0, 0.7), (200, 500), 200, (0.0,)),
        ((0.2, 0.7), (60, 500), 900, (0.7, 0.5)),  # what is too short goes with the next, at its ratio
        ((0.2, 0.0, 0.7), (60, 500, 800), 900, (0.0, 0.7, 0.5)),
        ((0.2, 0.0, 0.7), (500, 520, 800), 900, (0.2, 0.0, 0.7, 0.5)),  # but what is to keep everything does
        ((0.2, 0.1, 0.0, 0.7), (500, 510, 520, 800), 900, (0.2, 0.0, 0.7, 0.5)),
        ((0.2, 0.0), (500,), 520, (0.2, 0.0)),
        ((0.2, 0.9, 0.7), (), 900, (0.2,)),
        ((0.2,), (200, 500), 900, (0.2, 0.5, 0.5)),
    ],
)
def test_each_segment_has_its_ratio(
    ratios: tuple[float, ...], boundaries: tuple[int, ...], tokens: int, own: tuple[float, ...]
) -> None:
    settings = replace(GATE, boundaries=boundaries, segment_ratios=ratios).within(tokens, 1)
    assert settings.segment_ratios == own and len(own) == len(settings.boundaries) + 1
    assert settings.within(tokens, 1) is settings
    ends = [0, *settings.boundaries, tokens]
    assert settings.kept_slots(tokens, 1) == sum(
        share(last - first, ratio) for (first, last), ratio in zip(pairwise(ends), own, strict=True)
    )
    for start in settings.segment_starts(tokens, 1):
        assert settings.kept_slots(start, 1) == settings.within(start, 1).kept_slots(start, 1)
    assert CompressionSettings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize("first", [0.0, 0.5])
def test_any_number_of_segments_may_have_a_ratio_of_zero(first: float) -> None:
    """What was checked when the request came is not refused later, when short segments have gone with the next."""
    boundaries = tuple(range(100, 100 + 128 * 400, 128))
    settings = replace(GATE, boundaries=boundaries, segment_ratios=(first, *[0.0] * 399))
    own = settings.within(boundaries[-1] + 1000, 1)
    assert own.within(boundaries[-1] + 1000, 1) is own and own.exact_tokens == own.boundaries[own.exact_segments - 1]
    assert own.kept_slots(boundaries[-1] + 1000, 1) == boundaries[-1] + 1000, "what goes with one of too many is kept too"


def test_a_context_of_many_segments_costs_the_scheduler_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks what each segment takes beside those before it, while everybody waits. Without memory each answer asks about all before again."""
    boundaries = tuple(range(130, 130 * 241, 130))
    settings = replace(GATE, boundaries=boundaries, segment_ratios=tuple(0.5 * (number % 2) for number in range(240)))
    own = settings.within(boundaries[-1] + 500, 1)
    within, asked = CompressionSettings.within, []

    def counted(self: CompressionSettings, context_tokens: int, page_size: int) -> CompressionSettings:
        asked.append(context_tokens)
        return within(self, context_tokens, page_size)

    monkeypatch.setattr(CompressionSettings, "within", counted)
    assert len(own.boundaries) > 100 and most_slots(own, 0, boundaries[-1] + 500, 1) > 20_000
    assert len(asked) < 50 * len(own.boundaries)


def test_a_part_of_a_segment_has_the_segments_ratio() -> None:
    settings = replace(GATE, boundaries=(200, 1000), segment_ratios=(0.0, 0.8), segment_tokens=256).within(1300, 16)
    assert settings.segment_starts(1300, 16) == [448, 704, 992]
    # Whole pages of each: 51.2 of 256 tokens, twice, 57.6 of 288, half of 308.
    assert [settings.kept_slots(each, 16) - 192 for each in (192, 448, 704, 992, 1300)] == [0, 64, 128, 192, 192 + 160]


def test_a_ratio_for_each_segment_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(InvalidValue, match=r"segment_ratios=\[0.5\] can be used with method=gate only; with tova"):
        CompressionSettings.resolve({"method": "tova", "segment_ratios": (0.5,)})
    # Not exact_segments, which follows from it.
    with pytest.raises(InvalidValue, match=r"segment_ratios=\[0.0, 0.5\] can be used with method=gate only"):
        CompressionSettings.resolve({"method": "tova", "segment_ratios": (0.0, 0.5)})
    with pytest.raises(InvalidValue, match="max_kept_tokens=100 cannot be used with segment_ratios"):
        replace(GATE, segment_ratios=(0.5,), max_kept_tokens=100)
    with pytest.raises(InvalidValue, match=r"segment_ratios=1 is outside \[0, 1\)"):
        replace(GATE, segment_ratios=(0.5, 1))
    with pytest.raises(InvalidValue, match=r"segment_ratios=0\.5 is not a list"):
        replace(GATE, segment_ratios=0.5)
    given = {"gates": "smollm2-135m", "segment_ratios": "0, 0.7"}
    assert ServerSettings.resolve(given).compression.segment_ratios == (0.0, 0.7)
    with pytest.raises(InvalidValue, match=r"segment_ratios=\[0.0, 0.7\] cannot be used with when=pressure"):
        ServerSettings.resolve({**given, "mode": "auto"})


@pytest.mark.parametrize(("budget", "one_space"), ALL_BUDGETS)
@pytest.mark.parametrize("exact", [0, 50])
@pytest.mark.parametrize(("first", "ratio"), [(0.6, 0.6), (0.8, 0.0)])
def test_each_segment_keeps_its_own_share(budget: str, one_space: bool, exact: int, first: float, ratio: float) -> None:
    boundaries, ratios = ((exact, BASE), (0.0, first)) if exact else ((BASE,), (first,))
    world = World(budget, one_space=one_space, segment_tokens=None, recent_tokens=8, compression_ratio=ratio)
    given = replace(world.settings, boundaries=boundaries, segment_ratios=ratios)
    world.settings = given.within(BASE, 1)
    base, base_slots = world.compress(BASE)
    world.settings = given.within(WHOLE, 1)
    whole, slots = world.compress(WHOLE, base, base_slots)
    before, after = by_head(base.kept), by_head(whole.kept)
    new = share(WHOLE - BASE, ratio)
    assert base.num_slots == exact + share(BASE - exact, first)
    assert sum(map(len, before)) == base.num_slots * LAYERS * HEADS
    assert sum(map(len, after)) == (base.num_slots + new) * LAYERS * HEADS
    scores = world.scores.flatten(0, 1)
    k, v = (each.split(whole.kept.offsets.diff().tolist()) for each in world.cells(whole, slots))
    lowest, highest = [], []
    for head, (kept_before, kept) in enumerate(zip(before, after, strict=True)):
        own = kept[len(kept_before) :]
        assert torch.equal(kept[: len(kept_before)], kept_before) and torch.equal(own, own.unique())
        assert len(own) == 0 or (own[0] >= BASE and own[-1] == WHOLE - 1)
        left = sorted({*range(BASE, WHOLE)} - {*own.tolist()})
        window = {*range(WHOLE - 8, WHOLE)}
        lowest += [float(scores[head, chosen].min())] if (chosen := sorted({*own.tolist()} - window)) else []
        highest += [float(scores[head, left].max())] if left else []
        exact_kv = world.kv[head // HEADS][:, kept, head % HEADS]
        torch.testing.assert_close(torch.stack([k[head], v[head]]), exact_kv, rtol=0, atol=0)
    if budget == "global" and highest:
        assert not lowest or min(lowest) >= max(highest)
    if ratio == 0.0:
        assert all(each[-(WHOLE - BASE) :].tolist() == list(range(BASE, WHOLE)) for each in after)


def test_prompts_with_other_ratios_have_other_contexts() -> None:
    drive = driven(20_000, segment_tokens=None)
    document = SYSTEM + text(1000, 600)
    prefilled = []
    for ratios in ((0.2, 0.7), (0.2, 0.8), (), (0.2, 0.7), (0.3, 0.7)):
        settings = replace(drive.manager.settings.compression, segment_ratios=ratios)
        req = drive.ask(document, boundaries=(200, 500), settings=settings)
        prefilled.append(sum(make_all(drive)))
        drive.step()
        assert req.context is not None
        lengths = zip((200, 300, 300), (*ratios, 0.5), strict=True) if ratios else [(800, 0.5)]
        assert req.context.num_slots == sum(share(*each) for each in lengths)
    assert prefilled == [800, 600, 800, 0, 800]


def test_boundaries_that_move_keep_their_ratios() -> None:
    """As below, for a client that says so for each of its segments: 0.2, then what it likes. What it names no more stays as it was made."""
    drive = driven(20_000, segment_tokens=None)
    history = SYSTEM + text(1000, 2000)
    ends = [200, 1000, 1600, 2200]
    ratios = [0.2, 0.4, 0.6, 0.8]
    slots, prefilled = 0, []
    for turn in range(5):
        settings = replace(drive.manager.settings.compression, segment_ratios=(0.2, *ratios[-3:-1]), compression_ratio=ratios[-1])
        req = drive.ask(history[: ends[-1]], boundaries=(200, *ends[-3:-1]), question=turn, settings=settings)
        prefilled.append(sum(make_all(drive)))
        drive.step()
        assert req.context is not None and req.is_virtual
        slots = slots + share(600, ratios[-1]) if turn else 160 + share(800, 0.4) + share(600, 0.6) + share(600, 0.8)
        assert req.context.num_slots == slots
        history = history + text(20_000 + 1000 * turn, 600)
        ends.append(ends[-1] + 600)
        ratios.append((0.8, 0.3)[turn % 2])
    assert prefilled == [2200, 600, 600, 600, 600]


# --- what stays exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "one_space"), ALL_BUDGETS)
@pytest.mark.parametrize("exact", [100, 1])
def test_every_head_keeps_the_exact_segments(budget: str, one_space: bool, exact: int) -> None:
    """Compressed whole, after a base that has them, and again from what was kept. They stay where they are; nothing else is lost."""
    world = World(budget, one_space=one_space, exact_tokens=exact, recent_tokens=8)
    base, base_slots = world.compress(BASE)
    whole, whole_slots = world.compress(WHOLE)
    made = [(base, base_slots), (whole, whole_slots), world.compress(WHOLE, base, base_slots)]
    world.settings = replace(world.settings, compression_ratio=0.85)
    made.append(world.compress(WHOLE, whole, whole_slots))
    made.append(world.compress(WHOLE, whole, whole_slots, owns_exact=True))
    for context, slots in made:
        kept = context.kept
        assert kept is not None and kept.num_exact == exact and len(slots) == context.num_slots
        heads = by_head(kept)
        assert len(heads) == LAYERS * HEADS and all(head[:exact].tolist() == list(range(exact)) for head in heads)
        assert sum(map(len, heads)) == context.num_slots * len(heads)
        own = slots[context.num_shared :].tolist()
        assert len(set(own)) == context.own_slots and not {*own} & {*world.exact.tolist()}
        k, v = (each.split(kept.offsets.diff().tolist()) for each in world.cells(context, slots))
        for head, positions in enumerate(heads):
            expected = world.kv[head // HEADS][:, positions, head % HEADS]
            torch.testing.assert_close(torch.stack([k[head], v[head]]), expected, rtol=0, atol=0)
        if context.is_uneven and kept.rows is not None:
            assert torch.equal(kept.rows.long(), kept.rows_in(world.compressor.space, slots))
            # Each head's rows, told one head at a time.
            parts = [kept.rows_in(world.compressor.space, slots, head, head + 1) for head in range(len(heads))]
            assert torch.equal(torch.cat(parts), kept.rows.long())


def behind_system(drive: Driven, first: int, **wish: Any) -> ContextReq:
    settings = replace(drive.manager.settings.compression, exact_segments=1)
    return drive.ask(SYSTEM + text(first, 300), boundaries=(200,), settings=settings, **wish)


def test_a_system_prompt_that_stays_exact_holds_its_slots_once() -> None:
    drive = driven(4000, segment_tokens=None)
    free = drive.engine.free_slots()
    for number, first in enumerate((1000, 2000, 3000)):
        req = behind_system(drive, first, question=number)
        # It is read by itself first, and stays in the tree as any text does.
        assert make_all(drive) == ([200, 300], [300], [300])[number]
        assert req.context is not None and (req.context.num_slots, req.context.own_slots) == (350, 150)
        assert req in drive.step() and report(req)["kept_tokens"] == 350
        assert req.origin_input_ids[:200] == SYSTEM and req.position_offset == 150
    assert len(list(drive.manager.cache)) == 3 and drive.accounts() == (free - 200 - 3 * 150, 200 + 3 * 150, 0)
    described = [each.describe() for each in drive.manager.cache]
    assert [(each["kept_tokens"], each["slots"]) for each in described] == [(350, 150)] * 3


def test_what_contexts_stand_on_is_evicted_after_them() -> None:
    drive = driven(4000, segment_tokens=None)
    reqs = [behind_system(drive, first, question=first) for first in (1000, 2000)]
    make_all(drive)
    drive.step()
    drive.engine.queue.clear()
    first, second = (req.context for req in reqs)
    drive.manager.cache.drop_node(first)
    assert not drive.manager.cache.is_resident(first) and drive.manager.cache.is_resident(second)
    assert drive.matched_exactly(first) == 200 and drive.accounts()[1] == 200 + 150
    drive.evict_all()
    assert not drive.manager.cache.is_resident(second) and drive.accounts() == (4000, 0, 0)
    # It comes back: with the text that it stands on.
    behind_system(drive, 2000)
    assert make_all(drive) == [200, 300]


def test_the_text_that_a_job_is_to_stand_on_stays_until_it_runs() -> None:
    drive = driven(4000, segment_tokens=None)
    behind_system(drive, 1000)
    job = the_job(drive.step())
    assert job.reads_exact and not job.is_final and job.origin_input_ids == SYSTEM
    drive.forward(job)
    assert job.slots is None
    drive.end(job)
    job = the_job(drive.step())
    drive.evict_all()
    assert drive.matched_exactly(job.context) == 200
    drive.forward(job)
    assert job.prefix_len == 200 and job.slots is not None and len(job.slots) == 350
    drive.end(job)
    assert drive.accounts() == (4000 - 350, 350, 0), "nothing is held any more"


def test_two_documents_at_once_read_their_system_prompt_once() -> None:
    drive = driven(4000, segment_tokens=None)
    for first in (1000, 2000):
        behind_system(drive, first, question=first)
    assert sum(make_all(drive)) == 200 + 300 + 300


@pytest.mark.parametrize("when", ["first job", "second job"])
def test_a_flush_ends_what_stands_on_exact_text(when: str) -> None:
    drive = driven(4000, segment_tokens=None)
    req = behind_system(drive, 1000)
    job = the_job(drive.step())
    if when == "second job":
        drive.forward(job)
        drive.end(job)
        job = the_job(drive.step())
    drive.engine.tree.reset()
    drive.engine.tree.token_to_kv_pool_allocator.clear()
    drive.manager.after_flush()
    assert job.exact_lock is None
    assert make_all(drive) == [200, 300] and req in drive.step()
    assert report(req)["status"] == "compressed" and drive.accounts()[2] == 0


def test_a_rank_that_lost_what_a_context_stands_on_serves_it_exactly() -> None:
    drive = driven(4000, segment_tokens=None)
    req = behind_system(drive, 1000)
    job = the_job(drive.step())
    drive.forward(job)
    drive.end(job, FINISH_ABORT("gone"))  # nothing of it is cached
    drive.engine.queue.clear()
    context = req.context
    assert context is not None and drive.manager.cache.reserve(context) is None
    assert drive.accounts() == (4000, 0, 0)


def test_text_that_stays_exact_as_a_whole_is_no_context() -> None:
    drive = driven(4000, segment_tokens=None)
    settings = replace(drive.manager.settings.compression, exact_segments=1)
    req = drive.ask(SYSTEM, settings=settings)
    assert drive.step() == [req] and (report(req)["status"], report(req)["reason"]) == ("exact", "exact_segments")
    assert list(drive.manager.cache) == []


def test_what_a_context_is_to_stand_on_is_not_what_makes_room_for_it() -> None:
    drive = driven(600, segment_tokens=None)
    settings = replace(drive.manager.settings.compression, exact_tokens=200)
    context = drive.manager.cache.obtain(Namespace(None, None, None), settings, SYSTEM + text(1000, 300))
    assert context is not None and context.own_slots == 150
    for cached in (SYSTEM, text(5000, 350)):  # what was used last goes last
        slots = drive.engine.tree.token_to_kv_pool_allocator.alloc(len(cached))
        drive.engine.tree.insert(InsertParams(key=RadixKey(cached, None), value=slots))
    reserved = drive.manager.cache.reserve(context)
    assert reserved is not None and drive.matched_exactly(context) == 200
    free, evictable, locked = drive.accounts()
    assert (locked, free + evictable + locked) == (350, 600)


def test_what_the_tree_has_lost_of_a_context_it_may_own() -> None:
    drive = driven(600, segment_tokens=None)
    settings = replace(drive.manager.settings.compression, exact_tokens=200)
    context = drive.manager.cache.obtain(Namespace(None, None, None), settings, SYSTEM + text(1000, 300))
    assert context is not None and drive.manager.cache.reserve(context) is None and not context.owns_exact
    slots = drive.manager.cache.reserve(context, may_own_exact=True)
    assert slots is not None and len(slots) == context.own_slots == 350 and drive.accounts() == (250, 0, 350)
    assert context.engine_ids[:1] >= array("q", [FIRST_VIRTUAL_ID]), "its own copy is nobody else's"
    drive.manager.cache.withdraw(context)
    assert drive.accounts() == (600, 0, 0) and context.own_slots == 150
    small = driven(300, segment_tokens=None)
    context = small.manager.cache.obtain(Namespace(None, None, None), settings, SYSTEM + text(1000, 300))
    assert context is not None and small.manager.cache.reserve(context, may_own_exact=True) is None and not context.owns_exact
