"""The report of a run directory: its verdict, where compression hurts, tables, plots, examples, and which tokens survived."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.examples import example_section
from obcache_sglang.eval.html import page
from obcache_sglang.eval.intervals import Estimate
from obcache_sglang.eval.results import METRICS, Row, read_answers, summarise
from obcache_sglang.eval.summary import (
    EXPLANATIONS,
    Grid,
    Section,
    Table,
    chance_note,
    exact_notes,
    findings,
    length_notes,
    memory_section,
    overview_rows,
    pair_section,
    run_facts,
    tables,
    verdict,
)
from obcache_sglang.eval.survivors import read_survivors


def check_requirements() -> None:
    """Raises ConfigError where what the report is made with is not installed: better before a long run than after it."""
    for package in ("matplotlib", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the report needs {package}: pip install 'obcache-sglang[eval]'.")


def write_report(run_dir: Path) -> None:
    """Writes table.md, table.csv, report.html, and a plot METRIC.svg for each metric that was measured, into `run_dir`.

    run_dir: holds run.json, answers.jsonl and, where survivors were noted or samples left out, survivors.json and skipped.json. The
    same files give the same report, byte for byte. Raises ConfigError where one is missing or is not what it should be, and where matplotlib is missing.
    """
    check_requirements()
    from obcache_sglang.eval import plots

    for name in ("run.json", "answers.jsonl"):
        if not (run_dir / name).is_file():
            raise ConfigError(f"{run_dir} has no {name}: it is not the folder of an evaluation.")
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    answers, notes = read_answers(run_dir / "answers.jsonl")
    documents = read_survivors(run_dir / "survivors.json")
    if not documents:
        notes.append("This run noted no survivors (--survivors N): which tokens each head keeps.")
    rows = summarise(answers)
    all_tables, first, facts = tables(rows), verdict(rows), run_facts(run)
    sections = [
        *findings(rows),
        pair_section(rows),
        memory_section(answers, run.get("kv_bytes_per_token")),
        example_section(answers),
        Section(
            "Notes",
            {
                "": [*EXPLANATIONS, *chance_note(rows), *notes],
                "did not fit the model": length_notes(answers, _skipped(run_dir / "skipped.json")),
                "served exactly": exact_notes(answers),
            },
        ),
    ]
    sections = [section for section in sections if not section.is_empty]

    drawings = {metric: plots.plot(metric, chosen) for metric in METRICS if (chosen := overview_rows(rows, metric))}
    for metric, svg in drawings.items():
        _write(run_dir / f"{metric}.svg", svg)
    _write(run_dir / "table.csv", _csv(rows))
    _write(run_dir / "table.md", _markdown(first, facts, sections, all_tables))
    inline = {metric: plots.inline(svg, f"Plot of {METRICS[metric].title}, arm by arm") for metric, svg in drawings.items()}
    _write(run_dir / "report.html", page(first, facts, sections, all_tables, inline, documents))


def _skipped(file: Path) -> dict[str, str]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def _csv(rows: Iterable[Row]) -> str:
    """All rows in one table, numbers in full."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ("metric", "task", "method", "score", "budget", "options", "mode", "ratio", "kept_share", "answers", "served_exactly")
    estimates = ("value", "minus_exact", "minus_attention")
    parts = ("mean", "low", "high", "samples")
    writer.writerow([*names, *(f"{name}_{part}" for name in estimates for part in parts), "not_comparable"])
    for row in rows:
        arm = row.arm
        mode = "" if arm.is_exact else arm.mode
        start = [
            row.metric,
            row.task,
            arm.method,
            arm.score,
            arm.budget,
            arm.options,
            mode,
            arm.ratio,
            row.kept_share,
            row.answers,
        ]
        rest = [_fields(each) for each in (row.value, row.against_exact, row.against_attention)]
        writer.writerow([*start, row.served_exactly, *(field for fields in rest for field in fields), row.not_comparable])
    return file.getvalue()


def _fields(estimate: Estimate | None) -> tuple[float | int | None, ...]:
    return (None,) * 4 if estimate is None else (estimate.mean, estimate.low, estimate.high, estimate.samples)


def _markdown(first: str, facts: Mapping[str, str], sections: Iterable[Section], all_tables: Iterable[Table]) -> str:
    lines = [first, "", *(f"- {name}: `{value}`" for name, value in facts.items())]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for title, statements in section.statements.items():
            if statements:
                lines += ["", *([f"{title}:", ""] if title else []), *(f"- {line}" for line in statements)]
        if section.grid is not None:
            lines += ["", *_markdown_grid(section.grid)]
    for table in all_tables:
        lines += ["", f"## {table.title}", "", *_markdown_grid(table)]
    return "\n".join(lines) + "\n"


def _markdown_grid(grid: Grid) -> list[str]:
    rows = [_markdown_row(cell.text + f" **{cell.verdict}**" * bool(cell.verdict) for cell in row) for row in grid.rows]
    return [_markdown_row(grid.header), _markdown_row(["---"] * len(grid.header)), *rows]


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
