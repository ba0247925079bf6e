"""Settings: what decides which tokens are kept, and how the server offers it.

Every setting is declared once, in `OPTIONS`: its command-line flag, its check and its help text come from there, and so do
the keys a request may override. Defaults that depend on each other (a method's window, a preset's pooling) are resolved in
one place, `CompressionSettings.resolve`, from the values that were really given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from obcache_sglang.errors import ConfigError, InvalidValue

SETTINGS_ENV = "OBCACHE_SGLANG_SETTINGS"
"""Environment variable that carries the server's settings, as JSON, from the launcher to every process it starts."""

_SECRET_ENV = "OBCACHE_SGLANG_SECRET"


def server_secret() -> bytes:
    """What context ids cannot be guessed without: 32 random bytes, the same in all processes of a server."""
    return bytes.fromhex(os.environ[_SECRET_ENV])


METHODS = ("snapkv", "h2o", "tova", "replay", "streaming", "random")
SCORES = ("attention", "obcache-v", "obcache-k", "obcache-kv")
PRESETS = ("default", "kvpress", "paper", "kvzip")
POOLINGS = ("none", "average", "max")
HEADS = ("per-head", "shared")
BUDGETS = ("uniform", "adakv", "global", "profile")
NORMALIZATIONS = ("layer", "none")
MODES = ("marked", "prompt")
WHENS = ("first", "idle")
HEAD_ATTENTIONS = ("triton", "flashinfer")
DECODE_GRAPHS = ("auto", "on", "off")

EVERY_QUERY = 0
"""`CompressionSettings.window` of a method that scores with every query: of the context (h2o, written "all"), or of the replay."""

# Settings that a method or preset decides unless they are given. A request that names another method or preset starts
# from that one's own values: a window chosen for snapkv says nothing about tova.
_DECIDED_BY_METHOD = frozenset({"window", "pooling", "kernel_size", "recent_tokens", "heads"})
_DECIDED_BY_PRESET = _DECIDED_BY_METHOD | {"sink_tokens"}

# What each number may be, and why no more: a client may send any of them, and none may cost others much or overflow.
# The longest contexts that models serve today bound what counts tokens.
_LONGEST_CONTEXT = 1 << 24
BOUNDS: dict[str, tuple[float, float, str]] = {
    "window": (1, 8192, "as many queries read the whole context once more"),
    "kernel_size": (1, 127, "wider smoothing keeps whatever lies near"),
    "sink_tokens": (0, _LONGEST_CONTEXT, "the longest context"),
    "recent_tokens": (0, _LONGEST_CONTEXT, "the longest context"),
    "max_kept_tokens": (1, _LONGEST_CONTEXT, "the longest context"),
    "replay_chunk": (32, 1 << 20, "each pass reads a prompt of its own: with shorter ones it would read little else"),
    "context_len": (1, _LONGEST_CONTEXT, "the longest context"),
    "ttl_seconds": (1, 366 * 86400, "a year"),
    "wait_seconds": (0, 600, "ten minutes"),
    "min_tokens": (1, _LONGEST_CONTEXT, "the longest context"),
    "max_contexts": (1, 1 << 20, "each remembers its tokens"),
    "max_pinned_slots": (0, 1 << 40, "no pool is larger"),
}
"""Lowest and highest value of every number that is not a fraction, and the reason for the highest."""

_REPLAY_RECENT_TOKENS = 8
"""What follows a context stands next to its last tokens, and the queries of a replay do not. Heads to which a global budget gives
little would lose them: with these, the KL divergence at 0.9 is a fifth lower (README, Results)."""

_KERNEL_SIZE = 5
"""Neighbouring positions that pooling smooths over unless told."""


