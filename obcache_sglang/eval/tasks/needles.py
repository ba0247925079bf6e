"""Needles: one short fact in a text, strictly scored; a small model answers them."""

from __future__ import annotations

from obcache_sglang.eval.samples import Question, Sample
from obcache_sglang.eval.tasks.fit import NOISE, STRICT_TOKENS, Request, fitted, line_haystack, prose_haystack
from obcache_sglang.eval.tasks.ruler import NEEDLE, NIAH_ONE_PREFIX, NIAH_ONE_QUESTION
from obcache_sglang.eval.tasks.words import distinct, random_number, random_word

_CODE = "The code for {key} is {value}."


def needle(request: Request, *, haystack: str, code: bool = False, num_keys: int = 1) -> Sample:
    """One sentence with a number, at a random place among others; the answer must begin with the number.

    haystack: "prose" or "noise". code: four digits in plain words instead of RULER's seven. Of several keys, one is asked.
    """
    rng = request.rng("needles")
    keys = distinct(random_word, rng, num_keys)
    values = [str(rng.randint(1000, 9999)) if code else random_number(rng) for _ in keys]
    needle = _CODE if code else NEEDLE
    needles = [needle.format(kind="numbers", key=key, value=value) for key, value in zip(keys, values, strict=True)]
    depths = [rng.random() for _ in needles]
    if haystack == "prose":
        build = prose_haystack(request, needles, depths)
    else:
        build = line_haystack(lambda lines: [NOISE] * lines, needles, depths)
    if code:
        # "in the provided text", as RULER says: without it a small model writes a program ("The code for x is: def ..."). Not in
        # the prefix: after it the model says the whole sentence again.
        text, prefix = f"What is the code for {keys[0]} mentioned in the provided text? ", f"The code for {keys[0]} is"
    else:
        text = NIAH_ONE_QUESTION.format(kind="number", query=keys[0])
        prefix = NIAH_ONE_PREFIX.format(kind="number", query=keys[0])
    question = Question(text, prefix, (values[0],), STRICT_TOKENS)
    return request.sample(fitted(request, lambda units, filler: build(units, filler) + "\n\n"), [question], "starts_with")
