"""Published gates: what a token is worth, read from the hidden state that its layer's attention takes in.

KVzap (arXiv 2601.07891) and Fast KVzip (arXiv 2601.17668) learn the scores of KVzip (arXiv 2505.23416), and their authors publish them for
Llama and Qwen models. Hidden states are gone once K and V are in the cache, so a context that they score is prefilled, unlike with `gates`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from obcache_sglang.compress.head_profile import ModelIdentity
from obcache_sglang.errors import ConfigError, HostError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NORM_EPS = 1e-6
"""Of Fast KVzip's RMS norms, which are Qwen3's."""

_FORMS = "a directory of KVzap (config.json and safetensors), a .pt file of Fast KVzip, or their names on the Hugging Face hub"


@dataclass(frozen=True)
class HiddenGates(ABC):
    """The gates of a model, or of the KV heads that one tensor-parallel rank has.

    layers: of each layer its tensors by name. num_kv_heads, hidden_size: of the model they are for.
    """

    layers: list[dict[str, torch.Tensor]]
    num_kv_heads: int
    hidden_size: int
    projections: ClassVar[tuple[str, ...]]
    """How the names of the tensors begin that hidden states meet in their own dtype; all others are as in the file."""

    @abstractmethod
    def scores(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The scores [num_kv_heads, tokens] float32 of a layer's tokens, comparable across heads and layers.

        hidden_states: [tokens, hidden_size], any float dtype, as the layer's projections of queries, keys and values take them.
        """

    @staticmethod
    @abstractmethod
    def _of_heads(tensors: Mapping[str, torch.Tensor], first: int, last: int) -> dict[str, torch.Tensor]:
        """A layer's tensors, [KV heads or a multiple, ...] each, of the KV heads first ... last - 1."""

    def lanes(self, first: int, last: int) -> Self:
        """Those of the KV heads first ... last - 1 of each layer."""
        return replace(self, layers=[self._of_heads(each, first, last) for each in self.layers], num_kv_heads=last - first)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """The same, on a device, with projections in the dtype of the hidden states, as KVPress runs them."""

        def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
            """tensor: [any shape], and so is the result."""
            return tensor.to(device, dtype if name.startswith(self.projections) else tensor.dtype)

        return replace(self, layers=[{name: moved(name, each) for name, each in tensors.items()} for tensors in self.layers])

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raises HostError when these gates are of a model of another shape. Nothing in them tells two models of one shape apart."""
        model = ModelIdentity.of(config)
        compared = {
            "layers": (len(self.layers), model.num_hidden_layers),
            "KV heads": (self.num_kv_heads, model.num_key_value_heads),
            "hidden size": (self.hidden_size, model.hidden_size),
        }
        wrong = [f"{name} {its} instead of {served}" for name, (its, served) in compared.items() if its != served]
        if wrong:
            raise HostError(f"--obcache-hidden-gates are of another model: {', '.join(wrong)}. Give those of the served model.")


@dataclass(frozen=True)
class KVzap(HiddenGates):
    """KVzap's, linear or with one hidden layer: logarithms of KVzip's scores, each divided by the norm of the hidden state.

    layers: `weight` [num_kv_heads, inputs] and `bias`; for an MLP also `inner.weight` [hidden units, hidden_size] and `inner.bias`.
    """

    projections = ("",)

    def scores(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """As of `HiddenGates`: [tokens, hidden_size] gives [num_kv_heads, tokens] float32."""
        tensors = self.layers[layer]
        if "inner.weight" in tensors:
            hidden_states = F.gelu(F.linear(hidden_states, tensors["inner.weight"], tensors["inner.bias"]))
        return F.linear(hidden_states, tensors["weight"], tensors["bias"]).T.float()

    @staticmethod
    def _of_heads(tensors: Mapping[str, torch.Tensor], first: int, last: int) -> dict[str, torch.Tensor]:
        """As of `HiddenGates`, from and to tensors [KV heads or a multiple, ...]."""
        return {**tensors, **{name: tensors[name][first:last] for name in ("weight", "bias")}}

    @classmethod
    def load(cls, folder: Path) -> KVzap:
        """Reads a directory as `save_pretrained` writes it: `layers.I.weight`, or `layers.I.0.weight` and `layers.I.2.weight`."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != "kvzap":
            raise ValueError(f"config.json is of model_type {config.get('model_type')!r}, not 'kvzap'")
        found: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
        size, heads, units = config["input_dim"], config["output_dim"], config.get("hidden_dim")
        names = {"weight": "weight", "bias": "bias"}
        shapes = {"weight": [heads, size], "bias": [heads]}
        if units is not None:
            names = {"inner.weight": "0.weight", "inner.bias": "0.bias", "weight": "2.weight", "bias": "2.bias"}
            shapes = {"inner.weight": [units, size], "inner.bias": [units], "weight": [heads, units], "bias": [heads]}
        layers = []
        for number in range(config["n_modules"]):
            tensors = {name: found[f"layers.{number}.{theirs}"] for name, theirs in names.items()}
            layers.append(_checked(tensors, shapes, number))
        return cls(layers, heads, size)


