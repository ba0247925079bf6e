"""Evaluation tasks that are generated offline, at any length, with the served model's tokenizer.

- needle_prose, needle_noise, needle_code, needle_two_keys: one short fact in a text, strictly scored; a small model answers them.
- RULER's synthetic tasks (arXiv 2404.06654) with its prompts and parameters: niah_*, vt, cwe, fwe; as they were published in July 2024,
  with which the paper and KVPress's copy were made. What differs from RULER is in `_RULER_DIFFERENCES`, and in the report.
- facts: a document with many facts, and a question about each: the shared context.
- continuation: prose, and what really follows it.

The same task, length, seed and index give the same sample, whatever else is generated.
"""

from __future__ import annotations

import itertools
import math
import random
import string
import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval import prose
from obcache_sglang.eval.samples import Question, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTINUATION_TOKENS = 127
"""Tokens of the held-out text of task continuation, behind the context."""

MAX_FACTS = 64
"""Questions that task facts can ask about one document."""


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

    def sample(self, context: str, questions: Iterable[Question], metric: str) -> Sample:
        differs = _RULER_DIFFERENCES.get(self.task, ())
        return Sample(self.task, self.index, context, tuple(questions), metric, not_comparable="; ".join(differs))


TaskFn = Callable[[Request], Sample]
_Build = Callable[[int, int], str]  # a text of so many units and so many words of filler


def _list(words: str) -> list[str]:
    return words.split()


