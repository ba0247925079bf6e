"""SGLang's server with faults that can be turned on and off while it runs:  python -m tests.serving.faulty <flags of the server>

The file that the environment variable `OBCACHE_TEST_FAULTS` names holds, line by line, dotted names of functions of ours; each raises
RuntimeError when it is called, in whatever process, `name@rank` in the process of that tensor-parallel rank only. `Faults` writes it.

A process that SGLang starts imports the main module of its parent again (multiprocessing's spawn), which is this one: so the functions
are replaced in all of them, before anything looks them up.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FAULTS_VARIABLE = "OBCACHE_TEST_FAULTS"
_PACKAGE = "obcache_sglang."

FAULTY = (
    "compress.compression.Compression.keep",
    "compress.compression.Compression.score",
    "scheduler.context_cache.ContextCache._lock",
    "scheduler.context_cache.ContextCache.delete",
    "scheduler.context_cache.ContextCache.drop_node",
    "scheduler.context_cache.ContextCache.is_resident",
    "scheduler.context_cache.ContextCache.obtain",
    "scheduler.context_cache.ContextCache.pin",
    "scheduler.context_cache.ContextCache.publish",
    "scheduler.context_cache.ContextCache.remember_suffix",
    "scheduler.context_cache.ContextCache.reserve",
    "scheduler.context_cache.ContextCache.sweep",
    "scheduler.context_cache.ContextCache.withdraw",
    "scheduler.control_calls.answer",
    "scheduler.engine_view.EngineView.admits_nobody",
    "scheduler.forward.ForwardPlan._plan",
    "scheduler.forward.ForwardPlan._scoring_rows",
    "scheduler.hooks.client_view",
    "scheduler.in_place.InPlace.advance",
    "scheduler.in_place.InPlace.start",
    "scheduler.jobs.Jobs._make",
    "scheduler.reservation.Reservation.give_back",
    "scheduler.jobs.Jobs.discard_orphans",
    "scheduler.jobs.Jobs.end",
    "scheduler.jobs.Jobs.end_dead",
    "scheduler.jobs.Jobs.end_unawaited",
    "scheduler.jobs.Jobs.give_engine_back",
    "scheduler.jobs.Jobs.is_alive",
    "scheduler.jobs.Jobs.is_awaited",
    "scheduler.jobs.Jobs.make",
    "scheduler.jobs.Jobs.release",
    "scheduler.jobs.Jobs.reserve",
    "scheduler.idle.WhenIdle.advance",
    "scheduler.manager.CompressionManager._decide",
    "scheduler.manager.CompressionManager._find_context",
    "scheduler.manager.CompressionManager._finish_without_forward",
    "scheduler.manager.CompressionManager._give_way_if_starved",
    "scheduler.manager.CompressionManager._resolve",
    "scheduler.manager.CompressionManager._serve_resident",
    "scheduler.manager.CompressionManager._start_job",
    "scheduler.manager.CompressionManager.advance_clock",
    "scheduler.manager.CompressionManager.before_release",
    "scheduler.manager.CompressionManager.create_request",
    "scheduler.manager.CompressionManager.queued",
    "scheduler.manager.CompressionManager.schedule",
    "scheduler.metrics.Metrics.set_gauges",
    "scheduler.requests.CompressionJob.reset",
    "scheduler.requests.ContextReq.report",
    "scheduler.requests.ContextReq.use_context",
    "scheduler.requests.ContextReq.use_real_ids",
    "scheduler.room.Room.begin_pass",
    "scheduler.room.Room.make",
    "scheduler.room.Room.must_wait",
    "scheduler.room.Room.pin",
    "scheduler.room.Room.readers",
)
"""Functions that can raise, below `obcache_sglang`: of the scheduler process, what its hooks call, and what these call.

