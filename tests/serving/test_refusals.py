"""What no client should send, and what it gets for it: an answer that says so, never an error of the server. On the real engine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obcache_sglang.local_server import Server
from tests.serving.client import document, flush


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/obcache/compress", b"[" * 100_000),
        ("/obcache/compress", b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"add_generation_prompt": false}}'),
        ("/generate", b'{"text": "x", "sampling_params": [{"max_new_tokens": 1}]}'),
        ("/generate", b'{"text": "x<|obcache|>y", "sampling_params": [{"max_new_tokens": 1}]}'),
    ],
    ids=["nested", "template", "list", "marked list"],
)  # fmt: skip
def test_malformed_requests_are_answered_with_400(server: Server, path: str, body: bytes) -> None:
    response = server.request("POST", path, data=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text


def test_a_compression_that_somebody_aborts_says_so(server: Server, model_dir: Path) -> None:
    flush(server)
    body: dict[str, Any] = {"input_ids": document(model_dir, 2009, "class"), "method": "replay", "replay_chunk": 200}
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(server.request, "POST", "/obcache/compress", json=body)
        deadline = time.monotonic() + 60
        while not server.get("/v1/loads")["loads"][0]["num_waiting_reqs"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.request("POST", "/abort_request", json={"rid": "", "abort_all": True}).status_code == 200
        response = future.result()
    assert response.status_code == 409, response.text
    assert "aborted" in response.text
