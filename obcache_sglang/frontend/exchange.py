"""What an HTTP exchange carries beside SGLang's own fields: breakpoints on the way in, the header `X-Obcache` on the way out.

An ASGI middleware, since SGLang's models of requests drop the fields, and its endpoints know nothing of the report. What it finds is kept
for the time of the exchange (`current`), where the hooks of the tokenizer manager look for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import orjson

from obcache_sglang.errors import RequestError
from obcache_sglang.frontend import breakpoints
from obcache_sglang.frontend.marker_options import contains
from obcache_sglang.frontend.wish import TURNS_KEY, kept_turns
from obcache_sglang.host import Touch
from obcache_sglang.messages import KEY

HEADER = b"x-obcache"

_COUNTED = "/v1/messages/count_tokens"
_OF_MESSAGES = ("/v1/messages", "/v1/responses")
_DROP_PARAMS = (*_OF_MESSAGES, "/api/chat", "/api/generate")
"""Endpoints that drop `custom_params`."""
NAMESPACE_FIELDS = ("cache_salt", "extra_key", "lora_path")
"""Of a request: what a context is shared by."""
_HAVE_BLOCKS = ("/v1/chat/completions", *_OF_MESSAGES)


@dataclass
class Exchange:
    """wish: what the body says for `custom_params["obcache"]`, None for nothing. error: why the request is wrong. report: the first answer's.

    names: the namespace that a body gives on an endpoint whose models of requests drop it. marks_tools: whether the marker stands before the first message, for what the chat template writes there.
    marks_turns: whether the markers stand where the turns end that its own wish does not keep.
    """

    wish: Any = None
    marks_tools: bool = False
    marks_turns: bool = False
    names: tuple[str, ...] = ()
    error: RequestError | None = None
    report: dict[str, Any] | None = None


current: ContextVar[Exchange | None] = ContextVar("obcache_exchange", default=None)


def params_with(own: Any) -> Any:
    """A request's `custom_params["obcache"]`, with what the body of its exchange says beside it. Raises RequestError."""
    exchange = current.get()
    if exchange is not None and exchange.error is not None:
        raise exchange.error
    if exchange is not None and exchange.wish is not None:
        own = breakpoints.combined(own, exchange.wish)
    if isinstance(own, dict) and TURNS_KEY in own and (exchange is None or not exchange.marks_turns):
        raise RequestError(
            f'custom_params["{KEY}"]["{TURNS_KEY}"] needs the messages of a conversation, at {", ".join(_HAVE_BLOCKS)}, without a marker. '
            "Leave it out, or say where the context ends."
        )
    return own


def marks_tools() -> bool:
    """Whether the exchange's marker stands first on purpose."""
    exchange = current.get()
    return exchange is not None and exchange.marks_tools


def dropped_names() -> tuple[str, ...]:
    """What the exchange's body says of its namespace that SGLang does not hear."""
    exchange = current.get()
    return () if exchange is None else exchange.names


def note_report(report: dict[str, Any]) -> None:
    """Keeps the first report of the exchange for its header."""
    exchange = current.get()
    if exchange is not None and exchange.report is None:
        exchange.report = report