def generate(
    task: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int, index: int, num_questions: int | None = None
) -> Sample:
    """Sample `index` of a task.

    tokenizer: a fast one of transformers. num_tokens: length of the context in its tokens, which is met within 1 % from 1,000 on.
    num_questions: questions about the one context, for tasks in MULTI_QUESTION_TASKS; default: 8 for facts, RULER's one for others.

    Raises ConfigError for an unknown task, or a length or number of questions that the task cannot have.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown: choose one of {', '.join(TASKS)}.")
    if num_questions is not None:
        if task not in MULTI_QUESTION_TASKS:
            allowed = ", ".join(sorted(MULTI_QUESTION_TASKS))
            raise ConfigError(f"task {task} asks one question of each context: leave num_questions out, or choose of {allowed}.")
        if num_questions < 1:
            raise ConfigError(f"num_questions={num_questions} is less than 1.")
    return TASKS[task](Request(task, tokenizer, num_tokens, seed, index, num_questions))


# --- contexts of the right length ---------------------------------------------------------------------------------------


def _fit(request: Request, build: Callable[[int], str], minimum: int) -> int:
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


def _insert(units: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
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
    """The sentences of `num_words` words of prose; behind the last word comes the first one again."""
    words = itertools.islice(itertools.cycle(prose.words()), start, start + num_words)
    return prose.sentences(" ".join(words)) if num_words else []


# --- needles in haystacks -----------------------------------------------------------------------------------------------

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_CODE = "The code for {key} is {value}."
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NOISE_WORDS = _NOISE.split()
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
_NIAH_ONE_QUESTION = "What is the special magic {kind} for {query} mentioned in the provided text? "
_NIAH_ONE_PREFIX = "The special magic {kind} for {query} mentioned in the provided text is"

_ADJECTIVES = _list(
    "able absent agile amused ancient arctic autumn bitter blank bold brave brief bright broken busy calm careful cheerful clever "
    "cloudy clumsy cold common cosy crisp curious damp daring dark deep distant dizzy dusty eager early elegant empty faint fancy "
    "fierce fluffy foggy fragile fresh frosty gentle giant glad golden grand grim handy happy harsh hasty heavy hidden hollow "
    "honest hungry icy jolly keen kind late lazy light lively lonely loud loyal lucky mellow mild misty modern narrow neat noble "
    "odd pale patient plain polite proud quaint quick quiet rapid rare rough royal rusty salty shaggy sharp shiny shy silent "
    "silver simple sleepy slow small smooth solid spare steady steep stern sturdy sunny swift tall tame tidy tiny vast warm wild"
)
_NOUNS = _list(
    "acorn anchor apple arrow badge barn basket beach bell bench berry bicycle blanket boat bottle bridge broom bucket button cabin "
    "camel candle canoe canyon carpet castle cellar chair chapel cherry chimney circle clock cloud coin comet copper cottage "
    "cradle crane curtain desk diamond dolphin donkey door dragon drum eagle engine falcon feather fence ferry field flute forest "
    "fountain fox garden gate glacier glove guitar hammer harbor hat hedge helmet hill island jacket jungle kettle kite ladder "
    "lake lamp lantern lemon library lion mango maple marble market meadow melon mirror monkey moon museum needle oasis ocean "
    "olive onion orchard otter owl paddle palace parrot pencil piano pigeon pillow planet pony puzzle rabbit river rocket saddle"
)

_STRICT_TOKENS = 16
"""New tokens where the answer has to come first: enough for seven digits or a name."""


def _random_word(rng: random.Random) -> str:
    return f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"


def _random_number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_RANDOM: dict[str, Callable[[random.Random], str]] = {"words": _random_word, "numbers": _random_number, "uuids": _random_uuid}


def _distinct(draw: Callable[[random.Random], str], rng: random.Random, number: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < number:
        drawn[draw(rng)] = None
    return list(drawn)


def _prose_haystack(request: Request, needles: Sequence[str], depths: Sequence[float]) -> _Build:
    """Makes texts of so many words of prose (filler are some more), with needles between its sentences."""
    start = _prose_start(request)
    return lambda units, filler: " ".join(_insert(_prose(start, units + filler), needles, depths))


def _line_haystack(lines: Callable[[int], list[str]], needles: Sequence[str], depths: Sequence[float]) -> _Build:
    """Makes texts of `units` lines with needles between them, and before these a line of `filler` words of noise."""
    return lambda units, filler: "\n".join([*_noise(filler), *_insert(lines(units), needles, depths)])


def _noise(num_words: int) -> list[str]:
    """A line of that many words of noise, or none: what brings a text of long lines to its length."""
    return [" ".join(itertools.islice(itertools.cycle(_NOISE_WORDS), num_words))] if num_words else []


def _fitted(request: Request, build: _Build, minimum: int = 1) -> str:
    """The context that `build` makes of as many units, and then as many words of filler, as fit."""
    units = _fit(request, lambda number: build(number, 0), minimum)
    return build(units, _fit(request, lambda filler: build(units, filler), 0))


def _needle(request: Request, *, haystack: str, code: bool = False, num_keys: int = 1) -> Sample:
    """One sentence with a number, at a random place among others; the answer must begin with the number.

    haystack: "prose" or "noise". code: four digits in plain words instead of RULER's seven. Of several keys, one is asked.
    """
    rng = request.rng("needles")
    keys = _distinct(_random_word, rng, num_keys)
    values = [str(rng.randint(1000, 9999)) if code else _random_number(rng) for _ in keys]
    needle = _CODE if code else _NEEDLE
    needles = [needle.format(kind="numbers", key=key, value=value) for key, value in zip(keys, values, strict=True)]
    depths = [rng.random() for _ in needles]
    if haystack == "prose":
        build = _prose_haystack(request, needles, depths)
    else:
        build = _line_haystack(lambda lines: [_NOISE] * lines, needles, depths)
    if code:
        # "in the provided text", as RULER says: without it a small model writes a program ("The code for x is: def ..."). Not in
        # the prefix: behind it the model says the whole sentence again.
        text, prefix = f"What is the code for {keys[0]} mentioned in the provided text? ", f"The code for {keys[0]} is"
    else:
        text = _NIAH_ONE_QUESTION.format(kind="number", query=keys[0])
        prefix = _NIAH_ONE_PREFIX.format(kind="number", query=keys[0])
    question = Question(text, prefix, (values[0],), _STRICT_TOKENS)
    return request.sample(_fitted(request, lambda units, filler: build(units, filler) + "\n\n"), [question], "starts_with")


def _niah(
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
    keys = _distinct(_RANDOM[key], rng, max(num_keys, num_asked, num_questions))
    values = {each: [_RANDOM[value](rng) for _ in range(num_values)] for each in keys}
    needles = [_NEEDLE.format(kind=value, key=each, value=answer) for each in keys for answer in values[each]]
    rng.shuffle(needles)
    depths = [rng.random() for _ in needles]

    def distractors(number: int) -> list[str]:
        rng = request.rng("distractors")
        others = (other for other in iter(lambda: _RANDOM[key](rng), None) if other not in values)
        return [_NEEDLE.format(kind=value, key=other, value=_RANDOM[value](rng)) for other in itertools.islice(others, number)]

    if haystack == "prose":
        build = _prose_haystack(request, needles, depths)
    else:
        build = _line_haystack((lambda lines: [_NOISE] * lines) if haystack == "noise" else distractors, needles, depths)
    several = num_asked * num_values > 1
    kind = value if several else value.removesuffix("s")
    header = (_NIAH if several else _NIAH_ONE).format(kind=kind)
    context = _fitted(request, lambda units, filler: f"{header}{build(units, filler)}\n")
    rng.shuffle(keys)
    questions = []
    for number in range(num_questions):
        asked = keys[number : number + num_asked]
        query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
        text = (_NIAH_QUESTION if several else _NIAH_ONE_QUESTION).format(kind=kind, query=query)
        prefix = (_NIAH_PREFIX if several else _NIAH_ONE_PREFIX).format(kind=kind, query=query)
        questions.append(Question(text, prefix, tuple(answer for each in asked for answer in values[each]), 128))
    return request.sample(context, questions, "string_match_all")


_LENGTH = "lengths are those of the contexts alone"
_WORDS, _PROSE = (
    "its words are others",
    "its prose is Newton's Opticks instead of Paul Graham's essays, with needles at any depth",
)
_RULER_DIFFERENCES = {
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


# --- RULER's other tasks ------------------------------------------------------------------------------------------------

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


def _variable_tracking(request: Request) -> Sample:
    """RULER's variable tracking: one chain of five variables with one value, behind a worked example."""
    rng = request.rng("chains")
    example_names, names = _variables(rng, 3), _variables(rng, 5)
    example_value, value = (str(number) for number in rng.sample(range(10000, 99999), 2))
    example_depths, depths = (sorted(rng.random() for _ in names) for _ in range(2))

    def text(names: Sequence[str], value: str, depths: Sequence[float], lines: int, filler: int = 0) -> str:
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
        noise = [line + "\n" for line in [*_noise(filler), *[_NOISE] * lines]]
        return " ".join(_insert(noise, chain, depths))

    def prefix(value: str) -> str:
        return _VT_PREFIX.format(value=value, number=_VT_HOPS + 1)

    example = _VT_EXAMPLE + text(example_names, example_value, example_depths, _VT_EXAMPLE_LINES)
    example += f"{_VT_EXAMPLE_QUESTION.format(value=example_value)}{prefix(example_value)} {' '.join(example_names)}\n\n\n\n"
    context = _fitted(request, lambda units, filler: f"{example}{_VT}{text(names, value, depths, units, filler)}\n", _VT_HOPS + 2)
    question = Question(_VT_QUESTION.format(value=value), prefix(value), tuple(names), 30)
    return request.sample(context, [question], "string_match_all")


