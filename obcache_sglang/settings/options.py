"""The table of options: the command-line flag, check and help of each setting, and whether a request may override it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from obcache_sglang.errors import InvalidValue
from obcache_sglang.settings.checks import (
    check_number,
    check_whole_number,
    ladder,
    marker,
    names,
    number_or_text,
    ratio,
    ratios,
    share,
    text,
)
from obcache_sglang.settings.methods import (
    BUDGETS,
    EVERY_QUERY,
    GATE_RECENT_TOKENS,
    HIDDEN_GATE_RECENT_TOKENS,
    LOCAL_REPLAY_CHUNK,
    METHODS,
    POOLINGS,
    PRESETS,
    REPLAY_ATTENTIONS,
    REPLAY_RECENT_TOKENS,
    SCORES,
)

HEADS = ("per-head", "shared")
NORMALIZATIONS = ("layer", "none")
MODES = ("marked", "auto", "prompt")
WHENS = ("first", "idle", "pressure")
CALIBRATES = ("off", "serve")
SAVES = ("asked", "compressed", "reused")
HEAD_ATTENTIONS = ("triton", "flashinfer")
DECODE_GRAPHS = ("auto", "on", "off")

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """One setting. check(name, value) returns the value to use or raises InvalidValue. per_request: whether a request may set it."""

    name: str
    check: Check
    help: str
    cli_type: Callable[[str], Any] = str
    metavar: str | None = None
    per_request: bool = True

    @property
    def flag(self) -> str:
        return "--obcache-" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag stands alone, without a value."""
        return self.check is _switch


def _one_of(choices: Iterable[str]) -> Check:
    def check(name: str, value: Any) -> str:
        allowed = tuple(choices)
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


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidValue(name, value, "is not true or false.")
    return value


