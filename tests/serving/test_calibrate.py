"""Gates that a real server makes of itself: those of `obcache_sglang.calibrate`, used at once and after a restart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from obcache_sglang import calibrate
from obcache_sglang.compress.calibration import DEFAULT_RATIOS, GATE_TOKENS
from obcache_sglang.compress.gates import GateFile
from obcache_sglang.local_server import Server, serve
from tests.serving.client import document, generate, question, report, tokenizer
from tests.serving.conftest import COMMON, STRICT, serving

pytestmark = pytest.mark.long  # minutes; what it takes and refuses: test_hostile_requests.py

FLAGS = (*COMMON, "--max-total-tokens", "16384", "--obcache", "--obcache-min-tokens", "32")
LENGTH = 180
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(model_dir: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without gates, chunks shorter than a replay's passes; no method is given."""
    env = {**STRICT, "XDG_CACHE_HOME": str(cache)}
    yield from serving(model_dir, tmp_path_factory.mktemp("calibrating"), (*FLAGS, "--chunked-prefill-size", "128"), env)


def texts_of(model_dir: Path, number: int = 5) -> list[str]:
    names = sorted(name for name, text in topics.items() if len(text) > 2000)[:number]
    return [tokenizer(model_dir).decode(document(model_dir, LENGTH, name)) for name in names]


def made_in_transformers(model_dir: Path, texts: list[str]) -> GateFile:
    arguments = {"ratios": DEFAULT_RATIOS, "max_tokens": GATE_TOKENS, "score": "obcache-v", "command": "", "with_gates": True}
    _, made = calibrate.calibrate(str(model_dir), texts, **arguments)
    assert made is not None
    return made


def state(server: Server) -> dict[str, Any]:
    return server.get("/obcache/calibrate")


def at_its_end(server: Server) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (now := state(server))["state"] not in ("done", "failed", "cancelled"):
        assert time.monotonic() < deadline, now
        time.sleep(0.2)
    return now


def assert_same(found: GateFile, wanted: GateFile) -> None:
    """Gates to 1e-3 of what they say about a token; measured: 1e-5 and less."""
    for one, other in (
        (found.gates.weights, wanted.gates.weights),
        (found.gates.bias, wanted.gates.bias),
        (found.r_squared, wanted.r_squared),
        (torch.tensor(found.profile.shares), torch.tensor(wanted.profile.shares)),
    ):
        assert float((one - other).norm() / other.norm()) < 1e-3
    assert (found.made["texts"], found.made["tokens"]) == (wanted.made["texts"], wanted.made["tokens"])


def ask(server: Server, model_dir: Path, topic: str, length: int = 300, **fields: Any) -> dict[str, Any]:
    wish = {"context_len": length, **fields.pop("obcache", {})}
    return generate(server, document(model_dir, length, topic) + question(model_dir, "\n\nSo"), obcache=wish, **fields)


def test_gates_are_those_of_calibrate_and_are_used_at_once(server: Server, model_dir: Path, cache: Path) -> None:
    refused = server.request("POST", "/obcache/compress", json={"input_ids": document(model_dir, 200), "method": "gate"})
    assert refused.status_code == 400 and "--obcache-gates" in refused.json()["error"]["message"]
    assert state(server)["default"] == {"method": "tova", "budget": "uniform"}
    texts = texts_of(model_dir)
    server.post("/obcache/calibrate", {"texts": texts})
    ended = at_its_end(server)
    assert ended["state"] == "done" and ended["scored"] == 5 and ended["skipped"] == {}, ended
    file = Path(ended["file"])
    assert file.parent == cache / "obcache_sglang" and [each.name for each in file.parent.iterdir()] == [file.name]
    found = GateFile.load(file)
    found.check_model(AutoConfig.from_pretrained(model_dir))
    assert ended["r_squared"]["mean"] == pytest.approx(float(found.r_squared.mean()))
    assert_same(found, made_in_transformers(model_dir, texts))
    # Nothing but ordinary cached text is left, and gates are the default.
    assert server.get("/obcache/contexts")["contexts"] == []
    assert ended["default"] == {"method": "gate", "budget": "profile"}
    assert report(ask(server, model_dir, "numbers"))["method"] == "gate"
    assert report(ask(server, model_dir, "numbers"))["status"] == "reused"
    assert server.get("/obcache/status")["settings"]["gates"] == str(file)


def test_contexts_of_a_tenant_are_never_read_and_former_gates_keep_nothing(server: Server, model_dir: Path) -> None:
    """After the test above: contexts were compressed with its gates."""
    names = sorted(name for name, text in topics.items() if len(text) > 3000)
    former = report(ask(server, model_dir, "numbers"))
    server.post("/obcache/calibrate", {"contexts": 5, "name": "of-contexts", "max_tokens": 128})
    for name in names[:6]:
        ask(server, model_dir, name, cache_salt="tenant")
        ask(server, model_dir, name, extra_key="tenant")
    time.sleep(3)
    now = state(server)
    assert (now["state"], now["scored"]) == ("collecting", 0), now
    for name in names[:5]:
        ask(server, model_dir, name)
    ended = at_its_end(server)
    assert (ended["state"], ended["scored"], ended["tokens"]) == ("done", 5, 5 * 128), ended
    assert Path(ended["file"]).name == "of-contexts.gates.safetensors"
    anew = report(ask(server, model_dir, "numbers"))
    assert (anew["status"], anew["context_id"]) == ("compressed", former["context_id"])


def test_with_serve_a_server_calibrates_itself_and_the_next_one_has_its_gates(model_dir: Path, tmp_path: Path) -> None:
    env = {**STRICT, "XDG_CACHE_HOME": str(tmp_path)}
    names = sorted(name for name, text in topics.items() if len(text) > 1500)[:42]
    with serve(model_dir, tmp_path / "log", (*FLAGS, "--obcache-calibrate", "serve"), env) as first:
        assert (state(first)["state"], state(first)["texts"]) == ("collecting", 40)
        assert report(ask(first, model_dir, names[0], 200))["method"] == "tova"
        for name in names[1:]:
            ask(first, model_dir, name, 200)
        ended = at_its_end(first)
        assert (ended["state"], ended["scored"]) == ("done", 40), ended
        assert report(ask(first, model_dir, names[0], 200))["method"] == "gate"
    with serve(model_dir, tmp_path / "log", (*FLAGS, "--obcache-calibrate", "serve"), env) as second:
        assert state(second)["state"] == "none"
        assert Path(second.get("/obcache/status")["settings"]["gates"]).parent == tmp_path / "obcache_sglang"
        assert report(ask(second, model_dir, names[0], 200))["method"] == "gate"


def test_three_ranks_make_the_same_gates(model_dir: Path, tmp_path: Path) -> None:
    texts = texts_of(model_dir)
    with serve(model_dir, tmp_path / "log", (*FLAGS, "--tp-size", "3"), {**STRICT, "XDG_CACHE_HOME": str(tmp_path)}) as server:
        server.post("/obcache/calibrate", {"texts": texts})
        ended = at_its_end(server)
        assert ended["state"] == "done", ended
        assert report(ask(server, model_dir, "numbers"))["method"] == "gate"
    assert_same(GateFile.load(ended["file"]), made_in_transformers(model_dir, texts))
