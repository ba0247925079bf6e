"""What compression does not support, and what to change. Checked at start-up, so that nothing is ignored silently."""

from __future__ import annotations

import os
from typing import Any

from obcache_sglang.errors import HostError
from obcache_sglang.host import TESTED_SGLANG, Touch, installed_sglang
from obcache_sglang.settings import ServerSettings

TOUCHES = (
    Touch(
        "sglang.srt.arg_groups.overrides.resolving_view",
        "call",
        "server options as SGLang resolved them, to refuse those we do not support",
        ("server_args",),
        "launcher",
    ),
    Touch(
        "sglang.srt.arg_groups.model_override_base.model_config_of",
        "call",
        "the model's architecture, to refuse those we do not support",
        ("server_args",),
        "launcher",
    ),
    Touch(
        "sglang.srt.configs.model_config.ModelConfig",
        "read",
        "attention_arch, is_multimodal, is_generation, is_encoder_decoder, is_hybrid_swa, attention_chunk_size, model_is_mrope, "
        "sliding_window_size, hf_text_config",
        (),
        "launcher",
    ),
    Touch(
        "sglang.srt.configs.hybrid_arch.mambaish_config",
        "call",
        "finds state-space layers",
        ("model_config",),
        "launcher",
    ),
)

NO_HICACHE_STORAGE = "HiCache's storage cannot hold compressed contexts: leave out --hicache-storage-backend (--obcache-folder and --obcache-save keep them in files)"

# Server options (SGLang's field names), the values they may have, and what to change.
_REQUIRED_OPTIONS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("disable_radix_cache", (False,), "compressed contexts live in the radix tree: leave out --disable-radix-cache"),
    (
        "hicache_storage_backend",
        (None,),
        NO_HICACHE_STORAGE,
    ),
    (
        "enable_unified_cache_external_linker",
        (False,),
        "external KV caches cannot hold compressed contexts: leave it out",
    ),
    ("enable_lmcache", (False,), "LMCache cannot hold compressed contexts: leave out --enable-lmcache"),
    ("enable_flexkv", (False,), "FlexKV cannot hold compressed contexts: leave out --enable-flexkv"),
    ("enable_hisparse", (False,), "HiSparse manages the KV pool itself: leave out --enable-hisparse"),
    (
        "enable_unified_memory",
        (False,),
        "the unified memory pool has another KV layout: leave out --enable-unified-memory",
    ),
    (
        "enable_page_major_kv_layout",
        (False,),
        "scoring reads a token-major KV pool: leave out --enable-page-major-kv-layout",
    ),
    (
        "enable_kv_cache_sharding",
        (False,),
        "scoring needs the whole KV cache on each rank: leave out --enable-kv-cache-sharding",
    ),
    ("speculative_algorithm", (None,), "draft models have KV caches of their own: leave out --speculative-algorithm"),
    ("disaggregation_mode", ("null",), "prefill and decode must share one KV pool: leave out --disaggregation-mode"),
    (
        "decoupled_spec_role",
        ("null", None),
        "draft models have KV caches of their own: leave out --decoupled-spec-role",
    ),
    ("pp_size", (1,), "all layers of a context must be in one scheduler: use --tp-size instead of --pp-size"),
    ("dcp_size", (1,), "decode-context parallelism splits the KV of a sequence across ranks: leave out --dcp-size"),
    ("attn_cp_size", (1,), "context parallelism splits a prompt across ranks: leave out --attn-cp-size"),
    (
        "enable_two_batch_overlap",
        (False,),
        "compressed contexts cannot be told apart in the halves of a split batch: leave out --enable-two-batch-overlap",
    ),
    (
        "enable_session_radix_cache",
        (False,),
        "radix sessions cannot keep compressed contexts: leave out --enable-session-radix-cache",
    ),
    ("elastic_ep_backend", (None,), "elastic expert parallelism renames cache namespaces: leave out --elastic-ep-backend"),
    ("enable_pdmux", (False,), "PD multiplexing runs prefill in another stream: leave out --enable-pdmux"),
    (
        "tokenizer_worker_num",
        (1,),
        "the marker is registered in one tokenizer process: leave out --tokenizer-worker-num",
    ),
    ("encoder_only", (False,), "an encoder server has no KV cache: leave out --encoder-only"),
    ("language_only", (False,), "multimodal inputs are not supported: leave out --language-only"),
    ("grpc_mode", (False,), "the gRPC front end bypasses the marker: use the HTTP server"),
    ("smg_grpc_mode", (False,), "the gRPC front end bypasses the marker: use the HTTP server"),
    ("grpc_port", (None,), "the Rust gRPC front end bypasses the marker: leave out --grpc-port"),
    ("use_ray", (False,), "Ray actors do not inherit the settings: leave out --use-ray"),
    ("dllm_algorithm", (None,), "diffusion language models rewrite their cache: leave out --dllm-algorithm"),
    (
        "prefill_only_disable_kv_cache",
        (False,),
        "there is no KV cache to compress: leave out --prefill-only-disable-kv-cache",
    ),
)


