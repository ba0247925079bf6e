"""What an evaluation compares: the exact cache, ways to compress it, and in what two of them differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from obcache_sglang.errors import ConfigError, InvalidValue
from obcache_sglang.settings import BUDGETS, COMPRESSION_OPTIONS, METHODS, OPTIONS, PRESETS, SCORES, CompressionSettings

RATIO_PRESETS = {"kvpress": (0.25, 0.5, 0.75, 0.875), "paper": (0.6, 0.7, 0.8, 0.9)}
"""Compression ratios that others report: KVPress's leaderboard, and the OBCache paper (arXiv 2510.07651)."""

MODES = ("agnostic", "aware")
"""agnostic: a context is compressed before anyone knows its questions, and shared by them; aware: with each question."""


@dataclass(frozen=True)
class Arm:
    """One way to serve the same questions.

    method: exact, or one of `config.METHODS`; a preset's name where `score` and `budget` are the preset's own. ratio: of KV pairs
    removed. options: other settings than the method's or preset's own, "recent_tokens=8,replay_chunk=256".
    """

    method: str
    score: str = ""
    budget: str = ""
    ratio: float = 0.0
    mode: str = "agnostic"
    options: str = ""

    @property
    def is_exact(self) -> bool:
        return self.method == "exact"

    @property
    def wish(self) -> Any:
        """What a request says in custom_params["obcache"], beside where its context ends."""
        if self.is_exact:
            return False
        return self._given | {"compression_ratio": self.ratio} | ({"mode": "prompt"} if self.mode == "aware" else {})

    @property
    def _given(self) -> dict[str, Any]:
        """The settings that are given; the others are the method's or preset's own."""
        settings: dict[str, Any] = {"method": self.method, "score": self.score, "budget": self.budget}
        if self.method in PRESETS:
            settings = {"preset": self.method}
        options = (text.split("=", 1) for text in self.options.split(",") if text)
        return settings | {name: OPTIONS[name].cli_type(value) for name, value in options}

    @property
    def settings(self) -> CompressionSettings:
        """All settings of an arm that compresses. Raises InvalidValue."""
        return CompressionSettings.resolve(self._given | {"compression_ratio": self.ratio})

    def wish_for(self, context_len: int) -> Any:
        """What a request says in custom_params["obcache"] whose first `context_len` tokens are the context."""
        return self.wish if self.is_exact or self.mode == "aware" else {"context_len": context_len, **self.wish}

    def to_dict(self) -> dict[str, Any]:
        if self.is_exact:
            return {"method": "exact", "ratio": 0.0}
        arm = {"method": self.method, "score": self.score, "budget": self.budget, "ratio": self.ratio, "mode": self.mode}
        return arm | ({"options": self.options} if self.options else {})


EXACT = Arm("exact")


_IN_OPTIONS = tuple(
    option.name
    for option in COMPRESSION_OPTIONS
    if option.name not in ("compression_ratio", "method", "score", "budget", "preset")
)


def parse_arms(texts: Iterable[str], ratios: Iterable[float], modes: Iterable[str]) -> list[Arm]:
    """The exact arm, and each of `texts` at each ratio in each mode.

    texts: "METHOD/SCORE/BUDGET" or the name of a preset, both with "+NAME=VALUE" for each setting that is not their own. Raises
    ConfigError.
    """
    arms = [EXACT]
    ratios, modes = list(ratios), list(modes)
    for text in texts:
        try:
            arm = _parse_arm(text)
            for ratio in ratios:
                CompressionSettings(compression_ratio=ratio)
        except InvalidValue as error:
            raise ConfigError(f"--arms {text}: {error.name}={error.value!r} {error.reason}") from error
        arms += [replace(arm, ratio=ratio, mode=mode) for mode in modes for ratio in ratios]
    return list(dict.fromkeys(arms))


