"""Against independent engines, in float32, where equal computations give equal greedy tokens.

Hugging Face transformers prunes its own cache to the positions that the server reports, per layer and head, and goes on at
position L. Stock SGLang answers what asks for nothing, and what keeps everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from obcache_sglang.local_server import Server
from tests.serving.client import QUESTIONS, document, generate, generate_together, question, report

NUM_TOKENS = 24
CONTEXT_TOKENS = 541  # odd, and its window of 64 spans two prefill chunks of 512

FIRST = [
    ("tova", "obcache-v", 0.8, "profile"),
    ("replay", "obcache-v", 0.8, "global"),
]
SCORES = ("attention", "obcache-v", "obcache-k", "obcache-kv")
REST = list(itertools.product(("snapkv", "h2o", "tova"), SCORES, (0.5, 0.8), ("uniform",)))
REST += list(itertools.product(("snapkv",), SCORES, (0.5, 0.8), ("adakv", "global")))
REST += [("random", "attention", 0.5, "global"), ("random", "attention", 0.8, "adakv")]
REST += [("streaming", "attention", 0.5, "uniform"), ("streaming", "attention", 0.8, "uniform")]
REST += list(itertools.product(("replay",), SCORES, (0.5, 0.8), ("global",)))
REST += [("snapkv", "obcache-k", 0.5, "profile"), ("replay", "attention", 0.5, "profile")]
REST += [("replay", "attention", 0.8, "adakv"), ("replay", "obcache-kv", 0.5, "uniform")]
REST += [("h2o", "obcache-k", 0.8, "global"), ("tova", "obcache-v", 0.8, "adakv"), ("tova", "obcache-v", 0.8, "global")]
REST = [c for c in REST if c not in FIRST]


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@torch.inference_mode()
def read(model: PreTrainedModel, token_ids: list[int]) -> DynamicCache:
    """The exact cache of a context."""
    cache = DynamicCache()
    model(torch.tensor([token_ids]), past_key_values=cache, logits_to_keep=1)
    return cache


@pytest.fixture(scope="module")
def exact_cache(model: PreTrainedModel, model_dir: Path) -> DynamicCache:
    return read(model, document(model_dir, CONTEXT_TOKENS))


Positions = list[list[list[int]]]
"""Kept positions, [layer][KV head][kept]."""


def attend_to_kept(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention of transformers in which each KV head sees its own `module.kept` tokens, and all behind the context.

    query: [1, query heads, new, head_dim]; key, value: [1, KV heads, context + suffix, head_dim]; returns [1, new, heads, head_dim].
    """
    num_new, group = query.shape[2], query.shape[1] // key.shape[1]
    outputs = []
    for head, kept in enumerate(module.kept):
        seen = torch.cat([kept, torch.arange(module.context_tokens, key.shape[2])])
        visible = torch.ones(num_new, len(seen), dtype=torch.bool).tril(len(seen) - num_new)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, head * group : (head + 1) * group],
                key[:, head, seen].expand(1, group, -1, -1),
                value[:, head, seen].expand(1, group, -1, -1),
                attn_mask=visible,
                scale=kwargs["scaling"],
            )
        )
    return torch.cat(outputs, 1).transpose(1, 2), None


AttentionInterface.register("kept", attend_to_kept)


@contextmanager
def attending_to(model: PreTrainedModel, positions: Positions, context_tokens: int = CONTEXT_TOKENS) -> Iterator[None]:
    """The model, within the block, sees of the first context_tokens only each head's `positions`."""
    for layer, heads in zip(model.model.layers, positions, strict=True):
        layer.self_attn.kept = [torch.tensor(head, dtype=torch.int64) for head in heads]
        layer.self_attn.context_tokens = context_tokens
    model.set_attn_implementation("kept")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@torch.inference_mode()
def continue_greedily(model: PreTrainedModel, cache: DynamicCache, ids: list[int], positions: Positions) -> list[int]:
    """NUM_TOKENS greedy tokens after a context, of which each head keeps `positions`, and `ids`. Leaves the cache as it was."""
    answer: list[int] = []
    first_position = CONTEXT_TOKENS
    with attending_to(model, positions):
        for _ in range(NUM_TOKENS):
            position_ids = torch.arange(first_position, first_position + len(ids))[None]
            logits = model(torch.tensor([ids]), past_key_values=cache, position_ids=position_ids, logits_to_keep=1).logits
            first_position += len(ids)
            ids = [int(logits[0, -1].argmax())]
            answer += ids
    cache.crop(CONTEXT_TOKENS - cache.get_seq_length())
    return answer


