"""Contexts that are saved to files: copied to host memory some layers a pass, written by a thread.

Ranks of one tensor-parallel group run this in step, as in `loads`.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from http import HTTPStatus

from obcache_sglang.errors import RequestError
from obcache_sglang.kv.context import Context
from obcache_sglang.kv.files import Table
from obcache_sglang.kv.host import to_host
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.context_files import MOST_AT_ONCE, ContextFiles, FileJob, step_bytes
from obcache_sglang.scheduler.file_threads import Writing
from obcache_sglang.scheduler.jobs import Jobs
from obcache_sglang.scheduler.requests import ContextReq

logger = logging.getLogger(__name__)


PASSES_AFTER_FAILURE = 256
"""So many scheduling passes nothing is saved by itself after a disk has refused. Counted, not timed: clocks of ranks differ."""

MOST_WAITING = 256
"""Contexts that are to be saved by themselves and wait for their turn; of more the first to come is given up."""


class Save(FileJob):
    """holds: whether the context is held (`ContextCache.hold`), until all of it is copied."""

    def __init__(self, name: str, num_layers: int, context: Context, asked: str | None) -> None:
        super().__init__(name, num_layers, asked)
        self.context = context
        self.writing: Writing | None = None
        self.holds = False


class Saves:
    """Of one scheduler."""

    def __init__(self, jobs: Jobs, files: ContextFiles) -> None:
        self.jobs, self.engine, self.cache, self.metrics, self.files = jobs, jobs.engine, jobs.cache, jobs.metrics, files
        self.under_way: list[Save] = []
        self._waiting: OrderedDict[str, Context] = OrderedDict()
        self._pause = 0

    def wants(self, context: Context) -> None:
        """A context is to be saved without anybody's asking, when its turn comes; not the beginnings of one longer context, which has all of them."""
        if context.is_offered or context.is_segment or context.namespace.lora_id is not None:
            return
        context.is_offered = True
        self._waiting[context.id] = context
        if len(self._waiting) > MOST_WAITING:
            self._unsaved(self._waiting.popitem(last=False)[1])

    @property
    def num_left(self) -> int:
        """How many the next passes have to do with: not those that wait while a disk that has refused is left alone."""
        return len(self.under_way) + (0 if self._pause else len(self._waiting))

    def begin(self, context: Context, asked: str | None) -> None:
        """Raises RequestError. All ranks come here. asked: None for one that nobody asked for."""
        if context.namespace.lora_id is not None:
            raise RequestError(
                "Contexts of LoRA adapters are not saved: another adapter may be loaded under the same name, and would read them."
            )
        if not self.cache.is_resident(context):
            where = "in host memory: ask it a question" if self.cache.is_on_host(context) else "not resident: compress it"
            raise RequestError(f"The context is {where}, then save it.", HTTPStatus.CONFLICT)
        known = next((save for save in self.under_way if save.context.id == context.id), None)
        if known is not None and known.asked is None:
            known.asked = asked  # who asks now is told what comes of it
            return
        if known is not None:
            raise RequestError("The context is being saved already.", HTTPStatus.CONFLICT)
        if len(self.under_way) >= MOST_AT_ONCE:
            raise RequestError(f"{MOST_AT_ONCE} contexts are being saved. Save it when one of them is done.", HTTPStatus.CONFLICT)
        if self.files.is_too_large(self.files.head(context)):
            raise RequestError("Its files alone would take more than --obcache-folder-gb. Raise that, or keep less of it.")
        if not self.jobs.agree(self.files.name(context) not in self.files.going):
            raise RequestError(
                "The context's file is being deleted, and the disk has not answered yet. Save it when that is done.",
                HTTPStatus.CONFLICT,
            )
        save = Save(self.files.name(context), self.files.served.num_layers, context, asked)
        self.cache.hold(context)
        save.holds = True
        self.under_way.append(save)
        save.contained(self._open, save)

    def _open(self, save: Save) -> None:
        context = save.context
        found = tree.compressed_slots(self.cache.tree, context)
        assert found is not None and context.kept is not None
        save.slots = found[1]
        head, table = self.files.head(context), Table.of(context.tokens, context.judges, context.kept)
        save.transfer = save.writing = Writing(self.files.folder, save.name, head, table)

    def _begin_waiting(self) -> None:
        """The next one, if its turn has come: one at a time, so that little is locked at the pace of a disk. What is saved already is not saved again."""
        self._pause = max(0, self._pause - 1)
        if (
            self._pause
            or not self._waiting
            or any(save.asked is None for save in self.under_way)
            or len(self.under_way) >= MOST_AT_ONCE - 1
        ):
            return
        # Whoever had it compressed says how long it is to live when it is read for the first time.
        unsettled = {
            id(req.context)
            for req in self.engine.queue
            if isinstance(req, ContextReq) and not req.is_virtual and req.plan.ttl_seconds is not None
        }
        context = next((each for each in self._waiting.values() if id(each) not in unsettled), None)
        if context is None:
            return
        del self._waiting[context.id]
        name = self.files.name(context)
        if self.cache.get(context.id) is not context or self.jobs.agree(name in self.files.on_disk):
            return
        try:
            if not self.jobs.agree(self.files.may_write(name)):
                raise RequestError("The disk does not answer, or the context's file is being deleted.")
            self.begin(context, None)
        except RequestError as error:
            logger.info("obcache: context %s is not saved: %s", context.id, error)
            self._unsaved(context)

    def _unsaved(self, context: Context) -> None:
        """It may be offered again, when it is read, unless it never can be saved."""
        context.is_offered = self.files.is_too_large(self.files.head(context))
        try:
            self.metrics.unsaved()
        except Exception:
            logger.exception("obcache: updating the metrics failed")

    def yields(self) -> bool:
        """Gives up a save that nobody asked for, and that locks its context: something else needs the room. Whether there was one."""
        save = next((each for each in self.under_way if each.asked is None and each.holds), None)
        if save is None:
            return False
        save.error = save.error or "its slots are needed"
        self.end(save, "")
        return True

    def advance(self) -> None:
        """One step of each."""
        self._begin_waiting()
        for save in list(self.under_way):
            save.contained(self._copy, save)
            save.contained(save.look, self.engine)
            if not self.jobs.agree(save.error is None):
                self.end(save, "another rank cannot write its file")
                continue
            if save.holds and self.jobs.agree(save.is_copied):
                self._let_go(save)
            if not save.holds and self.jobs.agree(save.is_done):
                self._done(save)

    def _copy(self, save: Save) -> None:
        if save.writing is None or save.slots is None or save.error is not None or save.is_copied:
            return
        if not self.cache.holds(save.context):  # it was compressed again, from these slots
            save.error = "it is not resident any more"
            return
        self.engine.wait_for_loads()
        left = step_bytes(self.engine)
        while left > 0 and not save.is_copied and save.writing.has_room:
            layer = to_host(self.files.pool, save.num_layers_done, save.slots)
            save.writing.give(layer)
            save.num_layers_done += 1
            left -= sum(each.nbytes for each in layer)

    def _let_go(self, save: Save) -> None:
        if save.holds:
            save.holds = False
            self.cache.release(save.context)

    def _done(self, save: Save) -> None:
        assert save.writing is not None
        self.under_way.remove(save)
        self.files.written(save.name, save.writing.expires_at)
        seconds, num_bytes = time.perf_counter() - save.started_at, save.writing.num_bytes
        facts = {"name": save.context.id, "file": save.name, "bytes": num_bytes, "seconds": round(seconds, 3)}
        self.files.note(save.asked, {"state": "done", **facts})
        try:  # as in `Jobs`: whatever fails here on one rank changes no decision
            self.metrics.saved(seconds, num_bytes)
            logger.info("obcache: saved context %s: %.1f MB in %.3f s", save.context.id, num_bytes / 1e6, seconds)
        except Exception:
            logger.exception("obcache: updating the metrics for context %s failed", save.context.id)

    def end(self, save: Save, why: str) -> None:
        """Nothing comes of it, and what is written of it goes. why: where this rank has no reason of its own."""
        self.under_way.remove(save)
        self._let_go(save)
        error = save.error or why
        if save.asked is None:
            self._unsaved(save.context)
            self._pause = PASSES_AFTER_FAILURE
        logger.warning("obcache: context %s is not saved: %s", save.context.id, error)
        self.files.note(save.asked, {"state": "failed", "error": f"The context cannot be saved: {error}.", "missing": False})
        if save.writing is not None:
            save.writing.cancel()
            self.files.given_up.append(save.writing)
            if save.writing.is_whole:  # where other ranks have failed
                self.files.delete(save.name, after=save.writing)

    def stop(self, context: Context) -> None:
        """A context is deleted: its slots may be another one's soon. So is what an earlier record of the same content is being saved as."""
        self._waiting.pop(context.id, None)
        for save in [each for each in self.under_way if each.context.id == context.id]:
            save.error = save.error or "it was deleted meanwhile"
            self.end(save, "")

    def forget_waiting(self) -> None:
        """None of those that wait is saved."""
        self._waiting.clear()

    def forget(self) -> None:
        """The tree was reset: nodes, locks and slots are gone. What is copied is written to its end."""
        self.forget_waiting()
        for save in [each for each in self.under_way if each.holds]:
            save.holds, save.error = False, save.error or "the cache was flushed meanwhile"
            self.end(save, "")
