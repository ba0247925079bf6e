"""What the answers of a run say: means and paired differences, per arm, metric and task."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import EXACT, Arm, attention_baseline, effect, other_baselines
from obcache_sglang.eval.intervals import Estimate, Pair, difference, estimate

ALL_TASKS = "all tasks"

T = TypeVar("T")


class Metric(NamedTuple):
    """How a metric is read.

    title: for people. higher_is_better: whether more is. compares_with_exact: whether exact scores on it too. bounded: whether it is
    from 0 to 1.
    """

    title: str
    unit: str
    digits: int
    higher_is_better: bool
    compares_with_exact: bool
    bounded: bool = False


METRICS = {
    "accuracy": Metric("accuracy", "", 3, higher_is_better=True, compares_with_exact=True, bounded=True),
    "nll": Metric("NLL", "nats per token", 3, higher_is_better=False, compares_with_exact=True),
    # Measured from exact, whose own is 0: any change at all would count as a loss.
    "kl": Metric("KL from exact", "nats per token", 4, higher_is_better=False, compares_with_exact=False),
}


def arm_order(arm: Arm) -> tuple[str, float, str, str, str, str]:
    """Sort key of arms: exact first, then by mode and ratio, so that what costs the same stands together."""
    return "" if arm.is_exact else arm.mode, arm.ratio, arm.method, arm.budget, arm.score, arm.options


def arm_settings(arm: Arm) -> str:
    """An arm but for its ratio, for people: "replay + obcache-v, global, query-agnostic"."""
    if arm.is_exact:
        return "exact"
    options = "".join(f", {option.replace('_', ' ').replace('=', ' ')}" for option in arm.options.split(",") if option)
    return f"{arm.method} + {arm.score}, {arm.budget}{options}, query-{arm.mode}"


def arm_label(arm: Arm) -> str:
    """An arm, for people."""
    return arm_settings(arm) if arm.is_exact else f"{arm_settings(arm)}, ratio {arm.ratio:g}"


@dataclass(frozen=True)
class Answer:
    """One line of answers.jsonl.

    kept_tokens: of each KV head of the context's `context_tokens`, on average; all of them where it was served exactly. asked, output,
    references: texts, of a question that is answered with one. not_comparable: why its task's figures are not those of the published
    task of this name; "" where they are, or there is none. cut: whether its sample's context lost its middle, to fit the model.
    """

    arm: Arm
    task: str
    sample: int
    question: int
    metrics: Mapping[str, float]
    status: str
    reason: str | None
    context_tokens: int
    kept_tokens: int
    asked: str = ""
    output: str = ""
    references: tuple[str, ...] = ()
    not_comparable: str = ""
    cut: bool = False

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Answer:
        """Raises KeyError, TypeError or ValueError for what is not an answer."""
        metrics = record["metrics"]
        for name, value in metrics.items():
            if name not in METRICS:
                raise ValueError(f"metric {name!r} is unknown; known: {', '.join(METRICS)}")
            if not math.isfinite(value):
                raise ValueError(f"metric {name} is {value}, not a finite number")
        arm, context_tokens = Arm(**record["arm"]), int(record["context_tokens"])
        if context_tokens < 1:
            raise ValueError(f"context_tokens is {context_tokens}")
        if not arm.is_exact:
            arm.settings  # noqa: B018  (raises what is wrong)
        return cls(
            arm=arm,
            task=record["task"],
            sample=record["sample"],
            question=record["question"],
            metrics=metrics,
            status=record["status"],
            reason=record["reason"],
            context_tokens=context_tokens,
            kept_tokens=int(context_tokens if record["status"] == "exact" else record["kept_tokens"]),
            asked=record.get("asked", ""),
            output=record.get("output", ""),
            references=tuple(record.get("references", ())),
            not_comparable=record.get("not_comparable", ""),
            cut=bool(record.get("cut")),
        )

    @property
    def kept_share(self) -> float:
        """KV pairs kept of the context's, 1 where it was served exactly."""
        return self.kept_tokens / self.context_tokens

    @property
    def served_exactly(self) -> bool:
        """Exact although its arm compresses."""
        return self.status == "exact" and self.arm.ratio > 0


def read_answers(path: Path) -> tuple[list[Answer], list[str]]:
    """The answers of an answers.jsonl, and notes on what was left out.

    The last of several answers to one question counts. A last line that was cut off is left out. Raises ConfigError for any
    other line that is not an answer, and where there is none at all.
    """
    answers: dict[tuple[Arm, str, int, int], Answer] = {}
    notes = []
    repeated = 0
    # In bytes: a killed run may leave half of a character.
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last], 1):
        if not line.strip():
            continue
        try:
            answer = Answer.from_json(json.loads(line))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if line is last and _is_cut_off(line):
                notes.append(f"The last line of {path.name} was cut off and is left out.")
                continue
            detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{path.name}, line {number} is not an answer: {detail}. Delete the line and resume the run."
            ) from error
        key = (answer.arm, answer.task, answer.sample, answer.question)
        repeated += key in answers
        answers[key] = answer
    if not answers:
        raise ConfigError(f"{path.name} holds no answers: let the run get further, then make the report again.")
    if repeated:
        notes.append(f"{repeated} answers were given again later; the later ones count.")
    return list(answers.values()), notes


