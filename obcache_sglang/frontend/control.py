"""The channel from the tokenizer process to the schedulers: an operation goes to every data-parallel rank, and each answers.

The channel is SGLang's own: the operation travels in the `rid` of a GetInternalStateReq. A scheduler without our hooks answers with
its internal state, which has no `ok` and so is not taken for an answer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sglang.srt.managers.io_struct import GetInternalStateReq

from obcache_sglang.host import Touch
from obcache_sglang.messages import control_rid

_SHORTEST_WAIT_SECONDS = 0.2

_background: set[asyncio.Task[Any]] = set()


async def call(tokenizer_manager: Any, operation: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Sends one operation to every data-parallel rank. Returns (rank, answer) in order of rank.

    operation: as in `messages.control_rid`.
    Each answer has `ok`; if that is false, it also has `status_code` and `error`.
    """
    tokenizer_manager.auto_create_handle_loop()
    request = GetInternalStateReq(rid=control_rid(operation))
    # Shielded: SGLang pairs answers with questions by order alone, so a client that hangs up must not leave one unread.
    pending = asyncio.ensure_future(tokenizer_manager.get_internal_state_communicator(request))
    outputs = await asyncio.shield(pending)
    answers = [output.internal_state for output in outputs]
    return sorted(((answer.get("dp_rank", index), answer) for index, answer in enumerate(answers)), key=lambda pair: pair[0])


class ExpiryTimer:
    """One timer for all contexts of a server: it makes the schedulers delete expired contexts in time.

    Any earlier request or operation makes them do so too.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def wake_after(self, tokenizer_manager: Any, seconds: float) -> None:
        """Wakes the schedulers at the latest `seconds` from now. Called from the event loop."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        if self._timer is not None and not self._timer.cancelled():
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._wake, tokenizer_manager)

    def _wake(self, tokenizer_manager: Any) -> None:
        self._timer = None
        task = asyncio.get_running_loop().create_task(self._expire(tokenizer_manager))
        _background.add(task)
        task.add_done_callback(_background.discard)

    async def _expire(self, tokenizer_manager: Any) -> None:
        answers = await call(tokenizer_manager, {"op": "expire"})
        later = [answer["next"] for _, answer in answers if answer.get("next") is not None]
        if later:
            self.wake_after(tokenizer_manager, max(_SHORTEST_WAIT_SECONDS, min(later) - time.time()))


TOUCHES = (
    Touch(
        "sglang.srt.managers.io_struct.GetInternalStateReq",
        "call",
        "its rid carries our operations to the schedulers",
        ("rid",),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.managers.io_struct.GetInternalStateReqOutput",
        "read",
        "internal_state: a scheduler's answer to an operation",
        ("internal_state",),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.init_communicators",
        "read",
        "makes get_internal_state_communicator, which sends to every data-parallel rank",
        (),
        "tokenizer",
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
        "call",
        "starts reading answers, before the first request",
        (),
        "tokenizer",
    ),
)
