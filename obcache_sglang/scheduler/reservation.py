"""Slots for a context on all ranks of one tensor-parallel group, or on none."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from obcache_sglang.kv.context import Context, ContextState
from obcache_sglang.scheduler.context_cache import ContextCache
from obcache_sglang.scheduler.engine_view import EngineView

logger = logging.getLogger(__name__)


class Reservation:
    """Of one scheduler. agree: whether all ranks say True."""

    def __init__(self, engine: EngineView, cache: ContextCache, agree: Callable[[bool], bool]) -> None:
        self._engine, self._cache, self._agree = engine, cache, agree

    def on_all_ranks(self, context: Context, *, is_able: bool = True, may_own_exact: bool = False) -> torch.Tensor | None:
        """The slots [num_slots] int64 reserved for a context; None where a rank has no room or has failed. All ranks come to the vote.

        is_able: whether this rank could do its part so far. may_own_exact: as in `ContextCache.reserve`.
        """
        slots = None
        try:
            slots = self._cache.reserve(context, may_own_exact=may_own_exact) if is_able else None
        except Exception:
            logger.exception("obcache: reserving slots for context %s failed", context.id)
        if self._agree(slots is not None):
            return slots
        self.give_back_contained(context)
        try:
            # Where another rank has evicted for it and this one has not: their trees must stay equal.
            self._engine.evict(context.own_slots)
        except Exception:
            logger.exception("obcache: evicting for context %s as other ranks did failed", context.id)
        return None

    def give_back(self, context: Context) -> None:
        """Takes the slots back that were reserved for a context that is not published."""
        if context.state is ContextState.COMPRESSING:
            self._cache.withdraw(context)

    def give_back_contained(self, context: Context) -> None:
        """As `give_back`; a defect leaves them to `Jobs.discard_orphans`."""
        try:
            self.give_back(context)
        except Exception:
            logger.exception("obcache: releasing the slots reserved for context %s failed", context.id)
