"""The tables of methods and presets: what each decides if a setting is not given. All other code asks these rows.

A new method is one row of `METHODS`, and one function if it scores without queries (`compress.ranking`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCORES = ("attention", "obcache-v", "obcache-k", "obcache-kv")
POOLINGS = ("none", "average", "max")
BUDGETS = ("uniform", "adakv", "global", "profile")

REPLAY_ATTENTIONS = ("whole", "local")

LOCAL_REPLAY_CHUNK = 256
"""Context tokens that a local pass of a replay reads again, unless it is said."""

EVERY_QUERY = 0
"""`CompressionSettings.window` of a method that scores with every query of the context (h2o, given as "all") or of the replay."""

KERNEL_SIZE = 5
"""Number of positions that are pooled together by default."""

REPLAY_RECENT_TOKENS = 8
"""Last tokens of a context that a replay keeps. A question comes right after them, and the queries of a replay do not, so heads with
a small part of a global budget would lose them. With them, the KL divergence at 0.9 is a fifth lower (launch/results/quality.md)."""

GATE_RECENT_SHARE = 0.3
"""Of what a head keeps with gates. A gate does not know where its token stands, and what follows a text asks most about its end. Without it
the KL divergence at 0.7 was a half higher, and with it no needle was lost."""

GATE_RECENT_TOKENS = 8
"""Last tokens of a context that gates keep, for the reason above: calibration's queries do not come right after them either."""

HIDDEN_GATE_RECENT_TOKENS = 128
"""Last tokens of a context that published gates keep: KVzap's sliding window (arXiv 2601.07891)."""


@dataclass(frozen=True)
class Method:
    """One method.

    scored_by: whose queries score a context's tokens: its own last queries, the queries of a replay after it, or nobody's; gates look
        at each token's own K and V instead, hidden gates at its hidden states.
    summary: for the help of `--obcache-method`.
    decides: settings that it sets unless they are given.
    with_budget: settings that it sets likewise, for one budget, by the budget's name.
    window: the only window that it allows; None if it allows any.
    window_reason: continues the error "window=VALUE ..." for any other window.
    takes_every_query: whether window may be "all".
    poolings: those it allows. Averages near the ends of a text count zeros, as KVPress's do, which logarithms do not allow.
    recent_share: part of what each head keeps that is the context's last tokens, if more than the window; where it is known beforehand
        how much a head keeps (budgets uniform and profile).
    position_scores: if no queries score, the function that scores by position, as "module:name"; see
        `compress.ranking.position_scores`.
    """

    scored_by: Literal["window", "replay", "gates", "hidden", "nobody"]
    summary: str
    decides: Mapping[str, Any] = field(default_factory=dict)
    with_budget: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    window: int | None = None
    window_reason: str = ""
    takes_every_query: bool = False
    poolings: tuple[str, ...] = POOLINGS
    recent_share: float = 0.0
    position_scores: str | None = None


METHODS: dict[str, Method] = {
    "snapkv": Method(
        "window",
        "the last ones, with scores smoothed over neighbours",
        {"score": "obcache-k", "pooling": "average", "kernel_size": KERNEL_SIZE},
    ),
    "h2o": Method("window", "the last ones, or all", {"score": "obcache-k"}, takes_every_query=True),
    "tova": Method(
        "window",
        "the last one; all heads of a layer keep the same tokens",
        {"window": 1},
        with_budget={"uniform": {"heads": "shared"}},
        window=1,
        window_reason="cannot be used with method=tova, which scores with the last query only. Remove window, or set method=snapkv or h2o.",
    ),
    "replay": Method(
        "replay",
        "the model reads the context again, and those queries score; costs one to three prefills more",
        {"window": EVERY_QUERY, "budget": "global"},
        with_budget={"global": {"recent_tokens": REPLAY_RECENT_TOKENS}},
        window=EVERY_QUERY,
        window_reason="cannot be used with method=replay, which scores with every replayed query. Remove window.",
        takes_every_query=True,
    ),
    "gate": Method(
        "gates",
        "no query; each token's own K and V, through --obcache-gates; a cached context needs no forward",
        {"window": 1, "recent_tokens": GATE_RECENT_TOKENS},
        window=1,
        window_reason="cannot be used with method=gate, which scores with no query. Remove window; recent_tokens keeps last tokens.",
        poolings=("none", "max"),
        recent_share=GATE_RECENT_SHARE,
    ),
    "hidden-gate": Method(
        "hidden",
        "no query; each token's hidden states, through published gates (KVzap, Fast KVzip) of --obcache-hidden-gates",
        {"window": 1, "recent_tokens": HIDDEN_GATE_RECENT_TOKENS, "budget": "global"},
        window=1,
        window_reason="cannot be used with method=hidden-gate, which scores with no query. Remove window; recent_tokens keeps last tokens.",
        poolings=("none", "max"),
    ),
    "streaming": Method(
        "nobody",
        "no query; the first and last tokens are kept; a sanity floor",
        position_scores="obcache_sglang.compress.ranking:latest_first",
    ),
    "random": Method("nobody", "no query; a sanity floor", position_scores="obcache_sglang.compress.ranking:random_scores"),
}


