"""A long English text that needs no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def read_prose() -> str:
    """The text of Newton's Opticks, which comes inside a package that SGLang needs (apache-tvm-ffi)."""
    spec = importlib.util.find_spec("tvm_ffi")
    assert spec is not None and spec.origin is not None, "apache-tvm-ffi is not installed: SGLang depends on it"
    path = Path(spec.origin).parent / "3rdparty" / "libbacktrace" / "Isaac.Newton-Opticks.txt"
    text = path.read_text(encoding="utf-8")
    return text[text.index("My Design in this Book") :]
