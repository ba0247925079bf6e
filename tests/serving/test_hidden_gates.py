"""Published gates on a real server: what hidden states say is what is kept. The gates' numbers are drawn; their files' layout is the published one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from obcache_sglang.compress.hidden_gates import load_hidden_gates
from obcache_sglang.local_server import Server
from tests.serving.client import document, flush, generate, question, report
from tests.serving.conftest import COMMON, serving
from tests.serving.test_exactness import CONTEXT_TOKENS, NUM_TOKENS, continue_greedily
from tests.serving.test_positions import kept_by_context, share_kept
from tests.unit.test_hidden_gates import write_fast_kvzip, write_kvzap

L, RATIO, SINKS, RECENT = CONTEXT_TOKENS, 0.7, 4, 128
FLAGS = (*COMMON, "--max-total-tokens", "8192", "--chunked-prefill-size", "128", "--obcache", "--obcache-min-tokens", "32")
SHAPE = {"layers": 30, "heads": 3, "size": 576}


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kvzap")
    write_kvzap(folder, units=64, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def hidden_server(model_dir: Path, gates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serving(model_dir, tmp_path_factory.mktemp("hidden"), (*FLAGS, "--obcache-hidden-gates", str(gates)))


@torch.no_grad()
def scored_by_reference(model_dir: Path, gates: Path, tokens: list[int]) -> list[torch.Tensor]:
    """[kv_heads, tokens] of each layer, from what each attention of transformers' model takes in."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    taken: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: taken.append(kwargs["hidden_states"][0]), with_kwargs=True
        )
    model(input_ids=torch.tensor([tokens]))
    loaded = load_hidden_gates(gates)
    return [loaded.scores(number, hidden) for number, hidden in enumerate(taken)]


def kept_by_reference(scores: list[torch.Tensor], budget: str) -> list[list[set[int]]]:
    """Sinks and last tokens, and the best of the rest: of each head, or of all heads together."""
    num_kept = int(L * (1 - RATIO))
    window = min(RECENT, num_kept // 2)
    ranked = torch.stack(scores)
    ranked[..., :SINKS] = ranked[..., L - window :] = torch.inf
    if budget == "global":
        flat = ranked.flatten()
        best = torch.zeros_like(flat, dtype=torch.bool)
        best[flat.topk(num_kept * len(flat) // L).indices] = True
        chosen = best.view(ranked.shape)
    else:
        chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked.topk(num_kept).indices, True)
    return [[set(head.nonzero().flatten().tolist()) for head in layer] for layer in chosen]


def compress(server: Server, tokens: list[int], **settings: Any) -> list[list[set[int]]]:
    answer = server.post("/obcache/compress", {"input_ids": tokens, "compression_ratio": RATIO, **settings})
    assert answer["status"] == "compressed", answer
    return kept_by_context(server, answer["id"])


@pytest.mark.long
@pytest.mark.parametrize("budget", ["global", "uniform"])
def test_a_server_keeps_what_the_gates_say(hidden_server: Server, model_dir: Path, gates: Path, budget: str) -> None:
    """Over five chunks of a prefill, also where the text is cached already; 0.6 % are left for float32 noise at the edge of the kept set."""
    tokens = document(model_dir, L, "calls")
    wanted = kept_by_reference(scored_by_reference(model_dir, gates, tokens), budget)
    flush(hidden_server)
    found = compress(hidden_server, tokens, budget=budget)
    assert share_kept(found, wanted) >= 0.994
    flush(hidden_server)
    generate(hidden_server, tokens + question(model_dir, "\n\nSo"), obcache=False)
    assert compress(hidden_server, tokens, budget=budget) == found


@pytest.mark.long
def test_questions_continue_as_transformers_without_what_was_removed(hidden_server: Server, model_dir: Path) -> None:
    context, asked = document(model_dir, L, "naming"), question(model_dir, "\n\nIn short,")
    flush(hidden_server)
    params = {"ignore_eos": True}
    answer = generate(
        hidden_server,
        context + asked,
        obcache={"context_len": L, "compression_ratio": RATIO},
        max_new_tokens=NUM_TOKENS,
        sampling_params=params,
    )
    assert report(answer)["status"] == "compressed"
    kept = kept_by_context(hidden_server, report(answer)["context_id"])
    model, cache = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval(), DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([context]), past_key_values=cache, logits_to_keep=1)
    lists = [[sorted(head) for head in layer] for layer in kept]
    assert answer["output_ids"] == continue_greedily(model, cache, asked, lists)


@pytest.mark.long
def test_ranks_and_fast_kvzip(model_dir: Path, tmp_path: Path) -> None:
    """Each of three ranks has one of three KV heads, and the gates of that one."""
    write_fast_kvzip(tmp_path / "gate.pt", group=3, **SHAPE)
    flags = (*FLAGS, "--obcache-hidden-gates", str(tmp_path / "gate.pt"), "--tp-size", "3")
    tokens = document(model_dir, L, "calls")
    wanted = kept_by_reference(scored_by_reference(model_dir, tmp_path / "gate.pt", tokens), "uniform")
    for server in serving(model_dir, tmp_path, flags, {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0"}):
        # A server tells what the heads of its first rank keep.
        found = compress(server, tokens, budget="uniform")
        assert share_kept(found, [layer[: len(found[0])] for layer in wanted]) >= 0.994


def test_gates_of_another_model_are_refused(model_dir: Path, tmp_path: Path) -> None:
    write_kvzap(tmp_path / "other", units=None, layers=2)
    with pytest.raises(RuntimeError, match="--obcache-hidden-gates are of another model: layers 2 instead of 30"):
        next(serving(model_dir, tmp_path, (*FLAGS, "--obcache-hidden-gates", str(tmp_path / "other"))))
