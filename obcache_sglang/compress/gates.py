"""Gates: what a replay would score a token, read from the token's own K and V.

A gate belongs to one KV head of one layer. It is linear in K before RoPE, V, their squares and the logarithms of their norms, and gives the
logarithm of the OBCache-V score that a replay gives (`calibrate`). So the score of a token depends on nothing that comes after it: no
query is needed, and a context can be compressed from its cached K and V alone.

Gates that read hidden states, which are no longer known when K and V are in the cache, are in `hidden_gates`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from obcache_sglang.compress.head_profile import HeadProfile, ModelIdentity, find_file
from obcache_sglang.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FORMAT = 1
"""Version of the file format; files of another one are refused."""

SUFFIX = ".gates.safetensors"

NUM_SKIPPED = 4
"""First tokens of a text that calibration leaves out: attention sinks are unlike all others, and are kept anyway."""

SMALLEST_SQUARE = 1e-6
"""Norms are compared by their logarithms; one of 0 has none."""

_COMMAND = "python -m obcache_sglang.calibrate MODEL --gates FILE"
# Of the mean diagonal of the standardised normal equations: features of one head hardly depend on each other, but squares may be 0.
_RIDGE = 1e-3
# Scratch of one step: a block of tokens' features in float32.
_BLOCK_TOKENS = 4096
_BLOCK_CELLS = 4 * _BLOCK_TOKENS


def num_features(head_dim: int) -> int:
    """Weights of one gate: K, V, their squares, and the logarithms of their squared norms."""
    return 4 * head_dim + 2


def features(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What gates are linear in: [..., tokens, num_features] float32.

    k, v: [..., tokens, head_dim], any float dtype, K before RoPE.
    """
    k, v = k.float(), v.float()
    k_square, v_square = k.square(), v.square()
    logs = [square.sum(-1, keepdim=True).clamp_min_(SMALLEST_SQUARE).log_() for square in (k_square, v_square)]
    return torch.cat([k, v, k_square, v_square, *logs], dim=-1)


