"""What of this server a file of a context must agree with: the model, its weights, its KV cache, and what chooses tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_parallel

from obcache_sglang.compress.gates import SUFFIX as GATES_SUFFIX
from obcache_sglang.compress.head_profile import SUFFIX as PROFILE_SUFFIX
from obcache_sglang.compress.head_profile import find_file
from obcache_sglang.host import use
from obcache_sglang.kv.files import Served
from obcache_sglang.settings import CompressionSettings, ServerSettings
from obcache_sglang.weights import weights_digest

# Of a loaded configuration: where it came from, and who wrote it.
_NOT_THE_MODEL = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
# Server options that change what K and V are, beside the model's own configuration.
_OPTIONS = ("quantization", "load_format", "quantization_param_path", "model_loader_extra_config", "revision")


def served_model(scheduler: Any, pool: Any) -> Served:
    """Of one scheduler. pool: its KV pool. Reads samples of the weights."""
    config, options = scheduler.model_config, scheduler.server_args
    values = {name: value for name, value in config.hf_config.to_dict().items() if name not in _NOT_THE_MODEL}
    told = [values, str(config.dtype), weights_digest(options.model_path, config.hf_config)]
    told += [str(getattr(options, name, None)) for name in _OPTIONS]
    # What has no form in JSON is told by its type: its own words may name an address in memory.
    text = json.dumps(told, sort_keys=True, default=lambda value: type(value).__name__)
    keys, values_of_layer = pool.get_key_buffer(pool.start_layer), pool.get_value_buffer(pool.start_layer)
    return Served(
        model=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        dtype=str(pool.dtype).removeprefix("torch."),
        num_layers=pool.layer_num,
        num_kv_heads=pool.head_num,
        head_dim=keys.shape[-1],
        v_head_dim=values_of_layer.shape[-1],
        page_size=scheduler.tree_cache.page_size,
        rank=get_parallel().attn_tp_rank,
        num_ranks=get_parallel().attn_tp_size,
    )


def choosers(settings: ServerSettings) -> Callable[[CompressionSettings], str]:
    """Gives the digest of what chooses tokens with some settings, beside the settings: the files of gates and head profile; else ''."""
    gates = profile = hidden = ""
    if settings.gates is not None:
        gates = profile = _digest(find_file(settings.gates, "gates", GATES_SUFFIX, ""))
    if settings.head_profile is not None:
        profile = _digest(find_file(settings.head_profile, "head profile", PROFILE_SUFFIX, ""))
    if settings.hidden_gates is not None:
        path = Path(settings.hidden_gates)  # the launcher has found them
        files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
        hidden = hashlib.blake2b("".join(map(_digest, files)).encode(), digest_size=16).hexdigest()

    def chooser(compression: CompressionSettings) -> str:
        """Of these settings."""
        used = (
            gates if compression.uses_gates else "",
            hidden if compression.reads_hidden_states else "",
            profile if compression.budget == "profile" else "",
        )
        return "".join(dict.fromkeys(used))

    return chooser


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


TOUCHES = (
    use("sglang.srt.runtime_context.get_parallel", "call", "attn_tp_rank, attn_tp_size: whose part of a context a file has"),
    use("sglang.srt.configs.model_config.ModelConfig", "read", "dtype, hf_config: what model a file is of"),
    use(
        "sglang.srt.server_args.ServerArgs",
        "read",
        "model_path, quantization, load_format, quantization_param_path, model_loader_extra_config, revision: what K and V are",
    ),
)
