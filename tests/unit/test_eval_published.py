"""Our RULER tasks and LongBench sets against what their authors publish, recorded by tests/fixtures/record_published.py."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from obcache_sglang.eval.datasets import PUBLIC_SETS, load
from obcache_sglang.eval.metrics import METRICS
from obcache_sglang.eval.samples import Sample
from obcache_sglang.eval.tasks import TASKS, generate, ruler

PUBLISHED = json.loads((Path(__file__).parents[1] / "fixtures" / "published.json").read_text(encoding="utf-8"))
RULER, LONGBENCH = PUBLISHED["ruler"], PUBLISHED["longbench"]
NIAH = [task for task in RULER if task.startswith("niah")]
PACKAGES = {"rouge_l": "rouge", "rouge_l_first_line": "rouge", "rouge_l_zh": "jieba", "qa_f1_zh": "jieba"}


@pytest.fixture(scope="module")
def tokenizer(model_dir_bf16: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir_bf16)


# --- RULER --------------------------------------------------------------------------------------------------------------


def test_all_eleven_synthetic_tasks_are_compared() -> None:
    assert len(RULER) == 11 and set(RULER) <= set(TASKS)
    assert set(ruler.DIFFERENCES) == set(RULER)


def prompt(sample: Sample) -> str:
    """A sample's prompt with {context}, {query} and {value} where samples differ."""
    (question,) = sample.questions
    asked = question.text + question.answer_prefix
    if sample.task.startswith("niah"):
        head = sample.context.split("\n")[0]
        query = question.text.split(" for ", 1)[1].split(" mentioned ", 1)[0]
        return f"{head}\n{{context}}\n{asked.replace(query, '{query}')}"
    if sample.task == "vt":
        head = sample.context[sample.context.rindex("Memorize and track") :].split("\n\n")[0]
        value = question.text.split("the value ")[1].split()[0]
        return f"{head}\n\n{{context}}\n{asked.replace(value, '{query}')}"
    if sample.task == "cwe":
        head = sample.context[sample.context.rindex("Below is a numbered list") :].split("\n")[0]
        return f"{head}\n{{context}}\n{asked}"
    head = sample.context[: sample.context.index("coded words. ") + len("coded words. ")]
    return f"{head}{{context}}\n{asked}"


@pytest.mark.parametrize("task", RULER)
def test_prompts_limits_and_metrics_are_rulers(tokenizer: Any, task: str) -> None:
    sample = generate(task, tokenizer, 1000, 0, 0)
    (question,) = sample.questions
    assert hashlib.sha256(prompt(sample).encode()).hexdigest()[:16] == RULER[task]["prompt"], prompt(sample)
    assert question.max_new_tokens == RULER[task]["max_new_tokens"]
    assert sample.metric == RULER[task]["metric"]
    assert sample.context.endswith("\n") and question.text.endswith(" ")  # what the published prompt has between its parts
    assert "lengths are those of the contexts alone" in sample.not_comparable


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_rulers(task: str) -> None:
    made = TASKS[task]
    assert isinstance(made, partial)
    ours = {"key": "words", "value": "numbers", "num_keys": 1, "num_values": 1, "num_asked": 1} | made.keywords
    theirs = RULER[task]["arguments"]
    assert ours["haystack"] == {"repeat": "noise", "essay": "prose", "needle": "needles"}[theirs["type_haystack"]]
    assert (ours["key"], ours["value"]) == (theirs["type_needle_k"], theirs["type_needle_v"])
    assert (ours["num_keys"], ours["num_values"], ours["num_asked"]) == (
        theirs["num_needle_k"],
        theirs["num_needle_v"],
        theirs["num_needle_q"],
    )


def test_parameters_of_the_other_tasks_are_rulers(tokenizer: Any) -> None:
    assert (RULER["vt"]["arguments"], ruler._VT_HOPS) == ({"num_chains": 1, "num_hops": 4}, 4)
    assert RULER["cwe"]["arguments"] == {"freq_cw": 30, "freq_ucw": 3, "num_cw": ruler._CWE_COMMON}
    assert RULER["fwe"]["arguments"] == {"alpha": 2.0}  # pi**2 / 6 is zeta(2)
    listing = generate("cwe", tokenizer, 5000, 0, 0)
    words = listing.context.split("that appear most often.\n")[-1].split()[1::2]
    assert {words.count(word) for word in listing.questions[0].references} == {30}
    assert {words.count(word) for word in set(words) - {*listing.questions[0].references}} == {3}


def test_worked_examples_are_rulers(tokenizer: Any) -> None:
    """What July 2024's code makes of its templates: an example without line breaks and without "above.", two blanks before its answer,
    none before that of common words."""
    context = generate("vt", tokenizer, 1000, 0, 0).context
    example, rest = context.split("\n\n\n\n")
    assert example.startswith(" Memorize and track the chain(s) of variable assignment hidden in the following text. ")
    assert "\n\n" not in example and " in the text Answer: According to the chain(s)" in example
    assert example.split("they are:  ")[1].count(" ") == 4
    assert rest.startswith("Memorize and track")
    assert "appear most often in the list are:1. " in generate("cwe", tokenizer, 1000, 0, 0).context


# --- LongBench ----------------------------------------------------------------------------------------------------------


def longbench(tmp_path: Path, name: str) -> Sample:
    row = {"context": "A context.\n", "question": "Q? ", "answer_prefix": "Answer:", "answers": ["x"], "all_classes": ["x", "y"]}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"max_new_tokens": 999}), encoding="utf-8")
    (sample,) = load("longbench", name, tmp_path)
    return sample


def test_all_sets_are_compared() -> None:
    assert set(PUBLIC_SETS["longbench"].configs) == set(LONGBENCH["sets"]) and len(LONGBENCH["sets"]) == 21


@pytest.mark.parametrize("name", LONGBENCH["sets"])
def test_sets_are_asked_as_published(tmp_path: Path, name: str) -> None:
    sample = longbench(tmp_path, name)
    (question,) = sample.questions
    published = LONGBENCH["sets"][name]
    # KVPress's copy, put together again, is the published prompt: else the figures would not be comparable.
    assert published["copy_is_published_prompt"] == (sample.not_comparable == "")
    assert (question.text, question.answer_prefix) == ("Q? Answer:", "")  # all of it is the user's turn
    assert question.max_new_tokens == published["max_new_tokens"]
    assert sample.plain == (name in LONGBENCH["without_chat_template"])
    assert sample.cut_middle
    assert sample.stop_at_newline == (name == "samsum")


@pytest.mark.parametrize(("name", "answer", "references", "classes", "score"), LONGBENCH["scores"])
def test_answers_are_scored_as_published(
    tmp_path: Path, name: str, answer: str, references: list[str], classes: list[str], score: float
) -> None:
    metric = longbench(tmp_path, name).metric
    if metric in PACKAGES:
        pytest.importorskip(PACKAGES[metric])
    assert METRICS[metric](answer, references, classes) == pytest.approx(score)


@pytest.mark.parametrize("name", LONGBENCH["sets"])
def test_first_lines_count_where_published(tmp_path: Path, name: str) -> None:
    of_first_line = longbench(tmp_path, name).metric in ("classification", "qa_f1_first_line", "rouge_l_first_line")
    assert of_first_line == (name in LONGBENCH["first_line"])
