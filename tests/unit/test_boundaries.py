"""Prompts that say where several segments end: system prompt, document, turns of a conversation. What they share, and what is made anew."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import pairwise

import pytest

from obcache_sglang.errors import InvalidValue
from obcache_sglang.settings import CompressionSettings
from tests.unit.test_manager import report
from tests.unit.test_segments import BASE, HEADS, LAYERS, WHOLE, World, driven, make_all

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
    found = drive.manager.cache.find_prefix(
        drive.engine.queue[0].namespace, [drive.manager.settings.compression], document + text(9000, 5)
    )
    assert found is not None and found.num_tokens == 500


# --- segments that stay exact -------------------------------------------------------------------------------------------


def test_the_ratio_is_of_what_comes_after_the_exact_segments() -> None:
    settings = replace(GATE, boundaries=(200, 500), exact_segments=1, exact_tokens=200)
    assert [settings.kept_tokens(tokens) for tokens in (150, 200, 300, 500)] == [150, 200, 250, 350]
    assert replace(settings, max_kept_tokens=100).kept_tokens(500) == 200
    # A beginning that is exact as a whole is the same context, whatever follows it.
    assert settings.within(150, 1) == replace(settings, boundaries=(), exact_tokens=150)
    with pytest.raises(InvalidValue, match="exact_segments=1 can be used with method=gate only"):
        CompressionSettings.resolve({"method": "tova", "exact_segments": 1})


@pytest.mark.parametrize("budget", ["uniform", "adakv", "global", "profile"])
@pytest.mark.parametrize("exact", [100, BASE])
def test_every_head_keeps_the_exact_segments(budget: str, exact: int) -> None:
    """Compressed whole, and after a base that has them; the total is what it should be."""
    world = World(budget, exact_tokens=exact, recent_tokens=8)
    base, base_slots = world.compress(BASE)
    for context, slots in (world.compress(WHOLE), world.compress(WHOLE, base, base_slots)):
        kept = context.kept
        assert kept is not None
        heads = [kept.positions[first:last].tolist() for first, last in pairwise(kept.bounds)]
        assert len(heads) == LAYERS * HEADS and all(head[:exact] == list(range(exact)) for head in heads)
        assert sum(map(len, heads)) == len(slots) * len(heads) == (exact + int((WHOLE - exact) * 0.4)) * len(heads)


def test_a_system_prompt_that_stays_exact_is_shared_like_any_other() -> None:
    drive = driven(4000, segment_tokens=None)
    for number, first in enumerate((1000, 2000)):
        document = SYSTEM + text(first, 300)
        settings = replace(drive.manager.settings.compression, exact_segments=1, exact_tokens=200)
        drive.ask(document, boundaries=(200,), settings=settings)
        assert make_all(drive) == ([200, 300], [300])[number]
    slots = sorted(each.num_slots for each in drive.manager.cache)
    assert slots == [200, 350, 350]
