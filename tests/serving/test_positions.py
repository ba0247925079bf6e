"""The positions a real server keeps: KVPress's own, and the same whether or not the window spans two prefill chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from obcache_sglang.config import CompressionSettings
from obcache_sglang.scoring.head_budgets import divide_by_errors, kept_numbers, sampled_rows
from obcache_sglang.scoring.reference import attention, pruning_errors, score_tokens
from obcache_sglang.server import Server
from tests.serving.client import generate, report
from tests.unit.test_kvpress import (
    CONTEXT_LEN,
    FIXTURE,
    KVZIP_RUNS,
    Layer,
    as_asked,
    kept_by_kvpress,
    kept_by_us,
    layers,
    run_model,
    run_name,
    share_in_common,
)

__all__ = ["layers", "run_model"]  # fixtures


def kept_by_server(server: Server, *, token_ids: list[int] = FIXTURE["token_ids"], **settings: Any) -> list[list[set[int]]]:
    return kept_by_context(server, server.post("/obcache/compress", {"input_ids": token_ids, **settings})["id"])


def kept_by_context(server: Server, context_id: str) -> list[list[set[int]]]:
    positions = server.get(f"/obcache/contexts/{context_id}", params={"positions": "true"})["positions"]
    return [[set(head) for head in layer] for layer in positions]


def share_kept(kept: list[list[set[int]]], wanted: list[list[set[int]]]) -> float:
    """Share of the wanted positions that are kept, head by head."""
    pairs = [pair for ours, theirs in zip(kept, wanted, strict=True) for pair in zip(ours, theirs, strict=True)]
    return sum(len(ours & theirs) for ours, theirs in pairs) / sum(len(theirs) for _, theirs in pairs)


@pytest.mark.parametrize("run", FIXTURE["runs"], ids=run_name)
def test_the_server_keeps_what_kvpress_keeps(server: Server, run: dict[str, Any]) -> None:
    """0.6 % are left for scores that differ by float32 noise and swap places at the edge of the kept set."""
    assert share_in_common(kept_by_server(server, **as_asked(run)), run) >= 0.994


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if "-300" in name else pytest.mark.long) for name in KVZIP_RUNS])
def test_the_server_keeps_what_kvzip_keeps(server: Server, name: str) -> None:
    """KVPress rounds once over all heads, we once for each: it may keep up to one token a head more."""
    run = KVZIP_RUNS[name]
    wish = {"preset": "kvzip", "compression_ratio": run["compression_ratio"], "replay_chunk": run["chunk_size"]}
    kept = [head for layer in kept_by_server(server, token_ids=FIXTURE["kvzip"]["token_ids"], **wish) for head in layer]
    wanted = [kept_by_kvpress(bits) for layer in run["kept"] for bits in layer]
    num_kept = sum(map(len, kept))
    assert 0 <= sum(map(len, wanted)) - num_kept <= len(kept)
    assert sum(len(ours & theirs) for ours, theirs in zip(kept, wanted, strict=True)) >= 0.994 * num_kept


@pytest.mark.parametrize(
    "wish",
    [
        {"method": "tova", "score": "obcache-v", "budget": "uniform"},
        {"method": "snapkv", "score": "obcache-kv", "budget": "adakv"},
        {"method": "h2o", "window": "all", "score": "attention", "budget": "uniform"},
    ],
    ids=lambda wish: wish["method"],
)
def test_in_mode_prompt_the_last_query_scores_too(server: Server, layers: list[Layer], wish: dict[str, Any]) -> None:
    """The context is all of the prompt but its last token, whose query is the one that looks for the answer."""
    wish = {"compression_ratio": 0.7, **wish}
    prompt = FIXTURE["token_ids"]
    answer = generate(server, prompt, obcache={"mode": "prompt", **wish}, max_new_tokens=1)
    assert (report(answer)["status"], report(answer)["context_tokens"]) == ("compressed", CONTEXT_LEN - 1)
    kept = kept_by_context(server, report(answer)["context_id"])
    wanted = kept_by_us(layers, CompressionSettings.resolve(wish), judges=1)
    assert share_kept(kept, wanted) >= 0.994


def test_a_context_of_mode_prompt_is_found_by_its_id(server: Server) -> None:
    """Also with a whole prompt, whose own last token differs."""
    prompt = FIXTURE["token_ids"][:301]
    wish = {"mode": "prompt", "method": "tova"}
    made = generate(server, prompt, obcache=wish, max_new_tokens=4)
    by_id = generate(server, prompt[-1:], obcache={"context_id": report(made)["context_id"]}, max_new_tokens=4)
    assert report(by_id)["status"] == "reused"
    assert by_id["output_ids"] == made["output_ids"]
    other = generate(server, [*prompt[:-1], prompt[5]], obcache=wish, max_new_tokens=4)
    assert report(other)["status"] == "compressed" and report(other)["context_id"] != report(made)["context_id"]


@pytest.mark.parametrize(("method", "window", "budget"), [("snapkv", 400, "adakv"), ("h2o", "all", "uniform")])
def test_a_window_that_spans_two_chunks_scores_as_one(
    server: Server, layers: list[Layer], method: str, window: int | str, budget: str
) -> None:
    """The server prefills 841 tokens in chunks of 512; transformers in one piece."""
    wish = {
        "method": method,
        "window": window,
        "compression_ratio": 0.5,
        "preset": "kvpress",
        "score": "obcache-kv",
        "budget": budget,
    }
    settings = CompressionSettings.resolve(wish)
    assert settings.window == 0 or CONTEXT_LEN - settings.window < 512
    assert share_kept(kept_by_server(server, **wish), kept_by_us(layers, settings)) >= 0.994


@pytest.mark.parametrize("score", ["attention", "obcache-v", "obcache-kv"])
def test_a_global_budget_keeps_what_its_definition_says(server: Server, layers: list[Layer], model_dir: Path, score: str) -> None:
    """In float64. The window first; behind it the best pooled scores of all heads, or with OBCache's scores, each query's relative
    to what its layer gives, the best of each head, as many as its measured errors say."""
    window, kernel = 64, 5
    wish = {"preset": "kvpress", "budget": "global", "score": score, "compression_ratio": 0.8}
    start, total = CONTEXT_LEN - window, int(CONTEXT_LEN * 0.2 + 1e-9) * len(layers) * layers[0][1].shape[1]
    numbers, sampled = kept_numbers(window, CONTEXT_LEN), sampled_rows(0, window, window)
    ranked, errors = [], []
    for number, (q, k, v, scale) in enumerate(layers):
        num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
        k, v = k.double(), v.double()
        seen = [
            attention(q[start:, h].double(), k[:, h // group], v[:, h // group], start=start, scale=scale)
            for h in range(num_heads)
        ]
        # Behind the output projection, the average gain of a head's dimensions for each.
        gains = output_projection(model_dir, number).view(-1, num_heads, q.shape[2]).square().sum((0, 2))
        squares = torch.stack([output.square().sum(-1) for _, _, output in seen], dim=1)
        query_weights = gains / (squares * gains).sum(-1, keepdim=True)
        given = None if score == "attention" else query_weights
        scores = score_tokens(q[start:], k, v, start=start, scale=scale, score=score, query_weights=given)
        pooled = F.avg_pool1d(scores[:, :start], kernel, stride=1, padding=kernel // 2)
        ranked += F.pad(pooled, (0, window), value=torch.inf)
        for head, ranks in enumerate(ranked[-len(pooled) :]):
            order, lost = ranks.argsort(descending=True, stable=True), []
            for count in numbers:
                kept = torch.zeros(CONTEXT_LEN, dtype=torch.bool)
                kept[order[:count]] = True
                of_heads = [
                    (pruning_errors(seen[h][1], v[:, head], kept) * query_weights[:, h])[sampled].sum()
                    for h in range(head * group, (head + 1) * group)
                ]
                lost.append(torch.stack(of_heads).sum())
            errors.append(torch.stack(lost))
    if score == "attention":
        best = torch.stack(ranked).flatten().argsort(descending=True, stable=True)[:total].tolist()
        wanted = [{place % CONTEXT_LEN for place in best if place // CONTEXT_LEN == head} for head in range(len(ranked))]
    else:
        counts = divide_by_errors(torch.stack(errors), numbers, total)
        wanted = [
            set(ranks.argsort(descending=True, stable=True)[:count].tolist()) for ranks, count in zip(ranked, counts, strict=True)
        ]
    kept_heads = [head for layer in kept_by_server(server, **wish) for head in layer]
    assert sum(map(len, kept_heads)) == total
    assert sum(len(ours & theirs) for ours, theirs in zip(kept_heads, wanted, strict=True)) >= 0.994 * total
    assert max(map(len, kept_heads)) > 3 * min(map(len, kept_heads))


def output_projection(model_dir: Path, layer: int) -> torch.Tensor:
    """[hidden, heads * head_dim] in float64, from the checkpoint."""
    with safe_open(next(model_dir.glob("*.safetensors")), framework="pt") as checkpoint:
        return checkpoint.get_tensor(f"model.layers.{layer}.self_attn.o_proj.weight").double()


@pytest.mark.parametrize(("asked", "recent"), [({}, 8), ({"recent_tokens": 20}, 20), ({"preset": "kvzip"}, 0)], ids=str)
def test_a_replay_keeps_the_last_tokens_in_every_head(server: Server, asked: dict[str, Any], recent: int) -> None:
    wish = {"method": "replay", "budget": "global", "compression_ratio": 0.9, "replay_chunk": 300, **asked}
    heads = [head for layer in kept_by_server(server, **wish) for head in layer]
    last = [len(head & set(range(CONTEXT_LEN - 100, CONTEXT_LEN))) for head in heads]
    assert all(head >= {0, 1, 2, 3, *range(CONTEXT_LEN - recent, CONTEXT_LEN)} for head in heads)
    assert min(last) == recent  # some heads keep no others there
    assert sum(map(len, heads)) == int(CONTEXT_LEN * 0.1 + 1e-9) * len(heads)
