"""Contexts that last: in host memory (`HostMemory`), and in files (`--obcache-folder`). What questions and operators ask of them, and what the
scheduler tells them.

Each rank has its own file of a context. What ranks of one tensor-parallel group find there is voted on, so that they do the same.
"""

from __future__ import annotations

import hashlib
import logging
from http import HTTPStatus
from typing import Any

from obcache_sglang.errors import RequestError
from obcache_sglang.kv.context import SHARED, Context, Namespace
from obcache_sglang.kv.folder import is_name
from obcache_sglang.scheduler.context_files import MOST_AT_ONCE, ContextFiles
from obcache_sglang.scheduler.host_memory import HostMemory
from obcache_sglang.scheduler.jobs import Jobs
from obcache_sglang.scheduler.loads import Load, Loads
from obcache_sglang.scheduler.requests import ContextReq
from obcache_sglang.scheduler.saves import Saves

logger = logging.getLogger(__name__)


class StoredContexts:
    """Of one scheduler. files: None without a folder. host: those in host memory."""

    def __init__(self, jobs: Jobs, files: ContextFiles | None) -> None:
        self.jobs, self.engine, self.cache = jobs, jobs.engine, jobs.cache
        self._files = files
        self._is_off: str | None = None
        self.host = HostMemory(jobs)
        self.cache.on_deleted = self._deleted
        if files is None:
            return
        self._loads, self._saves = Loads(jobs, files), Saves(jobs, files)
        jobs.on_published = self._published
        files.folder.clean()
        try:
            files.look()
        except OSError as error:
            logger.warning("obcache: folder %s cannot be read: %s", files.folder.path, error)

    @property
    def is_busy(self) -> bool:
        """Whether a file is read or written, or is to be written next."""
        return self._files is not None and bool(self._loads.under_way or self._saves.num_left)

    @property
    def num_unsaved(self) -> int:
        """Contexts that are being saved or wait for it; of those that wait, none while a disk that has refused is left alone."""
        return 0 if self._files is None else self._saves.num_left

    # --- what questions ask -------------------------------------------------------------------------------------------------------

    def awaits(self, req: ContextReq, context: Context) -> bool:
        """Whether a question waits for its context, or one that this begins with, to come back from host memory or a file. Begins that.

        Each question looks for a file once.
        """
        if self.host.awaits(context):
            return True
        if self._files is None or self._is_off or context.namespace.lora_id is not None:
            return False
        loading = {load.context.id for load in self._loads.under_way if load.context is not None}
        if loading and not loading.isdisjoint((context.id, *(identity for _, identity in self.cache.beginnings(context)))):
            return True
        if context.is_queued or req.looked_for == context.id:
            return False
        if self._loads.is_full and self.jobs.agree(self._files.name(context) in self._files.on_disk):
            return True
        req.looked_for = context.id
        return not self._loads.is_full and self._loads.begin(self._files.name(context), context.namespace, context)

    def get(self, context: Context) -> Load | None:
        """The load of a context."""
        loads = () if self._files is None else self._loads.under_way
        return next((load for load in loads if load.context is context), None)

    def read(self, context: Context, *, again: bool) -> str:
        """Where a context comes from for the question that reads it now: from host memory or the disk for the first one after it came from there.

        again: whether it was not compressed for this one.
        """
        if again and self._files is not None and self._files.save != "asked":
            if not self._is_off:
                self._saves.wants(context)
            self._files.used(self._files.name(context))
        if self.host.is_fresh(context):
            return "host"
        if self._files is None or context.id not in self._loads.fresh:
            return "device"
        self._loads.fresh.discard(context.id)
        return "disk"

    # --- what operators ask -------------------------------------------------------------------------------------------------------

    def is_on_disk(self, context: Context) -> bool:
        """Whether a context is in a file, as far as this server knows."""
        if self._files is None or context.namespace.lora_id is not None:
            return False
        self._files.look_again()
        return self._files.name(context) in self._files.on_disk

    def save(self, context: Context, asked: str) -> None:
        """Begins to write a context's file. Raises RequestError. All ranks come here. asked: what `result` is to know it by."""
        self._required()
        self._saves.begin(context, asked)

    def load(self, name: str, namespace: Namespace, asked: str) -> None:
        """Begins to load a file. Raises RequestError. All ranks come here. asked: as in `save`."""
        files = self._required()
        if not is_name(name):
            raise RequestError("This is not the name of a file: 64 hexadecimal digits, as GET /obcache/files lists them.")
        if namespace.lora_id is not None:
            raise RequestError("There are no files of contexts of LoRA adapters.")
        if self._loads.is_full:
            raise RequestError(
                f"{MOST_AT_ONCE} contexts are being loaded. Load it when one of them is done.", HTTPStatus.CONFLICT
            )
        files.bad.discard(name)  # an operator may have put another one in its place
        if not self._loads.begin(name, namespace, None, asked):
            raise RequestError(
                "The file cannot be loaded now: it is being deleted, or the disk does not answer.", HTTPStatus.SERVICE_UNAVAILABLE
            )

    def result(self, asked: str) -> dict[str, Any] | None:
        """How far a load or a save is; at its end with `state` "done" or "failed". None for one that is unknown."""
        if self._files is None:
            return None
        if not self.engine.in_flight():
            self.advance()  # nothing else may call for a pass
        for job in (*self._loads.under_way, *self._saves.under_way):
            if job.asked == asked:
                return {"state": "under way", "layers": job.num_layers_done, "of": job.num_layers}
        return self._files.results.get(asked)

    def file_deleted(self, name: str) -> None:
        """The files of a context were deleted in the folder."""
        if self._files is not None:
            self._files.on_disk.discard(name)

    def _required(self) -> ContextFiles:
        if self._files is None:
            raise RequestError("This server keeps no files of contexts: start it with --obcache-folder.")
        if self._is_off:
            raise RequestError(f"Contexts are neither saved nor loaded any more: {self._is_off}. Start the server again.")
        return self._files

    # --- what the scheduler tells -------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One step of each. Called at the same points on all ranks."""
        self.host.advance()
        if self._files is not None:
            self._files.notice_shrunk()
            try:  # as in `Jobs`: whatever fails here on one rank changes no decision
                self.jobs.metrics.in_folder(*self._files.found)
            except Exception:
                logger.exception("obcache: updating the metrics failed")
            self._loads.advance()
            self._saves.advance()

    def yields(self) -> bool:
        """Whether something that nobody waits for has given way to what needs room."""
        return self._files is not None and self._saves.yields()

    def _published(self, context: Context) -> None:
        """Its content is there, which may be another one than before."""
        context.is_offered = False
        if self._files is not None and not self._is_off and self._files.save == "compressed":
            self._saves.wants(context)

    def due(self) -> list[float]:
        """When files are to be deleted, in seconds since the epoch."""
        return [] if self._files is None else list(self._files.expiring.values())

    def expire(self, now: float) -> None:
        """Deletes the files whose time has passed, also of contexts that have been evicted."""
        if (files := self._files) is not None:
            for name in [each for each, at in files.expiring.items() if at <= now]:
                files.delete(name)

    def forget(self) -> None:
        """The tree was reset. Before the cache is told so."""
        self.host.forget()
        if self._files is not None:
            self._loads.forget()
            self._saves.forget()

    def turn_off(self, why: str) -> None:
        """From now on no file is read or written: what they hold is not what this server would compute. Deleting a context still deletes its file."""
        if self._files is None or self._is_off:
            return
        for load in list(self._loads.under_way):
            load.is_missing, load.error = True, why
            self._loads.end(load, why)
        for save in list(self._saves.under_way):
            save.error = save.error or why
            self._saves.end(save, why)
        self._saves.forget_waiting()
        self._is_off = why
        logger.warning("obcache: contexts are neither saved nor loaded any more: %s. Start the server again.", why)

    def _deleted(self, context: Context) -> None:
        """The cache has deleted a context: so is its file."""
        self.host.deleted(context)
        if self._files is None or context.namespace.lora_id is not None:
            return
        try:
            self._saves.stop(context)
            self._loads.fresh.discard(context.id)
            self._files.delete(self._files.name(context))
        except Exception:
            logger.exception("obcache: deleting the file of context %s failed", context.id)

    # --- at the start -------------------------------------------------------------------------------------------------------------

    def preload(self) -> None:
        """Loads the files of the shared namespace, those used last first of all that fit; the one used last is evicted last, too."""
        if self._files is None:
            return
        wanted: list[str] = []
        try:
            wanted = self._to_preload(self._files)
        except Exception:
            logger.exception("obcache: folder %s cannot be read", self._files.folder.path)
        if not self._is_same_on_all_ranks(wanted):
            logger.warning("obcache: nothing is preloaded: the ranks do not see the same files")
            return
        num_loaded = 0
        for number, name in enumerate(wanted, start=1):
            try:
                asked = f"preload {number}"
                self.load(name, SHARED, asked)
                while (result := self.result(asked)) is not None and result["state"] == "under way":
                    pass  # it gives the thread time, and gives it up in time
                num_loaded += result is not None and result["state"] == "done"
                logger.info("obcache: preloaded %d of %d contexts", number, len(wanted))
            except RequestError as error:
                logger.warning("obcache: file %s is not preloaded: %s", name, error)
        self._loads.fresh.clear()
        logger.info("obcache: %d of %d contexts are there from the start", num_loaded, len(wanted))

    def _to_preload(self, files: ContextFiles) -> list[str]:
        """Names of the files to load, in order. Raises OSError."""
        served, free = files.served, self.engine.free_slots() - self.jobs.room.tight_slots
        found = [each for (_, num_ranks), each in files.folder.complete().items() if num_ranks == served.num_ranks]
        # By rank 0's, of which all ranks are told the same.
        found.sort(key=lambda each: (each[0].used_at, each[0].name), reverse=True)
        chosen: list[str] = []
        passed_over = 0
        for each in found:
            name = each[0].name
            try:
                with files.folder.reading(name, served.rank, served.num_ranks) as reader:
                    files.check(name, SHARED, True, reader.head, reader.table())
            except (ValueError, OSError):  # of another namespace, model or setting
                continue
            if reader.head.num_slots > free or len(chosen) >= self.cache.max_contexts:
                passed_over += 1
                continue
            free -= reader.head.num_slots
            chosen.append(name)
        logger.info("obcache: preloading %d contexts of %s; %d more do not fit", len(chosen), files.folder.path, passed_over)
        return chosen[::-1]

    def _is_same_on_all_ranks(self, names: list[str]) -> bool:
        """All ranks come to the votes."""
        assert self._files is not None
        if self._files.served.num_ranks == 1:
            return True
        digest = hashlib.blake2b("".join(names).encode(), digest_size=8).digest()
        bits = [bool(byte >> bit & 1) for byte in digest for bit in range(8)]
        votes = [(self.jobs.agree(bit), self.jobs.agree(not bit)) for bit in bits]
        return all(ones or zeros for ones, zeros in votes)
