"""The positions a real server keeps: KVPress's own, and the same whether or not the window spans two prefill chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from obcache_sglang.compress.measured_errors import divide_by_errors, kept_numbers, sampled_rows
from obcache_sglang.compress.reference import attention, pruning_errors, score_tokens
from obcache_sglang.local_server import Server
from obcache_sglang.settings import CompressionSettings
from tests.serving.client import ask_by_id, generate, report
from tests.unit.test_kvpress import (
    CONTEXT_LEN,
    FIXTURE,
    KVZIP_RUNS,
    Layer,
    as_asked,
    kept_by_kvpress,
    kept_by_us,
    layers,
    replays,
    run_model,
    run_name,
    share_in_common,
)

__all__ = ["layers", "replays", "run_model"]  # fixtures


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
    by_id = ask_by_id(server, report(made)["context_id"], prompt[-1:], max_new_tokens=4)
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
def test_a_global_budget_is_a_plain_sort_of_all_heads(server: Server, layers: list[Layer], model_dir: Path, score: str) -> None:
    """In float64: pooled scores, each query's relative to what its layer gives, the window first, and the best of the rest."""
    window, kernel = 64, 5
    wish = {"preset": "kvpress", "budget": "global", "score": score, "compression_ratio": 0.8}
    ranked = []  # (-score, head of all layers, position)
    start = CONTEXT_LEN - window
    for number, (q, k, v, scale) in enumerate(layers):
        query_weights = None
        if score != "attention":
            heads = range(q.shape[1])
            k_double, v_double = k.double().repeat_interleave(3, 1), v.double().repeat_interleave(3, 1)
            outputs = [
                attention(q[start:, h].double(), k_double[:, h], v_double[:, h], start=start, scale=scale)[2] for h in heads
            ]
            query_weights = relative(torch.stack(outputs, dim=1), output_projection(model_dir, number))
        scores = score_tokens(q[start:], k, v, start=start, scale=scale, score=score, query_weights=query_weights)
        pooled = F.avg_pool1d(scores[:, :start], kernel, stride=1, padding=kernel // 2)
        for lane, values in enumerate(pooled.tolist()):
            head = number * len(pooled) + lane
            ranked += [(-value, head, position) for position, value in enumerate(values)]
            ranked += [(float("-inf"), head, position) for position in range(start, CONTEXT_LEN)]
    num_heads = len(layers) * layers[0][1].shape[1]
    best = sorted(ranked)[: int(CONTEXT_LEN * 0.2 + 1e-9) * num_heads]
    wanted = [{position for _, head, position in best if head == number} for number in range(num_heads)]
    kept = [head for layer in kept_by_server(server, **wish) for head in layer]
    assert sum(map(len, kept)) == len(best)
    assert sum(len(ours & theirs) for ours, theirs in zip(kept, wanted, strict=True)) >= 0.994 * len(best)
    assert max(map(len, kept)) > 3 * min(map(len, kept))


@pytest.mark.long
@pytest.mark.parametrize(("score", "ratio"), [("obcache-v", 0.9), ("obcache-kv", 0.7)])
def test_a_replay_divides_its_global_budget_by_measured_errors(
    server: Server, replays: dict[int, list[list[Layer]]], model_dir: Path, score: str, ratio: float
) -> None:
    """In float64: each head keeps the best tokens of its own, as many as take away most error of some queries of all passes."""
    run = KVZIP_RUNS["0.8-300"]
    token_ids, passes = FIXTURE["kvzip"]["token_ids"], replays[300]
    num_tokens, num_layers, num_lanes = len(token_ids), len(passes[0]), passes[0][0][1].shape[1]
    total = int(num_tokens * (1 - ratio)) * num_layers * num_lanes
    numbers = kept_numbers(4 + 8, num_tokens)
    orders, errors = [], []
    for number in range(num_layers):
        projection = output_projection(model_dir, number)
        scores = torch.zeros(num_lanes, num_tokens, dtype=torch.float64)
        seen = []  # of each pass: attention weights of the sampled queries of each head, values, weights of these queries
        for replay, layers_of_pass in zip(run["passes"], passes, strict=True):
            q, k, v, scale = layers_of_pass[number]
            group, k, v = q.shape[1] // num_lanes, k.double(), v.double()
            attended = [
                attention(q[:, h].double(), k[:, h // group], v[:, h // group], start=num_tokens, scale=scale)
                for h in range(q.shape[1])
            ]
            query_weights = relative(torch.stack([output for _, _, output in attended], dim=1), projection)
            scores += score_tokens(q, k, v, start=num_tokens, scale=scale, score=score, query_weights=query_weights)[
                :, :num_tokens
            ]
            rows = sampled_rows(replay["first"], len(q), num_tokens)
            seen.append(([weights[rows] for _, weights, _ in attended], v, query_weights[rows]))
        scores[:, :4] = scores[:, -8:] = torch.inf
        for lane, order in enumerate(scores.argsort(dim=-1, descending=True, stable=True)):
            orders.append(order.tolist())
            lost = torch.zeros(len(numbers), dtype=torch.float64)
            for column, count in enumerate(numbers):
                for weights, v, query_weights in seen:
                    kept = torch.ones(len(v), dtype=torch.bool)
                    kept[order[count:]] = False
                    for h in range(lane * group, (lane + 1) * group):
                        lost[column] += (pruning_errors(weights[h], v[:, lane], kept) * query_weights[:, h]).sum()
            errors.append(lost)
    counts = divide_by_errors(torch.stack(errors), numbers, total)
    wish = {"method": "replay", "budget": "global", "score": score, "compression_ratio": ratio, "replay_chunk": 300}
    kept_heads = [head for layer in kept_by_server(server, token_ids=token_ids, **wish) for head in layer]
    assert sum(map(len, kept_heads)) == total
    wanted = [set(order[:count]) for order, count in zip(orders, counts, strict=True)]
    assert sum(len(ours & theirs) for ours, theirs in zip(kept_heads, wanted, strict=True)) >= 0.994 * total
    assert max(counts) > 10 * min(counts)


def relative(outputs: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Weights [queries, heads] of squared errors of outputs [queries, heads, head_dim], relative to all that their layer gives.

    Behind the output projection [hidden, heads * head_dim], with the average gain of a head's dimensions for each.
    """
    gains = projection.view(-1, outputs.shape[1], outputs.shape[2]).square().sum((0, 2))
    return gains / (outputs.square().sum(-1) * gains).sum(-1, keepdim=True)


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