class ExchangeMiddleware:
    """ASGI. marker: its text; None on a server without a tokenizer. several: asked whether all breakpoints of a request end segments."""

    def __init__(self, app: Any, marker: str | None, *, several: Callable[[], bool] = bool) -> None:
        self.app = app
        self.marker = marker
        self.several = several

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        exchange = Exchange()
        if self.marker is not None and scope["path"] in (*_HAVE_BLOCKS, *_DROP_PARAMS, _COUNTED):
            scope, receive = await self._read(scope, receive, exchange)
        start: dict[str, Any] | None = None

        async def send_with_header(message: Any) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message  # a stream's report comes with its first token
                return
            if start is not None:
                headers = list(start.get("headers", ()))
                if exchange.report is not None:
                    headers.append((HEADER, breakpoints.header(exchange.report).encode()))
                begun, start = {**start, "headers": headers}, None
                await send(begun)
            await send(message)

        token = current.set(exchange)
        try:
            await self.app(scope, receive, send_with_header)
        finally:
            current.reset(token)

    async def _read(self, scope: Any, receive: Any, exchange: Exchange) -> tuple[Any, Any]:
        """(scope, receive) with the body as SGLang is to read it."""
        parts = []
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the client is gone
                return scope, _replayed([message], receive)
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        body = b"".join(parts)
        changed = self._rewritten(scope["path"], body, exchange)
        if changed is not None:
            length = (b"content-length", str(len(changed)).encode())
            headers = [each for each in scope["headers"] if each[0] != b"content-length"]
            scope, body = {**scope, "headers": [*headers, length]}, changed
        return scope, _replayed([{"type": "http.request", "body": body, "more_body": False}], receive)

    def _rewritten(self, path: str, body: bytes, exchange: Exchange) -> bytes | None:
        """The body with its marker in place, or without it where tokens are counted; None for one that stays. What it says goes to exchange."""
        assert self.marker is not None
        has_fields = path in _HAVE_BLOCKS and any(f'"{name}"'.encode() in body for name in breakpoints.FIELDS)
        has_turns = path in _HAVE_BLOCKS and TURNS_KEY.encode() in body
        wishes = path in _DROP_PARAMS and any(f'"{name}"'.encode() in body for name in ("custom_params", *NAMESPACE_FIELDS))
        if not (path == _COUNTED or wishes or has_fields or has_turns):
            return None
        try:
            read = orjson.loads(body)
        except ValueError:
            return None  # SGLang says so
        if not isinstance(read, dict):
            return None
        if path == _COUNTED:
            counted = breakpoints.without_marker(read, self.marker)
            return None if counted == read else orjson.dumps(counted)
        if wishes:
            exchange.wish = breakpoints.own_params(read)
            exchange.names = tuple(read[name] for name in NAMESPACE_FIELDS if isinstance(read.get(name), str))
        # Not in the body as it came: clients may escape the marker's characters there.
        has_turns = has_turns and _says(read, TURNS_KEY)
        if not (has_fields or has_turns) or contains(orjson.dumps(read).decode(), self.marker):
            return None
        # With another method a context may have no segments.
        several = self.several() and not _says(read, "method", "preset", "boundaries", "context_id")
        exchange.marks_turns = has_turns
        try:
            if has_turns:
                breakpoints.mark_turns(read, self.marker, kept_turns(breakpoints.own_params(read)[TURNS_KEY]), several=several)
                return orjson.dumps(read)
            more = breakpoints.place_markers(read, self.marker, several=several)
            if (several or more is None) and not _says(read, "context_len", "context_id", "boundaries"):
                of_tools = breakpoints.mark_tools(read, self.marker)
                exchange.marks_tools = of_tools is not None
                more = of_tools if more is None else {**(of_tools or {}), **more}
        except RequestError as error:
            exchange.error = error
            return None
        if more is None:
            return None
        exchange.wish = breakpoints.combined(exchange.wish, more)
        return orjson.dumps(read)


def _says(body: dict[str, Any], *names: str) -> bool:
    """Whether a request's own wish has any of these keys."""
    own = breakpoints.own_params(body)
    return isinstance(own, dict) and any(name in own for name in names)


def _replayed(messages: list[Any], receive: Any) -> Any:
    """receive, after messages that were taken from it."""

    async def replay() -> Any:
        return messages.pop(0) if messages else await receive()

    return replay


def _created(usage: Any, *args: Any, **kwargs: Any) -> Any:
    """After _anthropic_usage_from_openai: tokens of a context that this request had compressed were created, as that API counts them."""
    exchange = current.get()
    report = None if exchange is None else exchange.report
    if report is not None and report["status"] == "compressed" and usage.input_tokens is not None:
        created = min(usage.input_tokens, max(0, report["context_tokens"] - (usage.cache_read_input_tokens or 0)))
        usage.cache_creation_input_tokens = created
        usage.input_tokens -= created
    return usage


TOUCHES = (
    Touch(
        "sglang.srt.entrypoints.anthropic.serving._anthropic_usage_from_openai",
        "after",
        "cache_creation_input_tokens",
        ("usage",),
        "tokenizer",
        _created,
    ),
)
