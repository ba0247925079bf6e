"""How the tokenizer process learns that the schedulers have made gates: it asks, while they are at it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any, Protocol

from obcache_sglang.errors import ObcacheError, RequestError
from obcache_sglang.frontend import control
from obcache_sglang.messages import CalibrationPhase
from obcache_sglang.settings import MADE_HERE, ServerSettings, with_gates

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 2.0


class _HasSettings(Protocol):
    settings: ServerSettings


class CalibrationWatch:
    """Of one TokenizerManager. frontend: whose settings become those of a server with gates."""

    def __init__(self, frontend: _HasSettings) -> None:
        self._frontend = frontend
        self._task: asyncio.Task[None] | None = None
        self._num_made = 0
        self._began = False

    async def call(self, tokenizer_manager: Any, action: str, **more: Any) -> dict[str, Any]:
        """One call about calibration, and the state after it. Raises RequestError."""
        state = await self._ask(tokenizer_manager, action, **more)
        if CalibrationPhase(state["state"]).is_under_way:
            self._keep_watching(tokenizer_manager)
        compression = self._frontend.settings.compression
        return state | {"default": {"method": compression.method, "budget": compression.budget}}

    def begin_if_asked(self, tokenizer_manager: Any) -> None:
        """With `--obcache-calibrate serve` the schedulers have begun by themselves: from the first request on they are asked. In the event loop."""
        if self._began or self._frontend.settings.calibrate != "serve":
            return
        self._began = True
        if self._frontend.settings.gates is None:
            self._keep_watching(tokenizer_manager)

    async def _ask(self, tokenizer_manager: Any, action: str, **more: Any) -> dict[str, Any]:
        # One answer: with data parallelism the schedulers refuse.
        _, answer = (await control.call(tokenizer_manager, {"op": "calibrate", "action": action, **more}))[0]
        if not answer.get("ok"):
            message, status_code = str(answer.get("error")), int(answer.get("status_code", 500))
            raise RequestError(message, status_code) if status_code < 500 else ObcacheError(message)
        state = {key: value for key, value in answer.items() if key not in ("ok", "dp_rank")}
        if state["made"] != self._num_made:
            self._num_made = state["made"]
            settings, name = self._frontend.settings, state["file"] or MADE_HERE
            follows = with_gates(settings, name) if state["default_follows"] else None
            self._frontend.settings = follows or replace(settings, gates=name)
        return state

    def _keep_watching(self, tokenizer_manager: Any) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._watch(tokenizer_manager))

    async def _watch(self, tokenizer_manager: Any) -> None:
        is_under_way = True
        while is_under_way:
            await asyncio.sleep(_PAUSE_SECONDS)
            try:
                state = await self._ask(tokenizer_manager, "state")
                is_under_way = CalibrationPhase(state["state"]).is_under_way
            except Exception:
                logger.exception("obcache: asking how far calibration is failed")
