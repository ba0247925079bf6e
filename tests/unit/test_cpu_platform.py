"""The CPU platform: where it steps aside, and the server arguments it fills in, through SGLang's own resolution."""

from __future__ import annotations

import os
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from sglang.srt import platforms
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs

from obcache_sglang.cpu.platform import ATTENTION_BACKEND, DEFAULT_POOL_TOKENS, CpuPlatform, activate

pytestmark = pytest.mark.skipif(activate() is None, reason="SGLang has a platform of its own here")


def resolved(model_dir: Path, **given: Any) -> Any:
    """What SGLang decides for a server that is given nothing but this."""
    args = ServerArgs(model_path=str(model_dir), **given)
    args.resolve_once()
    return resolving_view(args)


def test_is_the_platform_of_a_machine_without_an_accelerator() -> None:
    name = activate()
    assert name is not None
    assert pkgutil.resolve_name(name) is CpuPlatform
    assert type(platforms.current_platform) is CpuPlatform


def test_steps_aside_for_sglangs_own_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


@pytest.mark.parametrize("accelerator", ["cuda", "rocm", "npu", "xpu", "musa", "mps"])
def test_steps_aside_for_an_accelerator(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    monkeypatch.setattr(platforms, f"_is_{accelerator}_available", lambda: True)
    if accelerator == "cuda":  # SGLang asks for the device's name, to tell SAIL from CUDA, only where CUDA is available
        monkeypatch.setattr(platforms, "_is_sail_available", lambda: False)
    assert activate() is None


def test_a_server_needs_no_flags(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    args = resolved(model_dir)
    assert (args.device, args.attention_backend, args.sampling_backend) == ("cpu", ATTENTION_BACKEND, "pytorch")
    assert args.cuda_graph_config.decode.backend == args.cuda_graph_config.prefill.backend == "disabled"
    assert args.max_total_tokens == DEFAULT_POOL_TOKENS
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_what_was_given_stays(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    args = resolved(model_dir, attention_backend="torch_native", max_total_tokens=1000, max_running_requests=3)
    assert args.attention_backend == "torch_native"
    assert (args.max_total_tokens, args.max_running_requests) == (1000, 3)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
