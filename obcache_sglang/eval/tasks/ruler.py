"""RULER's synthetic tasks (arXiv 2404.06654) with its prompts and parameters: niah_*, vt, cwe, fwe.

As they were published in July 2024, with which the paper and KVPress's copy were made. What differs is in `DIFFERENCES`, and in the
report.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Iterable, Sequence

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval import prose
from obcache_sglang.eval.samples import Question, Sample
from obcache_sglang.eval.tasks.fit import NOISE, Request, fit, fitted, insert, line_haystack, noise, prose_haystack
from obcache_sglang.eval.tasks.words import ADJECTIVES, NOUNS, RANDOM, distinct

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
_NIAH_QUESTION = "What are all the special magic {kind} for {query} mentioned in the provided text? "
_NIAH_PREFIX = "The special magic {kind} for {query} mentioned in the provided text are"
_NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
NIAH_ONE_QUESTION = "What is the special magic {kind} for {query} mentioned in the provided text? "
NIAH_ONE_PREFIX = "The special magic {kind} for {query} mentioned in the provided text is"

_LENGTH = "lengths are those of the contexts alone"
_WORDS, _PROSE = (
    "its words are others",
    "its prose is Newton's Opticks instead of Paul Graham's essays, with needles at any depth",
)
DIFFERENCES = {
    "niah_single_1": (_WORDS, _LENGTH),
    "niah_single_2": (_PROSE, _WORDS, _LENGTH),
    "niah_single_3": (_PROSE, _WORDS, _LENGTH),
    "niah_multikey_1": (_PROSE, _WORDS, _LENGTH),
    "niah_multikey_2": (_WORDS, _LENGTH),
    "niah_multikey_3": (_LENGTH,),
    "niah_multivalue": (_PROSE, _WORDS, _LENGTH),
    "niah_multiquery": (_PROSE, _WORDS, _LENGTH),
    "vt": ("each sample has a worked example of its own", _LENGTH),
    "cwe": (_WORDS, _LENGTH),
    "fwe": (_LENGTH,),
}
"""Why the figures of these tasks are not RULER's."""


def niah(
    request: Request,
    *,
    haystack: str,
    key: str = "words",
    value: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_asked: int = 1,
) -> Sample:
    """RULER's needle in a haystack: all values of the asked keys must be given.

    haystack: "prose" (RULER's essays), "noise", or "needles" (of other keys). key, value: "words", "numbers" or "uuids".
    num_asked: keys that one question asks for. Further questions ask for further keys.
    """
    rng = request.rng("needles")
    num_questions = request.num_questions or 1
    keys = distinct(RANDOM[key], rng, max(num_keys, num_asked, num_questions))
    values = {each: [RANDOM[value](rng) for _ in range(num_values)] for each in keys}
    needles = [NEEDLE.format(kind=value, key=each, value=answer) for each in keys for answer in values[each]]
    rng.shuffle(needles)
    depths = [rng.random() for _ in needles]

    def distractors(number: int) -> list[str]:
        rng = request.rng("distractors")
        others = (other for other in iter(lambda: RANDOM[key](rng), None) if other not in values)
        return [NEEDLE.format(kind=value, key=other, value=RANDOM[value](rng)) for other in itertools.islice(others, number)]

    if haystack == "prose":
        build = prose_haystack(request, needles, depths)
    else:
        build = line_haystack((lambda lines: [NOISE] * lines) if haystack == "noise" else distractors, needles, depths)
    several = num_asked * num_values > 1
    kind = value if several else value.removesuffix("s")
    header = (_NIAH if several else _NIAH_ONE).format(kind=kind)
    context = fitted(request, lambda units, filler: f"{header}{build(units, filler)}\n")
    rng.shuffle(keys)
    questions = []
    for number in range(num_questions):
        asked = keys[number : number + num_asked]
        query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
        text = (_NIAH_QUESTION if several else NIAH_ONE_QUESTION).format(kind=kind, query=query)
        prefix = (_NIAH_PREFIX if several else NIAH_ONE_PREFIX).format(kind=kind, query=query)
        questions.append(Question(text, prefix, tuple(answer for each in asked for answer in values[each]), 128))
    return request.sample(context, questions, "string_match_all", DIFFERENCES[request.task])


_VT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_VT_QUESTION = "Question: Find all variables that are assigned the value {value} in the text above. "
_VT_PREFIX = (  # RULER's, with its slip
    "Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assgined the value {value}, "
    "they are: "
)
# RULER takes the worked example's prompt apart at its blanks, and loses line breaks and a word.
_VT_EXAMPLE = " Memorize and track the chain(s) of variable assignment hidden in the following text. "
_VT_EXAMPLE_QUESTION = " Question: Find all variables that are assigned the value {value} in the text "
_VT_HOPS = 4
# RULER puts as many noise lines into the worked example as bring it to 500 tokens: 10 or 15, depending on the tokenizer.
_VT_EXAMPLE_LINES = 10


