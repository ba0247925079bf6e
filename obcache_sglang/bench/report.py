"""The report of a bench: findings first, then tables; as text for a terminal and as Markdown, and all numbers as JSON."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from obcache_sglang.bench.rounds import Cost, Round, against
from obcache_sglang.bench.served import STOCK

HEADER = (
    "arm",
    "questions/s",
    "x stock: min median max",
    "first token s: median",
    "p99",
    "answer s",
    "output tokens/s",
    "hit rate",
    "prefilled",
    "slots/document",
    "resident",
    "right",
)

EXPLANATIONS = (
    "Closed loop: each client sends its next question when it has its answer, so that questions/s is what an arm can do. An open loop's "
    + "fixed rate would leave one arm idle and let another's queue grow without end.",
    "Arms take turns within each round, in another order each round, from an empty cache; an unmeasured warm-up comes first.",
    "Numbers are medians over rounds, right is their mean. Ratios are pair by pair: with stock in the same round.",
    "prefilled: prompt tokens not found in the cache, and those re-read by replay. slots/document: KV slots that one document holds.",
    "resident: documents in the pool after the round. right: answers that begin as the document says.",
)


@dataclass(frozen=True)
class Point:
    """One workload, measured.

    workload: its digest. arms: in the order of the tables, stock and OBCache's; peers: KVPress's. costs: of compressing its documents.
    """

    documents: int
    tokens: int
    questions: int
    pool_slots: int
    clients: int
    workload: str
    arms: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: Sequence[Round]
    costs: Sequence[Cost] = field(default_factory=tuple)


def write_report(folder: Path, facts: Mapping[str, str], points: Sequence[Point], notes: Iterable[str] = ()) -> str:
    """Writes bench.json and bench.md (and with several points scaling.svg) into `folder`.

    facts: command, versions, machine and so on. notes: what else readers must know. Returns what a terminal shows: findings and tables.
    """
    tables = [_point_table(points[0]), *_cost_tables(points[0])] if len(points) == 1 else _scaling_tables(points)
    lines = findings(points)
    measured = {"facts": dict(facts), "findings": lines, "points": [asdict(point) for point in points]}
    (folder / "bench.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    markdown = ["# Speed", "", *(f"- {line}" for line in lines), ""]
    markdown += [f"- {name}: `{value}`" for name, value in facts.items()]
    for title, rows in tables:
        markdown += ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])]
    if len(points) > 1:
        (folder / "scaling.svg").write_text(_plot(points), encoding="utf-8")
        markdown += ["", "![Seconds per question](scaling.svg)"]
    markdown += ["", "## Notes", "", *(f"- {note}" for note in (*EXPLANATIONS, *notes))]
    (folder / "bench.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    return "\n".join([*lines, *(f"\n{title}\n{_aligned(rows)}" for title, rows in tables)])


# --- findings -----------------------------------------------------------------------------------------------------------


def findings(points: Iterable[Point]) -> list[str]:
    """Where compression hurts, speed or answers, then where it helps."""
    hurts, helps = [], []
    points = list(points)
    for point in points:
        where = f" ({point.documents} documents of {point.tokens} tokens)" if len(points) > 1 else ""
        right = {arm: _mean(point, arm, "accuracy") for arm in point.arms}
        for arm in point.arms:
            ratios = against(point.rounds, arm, STOCK)
            if arm == STOCK or ratios is None:
                continue
            spread = f"{ratios.median:.2f}x stock's questions/s ({ratios.low:.2f} to {ratios.high:.2f})"
            if ratios.high < 1:
                hurts.append(f"HURTS: {arm} is slower, {spread}{where}.")
            elif ratios.low > 1:
                helps.append(f"helps: {arm} is faster, {spread}{where}.")
            else:
                helps.append(f"no clear difference: {arm} has {spread}{where}.")
            if right[arm] < right[STOCK]:
                hurts.append(f"HURTS: {arm} answers {right[arm]:.0%} right, stock {right[STOCK]:.0%}{where}.")
            for peer in point.peers:
                if beside := against(point.rounds, arm, peer):
                    spread = f"({beside.low:.1f} to {beside.high:.1f})"
                    helps.append(f"{arm} has {beside.median:.1f}x the questions/s of {peer} {spread}{where}.")
    return hurts + helps


def _values(point: Point, arm: str, name: str) -> list[float]:
    return [value for each in point.rounds if each.arm == arm and (value := getattr(each, name)) is not None]


def _mean(point: Point, arm: str, name: str) -> float:
    return statistics.fmean(_values(point, arm, name))


def _median(point: Point, arm: str, name: str, form: str) -> str:
    values = _values(point, arm, name)
    return format(statistics.median(values), form) if values else "-"


# --- tables: title, and rows of which the first is the header ------------------------------------------------------------

Table = tuple[str, list[list[str]]]


def _point_table(point: Point) -> Table:
    rows = [list(HEADER)]
    for arm in (*point.arms, *point.peers):
        rows.append(
            [
                arm,
                _median(point, arm, "questions_per_second", ".3g"),
                _ratios(point, arm),
                _median(point, arm, "first_token_median", ".3f"),
                _median(point, arm, "first_token_p99", ".3f"),
                _median(point, arm, "answer_median", ".3f"),
                _median(point, arm, "output_tokens_per_second", ".3g"),
                _median(point, arm, "hit_rate", ".0%"),
                _median(point, arm, "prefilled_tokens", ",.0f"),
                _median(point, arm, "slots", ",.0f"),
                _median(point, arm, "resident", ".0f"),
                f"{_mean(point, arm, 'accuracy'):.0%} of {int(sum(_values(point, arm, 'questions')))}",
            ]
        )
    title = (
        f"{point.documents} documents of {point.tokens} tokens, {point.questions} questions each, {point.clients} clients, "
        f"{point.pool_slots:,} KV slots"
    )
    return title, rows


def _ratios(point: Point, arm: str) -> str:
    ratios = against(point.rounds, arm, STOCK)
    return f"{ratios.low:.2f} {ratios.median:.2f} {ratios.high:.2f}" if ratios else "-"


def _cost_tables(point: Point) -> list[Table]:
    if not point.costs:
        return []
    rows = [["arm", "tokens", "slots", "compression s", "of it scoring s", "share", "exact read s", "compression / exact read"]]
    for cost in point.costs:
        seconds = [f"{cost.seconds:.3f}", f"{cost.scoring_seconds:.3f}", f"{cost.scoring_seconds / cost.seconds:.0%}"]
        against_read = [f"{cost.read_seconds:.3f}", f"{cost.seconds / cost.read_seconds:.2f}x"]
        rows.append([cost.arm, str(cost.tokens), str(cost.slots), *seconds, *against_read])
    return [("What compressing one document costs, alone (medians)", rows)]


def _scaling_tables(points: Sequence[Point]) -> list[Table]:
    arms = (*points[0].arms, *points[0].peers)
    tables = []
    for title, name, form in (
        ("Seconds per question", "", ""),
        ("Seconds to the first token, median", "first_token_median", ".3f"),
        ("Answers right", "accuracy", ".0%"),
    ):
        rows = [["documents", "tokens", "KV slots", *arms]]
        for point in points:
            cells = [_median(point, arm, name, form) if form else f"{_seconds_per_question(point, arm):.3f}" for arm in arms]
            rows.append([str(point.documents), str(point.tokens), f"{point.pool_slots:,}", *cells])
        tables.append((title, rows))
    return tables


def _seconds_per_question(point: Point, arm: str) -> float:
    return 1 / statistics.median(_values(point, arm, "questions_per_second"))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)


# --- plot ---------------------------------------------------------------------------------------------------------------


def _plot(points: Sequence[Point]) -> str:
    """Seconds per question against the number of documents and against their length, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True)
    for panel, along, fixed in ((axes[0], "documents", "tokens"), (axes[1], "tokens", "documents")):
        groups: dict[int, list[Point]] = {}
        for point in points:
            groups.setdefault(getattr(point, fixed), []).append(point)
        at, chosen = max(groups.items(), key=lambda group: len(group[1]))
        for arm in (*points[0].arms, *points[0].peers):
            xs, ys = [getattr(p, along) for p in chosen], [_seconds_per_question(p, arm) for p in chosen]
            panel.plot(xs, ys, marker="o", markersize=3, label=arm)
        panel.set(xscale="log", yscale="log", xlabel=f"{along} ({at} {fixed})")
        panel.set_xticks([getattr(p, along) for p in chosen], [str(getattr(p, along)) for p in chosen])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per question")
    axes[0].legend(fontsize=8)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
