"""Kernels on a GPU where there is one, else in Triton's interpreter.

That must be chosen before a kernel is imported, and holds for the whole process: run this folder by itself,
`python -m pytest tests/kernels`.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules and any(name.startswith(("sglang", "obcache_sglang.gpu")) for name in sys.modules):
        pytest.exit("tests/kernels needs a process of its own: python -m pytest tests/kernels", returncode=2)
    os.environ["TRITON_INTERPRET"] = "1"
