"""The package's own client, on the real engine."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from obcache_sglang.client import Answer, AsyncClient, Client, ServerError
from obcache_sglang.local_server import Server
from tests.serving.client import QUESTIONS, compressions, document, tokenizer

GUIDE = Path("obcache_sglang", "docs", "guide.md")
L = 300


@pytest.fixture
def text(model_dir: Path, request: pytest.FixtureRequest) -> str:
    """A document that only this test asks about."""
    return f"{request.node.name}. " + tokenizer(model_dir).decode(document(model_dir, L, "types"))


def statuses(answers: list[Answer]) -> list[str]:
    return [answer.report["status"] for answer in answers]


@pytest.mark.parametrize("chat", [True, False])
def test_the_first_question_compresses_and_all_others_reuse(server: Server, text: str, chat: bool) -> None:
    with Client(server.url) as client:
        first = client.ask(text, QUESTIONS[0], chat=chat, max_new_tokens=4, temperature=0)
        others = client.ask(text, QUESTIONS, chat=chat, max_new_tokens=4, temperature=0)
    assert statuses([first, *others]) == ["compressed", "reused", "reused", "reused"]
    assert others[0].text == first.text != ""
    assert others[0].report["context_id"] == first.report["context_id"]
    assert first.report["context_tokens"] * 0.4 < first.report["kept_tokens"] < first.report["context_tokens"] * 0.6
    generated = [answer.response["usage" if chat else "meta_info"]["completion_tokens"] for answer in others]
    assert max(generated) <= 4


def test_a_list_about_a_new_context_compresses_it_once(server: Server, text: str) -> None:
    before = compressions(server)
    with Client(server.url) as client:
        answers = client.ask(text, [*QUESTIONS], max_new_tokens=4)
    assert sorted(statuses(answers)) == ["compressed", "reused", "reused"]
    assert compressions(server) == before + 1


def test_the_async_client_shares_contexts_with_the_other(server: Server, text: str) -> None:
    async def ask() -> list[Answer]:
        async with AsyncClient(server.url) as client:
            first = await client.ask(text, QUESTIONS[0], max_new_tokens=4, temperature=0)
            return [first, *await client.ask(text, QUESTIONS, max_new_tokens=4, temperature=0)]

    answers = asyncio.run(ask())
    assert statuses(answers) == ["compressed", "reused", "reused", "reused"]
    assert answers[1].text == answers[0].text
    with Client(server.url) as client:
        assert client.ask(text, QUESTIONS[0], max_new_tokens=4, temperature=0).report["status"] == "reused"


def test_settings_and_tenants_have_contexts_of_their_own(server: Server, text: str) -> None:
    with Client(server.url) as client:
        client.ask(text, QUESTIONS[0], max_new_tokens=1)
        own = client.ask(text, QUESTIONS[0], max_new_tokens=1, compression_ratio=0.7, method="tova", ttl_seconds=60, pin=True)
        salted = [client.ask(text, QUESTIONS[0], max_new_tokens=1, cache_salt=salt) for salt in ("mine", "mine", "yours")]
    assert (own.report["status"], own.report["method"]) == ("compressed", "tova")
    assert (own.report["compression_ratio"], own.report["pinned"]) == (0.7, True)
    assert statuses(salted) == ["compressed", "reused", "compressed"]


def test_nothing_is_removed_at_ratio_0(server: Server, text: str) -> None:
    """What the client's user compares with."""
    with Client(server.url) as client:
        report = client.ask(text, QUESTIONS[0], max_new_tokens=1, compression_ratio=0.0).report
    assert report["kept_tokens"] == report["context_tokens"]


def test_a_short_context_is_served_exactly_and_says_why(server: Server) -> None:
    with Client(server.url) as client:
        report = client.ask("Short.", "What is it?", max_new_tokens=1, chat=False).report
    assert (report["status"], report["reason"]) == ("exact", "below_min_tokens")


@pytest.mark.parametrize("chat", [True, False])
def test_what_the_server_refuses_comes_in_its_words(server: Server, text: str, chat: bool) -> None:
    with Client(server.url) as client:
        with pytest.raises(ServerError, match=r"compression_ratio.*=1.5 is outside \[0, 1\)") as raised:
            client.ask(text, QUESTIONS, chat=chat, compression_ratio=1.5)
        assert raised.value.status_code == 400
        with pytest.raises(ServerError, match="top_p") as raised:
            client.ask(text, "Q", chat=chat, top_p=2)
        assert raised.value.status_code == 400


def test_a_server_that_does_not_compress_is_no_surprise(stock_server: Server, text: str) -> None:
    with Client(stock_server.url) as client, pytest.raises(ServerError, match="started without --obcache") as raised:
        client.ask(text, "Q")
    assert raised.value.status_code == 400
    # A marker that it does not know, as SGLang without this package knows none: it answers.
    for chat in (True, False):
        with Client(stock_server.url, marker="<end>") as client, pytest.raises(ServerError, match="has no report") as raised:
            client.ask(text, "Q", chat=chat, max_new_tokens=1)
        assert raised.value.status_code == 200


def test_the_lines_of_readme_and_guide_run(server: Server, text: str, tmp_path: Path) -> None:
    section = re.search(r"^### Python$.*?^### ", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert section is not None
    pages = Path("README.md").read_text(encoding="utf-8") + section[0]
    programs = [
        code for code in re.findall(r"^```python\n(.*?)^```$", pages, re.MULTILINE | re.DOTALL) if "obcache_sglang.client" in code
    ]
    assert len(programs) == 3
    (tmp_path / "document.txt").write_text(text, encoding="utf-8")
    before = compressions(server)
    short = "import obcache_sglang.client as module; module.MAX_NEW_TOKENS = 4\n"
    said = []
    for program in programs:
        command = [sys.executable, "-c", short + program.replace("http://localhost:30000", server.url)]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")
        said.append(ran.stdout)
    assert "'status': 'compressed'" in said[0]
    assert "'status': 'reused'" in said[1]
    assert compressions(server) == before + 1