@dataclass(frozen=True)
class CompressionSettings:
    """Everything that decides which tokens of a context are kept. Part of a context's identity.

    compression_ratio: fraction of KV pairs removed, in [0, 1), as in KVPress and the OBCache paper (arXiv 2510.07651).
    method: which queries score, and what is always kept (snapkv, h2o, tova, streaming, random; replay: the queries of the model
        as it re-reads the context).
    score: how a query scores a token (attention, obcache-v, obcache-k, obcache-kv).
    preset: `kvpress` protects nothing but the window, and never shrinks it; `default` and `paper` also protect sinks and
        shrink a window that is larger than half of the kept tokens. `kvzip`: KVPress's KVzip, method replay only: a replayed
        chunk's queries share their softmax among the sinks, the chunk in the context and the replay itself.
    window: number of last context queries that score, and of last positions that are always kept; `EVERY_QUERY` for all (h2o
        only). streaming ignores it, random only protects that many last tokens.
    pooling, kernel_size: smoothing of the scores over neighbouring positions; kernel_size is odd, and 1 without pooling.
    sink_tokens: first positions that are always kept.
    recent_tokens: last positions that are always kept, where the window is shorter.
    heads: `per-head` keeps each KV head's own tokens, `shared` one selection (the mean over heads) for a layer.
    max_kept_tokens: upper bound of the kept tokens per KV head, beside the ratio; None for no bound.
    budget: how the kept tokens are divided, as many in all under each. `uniform`: the same number for each head of each layer;
        `adakv`: each layer's over its heads (AdaKV, arXiv 2407.11550, in KVPress's form); `global`: all over all heads of all
        layers, of which each keeps at least its sinks and window; `profile`: as the server's head profile says, likewise.
    adakv_safeguard: the part of an even share that each head keeps whatever the others score, in [0, 1]; for adakv.
    replay_chunk: context tokens that one replay pass re-reads; method replay only.
    normalization: `layer` divides each query's errors by the squared norm of what the layer's attention gives there, both
        behind the output projection (`compress.scores.relative_error_weights`), so that layers and heads can be compared: obcache
        scores, and the errors that are measured for a replay (`compress.measured_errors`), which decide how many tokens a head keeps
        whatever the score; the scores only order a head's tokens then. For global. Attention weights need none themselves, and
        preset kvzip has neither.
    """

    compression_ratio: float = 0.7
    method: str = "tova"
    score: str = "obcache-v"
    preset: str = "default"
    window: int = 1
    pooling: str = "none"
    kernel_size: int = 1
    sink_tokens: int = 4
    recent_tokens: int = 0
    heads: str = "shared"
    max_kept_tokens: int | None = None
    budget: str = "uniform"
    adakv_safeguard: float = 0.2
    normalization: str = "layer"
    replay_chunk: int = 2048

    def __post_init__(self) -> None:
        """Raises InvalidValue on the first setting that is not allowed, alone or beside the others."""
        for option in COMPRESSION_OPTIONS:
            checked = option.check(option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)
        if self.method == "replay" and self.window != EVERY_QUERY:
            raise InvalidValue(
                "window", self.window, "has no effect with method replay, whose queries are all of a replay's: leave it out."
            )
        if self.preset == "kvzip" and (self.method, self.score, self.budget) != ("replay", "attention", "global"):
            raise InvalidValue(
                "preset",
                "kvzip",
                f"is method=replay, score=attention, budget=global, not {self.method}, {self.score}, {self.budget}; "
                "leave these out, or the preset.",
            )
        if self.window == EVERY_QUERY and self.method not in ("h2o", "replay"):
            raise InvalidValue(
                "window", "all", f"is for method h2o only; {self.method} needs a number of last queries, 1 or more."
            )
        if self.method == "tova" and self.window != 1:
            raise InvalidValue(
                "window",
                self.window,
                "is not allowed with method tova: it scores with the last query only; set method=snapkv or h2o.",
            )
        if self.pooling == "none" and self.kernel_size != 1:
            raise InvalidValue(
                "kernel_size",
                self.kernel_size,
                "has no effect without pooling: leave it out, or set pooling=average|max.",
            )
        if self.heads == "shared" and self.budget != "uniform":
            raise InvalidValue(
                "heads",
                "shared",
                f"keeps the same tokens in every head of a layer, so budget={self.budget} could not divide them; "
                "set budget=uniform, or heads=per-head.",
            )

    @classmethod
    def resolve(cls, given: Mapping[str, Any], *, has_profile: bool = False) -> CompressionSettings:
        """Settings from the values really given; the method and preset decide the rest.

        given: any of this class's field names; `window` may be "all". has_profile: whether there is a head profile, by which budgets
        are then divided unless told; replay's are not: it measures for itself. Raises InvalidValue.
        """
        preset = given.get("preset", cls.preset)
        # The other presets are forms of SnapKV.
        method = given.get("method", {"default": cls.method, "kvzip": "replay"}.get(preset, "snapkv"))
        if has_profile and method != "replay":
            given = {"budget": "profile", **given}
        decided: dict[str, Any] = {"window": 64, "pooling": "none", "kernel_size": 1, "heads": "per-head", "budget": "uniform"}
        decided["score"] = "obcache-k" if method in ("snapkv", "h2o") else "obcache-v"
        if method == "snapkv":
            decided |= {"pooling": "average", "kernel_size": _KERNEL_SIZE}
            if preset == "paper":
                decided |= {"window": 16, "pooling": "max", "kernel_size": 7}
        elif method == "tova":
            decided |= {"window": 1, "heads": "shared" if given.get("budget", "uniform") == "uniform" else "per-head"}
        elif method == "replay":
            decided |= {"window": EVERY_QUERY, "budget": "global"}
            if preset != "kvzip" and given.get("budget", "global") == "global":
                decided["recent_tokens"] = _REPLAY_RECENT_TOKENS
        if preset == "kvzip":
            decided["score"] = "attention"
        decided["method"] = method
        if preset == "kvpress":
            decided["sink_tokens"] = 0
        elif preset == "default" and method in ("snapkv", "h2o") and given.get("heads") != "shared":
            decided["budget"] = "adakv"
        if given.get("pooling") == "none":
            decided["kernel_size"] = 1
        elif given.get("pooling") is not None and decided["kernel_size"] == 1:
            decided["kernel_size"] = _KERNEL_SIZE
        return cls(**{**decided, **given})

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` gives back an equal object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionSettings:
        """The inverse of `to_dict`: takes every field as it is, resolves nothing. Raises InvalidValue."""
        return cls(**values)

    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal in every process and release for equal settings."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def needs_queries(self) -> bool:
        """Whether scoring reads attention queries (else positions alone decide)."""
        return self.method not in ("streaming", "random")

    @property
    def own_queries_score(self) -> bool:
        """Whether the queries of the prefill that makes a context score it (not those of a replay behind it)."""
        return self.needs_queries and self.method != "replay"

    @property
    def weighs_queries(self) -> bool:
        """Whether each query's scores are made relative to what its layer gives, so that layers and heads can be compared."""
        return self._compares_errors and self.score != "attention"

    @property
    def measures_errors(self) -> bool:
        """Whether a global budget is divided by measured errors, scores only ordering a head's tokens; else by scores alone.

        For replay: errors of the last queries of a context say less of those to come than its scores do, measured. Whatever the
        score, so that two replays that differ in it differ in nothing else; but preset kvzip is KVPress's, which has only scores.
        """
        return self.method == "replay" and self.preset != "kvzip" and self._compares_errors

    @property
    def _compares_errors(self) -> bool:
        """Whether errors of different heads and layers are compared, relative to what their layer gives."""
        return self.budget == "global" and self.normalization == "layer"

    @property
    def shrinks_window(self) -> bool:
        """Whether a window makes room for other tokens (`effective_window`); KVPress's never does."""
        return self.preset != "kvpress"

    @property
    def kept_window(self) -> int:
        """Last positions that every head keeps, as far as there is room for them."""
        return max(self.window, self.recent_tokens)

    @property
    def reduce(self) -> str:
        """How the scores of several queries join: `max` for the attention of a replay (KVzip's statistic), else `sum`."""
        return "max" if self.method == "replay" and self.score == "attention" else "sum"

    def kept_tokens(self, context_tokens: int) -> int:
        """Tokens kept per KV head of a context of `context_tokens`: `int(L * (1 - ratio))`, at least 1, at most the cap."""
        kept = int(context_tokens * (1 - self.compression_ratio))
        if self.max_kept_tokens is not None:
            kept = min(kept, self.max_kept_tokens)
        return max(kept, 1)

    def kept_slots(self, context_tokens: int, page_size: int) -> int:
        """KV slots a context of `context_tokens` (whole pages) holds: `min(L, ceil_to_page(kept_tokens))`."""
        pages = math.ceil(self.kept_tokens(context_tokens) / page_size)
        return min(context_tokens, pages * page_size)

    def safeguarded_tokens(self, num_slots: int) -> int:
        """Budget adakv: tokens that each head keeps whatever the others score, of an even share of num_slots; KVPress's count."""
        return max(1, int(num_slots * self.adakv_safeguard)) if self.adakv_safeguard else 0


@dataclass(frozen=True)
class ServerSettings:
    """One server's settings: the defaults of its requests, and how it offers compression.

    compression: what a request gets that asks for nothing else.
    mode: `marked`: prompts say where their context ends; `prompt`: the context is all of a prompt but its last token, which scores it.
    head_profile: file of a head profile, or the name of one that comes with the package; then budgets but replay's are `profile` unless given.
    when: `first`: a context's first question compresses it; `idle`: questions are served exactly until the engine has nothing
        else to do, or its pool gets tight, and compresses the contexts they came with.
    min_tokens: shorter contexts are served exactly.
    marker: the text that ends a context.
    max_contexts: contexts remembered at once.
    max_pinned_slots: KV slots that pinned contexts may hold together; None for half of the pool.
    head_attention: whose kernels attend heads of different length on GPUs.
    decode_graphs: `on`: decode batches with such heads run in CUDA graphs, of which a second set is captured at start-up; `auto`:
        on where the server's own budget makes such heads.
    allow_untested_sglang: start on another SGLang release than the tested one.
    given: the compression settings that were given explicitly, from which a request's overrides are resolved.
    """

    compression: CompressionSettings = field(default_factory=CompressionSettings)
    mode: str = "marked"
    when: str = "first"
    head_profile: str | None = None
    min_tokens: int = 256
    marker: str = "<|obcache|>"
    max_contexts: int = 1024
    max_pinned_slots: int | None = None
    head_attention: str = "triton"
    decode_graphs: str = "auto"
    allow_untested_sglang: bool = False
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Raises InvalidValue for settings that exclude each other."""
        if self.when == "idle" and self.mode == "prompt":
            raise InvalidValue(
                "when", "idle", "has no use in mode prompt, whose contexts have one question each; set when=first."
            )
        if self.decode_graphs == "on" and self.head_attention != "triton":
            raise InvalidValue(
                "decode_graphs",
                "on",
                f"cannot be had with head_attention={self.head_attention}, which plans each step on the host; set triton.",
            )
        self._check_budget(self.compression)

    @property
    def captures_decode_graphs(self) -> bool:
        """Whether decode graphs for heads of different length are wanted."""
        if self.decode_graphs == "auto":
            return self.compression.budget != "uniform" and self.head_attention == "triton"
        return self.decode_graphs == "on"

    def _check_budget(self, compression: CompressionSettings) -> CompressionSettings:
        if compression.budget == "profile" and self.head_profile is None:
            raise InvalidValue(
                "budget",
                "profile",
                "needs a server with a head profile (--obcache-head-profile); choose uniform, adakv or global.",
            )
        return compression

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> ServerSettings:
        """Settings from the values really given, under their field names. Raises InvalidValue, also for unknown names."""
        for name in given:
            if name not in OPTIONS:
                raise InvalidValue(name, given[name], f"is not a setting; the settings are {', '.join(OPTIONS)}.")
        values = {name: OPTIONS[name].check(name, value) for name, value in given.items()}
        compression = {name: value for name, value in values.items() if OPTIONS[name].per_request}
        server = {name: value for name, value in values.items() if not OPTIONS[name].per_request}
        return cls(
            compression=CompressionSettings.resolve(compression, has_profile="head_profile" in server),
            given=compression,
            **server,
        )

    def compression_for(self, overrides: Mapping[str, Any]) -> CompressionSettings:
        """The settings of a request that overrides some. Raises InvalidValue.

        A request that names another method or preset than the server's starts from that one's own window, pooling and heads.
        """
        if not overrides:
            return self.compression
        dropped: frozenset[str] = frozenset()
        if overrides.get("preset", self.compression.preset) != self.compression.preset:
            dropped = _DECIDED_BY_PRESET
            if overrides.get("preset") == "kvzip":
                dropped |= {"method", "score", "budget"}
        elif overrides.get("method", self.compression.method) != self.compression.method:
            dropped = _DECIDED_BY_METHOD
        kept = {name: value for name, value in self.given.items() if name not in dropped}
        return self._check_budget(CompressionSettings.resolve({**kept, **overrides}, has_profile=self.head_profile is not None))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for reports. A marker of the operator's own is not told: documents must not hold it."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("compression", "given")}
        if self.marker != ServerSettings.marker:
            shown["marker"] = None
        return shown | {"compression": self.compression.to_dict()}

    def publish(self) -> None:
        """Hands the settings to every process started from this one, in the environment variable `SETTINGS_ENV`."""
        defaults = ServerSettings()
        server = {
            option.name: getattr(self, option.name)
            for option in SERVER_OPTIONS
            if getattr(self, option.name) != getattr(defaults, option.name)
        }
        os.environ[SETTINGS_ENV] = json.dumps(server | dict(self.given), sort_keys=True)
        os.environ[_SECRET_ENV] = secrets.token_hex(32)

    @staticmethod
    def from_environment() -> ServerSettings | None:
        """The published settings, or None where compression was not asked for. Raises ConfigError."""
        text = os.environ.get(SETTINGS_ENV)
        if not text:
            return None
        try:
            given = json.loads(text)
            return ServerSettings.resolve(given)
        except (InvalidValue, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{SETTINGS_ENV}={text!r} cannot be read ({error}). It is set by --obcache, as a JSON object; unset it."
            ) from error


# --- the options --------------------------------------------------------------------------------------------------------

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """One setting. check(name, value) returns the value to use or raises InvalidValue; per_request: a request may set it."""

    name: str
    check: Check
    help: str
    cli_type: Callable[[str], Any] = str
    metavar: str | None = None
    per_request: bool = True

    @property
    def flag(self) -> str:
        return "--obcache-" + self.name.replace("_", "-")


def _one_of(choices: Iterable[str]) -> Check:
    allowed = tuple(choices)

    def check(name: str, value: Any) -> str:
        if value not in allowed:
            raise InvalidValue(
                name,
                value,
                f"is not allowed; choose {' or '.join([', '.join(allowed[:-1]), allowed[-1]][len(allowed) == 1 :])}.",
            )
        return str(value)

    return check


def _whole_number(what: str, *, optional: bool = False, odd: bool = False, all_word: bool = False) -> Check:
    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if all_word and value in ("all", EVERY_QUERY) and not isinstance(value, bool):
            return EVERY_QUERY
        return check_whole_number(name, value, what, odd=odd, all_word=all_word)

    return check


def check_whole_number(name: str, value: Any, what: str, *, odd: bool = False, all_word: bool = False) -> int:
    """A whole number within BOUNDS[name]. Raises InvalidValue. what: continues the sentence "it is ..."."""
    lowest, highest, reason = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest or (odd and value % 2 == 0):
        allowed = f"{'an odd' if odd else 'a'} whole number from {lowest} to {highest}" + (', or "all"' if all_word else "")
        raise InvalidValue(name, value, f"is not {allowed} ({reason}): it is {what}.")
    return value


def check_number(name: str, value: Any, what: str) -> float:
    """A finite number within BOUNDS[name]. Raises InvalidValue. what: continues the sentence "it is ..."."""
    lowest, highest, reason = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise InvalidValue(name, value, f"is not a number from {lowest} to {highest} ({reason}): it is {what}.")
    return float(value)


def _ratio(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InvalidValue(name, value, "is outside [0, 1): it is the fraction of KV pairs removed; 0.7 keeps 30 %.")
    return float(value)


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidValue(name, value, "is outside [0, 1]: it is the part of an even share that every head keeps.")
    return float(value)


def _marker(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value or value != value.strip():
        raise InvalidValue(name, value, "is not a text without surrounding blanks; the default is <|obcache|>.")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidValue(name, value, "is not a text.")
    return value


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidValue(name, value, "is not true or false.")
    return value


def _number(text: str) -> int | float | str:
    """A number from the command line; anything else stays text, which the option's check then refuses by name."""
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


COMPRESSION_OPTIONS = (
    Option(
        "compression_ratio",
        _ratio,
        "Fraction of a context's KV pairs that is removed, in [0, 1): 0.7 keeps 30 %%. Default: 0.7.",
        _number,
        "RATIO",
    ),
    Option(
        "method",
        _one_of(METHODS),
        "Which queries score a context's tokens. snapkv: its last ones, scores smoothed over neighbours; h2o: its last ones or all; "
        "tova: its last one, one choice for all heads; replay: the model re-reads the context, once more the work of its prefill, and "
        "those queries score; streaming (first and last tokens) and random are sanity floors. Default: tova (presets kvpress and paper: snapkv).",
        metavar="|".join(METHODS),
    ),
    Option(
        "score",
        _one_of(SCORES),
        "How a query scores a token: its attention weight, or the attention output error of removing its value, key or both "
        "(OBCache, arXiv 2510.07651). Default: obcache-v (snapkv, h2o: obcache-k; preset kvzip: attention).",
        metavar="|".join(SCORES),
    ),
    Option(
        "preset",
        _one_of(PRESETS),
        "Defaults of the settings below. kvpress: exactly KVPress's semantics, no protected sinks; paper: snapkv with window 16 and "
        "max pooling over 7; kvzip: KVPress's KVzip (method replay, score attention, budget global). Default: default.",
        metavar="|".join(PRESETS),
    ),
    Option(
        "window",
        _whole_number("the number of last context queries that score", all_word=True),
        "Number of last context tokens whose queries score, and which are kept; all: every query of the context (h2o only). "
        "Default: 64 (tova: 1; preset paper: 16; none for replay).",
        _number,
        "TOKENS|all",
    ),
    Option(
        "pooling",
        _one_of(POOLINGS),
        "Smoothing of scores over neighbouring positions. Default: average for snapkv (preset paper: max), else none.",
        metavar="|".join(POOLINGS),
    ),
    Option(
        "kernel_size",
        _whole_number("the number of neighbouring positions pooled", odd=True),
        "Positions pooled together, an odd number. Default: 5 (preset paper: 7).",
        _number,
        "POSITIONS",
    ),
    Option(
        "sink_tokens",
        _whole_number("the number of first tokens that are always kept"),
        "First tokens of a context that are always kept (attention sinks). Default: 4 (preset kvpress: 0).",
        _number,
        "TOKENS",
    ),
    Option(
        "recent_tokens",
        _whole_number("the number of last tokens that are always kept"),
        f"Last tokens of a context that are always kept, where the window is shorter. Default: {_REPLAY_RECENT_TOKENS} for replay with budget "
        "global (preset kvzip: 0), else 0.",
        _number,
        "TOKENS",
    ),
    Option(
        "heads",
        _one_of(HEADS),
        "per-head: each KV head keeps its own tokens; shared: the KV heads of a layer keep the same ones. "
        "Default: per-head (tova with budget uniform: shared).",
        metavar="|".join(HEADS),
    ),
    Option(
        "max_kept_tokens",
        _whole_number("the most tokens kept per KV head of one context", optional=True),
        "Upper bound of the tokens kept per KV head of one context, beside the ratio. Default: none.",
        _number,
        "TOKENS",
    ),
    Option(
        "budget",
        _one_of(BUDGETS),
        "How the kept tokens are divided, the same number in all. uniform: evenly over all heads of all layers; adakv: each layer's "
        "over its heads; global: over all heads of all layers; profile: as --obcache-head-profile says. Default: adakv for snapkv and h2o (presets kvpress and paper, "
        "heads=shared: uniform), global for replay, else uniform; where the server has a profile, profile for all but replay.",
        metavar="|".join(BUDGETS),
    ),
    Option(
        "adakv_safeguard",
        _share,
        "budget adakv: part of an even share that each head keeps whatever the other heads score, in [0, 1]. Default: 0.2.",
        _number,
        "SHARE",
    ),
    Option(
        "normalization",
        _one_of(NORMALIZATIONS),
        "budget global: layer divides each query's obcache scores by the squared norm of what the layer's attention gives there, both behind "
        "the output projection, so that layers and heads can be compared, and divides a replay's budget, whatever its score, by errors "
        "measured so (preset kvzip: by scores alone); none keeps the highest raw scores of all. Default: layer.",
        metavar="|".join(NORMALIZATIONS),
    ),
    Option(
        "replay_chunk",
        _whole_number("the number of context tokens that one replay pass re-reads"),
        "method replay: context tokens that one pass re-reads. Default: 2048.",
        _number,
        "TOKENS",
    ),
)

SERVER_OPTIONS = (
    Option(
        "mode",
        _one_of(MODES),
        "marked: a prompt says where its context ends (marker or context_len), any other is untouched; prompt: the context is all of every "
        "prompt but its last token (query-aware, not shared). Default: marked.",
        metavar="|".join(MODES),
        per_request=False,
    ),
    Option(
        "head_profile",
        _text,
        "Divides the kept tokens over heads as a replay would, without one (budget profile, the default then). auto: the served model's, "
        "measured before the server starts for the first time (minutes); FILE: of python -m obcache_sglang.calibrate, or the name of a "
        "profile that comes with the package.",
        metavar="auto|FILE",
        per_request=False,
    ),
    Option(
        "when",
        _one_of(WHENS),
        "first: the first question on a context compresses it, and waits for that; idle: questions are served exactly at first, and "
        "their contexts compressed when the engine is idle or the pool gets tight. Default: first.",
        metavar="|".join(WHENS),
        per_request=False,
    ),
    Option(
        "min_tokens",
        _whole_number("the length in tokens from which contexts are compressed"),
        "Contexts of fewer tokens are served exactly. Default: 256.",
        _number,
        "TOKENS",
        per_request=False,
    ),
    Option(
        "marker",
        _marker,
        "Text that ends a context inside a prompt; the model never sees it. Default: <|obcache|>.",
        metavar="TEXT",
        per_request=False,
    ),
    Option(
        "max_contexts",
        _whole_number("the number of compressed contexts remembered at once"),
        "Compressed contexts remembered at once; the least recently used unpinned one makes room. Default: 1024.",
        _number,
        "CONTEXTS",
        per_request=False,
    ),
    Option(
        "max_pinned_slots",
        _whole_number("the number of KV slots that pinned contexts may hold together", optional=True),
        "KV slots that pinned contexts may hold together. Default: half of the pool.",
        _number,
        "SLOTS",
        per_request=False,
    ),
    Option(
        "head_attention",
        _one_of(HEAD_ATTENTIONS),
        "Kernels for heads of different length (budgets adakv and global) on GPUs; flashinfer plans on the host, layer by layer. "
        "Default: triton.",
        metavar="|".join(HEAD_ATTENTIONS),
        per_request=False,
    ),
    Option(
        "decode_graphs",
        _one_of(DECODE_GRAPHS),
        "A second set of CUDA graphs, captured at start-up, for decode batches with heads of different length, which without it run "
        "eagerly, several times slower. auto: where the server's budget is not uniform. Default: auto.",
        metavar="|".join(DECODE_GRAPHS),
        per_request=False,
    ),
    Option(
        "allow_untested_sglang",
        _switch,
        "Start on another SGLang release than the one this package was tested with.",
        per_request=False,
    ),
)

OPTIONS: dict[str, Option] = {option.name: option for option in (*COMPRESSION_OPTIONS, *SERVER_OPTIONS)}


# --- command line -------------------------------------------------------------------------------------------------------


def add_cli_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--obcache` and `--obcache-*` to `parser`, in a group of their own. All default to None: not given."""
    group = parser.add_argument_group("obcache", "KV-cache compression of shared contexts (package obcache_sglang)")
    group.add_argument(
        "--obcache",
        action="store_true",
        default=None,
        help="Compress marked contexts once and answer many prompts from them.",
    )
    for option in OPTIONS.values():
        if option.check is _switch:
            group.add_argument(option.flag, action="store_true", default=None, help=option.help)
        else:
            group.add_argument(option.flag, type=option.cli_type, default=None, metavar=option.metavar, help=option.help)


def settings_from_cli(args: argparse.Namespace) -> ServerSettings | None:
    """The settings that parsed flags ask for, or None without `--obcache`. Raises ConfigError, naming the flag."""
    given = {name: value for name in OPTIONS if (value := getattr(args, f"obcache_{name}", None)) is not None}
    if not getattr(args, "obcache", None):
        if given:
            flags = ", ".join(OPTIONS[name].flag for name in given)
            raise ConfigError(f"{flags} given without --obcache, which turns compression on: add --obcache, or leave it out.")
        return None
    try:
        return ServerSettings.resolve(given)
    except InvalidValue as error:
        raise ConfigError(f"{OPTIONS[error.name].flag}={error.value} {error.reason}") from error


def settings_from_python(obcache: bool | Mapping[str, Any]) -> ServerSettings | None:
    """The settings of `Engine(obcache=...)`: True for the defaults, a mapping of settings, or False. Raises ConfigError."""
    if isinstance(obcache, bool):
        return ServerSettings() if obcache else None
    if not isinstance(obcache, Mapping):
        raise ConfigError(f"obcache={obcache!r} is not True, False or a dict of settings ({', '.join(OPTIONS)}).")
    try:
        return ServerSettings.resolve(obcache)
    except InvalidValue as error:
        raise ConfigError(f"obcache={{{error.name!r}: {error.value!r}}} {error.reason}") from error
