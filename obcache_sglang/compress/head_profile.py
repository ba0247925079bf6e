"""Head profiles: which share of a context's tokens each KV head of a model keeps, measured once.

How much a head needs is nearly the same for every text. `python -m obcache_sglang.calibrate` measures it by replay and writes a
profile; with it, any method divides the tokens that a context keeps as replay would, without a replay. A profile belongs to
one model, whatever its dtype or quantization.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from obcache_sglang.errors import ConfigError, HostError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FORMAT = 1
"""Version of the file format; files of another one are refused."""

PACKAGED = Path(__file__).parent.parent / "profiles"
"""Where profiles and gates lie that come with the package."""

AUTO = "auto"
"""The name of a profile that is looked for, or else made, when a server starts: `measured_files.profile_for`."""

SUFFIX = ".json"

_COMMAND = "python -m obcache_sglang.calibrate MODEL --text FILE..."
# Shares are recorded to this many digits: finer than texts agree, and a small file.
_DIGITS = 4
# A head whose share is 0 gets tokens only when no other head can take more.
_SMALLEST_WEIGHT = 1e-6


def find_file(path: str | Path, what: str, suffix: str, command: str) -> Path:
    """The file that was meant: path itself, or the one of this name in the package. Raises ConfigError where there is neither.

    what: it holds, suffix: of the package's files, and command: that makes one, for the error.
    """
    file = Path(path)
    if file.is_file():
        return file
    packaged = {each.name.removesuffix(suffix): each for each in sorted(PACKAGED.glob(f"*{suffix}"))}
    if str(path) not in packaged:
        raise ConfigError(
            f"{what} {path}: there is no such file, and none of this name in the package ({', '.join(packaged)}). "
            f"Make one with `{command}`."
        )
    return packaged[str(path)]


@dataclass(frozen=True)
class ModelIdentity:
    """What a profile's model must agree with.

    digest: 16 hexadecimal digits, of the other fields and of the name that the model's config.json holds, if it holds one (it
    may be a path on its author's machine, so it is not written out).
    """

    architecture: str
    num_hidden_layers: int
    num_key_value_heads: int
    num_attention_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    digest: str

    def check(self, config: PreTrainedConfig, what: str) -> None:
        """Raises HostError, with the reason, when this is another model than the one served. what: was made for it."""
        served = ModelIdentity.of(config)
        differences = [
            f"{field.name} {getattr(self, field.name)}, not {getattr(served, field.name)}"
            for field in fields(ModelIdentity)
            if field.name != "digest" and getattr(self, field.name) != getattr(served, field.name)
        ]
        if not differences and self.digest != served.digest:
            differences = ["the same shape, but another name in its config.json"]
        if differences:
            raise HostError(
                f"the {what} is for another model than the one served: it has {', '.join(differences)}. "
                f"Make one for this model with `python -m obcache_sglang.calibrate MODEL`, or start without it."
            )

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelIdentity:
        """The identity of a model from its configuration, as transformers or SGLang (`ModelConfig.hf_config`) loaded it."""
        text = config.get_text_config()
        num_heads = text.num_attention_heads
        values: dict[str, Any] = {
            "architecture": (config.architectures or ["unknown"])[0],
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": getattr(text, "num_key_value_heads", None) or num_heads,
            "num_attention_heads": num_heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // num_heads,
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
        }
        named = json.dumps(values | {"name": _recorded_name(config)}, sort_keys=True)
        return cls(**values, digest=hashlib.sha256(named.encode()).hexdigest()[:16])


def _recorded_name(config: PreTrainedConfig) -> str | None:
    """The name in the model's config.json. A loaded configuration has the path it was loaded from in its place."""
    from transformers import PreTrainedConfig

    try:
        recorded, _ = PreTrainedConfig.get_config_dict(config.name_or_path)
    except (OSError, ValueError):  # the model has no config.json: one GGUF file, or made in memory
        return None
    name: str | None = recorded.get("_name_or_path") or recorded.get("_model_name_or_path")
    return name


