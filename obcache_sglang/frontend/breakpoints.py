"""Standard cache breakpoints: fields with which clients of Anthropic's and OpenAI's APIs say where a reusable prompt prefix ends.

`cache_control` (Anthropic Messages) and `prompt_cache_breakpoint` (OpenAI chat and responses) stand on blocks of content. SGLang's models of
requests drop them, so they are read in the body, where the marker is put at the end of the block's text. Nothing here needs SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from obcache_sglang.errors import RequestError, shown
from obcache_sglang.frontend.marker_options import removed
from obcache_sglang.messages import KEY

FIELDS = ("cache_control", "prompt_cache_breakpoint")

TTL_SECONDS = {"5m": 300, "30m": 1800, "1h": 3600}
"""What both APIs allow as `ttl`: how long a prefix lives after its last use."""

MAX_MARKED = 64
"""Blocks of one request, the last ones."""

_TEXT_TYPES = ("text", "input_text")


@dataclass(frozen=True, eq=False)
class _Place:
    """A block of content whose text a marker could end. holder[key]: the text. field: the block's breakpoint, None without one."""

    holder: dict[str, Any]
    key: str
    field: Any


def place_markers(body: dict[str, Any], marker: str, *, several: bool) -> dict[str, Any] | None:
    """Puts the marker at the end of the blocks with a breakpoint that something follows, in place; of the last one only, unless several.

    What the last block of the last message says is the question: a context needs one. Returns what the breakpoint says beside that, for
    `custom_params["obcache"]`; None where no marker was put. Raises RequestError.
    """
    places = list(_places(body))
    marked = [(number, each) for number, each in enumerate(places) if each.field is not None]
    automatic = body.get("cache_control")
    if not marked and automatic is not None:  # Anthropic: the last block that can be cached
        marked = [(number, _Place(each.holder, each.key, automatic)) for number, each in enumerate(places)]
        several = False
    ttl = None
    for _, place in marked:
        ttl = _ttl_seconds(place.field)
    options = body.get("prompt_cache_options")
    if ttl is None and isinstance(options, Mapping):
        ttl = _ttl_seconds(options)
    followed = [place for number, place in marked if number < len(places) - 1 and place.holder[place.key].strip()]
    if not followed:
        return None
    for chosen in followed[-MAX_MARKED:] if several else followed[-1:]:
        chosen.holder[chosen.key] += marker
    return {} if ttl is None else {"ttl_seconds": ttl}


def mark_tools(body: dict[str, Any], marker: str) -> dict[str, Any] | None:
    """Where a tool has a breakpoint, puts the marker at the start of the first message after system messages, in place: templates write tools before it.

    Returns and raises as `place_markers`.
    """
    tools, messages = body.get("tools"), body.get("messages", body.get("input"))
    if not isinstance(tools, list) or not isinstance(messages, list) or body.get("tool_choice") in ("none", {"type": "none"}):
        return None
    fields = [field for tool in tools if isinstance(tool, dict) and (field := _field(tool)) is not None]
    if not fields:
        return None
    ttl = _ttl_seconds(fields[-1])
    spoken = (each for each in messages if not isinstance(each, dict) or each.get("role") not in ("system", "developer"))
    first = next(_of_message(next(spoken, None)), None)
    if first is None:
        return None
    text = first.holder[first.key]
    blanks = len(text) - len(text.lstrip())  # which some templates take away
    first.holder[first.key] = text[:blanks] + marker + text[blanks:]
    return {} if ttl is None else {"ttl_seconds": ttl}


def mark_turns(body: dict[str, Any], marker: str, keep: int, *, several: bool) -> None:
    """Puts the marker at the end of what stands before each turn of a conversation, in place, but for the newest `keep` turns, which stay exact;
    of the last one only, unless several.

    A turn begins with a user's message; one that only brings the results of tools goes on with the turn before.
    """
    messages = body.get("messages", body.get("input"))
    if not isinstance(messages, list):
        return
    before: list[_Place | None] = []  # each turn, the last text
    last = _last_text(_of_system(body))
    for message in messages:
        if _begins_turn(message):
            before.append(last)
        last = _last_text(_of_message(message)) or last
    ends = [place for place in dict.fromkeys(before[: 1 - keep or None]) if place is not None]
    for place in ends[-MAX_MARKED:] if several else ends[-1:]:
        place.holder[place.key] += marker