@dataclass(frozen=True)
class Gates:
    """The gates of a model, or of the KV heads that one tensor-parallel rank has.

    weights: [layers, kv_heads, num_features] float32. bias: [layers, kv_heads] float32, so that heads and layers can be compared.
    """

    weights: torch.Tensor
    bias: torch.Tensor

    def lanes(self, first: int, last: int) -> Gates:
        """Those of the KV heads first ... last - 1 of each layer."""
        return Gates(self.weights[:, first:last].contiguous(), self.bias[:, first:last].contiguous())

    def to(self, device: torch.device | str) -> Gates:
        """The same, with tensors on a device."""
        return Gates(self.weights.to(device), self.bias.to(device))

    def scores(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The scores [num_kv_heads, tokens] float32 of a layer's tokens: logarithms, so they may be negative.

        k, v: [tokens, num_kv_heads, head_dim], any float dtype, K before RoPE.
        """
        scores = torch.empty(k.shape[1], k.shape[0], dtype=torch.float32, device=k.device)
        weights, bias = self.weights[layer, :, :, None], self.bias[layer, :, None]
        for first in range(0, k.shape[0], _BLOCK_TOKENS):
            block = slice(first, first + _BLOCK_TOKENS)
            found = features(k[block].transpose(0, 1), v[block].transpose(0, 1))
            scores[:, block] = torch.bmm(found, weights)[..., 0] + bias
        return scores

    def cell_scores(self, layer: int, heads: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The scores [cells] float32 of single tokens of a layer's heads.

        heads: [cells] int64, whose each is. k, v: [cells, head_dim], any float dtype, K before RoPE.
        """
        scores = torch.empty(len(heads), dtype=torch.float32, device=k.device)
        for first in range(0, len(heads), _BLOCK_CELLS):
            block = slice(first, first + _BLOCK_CELLS)
            found = features(k[block], v[block]).mul_(self.weights[layer, heads[block]])
            scores[block] = found.sum(-1) + self.bias[layer, heads[block]]
        return scores


@dataclass(frozen=True)
class GateFile:
    """The gates of one model, with the head profile that was measured by the same replays.

    r_squared: [layers, kv_heads] float32, of texts that the gates were not made with. made: how they were made, for people.
    """

    gates: Gates
    r_squared: torch.Tensor
    profile: HeadProfile
    made: dict[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError, naming the part that is wrong."""
        model = self.profile.model
        heads = (model.num_hidden_layers, model.num_key_value_heads)
        parts = {
            "weights": (self.gates.weights, (*heads, num_features(model.head_dim))),
            "bias": (self.gates.bias, heads),
            "r_squared": (self.r_squared, heads),
        }
        for name, (tensor, shape) in parts.items():
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(f"{name} are {list(tensor.shape)} {tensor.dtype}; they must be {list(shape)} float32")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} are not finite numbers")

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raises HostError, with the reason, when these gates are another model's. config: see `ModelIdentity.of`."""
        self.profile.model.check(config, "gate file")

    @classmethod
    def load(cls, path: str | Path) -> GateFile:
        """Reads gates. path: as in `find_file`. Raises ConfigError."""
        file = find_file(path, "gates", SUFFIX, _COMMAND)
        again = f"Make it again with `{_COMMAND}`."
        try:
            with safe_open(file, "pt") as opened:
                head = json.loads((opened.metadata() or {})["obcache"])
                if head["format"] == FORMAT:
                    weights, bias, r_squared, shares = map(opened.get_tensor, ("weights", "bias", "r_squared", "shares"))
                    profile = HeadProfile(ModelIdentity(**head["model"]), head["ratios"], shares.tolist(), head["made"])
                    return cls(Gates(weights, bias), r_squared, profile, head["made"])
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise ConfigError(f"gates {file}: the file {what}. {again}") from error
        raise ConfigError(
            f"gates {file}: the file's format is {head['format']!r}, but this release reads format {FORMAT}. {again}"
        )

    def save(self, path: str | Path) -> None:
        """Writes the gates and their profile. Raises OSError."""
        head = {"format": FORMAT, "model": asdict(self.profile.model), "made": self.made, "ratios": self.profile.ratios}
        shares = torch.tensor(self.profile.shares, dtype=torch.float64)
        tensors = {"weights": self.gates.weights, "bias": self.gates.bias, "r_squared": self.r_squared, "shares": shares}
        try:
            safetensors.torch.save_file(tensors, path, {"obcache": json.dumps(head)})
        except SafetensorError as error:
            raise OSError(f"gates {path} cannot be written: {error}") from error


@dataclass(frozen=True)
class ScoredText:
    """The logarithms of one text's scores, of some KV heads of a model.

    centred: [layers, kv_heads, tokens] float64, of its tokens but the first. levels: [layers, kv_heads] float64, what was subtracted, relative to
    all heads of the model.
    """

    centred: torch.Tensor
    levels: torch.Tensor

    @classmethod
    def of(cls, scores: torch.Tensor, lanes: slice) -> ScoredText:
        """scores, lanes: as in `NormalEquations.add`."""
        logs = scores[..., NUM_SKIPPED:].double()
        logs = logs.clamp_min(float(logs[logs > 0].min())).log()
        levels = logs.mean(-1)
        return cls((logs - levels[..., None])[:, lanes], (levels - levels.mean())[:, lanes])


_SUMS = ("products", "projections", "squares", "means", "levels")
"""The sums of `NormalEquations`, each [layers, kv_heads, ...]."""


class NormalEquations:
    """Sums over texts from which the gates of all heads follow: ridge regression in closed form.

    Features and the logarithms of scores are centred in each text and head, since the level of a score depends on the text's length.
    Memory: ``layers * kv_heads * num_features**2`` float64, 1.4 GB for Llama-3.1-70B (80 layers, 8 heads of 128).
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        size = num_features(head_dim)
        heads = (num_layers, num_kv_heads)
        self.products = torch.zeros(*heads, size, size, dtype=torch.float64)
        self.projections = torch.zeros(*heads, size, dtype=torch.float64)
        self.squares = torch.zeros(heads, dtype=torch.float64)
        # Sums over texts of what was subtracted: of each head's features, and of its logarithms relative to all heads' of the text.
        self.means = torch.zeros(*heads, size, dtype=torch.float64)
        self.levels = torch.zeros(heads, dtype=torch.float64)
        self.num_texts = 0

    def add(
        self, keys_values: Iterator[tuple[torch.Tensor, torch.Tensor]], scores: torch.Tensor, lanes: slice = slice(None)
    ) -> None:
        """One text more.

        keys_values: of each layer, K before RoPE and V [tokens, num_kv_heads, head_dim], any float dtype.
        scores: [layers, all KV heads of the model, tokens], positive, comparable across heads and layers; a score of 0 counts as the smallest there is.
        lanes: the KV heads of a layer that these equations are of.
        """
        text = ScoredText.of(scores, lanes)
        for layer, (k, v) in enumerate(keys_values):
            self.add_layer(text, layer, k, v)
        self.end_text(text)

    def add_layer(self, text: ScoredText, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """One layer of a text. k, v: as in `add`."""
        found = features(k[NUM_SKIPPED:].transpose(0, 1), v[NUM_SKIPPED:].transpose(0, 1))
        means = found.mean(1, keepdim=True)
        found -= means
        centred = text.centred[layer].to(k.device)
        self.means[layer] += means[:, 0].double().cpu()
        self.products[layer] += torch.bmm(found.transpose(1, 2), found).double().cpu()
        self.projections[layer] += torch.bmm(found.transpose(1, 2), centred[..., None].float())[..., 0].double().cpu()
        self.squares[layer] += centred.square().sum(-1).cpu()

    def end_text(self, text: ScoredText) -> None:
        """All layers of a text were added."""
        self.levels += text.levels.cpu()
        self.num_texts += 1

    def layers(self, layers: slice) -> NormalEquations:
        """Those of some layers, which share their memory with these."""
        part = NormalEquations.__new__(NormalEquations)
        for name in _SUMS:
            setattr(part, name, getattr(self, name)[layers])
        part.num_texts = self.num_texts
        return part

    def __iadd__(self, other: NormalEquations) -> NormalEquations:
        for name in _SUMS:
            getattr(self, name).add_(getattr(other, name))
        self.num_texts += other.num_texts
        return self

    def solve(self) -> Gates:
        """The gates of all heads."""
        scale = self.products.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        system = self.products / scale[..., None] / scale[..., None, :]
        system.diagonal(dim1=-2, dim2=-1).add_(_RIDGE)
        weights = torch.linalg.solve(system, self.projections / scale) / scale
        bias = (self.levels - (weights * self.means).sum(-1)) / self.num_texts
        return Gates(weights.float().contiguous(), bias.float().contiguous())

    def r_squared(self, gates: Gates) -> torch.Tensor:
        """The part of the variance of each head's logarithms, within texts, that gates explain: [layers, kv_heads] float32."""
        weights = gates.weights.double()
        of_gates = (weights[..., None, :] @ self.products @ weights[..., None])[..., 0, 0]
        left = self.squares - 2 * (weights * self.projections).sum(-1) + of_gates
        return (1 - left / self.squares.clamp_min(torch.finfo(torch.float32).tiny)).float()