def _variables(rng: random.Random, length: int) -> list[str]:
    return _distinct(lambda rng: "".join(rng.choices(string.ascii_uppercase, k=length)), rng, _VT_HOPS + 1)


_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{words}\n"
)
_CWE_QUESTION = "Question: What are the 10 most common words in the above list? "
_CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_CWE_COMMON = 10


def _common_words(request: Request) -> Sample:
    """RULER's common words: ten words that stand more often than others in a list, behind a worked example."""
    # Different words of the example, and how often common words and others stand, in the example and in the list.
    short = request.num_tokens < 4096
    num_example, example_often, example_seldom = (20, 3, 1) if short else (40, 10, 3)
    often, seldom = (6, 1) if short else (30, 3)
    pool = request.rng("words").sample(prose.vocabulary(), len(prose.vocabulary()))
    # Longer lists than Opticks has words for go on with pairs of words.
    pairs = [f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
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
    context = build(_fit(request, build, _CWE_COMMON + 1))
    question = Question(_CWE_QUESTION, _CWE_PREFIX, tuple(pool[:_CWE_COMMON]), 120)
    return request.sample(context, [question], "string_match_all")


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


def _frequent_words(request: Request) -> Sample:
    """RULER's frequent words: the three most frequent words of a made-up text, whose most frequent one is dots."""
    rng = request.rng("words")
    number = max(4, request.num_tokens // 50)
    coded = ["...", *_distinct(lambda rng: "".join(rng.choices(string.ascii_lowercase, k=6)), rng, number - 1)]

    def build(places: int, more_dots: int) -> str:
        items = ["..."] * more_dots
        items += [word for rank, word in enumerate(coded, 1) for _ in range(int(places / (rank**2 * _FWE_ZETA)))]
        request.rng("order").shuffle(items)
        return _FWE.format(words=" ".join(items))

    # From 60 places on, the third word stands more often than the next.
    context = _fitted(request, build, 60)
    return request.sample(context, [Question(_FWE_QUESTION, _FWE_PREFIX, tuple(coded[1:4]), 50)], "string_match_all")


# --- many questions about one document ----------------------------------------------------------------------------------

_FIRST_NAMES = _list(
    "Ada Albert Alice Anders Bella Bruno Carla Conrad Daphne Dexter Edith Emil Fiona Frank Gemma Gustav Hanna Hector Ingrid Isaac "
    "Jonas Julia Karin Kaspar Laura Leopold Maud Milo Nadia Nils Olga Oscar Paula Pedro Rosa Rupert Selma Silas Thea Victor"
)
_LAST_NAMES = _list(
    "Abbott Baxter Brenner Carver Dalton Draper Ekdahl Farrow Fletcher Garland Hale Holloway Ingram Jensen Keller Lindqvist Marlow "
    "Mercer Norwood Olsen Pemberton Quinn Radley Sanders Thorne Underhill Vance Whitaker Yates Zimmer"
)
_PLACES = _list(
    "Alderbrook Ashford Birchwood Blackpool Brighton Canterbury Castleton Clearwater Dover Eastham Elmwood Fairview Glenwood "
    "Greenwich Hampton Harlow Highgate Kingsbridge Lakewood Lancaster Maplewood Marlborough Milton Newport Northfield Oakdale Oxford "
    "Plymouth Preston Redhill Richmond Riverside Rockford Salisbury Sheffield Somerset Stafford Stratford Sutton Walton Warwick "
    "Westbrook Weston Windsor Winslow Woodstock Worcester York"
)
# (question, beginning of the sentence that answers it, what the answer is) about a {person} or a {place}.
_FACTS = (
    ("Where was {person} born?", "{person} was born in", "place"),
    ("Which instrument does {person} play?", "{person} plays the", "instrument"),
    ("How old is {person}?", "The age of {person} is", "number"),
    ("What colour is the door of {person}'s house?", "The door of {person}'s house is painted", "colour"),
    ("What is {person}'s dog called?", "{person}'s dog is called", "pet"),
    ("Who is the mayor of {place}?", "The mayor of {place} is", "person"),
    ("When was the bridge of {place} built?", "The bridge of {place} was built in the year", "year"),
    ("How many ships lie in the harbour of {place}?", "The number of ships in the harbour of {place} is", "number"),
)
_ANSWERS = {
    "place": _PLACES,
    "instrument": ["violin", "cello", "flute", "piano", "trumpet", "harp", "guitar", "drums", "clarinet", "organ"],
    "number": [str(number) for number in range(20, 90)],
    "colour": ["red", "blue", "green", "yellow", "white", "black", "orange", "purple", "brown", "grey"],
    "pet": ["Biscuit", "Pepper", "Rusty", "Daisy", "Bruno", "Ginger", "Shadow", "Lucky", "Buddy", "Coco", "Max", "Molly"],
    "person": [f"{first} {last}" for first in _FIRST_NAMES for last in _LAST_NAMES],
    "year": [str(year) for year in range(1710, 1990)],
}


def _facts(request: Request) -> Sample:
    """Prose with facts about people and places spread evenly through it, and a question about each.

    A subject has one fact. An answer must begin as the document says it.
    """
    number = 8 if request.num_questions is None else request.num_questions
    if number > MAX_FACTS:
        raise ConfigError(f"task facts has up to {MAX_FACTS} questions for one document, not {number}.")
    rng = request.rng("facts")
    kinds = list(itertools.islice(itertools.cycle(rng.sample(_FACTS, len(_FACTS))), number))
    people, places = iter(rng.sample(_ANSWERS["person"], number)), iter(rng.sample(_PLACES, min(number, len(_PLACES))))
    facts, questions = [], []
    for asked, begins, kind in kinds:
        subject = {"person": next(people)} if "{person}" in begins else {"place": next(places)}
        begins = begins.format(**subject)
        answer = rng.choice([each for each in _ANSWERS[kind] if each not in begins])
        facts.append(f"{begins} {answer}.")
        questions.append(Question(f"{asked.format(**subject)} ", begins, (answer,), _STRICT_TOKENS))
    # One in each part of the document, at a random place in it.
    depths = [(part + rng.random()) / number for part in range(number)]
    build = _prose_haystack(request, facts, depths)
    rng.shuffle(questions)
    return request.sample(_fitted(request, lambda units, filler: build(units, filler) + "\n\n"), questions, "starts_with")


# --- continuation -------------------------------------------------------------------------------------------------------


def _continuation(request: Request) -> Sample:
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
    """Tokens behind which contexts of `num_tokens` can begin, each followed by a continuation, without sharing text."""
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


TASKS: dict[str, TaskFn] = {
    "needle_prose": partial(_needle, haystack="prose"),
    "needle_noise": partial(_needle, haystack="noise"),
    "needle_code": partial(_needle, haystack="prose", code=True),
    "needle_two_keys": partial(_needle, haystack="prose", num_keys=2),
    "niah_single_1": partial(_niah, haystack="noise"),
    "niah_single_2": partial(_niah, haystack="prose"),
    "niah_single_3": partial(_niah, haystack="prose", value="uuids"),
    "niah_multikey_1": partial(_niah, haystack="prose", num_keys=4),
    "niah_multikey_2": partial(_niah, haystack="needles"),
    "niah_multikey_3": partial(_niah, haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": partial(_niah, haystack="prose", num_values=4),
    "niah_multiquery": partial(_niah, haystack="prose", num_asked=4),
    "vt": _variable_tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
    "facts": _facts,
    "continuation": _continuation,
}
"""The tasks by name."""

MULTI_QUESTION_TASKS = frozenset({"facts", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"})
"""Tasks that can ask several questions about one context."""
