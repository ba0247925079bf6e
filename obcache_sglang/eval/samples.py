"""What is asked: contexts with questions about them, from the generators (`tasks.py`) and the public sets (`datasets.py`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question about a context.

    The prompt is `context + text + answer_prefix`, nothing between them: separators are part of these. With a chat template,
    `answer_prefix` begins the assistant's turn.

    text: what is asked, after the context; of metric "nll" the text that really continues the context.
    answer_prefix: begins the answer, so that the model only has to complete it; "" for none.
    references: right answers; how many of them must be given is the metric's business. None for metric "nll".
    max_new_tokens: how long the answer may be; 0 where nothing is generated (metric "nll").
    """

    text: str
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One context and all that is asked about it.

    task: "niah_single_1", "longbench/qasper", ...; task and index together name a sample.
    context: shared by all questions, with what introduces it.
    metric: a name in `metrics.METRICS`, or "nll": likelihood of the questions' texts, which the runner measures.
    options: all that an answer can be, for metrics that choose (classes, functions of a repository).
    plain: asked as plain text, without the chat template. cut_middle: a prompt longer than the model may lose the middle of its context.
    stop_at_newline: an answer, of one token at least, ends at a line break.
    not_comparable: why its figures are not those of the published task of this name; "" where they are, or there is none.
    """

    task: str
    index: int
    context: str
    questions: tuple[Question, ...]
    metric: str
    options: tuple[str, ...] = ()
    plain: bool = False
    cut_middle: bool = False
    stop_at_newline: bool = False
    not_comparable: str = ""
