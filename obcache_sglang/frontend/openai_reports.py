"""The per-request report in OpenAI responses: `metadata["obcache"]`.

Completion and chat responses have a free-form `metadata` field. The report goes there, always as one object: if a request has several
choices, it is the first report, with all reports under `choices`, by the choice's index. In a stream it is in the chunk that carries
the `finish_reason` of its choice. No chunk is added, since clients read `choices[0]` of every chunk.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from obcache_sglang.frontend.hooks import Frontend
from obcache_sglang.frontend.marker_options import removed
from obcache_sglang.host import Touch
from obcache_sglang.messages import KEY

_REPORTS = "obcache_reports"  # attribute of a GenerateReqInput whose stream's reports are wanted: {choice index: report}

_DATA = "data: "
# Inside generated text these quotes would be escaped.
_FINISHED = '"finish_reason":"'


def _add_to_response(response: Any, serving: Any, request: Any, ret: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
    """After _build_completion_response and _build_chat_response. ret: the engine's answers, one per choice."""
    reports = {str(index): report for index, answer in enumerate(ret) if (report := answer["meta_info"].get(KEY))}
    if reports and hasattr(response, "metadata"):
        report = next(iter(reports.values()))
        response.metadata = {**(response.metadata or {}), KEY: report if len(ret) == 1 else report | {"choices": reports}}


def _without_marker(echoed: str | list[str], serving: Any, *args: Any, **kwargs: Any) -> str | list[str]:
    """After _get_echo_text and _prepare_echo_prompts: echoes the prompt as the model read it."""
    frontend = Frontend.of(serving.tokenizer_manager)
    if frontend is None or frontend.marker is None:
        return echoed
    text = frontend.marker.text
    return removed(echoed, text) if isinstance(echoed, str) else [removed(each, text) for each in echoed]


def _add_to_stream(original: Callable[..., Any], serving: Any, adapted_request: Any, *args: Any, **kwargs: Any) -> Any:
    """Around _generate_completion_stream and _generate_chat_stream."""
    reports: dict[int, dict[str, Any]] = {}
    setattr(adapted_request, _REPORTS, reports)
    return _reporting(original(serving, adapted_request, *args, **kwargs), reports)


async def _reporting(stream: Any, reports: dict[int, dict[str, Any]]) -> AsyncIterator[str]:
    async with aclosing(stream):
        async for chunk in stream:
            yield with_report(chunk, reports) if reports and _FINISHED in chunk else chunk


def with_report(chunk: str, reports: dict[int, dict[str, Any]]) -> str:
    """A server-sent event, with the choice's report in its metadata if it finishes a choice; any other event unchanged.

    chunk: "data: {...}" and blank lines. reports: by choice index.
    """
    if not chunk.startswith(_DATA):
        return chunk
    event = json.loads(chunk[len(_DATA) :])
    choices = event.get("choices")
    report = reports.get(choices[0]["index"]) if choices else None
    if report is None:
        return chunk
    event["metadata"] = {**(event.get("metadata") or {}), KEY: report}
    return f"{_DATA}{json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _collect(original: Callable[..., Any], tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Around TokenizerManager.generate_request: keeps the reports of a stream for its last chunks, which SGLang builds without them."""
    stream = original(tokenizer_manager, obj, *args, **kwargs)
    reports = getattr(obj, _REPORTS, None)
    return stream if reports is None else _collecting(stream, reports)


async def _collecting(stream: Any, reports: dict[int, dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(stream):
        async for output in stream:
            report = output["meta_info"].get(KEY)
            if report is not None:
                reports[output.get("index", 0)] = report
            yield output


_COMPLETIONS = "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion"
_CHAT = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"

TOUCHES = (
    *(
        Touch(f"{_COMPLETIONS}.{name}", "after", "an echoed prompt has no marker", ("request",), "tokenizer", _without_marker)
        for name in ("_get_echo_text", "_prepare_echo_prompts")
    ),
    Touch(
        f"{_COMPLETIONS}._build_completion_response",
        "after",
        "puts the report into metadata",
        ("request", "ret"),
        "tokenizer",
        _add_to_response,
    ),
    Touch(
        f"{_CHAT}._build_chat_response",
        "after",
        "puts the report into metadata",
        ("request", "ret"),
        "tokenizer",
        _add_to_response,
    ),
    Touch(
        f"{_COMPLETIONS}._generate_completion_stream",
        "around",
        "puts the report into the chunk with the finish_reason",
        ("adapted_request",),
        "tokenizer",
        _add_to_stream,
    ),
    Touch(
        f"{_CHAT}._generate_chat_stream",
        "around",
        "puts the report into the chunk with the finish_reason",
        ("adapted_request",),
        "tokenizer",
        _add_to_stream,
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        "keeps a stream's report until its last chunk; passes every other request on",
        ("obj",),
        "tokenizer",
        _collect,
    ),
    Touch(
        "sglang.srt.entrypoints.openai.protocol.CompletionResponse",
        "read",
        "metadata, a free-form dictionary",
        ("metadata",),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.entrypoints.openai.protocol.ChatCompletionResponse",
        "read",
        "metadata, a free-form dictionary",
        ("metadata",),
        "tokenizer",
    ),
)
