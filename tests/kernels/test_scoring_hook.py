"""The scoring hook with the GPU kernel keeps what it keeps with torch: positions, and the K and V that it copies."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

from obcache_sglang.compress.compression import Compression, ScoringRows
from obcache_sglang.compress.replay import ReplayPass
from obcache_sglang.compress.scores import accumulate_scores_in_slots
from obcache_sglang.gpu.score_kernel import accumulate_scores_paged
from obcache_sglang.kv.cells import KeptTokens, create_one_space
from obcache_sglang.kv.context import Context, Namespace
from obcache_sglang.scheduler.forward import ForwardPlan
from obcache_sglang.settings import CompressionSettings
from tests.kernels.conftest import DEVICE

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 2, 2, 3, 64
CONTEXT, PASS, ROWS = 150, 40, 20
NUM_SLOTS = 50


@dataclass
class Job:
    """What the forward reads and writes of a CompressionJob."""

    context: Context
    compression: Compression
    slots: torch.Tensor
    error: str | None = None
    scoring_seconds: float = 0.0

    @property
    def kept(self) -> KeptTokens | None:
        return self.compression.kept


class Pool(MHATokenToKVPool):
    def _create_buffers_normal(self) -> None:
        assert create_one_space(self)


def compress(
    accumulate: object, wish: dict[str, object], judges: int, *, value: float | None = None
) -> tuple[Job, MHATokenToKVPool]:
    """A context of CONTEXT tokens whose last chunk, of ROWS tokens or of a replay's pass, is computed in one forward.

    judges: the last tokens of that chunk, which stand behind the context. value: of one V of the context, in the last layer.
    """
    torch.manual_seed(3)
    settings = CompressionSettings.resolve(wish)
    replayed = settings.method == "replay"
    num_tokens = CONTEXT + (PASS if replayed else judges)
    pool = Pool(400, 1, torch.float32, KV_HEADS, HEAD_DIM, layer_num=LAYERS, device=DEVICE, enable_memory_saver=False)
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer.normal_()
    req_to_token = ReqToTokenPool(2, 512, DEVICE, enable_memory_saver=False)
    taken = torch.randperm(399, device=DEVICE) + 1
    if value is not None:
        pool.v_buffer[-1][taken[70], 1] = value
    tokens = array("q", range(CONTEXT))
    context = Context("0f" * 16, Namespace(None, None, None), settings, tokens, NUM_SLOTS, judges=array("q", range(judges)))
    job = Job(context, Compression(context), taken[num_tokens : num_tokens + NUM_SLOTS])
    if replayed:
        job.compression.next_pass(ReplayPass(array("q", range(PASS)), 30, 60))
    first = CONTEXT if replayed else num_tokens - ROWS
    gains = torch.linspace(0.1, 3, KV_HEADS * GROUP, device=DEVICE)
    plan = ForwardPlan(pool, req_to_token, accumulate, {0: gains, 1: gains.flip(0)})
    plan._rows = [(job, ScoringRows(5, num_tokens - first, first, taken[:num_tokens], last=True))]
    plan._rids, plan._has_scored_rows = ["job"], True
    for layer_id in range(LAYERS):
        layer = RadixAttention(KV_HEADS * GROUP, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id=layer_id)
        shape = (5 + num_tokens - first, KV_HEADS * GROUP * HEAD_DIM)
        q, output = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE) / 4
        plan.after_attention(q, output, layer, SimpleNamespace(rids=["job"]))
    assert (job.error is None) == (value is None)
    return job, pool


@pytest.mark.parametrize(
    ("wish", "judges"),
    [
        ({"method": "snapkv", "score": "obcache-kv", "budget": "adakv", "window": ROWS}, 0),
        ({"method": "snapkv", "score": "attention", "budget": "uniform", "window": ROWS}, 0),
        ({"method": "snapkv", "score": "obcache-k", "budget": "uniform", "window": ROWS}, 2),
        ({"method": "replay", "score": "obcache-v", "budget": "global"}, 0),
        ({"preset": "kvzip"}, 0),
    ],
    ids=str,
)
def test_the_kernel_keeps_what_torch_keeps(wish: dict[str, object], judges: int) -> None:
    expected, expected_pool = compress(accumulate_scores_in_slots, wish, judges)
    job, pool = compress(accumulate_scores_paged, wish, judges)
    assert job.kept is not None and expected.kept is not None
    assert torch.equal(job.kept.offsets, expected.kept.offsets)
    assert torch.equal(job.kept.positions, expected.kept.positions)
    for buffers in ("k_buffer", "v_buffer"):
        for got, wanted in zip(getattr(pool, buffers), getattr(expected_pool, buffers), strict=True):
            assert torch.equal(got, wanted)
    scattered = compress(accumulate_scores_in_slots, wish | {"sink_tokens": 30}, judges)[0]
    assert not torch.equal(scattered.kept.positions, expected.kept.positions)  # the comparison can fail


def kept_by_head(wish: dict[str, object]) -> list[set[int]]:
    """Of all heads of all layers, the positions that each keeps."""
    kept = compress(accumulate_scores_in_slots, wish, 0)[0].kept
    assert kept is not None
    return [set(some.tolist()) for some in kept.positions.split(kept.offsets.diff().tolist())]


@pytest.mark.parametrize("recent_tokens", [0, 8])
def test_measured_errors_divide_a_replay_whatever_its_score(recent_tokens: int) -> None:
    """Attention scores, still KVzip's statistic, order each head's tokens; how many it keeps is measured."""
    wish = {"method": "replay", "score": "attention", "budget": "global", "recent_tokens": recent_tokens}
    measured, by_scores = (kept_by_head(wish | {"normalization": each}) for each in ("layer", "none"))
    assert [len(each) for each in measured] != [len(each) for each in by_scores]
    assert sum(map(len, measured)) == sum(map(len, by_scores)) == NUM_SLOTS * LAYERS * KV_HEADS
    assert all(one <= other or other <= one for one, other in zip(measured, by_scores, strict=True))


@pytest.mark.parametrize("recent_tokens", [0, 8])
def test_preset_kvzip_is_divided_by_its_scores_alone(recent_tokens: int) -> None:
    wish = {"preset": "kvzip", "recent_tokens": recent_tokens}
    assert kept_by_head(wish) == kept_by_head(wish | {"normalization": "none"})


@pytest.mark.parametrize("score", ["attention", "obcache-v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_measured_error_that_is_no_number_fails_the_compression(
    caplog: pytest.LogCaptureFixture, score: str, value: float
) -> None:
    """Values that are no numbers, or whose squares overflow: the context is served exactly."""
    wish = {"method": "replay", "score": score, "budget": "global"}
    job, _ = compress(accumulate_scores_in_slots, wish, 0, value=value)
    assert job.error == "error" and job.kept is None
    assert "errors of head 3 of 4 are not finite" in caplog.text
