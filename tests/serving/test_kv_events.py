"""A subscriber of SGLang's KV events, as Dynamo's and llm-d's routers are, knows which documents a server holds. On the real engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from sglang.srt.disaggregation.kv_events import KVEventBatch

from obcache_sglang.local_server import Server, serve
from tests.serving.client import document, flush, generate, question
from tests.serving.conftest import COMMON, STRICT, checked
from tests.unit.test_contexts import stored

L = 300


class Subscriber:
    """All events since it was made."""

    def __init__(self, port: int) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self._events: list[object] = []

    def blocks(self) -> list[int]:
        """The hashes of the blocks that the server holds, as far as it has said."""
        while self._socket.poll(500):
            self._events += self._decode(self._socket.recv_multipart()[-1]).events
        return list(stored(self._events))

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture(scope="module")
def server_and_subscriber(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Subscriber]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = json.dumps({"publisher": "zmq", "endpoint": f"tcp://*:{port}"})
    flags = (*COMMON, "--max-total-tokens", "900", "--kv-events-config", config, "--obcache", "--obcache-min-tokens", "32")
    with serve(model_dir, tmp_path_factory.mktemp("events") / "log", flags, STRICT) as running:
        subscriber = Subscriber(port)
        time.sleep(1)  # until the server knows of it
        for server in checked(running):
            yield server, subscriber
        subscriber.close()


def until(wanted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not wanted():
        assert time.monotonic() < deadline


@pytest.mark.long
def test_a_compressed_document_is_seen_as_its_own_text(server_and_subscriber: tuple[Server, Subscriber], model_dir: Path) -> None:
    server, subscriber = server_and_subscriber
    flush(server)
    text = document(model_dir, L)
    generate(server, text + question(model_dir, "\n\nIn short,"), obcache=False)
    until(lambda: len(subscriber.blocks()) >= L)
    exact = subscriber.blocks()[:L]
    flush(server)
    until(lambda: not subscriber.blocks())
    server.post("/obcache/compress", {"input_ids": text})
    generate(server, question(model_dir, "Hello"))  # events are published with the next step
    until(lambda: subscriber.blocks()[:L] == exact)
    # Other text needs the room.
    for topic in ("class", "types"):
        generate(server, document(model_dir, 800, topic), obcache=False)
    assert server.get("/obcache/contexts")["contexts"] == []
    until(lambda: not set(exact) & set(subscriber.blocks()))