Not here: `ForwardPlan.plan_forward`, which contains `_plan` and does no more than ask whether there is anything to plan; and `after_flush`, whose part that can fail is `set_gauges`."""

UNDER_PRESSURE = (
    "scheduler.manager.find_again",
    "scheduler.context_cache.ContextCache.replaced",
    "scheduler.in_place.InPlace._publish",
    "scheduler.pressure.UnderPressure._exact",
    "scheduler.pressure.UnderPressure._further",
    "scheduler.pressure.UnderPressure._plan",
    "scheduler.pressure.UnderPressure._take",
    "scheduler.pressure.UnderPressure.add",
    "scheduler.pressure.UnderPressure.begin_pass",
    "scheduler.pressure.UnderPressure.has_no_need",
    "scheduler.pressure.UnderPressure.relieve",
    "scheduler.pressure.UnderPressure.stays_exact",
    "scheduler.shared_prefixes.SharedPrefixes.boundary",
    "scheduler.tree.drop_branch",
    "scheduler.tree.exact_slots",
    "scheduler.tree.next_victims",
)
"""Likewise, of mode auto under pressure (`tests/serving/test_auto_soak.py`)."""

WHEN_CALM = (
    "scheduler.idle.WhenIdle._read",
    "scheduler.idle.WhenIdle._read_exactly",
    "scheduler.idle.WhenIdle.used",
    "scheduler.jobs.Jobs.make_measuring",
    "scheduler.pressure.UnderPressure.text_before",
)
"""Likewise, when nobody waits after pressure."""

IN_HOST_MEMORY = (
    "scheduler.context_cache.ContextCache.is_on_host",
    "scheduler.context_cache.ContextCache.returned",
    "scheduler.host_memory.HostMemory._begun",
    "scheduler.host_memory.HostMemory._located",
    "scheduler.host_memory.HostMemory.advance",
    "scheduler.host_memory.HostMemory.awaits",
    "scheduler.host_memory.HostMemory.bring",
    "scheduler.tree.place",
)
"""Likewise, with contexts in host memory (`tests/serving/test_host_memory.py`)."""

ALL = (*FAULTY, *UNDER_PRESSURE, *WHEN_CALM, *IN_HOST_MEMORY)


class Faults:
    """The control file, as the test writes it.

    Every fault that was raised leaves a line in a second file beside it, so that a test knows whether it happened.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.clear()

    @property
    def env(self) -> dict[str, str]:
        """For the server's processes."""
        return {FAULTS_VARIABLE: str(self.file)}

    def clear(self) -> None:
        self._write(())
        _raised_file(self.file).unlink(missing_ok=True)

    def raised(self) -> list[str]:
        """The names that were raised since the last `clear`, as they were given, once for each time."""
        file = _raised_file(self.file)
        return file.read_text().splitlines() if file.exists() else []

    @contextmanager
    def of(self, *names: str) -> Iterator[None]:
        """names: of `ALL`, with or without `@rank`."""
        unknown = [name for name in names if name.partition("@")[0] not in ALL]
        assert not unknown, unknown
        self.clear()
        self._write(names)
        try:
            yield
        finally:
            self._write(())

    def _write(self, names: tuple[str, ...]) -> None:
        # Renamed, so that nobody reads half of it.
        new = self.file.with_suffix(".new")
        new.write_text("".join(f"{name}\n" for name in names))
        new.replace(self.file)


def _raised_file(file: Path) -> Path:
    return file.with_suffix(".raised")


def _rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)


def _patch(name: str, file: Path) -> None:
    """Makes a function of ours raise while the file names it."""
    owner_name, _, attribute = (_PACKAGE + name).rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    static = inspect.getattr_static(owner, attribute)
    original: Callable[..., Any] = static.__func__ if isinstance(static, staticmethod) else static

    @functools.wraps(original)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        for wanted in file.read_text().splitlines():
            named, _, rank = wanted.partition("@")
            if named == name and (not rank or int(rank) == _rank()):
                with _raised_file(file).open("a") as raised:
                    raised.write(f"{wanted}\n")
                raise RuntimeError(f"injected into {name}")
        return original(*args, **kwargs)

    setattr(owner, attribute, staticmethod(faulty) if isinstance(static, staticmethod) else faulty)


def _patch_all() -> None:
    file = Path(os.environ[FAULTS_VARIABLE])
    for name in ALL:
        _patch(name, file)


if __name__ in ("__main__", "__mp_main__"):
    _patch_all()

if __name__ == "__main__":
    assert multiprocessing.parent_process() is None
    import runpy

    # Under another name than __main__, so that children go on importing this module.
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
