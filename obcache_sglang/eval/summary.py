"""What a report says, in words and tables, before it becomes Markdown or HTML."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from obcache_sglang.eval.arms import EXACT, Arm, attention_baseline, effect
from obcache_sglang.eval.intervals import FEWEST_PAIRS, Estimate
from obcache_sglang.eval.results import METRICS, Answer, Row, arm_label, arm_order, arm_settings
from obcache_sglang.eval.words import TOO_FEW, difference_words, mean_words, plain, unseen_loss, unseen_words

EXPLANATIONS = (
    "In brackets: 95 % intervals over samples; the questions about one context count as one sample, tasks count equally.",
    "Right or wrong answers have Wilson's interval and, for paired differences, Newcombe's; all else has Student's t.",
    "Differences are paired, on the questions both arms have answered; worse and better mark those whose interval excludes 0.",
    f"Of right or wrong answers McNemar's exact test must give p < 0.05 too, which fewer than {FEWEST_PAIRS} pairs never do.",
    "minus attention: minus the arm that differs in nothing but its score, which is attention's.",
    "A replay's attention score is the largest of all queries and query heads (KVzip's statistic); other scores are sums.",
    "NLL: mean negative log-likelihood of a held-out continuation's tokens. KL: mean divergence of their distributions from exact's.",
)


class Cell(NamedTuple):
    """One cell of a table. verdict: what its difference means, as of `Row.verdict`."""

    text: str
    verdict: str = ""


@dataclass(frozen=True)
class Grid:
    """A table's cells, with a head."""

    header: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Section:
    """A heading and what is below it: statements, each under its sub-heading ("" for none), and a table."""

    title: str
    statements: Mapping[str, Sequence[str]] = field(default_factory=dict)
    grid: Grid | None = None

    @property
    def is_empty(self) -> bool:
        return self.grid is None and not any(self.statements.values())


@dataclass(frozen=True)
class Table(Grid):
    """All arms on one task by one metric. overview: over all tasks of the metric."""

    metric: str
    title: str
    overview: bool


def run_facts(run: Mapping[str, Any]) -> dict[str, str]:
    """What every figure of the run rests on, by name. run: of run.json."""
    return {name: str(run[name]) for name in ("command", "model", "versions", "machine", "seed", "started")}


def overview_rows(rows: Sequence[Row], metric: str) -> list[Row]:
    """The rows of one metric over all its tasks, which come first."""
    of_metric = [row for row in rows if row.metric == metric]
    return [row for row in of_metric if row.task == of_metric[0].task]


# --- the verdict --------------------------------------------------------------------------------------------------------


def verdict(rows: Sequence[Row]) -> str:
    """The run in one sentence: how many arms lose, which loses most, and how far one can go without a loss that was seen."""
    judged: list[tuple[Row, Estimate]] = []
    for metric in METRICS:
        judged = [(row, row.against_exact) for row in overview_rows(rows, metric) if row.against_exact is not None]
        if judged:
            break
    if not judged:
        return "Verdict: nothing was compared with the exact cache, so there is nothing to judge."
    title = METRICS[metric].title
    seen = [(row, each) for row, each in judged if each.can_tell]
    if not seen:
        fewest = min(each.samples for _, each in judged)
        return f"Verdict: {TOO_FEW} whether compression costs {title} (n = {fewest})."
    lost = [(row, each) for row, each in seen if row.verdict(each) == "worse"]
    parts = [f"Verdict: {len(lost)} of {len(seen)} compressed arms lose {title} against the exact cache"]
    if lost:
        row, each = min(lost, key=_size)
        parts.append(f"most of all {arm_label(row.arm)}: {difference_words(metric, each)}")
    kept = [(row, each) for row, each in seen if row.verdict(each) != "worse"]
    if kept:
        row, each = min(kept, key=lambda item: (item[0].kept_share, _good_first(item)))
        parts.append(
            f"the most compressed without a loss that was seen is {arm_label(row.arm)}, which keeps {100 * row.kept_share:.1f} % of the KV: "
            f"{difference_words(metric, each)}"
        )
    if len(seen) < len(judged):
        parts.append(f"for {len(judged) - len(seen)} more there are {TOO_FEW}")
    return "; ".join(parts) + "."


