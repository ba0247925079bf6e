"""Compression of a context whose exact KV is cached: scored and copied between two batches, without a token of prefill.

Only for method gate, whose scores need no query. One context at a time. While requests run it goes on in bounded steps, one in each pass of
the scheduler. The exact KV stays in the tree like any other cached text, and is evicted when it has not been used for longest.

Ranks of one tensor-parallel group run this in step. `agree` is a collective: all come to it, or none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from obcache_sglang.compress.compression import Compression, ScoringRows
from obcache_sglang.kv.context import Context
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.jobs import Jobs
from obcache_sglang.settings import CompressionSettings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

STEP_TOKENS = 4096
"""Tokens, each counted once for every layer, that a step compresses while requests run: on CPUs one layer of a context of 4k tokens."""

GPU_STEP_TOKENS = 40 * STEP_TOKENS
"""The same on GPUs, where 4k tokens of a layer are a read of some megabytes. An estimate: not measured on one."""

PRESSURE_STEPS = 4
"""Steps at once for a compression that makes room for requests that wait."""


class CachedCompression:
    """What one compression holds until it ends. As a `CompressionJob`, it is what `ForwardPlan.compress_layer` works for.

    rows: with the slots that are read. lock: of these. num_layers: to compress. base, makes_room: as in `InPlace.start`.
    """

    def __init__(
        self,
        context: Context,
        slots: torch.Tensor,
        rows: ScoringRows,
        lock: Any,
        num_layers: int,
        base: Context | None,
        *,
        makes_room: bool,
    ) -> None:
        """slots: [M] int64, the context's."""
        self.context = context
        self.slots: torch.Tensor | None = slots
        self.rows = rows
        self.lock = lock
        self.compression = Compression(context, base)
        self.error: str | None = None
        self.scoring_seconds = 0.0
        self.started_at = time.perf_counter()
        self.num_layers = num_layers
        self.base, self.makes_room = base, makes_room
        self.num_layers_done = 0

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens compressed so far and in all, as if layers were tokens: nothing is read."""
        return self.context.num_tokens * self.num_layers_done // self.num_layers, self.context.num_tokens


class InPlace:
    """Of one scheduler. jobs: the compressions that prefill.

    layers: the model's attention layers in order. compress_layer: `ForwardPlan.compress_layer`; None where there is no model.
    """

    def __init__(self, jobs: Jobs, layers: Sequence[Any], compress_layer: Callable[..., None] | None) -> None:
        self.jobs = jobs
        self.engine, self.cache, self.metrics = jobs.engine, jobs.cache, jobs.metrics
        self._layers = layers
        self._compress_layer = compress_layer
        self._under_way: CachedCompression | None = None

    @property
    def is_busy(self) -> bool:
        return self._under_way is not None

    def get(self, context: Context) -> CachedCompression | None:
        """The compression of a context."""
        return self._under_way if self._under_way is not None and self._under_way.context is context else None

    def start(self, context: Context, *, makes_room: bool = False, base: Context | None = None) -> bool:
        """Begins the compression of a context; False where its method needs a forward, its exact KV is not all cached, or there is no room.

        makes_room: requests wait for the room: its exact KV goes, with what follows it, when the context is compressed. The caller has seen that
        enough is free. base: the same tokens, compressed less, from which it is compressed in place of the exact ones, and which goes then.
        All ranks come to the vote: their trees are equal.
        """
        if self._under_way is not None or not self.can_compress(context.settings, context.num_tokens):
            return False
        node = self._node(context, base)
        if node is None:
            return False
        lock = self.cache.tree.lock(node)  # what makes room must not take what is read
        try:
            self._under_way = self._begun(context, base, lock, makes_room=makes_room)
        finally:
            if self._under_way is None:
                self.cache.tree.unlock(lock)
        context.is_queued = self.is_busy
        return self.is_busy

    def _begun(self, context: Context, base: Context | None, lock: Any, *, makes_room: bool) -> CachedCompression | None:
        """A compression with its slots; None where there is no room, or a rank cannot."""
        if not makes_room:
            self.jobs.room.make(context.own_slots)
        if not makes_room and self.engine.runs_something and not self.jobs.room.has_spare(context.own_slots):
            return None  # as a prefill it waits until SGLang admits it
        slots_read = self._slots(context, base)
        # What it is compressed from may be all that there is of its exact tokens.
        may_own_exact = base is not None and base.owns_exact
        slots = self.jobs.reservation.on_all_ranks(context, is_able=slots_read is not None, may_own_exact=may_own_exact)
        if slots is None or slots_read is None:
            context.failed_in_place = True
            return None
        rows = ScoringRows(0, 0, context.num_tokens, slots_read, last=True)
        return CachedCompression(context, slots, rows, lock, len(self._layers), base, makes_room=makes_room)

    def _node(self, context: Context, base: Context | None) -> int | None:
        """Where the tree has what is read, as all ranks know; None where it has not."""
        if base is not None:
            return base.node
        num_tokens, node = tree.match_exact(self.cache.tree, context)
        return node if num_tokens == context.num_tokens else None

    def _slots(self, context: Context, base: Context | None) -> torch.Tensor | None:
        """The slots [tokens] int64 that are read; None where a defect of this rank keeps it from knowing."""
        try:
            found = tree.exact_slots(self.cache.tree, context) if base is None else tree.compressed_slots(self.cache.tree, base)
            assert found is not None
            return found[1]
        except Exception:
            logger.exception("obcache: reading the cached KV of context %s failed", context.id)
            return None

    def can_compress(self, settings: CompressionSettings, num_tokens: int) -> bool:
        """Whether contexts of so many tokens can be compressed from their cached KV with these settings."""
        if self._compress_layer is None or not settings.uses_gates:
            return False
        # What is cached exactly is not what a segment's tokens are after compressed ones.
        return settings.segment_start(num_tokens, self.cache.page_size) == 0

    def advance(self) -> None:
        """One step; to the end where nothing runs. Whatever fails, on this rank or another one, the context's questions are served exactly.

        Ranks that fail go on to the vote at the end, where the others wait for them.
        """
        job = self._under_way
        if job is None:
            return
        assert self._compress_layer is not None
        step_tokens = STEP_TOKENS if self.engine.on_cpu else GPU_STEP_TOKENS
        if job.makes_room:
            step_tokens *= PRESSURE_STEPS
        most = max(1, step_tokens // job.context.num_tokens) if self.engine.runs_something else len(self._layers)
        step = self._layers[job.num_layers_done : job.num_layers_done + most]
        self._contained(job, self.engine.wait_for_forwards)
        for layer in step:
            self._contained(job, self._compress_layer, job, job.rows, layer)
        job.num_layers_done += len(step)
        if job.num_layers_done < len(self._layers):
            return
        if self.jobs.agree(job.error is None and job.compression.kept is not None):
            self._contained(job, self._publish, job)
            if job.error is None:
                return
        self._give_back(job)
        self.jobs.refuse(job.context, job.error or "error")

    @staticmethod
    def _contained(job: CachedCompression, step: Callable[..., None], *args: Any) -> None:
        try:
            step(*args)
        except Exception:
            job.error = job.error or "error"
            logger.exception("obcache: compressing context %s from its cached KV failed", job.context.id)

    def _publish(self, job: CachedCompression) -> None:
        context, kept = job.context, job.compression.kept
        assert kept is not None
        self.jobs.publish(context, kept)
        self._under_way, context.is_queued = None, False
        self.cache.tree.unlock(job.lock)
        if job.base is not None:
            self.cache.replaced(job.base, context)
        elif job.makes_room and (node := self._node(context, None)) is not None:
            tree.drop_branch(self.cache.tree, node)
        self.jobs.ask_again(context, job.base)
        try:  # as in `Jobs`: whatever fails here on one rank changes no decision
            self.metrics.compressed_in_place()
            self.metrics.published(context, job.started_at, job.scoring_seconds, context.num_tokens, self.cache)
        except Exception:
            logger.exception("obcache: updating the metrics for context %s failed", context.id)

    def _give_back(self, job: CachedCompression) -> None:
        """What a compression that failed holds."""
        logger.warning("obcache: context %s is not compressed and is served exactly: %s", job.context.id, job.error or "error")
        job.context.failed_in_place = True
        if self._under_way is job:
            self._under_way, job.context.is_queued = None, False
            self.cache.tree.unlock(job.lock)
        self.jobs.reservation.give_back(job.context)

    def gives_way(self) -> bool:
        """Gives back the context under way: its slots are needed. Whether there was one."""
        job = self._under_way
        if job is not None:
            job.error = job.error or "its slots are needed"
            self._give_back(job)
        return job is not None

    def cancel(self, lora_id: str) -> None:
        """Gives back what is being compressed of this LoRA adapter, which was unloaded: nobody may read it any more."""
        self.jobs.forget_adapter(lora_id)
        job = self._under_way
        if job is not None and job.context.namespace.lora_id == lora_id:
            job.error = "adapter_unloaded"
            self._give_back(job)

    def forget(self) -> None:
        """The tree was reset: nodes, locks and slots are gone."""
        if self._under_way is not None:
            self._under_way.context.is_queued = False
            self._under_way = None
