"""Asks a server about a context, without a marker in sight:

    client = Client("http://localhost:30000")
    answer = client.ask(document, "Who wrote it?")
    print(answer.text, answer.report)

It needs httpx and nothing else: neither a GPU nor SGLang.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypedDict, Unpack, cast, overload

import httpx

# Written out again, because what defines them brings the server's modules; tests/unit/test_client.py compares.
MARKER = "<|obcache|>"
KEY = "obcache"

URL = "http://localhost:30000"
TIMEOUT_SECONDS = 600.0
CONNECT_TIMEOUT_SECONDS = 10.0
MAX_NEW_TOKENS = 256
# Questions of one list that are asked at the same time.
MAX_CONNECTIONS = 32
# SGLang closes a connection that was idle for 5 s. A question must not be sent on one that is just being closed.
KEEPALIVE_SECONDS = 3.0

_SAMPLING = ("temperature", "top_p", "top_k", "stop")


class CompressionParams(TypedDict, total=False):
    """How the context is compressed. What is left out is as the server was started. The server checks the values (docs/options.md).

    compression_ratio: fraction of the context's KV pairs that is removed, in [0, 1). 0.7 keeps 30 %.
    method, score, preset, window and the following: as the flags `--obcache-method` and so on.
    pin: hold the context's slots against eviction.
    ttl_seconds: delete the context this long after this question, or after a later one that says so.
    """

    compression_ratio: float
    method: str
    score: str
    preset: str
    window: int | str
    pooling: str
    kernel_size: int
    sink_tokens: int
    recent_tokens: int
    heads: str
    max_kept_tokens: int | None
    budget: str
    adakv_safeguard: float
    normalization: str
    replay_chunk: int
    replay_attention: str
    segment_tokens: int | None
    exact_segments: int
    segment_ratios: Sequence[float]
    pin: bool
    ttl_seconds: float | None


class AskOptions(CompressionParams, total=False):
    """All options of `ask`: those of `CompressionParams`, and

    chat: True, the default: context and question are one user message, with an empty line between them, in the model's chat template.
        False: they are the prompt as they stand, and the model completes it.
    system: text of a system message before them; only with chat.
    max_new_tokens: the answer's longest length in tokens; 256 by default.
    temperature, top_p, top_k, stop: sampling parameters; by default the server's. `temperature=0` is greedy.
    cache_salt: the tenant's key. Contexts are shared only between questions with the same one.
    extra_body: more fields of the request's body, for example `{"chat_template_kwargs": {"enable_thinking": False}}`. More sampling
        parameters: for chat as fields of their own, else under "sampling_params".
    """

    chat: bool
    system: str | None
    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    stop: str | list[str] | None
    cache_salt: str | None
    extra_body: Mapping[str, Any] | None


class ServerError(RuntimeError):
    """The server gave no answer, or none that can be used.

    url: what was asked.
    status_code: its HTTP status; 200 if the answer cannot be used; None if there was no answer.
    message: the server's own words, or what was wrong.
    """

    def __init__(self, url: str, status_code: int | None, message: str) -> None:
        super().__init__(url, status_code, message)
        self.url = url
        self.status_code = status_code
        self.message = message

    def __str__(self) -> str:
        what = "did not answer" if self.status_code is None else f"answered {self.status_code}"
        return f"{self.url} {what}: {self.message}"


@dataclass(frozen=True)
class Answer:
    """An answer to one question.

    text: what the model wrote.
    report: what became of the context: `status` is "compressed" (this question started it), "reused", or "exact" with the `reason`;
        `context_tokens`, `kept_tokens` per KV head, `compression_ratio`, `context_id` and others (docs/guide.md).
    response: the whole body, for what else it says: usage, finish_reason, reasoning_content.
    """

    text: str
    report: dict[str, Any]
    response: dict[str, Any] = field(repr=False)


class Client:
    """Asks the server at `url`. Close it at the end, or use it in a `with` block. Threads may share one.

    api_key: the server's `--api-key`.
    timeout: seconds to wait for an answer; None for as long as it takes. The first answer about a context waits for its compression.
    marker: the server's `--obcache-marker`, if it has one of its own.
    transport: httpx's, for certificates, proxies and tests.
    """

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout: float | None = TIMEOUT_SECONDS,
        marker: str = MARKER,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.marker = marker
        self._http = httpx.Client(transport=transport, **_http_options(api_key, timeout))

    @overload
    def ask(self, context: str | Sequence[str], question: str, **options: Unpack[AskOptions]) -> Answer: ...

    @overload
    def ask(
        self, context: str | Sequence[str], question: list[str] | tuple[str, ...], **options: Unpack[AskOptions]
    ) -> list[Answer]: ...

    def ask(
        self, context: str | Sequence[str], question: str | Sequence[str], **options: Unpack[AskOptions]
    ) -> Answer | list[Answer]:
        """The answer to a question about `context`. For a list of questions: the list of their answers, in the same order.

        context: the text that questions share. The server compresses it once, and keeps it for later calls. A list: texts one after the
            other, each shared with all contexts that begin alike, such as instructions and a document; for servers with gates.
        question: the questions of a list are asked `MAX_CONNECTIONS` at a time.
        options: `temperature=0` and other sampling parameters, `compression_ratio=0.5` and other settings, `chat=False` for a plain
            completion. All of them: `AskOptions`.

        Raises ValueError for an empty text and for one that contains the marker, TypeError for an unknown option; nothing is sent then.
        Raises ServerError if the server refuses (a setting that is not allowed is a 400), does not answer, or does not compress. One
        such error ends a list.
        """
        asked = _requests(self.marker, context, question, options)
        if isinstance(question, str):
            return self._send(asked[0])
        with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
            return list(pool.map(self._send, asked))

    def _send(self, request: _Request) -> Answer:
        url = self.url + request.path
        try:
            response = self._http.post(url, json=request.body)
        except httpx.TransportError as error:
            raise _no_answer(url, error) from error
        return _answer(url, response)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncClient:
    """As `Client`, for asyncio: `await client.ask(...)`, `async with`, `await client.aclose()`."""

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout: float | None = TIMEOUT_SECONDS,
        marker: str = MARKER,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.marker = marker
        self._http = httpx.AsyncClient(transport=transport, **_http_options(api_key, timeout))

    @overload
    async def ask(self, context: str | Sequence[str], question: str, **options: Unpack[AskOptions]) -> Answer: ...

    @overload
    async def ask(
        self, context: str | Sequence[str], question: list[str] | tuple[str, ...], **options: Unpack[AskOptions]
    ) -> list[Answer]: ...

    async def ask(
        self, context: str | Sequence[str], question: str | Sequence[str], **options: Unpack[AskOptions]
    ) -> Answer | list[Answer]:
        """As `Client.ask`."""
        asked = _requests(self.marker, context, question, options)
        if isinstance(question, str):
            return await self._send(asked[0])
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._send(request)) for request in asked]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _send(self, request: _Request) -> Answer:
        url = self.url + request.path
        try:
            response = await self._http.post(url, json=request.body)
        except httpx.TransportError as error:
            raise _no_answer(url, error) from error
        return _answer(url, response)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


# --- what is sent -----------------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    path: str
    body: dict[str, Any]


def _http_options(api_key: str | None, timeout: float | None) -> dict[str, Any]:
    connect = CONNECT_TIMEOUT_SECONDS if timeout is None else min(timeout, CONNECT_TIMEOUT_SECONDS)
    return {
        "headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        # pool: the last questions of a long list wait for a connection as long as all the others take.
        "timeout": httpx.Timeout(timeout, connect=connect, pool=None),
        "limits": httpx.Limits(
            max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS, keepalive_expiry=KEEPALIVE_SECONDS
        ),
    }


def _requests(marker: str, context: str | Sequence[str], question: str | Sequence[str], options: AskOptions) -> list[_Request]:
    """One for each question. Raises ValueError, and TypeError for an argument of another type or name."""
    for name in options:
        if name not in AskOptions.__optional_keys__:
            raise TypeError(f"ask() has no option {name!r}. Its options are {', '.join(sorted(AskOptions.__optional_keys__))}.")
    contexts: list[str] = list(context) if isinstance(context, list | tuple) else [cast("str", context)]
    if not contexts:
        raise ValueError("context=[] is empty. Give some text to ask about.")
    for number, each in enumerate(contexts):
        _check_text(f"context[{number}]" if isinstance(context, list | tuple) else "context", each, marker)
    questions = [question] if isinstance(question, str) else list(question)
    for number, each in enumerate(questions):
        _check_text("question" if isinstance(question, str) else f"question[{number}]", each, marker)
    given = cast("dict[str, Any]", options)
    marked = "".join(each + marker for each in contexts)
    return [_request(marked, each, marker, given) for each in questions]


def _check_text(name: str, text: object, marker: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}. Give a string.")
    if not text.strip():
        raise ValueError(f"{name}={text!r} is empty. Give some text: a context to ask about, and a question about it.")
    with_options = marker.removesuffix("|>") + ":" if marker.startswith("<|") and marker.endswith("|>") else marker
    for found in (marker, with_options):
        if found in text:
            raise ValueError(
                f"{name} contains the marker {found!r}, at character {text.index(found)}. It may not, because the client puts the marker "
                f"where the context ends. Take it out, for example with text.replace({found!r}, '')."
            )


def _request(marked: str, question: str, marker: str, options: Mapping[str, Any]) -> _Request:
    """marked: the context and the marker that ends it."""
    extra = dict(options.get("extra_body") or {})
    system = options.get("system")
    max_new_tokens = options.get("max_new_tokens", MAX_NEW_TOKENS)
    body: dict[str, Any] = {"stream": False}
    if options.get("cache_salt") is not None:
        body["cache_salt"] = options["cache_salt"]
    params = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    settings = {name: options[name] for name in CompressionParams.__optional_keys__ if name in options}
    if settings:
        params["custom_params"] = {KEY: settings}
    if options.get("chat", True):
        messages = [{"role": "user", "content": f"{marked}\n\n{question}"}]
        if system is not None:
            _check_text("system", system, marker)
            messages.insert(0, {"role": "system", "content": system})
        # SGLang serves one model, whatever its name. A gateway may need to know it.
        extra.setdefault("model", "default")
        body |= params | {"messages": messages, "max_tokens": max_new_tokens}
        return _Request("/v1/chat/completions", _merged("extra_body", extra, body))
    if system is not None:
        raise ValueError(
            f"system={system[:50]!r} cannot be used with chat=False, which has no messages. Put it before the context."
        )
    more = extra.pop("sampling_params", {})
    params = _merged('extra_body["sampling_params"]', more, params | {"max_new_tokens": max_new_tokens})
    body |= {"text": marked + question, "sampling_params": params}
    return _Request("/generate", _merged("extra_body", extra, body))


def _merged(name: str, extra: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    both = sorted(extra.keys() & own.keys())
    if both:
        raise ValueError(
            f"{name} has {', '.join(both)}, which ask() sets. Leave it out: what can be chosen is an argument of ask()."
        )
    return {**extra, **own}


# --- what comes back --------------------------------------------------------------------------------------------------------


def _answer(url: str, response: httpx.Response) -> Answer:
    if response.status_code != 200:
        raise ServerError(url, response.status_code, _message(response))
    try:
        body = response.json()
        if "choices" in body:
            # None where a reasoning model did not get beyond its reasoning.
            text, reports = body["choices"][0]["message"]["content"] or "", body.get("metadata")
        else:
            text, reports = body["text"], body["meta_info"]
        report = (reports or {}).get(KEY)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ServerError(url, 200, f"This is no answer of SGLang: {response.text[:200]!r}") from error
    if not isinstance(report, dict):
        raise ServerError(
            url,
            200,
            "The answer has no report. This server runs without obcache_sglang: it took the marker for a part of the text, and compressed "
            "nothing. Install the package there and start it with --obcache; or something between you and the server took the report out.",
        )
    return Answer(text, report, body)


def _message(response: httpx.Response) -> str:
    """The server's own words. SGLang's endpoints put them in different places."""
    try:
        body = response.json()
    except ValueError:  # a gateway's page
        return response.text[:1000]
    found = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or found
    return str(found)


def _no_answer(url: str, error: httpx.TransportError) -> ServerError:
    advice = "Give the client a longer timeout." if isinstance(error, httpx.TimeoutException) else "Is a server running there?"
    return ServerError(url, None, f"{type(error).__name__}: {str(error).rstrip('.')}. {advice}")
