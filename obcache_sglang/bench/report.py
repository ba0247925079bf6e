"""The report of a bench: findings first, then tables; as text for a terminal and as Markdown, and all numbers as JSON."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from obcache_sglang.bench.client import MODULE, ClientRun
from obcache_sglang.bench.rounds import LATENCIES, STATISTICS, Cost, Round, against, fastest, latency

HEADER = (
    "arm",
    "questions/s",
    "x best stock: min median max",
    "median TTFT ms",
    "median TPOT ms",
    "median E2E ms",
    "output tokens/s",
    "hit rate",
    "prefilled",
    "slots/document",
    "resident",
    "right",
)

LATENCY_COLUMNS = [f"{statistic}_{name}_ms" for name in LATENCIES for statistic in STATISTICS]

_LATENCY_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e_latency": "E2E"}

EXPLANATIONS = (
    "Closed loop: each client sends its next question when it has its answer, so that questions/s is what an arm can do. An open loop's "
    "fixed rate would leave one arm idle and let another's queue grow without end.",
    "Arms take turns within each round, in another order each round, from an empty cache; an unmeasured warm-up comes first.",
    "Numbers are medians over rounds, right is their mean. Ratios are pair by pair: with the fastest stock arm in the same round.",
    "TTFT, TPOT, ITL and E2E are sglang.bench_serving's, by its definitions: time to the first token, time per output token after it, "
    "gaps between tokens, and the whole answer.",
    "prefilled: prompt tokens not found in the cache, and those re-read by replay. slots/document: KV slots that one document holds.",
    "resident: documents in the pool after the round. right: answers that begin as the document says.",
)


@dataclass(frozen=True)
class Point:
    """One workload, measured.

    workload: its digest.
    output_tokens: of an answer, the most; with ignore_eos, exactly.
    arms: in the order of the tables, stock's and OBCache's.
    stock: those of `arms` that are stock SGLang.
    peers: KVPress's arms.
    costs: of compressing its documents.
    """

    documents: int
    tokens: int
    questions: int
    output_tokens: int
    ignore_eos: bool
    pool_slots: int
    clients: int
    workload: str
    arms: tuple[str, ...]
    stock: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: Sequence[Round]
    costs: Sequence[Cost] = field(default_factory=tuple)

    @property
    def best_stock(self) -> str:
        return fastest(self.rounds, self.stock)

    @property
    def title(self) -> str:
        answers = f"answers of {'' if self.ignore_eos else 'at most '}{self.output_tokens} tokens"
        return f"{self.documents} documents of {self.tokens} tokens, {answers}"


def write_report(
    folder: Path,
    facts: Mapping[str, str],
    points: Sequence[Point],
    notes: Iterable[str] = (),
    client_runs: Sequence[ClientRun] = (),
) -> str:
    """Writes bench.json and bench.md (and with several sizes of documents scaling.svg) into `folder`.

    facts: command, versions, machine and so on. notes: what else readers must know. client_runs: of SGLang's own client. Returns
    what a terminal shows: findings and tables.
    """
    scaling = len({(point.documents, point.tokens) for point in points}) > 1
    tables = _scaling_tables(points) if scaling else [table for point in points for table in _point_tables(point)]
    tables += _client_tables(client_runs)
    lines = [*findings(points), *client_findings(client_runs)]
    measured = {
        "facts": dict(facts),
        "findings": lines,
        "points": [asdict(point) | {"best_stock": point.best_stock} for point in points],
        MODULE: [asdict(run) for run in client_runs],
    }
    (folder / "bench.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    markdown = ["# Speed", "", *(f"- {line}" for line in lines), ""]
    markdown += [f"- {name}: `{value}`" for name, value in facts.items()]
    for title, rows in tables:
        markdown += ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])]
    if scaling:
        (folder / "scaling.svg").write_text(_plot(points), encoding="utf-8")
        markdown += ["", "![Seconds per question](scaling.svg)"]
    markdown += ["", "## Notes", "", *(f"- {note}" for note in (*EXPLANATIONS, *notes))]
    (folder / "bench.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    return "\n".join([*lines, *(f"\n{title}\n{_aligned(rows)}" for title, rows in tables)])


# --- findings -----------------------------------------------------------------------------------------------------------


def findings(points: Iterable[Point]) -> list[str]:
    """Where compression does not pay, then where it hurts, speed or answers, then where it helps."""
    unpaid, hurts, helps = [], [], []
    points = list(points)
    for point in points:
        where = f" ({point.title})" if len(points) > 1 else ""
        best = point.best_stock
        helps += [
            f"{other} has {ratios.median:.2f}x the questions/s of {best}, stock at its best ({ratios.spread}){where}."
            for other in point.stock
            if other != best and (ratios := against(point.rounds, other, best))
        ]
        ours = {arm: ratios for arm in point.arms if arm not in point.stock and (ratios := against(point.rounds, arm, best))}
        if ours and all(ratios.low <= 1 for ratios in ours.values()):
            unpaid.append(f"Compression does not pay here: no arm is faster than {best} in every round{where}.")
        for arm, ratios in ours.items():
            spread = f"{ratios.median:.2f}x {best}'s questions/s ({ratios.spread})"
            if ratios.high < 1:
                hurts.append(f"HURTS: {arm} is slower, {spread}{where}.")
            elif ratios.low > 1:
                helps.append(f"helps: {arm} is faster, {spread}{where}.")
            else:
                helps.append(f"no clear difference: {arm} has {spread}{where}.")
            right, exact = (_mean(point, each, "accuracy") for each in (arm, best))
            if right < exact:
                hurts.append(f"HURTS: {arm} answers {right:.0%} right, {best} {exact:.0%}{where}.")
            hurts += [f"HURTS: {arm} has {longer}{where}." for longer in _longer(point, arm, best)]
            for peer in point.peers:
                if beside := against(point.rounds, arm, peer):
                    if beside.median < 1:
                        hurts.append(
                            f"HURTS: {arm} is slower than {peer}, {beside.median:.2f}x its questions/s ({beside.spread}){where}."
                        )
                    else:
                        helps.append(f"{arm} has {beside.median:.1f}x the questions/s of {peer} ({beside.spread}){where}.")
    return unpaid + hurts + helps


def _longer(point: Point, arm: str, stock: str) -> Iterable[str]:
    """The median latencies that are longer than stock's in every round."""
    for name, title in _LATENCY_TITLES.items():
        ratios = against(point.rounds, arm, stock, latency(f"median_{name}_ms"))
        if ratios and ratios.low > 1:
            yield f"{ratios.median:.2f}x {stock}'s median {title} ({ratios.spread})"


