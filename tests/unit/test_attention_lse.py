"""Log-sum-exps out of SGLang's GPU attention backends.

SGLang's FlashInfer backend runs with wrappers that compute in torch what FlashInfer documents, and FlashAttention's module, which
cannot be imported without CUDA, is read as text: no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from sglang.srt.layers.attention import flashinfer_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from obcache_sglang.gpu.attention_lse import leave_lse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HEADS, KV_HEADS, HEAD_DIM, SCALE = 6, 2, 64, 0.125
TOKENS = 40


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, sm_scale: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and log-sum-exps to base 2, [rows, heads], as FlashInfer's wrappers return them for one request."""
    k, v = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
    logits = torch.einsum("ihd,jhd->hij", q, k) * sm_scale
    if causal:
        logits = logits.masked_fill(
            torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1), float("-inf")
        )
    return torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).contiguous(), logits.logsumexp(-1).T / math.log(2)


class Wrapper:
    """seen: the slots of a paged wrapper's tokens; None for a ragged wrapper, which is given K and V."""

    def __init__(self, seen: slice | None) -> None:
        self.seen = seen

    def forward_return_lse(self, q: torch.Tensor, *kv: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(q, *(kv if self.seen is None else (each[self.seen] for each in kv[0])), **arguments)

    def forward(self, *args: Any, **arguments: Any) -> torch.Tensor:
        return self.forward_return_lse(*args, **arguments)[0]


def merge(a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's merge_state."""
    return torch.lerp(a, b, torch.sigmoid((b_lse - a_lse) * math.log(2)).unsqueeze(-1)), torch.logaddexp2(a_lse, b_lse)


class Plan:
    """What `leave_lse` knows of a ForwardPlan."""

    def __init__(self, scores: bool = True) -> None:
        self.row_lse: torch.Tensor | None = None
        self._scores = scores

    def is_scored(self, forward_batch: object) -> bool:
        return self._scores


class FlashInferOnHost(FlashInferAttnBackend):
    """SGLang's backend with what its `forward` reads; its own constructor needs a GPU."""

    def __init__(self, pool: MHATokenToKVPool, metadata: SimpleNamespace) -> None:
        self.token_to_kv_pool = pool
        self.num_wrappers, self.is_dllm_model, self.prefill_uses_dequant_workspace = 1, False, False
        self.kv_cache_quant_method = SimpleNamespace(needs_global_scale=lambda: False)
        self.prefill_wrapper_ragged = Wrapper(None)
        self.forward_metadata = metadata


def flashinfer(cached: int, ragged: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[FlashInferAttnBackend, Any]:
    """SGLang's backend before a forward of TOKENS - cached new tokens, and the arguments of its `forward`."""
    torch.manual_seed(0)
    monkeypatch.setattr(flashinfer_backend, "_safe_merge_state", merge, raising=False)
    pool = MHATokenToKVPool(64, 1, torch.float32, KV_HEADS, HEAD_DIM, layer_num=1, device=DEVICE, enable_memory_saver=False)
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer.normal_()
    metadata = SimpleNamespace(
        prefill_wrappers=[Wrapper(slice(1, 1 + (cached if ragged else TOKENS)))],
        use_ragged=ragged,
        extend_no_prefix=cached == 0,
        multi_item_params=None,
        swa_out_cache_loc=None,
    )
    backend = FlashInferOnHost(pool, metadata)
    layer = RadixAttention(HEADS, HEAD_DIM, SCALE, KV_HEADS, layer_id=0)
    new = TOKENS - cached
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.zeros(new, dtype=torch.int64, device=DEVICE),
        req_pool_indices=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        seq_lens=torch.tensor([TOKENS], device=DEVICE),
        out_cache_loc=torch.arange(1 + cached, 1 + TOKENS, device=DEVICE),
        seq_lens_sum=TOKENS,
    )
    q = torch.randn(new, HEADS * HEAD_DIM, device=DEVICE)
    k, v = torch.randn(2, new, KV_HEADS, HEAD_DIM, device=DEVICE).unbind()
    return backend, (q, k, v, layer, batch)


@pytest.mark.parametrize(("cached", "ragged"), [(0, True), (15, True), (15, False)])
def test_flashinfer_leaves_the_log_sum_exps_of_all_that_a_row_sees(
    cached: int, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, arguments = flashinfer(cached, ragged, monkeypatch)
    unhooked = backend.forward(*arguments)
    plan = Plan()
    output = leave_lse(backend, plan)(*arguments)
    assert torch.equal(output, unhooked)
    pool = backend.token_to_kv_pool
    k, v = (buffer[1 : 1 + TOKENS] for buffer in (pool.k_buffer[0], pool.v_buffer[0]))
    expected, lse = attend(arguments[0].view(-1, HEADS, HEAD_DIM), k, v, causal=True, sm_scale=SCALE)
    torch.testing.assert_close(output, expected.flatten(1))
    assert plan.row_lse is not None and plan.row_lse.dtype == torch.float32
    torch.testing.assert_close(plan.row_lse, lse * math.log(2))  # natural ones
    for wrapper in (backend.prefill_wrapper_ragged, *backend.forward_metadata.prefill_wrappers):
        assert not {"forward", "forward_return_lse"} & vars(wrapper).keys()  # nothing of ours stays


def test_forwards_that_score_nothing_take_the_backends_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, arguments = flashinfer(0, True, monkeypatch)
    monkeypatch.setattr(Wrapper, "forward_return_lse", lambda *_, **__: pytest.fail("nobody asked for it"))
    monkeypatch.setattr(Wrapper, "forward", lambda self, q, *_, **__: q)
    plan = Plan(scores=False)
    assert torch.equal(leave_lse(backend, plan)(*arguments), arguments[0])
    assert plan.row_lse is None


@pytest.mark.parametrize("wrapper", [BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper])
def test_flashinfers_two_calls_take_the_same(wrapper: Any) -> None:
    plain, with_lse = (inspect.signature(function).parameters for function in (wrapper.forward, wrapper.forward_return_lse))
    assert list(plain) == list(with_lse)
    assert [each.default for each in plain.values()] == [each.default for each in with_lse.values()]
    run = inspect.signature(wrapper.run).parameters
    assert (run["lse_base"].default, run["lse_layout"].default) == ("log2", "NH")


class Asked(AttentionBackend):
    """A backend with FlashAttention's way: log-sum-exps when asked. broken: it raises then."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.calls: list[bool] = []

    def forward_extend(
        self,
        q: torch.Tensor,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        return_lse: bool = False,
    ) -> Any:
        self.calls.append(return_lse)
        if return_lse and self.broken:
            raise RuntimeError("This extend path does not return an LSE.")
        return (q + 1, torch.full((len(q), HEADS), 3.0)) if return_lse else q + 1


def test_a_backend_that_returns_them_is_asked_when_a_context_is_scored() -> None:
    backend, batch = Asked(), SimpleNamespace(forward_mode=ForwardMode.EXTEND)
    plan = Plan()
    q = torch.zeros(4, 8)
    assert torch.equal(leave_lse(backend, plan)(q, None, None, None, batch, save_kv_cache=True), q + 1)
    assert plan.row_lse is not None and plan.row_lse.shape == (4, HEADS)
    leave_lse(backend, Plan(scores=False))(q, None, None, None, batch)
    assert backend.calls == [True, False]


def test_a_failure_is_served_without_and_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    backend, batch = Asked(broken=True), SimpleNamespace(forward_mode=ForwardMode.EXTEND)
    plan = Plan()
    forward = leave_lse(backend, plan)
    q = torch.zeros(4, 8)
    for _ in range(2):
        assert torch.equal(forward(q, None, None, None, batch), q + 1)
    assert backend.calls == [True, False, False] and plan.row_lse is None
    assert "Asked gave no log-sum-exps" in caplog.text


def test_backends_without_them_keep_their_forward() -> None:
    backend = SimpleNamespace(forward=print, forward_extend=lambda q, k, v, layer, forward_batch, save_kv_cache=True: q)
    assert leave_lse(backend, Plan()) is print


def test_flash_attentions_backend_still_takes_return_lse() -> None:
    package = importlib.util.find_spec("sglang.srt.layers.attention")
    assert package is not None and package.submodule_search_locations
    source = Path(package.submodule_search_locations[0], "flashattention_backend.py").read_text()
    extend = source[source.index("def forward_extend(") : source.index("def forward_decode(")]
    assert "return_lse: bool = False" in extend
    assert "extend_lse = softmax_lse.T.contiguous()" in extend and "return o, extend_lse" in extend
