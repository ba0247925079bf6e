"""What is re-read behind a context."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from obcache_sglang.compress.replay import ReplayPrompts

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


@pytest.mark.parametrize(
    ("length", "chunk", "page_size", "ends"),
    [
        (600, 256, 1, [256, 512, 600]),
        (640, 256, 64, [256, 512, 640]),
        (640, 100, 64, [64, 128, 192, 256, 320, 384, 448, 512, 576, 640]),
    ],
)
def test_local_passes_stand_after_whole_pages(
    tokenizer: PreTrainedTokenizerBase, length: int, chunk: int, page_size: int, ends: list[int]
) -> None:
    context = array("q", range(1000, 1000 + length))
    passes = ReplayPrompts(tokenizer).passes(context, chunk, local=True, page_size=page_size)
    assert [each.num_before(length) for each in passes] == [each.last for each in passes] == ends
    assert [each.first for each in passes] == [0, *ends[:-1]]
    assert [each.first_seen for each in passes] == [max(0, each.first - 64) for each in passes]
    assert [each.num_sinks for each in passes] == [min(8, each.first_seen) for each in passes]


def test_a_local_pass_after_a_chat_templates_words_ends_with_a_page_too(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = ReplayPrompts(tokenizer)
    context = prompts.before + array("q", range(1000, 1000 + 320 - len(prompts.before)))
    passes = prompts.passes(context, 100, local=True, page_size=64)
    assert (passes[0].first, [each.last for each in passes]) == (len(prompts.before), [64, 128, 192, 256, 320])
    assert [each.tokens for each in prompts.passes(context, 100, local=True)] == [
        each.tokens for each in prompts.passes(context, 100)
    ]


def test_a_model_without_a_chat_template(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = None
    (only,) = ReplayPrompts(tokenizer).passes(tokens(tokenizer, "One. Two."), 2048)
    assert tokenizer.decode(only.tokens) == ASK + "\nOne. Two."
