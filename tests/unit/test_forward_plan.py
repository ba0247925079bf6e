"""Which row of a batch stands behind which context: decided by position, never by a name that a client chose."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from obcache_sglang.compress.replay import ReplayPass
from obcache_sglang.errors import HostError
from obcache_sglang.kv.context import SHARED, Context, Namespace
from obcache_sglang.messages import Plan
from obcache_sglang.scheduler.forward import ForwardPlan
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq, JobId
from obcache_sglang.settings import CompressionSettings
from tests.unit.engine import KEPT

HALF = CompressionSettings.resolve({"compression_ratio": 0.5, "budget": "uniform"})


@pytest.fixture
def plan() -> ForwardPlan:
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    pools = {"device": "cpu", "enable_memory_saver": False}
    kv_pool = MHATokenToKVPool(size=100, page_size=1, dtype=torch.float32, head_num=1, head_dim=8, layer_num=1, **pools)
    return ForwardPlan(kv_pool, ReqToTokenPool(size=4, max_context_len=100, **pools))


def behind_context(rid: str, first: int) -> ContextReq:
    """A request behind a context of 20 tokens that keeps 10."""
    tokens = array("q", range(first, first + 20))
    context = Context(f"{first:032x}", Namespace(None, None, None), HALF, tokens, 10, array("q", range(1 << 61, (1 << 61) + 10)))
    context.kept = KEPT
    fields = (rid, "", tokens + array("q", [5]), SamplingParams())
    req = ContextReq(*fields, plan=Plan(20, HALF), count_exact=lambda reason: None)
    req.use_context(context, cached_tokens=20)
    return req


def batch_of(*reqs: Req) -> tuple[Any, Any]:
    """(a decode batch, its ForwardBatch), of requests at position 100, 101, ..."""
    positions = torch.arange(100, 100 + len(reqs))
    mode = SimpleNamespace(is_extend=lambda: False)
    return SimpleNamespace(reqs=list(reqs), extend_lens=None), SimpleNamespace(
        rids=[req.rid for req in reqs], positions=positions, forward_mode=mode
    )


def test_requests_of_one_name_keep_their_own_rows(plan: ForwardPlan) -> None:
    mine, other, plain = behind_context("same", 0), behind_context("same", 50), Req("same", "", array("q", [5]), SamplingParams())
    batch, forward_batch = batch_of(plain, mine, other)
    plan.plan_forward(forward_batch, batch)
    assert plan.contexts(forward_batch) == [None, mine.context.resident, other.context.resident]
    assert forward_batch.positions.tolist() == [100, 111, 112]


def test_a_request_named_like_a_job_does_not_move_it(plan: ForwardPlan) -> None:
    hostile = behind_context("j" * 32, 0)
    job = CompressionJob(behind_context("x", 50).context, hostile, rid="j" * 32)
    batch, forward_batch = batch_of(job, hostile)
    plan.plan_forward(forward_batch, batch)
    assert forward_batch.positions.tolist() == [100, 111]
    assert plan.contexts(forward_batch) == [None, hostile.context.resident]


def test_a_part_of_a_batch_is_an_error_not_a_guess(plan: ForwardPlan) -> None:
    batch, forward_batch = batch_of(behind_context("a", 0), behind_context("b", 50))
    plan.plan_forward(forward_batch, batch)
    half = SimpleNamespace(rids=forward_batch.rids[:1])
    with pytest.raises(HostError, match="another batch"):
        plan.contexts(half)
    assert plan.contexts(SimpleNamespace(rids=None)) is None


def test_without_a_plan_nobody_reads_at_wrong_positions(plan: ForwardPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this rank, or on another one that this one only hears of."""
    for agrees in (lambda vote: vote, lambda vote: False):
        plan.agree = agrees
        virtual, plain = behind_context("a", 0), Req("b", "", array("q", [5]), SamplingParams())
        batch, forward_batch = batch_of(virtual, plain)
        if agrees(True):
            monkeypatch.setattr(plan, "_plan", lambda *args: 1 / 0)
        plan.plan_forward(forward_batch, batch)
        assert isinstance(virtual.to_finish, FINISH_ABORT) and virtual.to_finish.status_code == 500
        assert virtual.skip_radix_cache_insert
        assert plain.to_finish is None
        assert plan.contexts(forward_batch) is None
        monkeypatch.undo()


def test_ordinary_batches_take_no_vote(plan: ForwardPlan) -> None:
    plan.agree = lambda vote: 1 / 0
    batch, forward_batch = batch_of(Req("b", "", array("q", [5]), SamplingParams()))
    plan.plan_forward(forward_batch, batch)
    assert plan.contexts(forward_batch) is None


@pytest.mark.parametrize(("first", "sees"), [(80, [*range(8), *range(16, 90)]), (50, range(90))], ids=["far", "near"])
def test_a_local_pass_sees_its_chunk_what_is_before_and_the_first_tokens(plan: ForwardPlan, first: int, sees: Any) -> None:
    """At the positions after the whole context."""
    tokens = array("q", range(100))
    settings = CompressionSettings.resolve({"method": "replay", "replay_attention": "local"})
    context, like = Context("0" * 32, SHARED, settings, tokens, 50), behind_context("x", 0)
    passes = [ReplayPass(array("q", [7] * 5), first, 90, True), ReplayPass(array("q", [7]), 90, 100, True)]
    job = CompressionJob(context, CompressionJob(context, like, rid="a" * 32, passes=passes), rid="b" * 32)
    job.kv.req_pool_idx = 2
    batch = SimpleNamespace(reqs=[job], prefix_lens=[90], extend_lens=[5])
    mode = SimpleNamespace(is_extend=lambda: True)
    forward_batch = SimpleNamespace(rids=[job.rid], positions=torch.arange(90, 95), forward_mode=mode)
    plan.plan_forward(forward_batch, batch)
    assert forward_batch.positions.tolist() == list(range(100, 105))
    (seen,) = plan.contexts(forward_batch)
    assert seen.is_uneven == (first == 80)
    assert seen.kept.positions.tolist() == [*range(seen.num_exact)] and seen.kept.bounds == [0, seen.num_exact]
    assert [*range(seen.num_exact), *range(seen.num_slots, 90)] == [*sees]
    (planned,) = plan._rows
    assert (planned[1].num_rows, planned[1].first_position) == (5, 90)
    job.error = "evicted"  # its ids are not the context's any more
    plan.plan_forward(forward_batch, batch)
    assert plan.contexts(forward_batch) is None


def test_only_its_whole_name_ends_a_job() -> None:
    job = JobId("ab" * 16)
    assert not any(job.startswith(prefix) for prefix in ("", "a", "ab" * 15))
    assert job.startswith("ab" * 16)
