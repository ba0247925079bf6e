"""Which batches may run in CUDA graphs, and in whose. The graphs are stand-ins: they need a GPU, the decision does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from obcache_sglang.gpu import head_graphs
from obcache_sglang.gpu.triton_heads import TritonHeads
from obcache_sglang.scheduler import hooks, start_hooks
from obcache_sglang.scheduler.wiring import Wiring
from obcache_sglang.settings import SETTINGS_ENV, publish, settings_from_python

BATCH = object()


class Graphs:
    """`HeadGraphs` as the hooks see it."""

    def __init__(self, plan: Any, prepared: bool | Exception = True) -> None:
        self.plan = plan
        self.beside: Any = None
        self.other: Any = None
        self.runner = SimpleNamespace(execute=lambda batch, *args, **kwargs: ("ours", batch, args, kwargs))
        self._prepared = prepared

    def prepare(self, forward_batch: object) -> bool:
        if isinstance(self._prepared, Exception):
            raise self._prepared
        return self._prepared


class Runner:
    """One of SGLang's graph runners, of a model with our wiring or without."""

    def __init__(self, wiring: Wiring | None = None) -> None:
        self.model_runner = SimpleNamespace()
        if wiring is not None:
            wiring.hang_on(self.model_runner)


@pytest.fixture
def serve() -> Any:
    """Sets what this process has: a batch that is scored or has uneven contexts, and graphs or none."""

    def serve(*, scored: bool = False, uneven: bool = False, graphs: bool = False, prepared: bool | Exception = True) -> Any:
        plan = SimpleNamespace(is_scored=lambda batch: scored, uneven_contexts=lambda batch: [(0, object())] if uneven else [])
        ours = Graphs(plan, prepared) if graphs else None
        wiring = Wiring(plan, graphs=ours)
        if ours is not None:
            ours.beside, ours.other = Runner(wiring), Runner(wiring)
            ours.runner.model_runner = ours.beside.model_runner
        return ours if ours is not None else Runner(wiring)

    return serve


def can_run(runner: object, verdict: bool = True) -> bool:
    return hooks.around_can_run_graph(lambda runner, batch: verdict, runner, BATCH)


@pytest.mark.parametrize("verdict", [True, False])
def test_other_batches_are_sglangs_to_decide(serve: Any, verdict: bool) -> None:
    graphs = serve(graphs=True)
    assert can_run(graphs.beside, verdict) is verdict
    executed = hooks.around_execute_graph(lambda runner, batch, *args: ("stock", runner, batch, args), graphs.beside, BATCH, 1)
    assert executed == ("stock", graphs.beside, BATCH, (1,))


@pytest.mark.parametrize("batch", [{"scored": True}, {"uneven": True}])
def test_what_sglangs_graphs_cannot_do_runs_eagerly(serve: Any, batch: dict[str, bool]) -> None:
    assert not can_run(serve(**batch))


def test_a_draft_model_has_no_wiring() -> None:
    assert can_run(Runner())
    assert hooks.around_execute_graph(lambda runner, batch: "stock", Runner(), BATCH) == "stock"


def test_heads_of_different_length_run_in_our_graphs(serve: Any) -> None:
    graphs = serve(uneven=True, graphs=True)
    assert can_run(graphs.beside)
    stock = pytest.fail
    assert hooks.around_execute_graph(stock, graphs.beside, BATCH, pp_proxy_tensors=None) == (
        "ours",
        BATCH,
        (),
        {"pp_proxy_tensors": None},
    )
    # The runner of our graphs is of the same class, and passes through the same hook.
    assert hooks.around_execute_graph(lambda runner, batch: "replayed", graphs.runner, BATCH) == "replayed"


@pytest.mark.parametrize("prepared", [False, RuntimeError("no tables")])
def test_or_eagerly_where_these_cannot_either(serve: Any, prepared: bool | Exception) -> None:
    graphs = serve(uneven=True, graphs=True, prepared=prepared)
    assert not can_run(graphs.beside)
    assert not can_run(graphs.beside, verdict=False)
    assert not can_run(graphs.other), "prefill graphs"


@pytest.mark.parametrize(
    ("given", "sglang_captured", "captured", "told"),
    [
        ({"budget": "adakv"}, True, True, ""),
        ({"budget": "adakv"}, False, False, ""),
        ({"budget": "adakv", "decode_graphs": "off"}, True, False, "--obcache-decode-graphs on"),
        ({"budget": "adakv", "head_attention": "flashinfer"}, True, False, "--obcache-decode-graphs on"),
        ({"budget": "uniform"}, True, False, ""),
        ({"budget": "uniform", "decode_graphs": "on"}, True, True, ""),
        ({"budget": "uniform", "decode_graphs": "on"}, False, False, "SGLang captured no decode graphs"),
    ],
    ids=str,
)
def test_graphs_are_captured_where_they_are_wanted_and_their_lack_is_announced(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, str],
    sglang_captured: bool,
    captured: bool,
    told: str,
) -> None:
    made = []

    class Capturing:
        possible = staticmethod(lambda runner: runner.decode_cuda_graph_runner is not None)

        @classmethod
        def capture(cls, *arguments: object) -> None:
            made.append(arguments)

    class Heads(TritonHeads):
        def __init__(self) -> None:
            pass

    heads = Heads()
    monkeypatch.setattr(head_graphs, "HeadGraphs", Capturing)
    wiring = Wiring(SimpleNamespace(), SimpleNamespace(heads=heads))
    settings = settings_from_python(given)
    assert settings is not None
    monkeypatch.setenv(SETTINGS_ENV, "")  # to be taken back
    publish(settings)
    runner = SimpleNamespace(is_draft_worker=False, decode_cuda_graph_runner=object() if sglang_captured else None)
    wiring.hang_on(runner)
    start_hooks.after_init_cuda_graphs(None, runner)
    assert made == ([(wiring.plan, heads, runner)] if captured else [])
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(told) and told in "".join(warnings)
