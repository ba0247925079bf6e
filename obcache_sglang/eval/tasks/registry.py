"""The tasks by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.samples import Sample
from obcache_sglang.eval.tasks.continuation import continuation
from obcache_sglang.eval.tasks.facts import facts
from obcache_sglang.eval.tasks.fit import Request, TaskFn
from obcache_sglang.eval.tasks.needles import needle
from obcache_sglang.eval.tasks.ruler import common_words, frequent_words, niah, variable_tracking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS: dict[str, TaskFn] = {
    "needle_prose": partial(needle, haystack="prose"),
    "needle_noise": partial(needle, haystack="noise"),
    "needle_code": partial(needle, haystack="prose", code=True),
    "needle_two_keys": partial(needle, haystack="prose", num_keys=2),
    "niah_single_1": partial(niah, haystack="noise"),
    "niah_single_2": partial(niah, haystack="prose"),
    "niah_single_3": partial(niah, haystack="prose", value="uuids"),
    "niah_multikey_1": partial(niah, haystack="prose", num_keys=4),
    "niah_multikey_2": partial(niah, haystack="needles"),
    "niah_multikey_3": partial(niah, haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": partial(niah, haystack="prose", num_values=4),
    "niah_multiquery": partial(niah, haystack="prose", num_asked=4),
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "facts": facts,
    "continuation": continuation,
}
"""The tasks by name."""

MULTI_QUESTION_TASKS = frozenset({"facts", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"})
"""Tasks that can ask several questions about one context."""


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
