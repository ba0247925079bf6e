"""Answers to the control calls of the tokenizer process: what operators and clients ask about contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from obcache_sglang import __version__
from obcache_sglang.errors import RequestError
from obcache_sglang.kv.context import Context, ContextState, Namespace
from obcache_sglang.scheduler.in_place import CachedCompression
from obcache_sglang.scheduler.lineage import compressed_otherwise
from obcache_sglang.scheduler.loads import Load
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq

if TYPE_CHECKING:
    from obcache_sglang.scheduler.manager import CompressionManager

Answer = dict[str, Any]


def answer(manager: CompressionManager, call: Mapping[str, Any]) -> Answer:
    """Answers one control call; op is status, list, get, positions, delete, gone, progress, expire, save, load, file_result, file_deleted, unsaved
    or calibrate.

    namespace: {"extra_key", "cache_salt", "lora_id"} of whoever asks, None for an operator who sees all. A context is asked for by
    its `context_id`, or by the `name` that lists show. asked: the name that a save or load is given, under which its result is asked for.
    """
    now = float(call.get("now", 0.0))
    manager.advance_clock(now)
    manager.stored.expire(now)
    cache = manager.cache
    match call.get("op"):
        case "status":
            return {"ok": True, **_status(manager)}
        case "calibrate":
            return manager.calibration.answer(call)
        case "expire":
            due = [context.expires_at for context in cache if context.expires_at is not None] + manager.stored.due()
            return {"ok": True, "next": min(due) if due else None}
        case "progress":
            asked = [req for req in manager.engine.waiting() if isinstance(req, ContextReq) and req.rid.startswith(call["rid"])]
            contexts = [req.context for req in asked if req.context is not None]
            jobs = [job for each in contexts if (job := _under_way(manager, each)) is not None]
            done, total = jobs[0].progress if jobs else (0, 0)
            return {"ok": True, "tokens": done, "of": total}
        case "file_result":
            return {"ok": True, "result": manager.stored.result(call["asked"])}
        case "unsaved":
            return {"ok": True, "unsaved": manager.stored.num_unsaved}
        case "file_deleted":
            manager.stored.file_deleted(call["file"])
            return {"ok": True}
        case "load":
            return _begun(partial(manager.stored.load, call["file"], Namespace.of(**call["namespace"]), call["asked"]))
        case "gone":
            return {"ok": True, "gone": cache.get(call["name"]) is None}
        case "list":
            readers = manager.room.readers()
            held = [each for each in cache if _is_visible(each, call) and _is_held(manager, each)]
            return {"ok": True, "contexts": [_described(manager, each) | {"readers": readers[each.id]} for each in held]}
    context = _asked_for(manager, call)
    if context is None:
        wanted = call.get("context_id") or call.get("name")
        return {
            "ok": False,
            "status_code": 404,
            "error": f"There is no context {wanted!r} in this namespace (cache salt, extra key, LoRA adapter).",
        }
    match call.get("op"):
        case "get":
            described = _described(manager, context) | {"readers": manager.room.readers()[context.id]}
            described["kept_per_head"] = None if context.kept is None else context.kept.counts(manager.engine.num_kv_heads)
            return {"ok": True, "context": described}
        case "positions":
            kept, layer = context.kept, int(call["layer"])
            return {"ok": True, "positions": None if kept is None else kept.packed_layer(layer, manager.engine.num_kv_heads)}
        case "save":
            return _begun(partial(manager.stored.save, context, call["asked"]))
        case "delete":
            if context.is_queued:
                return {"ok": False, "status_code": 409, "error": "The context is being compressed. Delete it afterwards."}
            for each in (context, *compressed_otherwise(cache, context, manager.settings.rungs)):
                if each.state is not ContextState.DELETING and not each.is_queued:
                    cache.delete(each)
            manager.sweep()
            return {"ok": True, "name": context.id, "gone": cache.get(context.id) is None}
    return {"ok": False, "status_code": 400, "error": f"op={call.get('op')!r} is not a known operation."}


def _begun(begin: Callable[[], None]) -> Answer:
    try:
        begin()
    except RequestError as error:
        return {"ok": False, "status_code": error.status_code, "error": str(error)}
    return {"ok": True}


def _described(manager: CompressionManager, context: Context) -> dict[str, Any]:
    return context.describe() | {"on_disk": manager.stored.is_on_disk(context)}


def _under_way(manager: CompressionManager, context: Context) -> CompressionJob | CachedCompression | Load | None:
    return manager.jobs.get(context) or manager.in_place.get(context) or manager.stored.get(context)


def _asked_for(manager: CompressionManager, call: Mapping[str, Any]) -> Context | None:
    if call.get("context_id") is not None:
        known = manager.cache.by_capability(call["context_id"])
        context = None if known is None else known[0]
    else:
        context = manager.cache.get(call.get("name") or "")
    if context is None or not _is_visible(context, call):
        return None
    # Ranks see the disk at their own times: what they delete does not depend on it.
    return context if call.get("op") == "delete" or _is_held(manager, context) else None


def _is_held(manager: CompressionManager, context: Context) -> bool:
    """Whether a context is anywhere: in its slots, in host memory, or in a file."""
    if manager.cache.has(context) or context.is_queued or context.state is not ContextState.ABSENT:
        return True
    return manager.stored.is_on_disk(context)


def _is_visible(context: Context, call: Mapping[str, Any]) -> bool:
    namespace = call.get("namespace")
    return namespace is None or context.namespace == Namespace.of(**namespace)


def _status(manager: CompressionManager) -> Answer:
    for context in manager.cache:
        manager.cache.has(context)
    resident = manager.metrics.set_gauges(manager.cache)
    return {
        "version": __version__,
        "settings": manager.settings.to_dict(),
        "counters": manager.metrics.to_dict(),
        "calibration": manager.calibration.state(),
        "pool": {
            "slots": manager.engine.pool_slots,
            "page_size": manager.cache.page_size,
            "contexts": len(resident),
            "context_slots": sum(context.own_slots for context in resident),
            "slots_saved": sum(context.position_offset for context in resident),
            "pinned_slots": manager.cache.pinned_slots,
            "max_pinned_slots": manager.room.max_pinned_slots,
        },
    }