def _last_text(places: Iterator[_Place]) -> _Place | None:
    """The last of these that says something."""
    return next((place for place in reversed(list(places)) if place.holder[place.key].strip()), None)


def _begins_turn(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") != "user":
        return False
    content = message.get("content")
    blocks = content if isinstance(content, list) else []
    return not blocks or any(not isinstance(block, dict) or block.get("type") != "tool_result" for block in blocks)


def _ttl_seconds(field: Any) -> int | None:
    if not isinstance(field, Mapping):
        raise RequestError(f'A cache breakpoint is {shown(field)}; give an object, such as {{"type": "ephemeral"}}.')
    ttl = field.get("ttl")
    if ttl is None:
        return None
    if not isinstance(ttl, str) or ttl not in TTL_SECONDS:
        raise RequestError(
            f"The ttl of a cache breakpoint is {shown(ttl)}; give one of {', '.join(TTL_SECONDS)}, or leave it out."
        )
    return TTL_SECONDS[ttl]


def _places(body: dict[str, Any]) -> Iterator[_Place]:
    """The blocks of text of a request, in the order of its prompt."""
    yield from _of_system(body)
    messages = body.get("messages", body.get("input"))
    for message in messages if isinstance(messages, list) else ():
        yield from _of_message(message)


def _of_system(body: dict[str, Any]) -> Iterator[_Place]:
    system = body.get("system")
    if isinstance(system, str):
        yield _Place(body, "system", None)
    elif isinstance(system, list):
        yield from _blocks(system)


def _of_message(message: Any) -> Iterator[_Place]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        yield _Place(message, "content", _field(message))
    elif isinstance(content, list):
        yield from _blocks(content)


def _blocks(blocks: list[Any]) -> Iterator[_Place]:
    for block in blocks:
        if not isinstance(block, dict):
            continue
        if block.get("type") in _TEXT_TYPES and isinstance(block.get("text"), str):
            yield _Place(block, "text", _field(block))
        elif block.get("type") == "tool_result":
            content = block.get("content")
            if isinstance(content, str):
                yield _Place(block, "content", _field(block))
            elif isinstance(content, list):
                inner = list(_blocks(content))
                for place in inner:
                    outer = _field(block) if place is inner[-1] else None
                    yield place if place.field is not None else _Place(place.holder, place.key, outer)


def _field(block: Mapping[str, Any]) -> Any:
    return next((block[name] for name in FIELDS if block.get(name) is not None), None)


def without_marker(value: Any, marker: str) -> Any:
    """A JSON value whose texts have no marker: what a request would be counted as."""
    if isinstance(value, str):
        return removed(value, marker)
    if isinstance(value, list):
        return [without_marker(each, marker) for each in value]
    if isinstance(value, dict):
        return {key: without_marker(each, marker) for key, each in value.items()}
    return value


def own_params(body: Mapping[str, Any]) -> Any:
    """`custom_params["obcache"]` at the top of a body, for endpoints whose models of requests drop it."""
    custom_params = body.get("custom_params")
    return custom_params.get(KEY) if isinstance(custom_params, Mapping) else None


def combined(own: Any, more: Any) -> Any:
    """A request's own wish, with what its breakpoints, its marker or its body say where it says nothing. Neither has been checked."""
    if own is None or own is True:
        return more or own if isinstance(more, Mapping) else more
    return {**more, **own} if isinstance(own, Mapping) and isinstance(more, Mapping) else own


def header(report: Mapping[str, Any]) -> str:
    """A report, as the value of an HTTP header: ``reused; kept=432/1441; ratio=0.7; id=...`` or ``exact; reason=deferred``."""
    parts = [str(report["status"])]
    if report["reason"] is not None:
        parts.append(f"reason={report['reason']}")
    if report["context_tokens"]:
        parts.append(f"kept={report['kept_tokens']}/{report['context_tokens']}")
    if report["status"] != "exact":
        parts.append(f"ratio={report['compression_ratio']:g}")
    if report["context_id"] is not None:
        parts.append(f"id={report['context_id']}")
    return "; ".join(parts)
