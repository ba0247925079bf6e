"""What a figure must say of itself to be believed: the command that repeats it, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoConfig

_PACKAGES = ("sglang", "torch", "transformers", "obcache_sglang")


def provenance(module: str, given: Sequence[str], model: str) -> dict[str, str]:
    """command, model, versions, machine and start of a run of `python -m MODULE GIVEN...`; a local model by its folder's name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": shlex.join(["python", "-m", module, *given]),
        "model": Path(model).name if Path(model).exists() else model,
        "versions": ", ".join([*(f"{name} {version(name)}" for name in _PACKAGES), f"python {platform.python_version()}"]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "started": time.strftime("%Y-%m-%d %H:%M"),
    }


def kv_bytes_per_token(model: str) -> int | None:
    """Bytes of K and V of one token in all layers, in the model's own dtype; None where its configuration does not say."""
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError):
        return None
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not layers or not heads:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = getattr(config, "dtype", None)
    return 2 * layers * kv_heads * head_dim * dtype.itemsize if isinstance(dtype, torch.dtype) else None
