"""What a request brings that is to be made: whose it is, and which context it names."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from obcache_sglang.errors import ContextNotFound, RequestError
from obcache_sglang.kv.context import Namespace
from obcache_sglang.messages import Plan
from obcache_sglang.scheduler.context_cache import ContextCache


def namespace_of(fields: Mapping[str, Any]) -> Namespace:
    """Of a request that is to be made. fields: the arguments of SGLang's Req, by name."""
    return Namespace.of(**{name: fields.get(name) for name in ("extra_key", "cache_salt", "lora_id")})


def named_context(cache: ContextCache, plan: Plan, fields: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """The plan and the arguments of a request that names its context by id, with the context's tokens. Raises RequestError."""
    known = cache.by_capability(plan.context_id or "")
    if known is None or known[0].namespace != namespace_of(fields):
        raise ContextNotFound(
            "This context_id is unknown under this cache_salt, extra_key and LoRA adapter. The context was forgotten or deleted, or it "
            "belongs to another server. Send the text again, with the marker at its end, or POST /obcache/compress."
        )
    context, tail = known
    before = array("q", plan.before)
    if context.tokens[: len(before)] != before:
        raise RequestError(
            f"The {len(before)} tokens before the marker are not the ones that the context of this context_id begins with. Send the "
            "same system message as when the context was compressed, or put the marker at the very start of a prompt of its own."
        )
    prompt = context.tokens + tail + array("q", fields["origin_input_ids"])
    plan = replace(plan, context_len=context.num_tokens, settings=context.settings, judges=context.judges)
    return plan, {**fields, "origin_input_ids": prompt}
