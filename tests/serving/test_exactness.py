"""Against independent engines, in float32, where equal computations give equal greedy tokens.

Hugging Face transformers prunes its own cache to the positions that the server reports, per layer and head, and goes on at
position L. Stock SGLang answers what asks for nothing, and what keeps everything.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from launch.server import Server
from tests.serving.client import QUESTIONS, document, generate, generate_together, question, report

NUM_TOKENS = 24
CONTEXT_TOKENS = 541  # odd, and its window of 64 spans two prefill chunks of 512

FIRST = [
    ("snapkv", "obcache-k", 0.5),
    ("snapkv", "obcache-kv", 0.8),
    ("h2o", "obcache-v", 0.8),
    ("tova", "attention", 0.5),
    ("streaming", "attention", 0.8),
    ("random", "attention", 0.5),
]
SCORES = ("attention", "obcache-v", "obcache-k", "obcache-kv")
REST = [c for c in itertools.product(("snapkv", "h2o", "tova"), SCORES, (0.5, 0.8)) if c not in FIRST]
REST += [("streaming", "attention", 0.5), ("random", "attention", 0.8)]


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exact_cache(model: PreTrainedModel, model_dir: Path) -> DynamicCache:
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([document(model_dir, CONTEXT_TOKENS)]), past_key_values=cache, logits_to_keep=1)
    return cache


def pruned(cache: DynamicCache, positions: list[list[list[int]]]) -> DynamicCache:
    """A copy of `cache` that keeps `positions[layer][kv_head]`."""
    cache = copy.deepcopy(cache)
    for layer, kept in zip(cache.layers, torch.tensor(positions), strict=True):
        index = kept[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    return cache


@torch.inference_mode()
def continue_greedily(model: PreTrainedModel, cache: DynamicCache, ids: list[int], first_position: int) -> list[int]:
    """NUM_TOKENS greedy tokens after `ids`, the first of which stands at `first_position`."""
    cache, answer = copy.deepcopy(cache), []
    for _ in range(NUM_TOKENS):
        position_ids = torch.arange(first_position, first_position + len(ids))[None]
        logits = model(torch.tensor([ids]), past_key_values=cache, position_ids=position_ids, logits_to_keep=1).logits
        first_position += len(ids)
        ids = [int(logits[0, -1].argmax())]
        answer += ids
    return answer


def check_against_transformers(
    server: Server, model: PreTrainedModel, exact_cache: DynamicCache, model_dir: Path, method: str, score: str, ratio: float
) -> None:
    context = document(model_dir, CONTEXT_TOKENS)
    wish = {"context_len": CONTEXT_TOKENS, "method": method, "score": score, "compression_ratio": ratio}
    prompts = [context + question(model_dir, text) for text in QUESTIONS]
    asked = [
        {"prompt": p, "obcache": wish, "max_new_tokens": NUM_TOKENS, "sampling_params": {"ignore_eos": True}} for p in prompts
    ]
    answers = generate_together(server, asked)
    first = report(answers[0])
    assert first["kept_tokens"] == int(CONTEXT_TOKENS * (1 - ratio))
    described = server.get(f"/obcache/contexts/{first['context_id']}", params={"positions": "true"})
    positions = described["positions"]
    assert {len(head) for layer in positions for head in layer} == {first["kept_tokens"]}
    cache = pruned(exact_cache, positions)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = continue_greedily(model, cache, prompt[CONTEXT_TOKENS:], CONTEXT_TOKENS)
        assert answer["output_ids"] == expected
        assert report(answer)["context_id"] == first["context_id"]


@pytest.mark.parametrize(("method", "score", "ratio"), FIRST)
def test_same_tokens_as_transformers_with_the_same_kept_positions(
    server: Server, model: PreTrainedModel, exact_cache: DynamicCache, model_dir: Path, method: str, score: str, ratio: float
) -> None:
    check_against_transformers(server, model, exact_cache, model_dir, method, score, ratio)


@pytest.mark.long
@pytest.mark.parametrize(("method", "score", "ratio"), REST)
def test_same_tokens_as_transformers_with_the_same_kept_positions_all_others(
    server: Server, model: PreTrainedModel, exact_cache: DynamicCache, model_dir: Path, method: str, score: str, ratio: float
) -> None:
    check_against_transformers(server, model, exact_cache, model_dir, method, score, ratio)


def test_pruned_reference_differs_from_exact(model: PreTrainedModel, exact_cache: DynamicCache, model_dir: Path) -> None:
    """The test above can fail: with other positions, transformers gives other tokens."""
    ids = question(model_dir, QUESTIONS[0])
    heads, layers = exact_cache.layers[0].keys.shape[1], len(exact_cache.layers)
    last = [[list(range(CONTEXT_TOKENS - 108, CONTEXT_TOKENS))] * heads] * layers
    exact = continue_greedily(model, exact_cache, ids, CONTEXT_TOKENS)
    assert continue_greedily(model, pruned(exact_cache, last), ids, CONTEXT_TOKENS) != exact


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
