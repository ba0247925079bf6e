"""Settings of a compression: what decides which tokens are kept.

Defaults that depend on each other (a method's window, a preset's pooling) come from the tables of `settings.methods`, and every
value is checked by its `settings.options.Option`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any

from obcache_sglang.errors import InvalidValue
from obcache_sglang.settings import methods
from obcache_sglang.settings.bounds import BOUNDS
from obcache_sglang.settings.methods import EVERY_QUERY, METHODS, PRESETS
from obcache_sglang.settings.options import COMPRESSION_OPTIONS, OPTIONS

MAX_SEGMENTS = 64
"""Segments of one length. More would cost a long context more than its prefill: with each, all that is kept is scored and copied again."""

MAX_EXACT_SEGMENTS = int(BOUNDS["exact_segments"][1])
"""So many segments of a context may be shorter than others, since they keep all their tokens."""

MIN_SEGMENT_TOKENS = int(BOUNDS["segment_tokens"][0])
"""Of a segment that ends at a boundary. Shorter ones end at the next boundary."""

_GATES_ONLY = {
    "segment_tokens": "; with {method} the queries of a whole context score. Remove it, or set method=gate.",
    "boundaries": "; with {method} the queries of a whole context score. Give one boundary, the last.",
    "segment_ratios": "; with {method} a context is one segment. Remove it, and give compression_ratio.",
    "exact_segments": ", not with {method}. Remove it.",
}
"""Settings that other methods cannot have, and how the error about them ends. What others follow from comes first."""


@dataclass(frozen=True)
class CompressionSettings:
    """Everything that decides which tokens of a context are kept. Part of a context's identity.

    compression_ratio: fraction of KV pairs removed, in [0, 1), as in KVPress and the OBCache paper (arXiv 2510.07651).
    method: which queries score, and what is always kept (snapkv, h2o, tova, streaming, random; replay: the model's queries while it
        reads the context again; gate: none, the server's gates look at each token's own K and V).
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
    max_kept_tokens: upper bound of the kept tokens per KV head, in addition to the ratio; None for no bound.
    budget: how the kept tokens are divided; the total is always the same. `uniform`: the same number for each head of each layer;
        `adakv`: each layer's tokens are divided among its heads (AdaKV, arXiv 2407.11550, in KVPress's form); `global`: all tokens
        are divided among all heads of all layers, and each head keeps at least its sinks and window; `profile`: as `global`, in the
        shares of the server's head profile.
    adakv_safeguard: the part of an equal share that each head keeps whatever the other heads score, in [0, 1]; for adakv.
    replay_chunk: context tokens that one replay pass reads again; method replay only.
    replay_attention: what the queries of a replay pass attend to, beside each other; method replay only. `whole`: the context. `local`: its
        first tokens, the chunk that the pass reads again, and some tokens before that (`compress.replay`).
    segment_tokens: method gate only. Longer contexts are compressed segment by segment (`segment_start`); None for whole ones.
    boundaries: method gate only. Where segments of the context end that other prompts share, such as a system prompt or a turn of a
        conversation: token counts, ascending. Of each context only those that lie in it (`within`).
    exact_segments: method gate only. So many first segments of a context keep all their tokens: of one with fewer, all.
    exact_tokens: the tokens of these segments (`within`).
    segment_ratios: method gate only. The ratios of the first segments that boundaries end; those after them have `compression_ratio`. Then each
        segment chooses among its own tokens, and keeps what it has chosen; else all that is kept is chosen anew with each segment. Where it
        begins with zeros, these segments are exact ones. Of a context: one for each of its segments, and `compression_ratio` is the last one's
        (`within`).
    normalization: for budget global. `layer` divides each query's errors by the squared norm of what the layer's attention adds there,
        both after the output projection (`compress.scores.relative_error_weights`), so that layers and heads can be compared. It
        applies to obcache scores, and to the errors that are measured for a replay (`compress.measured_errors`). These errors decide
        how many tokens a head keeps, whatever the score; the scores then only order a head's tokens. Attention weights are comparable
        as they are, and preset kvzip neither normalizes nor measures errors.
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
    replay_attention: str = "whole"
    segment_tokens: int | None = None
    boundaries: tuple[int, ...] = ()
    exact_segments: int = 0
    exact_tokens: int = 0
    segment_ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises InvalidValue for the first setting that is not allowed, alone or with the others."""
        for option in COMPRESSION_OPTIONS:
            checked = option.check(option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        num_exact = sum(1 for _ in takewhile(lambda ratio: ratio == 0, self.segment_ratios[:MAX_EXACT_SEGMENTS]))
        object.__setattr__(self, "exact_segments", max(self.exact_segments, num_exact))
        method, requires = METHODS[self.method], PRESETS[self.preset].requires
        if any(getattr(self, name) != value for name, value in requires.items()):
            raise InvalidValue(
                "preset",
                self.preset,
                f"requires {', '.join(f'{name}={value}' for name, value in requires.items())}, not "
                f"{', '.join(getattr(self, name) for name in requires)}. Remove these settings, or the preset.",
            )
        if self.window == EVERY_QUERY and not method.takes_every_query:
            raise InvalidValue(
                "window",
                "all",
                f"can be used with method=h2o only. Method {self.method} needs a number of last queries, 1 or more.",
            )
        if method.window is not None and self.window != method.window:
            raise InvalidValue("window", self.window, method.window_reason)
        for name, why in _GATES_ONLY.items():
            if (value := getattr(self, name)) and method.scored_by != "gates":
                shown = list(value) if isinstance(value, tuple) else value
                raise InvalidValue(name, shown, "can be used with method=gate only" + why.format(method=self.method))
        if self.segment_ratios and self.max_kept_tokens is not None:
            raise InvalidValue(
                "max_kept_tokens",
                self.max_kept_tokens,
                "cannot be used with segment_ratios: what earlier segments have kept would leave nothing to later ones. Give one of them.",
            )
        if self.is_replay and self.replay_attention == "local" and self.budget == "uniform":
            raise InvalidValue(
                "replay_attention",
                "local",
                "needs attention that reads a part of a context, which budget=uniform can do without. Set budget=global, profile or adakv, "
                "or replay_attention=whole.",
            )
        if self.pooling not in method.poolings:
            raise InvalidValue(
                "pooling",
                self.pooling,
                f"cannot be used with method={self.method}. Choose {' or '.join(method.poolings)}.",
            )
        if self.pooling == "none" and self.kernel_size != 1:
            raise InvalidValue(
                "kernel_size",
                self.kernel_size,
                "has no effect without pooling. Remove it, or set pooling=average or pooling=max.",
            )
        if self.heads == "shared" and self.budget != "uniform":
            raise InvalidValue(
                "heads",
                "shared",
                f"keeps the same tokens in every head of a layer, so budget={self.budget} has nothing to divide. "
                "Set budget=uniform or heads=per-head.",
            )

    @classmethod
    def resolve(
        cls, given: Mapping[str, Any], *, has_profile: bool = False, has_gates: bool = False, has_hidden_gates: bool = False
    ) -> CompressionSettings:
        """Settings from the values that were given; the method and preset decide the rest (`settings.methods`).

        given: any of this class's field names; `window` may be "all".
        has_profile, has_gates, has_hidden_gates: what the server has, on which defaults depend; as in `methods.resolve`.
        Raises InvalidValue.
        """
        for name in ("preset", "method"):
            if name in given:
                OPTIONS[name].check(name, given[name])
        has = {"has_profile": has_profile, "has_gates": has_gates, "has_hidden_gates": has_hidden_gates}
        return cls(**methods.resolve(given, **has))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` gives back an equal object."""
        return asdict(self) | {"boundaries": list(self.boundaries), "segment_ratios": list(self.segment_ratios)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionSettings:
        """The inverse of `to_dict`: takes every field as it is and resolves nothing. Raises InvalidValue."""
        return cls(**values)

    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal in every process and release for equal settings."""
        values = self.to_dict()
        for name in ("segment_tokens", "boundaries", "exact_segments", "exact_tokens", "segment_ratios"):
            if not values[name]:  # a later setting, which changes nothing of what was stored without it
                del values[name]
        if values["replay_attention"] == "whole":  # likewise
            del values["replay_attention"]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def needs_queries(self) -> bool:
        """Whether scoring reads attention queries; if not, gates or positions decide."""
        return METHODS[self.method].scored_by in ("window", "replay")

    @property
    def uses_gates(self) -> bool:
        """Whether a token's own K and V score it, so that a context whose KV is cached needs no forward."""
        return METHODS[self.method].scored_by == "gates"

    @property
    def depends_on_gates(self) -> bool:
        """Whether the server's gates, or the head profile that comes with them, decide which tokens are kept."""
        return self.uses_gates or self.budget == "profile"

    @property
    def reads_hidden_states(self) -> bool:
        """Whether each token's hidden states score it, so that all of a context is prefilled."""
        return METHODS[self.method].scored_by == "hidden"

    @property
    def own_queries_score(self) -> bool:
        """Whether a context is scored by the queries of its own prefill, and not by those of a replay after it."""
        return METHODS[self.method].scored_by == "window"

    @property
    def is_replay(self) -> bool:
        """Whether the queries of a replay after the context score it."""
        return METHODS[self.method].scored_by == "replay"

    @property
    def weighs_queries(self) -> bool:
        """Whether each query's scores are made relative to its layer's output, so that layers and heads can be compared."""
        return self._compares_errors and self.score != "attention"

    @property
    def measures_errors(self) -> bool:
        """Whether a global budget is divided by measured errors, so that scores only order a head's tokens; if not, by scores alone.

        True only for replay: measured with the last queries of a context, errors predict later errors worse than scores do. It does
        not depend on the score, so that two replays with different scores differ in nothing else. Preset kvzip follows KVPress, which
        has only scores.
        """
        return self.is_replay and PRESETS[self.preset].measures_errors and self._compares_errors

    @property
    def replay_sees_chunk_only(self) -> bool:
        """Whether a replayed chunk's queries share their softmax among the sinks, the chunk in the context and the replay itself."""
        return PRESETS[self.preset].replay_sees_chunk_only

    @property
    def _compares_errors(self) -> bool:
        """Whether errors of different heads and layers are compared, relative to their layer's output."""
        return self.budget == "global" and self.normalization == "layer"

    @property
    def shrinks_window(self) -> bool:
        """Whether the window shrinks to make room for other tokens (`effective_window`); in KVPress it never does."""
        return PRESETS[self.preset].shrinks_window

    @property
    def kept_window(self) -> int:
        """Number of last positions that every head keeps, as far as there is room for them."""
        return max(self.window, self.recent_tokens)

    @property
    def recent_share(self) -> float:
        """Part of what each head keeps that is the context's last tokens, for budgets that know how much a head keeps."""
        return METHODS[self.method].recent_share

    @property
    def reduce(self) -> str:
        """How the scores of several queries are combined: `max` for the attention of a replay (KVzip's statistic), else `sum`."""
        return "max" if self.is_replay and self.score == "attention" else "sum"

    def kept_tokens(self, context_tokens: int) -> int:
        """Tokens kept per KV head of a context of `context_tokens`: `int(L * (1 - ratio))`, at least 1, at most the cap; where the first
        `exact_tokens` are all kept, these and so many of the others."""
        exact = min(self.exact_tokens, context_tokens)
        kept = exact + int((context_tokens - exact) * (1 - self.compression_ratio))
        if self.max_kept_tokens is not None:
            kept = min(kept, self.max_kept_tokens)
        return min(max(kept, exact + 1), max(context_tokens, 1))

    def kept_slots(self, context_tokens: int, page_size: int) -> int:
        """KV slots that a context of `context_tokens` (whole pages) holds: `min(L, ceil_to_page(kept_tokens))`.

        With `segment_ratios`, those of its last segment, by that one's own ratio, and of all before it.
        """
        if not self.segment_ratios:
            return min(context_tokens, math.ceil(self.kept_tokens(context_tokens) / page_size) * page_size)
        own = self.within(context_tokens, page_size)
        start = own.segment_start(context_tokens, page_size)
        before = _kept_before(own.within(start, page_size), start, page_size) if start else own.exact_tokens
        new = context_tokens - (start or own.exact_tokens)
        kept = max(1, int(new * (1 - own.segment_ratios[-1])))
        return before + min(new, math.ceil(kept / page_size) * page_size)

    def within(self, context_tokens: int, page_size: int) -> CompressionSettings:
        """The settings of a context of `context_tokens` (whole pages): with its own boundaries, in whole pages, its exact tokens, and the ratios
        of its segments.

        A segment has `MIN_SEGMENT_TOKENS` or more, and a part of those before it: so the segments of a long context are few. A shorter one
        goes with the next, whose ratio it has then. Those that keep all their tokens may have any length, as far as they are not too many;
        what goes with one more of them keeps all of its own too.
        """
        own: list[int] = []
        ratios: list[float] = []
        num_before = num_exact = num_whole = 0
        is_whole = False
        for number, boundary in enumerate(self.boundaries):
            pages, before = boundary // page_size * page_size, own[-1] if own else 0
            if pages >= context_tokens:
                break
            num_before = number + 1
            is_exact = number < self.exact_segments
            is_whole |= bool(self.segment_ratios) and self._ratio(number) == 0
            may_be_short = is_exact or (is_whole and num_whole < MAX_EXACT_SEGMENTS)
            if pages - before >= (1 if may_be_short else max(MIN_SEGMENT_TOKENS, before // MAX_SEGMENTS)):
                own.append(pages)
                ratios.append(0.0 if is_whole else self._ratio(number))
                num_exact += is_exact
                num_whole += is_whole
            is_whole &= pages > (own[-1] if own else 0)
        ratios.append(0.0 if is_whole else self._ratio(num_before))
        exact = min(self.exact_tokens, context_tokens) // page_size * page_size
        if self.exact_segments > num_before:  # it ends within them
            exact, num_exact = context_tokens, self.exact_segments
        elif self.exact_segments:
            exact = own[num_exact - 1] if num_exact else 0
        mine: dict[str, Any] = {"boundaries": tuple(own), "exact_segments": num_exact, "exact_tokens": exact}
        if self.segment_ratios:
            mine |= {"segment_ratios": tuple(ratios), "compression_ratio": ratios[-1]}
        if all(getattr(self, name) == value for name, value in mine.items()):
            return self
        # Ratios of 0 may begin them now, where a shorter segment went with the next.
        return replace(self, **mine).within(context_tokens, page_size)

    def _ratio(self, number: int) -> float:
        """The ratio of a segment, by its number from 0."""
        return self.segment_ratios[number] if number < len(self.segment_ratios) else self.compression_ratio

    @property
    def kept_sinks(self) -> int:
        """Number of first positions that every head keeps."""
        return max(self.sink_tokens, self.exact_tokens)

    def segment_start(self, context_tokens: int, page_size: int) -> int:
        """Where the last segment of a context of `context_tokens` (whole pages) begins: its tokens before are a context of their own.

        0 for a context of one segment; what stays exact before it is none. Segments end at the boundaries. Between two boundaries all but the
        last segment have `segment_tokens` (whole pages), the last a half to one and a half times as many. After `MAX_SEGMENTS` segments they
        are twice as long, after as many tokens again twice as long as that, and so on.
        """
        own = self.within(context_tokens, page_size)
        first = start = max((own.exact_tokens, *own.boundaries))
        if self.segment_tokens is not None:
            segment = max(1, self.segment_tokens // page_size) * page_size
            while max(first, context_tokens - first) > MAX_SEGMENTS * segment:
                segment *= 2
            start += max(0, math.ceil((context_tokens - first - 1.5 * segment) / segment)) * segment
        return start if start > own.exact_tokens else 0

    def segment_starts(self, context_tokens: int, page_size: int) -> list[int]:
        """Where all segments but the first begin, ascending; as `segment_start`."""
        starts: list[int] = []
        while (context_tokens := self.segment_start(context_tokens, page_size)) > 0:
            starts.append(context_tokens)
        return starts[::-1]

    def safeguarded_tokens(self, num_slots: int) -> int:
        """Budget adakv: how many of num_slots tokens each head keeps whatever the other heads score; counted as in KVPress."""
        return max(1, int(num_slots * self.adakv_safeguard)) if self.adakv_safeguard else 0


@lru_cache(maxsize=4096)
def _kept_before(settings: CompressionSettings, num_tokens: int, page_size: int) -> int:
    """`kept_slots` of a context's beginning. Asked of each segment of a context, for each that follows it: without memory that took seconds."""
    return settings.kept_slots(num_tokens, page_size)
