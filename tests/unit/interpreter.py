"""Kernels are tested on a GPU where there is one, else in Triton's interpreter.

That must be chosen before they are imported, for a whole process: a test module runs itself in one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NEEDS_INTERPRETER = DEVICE == "cpu" and not INTERPRETED


def run_in_interpreter(file: str, *, timeout_seconds: float, markers: str = "") -> None:
    """Runs the tests of a module in the interpreter. Fails with their output. markers: as of pytest's -m."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", markers, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=timeout_seconds)
    assert run.returncode == 0, run.stdout + run.stderr
