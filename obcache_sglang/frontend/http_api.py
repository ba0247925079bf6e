"""The routes under `/obcache` of SGLang's HTTP server.

They are ordinary routes of its app, so they ask for its API keys like its own endpoints do. Who may see what:
- A context id opens its context: whoever has it may look at the context and delete it, in the namespace it was made in.
- A name, as lists show it, is for operators. Routes that list or take names ask for the admin key if one is set, as `/flush_cache`
  does, and then show all namespaces. Without an admin key they show only the caller's own namespace.
The namespace is given in the headers `X-Cache-Salt`, `X-Extra-Key` and `X-Lora-Path`, since URLs end up in access logs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import nullcontext
from typing import Any

import orjson
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from sglang.srt.utils.auth import AuthLevel, auth_level

from obcache_sglang.errors import InvalidValue, ObcacheError, RequestError, shown
from obcache_sglang.frontend import calibrate_api, files, service
from obcache_sglang.frontend.checks import check_keys
from obcache_sglang.frontend.exchange import ExchangeMiddleware
from obcache_sglang.frontend.hooks import Frontend
from obcache_sglang.host import Touch
from obcache_sglang.settings import check_number

SALT_HEADER = "X-Cache-Salt"
EXTRA_KEY_HEADER = "X-Extra-Key"
LORA_HEADER = "X-Lora-Path"

POSITIONS_AT_ONCE = 2
"""Answers with positions that are made at the same time, each of up to a number for each token, head and layer; others wait."""

_ID_IN_PATH = re.compile(r"(/obcache/contexts/[0-9a-f]{8})[0-9a-f]{24}")


class _Route(APIRoute):
    """A route whose errors look like those of SGLang's own endpoints."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except ObcacheError as error:
                return _error(error, getattr(error, "status_code", 500))
            except ValueError as error:  # what SGLang raises for a wrong request
                return _error(error, 400)

        return handle_errors


def _error(error: Exception, status_code: int) -> JSONResponse:
    return JSONResponse({"error": {"message": str(error)}}, status_code=status_code)


def make_router(tokenizer_manager: Any, *, has_admin_key: bool) -> APIRouter:
    """The routes, for the TokenizerManager of this server. has_admin_key: whether operators identify themselves with a key."""
    router = APIRouter(prefix="/obcache", route_class=_Route)

    def operator(request: Request) -> service.Caller:
        return service.Caller(is_operator=True) if has_admin_key else _caller(request)

    @router.post("/compress")
    async def compress(request: Request) -> Any:
        """With `"stream": true` sends server-sent events: {"progress": ...} while it compresses, then the answer, then [DONE]."""
        body = _in_namespace(await _json_object(request), request)
        stream = body.pop("stream", False)
        if not isinstance(stream, bool):
            raise RequestError(f"stream={shown(stream)} is not true or false.")
        given = (tokenizer_manager, lambda: request.app.state.openai_serving_chat, body, request)
        if not stream:
            return await service.compress_context(*given)
        answers = service.compress_progress(*given)
        # Before the first answer, an error still has its own status code.
        first = await anext(answers, None)
        if first is None:  # the client hung up before the first answer
            return Response(status_code=499)
        return StreamingResponse(_events(first, answers), media_type="text/event-stream")

    @router.get("/contexts")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def list_contexts(request: Request) -> dict[str, Any]:
        return {"contexts": await service.list_contexts(tokenizer_manager, operator(request))}

    @router.post("/contexts/{name}/save")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def save_context(name: str, request: Request) -> dict[str, Any]:
        return await files.save_context(tokenizer_manager, name, operator(request))

    @router.post("/contexts/load")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def load_context(request: Request) -> dict[str, Any]:
        keys = ("file", *_NAMESPACE_HEADERS)
        body = _in_namespace(await _json_object(request, keys), request)
        check_keys(body, keys)
        return await files.load_context(tokenizer_manager, body.get("file"), _named_caller(body))

    @router.get("/files")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def list_files(request: Request) -> dict[str, Any]:
        return {"files": await files.list_files(tokenizer_manager, operator(request))}

    @router.delete("/files/{file}")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def delete_file(file: str, request: Request) -> dict[str, Any]:
        await files.delete_file(tokenizer_manager, file, operator(request))
        return {"file": file, "state": "deleted"}

    @router.get("/contexts/by-name/{name}")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def get_named(name: str, request: Request, positions: bool = False) -> Response:
        return await _shown(name=name, positions=positions, caller=operator(request))

    @router.delete("/contexts/by-name/{name}")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def delete_named(name: str, request: Request, wait_seconds: float = service.DELETE_WAIT_SECONDS) -> Response:
        return await _deleted({"name": name}, operator(request), wait_seconds)

    @router.get("/contexts/{context_id}")
    async def get_context(context_id: str, request: Request, positions: bool = False) -> Response:
        return await _shown(context_id=context_id, positions=positions, caller=_caller(request))

    @router.delete("/contexts/{context_id}")
    async def delete_context(context_id: str, request: Request, wait_seconds: float = service.DELETE_WAIT_SECONDS) -> Response:
        return await _deleted({"context_id": context_id}, _caller(request), wait_seconds)

    @router.post("/calibrate")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def begin_calibration(request: Request) -> dict[str, Any]:
        return await calibrate_api.begin(tokenizer_manager, await _json_object(request, calibrate_api.BODY_KEYS))

    @router.get("/calibrate")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def calibration() -> dict[str, Any]:
        return await calibrate_api.state(tokenizer_manager)

    @router.delete("/calibrate")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def cancel_calibration() -> dict[str, Any]:
        return await calibrate_api.cancel(tokenizer_manager)

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return await service.status(tokenizer_manager)

    in_turn = asyncio.Semaphore(POSITIONS_AT_ONCE)

    async def _shown(*, positions: bool, **asked: Any) -> Response:
        async with in_turn if positions else nullcontext():
            context = await service.get_context(tokenizer_manager, positions=positions, **asked)
            # Millions of positions take long to write; other clients need not wait for them.
            return Response(await asyncio.to_thread(orjson.dumps, context), media_type="application/json")

    async def _deleted(asked: dict[str, str], caller: service.Caller, wait_seconds: float) -> Response:
        """200 once the context is gone, 202 if it still has readers after `wait_seconds`."""
        try:
            wait_seconds = check_number("wait_seconds", wait_seconds, "how long to wait for the context's readers")
        except InvalidValue as error:
            raise RequestError(str(error)) from error
        state = await service.delete_context(tokenizer_manager, **asked, caller=caller, wait_seconds=wait_seconds)
        return JSONResponse({**asked, "state": state}, status_code=202 if state == "deleting" else 200)

    return router


