"""Contexts that are loaded from their files: read by a thread, copied to reserved slots some layers a pass, published when all of it is right.

Ranks of one tensor-parallel group run this in step, and each reads a file of its own. What depends on a disk, its speed too, is voted on:
`agree` is a collective, and all ranks come to each vote in the same pass, those that have failed too.
"""

from __future__ import annotations

import logging
import time
from functools import partial

from obcache_sglang.kv.cells import KeptTokens
from obcache_sglang.kv.context import Context, ContextState, Namespace
from obcache_sglang.kv.host import to_pool
from obcache_sglang.scheduler.context_files import MOST_AT_ONCE, ContextFiles, FileJob, step_bytes
from obcache_sglang.scheduler.file_threads import Reading
from obcache_sglang.scheduler.jobs import Jobs

logger = logging.getLogger(__name__)

MOST_WAITING_PASSES = 64
"""For room beside what runs, before a context is compressed as if it had no file."""


class Load(FileJob):
    """context: None until its file has been read far enough, where only the name is known. kept: once all is read."""

    def __init__(self, name: str, num_layers: int, namespace: Namespace, context: Context | None, asked: str | None) -> None:
        super().__init__(name, num_layers, asked)
        self.namespace, self.context = namespace, context
        self.reading: Reading | None = None
        self.kept: KeptTokens | None = None
        self.waited_passes = 0

    @property
    def progress(self) -> tuple[int, int]:
        """As `CachedCompression.progress`."""
        num_tokens = 0 if self.context is None else self.context.num_tokens
        return num_tokens * self.num_layers_done // self.num_layers, num_tokens