def variable_tracking(request: Request) -> Sample:
    """RULER's variable tracking: one chain of five variables with one value, after a worked example."""
    rng = request.rng("chains")
    example_names, names = _variables(rng, 3), _variables(rng, 5)
    example_value, value = (str(number) for number in rng.sample(range(10000, 99999), 2))
    example_depths, depths = (sorted(rng.random() for _ in names) for _ in range(2))

    def text(names: Sequence[str], value: str, depths: Sequence[float], lines: int, filler: int = 0) -> str:
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
        lines_of_noise = [line + "\n" for line in [*noise(filler), *[NOISE] * lines]]
        return " ".join(insert(lines_of_noise, chain, depths))

    def prefix(value: str) -> str:
        return _VT_PREFIX.format(value=value, number=_VT_HOPS + 1)

    example = _VT_EXAMPLE + text(example_names, example_value, example_depths, _VT_EXAMPLE_LINES)
    example += f"{_VT_EXAMPLE_QUESTION.format(value=example_value)}{prefix(example_value)} {' '.join(example_names)}\n\n\n\n"
    context = fitted(request, lambda units, filler: f"{example}{_VT}{text(names, value, depths, units, filler)}\n", _VT_HOPS + 2)
    question = Question(_VT_QUESTION.format(value=value), prefix(value), tuple(names), 30)
    return request.sample(context, [question], "string_match_all", DIFFERENCES[request.task])


def _variables(rng: random.Random, length: int) -> list[str]:
    return distinct(lambda rng: "".join(rng.choices(string.ascii_uppercase, k=length)), rng, _VT_HOPS + 1)


_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{words}\n"
)
_CWE_QUESTION = "Question: What are the 10 most common words in the above list? "
_CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_CWE_COMMON = 10


def common_words(request: Request) -> Sample:
    """RULER's common words: ten words that stand more often than others in a list, after a worked example."""
    # Different words of the example, and how often common words and others stand, in the example and in the list.
    short = request.num_tokens < 4096
    num_example, example_often, example_seldom = (20, 3, 1) if short else (40, 10, 3)
    often, seldom = (6, 1) if short else (30, 3)
    pool = request.rng("words").sample(prose.vocabulary(), len(prose.vocabulary()))
    # Longer lists than Opticks has words for go on with pairs of words.
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    pool += request.rng("pairs").sample(pairs, len(pairs))

    def listing(words: list[str], often: int, seldom: int, part: str) -> str:
        items = [*words[:_CWE_COMMON] * often, *words[_CWE_COMMON:] * seldom]
        request.rng(part).shuffle(items)
        return _CWE.format(words=_numbered(items))

    def build(number: int) -> str:
        if number > len(pool):
            raise ConfigError(f"task cwe has no words for a context of {request.num_tokens} tokens: ask for 200,000 or fewer.")
        return example + listing(pool[:number], often, seldom, "order")

    example_words = request.rng("example").sample(prose.vocabulary(), num_example)
    example = listing(example_words, example_often, example_seldom, "example order")
    example += f"{_CWE_QUESTION}{_CWE_PREFIX}{_numbered(example_words[:_CWE_COMMON])}\n"  # no blank between them, as published
    context = build(fit(request, build, _CWE_COMMON + 1))
    question = Question(_CWE_QUESTION, _CWE_PREFIX, tuple(pool[:_CWE_COMMON]), 120)
    return request.sample(context, [question], "string_match_all", DIFFERENCES[request.task])


def _numbered(items: Iterable[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, 1))


_FWE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {words}\n"
)
_FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
)
_FWE_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_FWE_ZETA = math.pi**2 / 6  # of 2.0, RULER's exponent: the word of rank k stands in 1 / (k**2 * zeta(2)) of all places


def frequent_words(request: Request) -> Sample:
    """RULER's frequent words: the three most frequent words of a made-up text, whose most frequent one is dots."""
    rng = request.rng("words")
    number = max(4, request.num_tokens // 50)
    coded = ["...", *distinct(lambda rng: "".join(rng.choices(string.ascii_lowercase, k=6)), rng, number - 1)]

    def build(places: int, more_dots: int) -> str:
        items = ["..."] * more_dots
        items += [word for rank, word in enumerate(coded, 1) for _ in range(int(places / (rank**2 * _FWE_ZETA)))]
        request.rng("order").shuffle(items)
        return _FWE.format(words=" ".join(items))

    # From 60 places on, the third word stands more often than the next.
    context = fitted(request, build, 60)
    return request.sample(
        context, [Question(_FWE_QUESTION, _FWE_PREFIX, tuple(coded[1:4]), 50)], "string_match_all", DIFFERENCES[request.task]
    )
