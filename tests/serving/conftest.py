"""Real servers for the tests of this folder. Each starts once, in half the time that it takes elsewhere: see preloaded.py."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server, free_port, running, serve

from .preloaded import preloaded

# The busy leak check runs every step, so that a slot lost or counted twice at any time ends the server.
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
COMMON = ("--dtype", "float32", "--sleep-on-idle", "--enable-cache-report")


def checked(server: Server) -> Iterator[Server]:
    """The server for its tests; afterwards it must have lost no slot and raised nothing."""
    yield server
    assert server.request("GET", "/health").status_code == 200
    log = server.log()
    assert not re.findall(r"leak|Traceback|panicked", log), log[-6000:]


def serving(model_dir: Path, folder: Path, flags: tuple[str, ...], env: dict[str, str] = STRICT) -> Iterator[Server]:
    """What a fixture yields from: a server, with its log in folder, that is `checked` at the end."""
    with serve(model_dir, folder / "log", flags, env) as running:
        yield from checked(running)


def pytest_configure(config: pytest.Config) -> None:
    """Each of several workers of pytest-xdist has processors of its own for its servers: a small model gains nothing from a second one."""
    worker, number = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    processors = sorted(os.sched_getaffinity(0))
    if worker and number <= len(processors):
        mine = processors[int(worker.removeprefix("gw")) :: number]
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", ",".join(map(str, mine)))


# They ask for `tight_server` or `stock_server`.
TOGETHER = (
    "test_auto",
    "test_client",
    "test_gates",
    "test_lifetimes",
    "test_marker_options",
    "test_named_contexts",
    "test_segments",
)


# Its few tests take long and ask for the server that each worker has.
SPREAD = "test_exactness"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file is one worker's, and those together are the same one's, so that their servers start once. With pytest 9.2 `loadgroup` groups nothing.

    Those with most tests come first, so that what is spread comes last: no worker waits for long while the other one ends.
    """
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            name = Path(file).stem
            return "together" if name in TOGETHER else nodeid if name == SPREAD else file

    return Together(config, log)


@contextlib.contextmanager
def routed(replicas: list[Server], folder: Path, flags: tuple[str, ...]) -> Iterator[Server]:
    """SGLang's router before the replicas, once it knows them; its log in folder."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--worker-urls", *(each.url for each in replicas), *flags]
    with running(command, port, folder / "router") as router:
        deadline = time.monotonic() + 60
        while len(router.get("/workers")["workers"]) < len(replicas):
            assert time.monotonic() < deadline, router.log()
            time.sleep(0.1)
        yield router


def deployed_router_flags() -> tuple[str, ...]:
    """What the image of launch/deploy gives the router, without host and port: tested is what is deployed."""
    text = (Path(__file__).parents[2] / "launch" / "deploy" / "router.Dockerfile").read_text(encoding="utf-8")
    command = json.loads(text.partition("ENTRYPOINT ")[2].replace("\\\n", ""))
    return tuple(command[command.index("--policy") :])


def other_models() -> list[str]:
    """Modules of SGLang's models beside that of the one that is served."""
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None and sglang.origin is not None
    return [file.stem for file in (Path(sglang.origin).parent / "srt" / "models").glob("*.py") if file.stem != "llama"]


@pytest.fixture(scope="session", autouse=True)
def started_in_half_the_time() -> Iterator[None]:
    """Whatever `serve` starts here."""
    with pytest.MonkeyPatch.context() as patched, preloaded():
        # A scheduler imports all models, whichever it serves: a seventh of its start.
        patched.setenv("SGLANG_DISABLED_MODEL_ARCHS", ",".join(other_models()))
        yield


@pytest.fixture(scope="session")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Compression on; page size 1, overlap scheduling, chunks of 512 tokens."""
    flags = (*COMMON, "--max-total-tokens", "16384", "--chunked-prefill-size", "512", "--enable-metrics")
    flags += ("--obcache", "--obcache-min-tokens", "32", "--obcache-compression-ratio", "0.5", "--obcache-method", "snapkv")
    flags += ("--obcache-head-profile", "auto", "--obcache-budget", "adakv", "--obcache-gates", "auto")
    yield from serving(model_dir, tmp_path_factory.mktemp("server"), flags)


@pytest.fixture(scope="session")
def tight_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Compression on in a pool of 1536 slots; page size 16, no overlap scheduling, chunks of 256 tokens, forced retractions."""
    flags = (*COMMON, "--max-total-tokens", "1536", "--chunked-prefill-size", "256", "--page-size", "16")
    flags += ("--disable-overlap-schedule", "--obcache", "--obcache-min-tokens", "32", "--obcache-method", "snapkv")
    flags += ("--obcache-gates", "smollm2-135m")
    env = {**STRICT, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
    yield from serving(model_dir, tmp_path_factory.mktemp("tight"), flags, env)


@pytest.fixture(scope="session")
def stock_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The package is installed, and compression was not asked for."""
    flags = (*COMMON, "--max-total-tokens", "16384", "--chunked-prefill-size", "512")
    yield from serving(model_dir, tmp_path_factory.mktemp("stock"), flags, {})