def _size(item: tuple[Row, Estimate]) -> float:
    """Sorts the largest difference first."""
    return -abs(item[1].mean)


def _good_first(item: tuple[Row, Estimate]) -> float:
    row, each = item
    return -each.mean if METRICS[row.metric].higher_is_better else each.mean


# --- findings -----------------------------------------------------------------------------------------------------------


def findings(rows: Sequence[Row]) -> list[Section]:
    """Where compression hurts, then where it helps: the resolved differences, the largest first."""
    losses, gains = _statements(rows, "against_exact", "exact")
    worse, better = _statements(rows, "against_attention", "attention")
    like = "attention with the same method, budget, mode and ratio"
    sections = [
        Section("Where compression hurts", losses or _nothing(rows, "against_exact", "loses against exact")),
        Section(
            "Where an OBCache score is worse than attention",
            worse or _nothing(rows, "against_attention", f"is worse than {like}"),
        ),
        Section("Where it helps", better | gains or _nothing(rows, "against_attention", f"is better than {like}", gains=True)),
    ]
    return [section for section in sections if not section.is_empty]


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
                value = f"{difference_words(metric, each)}, to {plain(metric, row.value.mean)}"
                parts.append(f"{value}{task} at ratio {row.arm.ratio:g} (n = {each.samples})")
            if parts:
                # What only single tasks resolve comes last.
                rank = min(_size(item) for item in overall) if overall else math.inf
                title, differ = f"{METRICS[metric].title}, minus {other}", ""
                baseline = attention_baseline(resolved[0][0].arm) if other == "attention" else EXACT
                assert baseline is not None, "without one there is no difference"
                if baseline.is_exact:
                    title += f" (they differ in {effect(baseline, resolved[0][0].arm)})"
                else:
                    differ = f" ({effect(baseline, resolved[0][0].arm)})"
                by_metric.setdefault(title, []).append((rank, f"{settings}{differ}: {'; '.join(parts)}."))
    worse, better = (
        {title: [text for _, text in sorted(statements)] for title, statements in by_metric.items()}
        for by_metric in found.values()
    )
    return worse, better


def _nothing(rows: Sequence[Row], difference: str, what: str, *, gains: bool = False) -> dict[str, list[str]]:
    """Says that no loss (or gain) was found, and how large one could have gone unseen. Nothing where no arms were compared so."""
    by_metric: dict[str, list[Estimate]] = {}
    for row in rows:
        if (each := getattr(row, difference)) is not None:
            by_metric.setdefault(row.metric, []).append(_turned(each) if gains else each)
    if not by_metric:
        return {}
    limits = []
    for metric, estimates in by_metric.items():
        seen = [each for each in estimates if each.can_tell]
        widest = max(seen, key=lambda each: unseen_loss(metric, each)) if seen else estimates[0]
        limits.append(f"{METRICS[metric].title} {unseen_words(metric, widest)}")
    if all(limit.endswith(TOO_FEW) for limit in limits):
        return {"": [f"Whether an arm {what}: {TOO_FEW}."]}
    return {"": [f"No arm {what}. What may be there and unseen: {', '.join(limits)}."]}


