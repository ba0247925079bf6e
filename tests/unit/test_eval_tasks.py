"""The generators of evaluation tasks: the same samples for the same seeds, of the right length, with what is asked in them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval import prose
from obcache_sglang.eval.metrics import METRICS
from obcache_sglang.eval.samples import Sample
from obcache_sglang.eval.tasks import CONTINUATION_TOKENS, MAX_FACTS, MULTI_QUESTION_TASKS, TASKS, fit, generate

# Of 1000 tokens, seed 7, index 3. A change here changes every figure that was measured with the task: say so where it is made.
FINGERPRINTS: dict[str, str] = {
    "needle_prose": "f0b06a9e6d80",
    "needle_noise": "d6d29a81fbc7",
    "needle_code": "52c5972d09fe",
    "needle_two_keys": "3a26d5d3c7b2",
    "niah_single_1": "d259b99a5811",
    "niah_single_2": "e0f15a5b7827",
    "niah_single_3": "f6201f8c32db",
    "niah_multikey_1": "3cc40e9f9ce4",
    "niah_multikey_2": "11f87fc29ccc",
    "niah_multikey_3": "fc9cb39601de",
    "niah_multivalue": "2942061361f9",
    "niah_multiquery": "a5c4a6a9d7cb",
    "vt": "61a39eda14bb",
    "cwe": "535eb9fee5e0",
    "fwe": "5aff181b3638",
    "facts": "7254a2fd7afc",
    "continuation": "27189bfdef05",
}


@pytest.fixture(scope="module")
def tokenizer(model_dir_bf16: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir_bf16)


def length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def fingerprint(sample: Sample) -> str:
    """Of what is asked and how it is scored."""
    asked = {name: asdict(sample)[name] for name in ("task", "index", "context", "questions", "metric", "options")}
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


# --- all tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_fixed_output(tokenizer: Any, task: str) -> None:
    assert fingerprint(generate(task, tokenizer, 1000, 7, 3)) == FINGERPRINTS[task]


@pytest.mark.parametrize(("num_tokens", "index"), [(700, 0), (700, 1), (1024, 2), (4096, 3)])
@pytest.mark.parametrize("task", TASKS)
def test_lengths(tokenizer: Any, task: str, num_tokens: int, index: int) -> None:
    sample = generate(task, tokenizer, num_tokens, 0, index)
    assert abs(length(tokenizer, sample.context) - num_tokens) <= num_tokens / 100


@pytest.mark.parametrize("task", TASKS)
def test_samples_differ(tokenizer: Any, task: str) -> None:
    samples = [generate(task, tokenizer, 1000, seed, index) for seed, index in ((0, 0), (0, 1), (1, 0))]
    assert len({sample.context for sample in samples}) == 3
    assert len({sample.questions for sample in samples}) == 3 or task == "cwe"


@pytest.mark.parametrize("task", [task for task in TASKS if task != "continuation"])
def test_a_right_answer_is_right(tokenizer: Any, task: str) -> None:
    sample = generate(task, tokenizer, 1000, 0, 0)
    assert (sample.task, sample.index, sample.options) == (task, 0, ())
    assert sample.context.endswith("\n")
    for question in sample.questions:
        assert METRICS[sample.metric](f" {', '.join(question.references)}.", question.references, ()) == 1
        assert METRICS[sample.metric](" I do not know.", question.references, ()) == 0
        # A document says what the metric wants: as a sentence, where there is one.
        assert all(reference in sample.context for reference in question.references)
        assert question.max_new_tokens > 0


def test_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"'niah' is unknown: choose one of needle_prose"):
        generate("niah", tokenizer, 1000, 0, 0)
    with pytest.raises(ConfigError, match=r"cwe needs contexts of \d+ tokens or more, not 300"):
        generate("cwe", tokenizer, 300, 0, 0)
    with pytest.raises(ConfigError, match="vt asks one question of each context"):
        generate("vt", tokenizer, 1000, 0, 0, num_questions=2)
    with pytest.raises(ConfigError, match="num_questions=0 is less than 1"):
        generate("facts", tokenizer, 1000, 0, 0, num_questions=0)
    with pytest.raises(ConfigError, match=f"up to {MAX_FACTS} questions"):
        generate("facts", tokenizer, 4000, 0, 0, num_questions=MAX_FACTS + 1)
    with pytest.raises(ConfigError, match="continuation has no 1000000 tokens of prose"):
        generate("continuation", tokenizer, 1_000_000, 0, 0)


# --- needles ------------------------------------------------------------------------------------------------------------

NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.")


def places(tokenizer: Any, task: str, pattern: str) -> list[float]:
    contexts = [generate(task, tokenizer, 500, 0, index).context for index in range(40)]
    return [match.start() / len(context) for context in contexts for match in re.finditer(pattern, context)]


@pytest.mark.parametrize(
    ("task", "needles"), [("needle_prose", 1), ("needle_noise", 1), ("needle_two_keys", 2), ("niah_multikey_1", 4), ("facts", 8)]
)
def test_needles_lie_everywhere(tokenizer: Any, task: str, needles: int) -> None:
    pattern = (
        r"The (?:mayor|bridge|age|door|number of ships) |'s dog is | was born in | plays the "
        if task == "facts"
        else "One of the special"
    )
    found = places(tokenizer, task, pattern)
    assert len(found) == 40 * needles
    thirds = Counter(min(2, int(place * 3)) for place in found)
    assert all(thirds[third] > len(found) / 6 for third in range(3)), thirds


@pytest.mark.parametrize("task", ["needle_prose", "needle_noise", "needle_two_keys"])
def test_needle(tokenizer: Any, task: str) -> None:
    sample = generate(task, tokenizer, 1000, 0, 0)
    needles = dict(NEEDLE.findall(sample.context))
    assert len(needles) == (2 if task == "needle_two_keys" else 1)
    (question,) = sample.questions
    (key,) = [key for key in needles if f" for {key} " in question.text]
    assert question.text == f"What is the special magic number for {key} mentioned in the provided text? "
    assert question.answer_prefix == f"The special magic number for {key} mentioned in the provided text is"
    assert question.references == (needles[key],) and re.fullmatch(r"\d{7}", needles[key])
    rest = NEEDLE.sub("", sample.context)
    assert ("The grass is green." in rest) == (task == "needle_noise")


def test_needle_code(tokenizer: Any) -> None:
    sample = generate("needle_code", tokenizer, 1000, 0, 0)
    ((key, value),) = re.findall(r"The code for (\S+) is (\d{4})\.", sample.context)
    (question,) = sample.questions
    assert question.text == f"What is the code for {key} mentioned in the provided text? "
    assert question.answer_prefix == f"The code for {key} is"
    assert question.references == (value,)


# --- RULER --------------------------------------------------------------------------------------------------------------

NUMBER, WORD = r"\d{7}", r"[a-z]+-[a-z]+"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.mark.parametrize(
    ("task", "key", "value", "needles", "references", "noise"),
    [
        ("niah_single_1", WORD, NUMBER, 1, 1, True),
        ("niah_single_2", WORD, NUMBER, 1, 1, False),
        ("niah_single_3", WORD, UUID, 1, 1, False),
        ("niah_multikey_1", WORD, NUMBER, 4, 1, False),
        ("niah_multikey_2", WORD, NUMBER, None, 1, True),
        ("niah_multikey_3", UUID, UUID, None, 1, True),
        ("niah_multivalue", WORD, NUMBER, 4, 4, False),
        ("niah_multiquery", WORD, NUMBER, 4, 4, False),
    ],
)
def test_niah(tokenizer: Any, task: str, key: str, value: str, needles: int | None, references: int, noise: bool) -> None:
    sample = generate(task, tokenizer, 1000, 0, 0)
    found = NEEDLE.findall(sample.context)
    assert len(found) == needles if needles else len(found) > 5
    assert all(re.fullmatch(key, name) and re.fullmatch(value, number) for name, number in found)
    (question,) = sample.questions
    asked = [(name, number) for name, number in found if name in question.text]
    assert Counter(number for _, number in asked) == Counter(question.references)
    assert len(question.references) == references
    assert {name for name, _ in asked} == {name for name, _ in found if name in question.answer_prefix}
    assert len({name for name, _ in asked}) == (4 if task == "niah_multiquery" else 1)
    if not noise:
        assert "The grass is green." not in sample.context
    if references == 1:
        kind = "uuid" if value == UUID else "number"
        assert sample.context.startswith(
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        )
        assert question.text.startswith(f"What is the special magic {kind} for ") and question.answer_prefix.endswith("text is")
    else:
        assert sample.context.startswith(
            "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        )
        assert question.text.startswith("What are all the special magic numbers for ") and question.answer_prefix.endswith(
            "text are"
        )


@pytest.mark.parametrize("task", sorted(MULTI_QUESTION_TASKS))
def test_many_questions_on_one_context(tokenizer: Any, task: str) -> None:
    sample = generate(task, tokenizer, 2000, 0, 0, num_questions=12)
    assert len({question.text for question in sample.questions}) == 12
    for question in sample.questions:
        if task == "facts":
            assert sample.context.count(f"{question.answer_prefix} {question.references[0]}.") == 1
            assert sample.context.count(question.answer_prefix) == 1  # nothing else is said of the subject
        else:
            ((_, value),) = [needle for needle in NEEDLE.findall(sample.context) if needle[0] in question.text]
            assert question.references == (value,)


def test_variable_tracking(tokenizer: Any) -> None:
    sample = generate("vt", tokenizer, 1000, 0, 0)
    (question,) = sample.questions
    value = re.search(r"the value (\d{5}) in", question.text).group(1)  # type: ignore[union-attr]
    example, text = sample.context.split("\n\nMemorize and track")
    # RULER's slip, which its figures were measured with.
    assert "5 variables are assgined the value" in example and "5 variables are assgined the value" in question.answer_prefix
    chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
    assert [name for name, _ in chain] == list(question.references)
    assert [before for _, before in chain] == [value, *question.references[:-1]]


@pytest.mark.parametrize(("num_tokens", "often", "seldom"), [(1500, 6, 1), (4096, 30, 3)])
def test_common_words(tokenizer: Any, num_tokens: int, often: int, seldom: int) -> None:
    sample = generate("cwe", tokenizer, num_tokens, 0, 0)
    listing = sample.context.split("Memorize the ones that appear most often.\n")[-1]
    items = re.findall(r"(\d+)\. (\S+)", listing)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    counts = Counter(word for _, word in items)
    assert {word for word, count in counts.items() if count == often} == set(sample.questions[0].references)
    assert Counter(counts.values()) == {often: 10, seldom: len(counts) - 10}


def test_frequent_words(tokenizer: Any) -> None:
    sample = generate("fwe", tokenizer, 1000, 0, 0)
    words = re.findall(r"(?<= )(?:[a-z]{6}|\.\.\.)(?=\s)", sample.context.split("appeared coded words.")[1])
    ranked = Counter(words).most_common()
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == sample.questions[0].references
    assert ranked[3][1] > ranked[4][1]


# --- continuation -------------------------------------------------------------------------------------------------------


def test_continuation_is_what_follows(tokenizer: Any) -> None:
    sample = generate("continuation", tokenizer, 1000, 0, 0)
    (question,) = sample.questions
    assert sample.context + question.text in prose.opticks()
    assert (sample.metric, question.references, question.answer_prefix, question.max_new_tokens) == ("nll", (), "", 0)


def test_continuations_share_no_text(tokenizer: Any) -> None:
    num_tokens = 3000
    text = prose.opticks() + "\n\n" + prose.topics()
    spans = []
    for index in range(60):
        sample = generate("continuation", tokenizer, num_tokens, 0, index)
        whole = sample.context + sample.questions[0].text
        assert length(tokenizer, sample.questions[0].text) == CONTINUATION_TOKENS
        spans.append((text.index(whole), len(whole)))
    spans.sort()
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(spans))


def test_continuations_go_on_when_prose_is_used_up(tokenizer: Any) -> None:
    samples = [generate("continuation", tokenizer, 50_000, 0, index) for index in range(8)]
    assert len({sample.context for sample in samples}) == 8


def test_prose_goes_round(tokenizer: Any) -> None:
    """Contexts longer than all prose begin it again."""
    words = fit._prose(len(prose.words()) - 2, 5)
    assert " ".join(words).split() == [*prose.words()[-2:], *prose.words()[:3]]
