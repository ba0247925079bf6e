"""What `/obcache/*` and `Engine` offer besides generation: compress ahead, list, look at and delete contexts, status.

Everything here talks to the schedulers through one TokenizerManager; HTTP and Engine only wrap it.
With data parallelism each rank has its own contexts: every operation goes to all ranks, and answers name their rank.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from obcache_sglang import __version__
from obcache_sglang.errors import ContextNotFound, ObcacheError, RequestError, shown
from obcache_sglang.frontend import control
from obcache_sglang.frontend.checks import check_keys, check_unicode
from obcache_sglang.frontend.exchange import NAMESPACE_FIELDS
from obcache_sglang.frontend.hooks import ACTION, Frontend
from obcache_sglang.frontend.marker_options import contains
from obcache_sglang.frontend.wish import REQUEST_KEYS, TURNS_KEY
from obcache_sglang.host import Touch, TouchState, check_host, installed_sglang
from obcache_sglang.messages import KEY

DELETE_WAIT_SECONDS = 30.0
"""How long `delete_context` waits for a context's readers unless told otherwise."""

_PROGRESS_SECONDS = 0.5
"""How often `compress_progress` looks."""

_PROMPT_KEYS = ("text", "messages", "input_ids")
_CHAT_KEYS = ("model", "tools", "chat_template_kwargs")
_OPTION_KEYS = tuple(key for key in REQUEST_KEYS if key not in ("context_len", "context_id", "mode", TURNS_KEY))
COMPRESS_KEYS = _PROMPT_KEYS + _CHAT_KEYS + NAMESPACE_FIELDS + _OPTION_KEYS
"""Keys of the body of `POST /obcache/compress`."""

ServingChat = Callable[[], Any]
"""Gives SGLang's OpenAIServingChat, which renders `messages` as its chat endpoint does; called only for messages."""


async def compress_context(
    tokenizer_manager: Any, serving_chat: ServingChat, body: Mapping[str, Any], http_request: Any = None
) -> dict[str, Any]:
    """Compresses one context ahead of its questions, on every data-parallel rank.

    body: one of `text`, `messages`, `input_ids`, and any others of `COMPRESS_KEYS`. The context ends at the marker; without a marker,
        at the end of the prompt or of the last message.
    http_request: the client's; the compression stops when the client hangs up.
    Returns rank 0's report (`context_tokens`, `kept_tokens`, `status`, `reason`, `seconds`, ...) with the context's `id`; with several
    ranks also all reports, under `ranks`. Raises RequestError.
    """
    rid = uuid.uuid4().hex  # clients can abort by the beginning of an id, so nobody may guess it
    return await _compress(tokenizer_manager, _compress_request(tokenizer_manager, serving_chat, body), rid, http_request)


async def compress_progress(
    tokenizer_manager: Any, serving_chat: ServingChat, body: Mapping[str, Any], http_request: Any = None
) -> AsyncIterator[dict[str, Any]]:
    """As `compress_context`, but yields {"progress": {"tokens": read so far, "of": in all}} meanwhile, and the result last."""
    request = _compress_request(tokenizer_manager, serving_chat, body)
    rid = uuid.uuid4().hex
    task = asyncio.ensure_future(_compress(tokenizer_manager, request, rid, http_request))
    reached: dict[int, dict[str, int]] = {}
    shown = None
    try:
        while not (await asyncio.wait({task}, timeout=_PROGRESS_SECONDS))[0]:
            # A stream is not told that its client hung up, and SGLang itself looks only every few seconds.
            if http_request is not None and await http_request.is_disconnected():
                return
            answers = await control.call(tokenizer_manager, {"op": "progress", "rid": rid})
            for rank, answer in answers:
                now = checked(answer)
                # A rank stops counting when its job ends, shortly before its answer arrives: what it had reached stays.
                if rank not in reached or now["of"] > 0:
                    reached[rank] = now
            counted = _summed(list(reached.values()))
            if counted != shown and not task.done():
                yield {"progress": counted}
            shown = counted
        yield task.result()
    finally:
        if not task.done():  # the client has hung up
            task.cancel()
            for rank in range(_num_ranks()):
                tokenizer_manager.abort_request(rid=f"{rid}-{rank}")


