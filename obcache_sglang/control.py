"""The channel from the tokenizer process to the schedulers: one operation to every data-parallel rank, one answer from each.

It is SGLang's own: a GetInternalStateReq, whose `rid` carries the operation. A scheduler without our hooks would answer with
its internal state, which is no answer to us (no `ok`).
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from sglang.srt.managers.io_struct import GetInternalStateReq

from obcache_sglang.host import Touch

CONTROL_PREFIX = "obcache:"
"""Start of the `rid` of a GetInternalStateReq that carries an operation of ours, as JSON."""

_background: set[asyncio.Task[Any]] = set()


async def call(tokenizer_manager: Any, operation: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Sends one operation to every data-parallel rank; (rank, answer) in order of rank.

    operation: {"op": "status" | "list" | "get" | "delete" | "expire", ...}, JSON-safe.
    Answers hold `ok`, and where that is false `status_code` and `error`.
    """
    tokenizer_manager.auto_create_handle_loop()
    # One clock for all ranks, which have to agree on what has expired.
    request = GetInternalStateReq(rid=CONTROL_PREFIX + json.dumps(operation | {"now": time.time()}))
    # Shielded: SGLang pairs answers with questions by order alone, so a client that hangs up must not leave one unread.
    pending = asyncio.ensure_future(tokenizer_manager.get_internal_state_communicator(request))
    outputs = await asyncio.shield(pending)
    answers = [output.internal_state for output in outputs]
    return sorted(((answer.get("dp_rank", index), answer) for index, answer in enumerate(answers)), key=lambda pair: pair[0])


def expire_after(tokenizer_manager: Any, seconds: float) -> None:
    """Lets the schedulers forget what has expired, `seconds` from now; any request or operation before does so too."""
    loop = asyncio.get_running_loop()

    def expire() -> None:
        task = loop.create_task(call(tokenizer_manager, {"op": "expire"}))
        _background.add(task)
        task.add_done_callback(_background.discard)

    loop.call_later(seconds, expire)


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
