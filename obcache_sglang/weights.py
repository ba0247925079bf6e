"""Which weights a model has, told in a moment."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

# Of each file of weights: enough to tell a fine-tuned model from its base, and read in a moment.
_SAMPLES = 16
_SAMPLE_BYTES = 64 * 1024


def weights_digest(model_name: str, config: Any) -> str:
    """12 hexadecimal digits that differ for models of one configuration with other weights.

    Of a model from the Hub its commit tells; of a directory or a single file, samples of its weights.
    """
    path = Path(model_name)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if path.is_dir() and not files:
        files = sorted(each for each in path.iterdir() if each.suffix in (".bin", ".gguf", ".pt"))
    digest = hashlib.sha256((getattr(config, "_commit_hash", None) or "").encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(size * sample // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]
