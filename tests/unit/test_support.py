"""Models and server options that compression does not support are refused, each with its reason and what to change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs

from obcache_sglang.errors import HostError
from obcache_sglang.settings import ServerSettings
from obcache_sglang.support import _REQUIRED_OPTIONS, check_supported, unsupported_features

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SLIDING = "has sliding-window or chunked attention layers"


def model_config(folder: Path, **config: Any) -> ModelConfig:
    """SGLang's view of a small model with this config.json."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "max_position_embeddings": 512,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(shape | heads | config), encoding="utf-8")
    return ModelConfig(model_path=str(folder))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    ],
    ids=["llama", "llama-linear-rope", "qwen2", "qwen3"],
)
def test_supported_models(tmp_path: Path, config: dict[str, Any]) -> None:
    assert unsupported_features(ServerArgs(model_path=str(tmp_path)), model_config(tmp_path, **config)) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}, SLIDING),
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 16, "sliding_window": 128}, SLIDING),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            },
            r"uses multi-head latent attention \(MLA\)",
        ),
        ({"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"}, "has state-space or linear-attention layers"),
        ({"architectures": ["LlamaEmbeddingModel"], "model_type": "llama"}, "does not generate text"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "uses dynamic RoPE"),
    ],
    ids=["mistral", "gemma2", "deepseek", "falcon-h1", "embeddings", "dynamic-rope"],
)
def test_refused_models(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    config = model_config(tmp_path, **config)
    with pytest.raises(HostError, match=rf"--obcache cannot be used here:\n  - the model {reason}.*: .*serve"):
        check_supported(ServerSettings(), ServerArgs(model_path=str(tmp_path)), config)


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("disable_radix_cache", True, "leave out --disable-radix-cache"),
        ("speculative_algorithm", "NGRAM", "leave out --speculative-algorithm"),
        ("disaggregation_mode", "prefill", "leave out --disaggregation-mode"),
        ("enable_two_batch_overlap", True, "leave out --enable-two-batch-overlap"),
        ("enable_session_radix_cache", True, "leave out --enable-session-radix-cache"),
        ("elastic_ep_backend", "mooncake", "leave out --elastic-ep-backend"),
        ("hicache_storage_backend", "file", "leave out --hicache-storage-backend"),
        ("pp_size", 2, "use --tp-size instead"),
        ("tokenizer_worker_num", 2, "leave out --tokenizer-worker-num"),
    ],
)
def test_refused_options(tmp_path: Path, option: str, value: Any, advice: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    with pytest.raises(HostError, match=rf"- {option}={value!r}: .*{advice}"):
        check_supported(ServerSettings(), ServerArgs(model_path=str(tmp_path), **{option: value}))


def test_every_refused_option_is_one_of_sglang() -> None:
    assert {name for name, _, _ in _REQUIRED_OPTIONS} <= set(ServerArgs.__struct_fields__)


def test_decode_graphs_do_not_go_with_dp_attention(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    arguments = ServerArgs(model_path=str(tmp_path), enable_dp_attention=True)
    check_supported(ServerSettings(), arguments)
    with pytest.raises(HostError, match=r"--obcache-decode-graphs on: .*DP attention"):
        check_supported(replace(ServerSettings(), decode_graphs="on"), arguments)