async def _compress(tokenizer_manager: Any, request: Any, rid: str, http_request: Any) -> dict[str, Any]:
    """rid: what the request ids of all ranks begin with."""
    num_ranks = _num_ranks()

    async def on_rank(rank: int) -> dict[str, Any]:
        mine = copy.copy(request)
        mine.rid = f"{rid}-{rank}"
        mine.routed_dp_rank = rank if num_ranks > 1 else None
        answer = await anext(tokenizer_manager.generate_request(mine, http_request))
        if KEY not in answer["meta_info"]:  # somebody aborted all requests
            raise RequestError("The compression was aborted before it finished. Send the request again.", 409)
        report = dict(answer["meta_info"][KEY])
        return {"id": report.pop("context_id"), **report}

    reports = await asyncio.gather(*(on_rank(rank) for rank in range(num_ranks)))
    return reports[0] if num_ranks == 1 else {**reports[0], "ranks": list(reports)}


@dataclass(frozen=True)
class Caller:
    """Whose contexts are meant: those of one namespace, as a client sees them, or all contexts, for an operator.

    extra_key, cache_salt, lora_path: as in the requests that made the contexts.
    """

    extra_key: str | None = None
    cache_salt: str | None = None
    lora_path: str | None = None
    is_operator: bool = False

    def namespace(self, tokenizer_manager: Any) -> dict[str, str | None] | None:
        """The namespace for control calls; None for all. Raises RequestError for an adapter that is not loaded."""
        if self.is_operator:
            return None
        lora_id = None
        if self.lora_path is not None:
            registry = getattr(tokenizer_manager, "lora_registry", None)
            adapter = None if registry is None else registry.get_all_adapters().get(self.lora_path)
            if adapter is None:
                raise RequestError(f"lora_path={shown(self.lora_path)} is not a loaded adapter: load it first, or leave it out.")
            lora_id = adapter.lora_id
        return {"extra_key": self.extra_key, "cache_salt": self.cache_salt, "lora_id": lora_id}


ANYBODY = Caller()
"""A client without a namespace of its own."""


async def list_contexts(tokenizer_manager: Any, caller: Caller = ANYBODY) -> list[dict[str, Any]]:
    """The contexts that the caller sees, each with its `dp_rank` and its `name`. A name is not the id that opens a context."""
    answers = await control.call(tokenizer_manager, {"op": "list", "namespace": caller.namespace(tokenizer_manager)})
    return [context | {"dp_rank": rank} for rank, answer in answers for context in checked(answer)["contexts"]]


async def get_context(
    tokenizer_manager: Any,
    context_id: str | None = None,
    *,
    name: str | None = None,
    positions: bool = False,
    caller: Caller = ANYBODY,
) -> dict[str, Any]:
    """One context, from the first rank that has it; `dp_ranks` names all ranks that do. Raises ContextNotFound.

    context_id, name: one of them; the name is what lists show.
    positions: also return the kept token positions, `[layer][kv_head][kept]`, ascending. Each layer is fetched by its own call, so
        that the scheduler is not blocked for long.
    """
    asked = _asked(tokenizer_manager, context_id, name, caller)
    found = _found(await control.call(tokenizer_manager, {"op": "get", **asked}), asked)
    rank, answer = found[0]
    context: dict[str, Any] = answer["context"] | {"dp_ranks": [rank for rank, _ in found]}
    counts = context["kept_per_head"]
    if positions and counts is not None:
        packed = []
        for layer in range(len(counts)):
            answers = dict(_found(await control.call(tokenizer_manager, {"op": "positions", "layer": layer, **asked}), asked))
            if rank not in answers or answers[rank]["positions"] is None:
                raise ContextNotFound("The context was evicted while its positions were being read. Compress it again.")
            packed.append(answers[rank]["positions"])
        context["positions"] = await asyncio.to_thread(_unpacked, packed, counts)
    return context


def _unpacked(layers: list[bytes], counts: list[list[int]]) -> list[list[list[int]]]:
    """`[layer][kv_head][kept]`, from the int32 positions of each layer, head by head, and the counts of each layer's heads."""
    return [
        [head.tolist() for head in np.split(np.frombuffer(layer, dtype=np.int32), np.cumsum(of_layer)[:-1])]
        for layer, of_layer in zip(layers, counts, strict=True)
    ]


