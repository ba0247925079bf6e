"""Contexts that are compressed segment by segment, on real servers: against transformers, and in pools that cannot hold them whole."""

from __future__ import annotations

import re
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from obcache_sglang.local_server import Server
from tests.serving.client import (
    QUESTIONS,
    ask_by_id,
    compressions,
    document,
    flush,
    generate,
    generate_together,
    question,
    report,
)
from tests.serving.test_exactness import CONTEXT_TOKENS, NUM_TOKENS, Positions, attending_to, continue_greedily

SEGMENT = 128
GATE = {"method": "gate", "budget": "profile", "compression_ratio": 0.6}
WISH = {**GATE, "segment_tokens": SEGMENT}
BOUNDARIES = [150, 300]
RATIOS = [0.0, 0.75]
# Of 541 tokens. What stays exact is no segment.
STARTS = {
    "segment_tokens": [0, 128, 256, 384],
    "boundaries": [0, *BOUNDARIES],
    "exact_segments": [0, BOUNDARIES[1]],
    "segment_ratios": [0, BOUNDARIES[1]],
}


def cut(how: str, num_tokens: int) -> dict[str, Any]:
    """What a request says for a context of so many tokens."""
    if how == "segment_tokens":
        return {"segment_tokens": SEGMENT}
    boundaries = {"boundaries": [each for each in BOUNDARIES if each < num_tokens]}
    return {**boundaries, **{"exact_segments": {"exact_segments": 1}, "segment_ratios": {"segment_ratios": RATIOS}}.get(how, {})}


def kept_tokens(how: str, num_tokens: int) -> int:
    """Of each head, on average, of a context of so many tokens."""
    if how == "segment_ratios":
        ends = [*(each for each in BOUNDARIES if each < num_tokens), num_tokens]
        lengths = (last - first for first, last in pairwise([0, *ends]))
        return sum(int(length * (1 - ratio)) for length, ratio in zip(lengths, [*RATIOS, 0.6], strict=False))
    exact = BOUNDARIES[0] if how == "exact_segments" else 0
    return exact + int((num_tokens - exact) * 0.4)


def kept_by_beginnings(server: Server, context: list[int], budget: str, how: str) -> dict[int, Positions]:
    """What a context and the beginnings that it was made of keep, by their tokens."""
    kept = {}
    for tokens in (*STARTS[how][1:], len(context)):
        found = server.post("/obcache/compress", {"input_ids": context[:tokens], **GATE, **cut(how, tokens), "budget": budget})
        assert found["status"] == "reused", "the beginnings are contexts of their own, while there is room"
        kept[tokens] = server.get(f"/obcache/contexts/{found['id']}", params={"positions": "true"})["positions"]
    return kept


def prefilled_tokens(server: Server) -> int:
    """Tokens that were prefilled so far."""
    return sum(map(int, re.findall(r"#new-token: (\d+)", server.log())))


@pytest.mark.parametrize(
    ("budget", "how"),
    [("profile", "segment_ratios")]
    + [pytest.param(budget, "segment_ratios", marks=pytest.mark.long) for budget in ("uniform", "adakv", "global")]
    + [pytest.param(budget, "boundaries", marks=pytest.mark.long) for budget in ("uniform", "profile")]
    + [pytest.param(budget, "segment_tokens", marks=pytest.mark.long) for budget in ("uniform", "adakv", "global", "profile")]
    + [pytest.param(budget, "exact_segments", marks=pytest.mark.long) for budget in ("uniform", "adakv", "global", "profile")],
)
def test_same_tokens_as_transformers_pruned_after_each_segment(server: Server, model_dir: Path, budget: str, how: str) -> None:
    context = document(model_dir, CONTEXT_TOKENS)
    asked = [context + question(model_dir, text) for text in QUESTIONS]
    flush(server)
    params = {"ignore_eos": True}
    wish = {"context_len": CONTEXT_TOKENS, **GATE, **cut(how, CONTEXT_TOKENS), "budget": budget}
    wishes = [{"prompt": each, "obcache": wish, "max_new_tokens": NUM_TOKENS, "sampling_params": params} for each in asked]
    answers = generate_together(server, wishes)
    assert {report(answer)["status"] for answer in answers} == {"compressed", "reused"}
    kept = kept_by_beginnings(server, context, budget, how)
    for tokens, positions in kept.items():
        assert sum(len(head) for layer in positions for head in layer) == kept_tokens(how, tokens) * 90

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    cache = DynamicCache()
    for first, last in pairwise([*STARTS[how], CONTEXT_TOKENS]):
        with torch.inference_mode(), attending_to(model, kept[first], first) if first else nullcontext():
            position_ids = torch.arange(first, last)[None]
            model(torch.tensor([context[first:last]]), past_key_values=cache, position_ids=position_ids, logits_to_keep=1)
    for prompt, answer in zip(asked, answers, strict=True):
        expected = continue_greedily(model, cache, prompt[CONTEXT_TOKENS:], kept[CONTEXT_TOKENS])
        assert answer["output_ids"] == expected