def client_findings(runs: Iterable[ClientRun]) -> list[str]:
    """What `sglang.bench_serving` says of each arm against the fastest stock arm."""
    hurts, helps = [], []
    runs = list(runs)
    for run in runs:
        best = _best_stock_run(runs, run.output_tokens)
        if run.stock or best is None:
            continue
        ratio = run.result["request_throughput"] / best.result["request_throughput"]
        line = f"{run.arm} has {ratio:.2f}x {best.arm}'s requests/s by {MODULE}, {run.output_tokens} output tokens (one round)."
        if ratio < 1:
            hurts.append(f"HURTS: {line}")
        else:
            helps.append(line)
    return hurts + helps


def _best_stock_run(runs: Iterable[ClientRun], output_tokens: int) -> ClientRun | None:
    stock = [run for run in runs if run.output_tokens == output_tokens and run.stock]
    return max(stock, key=lambda run: run.result["request_throughput"], default=None)


def _values(point: Point, arm: str, name: str) -> list[float]:
    """A field of the rounds of `arm`, or one of their latencies; without rounds that have none."""
    numbers = [each.latencies.get(name, getattr(each, name, None)) for each in point.rounds if each.arm == arm]
    return [number for number in numbers if number is not None]


def _mean(point: Point, arm: str, name: str) -> float:
    return statistics.fmean(_values(point, arm, name))


def _median(point: Point, arm: str, name: str, form: str) -> str:
    values = _values(point, arm, name)
    return format(statistics.median(values), form) if values else "-"


# --- tables: title, and rows of which the first is the header ------------------------------------------------------------

Table = tuple[str, list[list[str]]]


def _point_tables(point: Point) -> list[Table]:
    rows = [list(HEADER)]
    arms = (*point.arms, *point.peers)
    for arm in arms:
        rows.append(
            [
                arm,
                _median(point, arm, "questions_per_second", ".3g"),
                _ratios(point, arm),
                *(_median(point, arm, f"median_{name}_ms", ",.0f") for name in ("ttft", "tpot", "e2e_latency")),
                _median(point, arm, "output_tokens_per_second", ".3g"),
                _median(point, arm, "hit_rate", ".0%"),
                _median(point, arm, "prefilled_tokens", ",.0f"),
                _median(point, arm, "slots", ",.0f"),
                _median(point, arm, "resident", ".0f"),
                f"{_mean(point, arm, 'accuracy'):.0%} of {int(sum(_values(point, arm, 'questions')))}",
            ]
        )
    title = f"{point.title}, {point.questions} questions each, {point.clients} clients, {point.pool_slots:,} KV slots"
    latencies = [
        ["arm", *LATENCY_COLUMNS],
        *([arm, *(_median(point, arm, name, ",.1f") for name in LATENCY_COLUMNS)] for arm in arms),
    ]
    return [(title, rows), (f"{point.title}: latencies", latencies), *_cost_tables(point)]


def _ratios(point: Point, arm: str) -> str:
    ratios = against(point.rounds, arm, point.best_stock)
    return f"{ratios.low:.2f} {ratios.median:.2f} {ratios.high:.2f}" if ratios else "-"


def _client_tables(runs: Sequence[ClientRun]) -> list[Table]:
    """One for each number of output tokens."""
    tables = []
    for output_tokens in dict.fromkeys(run.output_tokens for run in runs):
        rows = [["arm", "request_throughput", "x best stock", "output_throughput", "cache_hit_rate_pct", *LATENCY_COLUMNS]]
        best = _best_stock_run(runs, output_tokens)
        these = [run for run in runs if run.output_tokens == output_tokens]
        for run in these:
            rate = run.result["request_throughput"]
            ratio = f"{rate / best.result['request_throughput']:.2f}" if best else "-"
            hit_rate = f"{run.result['cache_report']['cache_hit_rate_pct']:.0f}"
            latencies = [f"{run.result[name]:,.1f}" for name in LATENCY_COLUMNS]
            rows.append([run.arm, f"{rate:.3g}", ratio, f"{run.result['output_throughput']:.3g}", hit_rate, *latencies])
        size = f"{these[0].result['completed']} prompts, {output_tokens} output tokens"
        tables.append((f"{MODULE} --dataset-name generated-shared-prefix, {size}, one round", rows))
    return tables


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
        ("Median TTFT, ms", "median_ttft_ms", ",.0f"),
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
