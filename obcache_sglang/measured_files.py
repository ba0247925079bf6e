"""What `auto` stands for in `--obcache-head-profile` and `--obcache-gates`: a file from the package, or one that is measured here once."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from obcache_sglang.calibrate import max_positions
from obcache_sglang.compress.calibration import DEFAULT_MAX_TOKENS, GATE_TOKENS, MIN_TOKENS
from obcache_sglang.compress.gates import SUFFIX, GateFile
from obcache_sglang.compress.head_profile import PACKAGED, HeadProfile, ModelIdentity
from obcache_sglang.errors import ConfigError, HostError
from obcache_sglang.weights import weights_digest


@dataclass(frozen=True)
class _Kind:
    """One kind.

    packaged: the names of files that come with the package. suffix: of those made here. flag: of `obcache_sglang.calibrate`, before the file.
    max_tokens: of a text. load: raises ConfigError for a file of another release. digest: of the model that a loaded file is for.
    """

    what: str
    packaged: str
    suffix: str
    flag: str
    max_tokens: int
    load: Callable[[Path], Any]
    digest: Callable[[Any], str]


_HEAD_PROFILE = _Kind(
    "head profile",
    "*.json",
    ".head-profile.json",
    "--output",
    DEFAULT_MAX_TOKENS,
    HeadProfile.load,
    lambda loaded: loaded.model.digest,
)
_GATES = _Kind("gates", f"*{SUFFIX}", SUFFIX, "--gates", GATE_TOKENS, GateFile.load, lambda loaded: loaded.profile.model.digest)


def profile_for(model_name: str) -> Path:
    """The file of a model's head profile: made here before, or from the package. If there is none, makes it, which takes minutes.

    model_name: directory or Hugging Face name. Profiles are kept in `$XDG_CACHE_HOME/obcache_sglang`, by default ~/.cache, one for each
    model and its weights. Raises HostError if it cannot be made, and OSError if transformers cannot load the model's configuration.
    """
    return _file_for(model_name, _HEAD_PROFILE)


def gates_for(model_name: str) -> Path:
    """The file of a model's gates; as `profile_for`."""
    return _file_for(model_name, _GATES)


def made_gates_path(model_name: str, name: str | None = None) -> Path:
    """Where gates lie that were made here for a model, and where `gates_for` looks first. name: of other ones beside them.

    Raises OSError and ValueError if transformers cannot load the model's configuration.
    """
    if name is not None:
        return _folder() / f"{name}{_GATES.suffix}"
    return _made_file(model_name, AutoConfig.from_pretrained(model_name), _GATES)


def made_gates(model_name: str) -> Path | None:
    """The gates that were made here before for a model; None where there are none. Raises as `made_gates_path`."""
    file = made_gates_path(model_name)
    return file if _is_readable(file, _GATES) else None


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "obcache_sglang"


def _made_file(model_name: str, config: Any, kind: _Kind) -> Path:
    digest = ModelIdentity.of(config).digest
    return _folder() / f"{Path(model_name).name}-{digest}-{weights_digest(model_name, config)}{kind.suffix}"


def _is_readable(file: Path, kind: _Kind) -> bool:
    """Whether there is such a file, of this release's format."""
    if not file.exists():
        return False
    try:
        kind.load(file)
    except ConfigError as error:
        print(f"obcache: {error}", file=sys.stderr)
        return False
    return True


def _file_for(model_name: str, kind: _Kind) -> Path:
    config = AutoConfig.from_pretrained(model_name)
    file = _made_file(model_name, config, kind)
    if _is_readable(file, kind):
        return file
    digest = ModelIdentity.of(config).digest
    for known in sorted(PACKAGED.glob(kind.packaged)):
        if kind.digest(kind.load(known)) == digest:
            return known
    file.parent.mkdir(parents=True, exist_ok=True)
    # The file is complete or absent, even if two servers start at once.
    partial = file.with_suffix(f".{os.getpid()}")
    max_tokens = int(min(kind.max_tokens, max_positions(config) // 2 - MIN_TOKENS))
    arguments = [kind.flag, str(partial), "--max-tokens", str(max_tokens)]
    command = [sys.executable, "-m", "obcache_sglang.calibrate", model_name, *arguments]
    print(
        f"obcache: measuring the {kind.what} of {model_name}, once; this takes minutes: {shlex.join(command)}",
        file=sys.stderr,
        flush=True,
    )
    # In a process of its own: all its memory, the GPU's too, is free again before the server starts.
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode or not partial.exists():
        raise HostError(
            f"the {kind.what} of {model_name} could not be measured here, see above. Measure it where the model fits into one process "
            f"(`python -m obcache_sglang.calibrate MODEL {kind.flag} FILE`) and start with the file, or without."
        )
    partial.replace(file)
    return file