def test_segments_that_keep_everything_equal_the_exact_prompt(server: Server, model_dir: Path) -> None:
    prompt = document(model_dir, CONTEXT_TOKENS, "naming") + question(model_dir, QUESTIONS[0])
    exact = generate(server, prompt, obcache=False, max_new_tokens=NUM_TOKENS)
    flush(server)
    wish = {"context_len": CONTEXT_TOKENS, **WISH, "compression_ratio": 0.0}
    answer = generate(server, prompt, obcache=wish, max_new_tokens=NUM_TOKENS)
    assert answer["output_ids"] == exact["output_ids"]
    assert (report(answer)["status"], report(answer)["kept_tokens"]) == ("compressed", CONTEXT_TOKENS)


@pytest.mark.long
def test_a_text_that_has_grown_costs_its_last_segments_only(server: Server, model_dir: Path) -> None:
    """A conversation: each turn asks about everything before it."""
    history = document(model_dir, 2000, "class")
    flush(server)
    asked = question(model_dir, QUESTIONS[0])
    turns = []
    for length in (1000, 1100, 1150, 1900):
        before = prefilled_tokens(server), compressions(server)
        answer = generate(server, history[:length] + asked, obcache={"context_len": length, **WISH})
        assert report(answer)["status"] == "compressed" and compressions(server) == before[1] + 1
        turns.append(prefilled_tokens(server) - before[0] - len(asked))
    # From 896, 1,024 and again 1,024 on.
    assert turns == [1000, 1100 - 896, 1150 - 1024, 1900 - 1024]


@pytest.mark.long
def test_a_pool_too_small_for_the_whole_compresses_it_by_segments(tight_server: Server, model_dir: Path) -> None:
    """1,312 tokens and the 384 that are kept are more than the pool's 1,536 slots; requests are retracted meanwhile."""
    context = document(model_dir, 1312, "customization")
    settings: dict[str, Any] = {"method": "gate", "budget": "profile", "compression_ratio": 0.7, "context_len": len(context)}
    whole = generate(tight_server, context + question(model_dir, QUESTIONS[0]), obcache=settings)
    assert (report(whole)["status"], report(whole)["reason"]) == ("exact", "pool_too_small")
    settings["segment_tokens"] = 256
    asked = [{"prompt": context + question(model_dir, text), "obcache": settings, "max_new_tokens": 12} for text in QUESTIONS]
    together = generate_together(tight_server, asked)
    assert {report(answer)["status"] for answer in together} == {"compressed", "reused"}
    assert {report(answer)["kept_tokens"] for answer in together} == {400}
    for request, answer in zip(asked, together, strict=True):
        again = generate(tight_server, **request)
        assert report(again)["status"] == "reused" and again["output_ids"] == answer["output_ids"]


def test_a_document_longer_than_the_pool_is_served(tight_server: Server, model_dir: Path) -> None:
    context, asked = document(model_dir, 3008, "class"), question(model_dir, QUESTIONS[0])
    with pytest.raises(RuntimeError, match=r"400: .*exceeds the maximum allowed length"):
        generate(tight_server, context + asked, obcache=False)
    settings = {
        "method": "gate",
        "budget": "profile",
        "compression_ratio": 0.85,
        "segment_tokens": 256,
        "context_len": len(context),
    }
    with pytest.raises(RuntimeError, match=r"400: .*exceeds the maximum allowed length"):
        generate(tight_server, context + asked, obcache={**settings, "compression_ratio": 0.3})
    first = generate(tight_server, context + asked, obcache=settings, max_new_tokens=12)
    assert (report(first)["status"], report(first)["context_tokens"], report(first)["kept_tokens"]) == ("compressed", 3008, 464)
    assert first["meta_info"]["prompt_tokens"] == 3008 + len(asked)
    flush(tight_server)
    del settings["context_len"]
    made = tight_server.post("/obcache/compress", {"input_ids": context, **settings})
    assert (made["status"], made["kept_tokens"]) == ("compressed", 464)
    named = ask_by_id(tight_server, made["id"], asked, max_new_tokens=12)
    assert report(named)["status"] == "reused" and named["output_ids"] == first["output_ids"]
