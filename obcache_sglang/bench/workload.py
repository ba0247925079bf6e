"""What the bench asks: documents with several questions each, which arrive interleaved."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pydoc_data.topics import topics
from typing import Any

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.prompts import Prompts
from obcache_sglang.eval.samples import Question, Sample
from obcache_sglang.eval.tasks import generate

_TASK = "facts"


@dataclass(frozen=True)
class Ask:
    """One question about one document.

    input_ids: of the whole prompt, whose first `context_len` are the document. ignore_eos: whether its answer has
    `question.max_new_tokens` tokens, whatever the model says.
    """

    document: int
    question: Question
    context_len: int
    input_ids: list[int]
    ignore_eos: bool = False


@dataclass(frozen=True)
class Workload:
    """Documents and all questions about them. asks: document by document; they arrive in the order of `order`.

    system_tokens: that all prompts begin with, before their documents; a part of each context.
    """

    samples: tuple[Sample, ...]
    asks: tuple[Ask, ...]
    seed: int
    system_tokens: int = 0

    def order(self, round_index: int) -> list[Ask]:
        """All questions in the order in which they arrive in a round: another one each round, the same for all arms."""
        asks = list(self.asks)
        random.Random(f"{self.seed}/{round_index}").shuffle(asks)
        return asks

    @cached_property
    def context_tokens(self) -> int:
        """KV slots that all documents need exactly; what all share is counted once."""
        alone = {ask.document: ask.context_len - self.system_tokens for ask in self.asks}
        return self.system_tokens + sum(alone.values())

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(ask.input_ids) + ask.question.max_new_tokens for ask in self.asks)

    @cached_property
    def digest(self) -> str:
        """Equal for equal prompts and orders."""
        asked = [[ask.input_ids for ask in self.asks], [ask.input_ids[-8:] for ask in self.order(0)]]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def make_workload(
    tokenizer: Any,
    *,
    documents: int,
    tokens: int,
    questions: int,
    seed: int,
    answer_tokens: int | None,
    ignore_eos: bool = False,
    system_tokens: int = 0,
) -> Workload:
    """`documents` documents of `tokens` tokens with `questions` questions each (task facts of the evaluation).

    tokenizer: a fast one of transformers. answer_tokens: the most tokens of an answer; None for the task's own number. ignore_eos:
    answers have so many. system_tokens: of Python's documentation, before each document.
    The same arguments give the same workload. Raises ConfigError for a length or number that cannot be had.
    """
    for name, value in (("documents", documents), ("tokens", tokens), ("questions", questions), ("answer-tokens", answer_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give 1 or more.")
    prompts = Prompts(tokenizer)
    system: list[int] = []
    if system_tokens:  # Python's documentation has some hundred thousand tokens
        text = "".join(topics[name] for name in sorted(topics))
        system = tokenizer.encode(text, add_special_tokens=False)[:system_tokens]
    if not 0 <= system_tokens == len(system):
        raise ConfigError(f"--system-tokens {system_tokens}: give 0 to {len(system)}.")
    samples, asks = [], []
    for index in range(documents):
        sample = generate(_TASK, tokenizer, tokens, seed, index, questions)
        if answer_tokens is not None:
            shorter = tuple(replace(question, max_new_tokens=answer_tokens) for question in sample.questions)
            sample = replace(sample, questions=shorter)
        samples.append(sample)
        for question, (context, rest) in zip(sample.questions, prompts.split(sample), strict=True):
            context = system + context
            asks.append(Ask(index, question, len(context), context + rest, ignore_eos))
    return Workload(tuple(samples), tuple(asks), seed, system_tokens)


def pool_size(workload: Workload, share: float, kept: float = 1.0) -> int:
    """KV slots that hold `share` of the documents exactly.

    kept: the share of a document's slots that it holds compressed, in the arm that keeps least. Raises ConfigError where the slots
    cannot hold a document to work on beside a compressed one.
    """
    slots, least = int(workload.context_tokens * share), least_pool(workload, kept)
    if slots < least:
        raise ConfigError(
            f"--pool-share {share:g} of {len(workload.samples)} documents is a pool of {slots} KV slots; compressing one needs room for "
            f"it and for what is kept of one, {least}: raise --pool-share or --documents."
        )
    return slots


def least_pool(workload: Workload, kept: float) -> int:
    """The fewest KV slots in which a document of `workload` can be compressed beside another; kept as in `pool_size`."""
    return math.ceil((1 + kept) * workload.longest)
