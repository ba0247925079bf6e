"""Contexts that are compressed segment by segment: where segments begin, what their heads choose from, and how the manager makes them."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import get_parallel

from obcache_sglang.compress.compression import Compression, Compressor, ScoringRows
from obcache_sglang.compress.gates import Gates, num_features
from obcache_sglang.compress.head_profile import HeadProfile, ModelIdentity
from obcache_sglang.compress.ranking import effective_window
from obcache_sglang.compress.rotary import InverseRotary
from obcache_sglang.errors import InvalidValue
from obcache_sglang.kv.cells import KeptTokens, KVSpace
from obcache_sglang.kv.context import Context, ContextState, Namespace
from obcache_sglang.scheduler.forward import _context_before
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from obcache_sglang.scheduler.starvation import MAX_STARVED_PASSES
from obcache_sglang.settings import CompressionSettings
from tests.unit.engine import Driven, OneSpacePool
from tests.unit.test_manager import report

LAYERS, HEADS, HEAD_DIM = 3, 2, 16
BASE, WHOLE = 205, 240


# --- where segments begin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "page_size", "start"),
    [(192, 1, 0), (193, 1, 128), (320, 1, 128), (321, 1, 256), (5000, 1, 4864), (128, 1, 0), (256, 1, 128), (336, 48, 192)],
)
def test_the_last_segment_has_a_half_to_one_and_a_half_times_the_tokens(tokens: int, page_size: int, start: int) -> None:
    settings = CompressionSettings.resolve({"method": "gate", "segment_tokens": 128})
    assert settings.segment_start(tokens, page_size) == start
    assert start % page_size == 0


def test_a_beginning_has_segments_of_its_own() -> None:
    settings = CompressionSettings.resolve({"method": "gate", "segment_tokens": 128})
    starts = [700]
    while starts[0] > 0:
        starts.insert(0, settings.segment_start(starts[0], 1))
    assert starts == [0, 128, 256, 384, 512, 700]


def test_only_gates_score_before_the_context_ends() -> None:
    with pytest.raises(InvalidValue, match="segment_tokens=256 can be used with method=gate only; with tova"):
        CompressionSettings.resolve({"method": "tova", "segment_tokens": 256})
    with pytest.raises(InvalidValue, match="from 128 to"):
        CompressionSettings.resolve({"method": "gate", "segment_tokens": 5})
    whole = CompressionSettings.resolve({"method": "gate"})
    assert whole.segment_start(1 << 20, 1) == 0
    assert whole.fingerprint() != CompressionSettings.resolve({"method": "gate", "segment_tokens": 256}).fingerprint()


# --- what is kept ------------------------------------------------------------------------------------------------------


class World:
    """A pool with the exact K and V of one context, and what compresses it."""

    def __init__(self, budget: str, *, one_space: bool = True, **settings: Any) -> None:
        torch.manual_seed(5)
        self.settings = CompressionSettings.resolve(
            {"method": "gate", "budget": budget, "compression_ratio": 0.6, "segment_tokens": 128, **settings}
        )
        kind = OneSpacePool if one_space else MHATokenToKVPool
        self.pool = kind(900, 1, torch.float32, HEADS, HEAD_DIM, layer_num=LAYERS, device="cpu", enable_memory_saver=False)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.normal_()
        rotary = InverseRotary(get_rope(HEAD_DIM, HEAD_DIM, 512, 10000, dtype=torch.float32))
        shares = torch.rand(1, LAYERS, HEADS, dtype=torch.float64) * 0.7 + 0.05
        identity = ModelIdentity("Some", LAYERS, HEADS, HEADS, HEAD_DIM, HEADS * HEAD_DIM, 9, "0" * 16)
        gates = Gates(torch.randn(LAYERS, HEADS, num_features(HEAD_DIM)), torch.randn(LAYERS, HEADS))
        space = KVSpace.of(self.pool) if one_space else None
        self.compressor = Compressor(
            self.pool,
            space,
            head_profile=HeadProfile(identity, [0.6], (shares * 0.4 / shares.mean()).tolist(), {"command": ""}),
            lanes=(0, HEADS),
            gates=gates,
            rotaries=dict.fromkeys(range(LAYERS), rotary),
        )
        taken = torch.randperm(899) + 1
        self.exact, self.free = taken[:WHOLE], taken[WHOLE:]
        # What the gates say of each token, and its K and V, before anything is copied.
        self.scores = torch.stack(
            [
                gates.scores(layer, rotary(k[self.exact], torch.arange(WHOLE)), v[self.exact])
                for layer, (k, v) in enumerate(zip(self.pool.k_buffer, self.pool.v_buffer, strict=True))
            ]
        )
        self.kv = [
            torch.stack([k[self.exact], v[self.exact]]) for k, v in zip(self.pool.k_buffer, self.pool.v_buffer, strict=True)
        ]

    def compress(
        self,
        num_tokens: int,
        base: Context | None = None,
        base_slots: torch.Tensor | None = None,
        *,
        owns_exact: bool = False,
    ) -> tuple[Context, torch.Tensor]:
        """A context of the first tokens, and its slots."""
        num_slots = self.settings.kept_slots(num_tokens, 1)
        shared = 0 if owns_exact else self.settings.exact_tokens
        own = num_slots - shared
        slots = torch.cat([self.exact[:shared], self.free[:own]])
        self.free = self.free[own:]
        context = Context("0f" * 16, Namespace(None, None, None), self.settings, array("q", range(num_tokens)), num_slots)
        context.owns_exact = owns_exact
        compression = Compression(context, base)
        first = 0 if base is None else base.num_tokens
        sources = self.exact[first:num_tokens]
        rows = ScoringRows(0, 0, num_tokens, sources if base_slots is None else torch.cat([base_slots, sources]), last=True)
        for layer_id in range(LAYERS):
            layer: Any = SimpleNamespace(layer_id=layer_id, logit_cap=0, is_cross_attention=False, tp_k_head_num=HEADS)
            scores = compression.score(self.compressor, rows, layer)
            assert scores is not None
            compression.keep(self.compressor, rows, scores, layer, slots)
        assert compression.kept is not None
        context.kept = compression.kept
        return context, slots

    def cells(self, context: Context, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [kept tokens of all heads, head_dim] of a context, in the order of its positions."""
        if self.compressor.space is not None:
            assert context.kept is not None
            rows = context.kept.rows_in(self.compressor.space, slots)
            return self.compressor.space.k[rows], self.compressor.space.v[rows]
        k, v = (
            torch.stack([buffer[slots].transpose(0, 1) for buffer in buffers])
            for buffers in (self.pool.k_buffer, self.pool.v_buffer)
        )
        return k.reshape(-1, HEAD_DIM), v.reshape(-1, HEAD_DIM)


