"""The positions a real server keeps: KVPress's own, and the same whether or not the window spans two prefill chunks."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoTokenizer, DynamicCache

from obcache_sglang.compress.measured_errors import divide_by_errors, kept_numbers, sampled_rows
from obcache_sglang.compress.reference import attention, pruning_errors, score_tokens
from obcache_sglang.compress.replay import ReplayPrompts
from obcache_sglang.local_server import Server
from obcache_sglang.settings import CompressionSettings
from tests.serving.client import ask_by_id, generate, report
from tests.unit.test_kvpress import (
    CONTEXT_LEN,
    FIXTURE,
    KVZIP_RUNS,
    Layer,
    RunModel,
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


@pytest.mark.parametrize(
    ("method", "window", "budget"), [("snapkv", 400, "adakv"), pytest.param("h2o", "all", "uniform", marks=pytest.mark.long)]
)
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


@pytest.mark.parametrize("score", ["attention", "obcache-v", pytest.param("obcache-kv", marks=pytest.mark.long)])
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


@dataclass(frozen=True)
class Pass:
    """first, last: the tokens that it repeats. layers: q of its queries, k and v of the context and of its own tokens. seen: [tokens], which of
    these its queries attend to, and so does their softmax for scores."""

    first: int
    last: int
    layers: list[Layer]
    seen: torch.Tensor


@pytest.fixture
def whole_passes(replays: dict[int, list[list[Layer]]]) -> list[Pass]:
    """Of 300 tokens, as KVPress's KVzip makes them."""
    passes = zip(KVZIP_RUNS["0.8-300"]["passes"], replays[300], strict=True)
    return [Pass(each["first"], each["last"], layers, torch.arange(len(layers[0][1]))) for each, layers in passes]


@pytest.fixture
def local_passes(run_model: RunModel, model_dir: Path) -> list[Pass]:
    """Of 300 tokens: each alone after its chunk, what is shortly before, and the first tokens, at the positions after the context."""
    context = array("q", FIXTURE["kvzip"]["token_ids"])
    of_context, passes = run_model(list(context), DynamicCache()), []
    for each in ReplayPrompts(AutoTokenizer.from_pretrained(model_dir)).passes(context, 300, local=True):
        seen = torch.tensor([*range(min(8, max(0, each.first - 64))), *range(max(0, each.first - 64), each.last)])
        cache = DynamicCache()
        for number, (_, k, v, _) in enumerate(of_context):
            cache.update(*(kv[seen].transpose(0, 1)[None].clone() for kv in (k, v)), number)
        layers = []
        for (_, *of_all, _), (q, *of_pass, scale) in zip(
            of_context, run_model(list(each.tokens), cache, first_position=len(context)), strict=True
        ):
            k, v = (torch.cat([kv, own[len(seen) :]]) for kv, own in zip(of_all, of_pass, strict=True))
            layers.append((q, k, v, scale))
        own = torch.arange(len(context), len(context) + len(each.tokens))
        passes.append(Pass(each.first, each.last, layers, torch.cat([seen, own])))
    return passes


def replay_scores(passes: list[Pass], number: int, projection: torch.Tensor | None, score: str, num_tokens: int) -> torch.Tensor:
    """Scores [kv heads, num_tokens] float64 of a layer's tokens. A whole pass scores all of the context, a local one the chunk that it repeats.

    projection: of the layer, where each query's scores are relative to what the layer gives.
    """
    scores = torch.zeros(passes[0].layers[number][1].shape[1], num_tokens, dtype=torch.float64)
    for each in passes:
        q, k, v, scale = each.layers[number]
        seen_k, seen_v, start = k[each.seen].double(), v[each.seen].double(), len(each.seen) - len(q)
        weights = None if projection is None else relative(outputs_of(attended(q, seen_k, seen_v, start, scale)), projection)
        of_seen = score_tokens(q, seen_k, seen_v, start=start, scale=scale, score=score, query_weights=weights)
        first, last = (each.first, each.last) if start < num_tokens else (0, num_tokens)
        scores[:, first:last] += of_seen[:, (each.seen >= first) & (each.seen < last)]
    scores[:, :4] = scores[:, -8:] = torch.inf
    return scores


def kept_by_replay(server: Server, **wish: Any) -> list[set[int]]:
    wish = {"method": "replay", "budget": "global", "replay_chunk": 300, **wish}
    return [head for layer in kept_by_server(server, token_ids=FIXTURE["kvzip"]["token_ids"], **wish) for head in layer]


