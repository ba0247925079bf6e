"""Everything that goes from the tokenizer process to the schedulers, and the key under which it goes.

- A request's `Plan`, in `custom_params[KEY]`, in place of the client's wish. Its report comes back in `meta_info[KEY]`.
- Control calls (list, delete, status ...), in the `rid` of SGLang's GetInternalStateReq.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from obcache_sglang.settings.values import CompressionSettings

KEY = "obcache"
"""Our key in `custom_params` and `meta_info`."""

Action = Literal["ask", "compress"]

_CONTROL_PREFIX = "obcache:"


@dataclass(frozen=True)
class Plan:
    """What the tokenizer process decided about one request.

    context_len: where the client's context ends, in tokens of the prompt without the marker; 0: find a resident context, by
        `context_id` or by the tokens that the prompt starts with.
    settings: what decides which tokens are kept.
    action: "ask", or "compress": nothing is generated, only the context is made (`POST /obcache/compress`; prompt = context).
    pin: hold the context's slots.
    ttl_seconds: forget the context after this long; None for as long as there is room.
    context_id: names the context, whose tokens the prompt then does not contain.
    before: tokens before the marker of a prompt with a context id (a chat template's); the named context must begin with them.
    finds_boundary: whether the scheduler is to find where the context ends, of prompts that begin alike (mode auto).
    judged_by_rest: whether the prompt's tokens after the context score it too (mode prompt).
    exact: why the request is served exactly, if that is known already.
    now: seconds since the epoch: one clock for all ranks, which must agree on what has expired.
    judges: the tokens after it that score a context, if the context is named by its id; set by the scheduler, never sent.
    """

    context_len: int
    settings: CompressionSettings
    action: Action = "ask"
    pin: bool = False
    ttl_seconds: float | None = None
    context_id: str | None = None
    before: Sequence[int] = ()
    finds_boundary: bool = False
    judged_by_rest: bool = False
    exact: str | None = None
    now: float = field(default_factory=time.time)
    judges: array[int] = field(default_factory=lambda: array("q"))

    def boundary(self, prompt_tokens: int, page_size: int) -> int:
        """Where the context ends in a prompt of so many tokens, in whole pages.

        A prompt of its context alone still needs one token to generate from; auto-truncation may have cut it shorter.
        """
        longest = prompt_tokens if self.action == "compress" else prompt_tokens - 1
        return min(self.context_len, longest) // page_size * page_size

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, as `custom_params` carries it."""
        values = {**vars(self), "before": list(self.before), "settings": self.settings.to_dict()}
        del values["judges"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`. Raises TypeError or InvalidValue for anything else."""
        return cls(**{**values, "settings": CompressionSettings.from_dict(values["settings"])})


def control_rid(call: Mapping[str, Any]) -> str:
    """The `rid` that carries a control call.

    call: {"op": ...}, JSON-safe, as `scheduler.control_calls` answers it. The time is added, so that all ranks have one clock.
    """
    return _CONTROL_PREFIX + json.dumps({**call, "now": time.time()})


def control_call(rid: Any) -> dict[str, Any] | None:
    """The control call that a `rid` carries, or None for SGLang's own. Raises ValueError for a call that cannot be read."""
    if not isinstance(rid, str) or not rid.startswith(_CONTROL_PREFIX):
        return None
    call: dict[str, Any] = json.loads(rid[len(_CONTROL_PREFIX) :])
    return call


class CalibrationPhase(Enum):
    """How far a calibration in the schedulers is, as `GET /obcache/calibrate` says it."""

    NONE = "none"
    COLLECTING = "collecting"
    """More contexts are to come."""
    MEASURING = "measuring"
    SOLVING = "solving"
    SWITCHING = "switching"
    """The gates are made, and compressions with the former ones are under way."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_under_way(self) -> bool:
        """Whether something is still to come of it."""
        return self in (
            CalibrationPhase.COLLECTING,
            CalibrationPhase.MEASURING,
            CalibrationPhase.SOLVING,
            CalibrationPhase.SWITCHING,
        )