def by_head(kept: KeptTokens) -> list[torch.Tensor]:
    return [part.long() for part in kept.positions.split(kept.offsets.diff().tolist())]


@pytest.mark.parametrize(
    ("budget", "one_space", "settings"),
    [
        ("uniform", True, {}),
        ("uniform", False, {}),
        ("uniform", False, {"heads": "shared"}),
        ("adakv", True, {}),
        ("global", True, {}),
        ("profile", True, {}),
        ("profile", True, {"recent_tokens": 100}),
        ("profile", True, {"max_kept_tokens": 150}),
        ("profile", True, {"compression_ratio": 0.0}),
        ("uniform", True, {"compression_ratio": 0.3, "sink_tokens": 1000, "recent_tokens": 1000}),
    ],
)  # fmt: skip
def test_heads_choose_among_what_they_kept_and_the_new_tokens(budget: str, one_space: bool, settings: dict[str, Any]) -> None:
    """With max_kept_tokens the base keeps everything, each head in its own lane, and the whole does not."""
    world = World(budget, one_space=one_space, **settings)
    first_new = 150 if "max_kept_tokens" in settings else BASE
    base, base_slots = world.compress(first_new)
    whole, slots = world.compress(WHOLE, base, base_slots)
    before, after = by_head(base.kept), by_head(whole.kept)
    assert sum(map(len, after)) == whole.num_slots * LAYERS * HEADS
    scores = world.scores.flatten(0, 1)
    if settings.get("heads") == "shared":
        scores = world.scores.mean(1, keepdim=True).expand(-1, HEADS, -1).flatten(0, 1)
    k, v = (each.split(whole.kept.offsets.diff().tolist()) for each in world.cells(whole, slots))
    lowest, highest = [], []
    for head, (kept_before, kept) in enumerate(zip(before, after, strict=True)):
        candidates = {*kept_before.tolist(), *range(first_new, WHOLE)}
        assert set(kept.tolist()) <= candidates and len(set(kept.tolist())) == len(kept)
        recent = max(
            effective_window(world.settings.kept_window, whole.num_slots, shrink=True),
            int(world.settings.recent_share * max(0, len(kept) - 4)) if budget in ("uniform", "profile") else 0,
        )
        sinks = min(world.settings.sink_tokens, whole.num_slots)
        protected = {
            position for position in candidates if position < sinks or position >= WHOLE - min(recent, whole.num_slots - sinks)
        }
        assert protected <= set(kept.tolist())
        chosen, left = sorted(set(kept.tolist()) - protected), sorted(candidates - set(kept.tolist()))
        lowest += [float(scores[head, chosen].min())] if chosen else []
        highest += [float(scores[head, left].max())] if left else []
        # What was in the window, and lost its place to sinks, goes by its position.
        if budget in ("uniform", "profile") and chosen and left and "sink_tokens" not in settings:
            assert lowest[-1] >= highest[-1]
        exact = world.kv[head // HEADS][:, kept, head % HEADS]
        torch.testing.assert_close(torch.stack([k[head], v[head]]), exact, rtol=0, atol=0)
    if budget == "global":
        assert min(lowest) >= max(highest)
    if budget == "profile" and not settings:
        assert world.compressor.head_profile is not None
        most = [len(each) + WHOLE - BASE for each in before]
        assert list(map(len, after)) == world.compressor.head_profile.counts(WHOLE, whole.num_slots, 4 + 8, most=most)
    if settings.get("compression_ratio") == 0.0:
        assert all(torch.equal(each, torch.arange(WHOLE)) for each in after)


@pytest.mark.parametrize(
    ("budget", "one_space"), [("uniform", True), ("uniform", False), ("adakv", True), ("global", True), ("profile", True)]
)
def test_a_context_is_compressed_again_from_what_it_kept(budget: str, one_space: bool) -> None:
    """With a higher ratio, and nothing that comes to it."""
    world = World(budget, one_space=one_space)
    base, base_slots = world.compress(WHOLE)
    world.settings = replace(world.settings, compression_ratio=0.85)
    smaller, slots = world.compress(WHOLE, base, base_slots)
    assert smaller.num_slots < base.num_slots
    k, v = (each.split(smaller.kept.offsets.diff().tolist()) for each in world.cells(smaller, slots))
    for head, (kept_before, kept) in enumerate(zip(by_head(base.kept), by_head(smaller.kept), strict=True)):
        assert set(kept.tolist()) <= set(kept_before.tolist())
        exact = world.kv[head // HEADS][:, kept, head % HEADS]
        torch.testing.assert_close(torch.stack([k[head], v[head]]), exact, rtol=0, atol=0)


def test_no_head_is_given_more_than_it_has() -> None:
    identity = ModelIdentity("Some", 1, 3, 3, 8, 24, 9, "0" * 16)
    profile = HeadProfile(identity, [0.5], [[[0.8, 0.6, 0.1]]], {})
    assert profile.counts(100, 50) == [80, 60, 10]
    assert profile.counts(100, 50, most=[70, 100, 100]) == [70, 69, 11]
    assert profile.counts(100, 50, floor=20, most=[70, 60, 20]) == [70, 60, 20]


# --- how the manager makes them ---------------------------------------------------------------------------------------

SIZE = 600
DOCUMENT = array("q", range(1000, 1400))  # segments of 128, 128 and 144 tokens
LEFT = FINISH_ABORT("its client left")


def driven(size: int = SIZE, context_len: int = 4096, **settings: Any) -> Driven:
    given = {"method": "gate", "gates": "smollm2-135m", "budget": "uniform", "compression_ratio": 0.5, "segment_tokens": 128}
    return Driven(size, context_len=context_len, **{**given, **settings})


def the_job(admitted: list[Any]) -> CompressionJob:
    (job,) = [each for each in admitted if isinstance(each, CompressionJob)]
    return job


def second_job(drive: Driven) -> CompressionJob:
    """The job after the first segment, which is compressed; SGLang has not admitted it yet."""
    first = the_job(drive.step())
    drive.forward(first)
    drive.end(first)
    return the_job(drive.step())


def make_all(drive: Driven) -> list[int]:
    """Runs all jobs; the tokens that each of them prefilled."""
    prefilled = []
    while jobs := [each for each in drive.step() if isinstance(each, CompressionJob)]:
        job = jobs[0]
        drive.forward(job)
        prefilled.append(len(job.origin_input_ids) - job.prefix_len)
        drive.end(job)
    return prefilled


def test_each_segment_is_prefilled_after_the_compressed_ones_before_it() -> None:
    drive = driven()
    req = drive.ask(DOCUMENT)
    job = the_job(drive.step())
    assert (job.base, job.context.num_tokens, job.target) == (None, 128, req.context)
    drive.forward(job)
    assert drive.accounts() == (SIZE - 128 - 64, 0, 64)
    drive.end(job)
    job = the_job(drive.step())
    assert job.base is not None and job.base.num_tokens == 128 and job.position_offset == 64
    assert job.origin_input_ids == job.base.engine_ids + DOCUMENT[128:256]
    drive.forward(job)
    assert job.prefix_len == 64 and drive.accounts() == (SIZE - 64 - 128 - 128, 0, 64 + 128)
    drive.end(job)
    job = the_job(drive.step())
    drive.forward(job)
    assert job.origin_input_ids[128:] == DOCUMENT[256:] and job.context is job.target
    drive.end(job)
    assert drive.step() == [req]
    assert (report(req)["status"], report(req)["context_tokens"], req.position_offset) == ("compressed", 400, 200)
    assert drive.manager.metrics.to_dict()["compressions"] == 1
    # 64 and 128 slots of the beginnings, which can be evicted.
    assert drive.accounts() == (SIZE - 392, 392, 0)


def test_a_pool_that_cannot_hold_the_document_and_what_it_keeps_compresses_it() -> None:
    drive = driven(500)  # 400 + 200 do not fit; 144 and 128 and 200 do
    req = drive.ask(DOCUMENT)
    assert make_all(drive) == [128, 128, 144]
    assert drive.step() == [req] and report(req)["status"] == "compressed"
    whole = driven(500, segment_tokens=None)
    req = whole.ask(DOCUMENT)
    assert whole.step() == [req] and report(req)["reason"] == "pool_too_small"


LONG = array("q", range(1000, 1800))


def test_a_prompt_longer_than_the_pool_is_served_from_its_compressed_context() -> None:
    drive = driven(compression_ratio=0.8)  # 159 and 134 slots are kept of 800 and 672 tokens, beside one segment
    req = drive.ask(LONG, num_tokens=5)
    assert len(req.origin_input_ids) == 164, "what SGLang looks at when it arrives"
    assert sum(make_all(drive)) == 800
    assert drive.step() == [req] and report(req)["status"] == "compressed"
    assert len(req.origin_input_ids) == 164 and req.origin_input_ids[:159] == req.context.engine_ids
    assert req.position_offset == 641
    drive.evict_all()
    again = drive.ask(LONG, question=8, num_tokens=5)
    assert sum(make_all(drive)) == 800 and again in drive.step()


def test_a_prompt_longer_than_the_pool_that_cannot_be_compressed_ends_with_an_error() -> None:
    drive = driven(compression_ratio=0.8)
    for asked in ({"num_tokens": 5}, {"action": "compress"}):
        req = drive.ask(LONG, **asked)
        job = the_job(drive.step())
        drive.forward(job, kept=None)
        drive.end(job)
        with get_parallel().override(tp_rank=0):
            assert drive.step() == [req]
        assert isinstance(req.to_finish, FINISH_ABORT) and " tokens, more than the KV pool holds" in req.to_finish.message
        assert not req.is_virtual and len(req.origin_input_ids) == 1 and drive.engine.answered == []
        drive.engine.queue.remove(req)


@pytest.mark.parametrize(
    "settings",
    [
        {"segment_tokens": None},
        {"compression_ratio": 0.2},
        {"compression_ratio": 0.5},
        {"exact": "session"},
        {"context_len": 800},
        {"truncates": True},
    ],
    ids=str,
)
def test_other_prompts_longer_than_the_pool_are_left_to_sglang(settings: dict[str, Any]) -> None:
    plan, truncates = {"exact": settings.pop("exact", None)}, settings.pop("truncates", False)
    drive = driven(**{"compression_ratio": 0.8, **settings})
    drive.engine.truncates_prompts = truncates
    req = drive.ask(LONG, **plan)
    assert len(req.origin_input_ids) == 801 and not req.must_be_compressed


def test_a_prompt_is_as_long_as_it_was_when_it_arrived() -> None:
    """Also where its context is all of it, so that one token is left to generate from."""
    drive = driven(compression_ratio=0.8, context_len=1000)
    req = drive.ask(LONG, num_tokens=0)
    assert req.sampling_params.max_new_tokens == 4
    arrived = len(req.origin_input_ids)
    make_all(drive)
    assert drive.step() == [req] and len(req.origin_input_ids) == arrived
    again = drive.ask(LONG, question=8)
    again.sampling_params.max_new_tokens = None
    again.stand_in(10, most_new_tokens=197)
    assert again.sampling_params.max_new_tokens == 197


@pytest.mark.parametrize("ends", ["before its first pass", "while it waits again"])
def test_one_that_has_ended_never_shows_its_long_prompt_again(ends: str) -> None:
    drive = driven(compression_ratio=0.8)
    req = drive.ask(LONG, num_tokens=5)
    with get_parallel().override(tp_rank=0):
        if ends == "before its first pass":
            req.set_finish_with_abort("Failed to compile regex grammar")
        else:
            make_all(drive)
            drive.step()
            drive.engine.take(req)
            req.set_finish_with_abort("Its client left.")
            drive.manager.before_release(req, checkpoint=False)
            drive.engine.give_back(req)
            drive.engine.queue.append(req)
        assert req in drive.step() and len(req.origin_input_ids) == 1


def test_the_beginning_that_was_just_made_keeps_its_record() -> None:
    drive = driven(2000, max_contexts=3)
    for first in (5000, 6000):
        drive.compress(array("q", range(first, first + 100)))
    req = drive.ask(DOCUMENT)
    assert make_all(drive) == [128, 128, 144]
    assert req in drive.step() and report(req)["status"] == "compressed"


def test_deleting_one_text_leaves_the_beginning_that_another_is_made_of() -> None:
    drive = driven(2000)
    first = drive.ask(DOCUMENT)
    make_all(drive)
    drive.step()
    drive.engine.queue.remove(first)
    drive.ask(DOCUMENT[:256] + array("q", range(3000, 3144)), question=8)
    job = the_job(drive.step())
    assert job.base is not None and job.base.num_tokens == 256
    drive.manager.cache.delete(first.context)
    drive.manager.sweep()
    third = drive.ask(DOCUMENT[:256] + array("q", range(4000, 4144)), question=9)
    assert make_all(drive) == [144, 144]
    assert third in drive.step() and report(third)["status"] == "compressed"


def test_a_prompt_longer_than_the_pool_does_not_wait_for_an_idle_engine() -> None:
    drive = driven(when="idle", compression_ratio=0.8)
    req = drive.ask(LONG, num_tokens=5)
    assert the_job(drive.step()).target is req.context


def test_a_text_that_goes_on_starts_from_what_is_compressed() -> None:
    drive = driven(2000)
    drive.ask(DOCUMENT)
    assert make_all(drive) == [128, 128, 144]
    longer = drive.ask(DOCUMENT + array("q", range(2000, 2050)))  # 450 tokens, the last segment from 384 on
    assert make_all(drive) == [128, 66]
    assert longer in drive.step() and report(longer)["status"] == "compressed"


def test_beginnings_give_way_first() -> None:
    drive = driven()
    req = drive.ask(DOCUMENT)
    make_all(drive)
    drive.manager.room.make(drive.engine.free_slots() + 150)
    resident = [each.num_tokens for each in drive.manager.cache if each.state is ContextState.RESIDENT]
    assert resident == [400] and drive.accounts() == (SIZE - 200, 200, 0)
    assert drive.step() == [req] and req.is_virtual


def test_who_leaves_ends_the_chain_and_nothing_stays_locked() -> None:
    drive = driven()
    req = drive.ask(DOCUMENT)
    drive_job = the_job(drive.step())
    drive.forward(drive_job)
    req.to_finish = LEFT
    drive.engine.queue.remove(req)
    drive.end(drive_job)
    assert drive.step() == [] and drive.manager.jobs.all() == []
    assert drive.accounts() == (SIZE - 64, 64, 0)
    again = drive.ask(DOCUMENT, question=8)
    assert make_all(drive) == [128, 144]
    assert again in drive.step() and report(again)["status"] == "compressed"


def test_a_segment_that_fails_lets_the_questions_be_served_exactly() -> None:
    drive = driven()
    req = drive.ask(DOCUMENT)
    job = second_job(drive)
    drive.forward(job, kept=None)
    drive.end(job)
    assert job.skip_radix_cache_insert, "what was computed after compressed tokens must not be cached as exact"
    assert drive.step() == [req] and report(req)["status"] == "exact"
    assert drive.accounts() == (SIZE - 64, 64, 0)
    assert not any(each.is_queued for each in drive.manager.cache)


def test_an_aborted_segment_gives_back_its_base() -> None:
    drive = driven()
    drive.ask(DOCUMENT)
    job = second_job(drive)
    assert drive.accounts() == (SIZE - 64, 0, 64), "the base is held before its job is admitted"
    drive.engine.queue.remove(job)  # SGLang aborts it
    drive.manager.jobs.end_dead()
    assert drive.accounts() == (SIZE - 64, 64, 0)


def test_texts_with_one_beginning_wait_for_it_and_share_it() -> None:
    drive = driven(1200)
    first = drive.ask(DOCUMENT)
    second = drive.ask(DOCUMENT[:256] + array("q", range(3000, 3144)), question=8)
    admitted = drive.step()
    job = the_job(admitted)
    assert job.target is first.context and not isinstance(second, CompressionJob) and second not in admitted
    assert make_all(drive) == [128, 128, 144, 144]
    assert {first, second} <= set(drive.step())
    assert [report(each)["status"] for each in (first, second)] == ["compressed", "compressed"]


def test_a_flush_forgets_what_was_held() -> None:
    drive = driven()
    req = drive.ask(DOCUMENT)
    second_job(drive)
    drive.engine.tree.reset()  # SGLang is paused: then it flushes although a job waits
    drive.engine.tree.token_to_kv_pool_allocator.clear()
    drive.manager.after_flush()
    assert drive.manager.jobs.all() == [] and drive.engine.queue == [req]
    assert drive.accounts() == (SIZE, 0, 0)
    assert isinstance(req, ContextReq) and not any(each.num_holders for each in drive.manager.cache)


def test_a_beginning_that_blocks_others_is_given_up() -> None:
    """A prompt that does not fit beside it stands before its job, and nothing runs: SGLang admits neither."""
    drive = driven()
    req = drive.ask(DOCUMENT)
    job = the_job(drive.step())
    drive.forward(job)
    drive.end(job)
    for _ in range(MAX_STARVED_PASSES):
        assert drive.accounts() == (SIZE - 64, 0, 64)
        drive.step()
    assert drive.accounts() == (SIZE - 64, 64, 0)
    assert the_job(drive.step()).target is req.context  # and starts again
    assert drive.manager.cache.get(req.context.id) is req.context


@pytest.mark.parametrize("waits", ["asked ahead", "after the same beginning", "for room"])
def test_whoever_waits_for_an_idle_compression_has_it_run(waits: str) -> None:
    drive = driven(2000 if waits != "for room" else 560, when="idle")
    first = drive.ask(DOCUMENT, num_tokens=2)
    drive.step()
    drive.engine.queue.remove(first)
    job = the_job(drive.step())
    assert job.unattended
    drive.forward(job)
    drive.end(job)
    other = DOCUMENT[:256] + array("q", range(3000, 3144)) if waits == "after the same beginning" else DOCUMENT
    if waits == "for room":
        other = array("q", range(5000, 5400))
    req = drive.ask(other, question=8, action="compress")
    drive.step()
    assert sum(make_all(drive)) >= 272
    drive.step()
    assert drive.engine.answered == [req] and report(req)["status"] in ("compressed", "reused")


def test_a_job_whose_base_is_gone_runs_after_nothing() -> None:
    drive = driven()
    drive.ask(DOCUMENT)
    job = second_job(drive)
    job.error = "evicted"
    assert _context_before(job) is None


def test_segments_of_a_long_context_are_few_and_begin_where_those_of_a_shorter_one_do() -> None:
    settings = CompressionSettings.resolve({"method": "gate", "segment_tokens": 128})
    starts = settings.segment_starts(1 << 20, 1)
    assert len(starts) < 64 + 32 * 8 and starts == sorted(set(starts))
    shorter = settings.segment_starts(100_000, 1)
    assert len(set(starts) & set(shorter)) > 0.9 * len(shorter)


def test_beginnings_are_known_by_the_ids_that_they_have_as_contexts() -> None:
    drive = driven()
    context = drive.manager.cache.obtain(Namespace(None, None, None), drive.manager.settings.compression, DOCUMENT)
    assert context is not None
    found = drive.manager.cache.beginnings(context)
    assert [start for start, _ in found] == [128, 256]
    for start, identity in found:
        own = drive.manager.cache.obtain(context.namespace, context.settings, DOCUMENT[:start])
        assert own is not None and own.id == identity


def test_records_of_beginnings_go_before_those_of_contexts() -> None:
    drive = driven(3000, max_contexts=4)
    asked = drive.ask(DOCUMENT)
    make_all(drive)
    drive.step()
    drive.engine.queue.remove(asked)
    for first in (2000, 4000):
        drive.compress(array("q", range(first, first + 100)))
    assert drive.manager.cache.get(asked.context.id) is asked.context
    assert sum(each.is_segment for each in drive.manager.cache) == 1


def test_deleting_a_context_deletes_what_it_was_made_of() -> None:
    drive = driven()
    req = drive.ask(DOCUMENT)
    make_all(drive)
    drive.step()
    drive.engine.queue.remove(req)
    drive.manager.cache.delete(req.context)
    drive.manager.sweep()
    assert list(drive.manager.cache) == [] and drive.accounts() == (SIZE, 0, 0)


def test_the_tokens_of_a_beginning_count_as_cached() -> None:
    drive = driven(2000)
    drive.ask(DOCUMENT)
    make_all(drive)
    drive.ask(DOCUMENT[:300] + array("q", range(2000, 2100)))
    job = the_job(drive.step())
    job.cached_tokens = job.base.num_slots  # as SGLang counts them
    assert job.context_cached_tokens == 256


def test_cached_text_gives_way_before_beginnings() -> None:
    drive = driven(1000)
    req = drive.ask(DOCUMENT)
    make_all(drive)
    drive.step()
    drive.engine.queue.remove(req)
    slots = drive.engine.tree.token_to_kv_pool_allocator.alloc(550)
    drive.engine.tree.insert(InsertParams(key=RadixKey(array("q", range(7000, 7550)), None), value=slots))
    drive.manager.room.make(300)  # 58 are free; what else it takes is cached exactly
    assert sum(each.is_segment for each in drive.manager.cache) == 2


def test_progress_counts_the_tokens_of_the_whole_context() -> None:
    drive = driven()
    drive.ask(DOCUMENT)
    job = the_job(drive.step())
    assert job.progress == (0, 400)
    drive.forward(job)
    drive.end(job)
    job = the_job(drive.step())
    assert job.progress == (128, 400)
