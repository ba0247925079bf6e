"""Published gates: files of the layouts that KVzap and Fast KVzip have, and their scores against plain modules in float64."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from obcache_sglang.compress.compression import AttentionCall, Compression, Compressor, ScoringRows, UnsupportedAttention
from obcache_sglang.compress.hidden_gates import find_hidden_gates, load_hidden_gates
from obcache_sglang.errors import ConfigError, HostError, InvalidValue
from obcache_sglang.settings import ServerSettings

LAYERS, HEADS, SIZE, UNITS = 3, 4, 24, 10
GROUP, SINKS, DIM = 2, 5, 6


def write_kvzap(
    folder: Path, *, units: int | None, layers: int = LAYERS, heads: int = HEADS, size: int = SIZE
) -> torch.nn.ModuleList:
    """Made as its authors make them, in two files; returns its modules."""
    torch.manual_seed(7)
    if units is None:
        modules = [torch.nn.Linear(size, heads) for _ in range(layers)]
    else:
        parts = [(torch.nn.Linear(size, units), torch.nn.GELU(), torch.nn.Linear(units, heads)) for _ in range(layers)]
        modules = [torch.nn.Sequential(*each) for each in parts]
    made = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(modules)})
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "kvzap", "input_dim": size, "output_dim": heads, "hidden_dim": units, "n_modules": layers}
    (folder / "config.json").write_text(json.dumps(config))
    state = list(made.state_dict().items())
    for number, part in enumerate((state[:3], state[3:])):
        save_file(dict(part), folder / f"model-{number}.safetensors")
    return made["layers"]  # type: ignore[return-value]


def write_fast_kvzip(
    file: Path, *, layers: int = LAYERS, heads: int = HEADS, size: int = SIZE, group: int = GROUP, dim: int = DIM
) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(8)
    shapes = {
        "q_proj.weight": (heads * group * dim, size),
        "q_proj.bias": (heads * group * dim,),
        "k_proj.weight": (heads * dim, size),
        "q_norm.weight": (dim,),
        "k_norm.weight": (dim,),
        "k_base": (heads, 1, SINKS, dim),
        "b": (heads, 1, group),
    }
    modules = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(layers)]
    # As the published files, with numbers of NumPy's beside the tensors.
    torch.save({"module": modules, "best": np.float64(0.5), "losses": np.ones(3, dtype=np.float32)}, file)
    return modules


def fast_kvzip_reference(module: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """[heads, tokens] float64, one token and head at a time."""
    p = {name: each.double() for name, each in module.items()}
    heads, _, group = p["b"].shape
    dim = p["q_norm.weight"].shape[0]

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    scores = torch.zeros(heads, len(hidden), dtype=torch.float64)
    for t, state in enumerate(hidden.double()):
        queries = (p["q_proj.weight"] @ state + p["q_proj.bias"]).view(heads, group, dim)
        keys = (p["k_proj.weight"] @ state).view(heads, dim)
        for h in range(heads):
            key = normed(keys[h], p["k_norm.weight"])
            for g in range(group):
                query = normed(queries[h, g], p["q_norm.weight"])
                own = query @ key / dim**0.5 + p["b"][h, 0, g]
                sinks = p["k_base"][h, 0] @ query / dim**0.5
                scores[h, t] += 1 / (1 + (sinks - own).exp().sum()) / group
    return scores


@pytest.mark.parametrize("units", [None, UNITS], ids=["linear", "mlp"])
def test_scores_of_kvzap(tmp_path: Path, units: int | None) -> None:
    modules = write_kvzap(tmp_path, units=units)
    gates = load_hidden_gates(tmp_path)
    hidden = torch.randn(50, SIZE)
    for layer, module in enumerate(modules):
        wanted = module.double()(hidden.double()).T
        torch.testing.assert_close(gates.scores(layer, hidden).double(), wanted, rtol=1e-5, atol=1e-6)
        of_one_rank = gates.lanes(1, 3).to("cpu", torch.float32)
        torch.testing.assert_close(of_one_rank.scores(layer, hidden).double(), wanted[1:3], rtol=1e-5, atol=1e-6)
        assert gates.to("cpu", torch.bfloat16).scores(layer, hidden.bfloat16()).dtype == torch.float32


def test_scores_of_fast_kvzip(tmp_path: Path) -> None:
    modules = write_fast_kvzip(tmp_path / "q2.pt")
    gates = load_hidden_gates(tmp_path / "q2.pt")
    hidden = torch.randn(20, SIZE)
    for layer, module in enumerate(modules):
        wanted = fast_kvzip_reference(module, hidden)
        torch.testing.assert_close(gates.scores(layer, hidden).double(), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gates.lanes(2, 4).scores(layer, hidden).double(), wanted[2:4], rtol=1e-4, atol=1e-6)
    moved = gates.to("cpu", torch.bfloat16)
    assert moved.layers[0]["k_proj.weight"].dtype == torch.bfloat16 and moved.layers[0]["k_base"].dtype == torch.float32
    assert moved.scores(0, hidden.bfloat16()).dtype == torch.float32


def test_gates_of_a_model_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_kvzap(tmp_path, units=None)
    config = LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=2 * HEADS, num_key_value_heads=HEADS, hidden_size=SIZE)
    load_hidden_gates(tmp_path).check_model(config)
    config.num_hidden_layers, config.hidden_size = 5, 32
    with pytest.raises(HostError, match="layers 3 instead of 5, hidden size 24 instead of 32"):
        load_hidden_gates(tmp_path).check_model(config)


def test_files_that_are_no_gates_are_told(tmp_path: Path) -> None:
    def refused(path: Path, why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            load_hidden_gates(path)

    write_kvzap(tmp_path / "kvzap", units=UNITS)
    config = tmp_path / "kvzap" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"model_type": "llama"}))
    refused(tmp_path / "kvzap", "model_type 'llama'")
    config.write_text(json.dumps(values | {"n_modules": 4}))
    refused(tmp_path / "kvzap", r"lacks 'layers\.3\.0\.weight'")
    config.write_text(json.dumps(values | {"input_dim": 32}))
    refused(tmp_path / "kvzap", r"inner.weight of layer 0 is \[10, 24\]")
    config.unlink()
    refused(tmp_path / "kvzap", "config.json")

    modules = write_fast_kvzip(tmp_path / "gate.pt")
    modules[1]["b"][0] = torch.nan
    torch.save({"module": modules}, tmp_path / "gate.pt")
    refused(tmp_path / "gate.pt", "b of layer 1 has numbers that are not finite")
    torch.save(modules, tmp_path / "gate.pt")
    refused(tmp_path / "gate.pt", "cannot be read")
    (tmp_path / "gate.pt").write_bytes(b"not a pickle")
    refused(tmp_path / "gate.pt", "cannot be read")


class Touches:
    """What runs code when a pickle is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "gate.pt").write_bytes(pickle.dumps({"module": Touches(marker)}))
    torch.save({"module": Touches(marker)}, tmp_path / "other.pt")
    for name in ("gate.pt", "other.pt"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_hidden_gates(tmp_path / name)
    assert not marker.exists()


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("nvidia/KVzap-mlp-Qwen3-8B", "Jang-Hyun/Fast-KVzip/qwen3-8b/q4_dim16_sink16.pt"):
        with pytest.raises(ConfigError, match="the Hugging Face hub did not give it"):
            find_hidden_gates(name)
    with pytest.raises(ConfigError, match=r"there is no such file\. Give a directory of KVzap"):
        find_hidden_gates("/nowhere/gate.pt")
    assert find_hidden_gates(str(tmp_path)) == tmp_path


def test_a_server_with_hidden_gates_uses_them_unless_told_otherwise() -> None:
    settings = ServerSettings.resolve({"hidden_gates": "somewhere"})
    compression = settings.compression
    assert (compression.method, compression.budget, compression.recent_tokens) == ("hidden-gate", "global", 128)
    with_profile = ServerSettings.resolve({"hidden_gates": "somewhere", "head_profile": "p"})
    assert with_profile.compression.budget == "global"
    assert ServerSettings.resolve({"hidden_gates": "somewhere", "gates": "g"}).compression.method == "gate"
    assert settings.compression_for({"method": "snapkv"}).method == "snapkv"
    with pytest.raises(InvalidValue, match="needs a server started with --obcache-hidden-gates"):
        ServerSettings.resolve({}).compression_for({"method": "hidden-gate"})
    with pytest.raises(InvalidValue, match="segment_tokens"):
        settings.compression_for({"segment_tokens": 512})


def test_hidden_states_in_another_form_are_not_scored(tmp_path: Path) -> None:
    """A fused kernel may hand the attention something else than hidden states; the context is served exactly then."""
    write_kvzap(tmp_path, units=None)
    settings = ServerSettings.resolve({"hidden_gates": str(tmp_path)}).compression
    context: Any = SimpleNamespace(settings=settings, num_tokens=8)
    compressor = Compressor(SimpleNamespace(), None, hidden_gates=load_hidden_gates(tmp_path))  # type: ignore[arg-type]
    layer: Any = SimpleNamespace(layer_id=0, logit_cap=0, is_cross_attention=False, tp_k_head_num=HEADS)
    rows, q = ScoringRows(2, 8, 0, torch.arange(8), last=True), torch.zeros(11, 16)
    for hidden in (None, torch.zeros(11, SIZE + 1), torch.zeros(10, SIZE), (torch.zeros(11, SIZE), torch.ones(1))):
        with pytest.raises(UnsupportedAttention):
            Compression(context).score(compressor, rows, layer, AttentionCall(q, q, None, hidden))  # type: ignore[arg-type]
    hidden = torch.randn(11, SIZE)
    whole = Compression(context).score(compressor, rows, layer, AttentionCall(q, q, None, hidden))
    assert whole is not None and whole.shape == (HEADS, 8)
    # In two chunks, in forwards of other rows.
    chunked = Compression(context)
    first = ScoringRows(1, 5, 0, torch.arange(5), last=False)
    assert chunked.score(compressor, first, layer, AttentionCall(q[:7], q[:7], None, hidden[1:8])) is None
    second = ScoringRows(0, 3, 5, torch.arange(8), last=True)
    assert torch.equal(chunked.score(compressor, second, layer, AttentionCall(q[:4], q[:4], None, hidden[7:])), whole)  # type: ignore[arg-type]
