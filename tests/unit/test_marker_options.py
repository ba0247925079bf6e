"""The marker with options, as text: what is one, what it says, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from obcache_sglang.errors import RequestError
from obcache_sglang.frontend.marker_options import (
    MAX_LENGTH,
    OPTION_KEYS,
    contains,
    head_of,
    is_marker_before,
    read_options,
    removed,
    together,
    with_options,
)
from obcache_sglang.frontend.wish import parse_wish

MARK = "<|obcache|>"
HEAD = "<|obcache:"


@pytest.mark.parametrize(
    ("marker", "head"),
    [(MARK, HEAD), ("<|a b|>", "<|a b:"), ("¶", None), ("<obcache>", None), ("<||>", None), ("<|x", None), ("x|>", None)],
)
def test_markers_in_bars_take_options(marker: str, head: str | None) -> None:
    assert head_of(marker) == head


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("ratio=0.5", {"compression_ratio": 0.5}),
        ("ratio=0.5,pin,ttl=600", {"compression_ratio": 0.5, "pin": True, "ttl_seconds": 600}),
        ("compression_ratio=0.5,ttl_seconds=1.5", {"compression_ratio": 0.5, "ttl_seconds": 1.5}),
        (" ratio = 0.5 ,\tpin = false ", {"compression_ratio": 0.5, "pin": False}),
        ("method=tova,score=obcache-v,budget=adakv", {"method": "tova", "score": "obcache-v", "budget": "adakv"}),
        ("method=h2o,window=all", {"method": "h2o", "window": "all"}),
        ("mode=prompt,pin=true", {"mode": "prompt", "pin": True}),
        ("max_kept_tokens=100", {"max_kept_tokens": 100}),
    ],
)
def test_options_are_read(said: str, options: dict[str, Any]) -> None:
    got, rest = read_options(f"{said}|>, and |> the rest")
    assert got == options and [type(each) for each in got.values()] == [type(each) for each in options.values()]
    assert rest == ", and |> the rest"
    parse_wish(got)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("|>", "the option '', which is not a known key. Allowed keys: ratio, ttl, mode, pin, ttl_seconds, compression_ratio"),
        ("ratio=0.5,|>", "the option '', which is not a known key"),
        ("=0.5|>", "the option '', which is not a known key"),
        ("ratio=|>", "the option 'ratio' without a value. Give ratio=VALUE"),
        ("ratio=0.5,ratio=0.6|>", "compression_ratio more than once"),
        ("ratio=0.5,compression_ratio=0.5|>", "compression_ratio more than once"),
        ("color=red|>", "the option 'color', which is not a known key"),
        ("context_len=5|>", "the option 'context_len', which is not a known key"),
        ("context_id=" + "ab" * 16 + "|>", "the option 'context_id', which is not a known key"),
        ("max_contexts=5|>", "the option 'max_contexts', which is not a known key"),
        ("ratio=0.5", "options 'ratio=0.5' is not closed"),
        ("ratio=0.5\n|>", "is not closed"),
        ("ratio=0.5|", "is not closed"),
        ("ratio=0.5 and <|obcache|>", "is not closed"),
        ("x" * (MAX_LENGTH + 1) + "|>", f"at most {MAX_LENGTH} characters"),
    ],
)
def test_wrong_options_name_the_key_and_what_is_allowed(after: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_options(after)
    assert words in str(refused.value) and refused.value.status_code == 400
    assert HEAD not in str(refused.value), "it may be a secret of the operator's"
    assert contains(HEAD + after, MARK), "what is wrong with it is said, and the model does not read it"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ratio", '["compression_ratio"]=True is outside [0, 1)'),
        ("ratio=2", '["compression_ratio"]=2 is outside [0, 1)'),
        ("ratio=nan", '["compression_ratio"]=nan is outside'),
        ("ratio=half", "[\"compression_ratio\"]='half' is outside"),
        ("pin=1", '["pin"]=1 is not true or false'),
        ("ttl=0", '["ttl_seconds"]=0 is not a number from 1 to'),
        ("ttl=" + "9" * 400, '["ttl_seconds"]=9'),
        ("budget=5", '["budget"]=5 is not allowed; choose uniform'),
        ("mode=both", "[\"mode\"]='both' is not allowed; choose marked, auto or prompt"),
    ],
)
def test_values_are_checked_as_those_of_custom_params(said: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_wish(read_options(said + "|>")[0])
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "the words `<|obcache:` begin it", 'He said "<|obcache:".', "'<|obcache:'", "“<|obcache:”", "ends with <|obcache:",
        "<|obcache:\nratio=0.5|>", "<|obcache:  \t\n", '{"a": "<|obcache:\\n"}', "`<|obcache:` and `|>`",
        "obcache:ratio=0.5|>", "<|obcache", "<|OBCACHE:ratio=0.5|>", "< |obcache|>",
    ],
)  # fmt: skip
def test_a_text_about_markers_has_none(text: str) -> None:
    assert not contains(text, MARK)
    assert removed(text, MARK) == text


@pytest.mark.parametrize("after", ["ratio", " ratio=0.5|>", "|>", "  |>", "=", ",", "é=1|>", "{options}|>", "<options>|>", "..."])
def test_anything_else_is_one(after: str) -> None:
    assert is_marker_before(after) and contains("a " + HEAD + after, MARK)
    assert not contains("a " + HEAD + after, "¶") and not contains("a " + HEAD + after, "<|other|>")


def test_markers_are_removed_in_both_forms() -> None:
    assert removed(f"a{MARK}b<|obcache:ratio=0.5, pin|>c", MARK) == "abc"
    assert removed("a¶b<|obcache:ratio=0.5|>", "¶") == "ab<|obcache:ratio=0.5|>"


def test_what_is_written_is_read_back() -> None:
    options = {"compression_ratio": 0.5, "pin": True, "ttl_seconds": 60, "method": "tova"}
    written = with_options(MARK, options)
    assert written == "<|obcache:compression_ratio=0.5,pin,ttl_seconds=60,method=tova|>"
    assert read_options(written.removeprefix(HEAD)) == (options, "")
    assert with_options(MARK, {"pin": False}) == "<|obcache:pin=false|>"
    assert with_options("¶", {}) == "¶"
    with pytest.raises(ValueError, match="takes no options"):
        with_options("¶", {"pin": True})


def test_each_marker_may_have_its_segments_ratio() -> None:
    ratios = [{"compression_ratio": ratio} for ratio in (0, 0.7, 0.8)]
    assert together([], 2) == {}
    assert together(ratios[:1], 2) == {"compression_ratio": 0}, "one of them holds for the whole prompt"
    assert together([ratios[1], {**ratios[1], "pin": True}], 2) == {"compression_ratio": 0.7, "pin": True}
    assert together([*ratios[:2], {**ratios[2], "pin": True}], 3) == {
        "segment_ratios": [0, 0.7], "compression_ratio": 0.8, "pin": True,
    }  # fmt: skip
    assert together([ratios[0], *ratios[2:] * 300], 301) == {"segment_ratios": [0], "compression_ratio": 0.8}
    with pytest.raises(
        RequestError, match=r"has 3 context markers, of which 2 have a ratio, \[0, 0.7\]. Give each one its own ratio"
    ):
        together(ratios[:2], 3)
    with pytest.raises(RequestError, match="the option pin with different values, True and False"):
        together([{"pin": True}, {"pin": False}], 2)


def test_a_marker_tells_nothing_of_where_or_which() -> None:
    """The marker is where the context ends, and whoever reads a text must not be able to open what it names."""
    assert {"pin", "ttl_seconds", "mode", "compression_ratio", "budget"} <= set(OPTION_KEYS)
    assert not {"context_len", "context_id", "boundaries", "keep_last_turns"} & set(OPTION_KEYS)
