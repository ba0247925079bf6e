"""A scheduling pass, on a manager without an engine: when pins yield."""

from types import SimpleNamespace

import pytest

from obcache_sglang.scheduler.manager import CompressionManager
from obcache_sglang.scheduler.requests import ContextReq


class Pins(list):
    """A ContextCache of which only the pins matter."""

    def unpin(self, context: SimpleNamespace) -> None:
        context.pinned = False


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> CompressionManager:
    manager = CompressionManager.__new__(CompressionManager)
    manager.scheduler = SimpleNamespace(waiting_queue=[])
    manager.metrics = SimpleNamespace(pass_decided=lambda seconds: None)
    manager.cache = Pins([SimpleNamespace(id="pinned", pinned=True)])
    monkeypatch.setattr(CompressionManager, "_decide", lambda self: (self.scheduler.waiting_queue, self.scheduler.waiting_queue))
    monkeypatch.setattr(CompressionManager, "_admits_nobody", lambda self: False)
    monkeypatch.setattr(CompressionManager, "_make_room", lambda self, num_slots: None)
    manager.tight_slots = 0
    return manager


NOTHING_RUNS = SimpleNamespace(is_empty=lambda: True)


def test_pins_yield_to_a_request_that_does_not_fit(manager: CompressionManager) -> None:
    manager.scheduler.waiting_queue = [object.__new__(ContextReq)]
    manager.schedule(lambda **kwargs: (None, NOTHING_RUNS), NOTHING_RUNS)
    assert not manager.cache[0].pinned


def test_pins_do_not_yield_to_a_request_that_came_during_the_pass(manager: CompressionManager) -> None:
    """So does one whose grammar became ready: it is asked to run in the next pass."""
    late = object.__new__(ContextReq)

    def pick(**kwargs: object) -> tuple[None, SimpleNamespace]:
        manager.scheduler.waiting_queue.append(late)
        manager.queued(late)
        return None, NOTHING_RUNS

    manager.schedule(pick, NOTHING_RUNS)
    assert manager.scheduler.waiting_queue == [late]
    assert manager.cache[0].pinned
