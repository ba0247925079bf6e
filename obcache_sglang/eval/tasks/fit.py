"""What tasks are made with: a request for a sample, and contexts of the right length."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval import prose
from obcache_sglang.eval.samples import Question, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRICT_TOKENS = 16
"""New tokens where the answer has to come first: enough for seven digits or a name."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NOISE_WORDS = NOISE.split()


@dataclass(frozen=True)
class Request:
    """What a task is asked to make. num_questions: None for the task's own number."""

    task: str
    tokenizer: PreTrainedTokenizerBase
    num_tokens: int
    seed: int
    index: int
    num_questions: int | None

    def rng(self, part: str) -> random.Random:
        """A generator for one part of the sample, so that parts do not depend on how often others drew."""
        # Seeding with a string goes through SHA-512: the same in every process and Python release.
        return random.Random(f"{self.seed}/{self.task}/{self.index}/{part}")

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def sample(self, context: str, questions: Iterable[Question], metric: str, differs: Sequence[str] = ()) -> Sample:
        """differs: why the task's figures are not those that are published under its name."""
        return Sample(self.task, self.index, context, tuple(questions), metric, not_comparable="; ".join(differs))


TaskFn = Callable[[Request], Sample]
Build = Callable[[int, int], str]  # a text of so many units and so many words of filler


def fit(request: Request, build: Callable[[int], str], minimum: int) -> int:
    """The most units with which the context that `build` makes of them has at most `num_tokens` tokens, or nearly so.

    build: with more units its texts get longer. minimum: units the context needs. Raises ConfigError when these are too many already.
    """
    target = request.num_tokens
    enough = target - target // 200
    least = request.count(build(minimum))
    if least > target:
        raise ConfigError(f"task {request.task} needs contexts of {least} tokens or more, not {target}: ask for longer ones.")
    low, low_tokens = minimum, least
    high, high_tokens = 0, 0  # the fewest units known to be too many; 0: none yet
    # The first step is short, to learn how long units are: some have one token, others eighty.
    step = target // 100
    while low_tokens < enough and high != low + 1:
        units = low + max(1, min(step, high - low - 1) if high else step)
        tokens = request.count(build(units))
        if tokens <= target:
            low, low_tokens = units, tokens
        else:
            high, high_tokens = units, tokens
        # Straight through the two nearest points that are known.
        span, rise = (high - low, high_tokens - low_tokens) if high else (low - minimum, low_tokens - least)
        step = (target - low_tokens) * span // max(1, rise)
    return low


def insert(units: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """`units` with needle i before the unit at depths[i], a fraction of all units."""
    result = list(units)
    for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
        result.insert(int(depth * (len(units) + 1)), needle)
    return result


def _prose_start(request: Request) -> int:
    """The word of :func:`prose.words` with which the sample's prose begins: within Opticks, far enough from its end if possible."""
    last = len(prose.opticks().split()) - request.num_tokens
    return request.rng("prose").randrange(max(1, last))


def _prose(start: int, num_words: int) -> list[str]:
    """The sentences of `num_words` words of prose; after the last word comes the first one again."""
    words = itertools.islice(itertools.cycle(prose.words()), start, start + num_words)
    return prose.sentences(" ".join(words)) if num_words else []


def prose_haystack(request: Request, needles: Sequence[str], depths: Sequence[float]) -> Build:
    """Makes texts of so many words of prose (filler are some more), with needles between its sentences."""
    start = _prose_start(request)
    return lambda units, filler: " ".join(insert(_prose(start, units + filler), needles, depths))


def line_haystack(lines: Callable[[int], list[str]], needles: Sequence[str], depths: Sequence[float]) -> Build:
    """Makes texts of `units` lines with needles between them, and before these a line of `filler` words of noise."""
    return lambda units, filler: "\n".join([*noise(filler), *insert(lines(units), needles, depths)])


def noise(num_words: int) -> list[str]:
    """A line of that many words of noise, or none: what brings a text of long lines to its length."""
    return [" ".join(itertools.islice(itertools.cycle(_NOISE_WORDS), num_words))] if num_words else []


def fitted(request: Request, build: Build, minimum: int = 1) -> str:
    """The context that `build` makes of as many units, and then as many words of filler, as fit."""
    units = fit(request, lambda number: build(number, 0), minimum)
    return build(units, fit(request, lambda filler: build(units, filler), 0))
