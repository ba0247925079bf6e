"""The client without a server: what it sends, what it refuses, and what it makes of answers."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from obcache_sglang import client, lang, messages
from obcache_sglang.client import Answer, AskOptions, AsyncClient, Client, CompressionParams, ServerError
from obcache_sglang.frontend.wish import REQUEST_KEYS

REPORT = {"status": "compressed", "reason": None, "kept_tokens": 30}
CHAT = {"choices": [{"message": {"content": "Newton"}}], "metadata": {"obcache": REPORT}}
COMPLETION = {"text": "Newton", "meta_info": {"obcache": REPORT}}
Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """ask(handler, context, question, **options) of either client; handler: from the request to the response."""

    def with_client(handler: Callable[[httpx.Request], httpx.Response], *args: Any, keys: Any = None, **options: Any) -> Any:
        with Client("http://server/", transport=httpx.MockTransport(handler), **keys or {}) as asked:
            return asked.ask(*args, **options)

    def with_async_client(handler: Callable[..., Any], *args: Any, keys: Any = None, **options: Any) -> Any:
        async def main() -> Any:
            async with AsyncClient("http://server/", transport=httpx.MockTransport(handler), **keys or {}) as asked:
                return await asked.ask(*args, **options)

        return asyncio.run(main())

    return with_client if request.param == "sync" else with_async_client


def sent(ask: Ask, answer: dict[str, Any], *args: Any, **options: Any) -> tuple[httpx.Request, dict[str, Any]]:
    """The one request that was sent, and its body."""
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json=answer)

    assert ask(handler, *args, **options) == Answer("Newton", REPORT, answer)
    (request,) = requests
    return request, json.loads(request.content)


def never(request: httpx.Request) -> httpx.Response:
    raise AssertionError(f"{request.url} was asked")


def test_a_question_is_a_chat_whose_context_ends_with_the_marker(ask: Ask) -> None:
    request, body = sent(ask, CHAT, "The document.", "Who wrote it?")
    assert str(request.url) == "http://server/v1/chat/completions"
    assert "Authorization" not in request.headers
    assert body == {
        "model": "default",
        "messages": [{"role": "user", "content": "The document.<|obcache|>\n\nWho wrote it?"}],
        "max_tokens": 256,
        "stream": False,
    }


def test_each_text_of_a_context_ends_with_the_marker(ask: Ask) -> None:
    _, body = sent(ask, CHAT, ["Be brief.", "The document."], "Who wrote it?")
    assert body["messages"][0]["content"] == "Be brief.<|obcache|>The document.<|obcache|>\n\nWho wrote it?"


def test_all_that_a_chat_can_be_told(ask: Ask) -> None:
    extra = {"model": "base:adapter", "chat_template_kwargs": {"enable_thinking": False}}
    options = {"max_new_tokens": 8, "temperature": 0, "top_p": 0.9, "top_k": 5, "stop": ["\n"], "cache_salt": "mine"}
    settings = {"compression_ratio": 0.5, "method": "snapkv", "pin": True, "ttl_seconds": 60, "max_kept_tokens": None}
    keys = {"api_key": "secret", "marker": "<end>"}
    request, body = sent(ask, CHAT, "D", "Q", keys=keys, system="Be brief.", extra_body=extra, **options, **settings)
    assert request.headers["Authorization"] == "Bearer secret"
    del options["max_new_tokens"]
    assert body == {
        **extra,
        **options,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "D<end>\n\nQ"}],
        "max_tokens": 8,
        "custom_params": {"obcache": settings},
        "stream": False,
    }


def test_a_completion_is_the_texts_as_they_stand(ask: Ask) -> None:
    extra = {"extra_key": "e", "sampling_params": {"min_p": 0.1}}
    options = {"temperature": 0, "compression_ratio": 0.5, "cache_salt": "mine", "extra_body": extra}
    request, body = sent(ask, COMPLETION, "D", " Q", chat=False, **options)
    assert str(request.url) == "http://server/generate"
    custom_params = {"obcache": {"compression_ratio": 0.5}}
    assert body == {
        "text": "D<|obcache|> Q",
        "sampling_params": {"min_p": 0.1, "max_new_tokens": 256, "temperature": 0, "custom_params": custom_params},
        "cache_salt": "mine",
        "extra_key": "e",
        "stream": False,
    }
    assert extra == {"extra_key": "e", "sampling_params": {"min_p": 0.1}}


def test_a_list_is_asked_at_once_and_answered_in_order() -> None:
    """The first question is answered last."""
    barrier, last = threading.Barrier(3, timeout=30), threading.Event()

    def handler(request: httpx.Request) -> httpx.Response:
        said = json.loads(request.content)["messages"][0]["content"]
        barrier.wait()
        if said.endswith("0"):
            assert last.wait(30)
        elif said.endswith("2"):
            last.set()
        return httpx.Response(200, json=CHAT | {"choices": [{"message": {"content": said}}]})

    with Client(transport=httpx.MockTransport(handler)) as asked:
        answers = asked.ask("D", ["0", "1", "2"])
        assert [answer.text for answer in answers] == [f"D<|obcache|>\n\n{n}" for n in range(3)]


def test_a_list_is_asked_at_once_and_answered_in_order_by_the_async_client() -> None:
    async def main() -> list[Answer]:
        last = asyncio.Event()

        async def handler(request: httpx.Request) -> httpx.Response:
            said = json.loads(request.content)["messages"][0]["content"]
            if said.endswith("0"):
                await asyncio.wait_for(last.wait(), 30)
            elif said.endswith("2"):
                last.set()
            return httpx.Response(200, json=CHAT | {"choices": [{"message": {"content": said}}]})

        async with AsyncClient(transport=httpx.MockTransport(handler)) as asked:
            return await asked.ask("D", ("0", "1", "2"))

    assert [answer.text for answer in asyncio.run(main())] == [f"D<|obcache|>\n\n{n}" for n in range(3)]


def test_an_empty_list_has_no_answers(ask: Ask) -> None:
    assert ask(never, "D", []) == []


def test_the_first_error_ends_a_list(ask: Ask) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        bad = b"bad" in request.content
        return httpx.Response(400, json={"message": "no"}) if bad else httpx.Response(200, json=CHAT)

    with pytest.raises(ServerError, match="answered 400: no"):
        ask(handler, "D", ["good", "bad"])


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        (("", "Q"), {}, ValueError, "context='' is empty. Give"),
        ((" \n", "Q"), {}, ValueError, "context=.* is empty"),
        (("D", ""), {}, ValueError, "question='' is empty"),
        (("D", ["Q", " "]), {}, ValueError, r"question\[1\]=' ' is empty"),
        (("D<|obcache|>", "Q"), {}, ValueError, r"context contains the marker '<\|obcache\|>', at character 1.*Take it out"),
        (("D<|obcache:pin|>", "Q"), {}, ValueError, r"context contains the marker '<\|obcache:', at character 1"),
        ((["D", "E<|obcache|>"], "Q"), {}, ValueError, r"context\[1\] contains the marker"),
        (([], "Q"), {}, ValueError, r"context=\[\] is empty"),
        (("D", ["Q", "Q<|obcache|>"]), {}, ValueError, r"question\[1\] contains the marker"),
        (("D", "Q"), {"system": "<|obcache|>"}, ValueError, "system contains the marker"),
        (("D", "Q"), {"system": "S", "chat": False}, ValueError, "system='S' cannot be used with chat=False"),
        (("D", "Q"), {"extra_body": {"messages": [], "stream": True}}, ValueError, "extra_body has messages, stream, which"),
        (
            ("D", "Q"),
            {"chat": False, "extra_body": {"sampling_params": {"max_new_tokens": 1}}},
            ValueError,
            r'extra_body\["sampling_params"\] has max_new_tokens',
        ),
        ((b"D", "Q"), {}, TypeError, "context is a bytes. Give a string"),
        (("D", [1]), {}, TypeError, r"question\[0\] is a int"),
        (("D", "Q"), {"temprature": 0}, TypeError, "no option 'temprature'.*temperature"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_sent(
    ask: Ask, args: Any, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ask(never, *args, **options)


def test_with_a_marker_of_its_own_the_default_one_is_text(ask: Ask) -> None:
    _, body = sent(ask, CHAT, "D<|obcache|>", "Q", keys={"marker": "<end>"})
    assert body["messages"][0]["content"] == "D<|obcache|><end>\n\nQ"


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (httpx.Response(400, json={"object": "error", "message": "too long", "code": 400}), "too long"),
        (httpx.Response(400, json={"error": {"message": "too long"}}), "too long"),
        (httpx.Response(401, json={"error": "Unauthorized"}), "Unauthorized"),
        (httpx.Response(404, json={"detail": "Not Found"}), "Not Found"),
        (httpx.Response(502, text="<h1>Bad Gateway</h1>"), "<h1>Bad Gateway</h1>"),
        (httpx.Response(503, json=["busy"]), "['busy']"),
    ],
)
def test_the_servers_status_and_words_are_in_the_error(ask: Ask, response: httpx.Response, words: str) -> None:
    with pytest.raises(ServerError) as raised:
        ask(lambda _: httpx.Response(response.status_code, content=response.content), "D", "Q")
    assert (raised.value.status_code, raised.value.message) == (response.status_code, words)
    assert str(raised.value) == f"http://server/v1/chat/completions answered {response.status_code}: {words}"
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


@pytest.mark.parametrize("answer", [CHAT | {"metadata": None}, CHAT | {"metadata": {}}, {"text": "Newton", "meta_info": {}}])
def test_an_answer_without_a_report_is_an_error(ask: Ask, answer: dict[str, Any]) -> None:
    with pytest.raises(ServerError, match=r"answered 200: The answer has no report.*start it with --obcache"):
        ask(lambda _: httpx.Response(200, json=answer), "D", "Q")


@pytest.mark.parametrize("content", [b"hello", b"[]", b"{}", b'{"choices": []}', b'{"text": "t", "meta_info": [1]}'])
def test_what_is_no_answer_of_sglang_is_an_error(ask: Ask, content: bytes) -> None:
    with pytest.raises(ServerError, match="answered 200: This is no answer of SGLang"):
        ask(lambda _: httpx.Response(200, content=content), "D", "Q")


def test_reasoning_that_was_cut_off_is_an_empty_text(ask: Ask) -> None:
    answer = CHAT | {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    assert ask(lambda _: httpx.Response(200, json=answer), "D", "Q") == Answer("", REPORT, answer)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx.ConnectError("refused"), "ConnectError: refused. Is a server running there?"),
        (httpx.ReadTimeout("timed out"), "ReadTimeout: timed out. Give the client a longer timeout."),
    ],
)
def test_a_server_that_does_not_answer_is_named(ask: Ask, error: httpx.TransportError, words: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(ServerError) as raised:
        ask(handler, "D", "Q")
    assert raised.value.status_code is None
    assert str(raised.value) == f"http://server/v1/chat/completions did not answer: {words}"


def test_what_is_written_out_again_is_the_servers() -> None:
    assert (client.MARKER, client.KEY) == (lang.MARKER, messages.KEY)
    # These say where the context ends, which the client does.
    assert CompressionParams.__optional_keys__ == set(REQUEST_KEYS) - {
        "context_len", "context_id", "boundaries", "mode", "keep_last_turns",
    }  # fmt: skip
    assert not AskOptions.__required_keys__


def test_httpx_is_all_that_it_needs() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('sglang', 'torch', 'transformers', 'starlette', 'requests', 'numpy'))); "
        "import obcache_sglang.client; "
        "print(*sorted(name for name in sys.modules if name.startswith('obcache_sglang')))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["obcache_sglang", "obcache_sglang.client"]
