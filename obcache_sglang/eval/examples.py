"""Three answers of a run, arm beside arm."""

from __future__ import annotations

from collections.abc import Iterable

from obcache_sglang.eval.arms import EXACT, Arm
from obcache_sglang.eval.results import Answer, arm_order, arm_settings
from obcache_sglang.eval.summary import Cell, Grid, Section

NUM_EXAMPLES = 3

_MOST_ARMS = 4
_MOST_CHARACTERS = 160


def example_section(answers: Iterable[Answer]) -> Section:
    """Answers of exact and of some arms, at the highest ratio of the run.

    Of each kind one, the first with most arms of that kind, where there is one: a question that exact answers better than arms do, one
    that it answers as well, and one that it answers worse; then more in this order.
    """
    answered = [answer for answer in answers if "accuracy" in answer.metrics and answer.references]
    highest = max((answer.arm.ratio for answer in answered), default=0.0)
    compressed = {answer.arm for answer in answered if not answer.arm.is_exact and answer.arm.ratio == highest}
    arms = sorted(compressed, key=arm_order)[:_MOST_ARMS]
    by_question: dict[tuple[str, int, int], dict[Arm, Answer]] = {}
    for answer in answered:
        by_question.setdefault((answer.task, answer.sample, answer.question), {})[answer.arm] = answer
    whole = {key: row for key, row in sorted(by_question.items()) if row.keys() >= {EXACT, *arms}}
    if not arms or not whole:
        return Section("Three answers")
    chosen = _chosen(whole, arms)
    rows = [_row(key, whole[key], arms) for key in chosen]
    header = ["question", "reference", "exact", *(f"{arm_settings(arm)}, ratio {arm.ratio:g}" for arm in arms)]
    title = {1: "One answer", 2: "Two answers", 3: "Three answers"}[len(rows)]
    return Section(f"{title}, arm beside arm", grid=Grid(header, rows))


def _chosen(rows: dict[tuple[str, int, int], dict[Arm, Answer]], arms: list[Arm]) -> list[tuple[str, int, int]]:
    def change(key: tuple[str, int, int], arm: Arm) -> float:
        return rows[key][arm].metrics["accuracy"] - rows[key][EXACT].metrics["accuracy"]

    counts = {key: (sum(change(key, arm) < 0 for arm in arms), sum(change(key, arm) > 0 for arm in arms)) for key in rows}
    kinds = [
        sorted((key for key in rows if counts[key][0]), key=lambda key: -counts[key][0]),
        [key for key in rows if counts[key] == (0, 0)],
        sorted((key for key in rows if counts[key][1] and not counts[key][0]), key=lambda key: -counts[key][1]),
    ]
    firsts = [kind[0] for kind in kinds if kind]
    others = [key for kind in kinds for key in kind if key not in firsts]
    return (firsts + others)[:NUM_EXAMPLES]


def _row(key: tuple[str, int, int], answers: dict[Arm, Answer], arms: list[Arm]) -> list[Cell]:
    exact = answers[EXACT]
    task, sample, question = key
    asked = f"{task} {sample}.{question}: {_shortened(exact.asked)}" if exact.asked else f"{task} {sample}.{question}"
    cells = [Cell(asked), Cell(_shortened(", ".join(exact.references)))]
    for arm in (EXACT, *arms):
        better = answers[arm].metrics["accuracy"] - exact.metrics["accuracy"]
        score = answers[arm].metrics["accuracy"]
        mark = {0.0: "wrong", 1.0: "right"}.get(score, f"{score:.2f}")
        cells.append(
            Cell(f"{mark}: {_shortened(answers[arm].output)!r}", "better" if better > 0 else "worse" if better < 0 else "")
        )
    return cells


def _shortened(text: str) -> str:
    """Text in one line, its beginning if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"
