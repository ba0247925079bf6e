"""The folder of files of compressed contexts: its key, what its files are called, and how one is opened, made and deleted.

A name never comes from a client as it is: it is 64 hexadecimal digits, or nothing of the folder. So no path leaves the folder, and links in it
are not followed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obcache_sglang.errors import ConfigError, ObcacheError
from obcache_sglang.kv.context import Namespace
from obcache_sglang.kv.files import BadFile, Head, Reader, Table, Writer, describe, file_name

logger = logging.getLogger(__name__)

KEY_FILE = "obcache.key"
SUFFIX = ".context.safetensors"

ABANDONED_SECONDS = 3600.0
"""So old a file that was never finished is when its writer cannot be alive any more."""

_KEY_BYTES = 32
_NAME = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(rf"({_NAME.pattern})\.(\d+)of(\d+){re.escape(SUFFIX)}")
_PARTIAL = ".partial"
_NOT_FOLLOWED = os.O_NOFOLLOW | os.O_CLOEXEC


def is_name(name: object) -> bool:
    """Whether this can be the name of a context's files."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Entry:
    """One file of a folder. used_at: when it was last written or loaded, in seconds since the epoch."""

    name: str
    rank: int
    num_ranks: int
    num_bytes: int
    used_at: float


class Folder:
    """One folder. key: what names are hashed with."""

    def __init__(self, path: Path, key: bytes) -> None:
        self.path, self.key = path, key

    @classmethod
    def opened(cls, path: str | Path, *, make: bool = True) -> Folder:
        """The folder, which is made where it is missing, and so is its key. Raises ConfigError where that cannot be.

        make: False for a folder that must be there.
        """
        folder = Path(path).absolute()
        try:
            if make:
                folder.mkdir(mode=0o700, exist_ok=True)
                _make_key(folder)
            return cls(folder, _key_of(folder))
        except OSError as error:
            raise ConfigError(
                f"folder {folder}: {error.strerror or error}. Give a folder that this user may write to, or one in which a server has "
                f"written before (it has a file {KEY_FILE})."
            ) from error

    def path_of(self, name: str, rank: int, num_ranks: int) -> Path:
        """The file of a context on one rank. Raises ValueError for a name that is none."""
        if not is_name(name):
            raise ValueError(f"{name!r} is not the name of a file of a context: 64 hexadecimal digits")
        return self.path / f"{name}.{rank}of{num_ranks}{SUFFIX}"

    def entries(self) -> list[Entry]:
        """All complete files, by name and rank. Raises OSError."""
        found = []
        with os.scandir(self.path) as files:
            for file in files:
                if (parts := _FILE.fullmatch(file.name)) is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    status = file.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append(Entry(parts[1], int(parts[2]), int(parts[3]), status.st_size, status.st_mtime))
        return sorted(found, key=lambda each: (each.name, each.num_ranks, each.rank))

    def complete(self) -> dict[tuple[str, int], list[Entry]]:
        """The files of each context of which no rank's is missing, by name and number of ranks. Raises OSError."""
        found: dict[tuple[str, int], list[Entry]] = {}
        for each in self.entries():
            found.setdefault((each.name, each.num_ranks), []).append(each)
        return {key: files for key, files in found.items() if [each.rank for each in files] == list(range(key[1]))}

    @contextmanager
    def reading(self, name: str, rank: int, num_ranks: int) -> Iterator[Reader]:
        """A file that is there. Raises FileNotFoundError, BadFile, or another OSError."""
        # Not to wait for the writer of a pipe that somebody put there.
        descriptor = os.open(self.path_of(name, rank, num_ranks), os.O_RDONLY | os.O_NONBLOCK | _NOT_FOLLOWED)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BadFile("is not a regular file")
            yield Reader(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def writing(self, name: str, head: Head, table: Table) -> Iterator[Writer]:
        """A new file, which is complete when the block ends after `Writer.finish`, and absent if the block raises. Raises OSError."""
        rank, num_ranks = head.served.rank, head.served.num_ranks
        path = self.path_of(name, rank, num_ranks)
        partial = self.path / f".{name}.{rank}of{num_ranks}.{secrets.token_hex(8)}{_PARTIAL}"
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOT_FOLLOWED, 0o600)
        try:
            try:
                yield Writer(descriptor, head, table)
            finally:
                os.close(descriptor)
            os.replace(partial, path)
            self._sync()
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def used(self, name: str, rank: int, num_ranks: int) -> None:
        """Notes that a file was loaded now. One that cannot be touched stays as it is."""
        with contextlib.suppress(OSError):
            os.utime(self.path_of(name, rank, num_ranks), follow_symlinks=False)

    def delete(self, name: str) -> int:
        """Deletes the files of a context, of all ranks. Returns how many there were. Raises OSError."""
        if not is_name(name):
            return 0
        mine = [each for each in self.entries() if each.name == name]
        self._unlink(mine)
        if mine:
            self._sync()
        return len(mine)

    def shrink(self, most_bytes: int) -> list[str]:
        """Deletes the files of the contexts used longest ago, until all files take no more; first of all those that alone take more. What cannot be
        deleted stays. Returns their names. Raises OSError where the folder cannot be read.
        """
        files: dict[str, list[Entry]] = {}
        for each in self.entries():
            files.setdefault(each.name, []).append(each)
        sizes = {name: sum(each.num_bytes for each in mine) for name, mine in files.items()}
        left, gone = sum(sizes.values()), []
        order = sorted(files, key=lambda name: (sizes[name] <= most_bytes, max(each.used_at for each in files[name])))
        for name in order:
            if left <= most_bytes:
                break
            try:
                self._unlink(files[name])
            except OSError as error:
                logger.warning("obcache: file %s could not be deleted to make room: %s", name, error)
                continue
            gone.append(name)
            left -= sizes[name]
        return gone

    def clean(self) -> None:
        """Deletes what writers have left that did not live to finish. What cannot be deleted stays."""
        oldest = time.time() - ABANDONED_SECONDS
        with contextlib.suppress(OSError), os.scandir(self.path) as files:
            for file in files:
                if file.name.endswith(_PARTIAL) and file.name.startswith("."):
                    with contextlib.suppress(OSError):
                        if file.stat(follow_symlinks=False).st_mtime < oldest:
                            os.unlink(file.path)

    def _unlink(self, files: Iterable[Entry]) -> None:
        for each in files:
            self.path_of(each.name, each.rank, each.num_ranks).unlink(missing_ok=True)

    def _sync(self) -> None:
        """What was renamed or deleted stays so after a power cut."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def listed(folder: Folder, namespace: Namespace | None = None, only: str | None = None) -> list[dict[str, Any]]:
    """What the files of a folder say of themselves, JSON-safe, the one used last first; with `problem` for those that cannot be read.

    namespace: None for all. only: the name of the one that is asked for; others are not read.
    Raises ObcacheError for a folder that cannot be read.
    """
    found = []
    try:
        complete = folder.complete()
    except OSError as error:
        raise ObcacheError(f"The folder {folder.path} cannot be read: {error.strerror or error}.") from error
    wanted = [each for each in complete.items() if only in (None, each[0][0])]
    for (name, num_ranks), files in sorted(wanted, key=lambda each: -each[1][0].used_at):
        num_bytes = sum(each.num_bytes for each in files)
        try:
            with folder.reading(name, 0, num_ranks) as reader:
                if namespace is not None and not _is_in(folder, name, reader, namespace):
                    continue
                found.append(dict(describe(reader.head, name, num_bytes)))
        except (BadFile, OSError) as error:
            if namespace is None:
                found.append({"file": name, "bytes": num_bytes, "num_ranks": num_ranks, "problem": str(error)})
    return found


def _is_in(folder: Folder, name: str, reader: Reader, namespace: Namespace) -> bool:
    table = reader.table()
    return file_name(folder.key, reader.head, namespace, table.tokens, table.judges) == name


def _make_key(folder: Path) -> None:
    """The folder's key, where there is none. Raises OSError."""
    path = folder / KEY_FILE
    if path.exists():
        return
    partial = folder / f".{KEY_FILE}.{secrets.token_hex(8)}{_PARTIAL}"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOT_FOLLOWED, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # two servers at once: the first one's counts
            os.link(partial, path)
    finally:
        os.unlink(partial)


def _key_of(folder: Path) -> bytes:
    """The folder's key. Raises OSError, and ConfigError for one that is none."""
    path = folder / KEY_FILE
    descriptor = os.open(path, os.O_RDONLY | _NOT_FOLLOWED)
    with os.fdopen(descriptor, "rb") as file:
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{path} is not a key of {_KEY_BYTES} bytes: the files beside it cannot be found. Give another folder.")
    return key
