"""The report of a run directory: where compression hurts, tables, plots, and which tokens survived."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.html import page
from obcache_sglang.eval.results import METRICS, Estimate, Row, read_answers, summarise
from obcache_sglang.eval.summary import EXPLANATIONS, Section, Table, chance_note, exact_notes, findings, run_facts, tables
from obcache_sglang.eval.survivors import read_survivors


def check_requirements() -> None:
    """Raises ConfigError where what the report is made with is not installed: better before a long run than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the report needs matplotlib: pip install 'obcache-sglang[eval]'.")


def write_report(run_dir: Path) -> None:
    """Writes table.md, table.csv, report.html, and a plot METRIC.svg for each metric that was measured, into `run_dir`.

    run_dir: holds run.json, answers.jsonl and, where survivors were noted, survivors.json. The same files give the same report,
    byte for byte. Raises ConfigError where one is missing or is not what it should be, and where matplotlib is missing.
    """
    check_requirements()
    from obcache_sglang.eval import plots

    for name in ("run.json", "answers.jsonl"):
        if not (run_dir / name).is_file():
            raise ConfigError(f"{run_dir} has no {name}: it is not the folder of an evaluation.")
    facts = run_facts(json.loads((run_dir / "run.json").read_text(encoding="utf-8")))
    answers, notes = read_answers(run_dir / "answers.jsonl")
    documents = read_survivors(run_dir / "survivors.json")
    rows = summarise(answers)
    sections = [
        *findings(rows),
        Section("Notes", {"": [*EXPLANATIONS, chance_note(rows), *notes], "served exactly": exact_notes(answers)}),
    ]

    overviews: dict[str, list[Row]] = {}
    for row in rows:
        of_metric = overviews.setdefault(row.metric, [])
        if not of_metric or of_metric[0].task == row.task:
            of_metric.append(row)
    drawings = {metric: plots.plot(metric, chosen) for metric, chosen in overviews.items()}
    for metric, svg in drawings.items():
        _write(run_dir / f"{metric}.svg", svg)
    _write(run_dir / "table.csv", _csv(rows))
    _write(run_dir / "table.md", _markdown(facts, sections, tables(rows)))
    inline = {metric: plots.inline(svg, f"Plot of {METRICS[metric].title}, arm by arm") for metric, svg in drawings.items()}
    _write(run_dir / "report.html", page(facts, sections, tables(rows), inline, documents))


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def _csv(rows: Iterable[Row]) -> str:
    """All rows in one table, numbers in full."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ("metric", "task", "method", "score", "budget", "mode", "ratio", "kept_share", "answers", "served_exactly")
    estimates = ("value", "minus_exact", "minus_attention")
    writer.writerow([*names, *(f"{name}_{part}" for name in estimates for part in ("mean", "se", "samples"))])
    for row in rows:
        arm = row.arm
        mode = "" if arm.is_exact else arm.mode
        start = [row.metric, row.task, arm.method, arm.score, arm.budget, mode, arm.ratio, row.kept_share, row.answers]
        rest = [_fields(each) for each in (row.value, row.against_exact, row.against_attention)]
        writer.writerow([*start, row.served_exactly, *(field for fields in rest for field in fields)])
    return file.getvalue()


def _fields(estimate: Estimate | None) -> tuple[float | None, float | None, int | None]:
    return (None, None, None) if estimate is None else (estimate.mean, estimate.se, estimate.samples)


def _markdown(facts: Mapping[str, str], sections: Iterable[Section], all_tables: Iterable[Table]) -> str:
    lines = [f"- {name}: `{value}`" for name, value in facts.items()]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for title, statements in section.statements.items():
            lines += ["", *([f"{title}:", ""] if title else []), *(f"- {line}" for line in statements)]
    for table in all_tables:
        lines += ["", f"## {table.title}", "", _markdown_row(table.header), _markdown_row(["---"] * len(table.header))]
        lines += [_markdown_row(cell.text + f" **{cell.verdict}**" * bool(cell.verdict) for cell in row) for row in table.rows]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
