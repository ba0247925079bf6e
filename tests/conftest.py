"""Fixtures shared by all tests. A real server comes from `obcache_sglang.local_server.serve`; its start takes longest, so share it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.model import ensure_model

# As in launch/env.sh. Read when torch is first imported, by a test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """SmolLM2-135M-Instruct in float32, where equal computations give equal greedy tokens."""
    return ensure_model("float32")


@pytest.fixture(scope="session")
def model_dir_bf16() -> Path:
    """The same model in bfloat16, as a user would serve it."""
    return ensure_model("bfloat16")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders say what their tests need. What runs in the background (tests/contract) is waited for at the end."""
    items.sort(key=lambda item: "programs" in getattr(item, "fixturenames", ()))
    for item in items:
        for folder, marker in (("serving", "server"), ("kernels", "gpu")):
            if folder in item.path.parts:
                item.add_marker(marker)
        if "serving" in item.path.parts:
            # Clients here hang up, time out and are killed: what they leave open is no fault.
            item.add_marker(pytest.mark.filterwarnings("default"))
