"""SGLang's attention backends on a GPU, each with the graphs that a server captures: `pytest -m long` where there is one.

SGLang's GPU kernels take 16 bits, so nothing is equal here. A backend keeps nearly the positions that transformers' queries, keys
and values in float32 choose, and gives its tokens nearly the probabilities that transformers gives them with the same positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from obcache_sglang.local_server import Server
from obcache_sglang.settings import CompressionSettings
from tests.serving.client import QUESTIONS, generate, generate_together, question, report
from tests.serving.conftest import serving
from tests.serving.test_exactness import NUM_TOKENS, Positions, attending_to, model, read
from tests.serving.test_positions import kept_by_server, share_kept
from tests.unit.test_kvpress import CONTEXT_LEN, FIXTURE, Layer, kept_by_us, layers, run_model

__all__ = ["layers", "model", "run_model"]  # fixtures

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WISHES: list[dict[str, Any]] = [
    {"method": "tova", "score": "obcache-k", "budget": "uniform"},
    {"method": "tova", "score": "attention", "budget": "adakv"},
    {"method": "snapkv", "score": "obcache-kv", "budget": "adakv"},
    {"method": "h2o", "score": "obcache-v", "window": "all", "budget": "uniform"},
]


@pytest.fixture(scope="module", params=["triton", "fa3", "flashinfer", "flashinfer-heads"])
def gpu_server(
    request: pytest.FixtureRequest, model_dir_bf16: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Prefill in chunks of 512 tokens; decode graphs, ours too, but where FlashInfer attends heads of different length."""
    backend, _, heads = request.param.partition("-")
    if backend == "fa3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FlashAttention 3 needs a Hopper GPU")
    flags = ("--attention-backend", backend, "--max-total-tokens", "32768", "--chunked-prefill-size", "512")
    flags += ("--cuda-graph-max-bs-decode", "16", "--obcache", "--obcache-min-tokens", "32")
    flags += ("--obcache-head-attention", "flashinfer") if heads else ("--obcache-decode-graphs", "on")
    yield from serving(model_dir_bf16, tmp_path_factory.mktemp(request.param), flags)


@pytest.fixture(scope="module")
def exact_cache(model: PreTrainedModel) -> DynamicCache:
    return read(model, FIXTURE["token_ids"])


@torch.inference_mode()
def logprobs(
    model: PreTrainedModel, cache: DynamicCache, ids: list[int], answer: list[int], positions: Positions
) -> torch.Tensor:
    """Of each token of `answer` after ids and a context of which each head keeps `positions`. Leaves the cache as it was."""
    length = cache.get_seq_length()
    with attending_to(model, positions, length):
        logits = model(torch.tensor([ids + answer[:-1]]), past_key_values=cache, logits_to_keep=len(answer)).logits[0]
    cache.crop(length - cache.get_seq_length())
    return logits.float().log_softmax(-1)[torch.arange(len(answer)), answer]


def asked(wish: dict[str, Any], text: str, model_dir: Path) -> dict[str, Any]:
    return {
        "prompt": FIXTURE["token_ids"] + question(model_dir, text),
        "obcache": wish,
        "max_new_tokens": NUM_TOKENS,
        "sampling_params": {"ignore_eos": True},
        "return_logprob": True,
    }


def served_logprobs(answer: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"]])


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: "-".join(map(str, wish.values())))
def test_keeps_what_float32_keeps(gpu_server: Server, layers: list[Layer], wish: dict[str, Any]) -> None:
    wish = {"compression_ratio": 0.7, **wish}
    share = share_kept(kept_by_server(gpu_server, **wish), kept_by_us(layers, CompressionSettings.resolve(wish)))
    print(f"{share:.2%} in common")
    assert share >= 0.97
    assert "gave no log-sum-exps" not in gpu_server.log()


@pytest.mark.parametrize("budget", ["uniform", "adakv", "global"])
def test_reads_what_it_kept(
    gpu_server: Server, model: PreTrainedModel, exact_cache: DynamicCache, model_dir: Path, budget: str
) -> None:
    """Behind heads of equal and of different length; the questions at once, and each alone."""
    wish = {"context_len": CONTEXT_LEN, "method": "snapkv", "score": "obcache-v", "compression_ratio": 0.8, "budget": budget}
    requests = [asked(wish, text, model_dir) for text in QUESTIONS]
    together = generate_together(gpu_server, requests)
    alone = [generate(gpu_server, **request) for request in requests]
    context_id = report(together[0])["context_id"]
    positions = gpu_server.get(f"/obcache/contexts/{context_id}", params={"positions": "true"})["positions"]
    last = [[list(range(CONTEXT_LEN - len(head), CONTEXT_LEN)) for head in layer] for layer in positions]
    off, off_elsewhere = [], []
    for request, answer in zip(requests * 2, together + alone, strict=True):
        ids = request["prompt"][CONTEXT_LEN:]
        served = served_logprobs(answer)
        off.append((served - logprobs(model, exact_cache, ids, answer["output_ids"], positions)).abs())
        off_elsewhere.append((served - logprobs(model, exact_cache, ids, answer["output_ids"], last)).abs())
    print(
        f"log-probabilities are off by {torch.cat(off).mean():.4f}, by {torch.cat(off_elsewhere).mean():.3f} with other positions"
    )
    assert torch.cat(off).mean() < 0.05 and max(map(torch.max, off)) < 0.5
    assert torch.cat(off_elsewhere).mean() > 0.1  # shows that this can fail


def test_a_batch_of_every_kind(gpu_server: Server, model_dir: Path) -> None:
    """Exact requests, and ones behind even and uneven contexts: in one decode batch each gets the tokens it gets alone."""
    wishes: list[Any] = [False]
    wishes += [{"context_len": CONTEXT_LEN, "compression_ratio": 0.8, **wish} for wish in WISHES]
    requests = [asked(wish, text, model_dir) for wish in wishes for text in QUESTIONS]
    alone = [generate(gpu_server, **request) for request in requests]
    together = generate_together(gpu_server, requests)
    same = [a["output_ids"] == b["output_ids"] for a, b in zip(alone, together, strict=True)]
    first = [abs(served_logprobs(a) - served_logprobs(b))[0] for a, b in zip(alone, together, strict=True)]
    print(f"{sum(same)} of {len(same)} answers are the same; the first token's log-probability is off by {max(first):.4f}")
    assert max(first) < 0.25
    assert sum(same) >= len(same) // 2  # in 16 bits near ties fall both ways
    if "capturing decode graphs for contexts with per-head budgets" in gpu_server.log():
        decode_batches = re.findall(r"Decode batch.*cuda graph: (\w+)", gpu_server.log())
        assert decode_batches and set(decode_batches) == {"True"}
