"""What a report says, in words and tables, before it becomes Markdown or HTML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from obcache_sglang.eval.arms import Arm
from obcache_sglang.eval.results import METRICS, Answer, Estimate, Row, arm_label, arm_order, arm_settings

EXPLANATIONS = (
    "± is one standard error over samples: the questions about one context count as one sample, tasks count equally.",
    "Differences are paired, on the questions both arms have answered; worse and better mark those over two standard errors.",
    "minus attention: minus the arm that differs in nothing but its score, which is attention's.",
    "NLL: mean negative log-likelihood of a held-out continuation's tokens. KL: mean divergence of their distributions from exact's.",
)


class Cell(NamedTuple):
    """One cell of a table. verdict: what its difference means, as of `Row.verdict`."""

    text: str
    verdict: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and the statements below it, each under its sub-heading ("" for none)."""

    title: str
    statements: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Table:
    """All arms on one task by one metric. overview: over all tasks of the metric."""

    metric: str
    title: str
    overview: bool
    header: list[str]
    rows: list[list[Cell]]


def run_facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What every figure of the run rests on, by name. run: of run.json."""
    return {name: str(run[name]) for name in ("command", "model", "versions", "machine", "seed", "started")}


def findings(rows: Sequence[Row]) -> list[Section]:
    """Where compression hurts, then where it helps: the differences over two standard errors, the largest first."""
    losses, gains = _statements(rows, "against_exact", "exact")
    worse, better = _statements(rows, "against_attention", "attention")
    like = "attention with the same method, budget, mode and ratio"
    return [
        Section("Where compression hurts", losses or _nothing(rows, "against_exact", "loses against exact")),
        Section(
            "Where an OBCache score is worse than attention",
            worse or _nothing(rows, "against_attention", f"is worse than {like}"),
        ),
        Section("Where it helps", better | gains or _nothing(rows, "against_attention", f"is better than {like}")),
    ]


def _statements(rows: Sequence[Row], difference: str, other: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Resolved differences in words, losses and gains: by metric, arms with the largest first.

    One statement is about an arm at all its ratios. It tells the differences over all tasks, and of single tasks those at ratios
    where all tasks together resolve none.
    """
    by_settings: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_settings.setdefault((row.metric, arm_settings(row.arm)), []).append(row)
    overview = {metric: next(row.task for row in rows if row.metric == metric) for metric, _ in by_settings}

    found: dict[str, dict[str, list[tuple[float, str]]]] = {"worse": {}, "better": {}}
    for (metric, settings), of_settings in by_settings.items():
        for verdict, by_metric in found.items():
            estimates = [(row, getattr(row, difference)) for row in of_settings]
            resolved = [(row, each) for row, each in estimates if row.verdict(each) == verdict]
            overall = [(row, each) for row, each in resolved if row.task == overview[metric]]
            told = {row.arm for row, _ in overall}
            single = [(row, each) for row, each in resolved if row.arm not in told]
            parts = []
            for row, each in sorted(overall, key=_size) + sorted(single, key=_size):
                task = "" if row.arm in told else f" on {row.task} alone"
                value = f"{_number(metric, each, signed=True)} to {_plain(metric, row.value.mean)}"
                parts.append(f"{value}{task} at ratio {row.arm.ratio:g} (n = {each.samples})")
            if parts:
                # What only single tasks resolve comes last.
                rank = min(_size(item) for item in overall) if overall else math.inf
                by_metric.setdefault(f"{METRICS[metric].title}, minus {other}", []).append(
                    (rank, f"{settings}: {', '.join(parts)}.")
                )
    worse, better = (
        {title: [text for _, text in sorted(statements)] for title, statements in by_metric.items()}
        for by_metric in found.values()
    )
    return worse, better


def _size(item: tuple[Row, Estimate]) -> float:
    """Sorts the largest difference first."""
    return -abs(item[1].mean)


