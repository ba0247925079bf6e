"""Draws the plots of the README and of launch/results from the CSV files there:  python -m launch.plot_results [--folder launch/results]

accuracy.svg from accuracy.csv, questions_per_second.svg from bench.csv, scaling.svg from scaling.csv. The same files give the same drawings.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from obcache_sglang.eval.plots import PLAIN_STYLE

Panel = Callable[[Axes, list[dict[str, str]]], None]

FOLDER = Path(__file__).parent / "results"
_COLORS = ("#1aa37a", "#3b8fd9", "#b05fc0", "#e0701a", "#8a8a8a")
_STYLE = {**PLAIN_STYLE, "legend.fontsize": 8.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="of the CSV files, and of the drawings (default: launch/results)"
    )
    for file in draw(parser.parse_args().folder):
        print(file)


def draw(folder: Path) -> list[Path]:
    """Writes the drawings beside their CSV files, and returns their paths."""
    return [
        _draw(folder / "accuracy.svg", _accuracy, _rows(folder / "accuracy.csv")),
        _draw(folder / "questions_per_second.svg", _questions_per_second, _rows(folder / "bench.csv")),
        _draw(folder / "scaling.svg", _scaling, _rows(folder / "scaling.csv")),
    ]


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def _draw(file: Path, panel: Panel, rows: list[dict[str, str]]) -> Path:
    # The salt makes the ids that a drawing refers to the same every time.
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": file.stem}]):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        panel(figure.subplots(), rows)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at the ends of lines.
    file.write_text("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n", encoding="utf-8")
    return file


def _accuracy(axes: Axes, rows: list[dict[str, str]]) -> None:
    """Right answers in percent against the fraction of KV pairs removed; the exact cache is a line across."""
    by_arm = defaultdict(list)
    for row in rows:
        by_arm[row["arm"]].append((float(row["ratio"]), float(row["right_percent"]), int(row["questions"])))
    for (arm, points), color in zip(by_arm.items(), reversed(_COLORS), strict=False):
        ratios, right, questions = zip(*points, strict=True)
        if arm == "exact cache":
            axes.axhline(right[0], color=color, linestyle=":", label=f"{arm} ({questions[0]} questions)")
            continue
        errors = [100 * math.sqrt(p / 100 * (1 - p / 100) / n) for p, n in zip(right, questions, strict=True)]
        axes.errorbar(ratios, right, errors, color=color, marker="o", capsize=2, label=f"{arm} ({questions[0]})")
    axes.set(xlabel="compression ratio: share of KV pairs removed", ylabel="right answers, %", xlim=(0.45, 0.95), ylim=(0, 102))
    axes.set_title("Single facts in 1,024 tokens, compressed before the question, SmolLM2-135M", loc="left", fontsize=8)
    axes.legend(loc="center left", bbox_to_anchor=(0, 0.57))


def _questions_per_second(axes: Axes, rows: list[dict[str, str]]) -> None:
    """Questions per second of each arm, in groups by the length of answers; over the bars, how many times stock at its best."""
    lengths = list(dict.fromkeys(row["output_tokens"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    width = 0.8 / len(arms)
    for number, (arm, color) in enumerate(zip(arms, (_COLORS[4], _COLORS[3], _COLORS[1], _COLORS[0]), strict=False)):
        mine = [row for row in rows if row["arm"] == arm]
        places = [lengths.index(row["output_tokens"]) + (number - (len(arms) - 1) / 2) * width for row in mine]
        bars = axes.bar(places, [float(row["questions_per_second"]) for row in mine], width, color=color, label=arm)
        axes.bar_label(bars, [f"{float(row['times_best_stock']):.2f}x" for row in mine], fontsize=7, padding=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(lengths)), [f"answers of {length}" for length in lengths])
    axes.set(ylabel="questions per second", ylim=(0.05, 1.5))
    axes.set_title("8 documents of 2,048 tokens, a pool for a fifth, SmolLM2-135M, two CPU cores", loc="left", fontsize=8)
    axes.legend(loc="upper right")


def _scaling(axes: Axes, rows: list[dict[str, str]]) -> None:
    """Questions per second against the number of documents of 1,024 tokens."""
    by_arm = defaultdict(list)
    for row in rows:
        if row["tokens"] == "1024":
            by_arm[row["arm"]].append((int(row["documents"]), 1 / float(row["seconds_per_question"])))
    for (arm, points), color in zip(by_arm.items(), (_COLORS[3], _COLORS[1]), strict=True):
        documents, rates = zip(*points, strict=True)
        axes.plot(documents, rates, color=color, marker="o", label=arm)
    axes.set_xscale("log", base=2)
    axes.set_xticks(documents, [str(number) for number in documents])
    axes.axvline(15, color=_COLORS[4], linestyle=":", label="the pool holds 15 exactly")
    axes.set(xlabel="documents of 1,024 tokens, three questions each", ylabel="questions per second", ylim=(0, None))
    axes.set_title("Eight clients, a pool of 16,250 slots, SmolLM2-135M on two CPU cores", loc="left", fontsize=8)
    axes.legend(loc="lower left")


if __name__ == "__main__":
    main()