COMPRESSION_OPTIONS = (
    Option(
        "compression_ratio",
        ratio,
        "Fraction of a context's KV pairs that is removed, in [0, 1). 0.7 keeps 30 %%. Default: 0.7.",
        number_or_text,
        "RATIO",
    ),
    Option(
        "method",
        _one_of(METHODS),
        "Which queries score a context's tokens. "
        + " ".join(f"{name}: {method.summary}." for name, method in METHODS.items())
        + " Default: gate with --obcache-gates, hidden-gate with --obcache-hidden-gates, else tova (presets kvpress and paper: snapkv).",
        metavar="|".join(METHODS),
    ),
    Option(
        "score",
        _one_of(SCORES),
        (
            "How a query scores a token. attention: its attention weight. obcache-v, obcache-k, obcache-kv: the error of the "
            "attention output when its value, its key, or both are removed (OBCache, arXiv 2510.07651). Default: obcache-v "
            "(snapkv, h2o: obcache-k; preset kvzip: attention)."
        ),
        metavar="|".join(SCORES),
    ),
    Option(
        "preset",
        _one_of(PRESETS),
        (
            "Defaults of the settings below. kvpress: KVPress's semantics; no sinks are protected. paper: snapkv with window "
            "16 and max pooling over 7. kvzip: KVPress's KVzip (method replay, score attention, budget global). Default: "
            "default."
        ),
        metavar="|".join(PRESETS),
    ),
    Option(
        "window",
        _whole_number("the number of last context queries that score", all_word=True),
        (
            "Number of last context tokens whose queries score; these tokens are kept. all: every query of the context (h2o "
            "only). Default: 64 (tova: 1; preset paper: 16; none for replay)."
        ),
        number_or_text,
        "TOKENS|all",
    ),
    Option(
        "pooling",
        _one_of(POOLINGS),
        "How scores are smoothed over neighbouring positions. Default: average for snapkv (preset paper: max), else none.",
        metavar="|".join(POOLINGS),
    ),
    Option(
        "kernel_size",
        _whole_number("the number of neighbouring positions pooled", odd=True),
        "Number of positions pooled together; odd. Default: 5 (preset paper: 7).",
        number_or_text,
        "POSITIONS",
    ),
    Option(
        "sink_tokens",
        _whole_number("the number of first tokens that are always kept"),
        "Number of first tokens of a context that are always kept (attention sinks). Default: 4 (preset kvpress: 0).",
        number_or_text,
        "TOKENS",
    ),
    Option(
        "recent_tokens",
        _whole_number("the number of last tokens that are always kept"),
        (
            "Number of last tokens of a context that are always kept, if more than the window. Default: "
            f"{REPLAY_RECENT_TOKENS} for replay with budget global (preset kvzip: 0), {GATE_RECENT_TOKENS} for gate, "
            f"{HIDDEN_GATE_RECENT_TOKENS} for hidden-gate, else 0."
        ),
        number_or_text,
        "TOKENS",
    ),
    Option(
        "heads",
        _one_of(HEADS),
        (
            "per-head: each KV head keeps its own tokens. shared: the KV heads of a layer keep the same tokens. Default: "
            "per-head (tova with budget uniform: shared)."
        ),
        metavar="|".join(HEADS),
    ),
    Option(
        "max_kept_tokens",
        _whole_number("the most tokens kept per KV head of one context", optional=True),
        "Upper bound of kept tokens per KV head and context, in addition to the ratio. Default: none.",
        number_or_text,
        "TOKENS",
    ),
    Option(
        "segment_tokens",
        _whole_number("the tokens of a segment", optional=True),
        (
            "Method gate: long contexts are prefilled and compressed segment by segment, each after the compressed ones before it, so that "
            "a compression takes room for what is kept and about one segment. Default: off, contexts are compressed whole."
        ),
        number_or_text,
        "TOKENS",
    ),
    Option(
        "exact_segments",
        _whole_number("the number of first segments that keep all their tokens"),
        (
            "Method gate, prompts that say where several segments end: so many first segments, such as a system prompt with its "
            "instructions, keep all their tokens, and the ratio is of the others. A context without others stays exact. Default: 0."
        ),
        number_or_text,
        "SEGMENTS",
    ),
    Option(
        "segment_ratios",
        ratios,
        (
            "Method gate, prompts that say where several segments end: the ratios of the first segments, such as 0,0.7 for a system prompt "
            "that stays exact and a document; later ones have the compression ratio. Each segment then keeps its own share. Default: none, "
            "all segments share what the compression ratio leaves."
        ),
        metavar="RATIO,...",
    ),
    Option(
        "budget",
        _one_of(BUDGETS),
        (
            "How a context's kept tokens are shared between heads; the total is the same. uniform: equal. adakv: within each "
            "layer. global: across all layers. profile: from --obcache-head-profile. Default: depends on the method "
            "(docs/options.md)."
        ),
        metavar="|".join(BUDGETS),
    ),
    Option(
        "adakv_safeguard",
        share,
        (
            "For budget adakv: part of an equal share that each head keeps whatever the other heads score, in [0, 1]. "
            "Default: 0.2."
        ),
        number_or_text,
        "SHARE",
    ),
    Option(
        "normalization",
        _one_of(NORMALIZATIONS),
        (
            "For budget global. layer: each query's errors are divided by the squared norm of what its layer's attention "
            "adds, so that layers and heads can be compared. none: raw scores are compared. Default: layer."
        ),
        metavar="|".join(NORMALIZATIONS),
    ),
    Option(
        "replay_chunk",
        _whole_number("the number of context tokens that one replay pass re-reads"),
        f"For method replay: number of context tokens that one pass reads again. Default: 2048 (replay_attention local: {LOCAL_REPLAY_CHUNK}).",
        number_or_text,
        "TOKENS",
    ),
    Option(
        "replay_attention",
        _one_of(REPLAY_ATTENTIONS),
        (
            "For method replay: what a pass attends to. whole: the context. local: the context's first tokens, the chunk that it reads "
            "again and 64 tokens before that; far cheaper for long contexts; with per-head budgets only. Default: whole."
        ),
        metavar="|".join(REPLAY_ATTENTIONS),
    ),
)