class Loads:
    """Of one scheduler. fresh: ids of the contexts that were loaded, and that no question has read yet."""

    def __init__(self, jobs: Jobs, files: ContextFiles) -> None:
        self.jobs, self.engine, self.cache, self.metrics, self.files = jobs, jobs.engine, jobs.cache, jobs.metrics, files
        self.under_way: list[Load] = []
        self.fresh: set[str] = set()

    @property
    def is_full(self) -> bool:
        return len(self.under_way) >= MOST_AT_ONCE

    def begin(self, name: str, namespace: Namespace, context: Context | None, asked: str | None = None) -> bool:
        """Whether it was begun: not where a rank cannot read, or knows its file for a bad one. All ranks come to the vote."""
        if not self.jobs.agree(self.files.may_read(name)):
            return False
        load = Load(name, self.files.served.num_layers, namespace, context, asked)
        if context is not None:
            context.is_queued = True
        self.under_way.append(load)
        load.contained(self._read, load)
        return True

    def _read(self, load: Load) -> None:
        files = self.files
        check = partial(files.check, load.name, load.namespace, load.asked is not None)
        place = (files.folder, load.name, files.served.rank, files.served.num_ranks)
        load.transfer = load.reading = Reading(*place, check, pinned=not self.engine.on_cpu)

    def advance(self) -> None:
        """One step of each."""
        for load in list(self.under_way):
            load.contained(load.look, self.engine)
            if not self.jobs.agree(load.error is None):
                self.end(load, "another rank cannot read its file")
                continue
            if load.slots is None and not self._reserve_when_read(load):
                continue
            load.contained(self._copy, load)
            if self.jobs.agree(load.is_done):
                load.contained(self._publish, load)
                if load.error is not None:
                    self.end(load, "")

    def _reserve_when_read(self, load: Load) -> bool:
        """Whether the context has its slots now, as it may once all ranks have read what its file says of it. All come to the votes."""
        if not self.jobs.agree(load.reading is not None and load.reading.is_open):
            return False
        context = load.context or self._context_of(load)
        if context is None:
            return False
        load.contained(self.jobs.room.make, context.num_slots)
        if self.engine.runs_something and not self.jobs.room.has_spare(context.num_slots):
            load.waited_passes += 1
            if load.waited_passes > MOST_WAITING_PASSES:
                self.end(load, "there is no room beside what runs")
            return False
        # The file has the exact text before it too, which the tree may have lost.
        load.slots = self.jobs.reservation.on_all_ranks(context, is_able=load.error is None, may_own_exact=True)
        if load.slots is None:
            self.end(load, "the KV pool has no room for it")
        return load.slots is not None

    def _context_of(self, load: Load) -> Context | None:
        """The context of a file that was asked for by name; None where the load has ended with that. Equal on all ranks: so is the name."""
        assert load.reading is not None and load.reading.table is not None and load.reading.head is not None
        table, head = load.reading.table, load.reading.head
        context = self.cache.obtain(load.namespace, head.settings, table.tokens, table.judges)
        if context is None:
            self.end(load, "as many contexts as may be remembered are pinned or being compressed")
        elif context.is_queued or context.state is ContextState.DELETING:
            self.end(load, "the context is being compressed, loaded or deleted")
        elif self.cache.is_resident(context):
            self.under_way.remove(load)
            load.reading.cancel()
            self.files.note(load.asked, {"state": "done", "name": context.id})
        else:
            load.context = context
            context.is_queued = True
            return context
        return None

    def _copy(self, load: Load) -> None:
        """What has been read by now; and with the last layer, where each token lies."""
        reading = load.reading
        assert reading is not None and reading.table is not None and load.slots is not None and load.context is not None
        left, shared = step_bytes(self.engine), load.context.num_shared
        while left > 0 and (layer := reading.take()) is not None:
            if load.num_layers_done == 0:
                self.engine.wait_for_forwards()
            to_pool(self.files.pool, load.num_layers_done, load.slots[shared:], *(each[shared:] for each in layer))
            load.num_layers_done += 1
            left -= sum(each.nbytes for each in layer)
        if load.kept is None and load.is_copied:
            device, table = load.slots.device, reading.table
            kept = KeptTokens(table.positions.to(device), table.offsets.to(device), num_exact=load.context.num_exact)
            load.kept = kept.located(self.files.space, load.slots) if load.context.is_uneven else kept

    def _publish(self, load: Load) -> None:
        context, kept, reading = load.context, load.kept, load.reading
        assert context is not None and kept is not None and reading is not None
        self.under_way.remove(load)
        context.is_queued = False
        self.jobs.publish(context, kept)
        self.fresh.add(context.id)
        if reading.head is not None and (ends := reading.head.expires_at) is not None:
            context.expires_at, context.ttl_seconds = ends, ends - reading.head.created
            self.files.expires(load.name, ends)
        self.files.on_disk.add(load.name)
        self.files.note(load.asked, {"state": "done", "name": context.id})
        self.jobs.ask_again(context, None)
        try:  # as in `Jobs`: whatever fails here on one rank changes no decision
            seconds = time.perf_counter() - load.started_at
            self.metrics.loaded(seconds, reading.num_bytes)
            self.metrics.set_gauges(self.cache)
            logger.info(
                "obcache: loaded context %s: %d tokens in %d slots, %.1f MB in %.3f s",
                context.id, context.num_tokens, context.num_slots, reading.num_bytes / 1e6, seconds,
            )  # fmt: skip
        except Exception:
            logger.exception("obcache: updating the metrics for context %s failed", context.id)

    def end(self, load: Load, why: str) -> None:
        """Nothing comes of it: its questions are served as if there were no file. why: where this rank has no reason of its own."""
        self.under_way = [each for each in self.under_way if each is not load]
        if load.reading is not None:
            load.reading.cancel()
            self.files.given_up.append(load.reading)
        if load.context is not None:
            load.context.is_queued = False
            load.contained(self.jobs.reservation.give_back, load.context)  # what that leaves, `Jobs.discard_orphans` takes
        if load.is_missing:
            self.files.on_disk.discard(load.name)
        else:
            logger.warning("obcache: file %s is not used: %s", load.name, load.error or why)
            if load.error is not None and not (load.reading is not None and load.reading.is_stalled):
                self.files.bad.add(load.name)
                self.files.on_disk.discard(load.name)
        error = f"The file cannot be loaded: {load.error or why}{' in this namespace' if load.is_missing else ''}."
        self.files.note(load.asked, {"state": "failed", "error": error, "missing": load.is_missing})
        try:
            self.metrics.file_missed()
        except Exception:
            logger.exception("obcache: updating the metrics failed")

    def forget(self) -> None:
        """The tree was reset: nodes, locks and slots are gone."""
        for load in self.under_way:
            if load.reading is not None:
                load.reading.cancel()
            if load.context is not None:
                load.context.is_queued = False
            self.files.note(load.asked, {"state": "failed", "error": "The cache was flushed meanwhile.", "missing": False})
        self.under_way = []
        self.fresh.clear()
