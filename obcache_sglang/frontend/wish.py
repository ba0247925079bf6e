"""From what a request says about its context to the plan that the scheduler follows. Nothing here needs SGLang.

A client sets `custom_params["obcache"]` to false, true or an object (`REQUEST_KEYS`), puts the marker in its text, or both.
`make_plan` checks all of it and makes a `messages.Plan`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from obcache_sglang.errors import InvalidValue, RequestError, shown
from obcache_sglang.messages import KEY, Action, Plan
from obcache_sglang.settings import COMPRESSION_OPTIONS, OPTIONS, ServerSettings, check_number, check_whole_number

MAX_BOUNDARIES = 4096
"""Of one prompt, such as the turns of a conversation; those that stand close together count as one."""

_CONTEXT_ID = re.compile("[0-9a-f]{32}")

# Reasons to serve exactly, of requests that count positions in the prompt or continue from it: no context can be put before it.
_NEEDS_WHOLE_PROMPT = {
    "session": "a session",
    "embedding_overrides": "positional_embed_overrides",
    "multi_item_scoring": "multi-item scoring",
    "routed_experts": "return_routed_experts",
}

_SETTING_KEYS = tuple(option.name for option in COMPRESSION_OPTIONS)
TURNS_KEY = "keep_last_turns"
"""Of a conversation: how many of its newest turns stay exact. The turns before are the context (`breakpoints.mark_turns`)."""
_OWN_KEYS = ("context_len", "context_id", "mode", "pin", "ttl_seconds", "boundaries", TURNS_KEY)
REQUEST_KEYS = _OWN_KEYS + _SETTING_KEYS
"""Keys of the object under `custom_params["obcache"]`."""


@dataclass(frozen=True)
class Wish:
    """What one request asks for, each value checked. `asked` is False for a request that does not ask for compression."""

    asked: bool = False
    refused: bool = False
    context_len: int | None = None
    context_id: str | None = None
    mode: str | None = None
    pin: bool = False
    ttl_seconds: float | None = None
    boundaries: tuple[int, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)


def parse_wish(value: object) -> Wish:
    """Reads `custom_params["obcache"]`, None if the request has none. Raises RequestError with the key, the value and what is allowed."""
    if value is None:
        return Wish()
    if isinstance(value, bool):
        return Wish(asked=value, refused=not value)
    if not isinstance(value, Mapping):
        raise RequestError(
            f'custom_params["{KEY}"]={shown(value)} is not allowed: give true, false or an object with any of the keys {", ".join(REQUEST_KEYS)}.'
        )
    overrides: dict[str, Any] = {}
    for key, given in value.items():
        if key not in REQUEST_KEYS:
            raise _wrong(str(key), given, f"is not a known key. Allowed keys: {', '.join(REQUEST_KEYS)}.")
        if key in _SETTING_KEYS:
            overrides[key] = _checked(key, given)
    if TURNS_KEY in value:
        kept_turns(value[TURNS_KEY])
    return Wish(
        asked=True,
        context_len=_context_len(value.get("context_len")),
        context_id=_context_id(value.get("context_id")),
        mode=_checked("mode", value["mode"]) if "mode" in value else None,
        pin=_pin(value.get("pin", False)),
        ttl_seconds=_ttl_seconds(value.get("ttl_seconds")),
        boundaries=_boundaries(value.get("boundaries")),
        overrides=overrides,
    )


def split_markers(token_ids: Sequence[int], marker_id: int | None) -> tuple[Sequence[int], tuple[int, ...]]:
    """(prompt without markers, number of tokens before each of them); (the same object, none) if there is no marker."""
    if marker_id is None or marker_id not in token_ids:
        return token_ids, ()
    sent: list[int] = []
    positions = []
    for token in token_ids:
        if token == marker_id:
            positions.append(len(sent))
        else:
            sent.append(token)
    return sent, tuple(positions)


def make_plan(
    wish: Wish,
    *,
    num_tokens: int,
    marker_positions: Sequence[int] = (),
    server: ServerSettings,
    action: Action = "ask",
    exact: str | None = None,
    before: Sequence[int] = (),
) -> Plan | None:
    """The plan of a request, or None for a request that compression leaves alone.

    num_tokens: length of the prompt without the marker.
    marker_positions: number of tokens before each marker. The context ends at the last one; segments that others share, at those before.
    before: with a context id, the tokens before the marker; `num_tokens` and `marker_positions` then count only what follows it.
    exact: why this request cannot use a compressed context, if the caller found a reason.
    Raises RequestError.
    """
    mode = wish.mode or server.mode
    marker_position = marker_positions[-1] if marker_positions else None
    if wish.refused:
        return None
    if not wish.asked and marker_position is None and mode == "marked" and action == "ask":
        return None
    if wish.context_len is not None and marker_position is not None and wish.context_id is None:
        raise _wrong("context_len", wish.context_len, "cannot be combined with the marker in the prompt: give one of them.")
    if wish.context_id is not None:
        if wish.context_len is not None:
            raise _wrong("context_id", wish.context_id, "names the whole context: leave out context_len.")
        if wish.overrides:
            raise _wrong(
                "context_id",
                wish.context_id,
                f"names a context that has its own settings: leave out {', '.join(wish.overrides)}.",
            )
        if exact in _NEEDS_WHOLE_PROMPT:
            raise _wrong(
                "context_id", wish.context_id, f"cannot be used with {_NEEDS_WHOLE_PROMPT[exact]}: send the whole prompt."
            )
    elif marker_positions and marker_positions[0] == 0:
        raise RequestError(
            "The prompt, or the first user message in it, begins with the context marker: there is no context before it. Put the marker "
            "where the context ends; if that is the system message, at its end. To ask about a context that was compressed before, name it "
            f'in custom_params["{KEY}"]["context_id"]. If you did, something between you and this server drops custom_params.'
        )
    bounded = marker_position is not None or wish.context_len is not None or wish.context_id is not None
    whole_prompt = mode == "prompt" and action == "ask" and not bounded
    finds_boundary = mode == "auto" and action == "ask" and not bounded
    context_len = _boundary(wish, num_tokens, marker_position, whole_prompt, action)
    if context_len is None:
        return None
    if exact is None and 0 < context_len < server.min_tokens:
        exact = "below_min_tokens"
    try:
        settings = server.compression_for(wish.overrides)
        boundaries = _inner_boundaries(wish, marker_positions, context_len)
        if len(boundaries) > MAX_BOUNDARIES:
            raise RequestError(
                f"The prompt contains the context marker {len(marker_positions)} times, more than {MAX_BOUNDARIES + 1}."
            )
        if boundaries and not settings.uses_gates and not wish.boundaries:
            raise RequestError(
                f"The prompt contains the context marker {len(marker_positions)} times. With method={settings.method} it may contain it once, "
                "where the context ends; with method=gate, also where segments end that other prompts share."
            )
        settings = replace(settings, boundaries=boundaries)
        if server.when == "pressure" or not context_len or whole_prompt:
            # Until room is short everything is cached exactly, and shared as far as it is alike.
            kept_whole = settings.within(context_len, 1).exact_tokens
            settings = replace(settings, boundaries=(), segment_ratios=(), exact_segments=0, exact_tokens=kept_whole)
    except InvalidValue as error:
        raise _wrong(error.name, error.value, error.reason) from error
    return Plan(
        context_len=context_len,
        settings=settings,
        action=action,
        pin=wish.pin,
        ttl_seconds=wish.ttl_seconds,
        context_id=wish.context_id,
        before=tuple(before),
        finds_boundary=finds_boundary,
        judged_by_rest=whole_prompt,
        exact=exact,
    )


def _boundary(wish: Wish, num_tokens: int, marker_position: int | None, whole_prompt: bool, action: Action) -> int | None:
    """Number of tokens of the context; 0 to look one up, or to find where it ends; None if the prompt has none (mode prompt, a prompt of one token).

    whole_prompt: the context is all of the prompt but its last token.
    """
    if whole_prompt:
        return num_tokens - 1 if num_tokens > 1 else None
    if action == "compress":
        return num_tokens
    if wish.context_id is not None:
        return 0
    if marker_position is not None:
        return marker_position
    if wish.context_len is not None:
        if wish.context_len > num_tokens:
            raise _wrong("context_len", wish.context_len, f"is outside [1, {num_tokens}]: the prompt has {num_tokens} tokens.")
        return wish.context_len
    return 0


def _inner_boundaries(wish: Wish, marker_positions: Sequence[int], context_len: int) -> tuple[int, ...]:
    """Where segments of the context end before it does. Raises RequestError."""
    if wish.context_id is not None and (len(marker_positions) > 1 or wish.boundaries):
        raise RequestError(
            f'custom_params["{KEY}"]["context_id"] names the whole context: leave out boundaries, and give one marker, before the question.'
        )
    if not wish.boundaries:
        return tuple(marker_positions[:-1])
    if len(marker_positions) > 1:
        raise _wrong(
            "boundaries", list(wish.boundaries), "cannot be combined with several markers in the prompt: give one of them."
        )
    if wish.boundaries[-1] >= context_len:
        raise _wrong(
            "boundaries",
            list(wish.boundaries),
            f"does not end before the context, which has {context_len} tokens. Give where segments end before it does; where the context "
            "ends, say with context_len or the marker.",
        )
    return wish.boundaries


def _wrong(key: str, value: object, reason: str) -> RequestError:
    if key == "context_id" and isinstance(value, str) and _CONTEXT_ID.fullmatch(value):
        value = value[:8] + "..."  # errors are logged, and whoever has the whole id can open the context
    return RequestError(f'custom_params["{KEY}"]["{shown(key)[1:-1]}"]={shown(value)} {reason}')


def _checked(key: str, value: object) -> Any:
    try:
        return OPTIONS[key].check(key, value)
    except InvalidValue as error:
        raise _wrong(key, error.value, error.reason) from error


def _context_len(value: object) -> int | None:
    try:
        return None if value is None else check_whole_number("context_len", value, "the number of prompt tokens in the context")
    except InvalidValue as error:
        raise _wrong("context_len", error.value, error.reason) from error


def _context_id(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _CONTEXT_ID.fullmatch(value):
        raise _wrong(
            "context_id",
            value,
            "is not the id of a context: give the 32 hexadecimal digits from /obcache/compress or from an answer.",
        )
    return value


def _pin(value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong("pin", value, "is not true or false.")
    return value


def _boundaries(value: object) -> tuple[int, ...]:
    given: object = () if value is None else value
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) > MAX_BOUNDARIES:
        raise _wrong("boundaries", value, f"is not a list of at most {MAX_BOUNDARIES} token counts.")
    try:
        checked = tuple(
            check_whole_number("context_len", each, "where a segment of the context ends, in tokens") for each in given
        )
    except InvalidValue as error:
        raise _wrong("boundaries", error.value, error.reason) from error
    if list(checked) != sorted(set(checked)):
        raise _wrong("boundaries", value, "does not ascend: give the token counts in their order.")
    return checked


def kept_turns(value: object) -> int:
    """How many of a conversation's newest turns stay exact. Raises RequestError."""
    try:
        return check_whole_number(TURNS_KEY, value, "the number of newest turns that stay exact, the question's among them")
    except InvalidValue as error:
        raise _wrong(TURNS_KEY, error.value, error.reason) from error


def _ttl_seconds(value: object) -> float | None:
    try:
        return None if value is None else check_number("ttl_seconds", value, "how long the context lives from now")
    except InvalidValue as error:
        raise _wrong("ttl_seconds", error.value, error.reason) from error