async def delete_context(
    tokenizer_manager: Any,
    context_id: str | None = None,
    *,
    name: str | None = None,
    caller: Caller = ANYBODY,
    wait_seconds: float = DELETE_WAIT_SECONDS,
) -> str:
    """Deletes a context on every rank. Requests that read it finish first; no new request gets it.

    Returns "deleted", or "deleting" if it still has readers after `wait_seconds`. Raises ContextNotFound.
    """
    asked = _asked(tokenizer_manager, context_id, name, caller)
    found = _found(await control.call(tokenizer_manager, {"op": "delete", **asked}), asked)
    deadline, pause = time.monotonic() + wait_seconds, 0.05
    gone = all(answer["gone"] for _, answer in found)
    while not gone and time.monotonic() < deadline:
        await asyncio.sleep(pause)
        pause = min(2 * pause, 1.0)
        answers = await control.call(tokenizer_manager, {"op": "gone", "name": found[0][1]["name"]})
        gone = all(checked(answer)["gone"] for _, answer in answers)
    return "deleted" if gone else "deleting"


def _asked(tokenizer_manager: Any, context_id: str | None, name: str | None, caller: Caller) -> dict[str, Any]:
    if (context_id is None) == (name is None):
        raise RequestError("Give either the context_id or the name of the context.")
    return {"context_id": context_id, "name": name, "namespace": caller.namespace(tokenizer_manager)}


async def status(tokenizer_manager: Any) -> dict[str, Any]:
    """Whether compression is active, with every hook of every process, the settings and the counters.

    `counters` are summed over ranks; `ranks` holds each rank's own.
    """
    frontend = Frontend.of(tokenizer_manager)
    if frontend is None:
        raise RequestError("This engine was started without compression: start it with obcache=True.")
    ranks = [{"dp_rank": rank} | checked(answer) for rank, answer in await control.call(tokenizer_manager, {"op": "status"})]
    states = [state for state in check_host() if state.touch.is_hook]
    hooks = [
        {"target": touch.target, "kind": touch.kind, "process": touch.process, "in_place": in_place, "why": touch.why}
        for touch, in_place in ((state.touch, _in_place(state, ranks)) for state in states)
        if in_place is not None
    ]
    return {
        "active": all(hook["in_place"] for hook in hooks),
        "version": __version__,
        "sglang_version": installed_sglang(),
        "settings": frontend.settings.to_dict(),
        "marker_token_id": frontend.marker_id,
        "hooks": hooks,
        "counters": _summed([rank["counters"] for rank in ranks]),
        "ranks": ranks,
    }


# --- internals ---------------------------------------------------------------------------------------------------------


def _num_ranks() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().num_dp_ranks)


