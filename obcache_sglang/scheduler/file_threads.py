"""Threads that read and write files of contexts. The scheduler looks at what they have done, and never waits for a disk.

A thread whose disk has stalled is given up, not joined: it ends when the disk answers, or with the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from obcache_sglang.kv.files import BadFile, Head, Table, empty_layer
from obcache_sglang.kv.folder import Folder

logger = logging.getLogger(__name__)

BUFFER_BYTES = 64 << 20
"""Host memory that one file's K and V take at most while it is read or written; one layer's, where that is more."""

STALL_SECONDS = 10.0
"""So long a disk may take for one step before its file is given up."""

Layer = tuple[torch.Tensor, torch.Tensor]


class _Transfer:
    """What a thread and the scheduler share. Everything below is under `_changed`.

    error: why nothing comes of it. is_stalled: whether that is because the disk did nothing for too long. is_missing: whether that is because there is no such file. done: the last step was taken.
    num_bytes: of the file, once known.
    """

    nothing_there = "there is no such file"

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._layers: deque[Layer] = deque()
        self._cancelled = False
        self._moved_at = time.monotonic()
        self._thread = threading.Thread(target=self._contained, daemon=True, name="obcache-file")
        self.error: str | None = None
        self.is_missing = self.is_stalled = False
        self.done = False
        self.num_bytes = 0

    def cancel(self) -> None:
        """Nothing of it is wanted any more."""
        with self._changed:
            self._cancelled = True
            self._layers.clear()
            self._changed.notify_all()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Waits until the thread has ended. For other threads: the scheduler never waits."""
        self._thread.join()

    def wait(self, seconds: float) -> None:
        """Gives the thread time, where the scheduler has nothing else to do."""
        with self._changed:
            if not (self._layers or self.done or self.error):
                self._changed.wait(seconds)

    def failed(self) -> str | None:
        """Why nothing will come of it, or None so far."""
        with self._changed:
            if (
                self.error is None
                and not self.done
                and self._waits_for_disk()
                and time.monotonic() - self._moved_at > STALL_SECONDS
            ):
                self.error = f"the disk did nothing for {STALL_SECONDS:g} s"
                self._cancelled = self.is_stalled = True
            return self.error

    def _waits_for_disk(self) -> bool:
        raise NotImplementedError

    def _run(self) -> None:
        raise NotImplementedError

    def _contained(self) -> None:
        try:
            self._run()
        except FileNotFoundError:
            self._fail(self.nothing_there, is_missing=True)
        except BadFile as error:
            self._fail(f"the file {error}")
        except OSError as error:
            self._fail(f"{error.strerror or error}")
        except Exception as error:
            logger.exception("obcache: a file of a context could not be used")
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, error: str, *, is_missing: bool = False) -> None:
        with self._changed:
            if self.error is None:
                self.error, self.is_missing = error, is_missing
            self._changed.notify_all()

    def _moved(self) -> None:
        """The thread has taken a step. Under `_changed`."""
        self._moved_at = time.monotonic()
        self._changed.notify_all()


class Reading(_Transfer):
    """Reads one file, in a thread of its own.

    check: raises BadFile for a file that is another one than the scheduler wants. pinned: as in `files.empty_layer`.
    head, table: once they are read and checked.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        rank: int,
        num_ranks: int,
        check: Callable[[Head, Table], None],
        *,
        pinned: bool,
    ) -> None:
        super().__init__()
        self.head: Head | None = None
        self.table: Table | None = None
        self._open = partial(folder.reading, name, rank, num_ranks)
        self._used = partial(folder.used, name, rank, num_ranks)
        self._check, self._pinned = check, pinned
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return self.table is not None

    def take(self) -> Layer | None:
        """The next layer, if it is read: K and V, [M, bytes of a slot] uint8 each, on the host."""
        with self._changed:
            if not self._layers:
                return None
            layer = self._layers.popleft()
            self._moved_at = time.monotonic()
            self._changed.notify_all()
            return layer

    def _waits_for_disk(self) -> bool:
        return not self._layers

    def _run(self) -> None:
        with self._open() as reader:
            table = reader.table()
            self._check(reader.head, table)
            with self._changed:
                self.head, self.table, self.num_bytes = reader.head, table, reader.num_bytes
                self._moved()
            most = max(1, BUFFER_BYTES // sum(reader.head.layer_bytes))
            for _ in range(reader.head.served.num_layers):
                layer = empty_layer(reader.head, pinned=self._pinned)
                reader.layer(*layer)
                with self._changed:
                    self._layers.append(layer)
                    self._moved()
                    self._changed.wait_for(lambda: len(self._layers) < most or self._cancelled)
                    if self._cancelled:
                        return
            reader.finish()
        self._used()
        with self._changed:
            self.done = True
            self._moved()


class Writing(_Transfer):
    """Writes one file, in a thread of its own."""

    nothing_there = "the folder is not there any more"

    def __init__(self, folder: Folder, name: str, head: Head, table: Table) -> None:
        super().__init__()
        self._begin = partial(folder.writing, name, head, table)
        self._num_layers, self._num_given, self.expires_at = head.served.num_layers, 0, head.expires_at
        self._most = max(1, BUFFER_BYTES // sum(head.layer_bytes))
        self._thread.start()

    @property
    def is_whole(self) -> bool:
        """Whether all of it was given, so that there is or will be a file."""
        return self._num_given == self._num_layers

    @property
    def has_room(self) -> bool:
        """Whether the next layer may be given."""
        with self._changed:
            return len(self._layers) < self._most

    def give(self, layer: Layer) -> None:
        """The next layer, as `files.Writer.layer` takes it."""
        with self._changed:
            self._moved_at = self._moved_at if self._layers else time.monotonic()
            self._layers.append(layer)
            self._num_given += 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """As `_Transfer.wait`: until it is done."""
        with self._changed:
            if not (self.done or self.error):
                self._changed.wait(seconds)

    def _waits_for_disk(self) -> bool:
        return bool(self._layers) or self._num_given == self._num_layers

    def _run(self) -> None:
        with self._begin() as writer:
            for _ in range(self._num_layers):
                with self._changed:
                    self._changed.wait_for(lambda: self._layers or self._cancelled)
                    if self._cancelled:
                        raise BadFile("is not wanted any more")
                    k, v = self._layers[0]
                writer.layer(k, v)
                with self._changed:
                    if self._layers:
                        self._layers.popleft()
                    self._moved()
            num_bytes = writer.finish()
            if self._cancelled:
                raise BadFile("is not wanted any more")
        with self._changed:
            self.num_bytes, self.done = num_bytes, True
            self._moved()


class Errand(_Transfer):
    """Anything else that is to be done with a folder. what: may raise OSError."""

    def __init__(self, what: Callable[[], None]) -> None:
        super().__init__()
        self._what = what
        self._thread.start()

    def _waits_for_disk(self) -> bool:
        return True

    def _run(self) -> None:
        self._what()
        with self._changed:
            self.done = True
            self._moved()
