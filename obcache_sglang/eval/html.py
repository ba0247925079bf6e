"""The report as one HTML page that needs nothing else: no network, no other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from obcache_sglang.eval.summary import Grid, Section, Table
from obcache_sglang.eval.survivors import survivor_section

# Statements of one kind that are shown at once.
_SHOWN_LINES = 6


def page(
    verdict: str,
    facts: Mapping[str, str],
    sections: Iterable[Section],
    tables: Sequence[Table],
    drawings: Mapping[str, str],
    documents: list[dict[str, Any]],
) -> str:
    """The whole page, which begins with the verdict. sections: none of them empty.

    drawings: by metric, SVG that is put in as it is. documents: of `survivors.read_survivors`. All other texts are escaped.
    """
    parts = [f"<p class='verdict'>{escape(verdict)}</p>", _facts(facts)]
    parts += [f"<section><h2>{escape(section.title)}</h2>{_section(section)}</section>" for section in sections]
    for metric, drawing in drawings.items():
        of_metric = [table for table in tables if table.metric == metric]
        overview = next(table for table in of_metric if table.overview)
        parts.append(f"<section><h2>{escape(overview.title)}</h2><div class='wide'>{drawing}</div>{_table(overview)}")
        parts += [
            f"<details><summary>{escape(table.title)}</summary>{_table(table)}</details>"
            for table in of_metric
            if not table.overview
        ]
        parts.append("</section>")
    if documents:
        parts.append(f"<section><h2>Which tokens survived</h2>{survivor_section(documents)}</section>")
    title = escape(f"Evaluation of {facts['model']}")
    return f"{_HEAD}<title>{title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1>{''.join(parts)}</main></body></html>\n"


def _facts(facts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>' for name, value in facts.items())}</dl>"


def _section(section: Section) -> str:
    statements = (
        f"<h3>{escape(title)}</h3>" * bool(title) + _list(lines) for title, lines in section.statements.items() if lines
    )
    return "".join(statements) + (_table(section.grid) if section.grid is not None else "")


def _list(lines: Sequence[str]) -> str:
    items = [f"<li>{escape(line)}</li>" for line in lines]
    if len(items) <= _SHOWN_LINES + 1:
        return f"<ul>{''.join(items)}</ul>"
    more = f"<details><summary>{len(items) - _SHOWN_LINES} more</summary><ul>{''.join(items[_SHOWN_LINES:])}</ul></details>"
    return f"<ul>{''.join(items[:_SHOWN_LINES])}</ul>{more}"


def _table(table: Grid) -> str:
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in table.header)
    body = []
    for first, *others in table.rows:
        cells = [
            f"<td class='{cell.verdict}'>{escape(cell.text)} <b>{cell.verdict}</b></td>"
            if cell.verdict
            else f"<td>{escape(cell.text)}</td>"
            for cell in others
        ]
        body.append(f"<tr><th scope='row'>{escape(first.text)}</th>{''.join(cells)}</tr>")
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
"""

_STYLE = """
:root { --page: #fff; --ink: #1b1b1c; --dim: #6b6b70; --line: #d9d9de; --band: #f4f4f6; --shade: 96 165 250; --worse: #b3261e;
  --better: #14713d; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17181b; --ink: #e8e8ea; --dim: #92929b; --line: #3a3b41; --band: #212327; --shade: 29 100 190;
    --worse: #ff8a80; --better: #6fd39a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1150px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.5rem; margin: 8px 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 32px 0 8px; }
h3 { font-size: 1rem; margin: 12px 0 4px; }
ul { margin: 0; padding-left: 20px; }
li { margin: 4px 0; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 16px; margin: 0; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px/1.5 ui-monospace, monospace; }
summary { cursor: pointer; padding: 6px 0; }
.wide { overflow-x: auto; margin: 8px 0; }
.wide svg { display: block; max-width: 100%; min-width: 620px; height: auto; margin: 0 auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; }
tbody tr:nth-child(even) { background: var(--band); }
@media (max-width: 600px) { tbody th { white-space: normal; min-width: 130px; } }
td { max-width: 360px; white-space: normal; }
.verdict { font-size: 17px; font-weight: 600; }
.worse { color: var(--worse); }
.better { color: var(--better); }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; }
.controls label { color: var(--dim); max-width: 100%; }
select { font: inherit; max-width: 100%; color: var(--ink); background: var(--band); border: 1px solid var(--line); border-radius: 4px;
  padding: 4px; }
#survivor-summary, #survivor-legend, #survivor-token { margin: 8px 0; font-size: 13px; }
#survivor-token { color: var(--dim); overflow-wrap: anywhere; }
#survivor-text { border: 1px solid var(--line); border-radius: 4px; padding: 12px; line-height: 1.8; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.kept { background: rgb(var(--shade) / var(--share)); border-radius: 2px; }
.dropped { color: var(--dim); }
#survivor-legend span { white-space: pre; padding: 2px; border: 1px solid var(--line); }
"""
