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

from obcache_sglang.errors import HostError
from obcache_sglang.kv.context import Context, Namespace
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


def test_only_its_whole_name_ends_a_job() -> None:
    job = JobId("ab" * 16)
    assert not any(job.startswith(prefix) for prefix in ("", "a", "ab" * 15))
    assert job.startswith("ab" * 16)
