"""Documents, questions and short ways to ask a server for the tests of this folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from obcache_sglang.local_server import Server

MARKER = "<|obcache|>"
NEW_TOKENS = 5
"""Of an answer, where nothing else is asked."""
QUESTIONS = ("\n\nIn short, this means that", "\n\nThe first rule above says", "\n\nFor example,")


@cache
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def document(model_dir: Path, num_tokens: int, topic: str = "assignment") -> list[int]:
    """The first tokens of a page of Python's own documentation: English prose that every Python brings."""
    ids = tokenizer(model_dir)(topics[topic] + topics["class"] + topics["exprlists"] + topics["customization"])["input_ids"]
    assert len(ids) >= num_tokens
    return ids[:num_tokens]


def question(model_dir: Path, text: str) -> list[int]:
    return tokenizer(model_dir)(text)["input_ids"]


def generate(
    server: Server,
    prompt: list[int] | str,
    *,
    obcache: Any = None,
    max_new_tokens: int = NEW_TOKENS,
    sampling_params: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """One greedy answer of /generate, with its meta_info."""
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens, **(sampling_params or {})}
    if obcache is not None:
        params["custom_params"] = {"obcache": obcache}
    prompt_field = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
    return server.post("/generate", {**prompt_field, "sampling_params": params, **fields})


def marker_id(server: Server) -> int:
    """The marker as a token, for prompts of token ids."""
    return server.get("/obcache/status")["marker_token_id"]


def ask_by_id(server: Server, context_id: str, asked: list[int], **fields: Any) -> dict[str, Any]:
    """The answer to a question about a context that is named, not sent: the marker stands where its text would."""
    return generate(server, [marker_id(server), *asked], obcache={"context_id": context_id}, **fields)


def generate_together(server: Server, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to requests (arguments of `generate`) that are sent at the same moment."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: generate(server, **request), requests))


def report(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["meta_info"]["obcache"]


def compressions(server: Server) -> int:
    """How many contexts the server has compressed so far."""
    return server.get("/obcache/status")["counters"]["compressions"]


def flush(server: Server) -> None:
    response = server.request("POST", "/flush_cache", params={"timeout": 120})
    assert response.status_code == 200, response.text
