"""What an evaluation compares: the exact cache, and ways to compress it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from obcache_sglang.config import BUDGETS, METHODS, PRESETS, SCORES, CompressionSettings
from obcache_sglang.errors import ConfigError, InvalidValue

RATIO_PRESETS = {"kvpress": (0.25, 0.5, 0.75, 0.875), "paper": (0.6, 0.7, 0.8, 0.9)}
"""Compression ratios that others report: KVPress's leaderboard, and the OBCache paper (arXiv 2510.07651)."""

MODES = ("agnostic", "aware")
"""agnostic: a context is compressed before anyone knows its questions, and shared by them; aware: with each question."""


@dataclass(frozen=True)
class Arm:
    """One way to serve the same questions.

    method: exact, or one of `config.METHODS`; a preset's name where `score` and `budget` are the preset's own. ratio: of KV pairs
    removed.
    """

    method: str
    score: str = ""
    budget: str = ""
    ratio: float = 0.0
    mode: str = "agnostic"

    @property
    def is_exact(self) -> bool:
        return self.method == "exact"

    @property
    def wish(self) -> Any:
        """What a request says in custom_params["obcache"], beside where its context ends."""
        if self.is_exact:
            return False
        settings = {"method": self.method, "score": self.score, "budget": self.budget}
        if self.method in PRESETS:
            settings = {"preset": self.method}
        return settings | {"compression_ratio": self.ratio} | ({"mode": "prompt"} if self.mode == "aware" else {})

    def wish_for(self, context_len: int) -> Any:
        """What a request says in custom_params["obcache"] whose first `context_len` tokens are the context."""
        return self.wish if self.is_exact or self.mode == "aware" else {"context_len": context_len, **self.wish}

    def to_dict(self) -> dict[str, Any]:
        if self.is_exact:
            return {"method": "exact", "ratio": 0.0}
        return {"method": self.method, "score": self.score, "budget": self.budget, "ratio": self.ratio, "mode": self.mode}


EXACT = Arm("exact")


def parse_arms(texts: Iterable[str], ratios: Iterable[float], modes: Iterable[str]) -> list[Arm]:
    """The exact arm, and each of `texts` at each ratio in each mode.

    texts: "METHOD/SCORE/BUDGET" or the name of a preset. Raises ConfigError.
    """
    arms = [EXACT]
    ratios, modes = list(ratios), list(modes)
    for text in texts:
        method, *others = text.split("/")
        try:
            if not others and method in PRESETS:
                settings = CompressionSettings.resolve({"preset": method})
                others = [settings.score, settings.budget]
            elif len(others) == 2:
                CompressionSettings.resolve({"method": method, "score": others[0], "budget": others[1]})
            else:
                raise ConfigError(
                    f"--arms {text}: give METHOD/SCORE/BUDGET (methods {', '.join(METHODS)}; scores {', '.join(SCORES)}; budgets "
                    f"{', '.join(BUDGETS)}), or a preset: {', '.join(PRESETS)}."
                )
            for ratio in ratios:
                CompressionSettings(compression_ratio=ratio)
        except InvalidValue as error:
            raise ConfigError(f"--arms {text}: {error.name}={error.value!r} {error.reason}") from error
        score, budget = others
        arms += [Arm(method, score, budget, ratio, mode) for mode in modes for ratio in ratios]
    return list(dict.fromkeys(arms))


def check_head_profile(arms: Iterable[Arm], flags: Sequence[str], option: str) -> None:
    """Raises ConfigError where an arm needs a head profile and `flags`, which `option` gave, bring the server none."""
    if any(arm.budget == "profile" for arm in arms) and "--obcache-head-profile" not in flags:
        raise ConfigError(f"an arm has budget profile: say {option} '--obcache-head-profile FILE'.")


def parse_ratios(texts: Iterable[str]) -> list[float]:
    """Numbers, and names of `RATIO_PRESETS`, in ascending order. Raises ConfigError."""
    ratios: set[float] = set()
    for text in texts:
        try:
            ratios.update(RATIO_PRESETS[text] if text in RATIO_PRESETS else [float(text)])
        except ValueError as error:
            raise ConfigError(f"--ratios {text}: give numbers in [0, 1), or {' or '.join(RATIO_PRESETS)}.") from error
    return sorted(ratios)
