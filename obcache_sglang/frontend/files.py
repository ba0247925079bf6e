"""What `/obcache` and `python -m obcache_sglang.contexts` offer for contexts that last in files: save, load, list, delete.

The schedulers save and load, each rank its own file. Lists are read from the folder itself.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

from obcache_sglang.errors import ConfigError, ObcacheError, RequestError, shown
from obcache_sglang.frontend import control
from obcache_sglang.frontend.hooks import Frontend
from obcache_sglang.frontend.service import Caller, checked
from obcache_sglang.kv.context import Namespace
from obcache_sglang.kv.folder import Folder, is_name, listed

TRANSFER_SECONDS = 600.0
"""How long a save or a load may take before its caller is told that it goes on."""

_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.5


async def save_context(tokenizer_manager: Any, name: str, caller: Caller) -> dict[str, Any]:
    """Saves a context, on every data-parallel rank that has it. Returns when it is on the disk.

    name: as lists show it, or the context id that `POST /obcache/compress` answered with.
    The answer has `file`, the name under which it can be loaded, `bytes` and `seconds`. Raises RequestError and ContextNotFound.
    """
    asked = uuid.uuid4().hex
    operation = {"op": "save", "namespace": caller.namespace(tokenizer_manager), "asked": asked}
    known: list[tuple[int, dict[str, Any]]] = []
    for named in ({"name": name}, {"context_id": name}):
        if not known:
            answers = await control.call(tokenizer_manager, operation | named)
            known = [(rank, answer) for rank, answer in answers if answer.get("status_code") != 404]
    for _, answer in known or answers:
        checked(answer)
    return await _result(tokenizer_manager, asked, {rank for rank, _ in known})


async def load_context(tokenizer_manager: Any, file: Any, caller: Caller) -> dict[str, Any]:
    """Loads a file into the namespace of the caller, on every data-parallel rank. Returns when questions can read it.

    The answer has the context's `name`. Raises RequestError.
    """
    _check_name(file)
    asked = uuid.uuid4().hex
    operation = {"op": "load", "file": file, "namespace": caller.namespace(tokenizer_manager), "asked": asked}
    answers = await control.call(tokenizer_manager, operation)
    for _, answer in answers:
        checked(answer)
    return await _result(tokenizer_manager, asked, {rank for rank, _ in answers})


async def list_files(tokenizer_manager: Any, caller: Caller) -> list[dict[str, Any]]:
    """The contexts that lie in the folder, by the names of their files; those of the caller's namespace, or all for an operator."""
    folder = _folder(tokenizer_manager)
    return await asyncio.to_thread(listed, folder, _namespace(tokenizer_manager, caller))


async def delete_file(tokenizer_manager: Any, file: str, caller: Caller) -> None:
    """Deletes the files of one context. What is loaded of it stays. Raises RequestError."""
    folder = _folder(tokenizer_manager)
    _check_name(file)
    namespace = _namespace(tokenizer_manager, caller)
    if not await asyncio.to_thread(_deleted, folder, file, namespace):
        raise RequestError(f"There is no file {shown(file)} in this namespace (cache salt, extra key, LoRA adapter).", 404)
    await control.call(tokenizer_manager, {"op": "file_deleted", "file": file})


def _deleted(folder: Folder, name: str, namespace: Namespace | None) -> bool:
    """Whether there was such a file, which is gone now."""
    if namespace is not None and not listed(folder, namespace, only=name):
        return False
    try:
        return folder.delete(name) > 0
    except OSError as error:
        raise ObcacheError(f"The file cannot be deleted: {error.strerror or error}.") from error


async def _result(tokenizer_manager: Any, asked: str, ranks: set[int]) -> dict[str, Any]:
    """What came of a save or load on these data-parallel ranks: the first one's. Raises RequestError and ObcacheError."""
    deadline, pause = time.monotonic() + TRANSFER_SECONDS, _FIRST_PAUSE_SECONDS
    while time.monotonic() < deadline:
        answers = await control.call(tokenizer_manager, {"op": "file_result", "asked": asked})
        results = [checked(answer)["result"] for rank, answer in answers if rank in ranks]
        if all(each is None or each["state"] != "under way" for each in results):
            return _of(results)
        await asyncio.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
    raise ObcacheError(f"It is not done after {TRANSFER_SECONDS:g} seconds, and goes on. The log says what comes of it.")


def _of(results: list[dict[str, Any] | None]) -> dict[str, Any]:
    known = [each for each in results if each is not None]
    failed = next((each for each in known if each["state"] == "failed"), None)
    if failed is not None and failed["missing"]:
        raise RequestError(failed["error"], 404)
    if failed is not None:
        raise ObcacheError(failed["error"])
    if not known:
        raise ObcacheError("The scheduler has forgotten what came of it. The log says more.")
    return {key: value for key, value in known[0].items() if key != "state"}


def _folder(tokenizer_manager: Any) -> Folder:
    """The server's. Raises RequestError where it has none, and ObcacheError where it cannot be read."""
    frontend = Frontend.of(tokenizer_manager)
    if frontend is None or frontend.settings.folder is None:
        raise RequestError("This server keeps no files of contexts: start it with --obcache-folder.")
    try:
        return Folder.opened(Path(frontend.settings.folder), make=False)
    except ConfigError as error:  # it was there when the server started
        raise ObcacheError(str(error)) from error


def _check_name(file: Any) -> None:
    if not is_name(file):
        raise RequestError(
            f"file={shown(file)} is not the name of a context's file: 64 hexadecimal digits, as GET /obcache/files lists them. A path is none."
        )


def _namespace(tokenizer_manager: Any, caller: Caller) -> Namespace | None:
    fields = caller.namespace(tokenizer_manager)
    return None if fields is None else Namespace.of(**fields)
