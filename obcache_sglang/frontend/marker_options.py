"""The marker as text, in its two forms: `<|obcache|>`, and with options, `<|obcache:ratio=0.5,pin,ttl=600|>`.

Options are for clients whose `custom_params` do not arrive. Only a marker of the form `<|NAME|>` takes them. Nothing here needs SGLang.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from obcache_sglang.errors import RequestError, shown
from obcache_sglang.frontend.wish import REQUEST_KEYS, TURNS_KEY
from obcache_sglang.settings import number_or_text

SHORT_KEYS = {"ratio": "compression_ratio", "ttl": "ttl_seconds"}

# The marker itself says where the context ends, and each one its segment's ratio; an id of a context opens it, and does not belong into a
# text that others may read.
_ELSEWHERE = ("context_len", "context_id", "boundaries", "segment_ratios", TURNS_KEY)
OPTION_KEYS = tuple(key for key in REQUEST_KEYS if key not in _ELSEWHERE)
"""What a marker may say, apart from the short keys."""

MAX_LENGTH = 500
"""Characters between a marker's head and its end."""

# What may follow a head in a text that only writes about markers: the end of a quotation, of a line or of the text, and an escape in JSON.
_IS_MARKER = r"""[ \t]*+(?!['"`’”»\\\r\n]|\Z)"""
_BODY = rf"([^|<>\r\n]{{0,{MAX_LENGTH}}})\|>"


def head_of(marker: str) -> str | None:
    """What a marker with options begins with, such as `<|obcache:`; None for a marker that takes none."""
    is_named = marker.startswith("<|") and marker.endswith("|>") and len(marker) > len("<||>")
    return marker.removesuffix("|>") + ":" if is_named else None


@cache
def _patterns(marker: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(any marker, one that is well formed), as they stand in a text."""
    plain, head = re.escape(marker), head_of(marker)
    if head is None:
        return re.compile(plain), re.compile(plain)
    with_options = re.escape(head) + _IS_MARKER
    return re.compile(f"{plain}|{with_options}"), re.compile(f"{plain}|{with_options}{_BODY}")


def contains(text: str, marker: str) -> bool:
    """Whether a text contains the marker in either form, well formed or not.

    A head that a quotation mark, a backslash, a line break or the end of the text follows is no marker: it stands in a text about markers.
    """
    return _patterns(marker)[0].search(text) is not None


def removed(text: str, marker: str) -> str:
    """A text without its markers."""
    return _patterns(marker)[1].sub("", text)


def is_marker_before(after: str) -> bool:
    """Whether a head that this text follows is a marker."""
    return re.match(_IS_MARKER, after) is not None


def read_options(after: str) -> tuple[dict[str, Any], str]:
    """(options, the text after the marker), from the text after a marker's head.

    Keys are those of `custom_params["obcache"]`, values are not checked yet. Raises RequestError. Its messages do not tell the marker, which
    may be a secret of the operator's.
    """
    found = re.match(_BODY, after)
    if found is None:
        raise RequestError(
            f"The context marker with the options {shown(after[:40])} is not closed. Its options are KEY=VALUE, or a key alone for true, "
            f"separated by commas, and end with |> on the same line, after at most {MAX_LENGTH} characters."
        )
    options: dict[str, Any] = {}
    for option in found[1].split(","):
        name, equals, value = (part.strip() for part in option.partition("="))
        key = SHORT_KEYS.get(name, name)
        if key not in OPTION_KEYS:
            allowed = ", ".join((*SHORT_KEYS, *OPTION_KEYS))
            raise RequestError(
                f"The context marker has the option {shown(name)}, which is not a known key. Allowed keys: {allowed}."
            )
        if equals and not value:
            raise RequestError(f"The context marker has the option {shown(name)} without a value. Give {name}=VALUE.")
        if key in options:
            raise RequestError(f"The context marker has the option {key} more than once. Give it once.")
        options[key] = _value(value) if equals else True
    return options, after[found.end() :]


def together(said: Sequence[Mapping[str, Any]], num_markers: int) -> dict[str, Any]:
    """The options of one prompt, of whose markers these have some. Each may have a ratio of its own, that of the segment which it ends.

    Raises RequestError where markers say different things that hold for the whole prompt.
    """
    options: dict[str, Any] = {}
    ratios = [each["compression_ratio"] for each in said if "compression_ratio" in each]
    if len(set(ratios)) > 1:
        if len(ratios) < num_markers:
            raise RequestError(
                f"The prompt has {num_markers} context markers, of which {len(ratios)} have a ratio, {shown(ratios)}. Give each one its own "
                "ratio, or all the same."
            )
        while ratios[-2] == ratios[-1]:  # as turns of a conversation may have, however many
            ratios.pop()
        options = {"segment_ratios": ratios[:-1], "compression_ratio": ratios[-1]}
    for each in said:
        for key, value in each.items():
            if key == "compression_ratio" and "segment_ratios" in options:
                continue
            if key in options and options[key] != value:
                raise RequestError(
                    f"The context markers of the prompt have the option {key} with different values, {shown(options[key])} and "
                    f"{shown(value)}. All but the ratio hold for the whole prompt: give one value."
                )
            options[key] = value
    return options


def _value(text: str) -> bool | int | float | str:
    return text == "true" if text in ("true", "false") else number_or_text(text)


def with_options(marker: str, options: Mapping[str, Any]) -> str:
    """The marker with options, as a client writes it. Raises ValueError for a marker that takes none."""
    if not options:
        return marker
    head = head_of(marker)
    if head is None:
        raise ValueError(f"The marker {marker!r} takes no options: only markers of the form <|NAME|> do.")
    words = (key if value is True else f"{key}={'false' if value is False else value}" for key, value in options.items())
    return f"{head}{','.join(words)}|>"