def _parse_arm(text: str) -> Arm:
    name, *options = text.split("+")
    for option in options:
        setting, found, _ = option.partition("=")
        if not found or setting not in _IN_OPTIONS:
            raise ConfigError(f"--arms {text}: after + stands NAME=VALUE of one of {', '.join(_IN_OPTIONS)}.")
    method, *others = name.split("/")
    if not others and method in PRESETS:
        preset = CompressionSettings.resolve({"preset": method})
        others = [preset.score, preset.budget]
    elif len(others) != 2:
        raise ConfigError(
            f"--arms {text}: give METHOD/SCORE/BUDGET (methods {', '.join(METHODS)}; scores {', '.join(SCORES)}; budgets "
            f"{', '.join(BUDGETS)}), or a preset: {', '.join(PRESETS)}."
        )
    score, budget = others
    arm = Arm(method, score, budget, options=",".join(sorted(options)))
    arm.settings  # noqa: B018  (raises what is wrong)
    return arm


# --- in what arms differ ------------------------------------------------------------------------------------------------


@cache
def differences(one: Arm, other: Arm) -> tuple[str, ...]:
    """In what `other` differs from `one`, each in words: ("score: attention (largest of all queries) -> obcache-v",).

    Settings are compared, not names: two arms may differ in what their methods or presets bring with them.
    """
    if one.is_exact or other.is_exact:
        return ("compression",) if one.is_exact != other.is_exact else ()
    found = []
    theirs = _things(other)
    for thing, before in _things(one).items():
        after = theirs[thing]
        if before != after and None not in (before, after):
            found.append(f"{thing}: {before} -> {after}")
    return tuple(found)


def effect(one: Arm, other: Arm) -> str:
    """What a difference between two arms can be put down to: one thing, or, where they differ in several, no single one."""
    found = differences(one, other)
    if len(found) == 1:
        return found[0]
    if not found:
        return "nothing: the arms are the same"
    return f"not the effect of one thing; they differ in {len(found)}: {'; '.join(found)}"


def _things(arm: Arm) -> dict[str, str | None]:
    """All that decides which tokens an arm keeps, by name; None for what has no meaning for it."""
    settings = arm.settings
    things: dict[str, str | None] = {name: str(value) for name, value in settings.to_dict().items()}
    things["score"] = f"{settings.score} (largest of all queries)" if settings.reduce == "max" else settings.score
    # Instead of a setting, what it does. Attention scores are not made comparable between layers: that is the other scores'.
    del things["normalization"]
    things["scores relative to their layer's output"] = None if settings.score == "attention" else _yes(settings.weighs_queries)
    things["budget divided by measured errors"] = _yes(settings.measures_errors)
    if settings.method != "replay":
        things["replay_chunk"] = things["replay_attention"] = None
    if settings.budget != "adakv":
        things["adakv_safeguard"] = None
    return {name.replace("_", " "): value for name, value in things.items()} | {"mode": arm.mode}


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def attention_baseline(arm: Arm) -> Arm | None:
    """The arm that differs only in its score, which is attention's; None for arms without an OBCache score."""
    if not arm.score.startswith("obcache") or arm.method in PRESETS:
        return None
    baseline = replace(arm, score="attention")
    found = differences(baseline, arm)
    return baseline if len(found) == 1 and found[0].startswith("score:") else None


def other_baselines(arm: Arm, arms: Iterable[Arm]) -> list[Arm]:
    """Of `arms`, those beside exact and attention that an arm is compared with, whatever they differ in.

    The same arm without its options, and for all other replays preset kvzip.
    """
    plain = replace(arm, options="")
    kvzip = Arm("kvzip", "attention", "global", arm.ratio, arm.mode)
    wished = [plain] if arm.options else []
    if not arm.is_exact and arm.settings.method == "replay":
        wished.append(kvzip)
    return [each for each in dict.fromkeys(wished) if each != arm and each in set(arms)]


def check_measured_files(arms: Iterable[Arm], flags: Sequence[str], option: str) -> None:
    """Raises ConfigError where an arm needs a head profile or gates and `flags`, which `option` gave, bring the server none."""
    arms = list(arms)
    for method, flag in (("gate", "--obcache-gates"), ("hidden-gate", "--obcache-hidden-gates")):
        if any(arm.method == method for arm in arms) and flag not in flags:
            raise ConfigError(f"an arm has method {method}: say {option} '{flag} FILE'.")
    if any(arm.budget == "profile" for arm in arms) and not {"--obcache-head-profile", "--obcache-gates"} & {*flags}:
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
