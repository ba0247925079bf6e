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