@dataclass(frozen=True)
class Preset:
    """One preset.

    method: the method unless one is given.
    decides: settings that it sets unless they are given; they override the method's.
    for_method: settings that it sets likewise, for one method, by the method's name.
    requires: settings that cannot have other values with this preset.
    shrinks_window: whether a window makes room for other tokens (`compress.ranking.effective_window`).
    measures_errors: whether a replay's global budget is divided by measured errors, not by scores alone.
    replay_sees_chunk_only: whether a replayed chunk's queries share their softmax among the sinks, the chunk and the replay.
    """

    method: str
    decides: Mapping[str, Any] = field(default_factory=dict)
    for_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    shrinks_window: bool = True
    measures_errors: bool = True
    replay_sees_chunk_only: bool = False


_KVZIP = {"method": "replay", "score": "attention", "budget": "global", "replay_attention": "whole"}

PRESETS: dict[str, Preset] = {
    "default": Preset("tova", for_method={"snapkv": {"budget": "adakv"}, "h2o": {"budget": "adakv"}}),
    "kvpress": Preset("snapkv", {"sink_tokens": 0}, shrinks_window=False),
    "paper": Preset("snapkv", for_method={"snapkv": {"window": 16, "pooling": "max", "kernel_size": 7}}),
    "kvzip": Preset(
        "replay", {"score": "attention", "recent_tokens": 0}, requires=_KVZIP, measures_errors=False, replay_sees_chunk_only=True
    ),
}

# If a request names another method or preset, these settings start from that method's or preset's own values: a window chosen for
# snapkv says nothing about tova.
_DECIDED_BY_METHOD = frozenset(
    {"window", "pooling", "kernel_size", "recent_tokens", "heads", "segment_tokens", "exact_segments", "segment_ratios"}
)
_DECIDED_BY_PRESET = _DECIDED_BY_METHOD | {"sink_tokens"}


def resolve(given: Mapping[str, Any], *, has_profile: bool, has_gates: bool, has_hidden_gates: bool) -> dict[str, Any]:
    """All settings that are given, or that the method or the preset decides. Others are left out.

    has_profile: whether the server has a head profile. Then the default budget is `profile`, except for methods that compare all heads.
    has_gates: whether the server has gates. Then the default method of preset `default` is `gate`.
    has_hidden_gates: likewise, for method `hidden-gate`, where there are no gates.
    Names are not checked here: unknown names raise KeyError.
    """
    preset = PRESETS[given.get("preset", "default")]
    default = preset.method
    if preset is PRESETS["default"]:
        default = "gate" if has_gates else "hidden-gate" if has_hidden_gates else default
    name = given.get("method", default)
    method = METHODS[name]
    if has_profile and "budget" not in method.decides:
        given = {"budget": "profile", **given}
    decided: dict[str, Any] = {"method": name, "window": 64, "budget": "uniform", "heads": "per-head", **method.decides}
    decided |= method.with_budget.get(given.get("budget", decided["budget"]), {})
    decided |= {**preset.decides, **preset.for_method.get(name, {})}
    if given.get("heads") == "shared" and decided["budget"] == "adakv":
        decided["budget"] = "uniform"  # heads that keep the same tokens have nothing to divide
    if given.get("replay_attention") == "local":
        decided["replay_chunk"] = LOCAL_REPLAY_CHUNK
    if given.get("pooling") == "none":
        decided["kernel_size"] = 1
    elif given.get("pooling") is not None:
        decided.setdefault("kernel_size", KERNEL_SIZE)
    return {**decided, **given}


def superseded(before: Mapping[str, str], overrides: Mapping[str, Any]) -> frozenset[str]:
    """Settings of a server that do not apply to a request, because the request names another preset or method.

    before: the server's preset and method. overrides: what the request gives.
    """
    preset = overrides.get("preset", before["preset"])
    if preset != before["preset"]:
        return _DECIDED_BY_PRESET | PRESETS[preset].requires.keys()
    return _DECIDED_BY_METHOD if overrides.get("method", before["method"]) != before["method"] else frozenset()