def _turned(estimate: Estimate) -> Estimate:
    """The other arm minus this one."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return Estimate(-estimate.mean, -estimate.high, -estimate.low, estimate.samples, estimate.equal, estimate.p)


# --- other pairs, memory, notes -----------------------------------------------------------------------------------------


def pair_section(rows: Sequence[Row]) -> Section:
    """Arms beside others than exact and attention, over all tasks, and what each difference can be put down to."""
    made = []
    for metric in METRICS:
        for row in overview_rows(rows, metric):
            for pair in row.against:
                made.append(
                    [
                        Cell(arm_label(row.arm)),
                        Cell(arm_settings(pair.other)),
                        Cell(pair.effect),
                        Cell(METRICS[metric].title),
                        Cell(difference_words(metric, pair.difference), row.verdict(pair.difference)),
                        Cell(str(pair.difference.samples)),
                    ]
                )
    header = ["arm", "minus", "what the difference is the effect of", "metric", "difference", "samples"]
    return Section("Other pairs of arms", grid=Grid(header, made) if made else None)


def memory_section(answers: Iterable[Answer], kv_bytes_per_token: float | None) -> Section:
    """KV slots that a context of the run held, on average, and how much of its KV was saved.

    kv_bytes_per_token: of all layers; None where it is not known.
    """
    contexts: dict[Arm, dict[tuple[str, int], list[Answer]]] = {}
    for answer in answers:
        if not answer.arm.is_exact:
            contexts.setdefault(answer.arm, {}).setdefault((answer.task, answer.sample), []).append(answer)
    made = []
    for arm in sorted(contexts, key=arm_order):
        groups = contexts[arm].values()
        tokens = statistics.fmean(statistics.fmean(each.context_tokens for each in group) for group in groups)
        kept = statistics.fmean(statistics.fmean(each.kept_tokens for each in group) for group in groups)
        cells = [arm_settings(arm), f"{arm.ratio:g}", f"{tokens:,.0f}", f"{kept:,.0f}", f"{100 * (1 - kept / tokens):.1f} %"]
        if kv_bytes_per_token:
            cells += [f"{each * kv_bytes_per_token / 2**20:,.1f} MiB" for each in (tokens, kept)]
        made.append([*map(Cell, cells)])
    header = ["arm", "ratio", "tokens of a context", "KV slots held", "memory saved"]
    header += ["its KV, exact", "compressed"] if kv_bytes_per_token else []
    return Section("Memory saved", grid=Grid(header, made) if made else None)


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


def length_notes(answers: Iterable[Answer], skipped: Mapping[str, str]) -> list[str]:
    """Which samples did not fit the model: those that were cut, by task, and those that were left out. skipped: reasons, by sample."""
    samples: dict[str, set[int]] = {}
    cut: dict[str, set[int]] = {}
    for answer in answers:
        samples.setdefault(answer.task, set()).add(answer.sample)
        if answer.cut:
            cut.setdefault(answer.task, set()).add(answer.sample)
    notes = [
        f"{task}: {len(cut[task])} of {len(samples[task])} contexts lost their middle, to fit the model, by LongBench's rule."
        for task in sorted(cut)
    ]
    return notes + [f"{sample} was left out: {reason}." for sample, reason in skipped.items()]


def chance_note(rows: Iterable[Row]) -> list[str]:
    """How many differences the findings are drawn from, and what that means; nothing where there are none."""
    judged = sum(each is not None for row in rows for each in (row.against_exact, row.against_attention))
    text = (
        f"{judged} differences were judged, over arms, ratios, tasks and metrics. Where two arms do not differ, about one interval in twenty "
        "excludes 0 by chance, in either direction."
    )
    return [text] if judged else []


# --- tables -------------------------------------------------------------------------------------------------------------


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
        published = any(row.not_comparable for row in chosen)
        header += ["published figures"] * published
        overview = all(table.metric != metric for table in made)
        cells = [_cells(row) + [Cell(_comparable(row))] * published for row in chosen]
        made.append(Table(header, cells, metric, f"{info.title}: {task}", overview))
    return made


def _comparable(row: Row) -> str:
    return f"not comparable: {row.not_comparable}" if row.not_comparable else ""


def _cells(row: Row) -> list[Cell]:
    cells = [
        Cell(arm_settings(row.arm)),
        Cell(f"{row.arm.ratio:g}"),
        Cell(f"{100 * row.kept_share:.1f} %"),
        Cell(mean_words(row.metric, row.value)),
        Cell(str(row.value.samples)),
        Cell(str(row.answers)),
    ]
    differences = [row.against_exact] if METRICS[row.metric].compares_with_exact else []
    for difference in [*differences, row.against_attention]:
        text = "" if difference is None else difference_words(row.metric, difference)
        cells.append(Cell(text, row.verdict(difference)))
    return [*cells, Cell(str(row.served_exactly) if row.served_exactly else "")]
