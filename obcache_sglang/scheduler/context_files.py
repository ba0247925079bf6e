"""The files of one scheduler's contexts: what they are called, which there are, and what a load and a save have in common."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from obcache_sglang.kv.cells import KVSpace
from obcache_sglang.kv.context import Context, Namespace
from obcache_sglang.kv.files import BadFile, Head, Served, Table, file_name
from obcache_sglang.kv.folder import Folder
from obcache_sglang.scheduler.file_threads import Errand, Reading, Writing
from obcache_sglang.settings import CompressionSettings

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from obcache_sglang.scheduler.engine_view import EngineView

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 4
"""Loads under way, and as many saves. Further questions wait for a load to end; further calls of operators are refused."""

STEP_BYTES = 16 << 20
"""Of K and V that a pass copies for one file while requests run: on CPUs some milliseconds."""

GPU_STEP_BYTES = 16 * STEP_BYTES
"""The same on GPUs. An estimate: not measured on one."""

IDLE_WAIT_SECONDS = 0.005
"""So long a pass lets a thread work where nothing else runs."""

REFRESH_SECONDS = 2.0
"""Between two looks at which files there are, for lists."""

TOUCH_SECONDS = 60.0
"""Between two notes that a file's context was read."""

MOST_RESULTS = 256
"""Of loads and saves that operators asked for, so many are remembered."""


@dataclass
class ContextFiles:
    """Of one scheduler.

    served: what files must agree with. chooser: of `served_model.choosers`. space: as in `Compressor`.
    save: as in `ServerSettings`. most_bytes: that all files of the folder may take; None for no limit.
    on_disk: names of the files that this rank knows of and can use. bad: of those that turned out not to be what they should. expired: of those whose
    time had passed.
    going: of those that are being deleted, and of those that could not be.
    found: contexts in the folder, of all servers, and their files' bytes, when it was last looked at.
    given_up: threads that nobody waits for any more.
    expiring: when files are to be deleted, by name, whether or not their contexts are resident; in seconds since the epoch.
    results: of what control calls asked for, by the name that the call gave it.
    """

    folder: Folder
    served: Served
    chooser: Callable[[CompressionSettings], str]
    pool: MHATokenToKVPool
    space: KVSpace | None
    save: str = "asked"
    most_bytes: int | None = None
    on_disk: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    expired: set[str] = field(default_factory=set)
    found: tuple[int, int] = (0, 0)
    going: set[str] = field(default_factory=set)
    given_up: list[Reading | Writing] = field(default_factory=list)
    expiring: dict[str, float] = field(default_factory=dict)
    results: OrderedDict[str, dict[str, Any]] = field(default_factory=OrderedDict)
    _looked_at: float = 0.0
    _touched: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _tidying: Errand | None = None
    _is_untidy: bool = False
    _shrunk: deque[str] = field(default_factory=deque)

    def head(self, context: Context) -> Head:
        """What a context's file says of itself."""
        settings = context.settings
        sizes = (context.num_tokens, context.num_slots, len(context.judges))
        return Head(self.served, settings, self.chooser(settings), *sizes, expires_at=context.expires_at)

    def name(self, context: Context) -> str:
        """What a context's files are called; empty where a defect keeps this rank from knowing."""
        try:
            if context.file_name is None:
                head = self.head(context)
                context.file_name = file_name(self.folder.key, head, context.namespace, context.tokens, context.judges)
            return context.file_name
        except Exception:
            logger.exception("obcache: naming the file of context %s failed", context.id)
            return ""

    def check(self, name: str, namespace: Namespace, is_named: bool, head: Head, table: Table) -> None:
        """Raises BadFile for a file that is not what its name says, in this namespace and on this server.

        is_named: whether somebody asked for it by name. For whoever does so in another namespace it is not there: FileNotFoundError.
        """
        if head.has_expired:
            self.expired.add(name)
        head.check(self.served, self.chooser(head.settings))
        if file_name(self.folder.key, head, namespace, table.tokens, table.judges) != name:
            if is_named:
                raise FileNotFoundError
            raise BadFile("is not of the text that its name stands for")
        if head.num_slots != head.settings.kept_slots(head.num_tokens, self.served.page_size):
            raise BadFile("has another number of slots than its settings give")

    def may_read(self, name: str) -> bool:
        """Whether this rank has no reason not to look for a file."""
        return name not in self.bad and self.may_write(name)

    def may_write(self, name: str) -> bool:
        """Whether this rank has no reason not to begin a file that nobody waits for."""
        return name != "" and name not in self.going and not self._is_stuck()

    def _is_stuck(self) -> bool:
        """Whether a disk has not answered for so long that its file was given up, and still does not."""
        self.given_up = [each for each in self.given_up if each.is_alive]
        return any(each.is_stalled for each in self.given_up)

    def look(self) -> None:
        """Which files there are. Raises OSError."""
        known = set(self.on_disk)
        found = self.folder.complete()
        mine = {name for name, num_ranks in found if num_ranks == self.served.num_ranks}
        self.found = len(found), sum(each.num_bytes for files in found.values() for each in files)
        # What was saved meanwhile is there too; what cannot be used may be written anew.
        self.on_disk = (mine | self.on_disk - known) - self.going - self.bad - self.expired

    def look_again(self) -> None:
        """As `look`, in a thread, if the last look was some time ago: for the next one who asks."""
        if time.monotonic() - self._looked_at > REFRESH_SECONDS and not self._is_stuck():
            self._looked_at = time.monotonic()
            Errand(self.look)

    def delete(self, name: str, after: Writing | None = None) -> None:
        """A thread deletes the files of a context, when what writes one has ended. Until they are gone nobody is given one."""
        self.going.add(name)
        self.expiring.pop(name, None)
        self.on_disk.discard(name)

        def delete() -> None:
            if after is not None:
                after.join()
            try:
                self.folder.delete(name)
                self.going.discard(name)
            except OSError as error:
                logger.warning("obcache: file %s could not be deleted, and is not used any more: %s", name, error)

        Errand(delete)

    def written(self, name: str, expires_at: float | None) -> None:
        """A file was written, on all ranks. It lives as long as its context was to when it was saved."""
        self.on_disk.add(name)
        self.bad.discard(name)
        self.expired.discard(name)
        self.expires(name, expires_at)
        self._tidy()

    def used(self, name: str) -> None:
        """A context is read that has a file: a thread notes it, now and then, so that the file is not the first to go."""
        now = time.monotonic()
        if name not in self.on_disk or now - self._touched.get(name, -math.inf) < TOUCH_SECONDS or self._is_stuck():
            return
        self._touched[name] = now
        self._touched.move_to_end(name)
        if len(self._touched) > MOST_RESULTS:
            self._touched.popitem(last=False)
        Errand(lambda: self.folder.used(name, self.served.rank, self.served.num_ranks))

    def is_too_large(self, head: Head) -> bool:
        """Whether a context's files alone would take more than the folder may."""
        return self.most_bytes is not None and head.served.num_ranks * head.spans()["v"][1] > self.most_bytes

    def _tidy(self) -> None:
        """A thread of the first rank deletes files, until all of them take no more than they may, and looks at what there is."""
        if self.served.rank == 0:
            self._is_untidy = True
            if self._tidying is None or not self._tidying.is_alive:
                self._tidying = Errand(self._shrink)

    def _shrink(self) -> None:
        while self._is_untidy:
            self._is_untidy = False
            gone = [] if self.most_bytes is None else self.folder.shrink(self.most_bytes)
            self._shrunk.extend(gone)
            if gone:
                logger.info("obcache: %d contexts were deleted from folder %s to make room", len(gone), self.folder.path)
            self.look()

    def notice_shrunk(self) -> None:
        """What the thread has deleted by now is not there any more."""
        while self._shrunk:
            name = self._shrunk.popleft()
            self.on_disk.discard(name)
            self.expiring.pop(name, None)

    def expires(self, name: str, at: float | None) -> None:
        """A file lives as long as its context was to when it was saved."""
        if at is not None:
            self.expiring[name] = at

    def note(self, asked: str | None, result: dict[str, Any]) -> None:
        """What came of a control call's load or save."""
        if asked is not None:
            self.results[asked] = result
            if len(self.results) > MOST_RESULTS:
                self.results.popitem(last=False)