@dataclass(frozen=True)
class FastKVzip(HiddenGates):
    """Fast KVzip's: how much of an attention over a token's own key and a few sinks the token's key gets, averaged over query heads.

    layers: `q_proj.weight` [kv_heads * group * dim, hidden_size], `q_proj.bias`, `k_proj.weight` [kv_heads * dim, hidden_size], `q_norm.weight`
    and `k_norm.weight` [dim], `k_base` [kv_heads, 1, sinks, dim], `b` [kv_heads, 1, group].
    """

    projections = ("q_proj", "k_proj")

    def scores(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """As of `HiddenGates`: [tokens, hidden_size] gives [num_kv_heads, tokens] float32, in [0, 1]."""
        tensors = self.layers[layer]
        base, bias = tensors["k_base"][:, 0].float(), tensors["b"].float()
        shape = (len(hidden_states), self.num_kv_heads, -1, base.shape[-1])
        queries = F.linear(hidden_states, tensors["q_proj.weight"], tensors["q_proj.bias"]).view(shape)
        keys = F.linear(hidden_states, tensors["k_proj.weight"]).view(shape)
        queries, keys = _normed(queries, tensors["q_norm.weight"]), _normed(keys, tensors["k_norm.weight"])
        scale = 1 / math.sqrt(base.shape[-1])
        own = (queries * keys).sum(-1) * scale + bias[:, 0]
        others = torch.einsum("thgd,hsd->thgs", queries, base) * scale
        return (own - others.logsumexp(-1)).sigmoid_().mean(-1).T

    @staticmethod
    def _of_heads(tensors: Mapping[str, torch.Tensor], first: int, last: int) -> dict[str, torch.Tensor]:
        """As of `HiddenGates`, from and to tensors [KV heads or a multiple, ...]."""
        num_heads, of_heads = len(tensors["b"]), ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_base", "b")
        return {
            **tensors,
            **{name: tensors[name].unflatten(0, (num_heads, -1))[first:last].flatten(0, 1) for name in of_heads},
        }

    @classmethod
    def load(cls, file: Path) -> FastKVzip:
        """Reads a file of `torch.save`: under `module` a list of state dicts, one for each layer."""
        # With it come a few numbers of NumPy's, under the names of its first and of its second release. Nothing else in a pickle is run.
        import numpy as np
        from numpy._core.multiarray import _reconstruct, scalar

        modules = ("numpy.core.multiarray", "numpy._core.multiarray")
        allowed: list[Any] = [(each, f"{module}.{each.__name__}") for module in modules for each in (_reconstruct, scalar)]
        allowed += [np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
        with torch.serialization.safe_globals(allowed):
            layers = torch.load(file, map_location="cpu", weights_only=True)["module"]
        num_heads, _, sinks, dim = layers[0]["k_base"].shape
        group, size = layers[0]["b"].shape[-1], layers[0]["q_proj.weight"].shape[-1]
        shapes = {
            "q_proj.weight": [num_heads * group * dim, size],
            "q_proj.bias": [num_heads * group * dim],
            "k_proj.weight": [num_heads * dim, size],
            "q_norm.weight": [dim],
            "k_norm.weight": [dim],
            "k_base": [num_heads, 1, sinks, dim],
            "b": [num_heads, 1, group],
        }
        return cls([_checked(each, shapes, number) for number, each in enumerate(layers)], num_heads, size)


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm in float32. x: [..., dim], any float dtype. weight: [dim]."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), _NORM_EPS)


def _checked(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, list[int]], layer: int) -> dict[str, torch.Tensor]:
    """The tensors of these names, of any shapes. Raises ValueError and KeyError for one that is not what it must be."""
    for name, shape in shapes.items():
        tensor = tensors[name]
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} of layer {layer} is {list(tensor.shape)} {tensor.dtype}; it must be {shape} and of a float dtype"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of layer {layer} has numbers that are not finite")
    return {name: tensors[name] for name in shapes}


def find_hidden_gates(name: str) -> Path:
    """Where gates lie on this machine; fetches them from the Hugging Face hub, if they are not there.

    name: a path, or on the hub OWNER/REPOSITORY (KVzap's) or OWNER/REPOSITORY/FILE.pt (Fast KVzip's). Raises ConfigError.
    """
    if Path(name).exists():
        return Path(name)
    # A part of transformers' own dependencies; slow to import.
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    where = re.fullmatch(r"([^/]+/[^/]+)(?:/(.+\.pt))?", name)
    if where is None:
        raise ConfigError(f"hidden gates {name!r}: there is no such file. Give {_FORMS}.")
    repository, file = where.groups()
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file))
        return Path(snapshot_download(repository, allow_patterns=["config.json", "*.safetensors"]))
    except (OSError, HFValidationError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"hidden gates {name!r}: there is no such file, and the Hugging Face hub did not give it ({why}). Give {_FORMS}."
        ) from error


def load_hidden_gates(path: str | Path) -> HiddenGates:
    """Reads gates. path: where `find_hidden_gates` has found them. Raises ConfigError."""
    path = Path(path)
    try:
        return KVzap.load(path) if path.is_dir() else FastKVzip.load(path)
    except pickle.UnpicklingError as error:  # its own words advise to run whatever is in the file
        raise ConfigError(f"hidden gates {path}: this cannot be read as tensors and numbers alone. Give {_FORMS}.") from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({str(error).strip().splitlines()[0]})"
        raise ConfigError(f"hidden gates {path}: this {what}. Give {_FORMS}.") from error