@dataclass(frozen=True)
class HeadProfile:
    """The shares of one model's KV heads.

    ratios: compression ratios, ascending, in (0, 1). shares: [ratios][layers][kv_heads], the share of a context's tokens that
    each head keeps at each ratio, in [0, 1], with mean 1 - ratio. made: how it was measured, for people.
    """

    model: ModelIdentity
    ratios: list[float]
    shares: list[list[list[float]]]
    made: dict[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError, naming the part that is wrong."""
        if not self.ratios or self.ratios != sorted(set(self.ratios)) or not 0 < self.ratios[0] <= self.ratios[-1] < 1:
            raise ValueError(f"ratios={self.ratios} must be ascending, between 0 and 1")
        expected = (len(self.ratios), self.model.num_hidden_layers, self.model.num_key_value_heads)
        shares = np.asarray(self.shares, dtype=np.float64)  # ValueError where lists have different lengths
        if shares.shape != expected:
            raise ValueError(f"shares are {list(shares.shape)}; they must be [ratios, layers, KV heads], {list(expected)}")
        if not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError("shares must be between 0 and 1")
        for ratio, mean in zip(self.ratios, shares.mean((1, 2)), strict=True):
            if abs(mean - (1 - ratio)) > 10**-_DIGITS:
                raise ValueError(f"the shares of ratio {ratio} have mean {mean:.4f}; it must be {1 - ratio:.4f}")

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Reads a profile. path: as in `find_file`. Raises ConfigError."""
        file = find_file(path, "head profile", SUFFIX, _COMMAND)
        again = f"Make it again with `{_COMMAND}`."
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            found = values["format"]
            if found == FORMAT:
                return cls(ModelIdentity(**values["model"]), values["ratios"], values["shares"], values["made"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise ConfigError(f"head profile {file}: {what}. {again}") from error
        raise ConfigError(f"head profile {file}: its format is {found!r}, but this release reads format {FORMAT}. {again}")

    def save(self, path: str | Path) -> None:
        """Writes the profile, shares rounded to four digits. Raises OSError."""
        shares = np.round(np.asarray(self.shares), _DIGITS).tolist()
        head = json.dumps({"format": FORMAT, "model": asdict(self.model), "made": self.made, "ratios": self.ratios}, indent=1)
        # One layer a line: short, and readable.
        layers = ["[\n   " + ",\n   ".join(json.dumps(layer) for layer in ratio) + "\n  ]" for ratio in shares]
        text = head[:-2] + ',\n "shares": [\n  ' + ",\n  ".join(layers) + "\n ]\n}\n"
        Path(path).write_text(text, encoding="utf-8")

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raises HostError, with the reason, when this profile is of another model. config: see `ModelIdentity.of`."""
        self.model.check(config, "head profile")

    def counts(
        self,
        context_len: int,
        num_slots: int,
        floor: int = 0,
        lanes: tuple[int, int] | None = None,
        most: list[int] | None = None,
    ) -> list[int]:
        """How many tokens each head keeps of a context of context_len tokens, layer by layer, head by head.

        num_slots: tokens that a head keeps on average. floor: tokens that each keeps at least (sinks and window).
        lanes: (first, last), the KV heads first ... last - 1 of each layer that this tensor-parallel rank has; None for all.
            A rank divides its own heads' num_slots * heads: what others keep is not taken from or given to them.
        most: tokens that each head has to choose from, in the order of the result; None for all of the context.

        The result sums to num_slots * heads exactly, each from floor to context_len or `most`. Shares are interpolated between the
        recorded ratios, and between the lowest of them and ratio 0, where each head keeps all; above the highest they shrink in
        proportion. What floor and context_len forbid is divided among the others in proportion to their shares; fractions by the
        largest remainder, the earlier head of equals. Raises ValueError.
        """
        if not 0 <= floor <= num_slots <= context_len:
            raise ValueError(f"floor={floor}, num_slots={num_slots}, context_len={context_len} must be ascending")
        weights = self._shares_at(1 - num_slots / context_len)[:, slice(*lanes) if lanes else slice(None)].reshape(-1)
        weights = np.maximum(weights, _SMALLEST_WEIGHT)
        total = num_slots * weights.size

        # The factor at which the shares, kept between floor and context_len, sum to the total: they grow with it, so bisect.
        highest = np.full(weights.size, context_len) if most is None else np.asarray(most)
        low, high = 0.0, context_len / float(weights.min())
        for _ in range(100):
            middle = (low + high) / 2
            if np.clip(middle * weights, floor, highest).sum() < total:
                low = middle
            else:
                high = middle
        exact = np.clip(high * weights, floor, highest)
        counts = np.floor(exact).astype(np.int64)
        missing = total - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        return [int(count) for count in counts]

    def _shares_at(self, ratio: float) -> np.ndarray:
        """Shares [layers, kv_heads] at a ratio in [0, 1]; above the highest recorded one that one's, for `counts` to scale."""
        recorded = np.asarray(self.shares)
        known, ratios = np.concatenate([np.ones_like(recorded[:1]), recorded]), [0.0, *self.ratios]
        ratio = min(ratio, ratios[-1])
        after = max(1, int(np.searchsorted(ratios, ratio)))
        part = (ratio - ratios[after - 1]) / (ratios[after] - ratios[after - 1])
        shares: np.ndarray = (1 - part) * known[after - 1] + part * known[after]
        return shares
