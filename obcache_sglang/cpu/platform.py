"""An SGLang platform for machines without an accelerator.

SGLang's own CPU engine needs a build of sgl-kernel that the released wheel does not bring. This platform serves with
plain PyTorch instead, so that everything in this project can be tried, tested and debugged anywhere. It steps aside
wherever SGLang finds an accelerator or its own CPU engine.

SGLang finds it through the entry point group ``sglang.srt.platforms`` and then needs no flag: the device, attention
backend and sampling backend follow from the platform.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

from obcache_sglang.host import Touch
from obcache_sglang.settings import add_flags_to_serve_help

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

ATTENTION_BACKEND = "obcache_cpu"

# SGLang would fill most of the memory with the KV pool. On a CPU that memory is everybody's, and writing it takes time
# at start-up; this is room for a few long documents. --max-total-tokens raises it.
DEFAULT_POOL_TOKENS = 65536
# The way of copying to host memory that `cpu.host_pool` stands for.
IO_BACKEND, LAYOUT = "direct", "layer_first"
# Decoding on a CPU gains nothing from larger batches, and every request row costs context-length * 4 bytes.
DEFAULT_RUNNING_REQUESTS = 64


def activate() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the platform's dotted name, or None where SGLang has one of its own."""
    # The only code of this package that `sglang serve --help` runs: SGLang looks for platforms when it is imported.
    add_flags_to_serve_help(sys.argv)
    # Asked of SGLang itself: whatever it would pick without us keeps precedence.
    from sglang.srt import platforms

    in_tree = (
        platforms._is_cpu_available,
        platforms._is_sail_available,
        platforms._is_cuda_available,
        platforms._is_npu_available,
        platforms._is_rocm_available,
        platforms._is_xpu_available,
        platforms._is_musa_available,
        platforms._is_mps_available,
    )
    if any(available() for available in in_tree):
        return None
    return f"{CpuPlatform.__module__}.{CpuPlatform.__qualname__}"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain PyTorch on the CPU: no Triton, no graph capture (the conservative `PlatformCapabilities`)."""

    _enum = PlatformEnum.OOT

    def __init__(self) -> None:
        # Before the command line is parsed: --attention-backend takes our name too.
        from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

        if ATTENTION_BACKEND not in ATTENTION_BACKEND_CHOICES:
            add_attention_backend_choices([ATTENTION_BACKEND])

    def get_device(self, device_id: int | None = 0) -> str:
        # SGLang takes this for the --device it was not given, and splits it as a string.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fills in what was not given.

        server_args: SGLang's recorder; reading gives what is decided so far, writing declares a decision.
        """
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

        # By now SGLang's rule for the device "cpu" has decided on intel_amx, which needs the CPU build of sgl-kernel.
        if server_args.attention_backend == "intel_amx":
            server_args.attention_backend = ATTENTION_BACKEND
        for phase in Phase.ALL:
            server_args.cuda_graph_config = with_phase(server_args.cuda_graph_config, phase, backend=Backend.DISABLED)
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_POOL_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_RUNNING_REQUESTS
        if server_args.enable_hierarchical_cache:
            server_args.hicache_io_backend, server_args.hicache_mem_layout = IO_BACKEND, LAYOUT
        # The scheduler shares the cores with the tokenizer, the clients and its own compute threads. Polling for requests
        # would take one of them from all the others ...
        server_args.sleep_on_idle = True
        # ... and threads that wait by spinning starve those they wait for, once more of them run than there are cores (10
        # times slower was seen). The workers inherit the environment, and OpenMP reads it when they start.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def init_backend(self) -> None:
        """In each worker, before its model runner is made: registers the attention backend."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        register_attention_backend(ATTENTION_BACKEND)(_create_attention_backend)
        from obcache_sglang.cpu.host_pool import serve_host_pools

        serve_host_pools()
        # A few of SGLang's small functions are decorated for torch.compile. On a CPU that means waiting for a C++
        # compiler, which may not be there, to save microseconds.
        torch.compiler.set_stance("force_eager")


def _create_attention_backend(runner: ModelRunner) -> Any:
    from obcache_sglang.cpu.attention import CpuAttentionBackend

    return CpuAttentionBackend(runner)


TOUCHES: tuple[Touch, ...] = (
    Touch(
        "sglang.cli.serve.serve",
        "read",
        "prints its help before it loads plugins: the platform's entry point adds our flags",
        ("extra_argv",),
        "launcher",
    ),
    Touch("sglang.srt.platforms.cpu.CpuDeviceMixin", "subclass", "device queries of the CPU platform"),
    Touch("sglang.srt.platforms.interface.SRTPlatform", "subclass", "the platform's interface"),
    *(
        Touch(f"sglang.srt.platforms._is_{name}_available", "call", "step aside where SGLang has a platform of its own")
        for name in ("cpu", "sail", "cuda", "npu", "rocm", "xpu", "musa", "mps")
    ),
    Touch(
        "sglang.srt.platforms.interface.SRTPlatform.apply_server_args_defaults",
        "subclass",
        "no flags needed on a CPU",
        parameters=("server_args",),
        process="launcher",
    ),
    Touch(
        "sglang.srt.platforms.interface.SRTPlatform.init_backend",
        "subclass",
        "registers the attention backend in each worker",
        process="scheduler",
    ),
    Touch("sglang.srt.arg_groups.choices.add_attention_backend_choices", "call", "--attention-backend takes our name"),
    Touch("sglang.srt.arg_groups.choices.ATTENTION_BACKEND_CHOICES", "read", "whether our name is there already"),
    Touch(
        "sglang.srt.model_executor.cuda_graph_config.with_phase",
        "call",
        "graph capture off",
        parameters=("phase", "backend"),
        process="launcher",
    ),
    Touch(
        "sglang.srt.layers.attention.attention_registry.register_attention_backend",
        "call",
        "our attention backend by name",
        parameters=("name",),
        process="scheduler",
    ),
    Touch(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend",
        "subclass",
        "what our attention backend does not do itself",
        process="scheduler",
    ),
    Touch(
        "sglang.srt.layers.radix_attention.RadixAttention",
        "read",
        "attn_type, is_cross_attention, sliding_window_size, scaling, head counts and dimensions, layer_id",
        process="scheduler",
    ),
    Touch(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
        "read",
        "req_pool_indices, seq_lens, extend_seq_lens, out_cache_loc, forward_mode",
        process="scheduler",
    ),
    Touch("sglang.srt.mem_cache.memory_pool.KVWriteLoc", "call", "where new K and V go", process="scheduler"),
    Touch("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer", "call", "writes K and V", process="scheduler"),
    Touch(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_key_buffer",
        "call",
        "[slots, KV heads, head_dim]",
        ("layer_id",),
        "scheduler",
    ),
    Touch(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_value_buffer",
        "call",
        "[slots, KV heads, head_dim]",
        ("layer_id",),
        "scheduler",
    ),
)
