"""What is re-read behind a context."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from obcache_sglang.compress.replay import ReplayPass, ReplayPrompts
from obcache_sglang.kv.context import ContextState
from obcache_sglang.scheduler.manager import CompressionManager
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq

ASK = "\n\nRepeat the previous context exactly."
ASK_LATER = "\n\nRepeat the part of the previous context exactly, starting with"


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> array[int]:
    return array("q", tokenizer.encode(text, add_special_tokens=False))


def test_a_chat_context_is_repeated_as_the_assistants_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The first rule. The second rule. The third rule."
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
    before, after = prompt.split(text)
    context = tokens(tokenizer, before + text)
    (only,) = ReplayPrompts(tokenizer).passes(context, 2048)
    assert tokenizer.decode(only.tokens) == ASK + after + text
    assert (only.first, only.last) == (len(tokens(tokenizer, before)), len(context))


@pytest.mark.parametrize(("length", "chunk"), [(1, 5), (5, 5), (6, 5), (23, 5), (40, 13)])
def test_passes_cover_a_context_once(tokenizer: PreTrainedTokenizerBase, length: int, chunk: int) -> None:
    context = array("q", range(1000, 1000 + length))
    prompts = ReplayPrompts(tokenizer)
    passes = prompts.passes(context, chunk)
    assert [position for each in passes for position in range(each.first, each.last)] == list(range(length))
    assert all(each.last - each.first <= chunk for each in passes)
    assert all(each.tokens[-(each.last - each.first) :] == context[each.first : each.last] for each in passes)
    assert all(len(each.tokens) <= chunk + prompts.num_tokens for each in passes)
    assert tokenizer.decode(passes[0].tokens).startswith(ASK)
    for each in passes[1:]:
        lead = tokens(tokenizer, ASK_LATER) + context[max(0, each.first - 8) : each.first]
        assert each.tokens[: len(lead)] == lead


def test_a_model_without_a_chat_template(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = None
    (only,) = ReplayPrompts(tokenizer).passes(tokens(tokenizer, "One. Two."), 2048)
    assert tokenizer.decode(only.tokens) == ASK + "\nOne. Two."


@pytest.mark.parametrize("awaited", ["", "a question", "POST /obcache/compress"])
def test_passes_go_on_only_while_somebody_waits(awaited: str) -> None:
    """A client may leave while a pass runs, when there is no job in the queue that its abort could end."""
    context = SimpleNamespace(state=ContextState.COMPRESSING, id="0f")
    job = CompressionJob.__new__(CompressionJob)
    job.context, job.error, job.pass_started_at, job.unattended = context, None, 0.0, awaited == "POST /obcache/compress"
    job.replay, job.passes = ReplayPass(array("q", [1]), 0, 1), [ReplayPass(array("q", [1]), 1, 2)]
    context.is_queued = True
    question = ContextReq.__new__(ContextReq)
    question.context = context
    # A manager without an engine: what `end_job` reads.
    manager = CompressionManager.__new__(CompressionManager)
    waiting = [question] if awaited == "a question" else []
    manager.scheduler = SimpleNamespace(
        waiting_queue=waiting,
        grammar_manager=SimpleNamespace(grammar_queue=[]),
        flush_wrapper=SimpleNamespace(_pending=None),
    )
    manager._jobs, manager._late = {"0f": job}, None
    manager.metrics = SimpleNamespace(replayed=lambda tokens, seconds: None)
    manager.agree = lambda verdict: verdict
    withdrawn: list[object] = []
    manager.cache = SimpleNamespace(withdraw=withdrawn.append)
    manager._queue_job = lambda of, before: "the next pass"
    manager.end_job(job, completed=True)
    if awaited:
        assert manager.scheduler.waiting_queue[0] == "the next pass" and not withdrawn
    else:
        assert withdrawn == [context] and not manager.scheduler.waiting_queue