class FileJob:
    """A load or a save under way, on this rank.

    asked: by which control call, if by one. transfer: its thread. slots: [M] int64, the context's. error: why nothing comes of it.
    is_missing: whether that says nothing against its file.
    """

    def __init__(self, name: str, num_layers: int, asked: str | None) -> None:
        self.name, self.num_layers, self.asked = name, num_layers, asked
        self.transfer: Reading | Writing | None = None
        self.slots: torch.Tensor | None = None
        self.num_layers_done = 0
        self.error: str | None = None
        self.is_missing = False
        self.started_at = time.perf_counter()

    @property
    def is_copied(self) -> bool:
        """Whether all of it is where it should be, but for the disk."""
        return self.error is None and self.num_layers_done == self.num_layers

    @property
    def is_done(self) -> bool:
        """The same, and the disk too."""
        return self.is_copied and self.transfer is not None and self.transfer.done

    def contained(self, step: Callable[..., None], *args: Any) -> None:
        """A step that ends this rank's part of it if it raises: the vote that follows is not to be missed."""
        try:
            step(*args)
        except Exception as error:
            self.error = self.error or f"internal error, {type(error).__name__}"
            logger.exception("obcache: a step with file %s failed", self.name)

    def look(self, engine: EngineView) -> None:
        """What its thread has come to; and time for it, where nothing else runs."""
        if self.transfer is None or self.error is not None:
            return
        if not engine.runs_something:
            self.transfer.wait(IDLE_WAIT_SECONDS)
        self.error, self.is_missing = self.transfer.failed(), self.transfer.is_missing


def step_bytes(engine: EngineView) -> int:
    """Of K and V that may be copied for one file in the pass under way."""
    if not engine.runs_something:
        return 1 << 62
    return STEP_BYTES if engine.on_cpu else GPU_STEP_BYTES