@pytest.mark.parametrize(
    ("method", "score", "ratio", "budget"), FIRST + [pytest.param(*combination, marks=pytest.mark.long) for combination in REST]
)
def test_same_tokens_as_transformers_with_the_same_kept_positions(
    server: Server,
    model: PreTrainedModel,
    exact_cache: DynamicCache,
    model_dir: Path,
    method: str,
    score: str,
    ratio: float,
    budget: str,
) -> None:
    context = document(model_dir, CONTEXT_TOKENS)
    wish = {
        "context_len": CONTEXT_TOKENS,
        "method": method,
        "score": score,
        "compression_ratio": ratio,
        "budget": budget,
    }
    prompts = [context + question(model_dir, text) for text in QUESTIONS]
    asked = [
        {"prompt": p, "obcache": wish, "max_new_tokens": NUM_TOKENS, "sampling_params": {"ignore_eos": True}} for p in prompts
    ]
    answers = generate_together(server, asked)
    first = report(answers[0])
    num_slots = int(CONTEXT_TOKENS * (1 - ratio))
    assert first["kept_tokens"] == num_slots
    described = server.get(f"/obcache/contexts/{first['context_id']}", params={"positions": "true"})
    assert described["slots"] == num_slots
    positions = described["positions"]
    counts = torch.tensor(described["kept_per_head"])
    assert counts.tolist() == [[len(head) for head in layer] for layer in positions]
    assert counts.sum() == num_slots * counts.numel()
    if budget in ("uniform", "adakv"):
        assert set(counts.sum(-1).tolist()) == {num_slots * counts.shape[1]}
    # Heads and layers do differ where they may.
    assert (len(counts.unique()) > 1) == (budget != "uniform")
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = continue_greedily(model, exact_cache, prompt[CONTEXT_TOKENS:], positions)
        assert answer["output_ids"] == expected
        assert report(answer)["context_id"] == first["context_id"]


def test_what_keeps_everything_equals_transformers_and_what_does_not_differs(
    server: Server, model: PreTrainedModel, exact_cache: DynamicCache, model_dir: Path
) -> None:
    """Also shows that the tests above can fail: with other positions, transformers gives other tokens."""
    context, ids = document(model_dir, CONTEXT_TOKENS), question(model_dir, QUESTIONS[0])
    heads, layers = exact_cache.layers[0].keys.shape[1], len(exact_cache.layers)
    exact = continue_greedily(model, exact_cache, ids, [[list(range(CONTEXT_TOKENS))] * heads] * layers)
    last = [[list(range(CONTEXT_TOKENS - 108, CONTEXT_TOKENS))] * heads] * layers
    assert continue_greedily(model, exact_cache, ids, last) != exact
    params = {"ignore_eos": True}
    plain = generate(server, context + ids, max_new_tokens=NUM_TOKENS, sampling_params=params)
    assert plain["output_ids"] == exact
    assert "obcache" not in plain["meta_info"]
    wish = {"context_len": CONTEXT_TOKENS, "compression_ratio": 0.0}
    kept_all = generate(server, context + ids, obcache=wish, max_new_tokens=NUM_TOKENS, sampling_params=params)
    assert kept_all["output_ids"] == exact
    assert report(kept_all)["kept_tokens"] == CONTEXT_TOKENS


@pytest.mark.long
def test_no_wish_no_marker_and_ratio_zero_equal_stock(server: Server, stock_server: Server, model_dir: Path) -> None:
    context = document(model_dir, CONTEXT_TOKENS, "formatstrings")
    for text in QUESTIONS:
        prompt = context + question(model_dir, text)
        stock = generate(stock_server, prompt, max_new_tokens=NUM_TOKENS)
        plain = generate(server, prompt, max_new_tokens=NUM_TOKENS)
        assert plain["output_ids"] == stock["output_ids"]
        assert "obcache" not in plain["meta_info"]
        kept_all = generate(
            server, prompt, obcache={"context_len": CONTEXT_TOKENS, "compression_ratio": 0.0}, max_new_tokens=NUM_TOKENS
        )
        assert kept_all["output_ids"] == stock["output_ids"]
        assert report(kept_all)["kept_tokens"] == CONTEXT_TOKENS
