"""Checks of single settings: each takes a setting's name and value, and returns the value to use or raises InvalidValue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from obcache_sglang.errors import InvalidValue
from obcache_sglang.settings.bounds import BOUNDS

MAX_RATIOS = 4097
"""Of the segments of one prompt: as many as it may have."""


def check_whole_number(name: str, value: Any, what: str, *, odd: bool = False, all_word: bool = False) -> int:
    """A whole number within BOUNDS[name]. Raises InvalidValue. what: continues the sentence "It is ..."."""
    lowest, highest, reason = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest or (odd and value % 2 == 0):
        allowed = f"{'an odd' if odd else 'a'} whole number from {lowest} to {highest}" + (', or "all"' if all_word else "")
        raise InvalidValue(name, value, f"is not {allowed} ({reason}). It is {what}.")
    return value


def check_number(name: str, value: Any, what: str) -> float:
    """A finite number within BOUNDS[name]. Raises InvalidValue. what: continues the sentence "It is ..."."""
    lowest, highest, reason = BOUNDS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise InvalidValue(name, value, f"is not a number from {lowest} to {highest} ({reason}). It is {what}.")
    return float(value)


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


def ratios(name: str, value: Any) -> tuple[float, ...]:
    """Ratios of compression, given as "0,0.7" or as a list."""
    given = [number_or_text(each.strip()) for each in value.split(",")] if isinstance(value, str) else value
    if not isinstance(given, Sequence) or len(given) > MAX_RATIOS:
        raise InvalidValue(name, value, f"is not a list of at most {MAX_RATIOS} ratios; give for example 0,0.7.")
    return tuple(ratio(name, each) for each in given)


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
