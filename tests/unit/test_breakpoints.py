"""Standard cache breakpoints become the marker; reports become a header."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from obcache_sglang.errors import RequestError
from obcache_sglang.frontend.breakpoints import combined, header, mark_tools, mark_turns, place_markers
from obcache_sglang.frontend.exchange import ExchangeMiddleware, current, note_report, params_with
from obcache_sglang.frontend.wish import parse_wish

MARK = "<|obcache|>"
EPHEMERAL = {"type": "ephemeral"}
REPORT: dict[str, Any] = {
    "status": "reused", "reason": None, "context_id": "ab" * 16, "context_tokens": 1441, "kept_tokens": 432, "compression_ratio": 0.7,
}  # fmt: skip


def text(words: str, **field: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **field}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def marked_texts(body: Any) -> list[str]:
    """The texts that end with the marker."""
    if isinstance(body, dict):
        body = list(body.values())
    if isinstance(body, list):
        return [found for each in body for found in marked_texts(each)]
    return [body[: -len(MARK)]] if isinstance(body, str) and body.endswith(MARK) else []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"system": [text("S", cache_control=EPHEMERAL)], "messages": [{"role": "user", "content": "Q"}]}, ["S"]),
        ({"messages": [user(text("D", cache_control=EPHEMERAL), text("Q"))]}, ["D"]),
        ({"messages": [user(text("D", prompt_cache_breakpoint={"mode": "explicit"}), text("Q"))]}, ["D"]),
        (
            {
                "input": [
                    user({"type": "input_text", "text": "D", "prompt_cache_breakpoint": {"mode": "explicit"}}),
                    user(text("Q")),
                ]
            },
            ["D"],
        ),
        # The last of several; but what the last message says in the end is the question.
        (
            {
                "system": [text("S", cache_control=EPHEMERAL)],
                "messages": [user(text("D", cache_control=EPHEMERAL)), user(text("Q"))],
            },
            ["D"],
        ),
        (
            {
                "system": [text("S", cache_control=EPHEMERAL)],
                "messages": [user(text("D")), user(text("Q", cache_control=EPHEMERAL))],
            },
            ["S"],
        ),
        ({"messages": [user(text("Q", cache_control=EPHEMERAL))]}, []),
        # At the top: the last block that something follows.
        ({"cache_control": EPHEMERAL, "system": "S", "messages": [user(text("D")), user(text("Q"))]}, ["D"]),
        # Inside of a tool's result, and on it.
        (
            {
                "messages": [
                    user({"type": "tool_result", "content": [text("a"), text("T")], "cache_control": EPHEMERAL}),
                    user(text("Q")),
                ]
            },
            ["T"],
        ),
        ({"messages": [user({"type": "tool_result", "content": "T", "cache_control": EPHEMERAL}, text("Q"))]}, ["T"]),
        # Nothing that could be marked.
        ({"tools": [{"name": "t", "cache_control": EPHEMERAL}], "messages": [user(text("Q"))]}, []),
        ({"messages": [user(text("  ", cache_control=EPHEMERAL), text("Q"))]}, []),
        ({"messages": "no list"}, []),
        ({"messages": [None, {"role": "user"}, {"role": "user", "content": [None, {"type": "text"}]}]}, []),
    ],
)
def test_the_marker_ends_the_last_block_that_something_follows(body: dict[str, Any], expected: list[str]) -> None:
    more = place_markers(body, MARK, several=False)
    assert marked_texts(body) == expected
    assert more == ({} if expected else None)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user(text("D"), text("Q"))], "D"),
        ([{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "Q"),
        ([user({"type": "image"}), user(text("Q"))], None),
        ([{"role": "system", "content": "S"}], None),
        ([None], None),
        ([], None),
        ("Q", None),
    ],
)
def test_a_tools_breakpoint_ends_what_stands_before_the_first_message(messages: Any, expected: str | None) -> None:
    body = {"tools": [{"name": "a"}, {"name": "b", "cache_control": {**EPHEMERAL, "ttl": "5m"}}, "no tool"], "messages": messages}
    assert mark_tools(body, MARK) == (None if expected is None else {"ttl_seconds": 300})
    assert json.dumps(body).count(MARK) == (expected is not None)
    if expected is not None:
        assert json.dumps(MARK + expected) in json.dumps(body)
    assert mark_tools({"tools": [{"name": "a"}], "messages": messages}, MARK) is None


def test_where_segments_may_end_every_breakpoint_counts() -> None:
    body = {
        "system": [text("S", cache_control=EPHEMERAL), text("rest")],
        "messages": [user(text("D", cache_control={**EPHEMERAL, "ttl": "1h"}), text("Q", cache_control=EPHEMERAL))],
    }
    assert place_markers(body, MARK, several=True) == {}
    assert marked_texts(body) == ["S", "D"]
    automatic = {"cache_control": EPHEMERAL, "system": "S", "messages": [user(text("D"), text("Q"))]}
    assert place_markers(automatic, MARK, several=True) == {} and marked_texts(automatic) == ["D"]


def said(role: str, content: Any = None) -> dict[str, Any]:
    return {"role": role, "content": content}


CHAT = [
    said("system", "S"),
    said("user", "A"),
    said("assistant", "a"),
    said("user", "B"),
    said("assistant", "b"),
    said("user", "C"),
]
WITH_TOOLS = [
    said("user", "A"), said("assistant"), said("tool", "T"), said("assistant", "a"), user({"type": "tool_result", "content": "R"}), said("user", "B"),
    said("assistant", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "keep", "expected"),
    [
        ({"messages": CHAT}, 1, ["S", "a", "b"]),
        ({"messages": CHAT}, 2, ["S", "a"]),
        ({"messages": CHAT}, 3, ["S"]),
        ({"messages": CHAT}, 4, []),
        ({"messages": CHAT[1:]}, 1, ["a", "b"]),
        ({"messages": CHAT[1:]}, 3, []),
        ({"messages": [said("user", "A"), said("assistant", "a")] * 3}, 1, ["a", "a"]),  # the same words are another turn
        ({"messages": WITH_TOOLS}, 1, ["R"]),  # what tools answered belongs to the turn before
        ({"system": "S", "messages": CHAT[1:4]}, 1, ["S", "a"]),
        ({"input": CHAT}, 1, ["S", "a", "b"]),
        ({"input": "Q"}, 1, []),
        ({"messages": [None, "x", {"role": "user"}, said("user", [None]), said("user", "Q")]}, 1, []),
        ({"messages": [said("system", " "), said("user", "A")]}, 1, []),
    ],
)
def test_all_turns_but_the_newest_end_with_the_marker(body: dict[str, Any], keep: int, expected: list[str]) -> None:
    several, one = (json.loads(json.dumps(body)) for _ in range(2))
    mark_turns(several, MARK, keep, several=True)
    assert marked_texts(several) == expected
    mark_turns(one, MARK, keep, several=False)
    assert marked_texts(one) == expected[-1:]


def test_turns_are_kept_where_there_are_some() -> None:
    wish = {"keep_last_turns": 1, "compression_ratio": 0.5}
    body = {"messages": CHAT, "custom_params": {"obcache": wish}, "cache_control": EPHEMERAL}
    for path, arrives in (("/v1/chat/completions", None), ("/v1/messages", wish)):
        read, found, _ = exchange(path, body)
        # On the server of this test contexts are one segment; of the breakpoint nothing is left but the rest of the conversation.
        assert marked_texts(json.loads(read)["messages"]) == ["b"] and found == arrives
    marked = {"messages": [said("user", f"D{MARK}Q")], "custom_params": {"obcache": wish}}
    assert "without a marker" in exchange("/v1/messages", marked)[1]
    with pytest.raises(
        RequestError, match=r"needs the messages of a conversation, at /v1/chat/completions, /v1/messages, /v1/responses"
    ):
        params_with(wish)
    for wrong in (0, True, "1", 1.5, None):
        body["custom_params"] = {"obcache": {"keep_last_turns": wrong}}
        assert marked_texts(json.loads(exchange("/v1/messages", body)[0])) == []
        with pytest.raises(RequestError, match=r"keep_last_turns.*is not a whole number from 1"):
            parse_wish({"keep_last_turns": wrong})


@pytest.mark.parametrize(("ttl", "seconds"), [("5m", 300), ("1h", 3600)])
def test_a_lifetime_goes_with_it(ttl: str, seconds: int) -> None:
    body = {"messages": [user(text("D", cache_control={**EPHEMERAL, "ttl": ttl}), text("Q"))]}
    assert place_markers(body, MARK, several=False) == {"ttl_seconds": seconds}
    body = {"prompt_cache_options": {"ttl": ttl}, "messages": [user(text("D", cache_control=EPHEMERAL), text("Q"))]}
    assert place_markers(body, MARK, several=False) == {"ttl_seconds": seconds}


@pytest.mark.parametrize(
    ("field", "words"),
    [({"ttl": "2h"}, "'2h'; give one of 5m, 30m, 1h"), ({"ttl": []}, "give one of"), ("ephemeral", "give an object")],
)
def test_wrong_breakpoints_say_what_is_allowed(field: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words.replace("[", r"\[")):
        place_markers({"messages": [user(text("D", cache_control=field), text("Q"))]}, MARK, several=False)


def test_what_a_request_says_itself_counts_more() -> None:
    assert combined(None, False) is combined(True, False) is False and combined({"pin": True}, 5) == {"pin": True}
    assert combined(None, {}) is None and combined(True, {}) is True and combined(False, {"ttl_seconds": 1}) is False
    assert combined(None, {"ttl_seconds": 1}) == combined(True, {"ttl_seconds": 1}) == {"ttl_seconds": 1}
    assert combined({"ttl_seconds": 2, "pin": True}, {"ttl_seconds": 1}) == {"ttl_seconds": 2, "pin": True}


def test_headers_are_reports() -> None:
    assert header(REPORT) == f"reused; kept=432/1441; ratio=0.7; id={'ab' * 16}"
    nothing = {"context_id": None, "context_tokens": 0, "kept_tokens": 0}
    assert header({**REPORT, **nothing, "status": "exact", "reason": "no_context"}) == "exact; reason=no_context"


def exchange(path: str, body: Any, *, chunks: int = 1, report: Any = None, fails: bool = False) -> tuple[Any, Any, list[Any]]:
    """(the body that the app reads, what it finds in the exchange, what the client receives)."""
    seen: list[Any] = []
    sent: list[Any] = []
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    incoming = [
        {"type": "http.request", "body": raw[len(raw) * i // chunks : len(raw) * (i + 1) // chunks], "more_body": i < chunks - 1}
        for i in range(chunks)
    ]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        while message.get("more_body"):
            more = await receive()
            message = {**more, "body": message["body"] + more["body"]}
        seen.append(message["body"])
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        assert lengths == [str(len(message["body"])).encode()]
        try:
            seen.append(params_with(None))
        except RequestError as error:
            seen.append(str(error))
        if report is not None:
            note_report(report)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        if fails:
            raise OSError
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"y"})

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-length", str(len(raw)).encode())]}
    with contextlib.suppress(OSError):
        asyncio.run(ExchangeMiddleware(app, MARK)(scope, receive, send))
    assert current.get() is None
    return seen[0], seen[1], sent


BODY = {"messages": [user(text("D", cache_control={**EPHEMERAL, "ttl": "1h"}), text("Q"))]}


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_body_is_rewritten_on_its_way(chunks: int) -> None:
    read, wish, sent = exchange("/v1/messages", BODY, chunks=chunks, report=REPORT)
    assert marked_texts(json.loads(read)) == ["D"] and wish == {"ttl_seconds": 3600}
    assert [message["type"].split(".")[-1] for message in sent] == ["start", "body", "body"]
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-obcache", header(REPORT).encode())]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", BODY),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/chat/completions", b'{"cache_control": broken'),
        ("/v1/chat/completions", b'["cache_control"]'),
        ("/v1/chat/completions", {"messages": [user(text(f"D{MARK}", cache_control=EPHEMERAL), text("Q"))]}),
        ("/v1/chat/completions", {"messages": [user(text("D<|obcache:pin|>", cache_control=EPHEMERAL), text("Q"))]}),
        ("/v1/messages/count_tokens", {"messages": [user(text("D"), text("Q"))]}),
    ],
)
def test_all_other_bodies_pass_as_they_are(path: str, body: Any) -> None:
    read, wish, sent = exchange(path, body)
    assert read == (body if isinstance(body, bytes) else json.dumps(body).encode())
    assert wish is None and sent[0]["headers"] == [(b"a", b"b")]


def test_parameters_that_sglang_drops_arrive() -> None:
    body = {"messages": [], "custom_params": {"obcache": {"compression_ratio": 0.5}}}
    assert exchange("/v1/messages", body)[1] == {"compression_ratio": 0.5}
    assert exchange("/v1/chat/completions", body)[1] is None  # SGLang hands these on itself
    for wish in (False, True, 5):  # who insists, and what is refused later
        body = {"prompt": "D", "custom_params": {"obcache": wish}}
        assert exchange("/api/generate", body)[1] is exchange("/v1/responses", body)[1] is wish


def test_a_wrong_breakpoint_is_the_requests_error() -> None:
    body = {"messages": [user(text("D", cache_control={"ttl": "2h"}), text("Q"))]}
    read, error, _ = exchange("/v1/messages", body)
    assert json.loads(read) == body and "2h" in error


def test_the_marker_is_not_counted() -> None:
    body = {"system": f"S{MARK}", "messages": [user(text(f"D{MARK}"))]}
    assert json.loads(exchange("/v1/messages/count_tokens", body)[0]) == {"system": "S", "messages": [user(text("D"))]}
    told = {"system": "S<|obcache:ratio=0.5,pin|>", "messages": [user(text("D `<|obcache:`"))]}
    assert json.loads(exchange("/v1/messages/count_tokens", told)[0]) == {**told, "system": "S"}


def test_a_text_about_markers_may_have_a_breakpoint() -> None:
    body = {"messages": [user(text("D ends with <|obcache:", cache_control=EPHEMERAL), text('Q "<|obcache:"'))]}
    assert marked_texts(json.loads(exchange("/v1/messages", body)[0])) == ["D ends with <|obcache:"]


@pytest.mark.parametrize("mark", [MARK.replace("<", "\\u003c").replace(">", "\\u003e"), MARK])
def test_a_marker_counts_however_the_clients_json_writes_it(mark: str) -> None:
    """Go's writes < and > as escapes."""
    raw = json.dumps({"messages": [user(text("DMARK", cache_control=EPHEMERAL), text("Q"))]}).replace("MARK", mark).encode()
    assert exchange("/v1/messages", raw)[:2] == (raw, None)
    assert MARK not in json.loads(exchange("/v1/messages/count_tokens", raw)[0])["messages"][0]["content"][0]["text"]


def test_an_answer_that_fails_before_its_body_is_left_to_the_server() -> None:
    assert exchange("/v1/messages", BODY, fails=True)[2] == []
