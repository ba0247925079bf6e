"""Gates: their scores written out in float64, how they are made, their file, and what is refused."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from obcache_sglang.calibrate import Replay, main
from obcache_sglang.compress.gates import NUM_SKIPPED, GateFile, Gates, NormalEquations, num_features
from obcache_sglang.compress.head_profile import HeadProfile, ModelIdentity
from obcache_sglang.compress.replay import ReplayPrompts
from obcache_sglang.errors import ConfigError, HostError, InvalidValue
from obcache_sglang.settings import CompressionSettings, ServerSettings
from tests.serving.client import document, tokenizer

LAYERS, HEADS, DIM = 2, 3, 4


def some_gates() -> Gates:
    torch.manual_seed(1)
    return Gates(torch.randn(LAYERS, HEADS, num_features(DIM)), torch.randn(LAYERS, HEADS))


def written_out(gates: Gates, layer: int, head: int, k: torch.Tensor, v: torch.Tensor) -> float:
    """One token's score. k, v: [head_dim]."""
    k, v, weights = k.double(), v.double(), gates.weights[layer, head].double()
    found = [*k, *v, *(k * k), *(v * v), (k @ k).log(), (v @ v).log()]
    return float(sum(a * b for a, b in zip(weights, found, strict=True)) + gates.bias[layer, head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_is_linear_in_k_v_their_squares_and_log_norms(dtype: torch.dtype) -> None:
    gates, tokens = some_gates(), 7
    k, v = torch.randn(2, tokens, HEADS, DIM).to(dtype)
    scores = gates.scores(1, k, v)
    assert (scores.shape, scores.dtype) == ((HEADS, tokens), torch.float32)
    for head in range(HEADS):
        wanted = torch.tensor([written_out(gates, 1, head, k[token, head], v[token, head]) for token in range(tokens)])
        torch.testing.assert_close(scores[head], wanted, rtol=1e-4, atol=1e-4)


def test_a_token_without_norm_has_a_score_like_any_other() -> None:
    assert some_gates().scores(0, torch.zeros(5, HEADS, DIM), torch.zeros(5, HEADS, DIM)).isfinite().all()


def test_long_contexts_are_scored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = torch.randn(2, 50, HEADS, DIM)
    whole = some_gates().scores(0, k, v)
    monkeypatch.setattr("obcache_sglang.compress.gates._BLOCK_TOKENS", 7)
    torch.testing.assert_close(some_gates().scores(0, k, v), whole)


def test_ranks_have_their_own_heads_gates() -> None:
    gates = some_gates()
    k, v = torch.randn(2, 5, HEADS, DIM)
    torch.testing.assert_close(gates.lanes(1, 3).scores(1, k[:, 1:3], v[:, 1:3]), gates.scores(1, k, v)[1:3])


def text_of(gates: Gates, tokens: int, level: float = 0.0) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """K and V of each layer, and scores that these gates give exactly, times exp(level)."""
    keys_values = [(torch.randn(tokens, HEADS, DIM), torch.randn(tokens, HEADS, DIM)) for _ in range(LAYERS)]
    return keys_values, torch.stack([gates.scores(layer, k, v) + level for layer, (k, v) in enumerate(keys_values)]).exp()


def test_what_is_linear_is_found_whatever_the_level_of_each_text() -> None:
    gates, equations, left_out = some_gates(), NormalEquations(LAYERS, HEADS, DIM), NormalEquations(LAYERS, HEADS, DIM)
    for number in range(6):
        keys_values, scores = text_of(gates, 400, level=5.0 * number)
        (left_out if number == 5 else equations).add(iter(keys_values), scores)
    found = equations.solve()
    assert (left_out.r_squared(found) > 0.99).all()
    k, v = torch.randn(2, 100, HEADS, DIM)
    for layer in range(LAYERS):
        wanted = gates.scores(layer, k, v)
        # The level of all heads together is each text's own; of heads and layers against each other it is the gates'.
        shift = (found.scores(layer, k, v) - wanted).mean()
        torch.testing.assert_close(found.scores(layer, k, v) - shift, wanted, rtol=0.05, atol=0.1)
    shifts = [(found.scores(layer, k, v) - gates.scores(layer, k, v)).mean() for layer in range(LAYERS)]
    torch.testing.assert_close(shifts[0], shifts[1], rtol=0, atol=0.1)


def test_noise_is_not_explained_on_texts_left_out() -> None:
    equations, left_out = NormalEquations(LAYERS, HEADS, DIM), NormalEquations(LAYERS, HEADS, DIM)
    for each in (equations, equations, left_out):
        each.add(iter(text_of(some_gates(), 300)[0]), torch.rand(LAYERS, HEADS, 300))
    assert (left_out.r_squared(equations.solve()) < 0.1).all()


def test_sinks_and_scores_of_0_teach_nothing_wrong() -> None:
    gates, equations = some_gates(), NormalEquations(LAYERS, HEADS, DIM)
    for _ in range(4):
        keys_values, scores = text_of(gates, 400)
        scores[..., :NUM_SKIPPED] = 1e30
        scores[0, 0, -1] = 0.0
        equations.add(iter(keys_values), scores)
    assert equations.r_squared(equations.solve()).min() > 0.8  # a NaN, or a sink, would leave nothing


def test_sums_of_two_halves_are_those_of_the_whole() -> None:
    texts = [text_of(some_gates(), 60) for _ in range(4)]
    whole, first, second = (NormalEquations(LAYERS, HEADS, DIM) for _ in range(3))
    for number, (keys_values, scores) in enumerate(texts):
        whole.add(iter(keys_values), scores)
        (first if number < 2 else second).add(iter(keys_values), scores)
    first += second
    torch.testing.assert_close(first.solve().weights, whole.solve().weights)
    torch.testing.assert_close(first.solve().bias, whole.solve().bias)


# --- the file -----------------------------------------------------------------------------------------------------------


def gate_file() -> GateFile:
    model = ModelIdentity("LlamaForCausalLM", LAYERS, HEADS, HEADS, DIM, HEADS * DIM, 100, "0" * 16)
    profile = HeadProfile(model, [0.5], [[[0.5] * HEADS] * LAYERS], {"command": "x"})
    return GateFile(some_gates(), torch.rand(LAYERS, HEADS), profile, {"command": "x"})


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "some.gates.safetensors"
    gate_file().save(file)
    read = GateFile.load(file)
    assert torch.equal(read.gates.weights, gate_file().gates.weights)
    assert torch.equal(read.gates.bias, gate_file().gates.bias)
    assert (read.profile, read.made) == (gate_file().profile, gate_file().made)


def test_files_that_are_not_gates_are_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "some.gates.safetensors"
    for content, words in ((b"", "cannot be read"), (b"{}", "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            GateFile.load(file)
    safetensors.torch.save_file({"weights": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match="lacks 'obcache'"):
        GateFile.load(file)
    safetensors.torch.save_file({"weights": torch.zeros(1)}, file, {"obcache": json.dumps({"format": 99})})
    with pytest.raises(ConfigError, match="format is 99"):
        GateFile.load(file)
    with pytest.raises(ConfigError, match=r"none of this name in the package \(smollm2-135m\)"):
        GateFile.load("no-such-gates")


def test_weights_that_are_no_numbers_or_too_few_are_refused() -> None:
    file = gate_file()
    with pytest.raises(ValueError, match="weights are not finite"):
        replace(file, gates=Gates(file.gates.weights / 0, file.gates.bias))
    with pytest.raises(ValueError, match=r"weights are \[2, 3, 17\]"):
        replace(file, gates=Gates(file.gates.weights[..., 1:], file.gates.bias))


def test_gates_of_another_model_are_refused(model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(model_dir)
    GateFile.load("smollm2-135m").check_model(config)
    with pytest.raises(HostError, match=r"the gate file is for another model .* num_hidden_layers 2, not 30"):
        gate_file().check_model(config)


# --- settings -----------------------------------------------------------------------------------------------------------


def test_gates_are_the_default_of_a_server_that_has_them() -> None:
    compression = ServerSettings.resolve({"gates": "smollm2-135m"}).compression
    assert (compression.method, compression.budget, compression.recent_tokens) == ("gate", "profile", 8)
    assert ServerSettings.resolve({"gates": "smollm2-135m", "preset": "kvpress"}).compression.method == "snapkv"
    assert ServerSettings.resolve({"gates": "smollm2-135m"}).compression_for({"method": "tova"}).budget == "profile"
    assert ServerSettings.resolve({}).compression.method == "tova"


def test_gates_need_a_server_that_has_them() -> None:
    with pytest.raises(InvalidValue, match="needs a server started with --obcache-gates"):
        ServerSettings.resolve({"method": "gate"})
    with pytest.raises(InvalidValue, match="needs a server started with --obcache-gates"):
        ServerSettings.resolve({"head_profile": "smollm2-135m"}).compression_for({"method": "gate"})
    with pytest.raises(InvalidValue, match="scores with no query"):
        CompressionSettings.resolve({"method": "gate", "window": 5})


# --- with a model -------------------------------------------------------------------------------------------------------


def test_calibration_sees_k_as_it_was_before_rope(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, given, k: seen.append(k[0].unflatten(-1, (-1, 64))))
    replay = Replay(model, "obcache-v")
    replay.score(array("q", document(model_dir, 150)), ReplayPrompts(tokenizer(model_dir)), chunk_tokens=4096)
    for (k, v), before in zip(replay.keys_values(), seen, strict=False):
        assert k.shape == v.shape
        torch.testing.assert_close(k, before, rtol=1e-4, atol=1e-4)


def test_models_that_rotate_otherwise_are_refused(model_dir: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    for config, model_class in ((LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)):
        Replay(model_class(config(**sizes, **heads)), "obcache-v").check_rotation()
    for config, model_class in ((Glm4Config, Glm4ForCausalLM), (CohereConfig, CohereForCausalLM)):
        with pytest.raises(HostError, match=f"gates cannot be made of a {model_class.__name__}: its rotary"):
            Replay(model_class(config(**sizes, **heads)), "obcache-v").check_rotation()


def test_calibration_writes_gates_and_says_how_good_they_are(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "made.gates.safetensors"
    text.write_text(tokenizer(model_dir).decode(document(model_dir, 1100, "class")))
    command = [str(model_dir), "--text", str(text), "--gates", str(tmp_path / "none" / "made")]
    assert main(command) == 1
    assert "there is no directory" in capsys.readouterr().err
    command = [*command[:-1], str(output)]
    assert main([*command, "--max-tokens", "600"]) == 1
    assert "--gates has 2 texts" in capsys.readouterr().err
    assert main([*command, "--max-tokens", "200"]) == 0
    assert "R^2 of the gates on texts left out: mean" in capsys.readouterr().out
    made = GateFile.load(output)
    made.check_model(AutoConfig.from_pretrained(model_dir))
    assert made.made["texts"] == 5
    assert made.r_squared.mean() > 0.2


def test_the_packages_gates_predict_scores_of_other_texts(model_dir: Path) -> None:
    assert GateFile.load("smollm2-135m").r_squared.mean() > 0.6