SERVER_OPTIONS = (
    Option(
        "mode",
        _one_of(MODES),
        (
            "marked: a prompt says where its context ends (marker or context_len); other prompts are untouched. auto: prefixes "
            "that prompts share are contexts, without any marking. prompt: all of a prompt but its last token is its context; "
            "compressed for this prompt only. Default: marked."
        ),
        metavar="|".join(MODES),
        per_request=False,
    ),
    Option(
        "head_profile",
        text,
        (
            "Shares kept tokens between heads as a replay would, without one (budget profile becomes the default). auto: "
            "measure the served model before its first start; takes minutes. FILE: made by python -m "
            "obcache_sglang.calibrate, or the name of a profile in the package."
        ),
        metavar="auto|FILE",
        per_request=False,
    ),
    Option(
        "gates",
        text,
        (
            "Gates score a token from its own K and V (method gate becomes the default), and bring a head profile. auto: make "
            "them for the served model before its first start; takes minutes. FILE: made by python -m obcache_sglang.calibrate "
            "--gates, or the name of gates in the package."
        ),
        metavar="auto|FILE",
        per_request=False,
    ),
    Option(
        "hidden_gates",
        text,
        (
            "Published gates score a token from its hidden states, while a context is prefilled (method hidden-gate becomes the default). A "
            "directory of KVzap, a .pt file of Fast KVzip, or their names on the Hugging Face hub: OWNER/REPOSITORY, OWNER/REPOSITORY/FILE.pt."
        ),
        metavar="FILE|NAME",
        per_request=False,
    ),
    Option(
        "calibrate",
        _one_of(CALIBRATES),
        (
            "serve: a server without gates makes them when it is idle, from the first contexts that clients ask about outside of any "
            "namespace, and uses them from then on; the next start finds their file. Default: off."
        ),
        metavar="|".join(CALIBRATES),
        per_request=False,
    ),
    Option(
        "when",
        _one_of(WHENS),
        (
            "first: the first question about a context waits for its compression. idle: questions are served exactly until "
            "the engine is idle or the pool is tight; then their contexts are compressed. pressure: everything stays exact as "
            "long as the pool has room; a context is compressed from its cached KV when it would be evicted (method gate). "
            "Default: first; with mode auto, pressure."
        ),
        metavar="|".join(WHENS),
        per_request=False,
    ),
    Option(
        "ladder",
        ladder,
        (
            "Higher ratios, such as 0.7,0.85: with when=pressure, contexts that are compressed already are compressed again, from "
            "what they kept, before one is evicted. Default: none."
        ),
        metavar="RATIO,...",
        per_request=False,
    ),
    Option(
        "min_tokens",
        _whole_number("the length in tokens from which contexts are compressed"),
        "Shorter contexts are served exactly. Default: 256.",
        number_or_text,
        "TOKENS",
        per_request=False,
    ),
    Option(
        "exclude",
        names,
        (
            "Namespaces that are never compressed: requests with one of these as cache_salt, extra_key or LoRA adapter are served "
            "exactly. Default: none."
        ),
        metavar="NAME,...",
        per_request=False,
    ),
    Option(
        "marker",
        marker,
        "Text that ends a context in a prompt. The model never reads it. Default: <|obcache|>.",
        metavar="TEXT",
        per_request=False,
    ),
    Option(
        "max_contexts",
        _whole_number("the number of compressed contexts remembered at once"),
        "Compressed contexts remembered at once; the least recently used unpinned one makes room. Default: 1024.",
        number_or_text,
        "CONTEXTS",
        per_request=False,
    ),
    Option(
        "max_pinned_slots",
        _whole_number("the number of KV slots that pinned contexts may hold together", optional=True),
        "KV slots that all pinned contexts may hold together. Default: half of the pool.",
        number_or_text,
        "SLOTS",
        per_request=False,
    ),
    Option(
        "folder",
        text,
        (
            "The one folder in which contexts last: they are saved there, and a question whose context lies there has it loaded "
            "instead of compressed. Servers of one model may share it. Default: none."
        ),
        metavar="DIR",
        per_request=False,
    ),
    Option(
        "save",
        _one_of(SAVES),
        (
            "Which contexts are saved to --obcache-folder. asked: those that somebody asks for (POST /obcache/contexts/{name}/save). "
            "compressed: each one once it is compressed. reused: each one once a second question reads it. Default: asked."
        ),
        metavar="|".join(SAVES),
        per_request=False,
    ),
    Option(
        "folder_gb",
        lambda name, value: (
            None if value is None else check_number(name, value, "what the files of the folder may take together")
        ),
        "Gigabytes (10^9 bytes) that the files of --obcache-folder may take; those used longest ago are deleted. Default: no limit.",
        number_or_text,
        "GB",
        per_request=False,
    ),
    Option(
        "preload",
        _switch,
        "Load contexts of --obcache-folder before serving, those used last, as far as they fit. Only those without a namespace.",
        per_request=False,
    ),
    Option(
        "head_attention",
        _one_of(HEAD_ATTENTIONS),
        "Kernels for contexts with per-head budgets on GPUs. flashinfer plans every layer on the host. Default: triton.",
        metavar="|".join(HEAD_ATTENTIONS),
        per_request=False,
    ),
    Option(
        "decode_graphs",
        _one_of(DECODE_GRAPHS),
        (
            "CUDA graphs for decode batches with per-head budgets, captured at start-up. Without them such batches run "
            "eagerly and several times slower. auto: on if the server's own budget is not uniform. Default: auto."
        ),
        metavar="|".join(DECODE_GRAPHS),
        per_request=False,
    ),
    Option(
        "allow_untested_sglang",
        _switch,
        "Start on an SGLang release that this package was not tested with.",
        per_request=False,
    ),
)

OPTIONS: dict[str, Option] = {option.name: option for option in (*COMPRESSION_OPTIONS, *SERVER_OPTIONS)}
