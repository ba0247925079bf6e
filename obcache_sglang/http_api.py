"""The routes under `/obcache` of SGLang's HTTP server.

They are ordinary routes of its app, so they ask for its API key like its own endpoints do. A context made under a
`cache_salt` is seen only with it: contexts are listed, read and deleted under the salt in the header `X-Cache-Salt` (a header,
since URLs end up in access logs), or else those without one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute

from obcache_sglang import service
from obcache_sglang.errors import ObcacheError, RequestError
from obcache_sglang.frontend import Frontend
from obcache_sglang.host import Touch

SALT_HEADER = "X-Cache-Salt"


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


def make_router(tokenizer_manager: Any) -> APIRouter:
    """The routes, for the TokenizerManager of this server."""
    router = APIRouter(prefix="/obcache", route_class=_Route)

    @router.post("/compress")
    async def compress(request: Request) -> Any:
        """With `"stream": true` server-sent events: {"progress": ...} as it goes on, then the answer, then [DONE]."""
        body = await _json_object(request)
        stream = body.pop("stream", False)
        if not isinstance(stream, bool):
            raise RequestError(f"stream={stream!r} is not true or false.")
        given = (tokenizer_manager, lambda: request.app.state.openai_serving_chat, body, request)
        if not stream:
            return await service.compress_context(*given)
        answers = service.compress_progress(*given)
        # Until the first answer errors are still a status of their own.
        return StreamingResponse(_events(await anext(answers), answers), media_type="text/event-stream")

    @router.get("/contexts")
    async def list_contexts(request: Request) -> dict[str, Any]:
        return {"contexts": await service.list_contexts(tokenizer_manager, cache_salt=_salt(request))}

    @router.get("/contexts/{context_id}")
    async def get_context(context_id: str, request: Request, positions: bool = False) -> dict[str, Any]:
        return await service.get_context(tokenizer_manager, context_id, positions=positions, cache_salt=_salt(request))

    @router.delete("/contexts/{context_id}")
    async def delete_context(
        context_id: str, request: Request, response: Response, wait_seconds: float = service.DELETE_WAIT_SECONDS
    ) -> dict[str, Any]:
        """200 once it is gone, 202 if it still has readers after `wait_seconds`."""
        if not 0 <= wait_seconds <= 600:
            raise RequestError(f"wait_seconds={wait_seconds} is outside [0, 600].")
        state = await service.delete_context(tokenizer_manager, context_id, cache_salt=_salt(request), wait_seconds=wait_seconds)
        if state == "deleting":
            response.status_code = 202
        return {"id": context_id, "state": state}

    @router.get("/status")
    async def status() -> dict[str, Any]:
        return await service.status(tokenizer_manager)

    return router


async def _events(first: dict[str, Any], others: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield f"data: {json.dumps(first)}\n\n"
    try:
        async for answer in others:
            yield f"data: {json.dumps(answer)}\n\n"
    except (ObcacheError, ValueError) as error:  # too late for a status
        yield f"data: {json.dumps({'error': {'message': str(error)}})}\n\n"
    yield "data: [DONE]\n\n"


async def _json_object(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise RequestError(f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise RequestError(f"The body is not a JSON object: its keys are {', '.join(service.COMPRESS_KEYS)}.")
    return body


def _salt(request: Request) -> str | None:
    return request.headers.get(SALT_HEADER) or None


def _add_routes(server_args: Any, tokenizer_manager: Any, *args: Any, **kwargs: Any) -> None:
    """Before _setup_and_run_http_server: our routes are there before the API key middleware wraps the app."""
    from sglang.srt.entrypoints.http_server import app

    if Frontend.of(tokenizer_manager) is not None:
        app.include_router(make_router(tokenizer_manager))


TOUCHES = (
    Touch(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "before",
        "adds the routes under /obcache",
        ("server_args", "tokenizer_manager"),
        "launcher",
        _add_routes,
    ),
    Touch("sglang.srt.entrypoints.http_server.app", "read", "the FastAPI app that gets our routes", (), "launcher"),
    Touch(
        "sglang.srt.entrypoints.http_server.lifespan",
        "read",
        "app.state.openai_serving_chat: renders messages of POST /obcache/compress",
        (),
        "launcher",
    ),
)