def check_supported(server: ServerSettings, server_args: Any, model_config: Any | None = None) -> None:
    """Raises HostError with every reason why this server cannot run with compression, and what to change.

    server_args: SGLang's ServerArgs. model_config: SGLang's ModelConfig, or None if the model has not been looked at yet.
    """
    problems = []
    if installed_sglang() != TESTED_SGLANG and not server.allow_untested_sglang:
        problems.append(
            f"SGLang {installed_sglang()} is installed, but this package is tested with {TESTED_SGLANG}: install that release, or "
            "add --obcache-allow-untested-sglang"
        )
    problems += unsupported_features(server_args, model_config)
    if server.decode_graphs == "on" and getattr(server_args, "enable_dp_attention", False):
        problems.append(
            "--obcache-decode-graphs on: CUDA graphs for per-head budgets do not work with DP attention, which pads batches across "
            "ranks: leave out one of the two"
        )
    if problems:
        raise HostError("--obcache cannot be used here:\n" + "\n".join(f"  - {problem}." for problem in problems))


def unsupported_features(server_args: Any, model_config: Any | None = None) -> list[str]:
    """Reasons why these server options and this model cannot run with compression; empty if they can."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    problems = [
        f"{name}={value!r}: {what}"
        for name, allowed, what in _REQUIRED_OPTIONS
        if (value := getattr(view, name, allowed[0])) not in allowed
    ]
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes"):
        problems.append("SGLANG_RUST_SERVER: the Rust front end bypasses the marker: unset it")
    if model_config is not None:
        problems += [f"the model {problem}" for problem in _unsupported_model(model_config)]
    return problems


def _unsupported_model(model_config: Any) -> list[str]:
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    text = model_config.hf_text_config
    problems = []
    if not model_config.is_generation:
        problems.append("does not generate text: serve a generative model")
    if model_config.is_multimodal:
        problems.append("takes images, audio or video: serve a text model, or a text-only load of it (--language-model-only)")
    if model_config.is_encoder_decoder:
        problems.append("is an encoder-decoder: serve a decoder-only model")
    if model_config.attention_arch == AttentionArch.MLA:
        problems.append(
            "uses multi-head latent attention (MLA), whose cache holds no keys and values: serve an MHA, GQA or MQA model"
        )
    if model_config.attention_arch == AttentionArch.SSM or mambaish_config(model_config) is not None:
        problems.append(
            "has state-space or linear-attention layers, whose state has no tokens to drop: serve a pure attention model"
        )
    sliding = model_config.sliding_window_size if getattr(text, "use_sliding_window", True) else None
    layer_types = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if model_config.is_hybrid_swa or sliding or layer_types or model_config.attention_chunk_size:
        problems.append("has sliding-window or chunked attention layers: serve a model with full attention in every layer")
    if model_config.model_is_mrope:
        problems.append("uses M-RoPE, whose positions are not one number per token: serve a model with plain RoPE")
    if (rope_type := _length_dependent_rope(text)) is not None:
        problems.append(f"uses {rope_type} RoPE, which changes earlier keys as the prompt grows: serve a model with another RoPE")
    return problems


def _length_dependent_rope(text_config: Any) -> str | None:
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    # One dictionary per layer type in newer configurations, else a single one.
    for parameters in rope.values() if all(isinstance(value, dict) for value in rope.values()) else (rope,):
        rope_type = parameters.get("rope_type", parameters.get("type"))
        if rope_type in ("dynamic", "longrope", "su"):
            return str(rope_type)
    return None