def test_a_local_replay_scores_each_chunk_by_the_pass_that_repeats_it(server: Server, local_passes: list[Pass]) -> None:
    """In float64, a plain sort of all heads."""
    num_tokens, num_layers = len(FIXTURE["kvzip"]["token_ids"]), len(local_passes[0].layers)
    scores = torch.cat([replay_scores(local_passes, number, None, "obcache-v", num_tokens) for number in range(num_layers)])
    total = int(num_tokens * (1 - 0.8)) * len(scores)
    wanted = torch.zeros(scores.numel(), dtype=torch.bool)
    wanted[scores.flatten().argsort(descending=True, stable=True)[:total]] = True
    kept = kept_by_replay(server, score="obcache-v", compression_ratio=0.8, normalization="none", replay_attention="local")
    assert sum(map(len, kept)) == total
    in_both = sum(int(row[sorted(head)].sum()) for row, head in zip(wanted.view(scores.shape), kept, strict=True))
    assert in_both >= 0.994 * total
    whole = kept_by_replay(server, score="obcache-v", compression_ratio=0.8, normalization="none")
    assert sum(len(ours & other) for ours, other in zip(kept, whole, strict=True)) < 0.97 * total  # the comparison can fail


@pytest.mark.long
@pytest.mark.parametrize("kind", ["whole", "local"])
@pytest.mark.parametrize(("score", "ratio"), [("obcache-v", 0.9), ("obcache-kv", 0.7)])
def test_a_replay_divides_its_global_budget_by_measured_errors(
    server: Server, model_dir: Path, request: pytest.FixtureRequest, kind: str, score: str, ratio: float
) -> None:
    """In float64: each head keeps the best tokens of its own, as many as take away most error of some queries of all passes.

    Errors are of attention to all of the context, also where a pass sees a part of it.
    """
    passes: list[Pass] = request.getfixturevalue(f"{kind}_passes")
    num_tokens, num_layers = len(FIXTURE["kvzip"]["token_ids"]), len(passes[0].layers)
    numbers = kept_numbers(4 + 8, num_tokens)
    orders, errors = [], []
    for number in range(num_layers):
        projection = output_projection(model_dir, number)
        sampled = []  # of each pass: attention weights of the sampled queries of each head, values, weights of these queries
        for each in passes:
            q, k, v, scale = each.layers[number]
            group, k, v = q.shape[1] // k.shape[1], k.double(), v.double()
            of_seen = attended(q, k[each.seen], v[each.seen], len(each.seen) - len(q), scale)
            rows = sampled_rows(each.first, len(q), num_tokens)
            weights_of_all = [weights[rows] for _, weights, _ in attended(q, k, v, num_tokens, scale)]
            sampled.append((weights_of_all, v, relative(outputs_of(of_seen), projection)[rows]))
        scores = replay_scores(passes, number, projection, score, num_tokens)
        for lane, order in enumerate(scores.argsort(dim=-1, descending=True, stable=True)):
            orders.append(order.tolist())
            lost = torch.zeros(len(numbers), dtype=torch.float64)
            for column, count in enumerate(numbers):
                for weights, v, query_weights in sampled:
                    kept = torch.ones(len(v), dtype=torch.bool)
                    kept[order[count:]] = False
                    for h in range(lane * group, (lane + 1) * group):
                        lost[column] += (pruning_errors(weights[h], v[:, lane], kept) * query_weights[:, h]).sum()
            errors.append(lost)
    total = int(num_tokens * (1 - ratio)) * len(orders)
    counts = divide_by_errors(torch.stack(errors), numbers, total)
    kept_heads = kept_by_replay(server, score=score, compression_ratio=ratio, replay_attention=kind)
    assert sum(map(len, kept_heads)) == total
    wanted = [set(order[:count]) for order, count in zip(orders, counts, strict=True)]
    assert sum(len(ours & theirs) for ours, theirs in zip(kept_heads, wanted, strict=True)) >= 0.994 * total
    assert max(counts) > 10 * min(counts)


def outputs_of(attended: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """[queries, heads, head_dim] of what `attention` gave for each head."""
    return torch.stack([output for _, _, output in attended], dim=1)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, scale: float) -> list[tuple[torch.Tensor, ...]]:
    """What `attention` gives for each query head. q: [queries, q heads, dim]; k, v: [tokens, kv heads, dim] float64."""
    group = q.shape[1] // k.shape[1]
    return [attention(q[:, h].double(), k[:, h // group], v[:, h // group], start=start, scale=scale) for h in range(q.shape[1])]


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


@pytest.mark.parametrize(
    ("asked", "recent"),
    [({}, 8), *(pytest.param(*each, marks=pytest.mark.long) for each in (({"recent_tokens": 20}, 20), ({"preset": "kvzip"}, 0)))],
    ids=str,
)
def test_a_replay_keeps_the_last_tokens_in_every_head(server: Server, asked: dict[str, Any], recent: int) -> None:
    wish = {"method": "replay", "budget": "global", "compression_ratio": 0.9, "replay_chunk": 300, **asked}
    heads = [head for layer in kept_by_server(server, **wish) for head in layer]
    last = [len(head & set(range(CONTEXT_LEN - 100, CONTEXT_LEN))) for head in heads]
    assert all(head >= {0, 1, 2, 3, *range(CONTEXT_LEN - recent, CONTEXT_LEN)} for head in heads)
    assert min(last) == recent  # some heads keep no others there
    assert sum(map(len, heads)) == int(CONTEXT_LEN * 0.1 + 1e-9) * len(heads)
