"""The clients of the guide, unmodified and in an environment of their own: its lines run as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from obcache_sglang.bench.kvpress import ensure_environment
from obcache_sglang.local_server import Server, serve
from tests.serving.client import compressions, document, flush, tokenizer
from tests.serving.conftest import COMMON

pytestmark = pytest.mark.long

GUIDE = Path("obcache_sglang", "docs", "guide.md")
FOLDER = Path(".cache", "obcache_sglang")
L = 300


def environment(name: str, *packages: str) -> Path:
    """The bin folder of an environment with these packages: what clients depend on need not agree with SGLang's, nor with each other's."""
    return ensure_environment(FOLDER.absolute() / f"{name}-venv", packages).parent


@pytest.fixture(scope="module")
def clients() -> Path:
    return environment(
        "clients",
        "anthropic==2.14.0",
        "langchain-openai==1.7.4",
        "langchain-anthropic==1.7.10",
        "llama-index-llms-openai-like==0.8.1",
    )


@pytest.fixture(scope="module")
def lm_eval() -> Path:
    return environment("lm-eval", "lm-eval[api]==0.4.13", "transformers==5.24.0")


def section(name: str) -> str:
    """The first block of code under this heading of the guide."""
    found = re.search(rf"^### {re.escape(name)}$.*?^```\w+\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1]


def run(command: list[str | Path], folder: Path) -> str:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout + ran.stderr


@pytest.mark.parametrize("client", ["openai", "anthropic", "LangChain", "LangChain, Anthropic's API", "LlamaIndex"])
def test_the_guides_lines_compress_once_and_reuse(
    server: Server, clients: Path, model_dir: Path, tmp_path: Path, client: str
) -> None:
    flush(server)
    (tmp_path / "document.txt").write_text(tokenizer(model_dir).decode(document(model_dir, L, "types")), encoding="utf-8")
    (tmp_path / "client.py").write_text(section(client).replace("http://localhost:30000", server.url), encoding="utf-8")
    before = server.get("/obcache/status")["counters"]
    said = [run([clients / "python", "client.py"], tmp_path) for _ in range(2)]
    after = server.get("/obcache/status")["counters"]
    assert compressions(server) == before["compressions"] + 1
    assert after["reuses"] == before["reuses"] + 1
    assert all(each.strip() for each in said)
    assert "Warning" not in said[0]


def test_lm_evals_prompts_are_compressed_each_for_itself(lm_eval: Path, model_dir: Path, tmp_path: Path) -> None:
    """The guide's command, with a task of two questions in the place of one that is fetched from the Hub."""
    words = tokenizer(model_dir)
    rows = [
        {"question": words.decode(document(model_dir, 100, topic)) + "\n\nIn short:", "answer": "x"}
        for topic in ("class", "types")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "two_questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tmp_path / "two_questions.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    flags = (*COMMON, "--max-total-tokens", "4096", "--obcache", "--obcache-mode", "prompt", "--obcache-min-tokens", "32")
    with serve(model_dir, tmp_path / "log", flags) as server:
        command = (
            section("lm-eval")
            .replace("http://localhost:30000", server.url)
            .replace("model=MODEL", f"model={model_dir.absolute()}")
        )
        program, *arguments = command.replace("gsm8k", "two_questions").split()
        said = run([lm_eval / program, *arguments, "--include_path", "."], tmp_path)
        assert "two_questions" in said
        assert compressions(server) == len(rows)
