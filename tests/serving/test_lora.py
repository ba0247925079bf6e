"""LoRA adapters: a context belongs to the adapter whose forward made its KV. On the real engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from obcache_sglang.local_server import Server
from tests.serving.client import document, generate, marker_id, question, report
from tests.serving.conftest import COMMON, STRICT, serving

L = 300
ADAPTER = "random"

# SGLang's LoRA layers pin host memory, which takes CUDA. That is all they need it for: here nothing is pinned.
_WITHOUT_PINNED_MEMORY = """
import functools
import torch

def unpinned(create):
    @functools.wraps(create)
    def wrapper(*args, pin_memory=False, **kwargs):
        return create(*args, **kwargs)
    return wrapper

torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
for name in ("tensor", "empty", "zeros", "ones"):
    setattr(torch, name, unpinned(getattr(torch, name)))
"""


def write_adapter(folder: Path, model_dir: Path) -> None:
    """Random weights for the query and value projections, large enough to change answers."""
    config = json.loads((model_dir / "config.json").read_text())
    hidden, rank = config["hidden_size"], 8
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    random = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in (("q_proj", hidden), ("v_proj", kv)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = torch.randn(rank, hidden, generator=random) * 0.02
            weights[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=random) * 0.3
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


@pytest.fixture(scope="module")
def lora_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lora")
    write_adapter(folder / "adapter", model_dir)
    (folder / "sitecustomize.py").write_text(_WITHOUT_PINNED_MEMORY)
    flags = (*COMMON, "--max-total-tokens", "16384", "--lora-paths", f"{ADAPTER}={folder / 'adapter'}")
    flags += ("--lora-backend", "torch_native", "--obcache", "--obcache-min-tokens", "32")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    yield from serving(model_dir, folder, flags, STRICT | {"PYTHONPATH": os.pathsep.join(paths)})


@pytest.mark.long
def test_a_context_belongs_to_its_adapter(lora_server: Server, model_dir: Path) -> None:
    server = lora_server
    context = document(model_dir, L)
    prompt = context + question(model_dir, "\n\nIn short, this means that")
    adapters: tuple[str | None, ...] = (None, ADAPTER)
    exact = {lora: generate(server, prompt, obcache=False, lora_path=lora)["output_ids"] for lora in adapters}
    assert exact[None] != exact[ADAPTER]
    for settings in ({"method": "tova"}, {"method": "replay", "budget": "global"}):
        ids, kept = {}, {}
        for lora in adapters:
            whole = {"context_len": L, "compression_ratio": 0.0, **settings}
            assert generate(server, prompt, obcache=whole, lora_path=lora)["output_ids"] == exact[lora]
            half = {"context_len": L, "compression_ratio": 0.5, **settings}
            first, later = (generate(server, prompt, obcache=half, lora_path=lora) for _ in range(2))
            assert [report(answer)["status"] for answer in (first, later)] == ["compressed", "reused"]
            assert first["output_ids"] == later["output_ids"]
            ids[lora] = report(first)["context_id"]
            headers = {} if lora is None else {"X-Lora-Path": lora}
            kept[lora] = server.get(f"/obcache/contexts/{ids[lora]}?positions=true", headers=headers)["positions"]
        assert ids[None] != ids[ADAPTER]
        assert kept[None] != kept[ADAPTER]  # its queries look for other tokens
        for lora, other in ((None, ADAPTER), (ADAPTER, None)):
            params = {"max_new_tokens": 1, "custom_params": {"obcache": {"context_id": ids[lora]}}}
            body = {"input_ids": [marker_id(server), *prompt[L:]], "lora_path": other, "sampling_params": params}
            answer = server.request("POST", "/generate", json=body)
            assert answer.status_code == 404 and "LoRA adapter" in answer.text
    held = server.get("/obcache/contexts")["contexts"]
    resident = server.get("/obcache/status")["counters"]["contexts"]
    assert server.post("/unload_lora_adapter", {"lora_name": ADAPTER})["success"]
    assert server.get("/obcache/status")["counters"]["contexts"] == len(held) < resident