async def _events(first: dict[str, Any], others: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield f"data: {json.dumps(first)}\n\n"
    try:
        async for answer in others:
            yield f"data: {json.dumps(answer)}\n\n"
    except (ObcacheError, ValueError, HTTPException) as error:  # too late for a status code
        message = error.detail if isinstance(error, HTTPException) else str(error)
        yield f"data: {json.dumps({'error': {'message': message}})}\n\n"
    yield "data: [DONE]\n\n"


async def _json_object(request: Request, allowed: tuple[str, ...] = service.COMPRESS_KEYS) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise RequestError(f"The body is not a JSON object. Allowed keys: {', '.join(allowed)}.")
    return body


_NAMESPACE_HEADERS = {"extra_key": EXTRA_KEY_HEADER, "cache_salt": SALT_HEADER, "lora_path": LORA_HEADER}


def _caller(request: Request) -> service.Caller:
    extra_key, cache_salt, lora_path = (request.headers.get(header) or None for header in _NAMESPACE_HEADERS.values())
    return service.Caller(extra_key, cache_salt, lora_path)


def _named_caller(body: dict[str, Any]) -> service.Caller:
    """Of a body that names the namespace. Raises RequestError."""
    for name in _NAMESPACE_HEADERS:
        if not isinstance(body.get(name), str | None):
            raise RequestError(f"{name}={shown(body[name])} is not a string.")
    return service.Caller(body.get("extra_key") or None, body.get("cache_salt") or None, body.get("lora_path") or None)


def _in_namespace(body: dict[str, Any], request: Request) -> dict[str, Any]:
    """A body with the namespace that its headers give. Raises RequestError where it names another one."""
    for name, header in _NAMESPACE_HEADERS.items():
        given = request.headers.get(header)
        if given and body.get(name) not in (None, "", given):
            raise RequestError(f"The header {header} and {name} in the body differ: give one of them.")
        if given:
            body[name] = given
    return body


class _IdsShortened(logging.Filter):
    """Shortens context ids in the access log: whoever has a whole id can read the document."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_ID_IN_PATH.sub(r"\1...", arg) if isinstance(arg, str) else arg for arg in record.args)
        return True


def _add_routes(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    """Before _setup_and_run_http_server: adds our routes and middleware before the API key middleware wraps the app."""
    from sglang.srt.entrypoints.http_server import app

    frontend = Frontend.of(tokenizer_manager)
    if frontend is not None:
        app.add_middleware(
            ExchangeMiddleware,
            marker=None if frontend.marker is None else frontend.marker.text,
            several=lambda: frontend.settings.compression.uses_gates,
        )
        # Not as a separate router: SGLang's middleware reads who may call a route from the app's own routes.
        app.router.routes.extend(make_router(tokenizer_manager, has_admin_key=bool(server_args.admin_api_key)).routes)
        logging.getLogger("uvicorn.access").addFilter(_IdsShortened())


TOUCHES = (
    Touch(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "before",
        "adds the routes under /obcache",
        ("server_args", "tokenizer_manager"),
        "launcher",
        _add_routes,
    ),
    Touch(
        "sglang.srt.utils.auth.auth_level", "call", "who may list contexts and look at those of others", ("level",), "launcher"
    ),
    Touch("sglang.srt.utils.auth.AuthLevel.ADMIN_OPTIONAL", "read", "as /flush_cache", (), "launcher"),
    Touch("sglang.srt.server_args.ServerArgs", "read", "admin_api_key", (), "launcher"),
    Touch("sglang.srt.entrypoints.http_server.app", "read", "the FastAPI app that gets our routes", (), "launcher"),
    Touch(
        "sglang.srt.entrypoints.http_server.lifespan",
        "read",
        "app.state.openai_serving_chat: renders messages of POST /obcache/compress",
        (),
        "launcher",
    ),
)
