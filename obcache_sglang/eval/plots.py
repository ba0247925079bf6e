"""Plots of an evaluation: one figure per metric, one panel per method and mode, one line per score and budget."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from obcache_sglang.eval.intervals import Estimate
from obcache_sglang.eval.results import METRICS, Row

# Readable on white and on black. Scores and budgets not named here share the last of each.
_COLORS = {"attention": "#8a8a8a", "obcache-v": "#3b8fd9", "obcache-k": "#e0701a", "obcache-kv": "#1aa37a", "": "#b05fc0"}
_MARKERS = {"uniform": ("o", ":"), "adakv": ("s", "--"), "global": ("^", "-"), "profile": ("D", "-."), "": ("x", "-")}

# Stand for the page's own text colour and for no background where a plot is part of a page.
_INK, _PAPER = "#1b1b1c", "#fefefd"
PLAIN_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
"""What all plots of this project have in common, as matplotlib's parameters."""
_STYLE = {
    **PLAIN_STYLE,
    "axes.facecolor": "none",
    "figure.facecolor": _PAPER,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_COLUMNS = 3


def plot(metric: str, rows: Sequence[Row]) -> str:
    """The figure of one metric, as SVG. The same rows give the same text.

    rows: of this metric and of one task (or of all tasks together). accuracy is drawn against the ratio, the others against the
    share of KV pairs kept; of nll the paired difference from exact, since texts differ by more than arms do. Error bars are 95 %
    intervals. Without an arm to draw, the figure is empty.
    """
    # The salt makes the ids that a drawing refers to its own, so that several can stand in one page.
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": metric}]):
        figure = _draw(metric, rows)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def inline(svg: str, label: str) -> str:
    """The same drawing as part of an HTML page, in its text colour. label: what readers of the page are told, escaped."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(f"fill: {_PAPER}", "fill: none")
    # Ids that nothing refers to; they would repeat in a page of several drawings.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _draw(metric: str, rows: Sequence[Row]) -> Figure:
    by_panel: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.arm.is_exact and _y(row) is not None:
            by_panel.setdefault((row.arm.mode, row.arm.method), []).append(row)
    exact = next((row.value for row in rows if row.arm.is_exact), None) if metric == "accuracy" else Estimate(0.0, None, None, 0)

    columns = min(_COLUMNS, max(1, len(by_panel)))
    lines = max(1, -(-len(by_panel) // columns))
    figure = Figure(figsize=(max(5.0, 3.3 * columns), 2.7 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    legend: dict[str, Any] = {}
    for panel, (mode, method) in zip(axes, sorted(by_panel), strict=False):
        panel.set_title(f"{method}, query-{mode}", loc="left", fontsize=9.5)
        legend |= _draw_panel(panel, by_panel[mode, method])
        if exact is not None:
            legend |= _draw_exact(panel, exact)
        panel.set_xlabel("compression ratio" if metric == "accuracy" else "share of KV pairs kept")
        panel.tick_params(labelbottom=True)
    for empty in list(axes)[len(by_panel) :]:
        empty.set_visible(False)
    info = METRICS[metric]
    title = f"{info.title} minus exact" if metric == "nll" else info.title
    figure.supylabel(f"{title}\n({info.unit})" if info.unit else title, fontsize=9)
    if legend:
        names = sorted(legend)
        figure.legend([legend[name] for name in names], names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8.5)
    return figure


def _draw_panel(panel: Axes, rows: Iterable[Row]) -> dict[str, Any]:
    """Draws one method in one mode. Returns what a legend shows, by name."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        # Arms with options of their own are drawn beside the plain ones, by a name of theirs.
        name = ", ".join(filter(None, (row.arm.budget, row.arm.options)))
        lines.setdefault((row.arm.score, name), []).append(row)
    legend: dict[str, Any] = {}
    for score, budget in sorted(lines):
        points = sorted((_x(row), value.mean, *_reach(value)) for row in lines[score, budget] if (value := _y(row)))
        marker, dashes = _MARKERS.get(budget, _MARKERS[""])
        legend[f"{score}, {budget}"] = panel.errorbar(
            [x for x, *_ in points],
            [mean for _, mean, *_ in points],
            yerr=[[below for *_, below, _ in points], [above for *_, above in points]],
            color=_COLORS.get(score, _COLORS[""]),
            marker=marker,
            linestyle=dashes,
            markersize=4,
            linewidth=1.3,
            elinewidth=0.8,
        )
    return legend


def _draw_exact(panel: Axes, exact: Estimate) -> dict[str, Any]:
    below, above = _reach(exact)
    panel.axhspan(exact.mean - below, exact.mean + above, color=_INK, alpha=0.12, linewidth=0)
    return {"exact": panel.axhline(exact.mean, color=_INK, linewidth=1.0)}


def _reach(value: Estimate) -> tuple[float, float]:
    """How far the interval reaches below and above the mean; 0 where there is none."""
    if value.low is None or value.high is None:
        return 0.0, 0.0
    return max(0.0, value.mean - value.low), max(0.0, value.high - value.mean)


def _x(row: Row) -> float:
    return row.arm.ratio if row.metric == "accuracy" else row.kept_share


def _y(row: Row) -> Estimate | None:
    return row.against_exact if row.metric == "nll" else row.value
