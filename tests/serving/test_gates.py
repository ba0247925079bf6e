"""Method gate on a real server: what it keeps, and contexts that are compressed from their cached KV."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from obcache_sglang.compress.gates import GateFile
from obcache_sglang.compress.head_profile import HeadProfile
from obcache_sglang.local_server import Server
from tests.serving.client import compressions, document, flush, generate, question, report
from tests.serving.test_positions import kept_by_context, share_kept

L, RATIO, SINKS, RECENT, RECENT_SHARE = 400, 0.7, 4, 8, 0.3
WISH = {"method": "gate", "budget": "profile", "compression_ratio": RATIO}


def counter(server: Server, name: str) -> int:
    return server.get("/obcache/status")["counters"][name]


def prefills(server: Server) -> int:
    """Prefill batches so far."""
    return len(re.findall(r"Prefill batch", server.log()))


def compress(server: Server, tokens: list[int], **settings: Any) -> list[list[set[int]]]:
    """What each head of each layer keeps."""
    answer = server.post("/obcache/compress", {"input_ids": tokens, **WISH, **settings})
    assert answer["status"] == "compressed", answer
    return kept_by_context(server, answer["id"])


@torch.no_grad()
def kept_by_reference(model_dir: Path, tokens: list[int]) -> list[list[set[int]]]:
    """From K before RoPE and V as transformers computes them, in float64. The server has a head profile of its own, which goes first."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    before: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, given, k: before.append(k[0].unflatten(-1, (-1, 64))))
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([tokens]), past_key_values=cache)
    gates = GateFile.load("smollm2-135m").gates
    counts = iter(HeadProfile.load("smollm2-135m").counts(len(tokens), int(len(tokens) * (1 - RATIO)), SINKS + RECENT))
    kept = []
    for layer, k in enumerate(before):
        v = cache.layers[layer].values[0].transpose(0, 1)
        heads = []
        for head in range(k.shape[1]):
            one_k, one_v = k[:, head], v[:, head]
            squares = [one_k.square(), one_v.square()]
            logs = [each.sum(-1, keepdim=True).log() for each in squares]
            scores = torch.cat([one_k, one_v, *squares, *logs], -1) @ gates.weights[layer, head].double()
            count = next(counts)
            recent = max(RECENT, int(RECENT_SHARE * (count - SINKS)))
            scores[:SINKS] = scores[len(tokens) - recent :] = torch.inf
            heads.append(set(scores.topk(count).indices.tolist()))
        kept.append(heads)
    return kept


def test_it_keeps_what_the_gates_say(server: Server, model_dir: Path) -> None:
    """0.6 % are left for scores that differ by float32 noise and swap places at the edge of the kept set."""
    tokens = document(model_dir, L, "calls")
    assert share_kept(compress(server, tokens), kept_by_reference(model_dir, tokens)) >= 0.994


@pytest.mark.parametrize("settings", [{}, {"budget": "uniform"}, {"budget": "adakv"}, {"budget": "global"}], ids=str)
def test_from_its_cache_a_context_keeps_what_a_prefill_keeps(server: Server, model_dir: Path, settings: dict[str, Any]) -> None:
    tokens = document(model_dir, L, "numeric-types")
    flush(server)
    before = counter(server, "in_place")
    prefilled = compress(server, tokens, **settings)
    assert counter(server, "in_place") == before
    flush(server)
    generate(server, tokens + question(model_dir, "\n\nSo"), obcache=False)
    batches = prefills(server)
    from_cache = compress(server, tokens, **settings)
    assert counter(server, "in_place") == before + 1
    assert prefills(server) == batches
    assert from_cache == prefilled
    # The exact tokens are cached as before.
    again = generate(server, tokens + question(model_dir, "\n\nBut"), obcache=False)
    assert again["meta_info"]["cached_tokens"] >= L


def test_questions_are_answered_alike_either_way(server: Server, model_dir: Path) -> None:
    context, asked = document(model_dir, L, "naming"), question(model_dir, "\n\nIn short,")
    wish = {"context_len": L, **WISH}
    answers = []
    for cached in (False, True):
        flush(server)
        if cached:
            generate(server, context + question(model_dir, "\n\nSo"), obcache=False)
        answers.append(generate(server, context + asked, obcache=wish, max_new_tokens=16))
        assert report(answers[-1])["status"] == "compressed"
        assert report(generate(server, context + asked, obcache=wish))["status"] == "reused"
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


@pytest.mark.long
def test_requests_that_run_meanwhile_are_not_changed(server: Server, model_dir: Path) -> None:
    context = document(model_dir, 1200, "class")
    running = {"prompt": document(model_dir, 60, "exceptions"), "obcache": False, "max_new_tokens": 100}
    running["sampling_params"] = {"ignore_eos": True}
    flush(server)
    alone = generate(server, **running)["output_ids"]
    generate(server, context + question(model_dir, "\n\nSo"), obcache=False)
    before = counter(server, "in_place"), compressions(server)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(generate, server, **running)
        while not server.get("/v1/loads")["loads"][0]["num_running_reqs"]:
            assert not beside.done()
        compress(server, context)
        assert not beside.done(), "nothing ran beside the compression"
        assert beside.result()["output_ids"] == alone
    assert (counter(server, "in_place"), compressions(server)) == (before[0] + 1, before[1] + 1)


def test_on_whole_pages_too(tight_server: Server, model_dir: Path) -> None:
    tokens = document(model_dir, 320, "binary")
    flush(tight_server)
    prefilled = compress(tight_server, tokens)
    flush(tight_server)
    generate(tight_server, tokens + question(model_dir, "\n\nSo"), obcache=False)
    before = counter(tight_server, "in_place")
    assert compress(tight_server, tokens) == prefilled
    assert counter(tight_server, "in_place") == before + 1