def _is_cut_off(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


@dataclass(frozen=True)
class Compared:
    """An arm beside another one. effect: what the difference can be put down to (`arms.effect`). difference: the arm minus the other."""

    other: Arm
    effect: str
    difference: Estimate


@dataclass(frozen=True)
class Row:
    """One arm on one task (or ALL_TASKS), by one metric. Differences are this arm minus the other, on what both have answered.

    against: the other arms beside exact and attention that it is compared with. not_comparable: of `Answer`, of any of the tasks.
    """

    metric: str
    task: str
    arm: Arm
    value: Estimate
    answers: int
    served_exactly: int
    kept_share: float
    against_exact: Estimate | None
    against_attention: Estimate | None
    against: tuple[Compared, ...] = ()
    not_comparable: str = ""

    def verdict(self, difference: Estimate | None) -> str:
        """ "better" or "worse" for one of this row's differences, "" where it is not resolved or not known."""
        if difference is None or not difference.resolved:
            return ""
        return "better" if (difference.mean > 0) == METRICS[self.metric].higher_is_better else "worse"


_Cell = Mapping[str, Mapping[tuple[int, int], Answer]]  # task, (sample, question)


def summarise(answers: Iterable[Answer]) -> list[Row]:
    """All rows: by metric (in the order of METRICS), then ALL_TASKS and each task, then arm."""
    cells: dict[str, dict[Arm, dict[str, dict[tuple[int, int], Answer]]]] = {
        name: defaultdict(lambda: defaultdict(dict)) for name in METRICS
    }
    for answer in answers:
        for name in answer.metrics:
            cells[name][answer.arm][answer.task][answer.sample, answer.question] = answer

    rows = []
    for metric, arms in cells.items():
        tasks = sorted({task for cell in arms.values() for task in cell})
        # With one task, that task is all of them.
        for task in [ALL_TASKS, *tasks] if len(tasks) > 1 else tasks:
            chosen = {arm: {t: cell[t] for t in sorted(cell) if task in (ALL_TASKS, t)} for arm, cell in arms.items()}
            chosen = {arm: cell for arm, cell in chosen.items() if cell}
            rows += [_row(metric, task, arm, chosen) for arm in sorted(chosen, key=arm_order)]
    return rows


def _row(metric: str, task: str, arm: Arm, cells: Mapping[Arm, _Cell]) -> Row:
    cell = cells[arm]
    answers = [answer for questions in cell.values() for answer in questions.values()]
    bounded = METRICS[metric].bounded
    value = estimate(_by_sample({t: {key: each.metrics[metric] for key, each in cell[t].items()} for t in cell}), bounded=bounded)
    assert value is not None, "a cell has answers"
    exact = EXACT if not arm.is_exact and METRICS[metric].compares_with_exact else None
    others = [(other, _difference(metric, cell, other, cells)) for other in other_baselines(arm, cells)]
    return Row(
        metric=metric,
        task=task,
        arm=arm,
        value=value,
        answers=len(answers),
        served_exactly=sum(answer.served_exactly for answer in answers),
        kept_share=statistics.fmean(answer.kept_share for answer in answers),
        against_exact=_difference(metric, cell, exact, cells),
        against_attention=_difference(metric, cell, attention_baseline(arm), cells),
        against=tuple(Compared(other, effect(other, arm), each) for other, each in others if each is not None),
        not_comparable="; ".join(sorted({answer.not_comparable for answer in answers} - {""})),
    )


def _difference(metric: str, cell: _Cell, other: Arm | None, cells: Mapping[Arm, _Cell]) -> Estimate | None:
    """The mean over samples of cell minus other's, question by question, where both have answered."""
    if other is None or other not in cells:
        return None
    pairs: dict[str, dict[tuple[int, int], Pair]] = {}
    for task, questions in cell.items():
        theirs = cells[other].get(task, {})
        pairs[task] = {key: (questions[key].metrics[metric], theirs[key].metrics[metric]) for key in questions if key in theirs}
    return difference(_by_sample(pairs), bounded=METRICS[metric].bounded)


def _by_sample(values: Mapping[str, Mapping[tuple[int, int], T]]) -> dict[str, dict[int, list[T]]]:
    """values[task][sample, question] as [task][sample][question]."""
    grouped: dict[str, dict[int, list[T]]] = {task: defaultdict(list) for task in values}
    for task, questions in values.items():
        for (sample, _), value in questions.items():
            grouped[task][sample].append(value)
    return grouped