def checked(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer without its envelope. Raises the error it carries."""
    if not answer.get("ok"):
        message = str(answer.get("error") or "The scheduler does not know this operation, since it runs without compression.")
        status_code = answer.get("status_code", 500)
        raise RequestError(message, status_code) if 400 <= status_code < 500 else ObcacheError(message)
    return {key: value for key, value in answer.items() if key not in ("ok", "status_code", "error", "dp_rank")}


def _found(answers: list[tuple[int, dict[str, Any]]], asked: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    found = [(rank, checked(answer)) for rank, answer in answers if answer.get("status_code") != 404]
    if not found:
        what = shown(asked["context_id"] or asked["name"])
        raise ContextNotFound(f"There is no context {what} in this namespace (cache salt, extra key, LoRA adapter).")
    return found


def _in_place(state: TouchState, ranks: list[dict[str, Any]]) -> bool | None:
    """Whether a hook is called in its process; None if the server has no such process."""
    there = all(rank["hooks"].get(state.touch.target) for rank in ranks)
    match state.touch.process:
        case "scheduler":
            return there
        case "controller":
            # The controller answers no calls; but without this hook the launcher would have refused to serve.
            return True if len(ranks) > 1 else None
        case "all":
            return there and bool(state.in_place)
        case _:
            return bool(state.in_place)


def _summed(counters: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds counters of the same name, also within nested dictionaries."""
    total: dict[str, Any] = {}
    for rank in counters:
        for name, value in rank.items():
            if isinstance(value, dict):
                total[name] = _summed([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def _compress_request(tokenizer_manager: Any, serving_chat: ServingChat, body: Mapping[str, Any]) -> Any:
    """The GenerateReqInput that compresses what `body` holds. Raises RequestError."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    check_keys(body, COMPRESS_KEYS, " in the body of compress")
    prompts = [key for key in _PROMPT_KEYS if body.get(key) is not None]
    if len(prompts) != 1:
        raise RequestError(f"compress needs exactly one of {', '.join(_PROMPT_KEYS)}; given: {', '.join(prompts) or 'none'}.")
    prompt = body[prompts[0]]
    if prompts != ["input_ids"]:
        check_unicode(prompts[0], prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))
    if prompts == ["messages"]:
        request = _render(tokenizer_manager, serving_chat(), body)
    elif prompts == ["text"] and isinstance(prompt, str) and prompt:
        request = GenerateReqInput(text=prompt)
    elif prompts == ["input_ids"] and isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
        request = GenerateReqInput(input_ids=prompt)
    else:
        allowed = {"text": "a non-empty string", "input_ids": "a non-empty list of token ids"}[prompts[0]]
        raise RequestError(f"{prompts[0]} is not {allowed}: compress takes one context.")
    for name in NAMESPACE_FIELDS:
        value = body.get(name)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name}={shown(value)} is not a string: compress takes one context.")
        if value is not None:
            setattr(request, name, value)
    options = {key: body[key] for key in _OPTION_KEYS if key in body}
    request.sampling_params = {"max_new_tokens": 0, "temperature": 0.0, "custom_params": {KEY: options}}
    setattr(request, ACTION, "compress")
    return request


def _render(tokenizer_manager: Any, serving_chat: Any, body: Mapping[str, Any]) -> Any:
    """Renders messages with the code of SGLang's chat endpoint, so that a later chat has the same tokens."""
    from pydantic import ValidationError
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    frontend = Frontend.of(tokenizer_manager)
    if frontend is None or frontend.marker_id is None:
        raise RequestError("messages need a tokenizer, but this server was started with --skip-tokenizer-init. Send input_ids.")
    chat = {key: body[key] for key in _CHAT_KEYS if body.get(key) is not None}
    messages = _with_marker(body["messages"], frontend.settings.marker)
    try:
        parsed = ChatCompletionRequest(**{"model": "default", **chat, "messages": messages})
    except ValidationError as error:
        raise RequestError(f"messages are not valid chat messages: {error}") from error
    # What SGLang's chat endpoint refuses, a chat template of the client's own above all: it would run in this process.
    refusal = serving_chat._validate_request(parsed)
    if refusal:
        raise RequestError(f"messages are not allowed: {refusal}")
    try:
        request, _ = serving_chat._convert_to_internal_request(parsed)
    except Exception as error:  # templates run on the client's input, and may raise anything
        raise RequestError(f"messages cannot be rendered with the chat template: {type(error).__name__}: {error}") from error
    return request


def _with_marker(messages: Any, marker: str) -> Any:
    """`messages` with the marker where the context ends: where the client put it, else at the end of the last message."""
    try:
        if contains(json.dumps(messages, ensure_ascii=False), marker):
            return messages
        messages = copy.deepcopy(messages)
        last = messages[-1]
        if isinstance(last["content"], str):
            last["content"] += marker
        else:
            last["content"][-1]["text"] += marker
    except RecursionError as error:
        raise RequestError("messages are nested too deeply.") from error
    except (LookupError, TypeError) as error:
        raise RequestError("messages do not end with text: put the marker where the context ends.") from error
    return messages


TOUCHES = (
    Touch(
        "sglang.srt.lora.lora_registry.LoRARegistry.get_all_adapters",
        "call",
        "the namespace of an adapter, by its name",
        (),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "call",
        "serves compressions",
        ("obj", "request"),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request",
        "call",
        "ends a compression whose client stopped reading its progress",
        ("rid",),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.managers.io_struct.GenerateReqInput",
        "call",
        "a compression is a request of no new tokens",
        ("text", "input_ids", "sampling_params", "routed_dp_rank", "cache_salt", "extra_key", "lora_path"),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.runtime_context.get_parallel",
        "call",
        "num_dp_ranks: a context is compressed on every rank",
        (),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.entrypoints.openai.protocol.ChatCompletionRequest",
        "call",
        "messages of POST /obcache/compress",
        ("messages", "model", "tools", "chat_template_kwargs"),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
        "call",
        "renders messages exactly as the chat endpoint does",
        ("request",),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._validate_request",
        "call",
        "refuses what the chat endpoint refuses, templates of the client's own above all",
        ("request",),
        "tokenizer",
    ),
)
