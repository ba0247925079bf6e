"""The channel from the tokenizer process to the schedulers: one operation to every data-parallel rank, one answer from each.

It is SGLang's own: a GetInternalStateReq, whose `rid` carries the operation. A scheduler without our hooks would answer with
its internal state, which is no answer to us (no `ok`).
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
    """Sends one operation to every data-parallel rank; (rank, answer) in order of rank.

    operation: as in `messages.control_rid`.
    Answers hold `ok`, and where that is false `status_code` and `error`.
    """
    tokenizer_manager.auto_create_handle_loop()
    request = GetInternalStateReq(rid=control_rid(operation))
    # Shielded: SGLang pairs answers with questions by order alone, so a client that hangs up must not leave one unread.
    pending = asyncio.ensure_future(tokenizer_manager.get_internal_state_communicator(request))
    outputs = await asyncio.shield(pending)
    answers = [output.internal_state for output in outputs]
    return sorted(((answer.get("dp_rank", index), answer) for index, answer in enumerate(answers)), key=lambda pair: pair[0])


class ExpiryTimer:
    """Lets the schedulers delete what has expired, in time: one timer for all contexts of a server.

    Any request or operation that comes before does so too.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def wake_after(self, tokenizer_manager: Any, seconds: float) -> None:
        """At the latest `seconds` from now. Called from the event loop."""
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
