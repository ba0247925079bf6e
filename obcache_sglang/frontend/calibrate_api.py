"""`/obcache/calibrate`: an operator has the server make its gates, looks how far it is, and cancels that."""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import Mapping
from typing import Any

from obcache_sglang.compress.calibration import GATE_TOKENS, HELD_OUT, MIN_TOKENS, text_parts
from obcache_sglang.compress.replay import ReplayPrompts
from obcache_sglang.errors import RequestError, shown
from obcache_sglang.frontend.checks import check_keys, check_unicode
from obcache_sglang.frontend.hooks import Frontend
from obcache_sglang.frontend.marker_options import contains

BODY_KEYS = ("texts", "contexts", "max_tokens", "name")

MOST_PARTS = 1000
"""Of texts, or contexts: hundreds are more than gates gain from."""

MOST_TOKENS = 1 << 20
"""Of all texts, since the schedulers get them in one message."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


async def begin(tokenizer_manager: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Starts a calibration, and returns its state. body: of `POST /obcache/calibrate`. Raises RequestError."""
    frontend = _frontend(tokenizer_manager)
    check_keys(body, BODY_KEYS, " in the body of calibrate")
    given = [key for key in ("texts", "contexts") if body.get(key) is not None]
    if len(given) != 1:
        raise RequestError(f"calibrate needs exactly one of texts and contexts; given: {' and '.join(given) or 'none'}.")
    name = body.get("name")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise RequestError(
            f"name={shown(name)} is not a plain file name. Give letters, digits, dots, dashes and underscores, at most 100, or leave it out: "
            "the file lies in the cache folder of obcache_sglang."
        )
    longest = int(tokenizer_manager.model_config.context_len) // 2 - MIN_TOKENS
    max_tokens = body.get("max_tokens", min(GATE_TOKENS, longest))
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or not MIN_TOKENS <= max_tokens <= longest:
        raise RequestError(
            f"max_tokens={shown(max_tokens)} is not a whole number from {MIN_TOKENS} to {longest} (the model reads each text twice). "
            f"It is the number of tokens read of a text. Leave it out for {min(GATE_TOKENS, longest)}."
        )
    watch = frontend.calibration
    if given == ["contexts"]:
        wanted = _num_contexts(body["contexts"])
        return await watch.call(tokenizer_manager, "begin", source="contexts", wanted=wanted, max_tokens=max_tokens, name=name)
    parts = await _parts(tokenizer_manager, frontend, body["texts"], max_tokens)
    sent = [(number, list(tokens)) for number, tokens in parts]
    return await watch.call(tokenizer_manager, "begin", source="texts", wanted=len(sent), texts=sent, name=name)


async def state(tokenizer_manager: Any) -> dict[str, Any]:
    """How far the calibration is, or how the last one ended."""
    return await _frontend(tokenizer_manager).calibration.call(tokenizer_manager, "state")


async def cancel(tokenizer_manager: Any) -> dict[str, Any]:
    """Ends the calibration under way. Raises RequestError where there is none."""
    return await _frontend(tokenizer_manager).calibration.call(tokenizer_manager, "cancel")


def _frontend(tokenizer_manager: Any) -> Frontend:
    frontend = Frontend.of(tokenizer_manager)
    if frontend is None:
        raise RequestError("This engine was started without compression: start it with obcache=True.")
    return frontend


def _num_contexts(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not HELD_OUT <= value <= MOST_PARTS:
        raise RequestError(
            f"contexts={shown(value)} is not a whole number from {HELD_OUT} to {MOST_PARTS}. It is how many contexts that clients ask about "
            "are read; 40 is a good number."
        )
    return value


async def _parts(tokenizer_manager: Any, frontend: Frontend, texts: Any, max_tokens: int) -> list[tuple[int, array[int]]]:
    """(number of the text from 1 on, tokens) of each part, cut and templated as `obcache_sglang.calibrate` does. Raises RequestError."""
    if not isinstance(texts, list) or not texts:
        raise RequestError(f"texts={shown(texts)} is not a list of texts: give one string for each.")
    tokenizer = tokenizer_manager.tokenizer
    if tokenizer is None:
        raise RequestError("texts need a tokenizer, but this server was started with --skip-tokenizer-init. Give contexts.")
    prompts, num_tokens = ReplayPrompts(tokenizer), 0
    parts: list[tuple[int, array[int]]] = []
    for number, text in enumerate(texts, 1):
        what = f"texts[{number - 1}]"
        if not isinstance(text, str):
            raise RequestError(f"{what}={shown(text)} is not a string: give the text itself.")
        check_unicode(what, text)
        if contains(text, frontend.settings.marker):
            raise RequestError(f"{what} contains the context marker, which the model never reads. Take it out.")
        of_text = text_parts(tokenizer, prompts, text, max_tokens, whole=True)
        if len(of_text[0]) < MIN_TOKENS:
            raise RequestError(
                f"{what} has {len(of_text[0])} tokens, too few to measure heads with. Give at least {MIN_TOKENS}, or leave it out."
            )
        parts += [(number, tokens) for tokens in of_text]
        num_tokens += sum(map(len, of_text))
        if len(parts) > MOST_PARTS or num_tokens > MOST_TOKENS:
            raise RequestError(
                f"The texts up to {what} have {len(parts)} parts of up to {max_tokens} tokens, {num_tokens} tokens in all. At most "
                f"{MOST_PARTS} parts and {MOST_TOKENS} tokens are read: give fewer or shorter texts."
            )
        await asyncio.sleep(0)  # other clients' requests go between two texts
    if len(parts) < HELD_OUT:
        raise RequestError(
            f"texts has {len(parts)} parts of up to {max_tokens} tokens. Give {HELD_OUT} or more, or longer ones, or a lower max_tokens: "
            "every fifth is left out to judge the gates."
        )
    return parts
