"""Continuation: prose, and what really follows it."""

from __future__ import annotations

import random
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval import prose
from obcache_sglang.eval.samples import Question, Sample
from obcache_sglang.eval.tasks.fit import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTINUATION_TOKENS = 127
"""Tokens of the held-out text of task continuation, after the context."""


def continuation(request: Request) -> Sample:
    """A stretch of prose, and its next CONTINUATION_TOKENS tokens as the question's text.

    Samples of one seed do not share text while Opticks, and then Python's language reference, have stretches left; after that
    they begin again, at other places.
    """
    order: list[tuple[str, array[int], int]] = []
    for text in (prose.opticks(), prose.topics()):
        ends = _token_ends(request.tokenizer, text)
        starts = _stretches(text, ends, request.num_tokens)
        random.Random(f"{request.seed}/{request.task}/{len(order)}").shuffle(starts)
        order += [(text, ends, start) for start in starts]
    if not order:
        raise ConfigError(f"task continuation has no {request.num_tokens} tokens of prose: ask for 100,000 or fewer.")
    text, ends, start = order[request.index % len(order)]
    if request.index >= len(order):
        start = _word_end(text, ends, request.rng("again").randrange(len(ends) - request.num_tokens - CONTINUATION_TOKENS))
    split = _word_end(text, ends, start + request.num_tokens)
    context = text[ends[start] : ends[split]].lstrip()
    rest = text[ends[split] : ends[split + CONTINUATION_TOKENS]]
    return request.sample(context, [Question(rest, "", (), 0)], "nll")


def _stretches(text: str, ends: array[int], num_tokens: int) -> list[int]:
    """Tokens after which contexts of `num_tokens` can begin, each followed by a continuation, without sharing text."""
    starts = []
    start = _word_end(text, ends, 0)
    while start + num_tokens + CONTINUATION_TOKENS < len(ends):
        starts.append(start)
        start = _word_end(text, ends, start + num_tokens) + CONTINUATION_TOKENS
        while start < len(ends) and not _ends_word(text, ends, start):
            start += 1
    return starts


@lru_cache(maxsize=4)
def _token_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> array[int]:
    """Where each token of `text` ends in it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return array("L", (end for _, end in encoded["offset_mapping"]))


def _word_end(text: str, ends: array[int], token: int) -> int:
    """`token`, or the nearest token before it that ends a word: text cut there has the same tokens on both sides."""
    while token > 0 and not _ends_word(text, ends, token):
        token -= 1
    return token


def _ends_word(text: str, ends: array[int], token: int) -> bool:
    return text[ends[token] : ends[token] + 1].isspace()