def _nothing(rows: Sequence[Row], difference: str, what: str) -> dict[str, list[str]]:
    """Says that nothing was found, and how much the run could have seen."""
    estimates = [getattr(row, difference) for row in rows]
    errors = [
        (row.metric, each.se) for row, each in zip(rows, estimates, strict=True) if each is not None and each.se is not None
    ]
    if not errors:
        return {"": [f"Whether an arm {what} is not known: no two arms to compare have answered two samples of each task."]}
    largest = {metric: max(se for name, se in errors if name == metric) for metric, _ in errors}
    limits = ", ".join(f"{METRICS[metric].title} {_plain(metric, 2 * se)}" for metric, se in largest.items())
    return {"": [f"No arm {what} by over two standard errors. Smaller differences than these may be there and unseen: {limits}."]}


def exact_notes(answers: Iterable[Answer]) -> list[str]:
    """For each arm: how many of its answers were served exactly although it compresses, and why."""
    total: Counter[Arm] = Counter()
    reasons: dict[Arm, Counter[str]] = {}
    for answer in answers:
        total[answer.arm] += 1
        if answer.served_exactly:
            reasons.setdefault(answer.arm, Counter())[answer.reason or "no reason given"] += 1
    notes = []
    for arm in sorted(reasons, key=arm_order):
        why = ", ".join(
            f"{reason} ({count})" for reason, count in sorted(reasons[arm].items(), key=lambda item: (-item[1], item[0]))
        )
        notes.append(
            f"{arm_label(arm)}: {reasons[arm].total()} of {total[arm]} answers were served exactly, and count so: {why}."
        )
    return notes


def chance_note(rows: Iterable[Row]) -> str:
    """How many differences the findings are drawn from, and what that means."""
    judged = sum(each is not None for row in rows for each in (row.against_exact, row.against_attention))
    return (
        f"{judged} differences were judged, over arms, ratios, tasks and metrics. Where two arms do not differ, about one in twenty is over "
        "two standard errors by chance, in either direction; more where samples are few."
    )


def tables(rows: Iterable[Row]) -> list[Table]:
    """One table for each metric and task, in the order of the rows. The first one of a metric is its overview."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.metric, row.task), []).append(row)
    made: list[Table] = []
    for (metric, task), chosen in grouped.items():
        info = METRICS[metric]
        header = ["arm", "ratio", "KV kept", f"{info.title}{', ' if info.unit else ''}{info.unit}", "samples", "answers"]
        if info.compares_with_exact:
            header.append("minus exact")
        header += ["minus attention", "served exactly"]
        overview = all(table.metric != metric for table in made)
        made.append(Table(metric, f"{info.title}: {task}", overview, header, [_cells(row) for row in chosen]))
    return made


def _cells(row: Row) -> list[Cell]:
    cells = [
        Cell(arm_settings(row.arm)),
        Cell(f"{row.arm.ratio:g}"),
        Cell(f"{100 * row.kept_share:.1f} %"),
        Cell(_number(row.metric, row.value)),
        Cell(str(row.value.samples)),
        Cell(str(row.answers)),
    ]
    differences = [row.against_exact] if METRICS[row.metric].compares_with_exact else []
    for difference in [*differences, row.against_attention]:
        text = "" if difference is None else _number(row.metric, difference, signed=True)
        cells.append(Cell(text, row.verdict(difference)))
    return [*cells, Cell(str(row.served_exactly) if row.served_exactly else "")]


def _number(metric: str, estimate: Estimate, *, signed: bool = False) -> str:
    """mean ± standard error; without `signed`, the mean's size."""
    sign = "" if not signed or estimate.mean == 0 else "+" if estimate.mean > 0 else "−"
    error = "?" if estimate.se is None else _plain(metric, estimate.se)
    return f"{sign}{_plain(metric, abs(estimate.mean))} ± {error}"


def _plain(metric: str, value: float) -> str:
    return f"{value:.{METRICS[metric].digits}f}"
