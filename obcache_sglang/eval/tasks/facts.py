"""Facts: a document with many facts, and a question about each: the shared context."""

from __future__ import annotations

import itertools

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.samples import Question, Sample
from obcache_sglang.eval.tasks.fit import STRICT_TOKENS, Request, fitted, prose_haystack
from obcache_sglang.eval.tasks.words import FIRST_NAMES, LAST_NAMES, PLACES

MAX_FACTS = 64
"""Questions that task facts can ask about one document."""

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
    "place": PLACES,
    "instrument": ["violin", "cello", "flute", "piano", "trumpet", "harp", "guitar", "drums", "clarinet", "organ"],
    "number": [str(number) for number in range(20, 90)],
    "colour": ["red", "blue", "green", "yellow", "white", "black", "orange", "purple", "brown", "grey"],
    "pet": ["Biscuit", "Pepper", "Rusty", "Daisy", "Bruno", "Ginger", "Shadow", "Lucky", "Buddy", "Coco", "Max", "Molly"],
    "person": [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES],
    "year": [str(year) for year in range(1710, 1990)],
}


def facts(request: Request) -> Sample:
    """Prose with facts about people and places spread evenly through it, and a question about each.

    A subject has one fact. An answer must begin as the document says it.
    """
    number = 8 if request.num_questions is None else request.num_questions
    if number > MAX_FACTS:
        raise ConfigError(f"task facts has up to {MAX_FACTS} questions for one document, not {number}.")
    rng = request.rng("facts")
    kinds = list(itertools.islice(itertools.cycle(rng.sample(_FACTS, len(_FACTS))), number))
    people, places = iter(rng.sample(_ANSWERS["person"], number)), iter(rng.sample(PLACES, min(number, len(PLACES))))
    sentences, questions = [], []
    for asked, begins, kind in kinds:
        subject = {"person": next(people)} if "{person}" in begins else {"place": next(places)}
        begins = begins.format(**subject)
        answer = rng.choice([each for each in _ANSWERS[kind] if each not in begins])
        sentences.append(f"{begins} {answer}.")
        questions.append(Question(f"{asked.format(**subject)} ", begins, (answer,), STRICT_TOKENS))
    # One in each part of the document, at a random place in it.
    depths = [(part + rng.random()) / number for part in range(number)]
    build = prose_haystack(request, sentences, depths)
    rng.shuffle(questions)
    return request.sample(fitted(request, lambda units, filler: build(units, filler) + "\n\n"), questions, "starts_with")
