"""What a server does between SIGTERM and its end: contexts that wait to be saved are saved."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.utils import get_bool_env_var

from obcache_sglang.frontend import control
from obcache_sglang.frontend.hooks import Frontend
from obcache_sglang.host import Touch

logger = logging.getLogger(__name__)

CALL_SECONDS = 30.0
"""How long the schedulers may take to say what is left. One that has died never does."""

_PAUSE_SECONDS = 0.5


async def _save_first(original: Callable[[Any], Awaitable[None]], self: Any) -> None:
    """Around sigterm_watchdog, which ends the process once all requests are answered."""
    frontend = Frontend.of(self)
    if frontend is not None and frontend.settings.folder is not None:
        try:
            await _until_saved(self)
        except Exception:  # whatever it is, the server must end
            logger.exception("obcache: contexts that waited to be saved are lost")
    await original(self)


async def _until_saved(tokenizer_manager: Any) -> None:
    """Returns when the server is to end, no request runs, and nothing waits to be saved, or its disk has refused."""
    while not tokenizer_manager.gracefully_exit:
        await asyncio.sleep(_PAUSE_SECONDS)
    # As SGLang does: these end at once.
    while tokenizer_manager.server_status != ServerStatus.UnHealthy and not get_bool_env_var("SGL_FORCE_SHUTDOWN"):
        if not tokenizer_manager.rid_to_state:
            answers = await asyncio.wait_for(control.call(tokenizer_manager, {"op": "unsaved"}), CALL_SECONDS)
            if not any(answer.get("unsaved") for _, answer in answers):
                return
        await asyncio.sleep(_PAUSE_SECONDS)


TOUCHES = (
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog",
        "around",
        "the server ends when contexts that wait to be saved are on the disk",
        (),
        "tokenizer",
        _save_first,
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.gracefully_exit",
        "read",
        "whether SIGTERM has come",
        (),
        "tokenizer",
    ),
    Touch("sglang.srt.utils.get_bool_env_var", "call", "SGL_FORCE_SHUTDOWN, as SGLang reads it", ("name",), "tokenizer"),
    Touch(
        "sglang.srt.managers.tokenizer_manager.ServerStatus",
        "read",
        "UnHealthy: the schedulers do not answer, and SGLang ends at once",
        (),
        "tokenizer",
    ),
)
