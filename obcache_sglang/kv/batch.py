"""Who stands after which compressed context in the forward that runs: what attention (cpu, gpu) knows of the scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from obcache_sglang.errors import HostError
from obcache_sglang.kv.cells import KVSpace
from obcache_sglang.kv.context import KeptContext

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class BatchContexts:
    """The contexts of the current forward of this process. `scheduler.forward.ForwardPlan` fills it in.

    kv_pool: the model's. space: where the heads of contexts with per-head budgets lie; None where the pool cannot hold such.
    serial: of the current forward. row_lse: [rows, query heads] float32, the natural log-sum-exps of the attention call that ended
    last, from a backend that gives them.
    """

    def __init__(self, kv_pool: MHATokenToKVPool) -> None:
        self.kv_pool = kv_pool
        self.space = KVSpace.of(kv_pool)
        self.serial = 0
        self.row_lse: torch.Tensor | None = None
        self._rids: list[str] | None = None
        self._contexts: list[KeptContext | None] = []
        self._has_scored_rows = False

    def contexts(self, forward_batch: ForwardBatch) -> list[KeptContext | None] | None:
        """The compressed context before each request of the batch; None where there is none at all.

        Raises HostError for a part of the planned batch: nobody could say whose rows it has.
        """
        if not self._contexts or forward_batch.rids is None:
            return None
        if forward_batch.rids != self._rids:
            raise HostError(
                "SGLang runs another batch than the planned one, and compressed contexts cannot be told apart in it. "
                "Turn off the options that split batches, or start without --obcache."
            )
        return self._contexts

    def uneven_contexts(self, forward_batch: ForwardBatch) -> list[tuple[int, KeptContext]]:
        """Those of `contexts` with per-head budgets, each with its request's row in the batch."""
        contexts = self.contexts(forward_batch) or ()
        return [(row, context) for row, context in enumerate(contexts) if context is not None and context.is_uneven]

    def is_scored(self, forward_batch: ForwardBatch) -> bool:
        """Whether a context of the batch is scored in this forward."""
        return self._has_scored_rows and forward_batch.rids == self._rids
