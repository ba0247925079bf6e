"""Between SIGTERM and the end of a server, without one: what is waited for, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sglang.srt.managers.tokenizer_manager import ServerStatus

from obcache_sglang.frontend import control, shutdown
from obcache_sglang.frontend.hooks import _FRONTEND, Frontend
from obcache_sglang.settings import settings_from_python


class Ending:
    """A TokenizerManager that SIGTERM has reached. unsaved: what the schedulers say, one answer after the other."""

    def __init__(self, unsaved: list[int], monkeypatch: pytest.MonkeyPatch, folder: str | None = "folder") -> None:
        self.gracefully_exit, self.server_status, self.rid_to_state = True, ServerStatus.Up, dict[str, Any]()
        self.asked = 0
        self._unsaved: Iterator[int] = iter(unsaved)
        settings = settings_from_python({} if folder is None else {"folder": folder})
        setattr(self, _FRONTEND, Frontend(settings, None, vocab_size=100))
        monkeypatch.setattr(control, "call", self._call)
        monkeypatch.setattr(shutdown, "_PAUSE_SECONDS", 0.001)

    async def _call(self, tokenizer_manager: Any, operation: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        assert tokenizer_manager is self and operation == {"op": "unsaved"}
        self.asked += 1
        if (unsaved := next(self._unsaved)) < 0:
            await asyncio.sleep(100)
        return [(0, {"ok": True, "unsaved": 0}), (1, {"ok": True, "unsaved": unsaved})]

    def end(self) -> bool:
        """Whether SGLang's own watchdog went on in the end."""
        ended = []

        async def original(tokenizer_manager: Any) -> None:
            ended.append(tokenizer_manager)

        async def watched() -> None:
            await asyncio.wait_for(shutdown._save_first(original, self), 10)

        asyncio.run(watched())
        return ended == [self]


def test_a_server_ends_when_every_rank_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Ending([3, 1, 0], monkeypatch)
    assert server.end() and server.asked == 3


def test_a_server_without_a_folder_ends_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Ending([3], monkeypatch, folder=None)
    assert server.end() and server.asked == 0


@pytest.mark.parametrize("how", ["unhealthy", "forced"])
def test_nothing_is_saved_where_sglang_ends_at_once(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    server = Ending([3], monkeypatch)
    if how == "forced":
        monkeypatch.setenv("SGL_FORCE_SHUTDOWN", "1")
    else:
        server.server_status = ServerStatus.UnHealthy
    assert server.end() and server.asked == 0


def test_schedulers_that_do_not_answer_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "CALL_SECONDS", 0.01)
    server = Ending([2, -1], monkeypatch)
    assert server.end() and server.asked == 2


def test_requests_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have compressed is saved too."""
    server = Ending([0], monkeypatch)
    server.rid_to_state["one"] = None
    asked_while_it_ran = []

    async def original(tokenizer_manager: Any) -> None:
        assert not tokenizer_manager.rid_to_state

    async def watched() -> None:
        ending = asyncio.ensure_future(shutdown._save_first(original, server))
        await asyncio.sleep(0.05)
        asked_while_it_ran.append(server.asked)
        server.rid_to_state.clear()
        await asyncio.wait_for(ending, 10)

    asyncio.run(watched())
    assert asked_while_it_ran == [0] and server.asked == 1
