"""Checks of single settings that need no bounds: each takes a setting's name and value, and returns the value to use or raises InvalidValue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from obcache_sglang.errors import InvalidValue


def ratio(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InvalidValue(name, value, "is outside [0, 1). It is the fraction of KV pairs that is removed: 0.7 keeps 30 %.")
    return float(value)


def share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidValue(name, value, "is outside [0, 1]. It is the part of an equal share that every head keeps.")
    return float(value)


def marker(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value or value != value.strip():
        raise InvalidValue(name, value, "is not a non-empty string without spaces around it. The default is <|obcache|>.")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidValue(name, value, "is not a non-empty string.")
    return value


def ladder(name: str, value: Any) -> tuple[float, ...]:
    """Ascending ratios, given as "0.7,0.85" or as a list."""
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, Sequence):
        raise InvalidValue(name, value, "is not a list of ratios; give for example 0.7,0.85.")
    ratios = tuple(number_or_text(each.strip()) if isinstance(each, str) else each for each in given)
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise InvalidValue(name, value, f"has {ratio!r}, which is not a number between 0 and 1.")
    if list(ratios) != sorted(set(ratios)):
        raise InvalidValue(name, value, "does not ascend; give each ratio once, the lowest first.")
    return tuple(map(float, ratios))


def names(name: str, value: Any) -> tuple[str, ...]:
    """Names, given as "a,b" or as a list."""
    given = value.split(",") if isinstance(value, str) else value
    names = tuple(each.strip() if isinstance(each, str) else "" for each in given) if isinstance(given, Sequence) else ()
    if not names or not all(names):
        raise InvalidValue(name, "...", "is not a list of names; give for example tenant-a,tenant-b.")  # they may be secret
    return names


def number_or_text(text: str) -> int | float | str:
    """A number that was written as text. Anything else stays text, and the option's check refuses it by name."""
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return text
