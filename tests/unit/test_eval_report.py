"""The evaluation report: its statistics against hand-worked numbers, what it says first, and the page in a browser."""

from __future__ import annotations

import csv
import html.parser
import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report needs the extra `eval`")

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import EXACT, Arm
from obcache_sglang.eval.intervals import Estimate, newcombe, wilson
from obcache_sglang.eval.report import write_report
from obcache_sglang.eval.results import ALL_TASKS, Row, read_answers, summarise

RUN = {
    "command": "python -m obcache_sglang.eval small --seed 7",
    "model": "small <model>",
    "versions": "sglang 0.5.23, torch 2.14.1",
    "machine": "two cores",
    "seed": 7,
    "started": "2025-01-02 03:04",
}
ATTENTION = Arm("tova", "attention", "uniform", 0.5)
OBCACHE = Arm("tova", "obcache-v", "uniform", 0.5)
HOSTILE = "</script><script>document.title = 'broken'</script> & <b>\u2028"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def answer(
    arm: Arm, sample: int, question: int = 0, *, task: str = "needle", status: str = "reused", **metrics: float
) -> dict[str, Any]:
    kept = None if arm.is_exact or status == "exact" else round(1000 * (1 - arm.ratio))
    return {
        "arm": arm.to_dict(),
        "task": task,
        "sample": sample,
        "question": question,
        "metrics": metrics,
        "asked": "Which number?",
        "output": "zwölf",
        "references": ["zwölf"],
        "status": "exact" if arm.is_exact else status,
        "reason": "no KV slots" if status == "exact" else None,
        "context_tokens": 1000,
        "kept_tokens": kept,
    }


def write_run(
    folder: Path, lines: list[dict[str, Any]], survivors: list[dict[str, Any]] | None = None, run: dict[str, Any] = RUN
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    if survivors is not None:
        (folder / "survivors.json").write_text(json.dumps(survivors, ensure_ascii=False), encoding="utf-8")
    return folder


def fake_run(folder: Path, seed: int = 0, num_samples: int = 12) -> Path:
    """A run directory as an evaluation leaves it: answers get worse with the ratio, faster for a window method than for replay."""
    rng = random.Random(seed)
    arms = [
        Arm(method, score, budget, ratio, mode)
        for method, budgets in (("snapkv", ("uniform", "adakv")), ("replay", ("global",)))
        for budget in budgets
        for score in ("attention", "obcache-v", "obcache-k")
        for ratio in (0.5, 0.7, 0.9)
        for mode in (("agnostic", "aware") if method == "snapkv" else ("agnostic",))
    ]
    lines = []
    for sample in range(num_samples):
        for arm in [EXACT, *arms]:
            harm = arm.ratio ** (2 if arm.method == "snapkv" else 6) * (0.6 if arm.score.startswith("obcache") else 0.8)
            for task, luck in (("needle_prose", 0.98), ("needle_code", 0.9)):
                for question in range(3):
                    status = "exact" if arm.ratio == 0.9 and sample == 3 else "reused"
                    right = float(rng.random() < luck - (harm if status == "reused" else 0))
                    lines.append(answer(arm, sample, question, task=task, status=status, accuracy=right))
            if arm.mode == "agnostic":
                kl = 0.0 if arm.is_exact else abs(rng.gauss(harm / 2, 0.02))
                nll = 2.2 + math.sin(sample) / 3 + kl + rng.gauss(0, 0.01) * (not arm.is_exact)
                lines.append(answer(arm, sample, task="continuation", nll=nll, kl=kl))
    words = [
        "The",
        "  light\n\n",
        "of",
        "one",
        "colour",
        "is\trefracted",
        "more",
        " than",
        "that",
        "of",
        "another,\nas",
        "<i>",
        "&",
        "↵",
        "show.",
    ]
    survivors = []
    for title, length in (("needle_prose 0", 240), (f"needle_code {HOSTILE}", 90)):
        tokens = [" " + rng.choice(words) for _ in range(length - 1)] + [HOSTILE]
        weights = [rng.random() ** 4 for _ in tokens]
        for arm in (arms[0], arms[-1]):
            kept = [[sum(rng.random() < weight * 2 * (1 - arm.ratio) for _ in range(3)) for weight in weights] for _ in range(5)]
            survivors.append({"title": title, "arm": arm.to_dict(), "num_heads": 3, "tokens": tokens, "kept": kept})
    return write_run(folder, lines, survivors)


@pytest.fixture(scope="module")
def report_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fake_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


def rows_of(tmp_path: Path, lines: list[dict[str, Any]]) -> dict[tuple[str, str, Arm], Row]:
    answers, _ = read_answers(write_run(tmp_path, lines) / "answers.jsonl")
    return {(row.metric, row.task, row.arm): row for row in summarise(answers)}


def approx(mean: float, reach: float | None, samples: int) -> Estimate:
    """A mean with a symmetric interval of that reach."""
    low, high = (None, None) if reach is None else (pytest.approx(mean - reach), pytest.approx(mean + reach))
    return Estimate(pytest.approx(mean), low, high, samples)


T = {1: 12.706204736, 2: 4.30265273, 3: 3.182446305}
"""Student's quantiles at 97.5 %, by degrees of freedom."""


# --- statistics ---------------------------------------------------------------------------------------------------------


def test_questions_of_one_context_are_one_sample(tmp_path: Path) -> None:
    """NLLs 2 and 1, 4 and 5 are samples 1.5 and 4.5: mean 3, standard deviation sqrt(4.5), standard error 1.5, reach t(1) times that.
    A third sample has but one question, 6: mean 4, deviation sqrt(5.25), error sqrt(1.75)."""
    two = [answer(EXACT, i, j, nll=value) for i, j, value in ((0, 0, 2), (0, 1, 1), (1, 0, 4), (1, 1, 5))]
    row = rows_of(tmp_path, two)["nll", "needle", EXACT]
    assert (row.value, row.answers) == (approx(3, 1.5 * T[1], 2), 4)
    row = rows_of(tmp_path, [*two, answer(EXACT, 2, nll=6)])["nll", "needle", EXACT]
    assert (row.value, row.answers) == (approx(4, math.sqrt(1.75) * T[2], 3), 5)


def test_differences_are_paired_question_by_question(tmp_path: Path) -> None:
    """exact: [1, 0], [1], [0, 1], [1]; obcache: [0, -], [1], [0, 0], -. Differences -1, 0, -1/2: mean -1/2, variance 1/4.

    attention: 0 and 1 on the first questions of samples 1 and 2: obcache minus attention is 1 and -1: mean 0, variance 2.
    """
    lines = [answer(EXACT, i, j, nll=value) for i, j, value in ((0, 0, 1), (0, 1, 0), (1, 0, 1), (2, 0, 0), (2, 1, 1), (3, 0, 1))]
    lines += [answer(OBCACHE, i, j, nll=value) for i, j, value in ((0, 0, 0), (1, 0, 1), (2, 0, 0), (2, 1, 0))]
    lines += [answer(ATTENTION, i, nll=value) for i, value in ((1, 0), (2, 1), (4, 1))]
    rows = rows_of(tmp_path, lines)
    row = rows["nll", "needle", OBCACHE]
    assert row.against_exact == approx(-1 / 2, 0.5 / math.sqrt(3) * T[2], 3)
    assert row.against_attention == approx(0, T[1], 2)
    assert rows["nll", "needle", ATTENTION].against_exact == approx(0, T[1], 2)
    assert rows["nll", "needle", ATTENTION].against_attention is None
    assert rows["nll", "needle", EXACT].against_exact is None


def test_right_or_wrong_pairs_have_newcombes_interval(tmp_path: Path) -> None:
    """The same pairing, counted: of samples 0 to 7 both arms answered, 5 both right, 2 only exact, 1 neither."""
    lines = [answer(EXACT, i, accuracy=float(i < 7)) for i in range(9)] + [
        answer(OBCACHE, i, accuracy=float(i < 5)) for i in range(8)
    ]
    row = rows_of(tmp_path, lines)["accuracy", "needle", OBCACHE]
    low, high = newcombe({(1.0, 1.0): 5, (0.0, 1.0): 2, (0.0, 0.0): 1})
    assert row.against_exact == Estimate(-0.25, low, high, 8, p=0.5)
    assert row.value == Estimate(5 / 8, *wilson(5, 8), 8)


@pytest.mark.parametrize("change", [{"ratio": 0.6}, {"budget": "adakv"}, {"method": "h2o"}, {"mode": "aware"}])
def test_the_attention_baseline_differs_in_nothing_else(tmp_path: Path, change: dict[str, Any]) -> None:
    for arm, other in ((OBCACHE, replace(ATTENTION, **change)), (replace(OBCACHE, **change), ATTENTION)):
        lines = [answer(each, i, accuracy=1) for each in (arm, other) for i in range(3)]
        assert rows_of(tmp_path, lines)["accuracy", "needle", arm].against_attention is None


def test_tasks_count_equally_and_only_their_inner_spread_is_an_error(tmp_path: Path) -> None:
    """Task a: 0, 1 (mean 0.5, error 0.5); task b: 1, 2, 2, 1 (mean 1.5, error sqrt(1/12)). All: mean 1, squared error
    (1/4 + 1/12) / 4 = 1/12; degrees of freedom (1/12)**2 / ((1/16)**2 / 1 + (1/48)**2 / 3) = 16/9 / 1.037..."""
    lines = [answer(EXACT, i, task="a", nll=i) for i in range(2)]
    lines += [answer(EXACT, i, task="b", nll=1 + (i in (1, 2))) for i in range(4)]
    rows = rows_of(tmp_path, lines)
    assert rows["nll", "a", EXACT].value == approx(0.5, 0.5 * T[1], 2)
    assert rows["nll", "b", EXACT].value == approx(1.5, math.sqrt(1 / 12) * T[3], 4)
    both = rows["nll", ALL_TASKS, EXACT].value
    assert (both.mean, both.samples) == (1, 6)
    assert both.high is not None and T[2] < (both.high - 1) / math.sqrt(1 / 12) < T[1]  # 1.7 degrees of freedom


def test_one_sample_has_no_error_and_resolves_nothing(tmp_path: Path) -> None:
    lines = [answer(EXACT, 0, accuracy=1), answer(OBCACHE, 0, accuracy=0)]
    row = rows_of(tmp_path, lines)["accuracy", "needle", OBCACHE]
    assert row.against_exact == Estimate(-1, None, None, 1, p=1.0)
    assert row.verdict(row.against_exact) == ""


@pytest.mark.parametrize(
    ("metric", "sign", "verdict"),
    [("accuracy", 1, "better"), ("accuracy", -1, "worse"), ("nll", 1, "worse"), ("nll", -1, "better")],
)
def test_verdicts_know_which_way_a_metric_points(tmp_path: Path, metric: str, sign: int, verdict: str) -> None:
    lines = [
        answer(arm, i, **{metric: 0.5 + sign * (0.2 + i / 100) * (arm == OBCACHE)}) for arm in (EXACT, OBCACHE) for i in range(4)
    ]
    row = rows_of(tmp_path, lines)[metric, "needle", OBCACHE]
    assert row.verdict(row.against_exact) == verdict


def test_an_interval_that_includes_zero_is_no_verdict(tmp_path: Path) -> None:
    """Differences 0, 1, 1: mean 2/3, error 1/3: over two standard errors would do, t(2) = 4.3 of them do not. With 0, 1, 1, 1, 1, 1
    the error is 1/6 and t(5) = 2.57."""
    lines = [answer(EXACT, i, nll=1) for i in range(6)]
    lines += [answer(OBCACHE, i, nll=value) for i, value in ((0, 1), (1, 2), (2, 2))]
    row = rows_of(tmp_path, lines)["nll", "needle", OBCACHE]
    assert (row.against_exact, row.verdict(row.against_exact)) == (approx(2 / 3, T[2] / 3, 3), "")
    row = rows_of(tmp_path, [*lines, *(answer(OBCACHE, i, nll=2) for i in (3, 4, 5))])["nll", "needle", OBCACHE]
    assert row.verdict(row.against_exact) == "worse"


# --- what is read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 40, 'ö"'])
def test_a_last_line_cut_off_is_left_out_with_a_note(tmp_path: Path, cut: int | str) -> None:
    file = write_run(tmp_path, [answer(EXACT, 0, accuracy=1), answer(EXACT, 1, accuracy=0)]) / "answers.jsonl"
    content = file.read_bytes().rstrip(b"\n")
    # In the middle of a character of two bytes: half a character is not even text.
    keep = content.rindex(b"zw") + 3 if isinstance(cut, str) else len(content) - cut
    file.write_bytes(content[:keep])
    answers, notes = read_answers(file)
    assert [each.sample for each in answers] == [0]
    assert "cut off" in notes[0]


def test_a_last_line_that_only_lacks_its_end_counts(tmp_path: Path) -> None:
    file = write_run(tmp_path, [answer(EXACT, 0, accuracy=1), answer(EXACT, 1, accuracy=0)]) / "answers.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    answers, notes = read_answers(file)
    assert (len(answers), notes) == (2, [])


def test_the_last_of_several_answers_counts(tmp_path: Path) -> None:
    lines = [answer(EXACT, 0, accuracy=0), answer(EXACT, 1, accuracy=0), answer(EXACT, 0, accuracy=1)]
    answers, notes = read_answers(write_run(tmp_path, lines) / "answers.jsonl")
    assert [each.metrics["accuracy"] for each in answers] == [1, 0]
    assert notes == ["1 answers were given again later; the later ones count."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"bleu": 1.0}}, "line 1 .*'bleu' is unknown; known: accuracy, nll, kl"),
        ({"metrics": {"nll": math.nan}}, "line 1 .*not a finite number"),
        ({"arm": {"method": "tova", "pooling": "max"}}, "line 1 .*pooling"),
        ({"status": "reused", "kept_tokens": None}, "line 1 "),
    ],
)
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lines = [answer(OBCACHE, 0, accuracy=1) | change, answer(EXACT, 0, accuracy=1)]
    with pytest.raises(ConfigError, match=message):
        write_report(write_run(tmp_path, lines))


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    file = write_run(tmp_path, [answer(EXACT, 0, accuracy=1)]) / "answers.jsonl"
    file.write_text('{"arm": {"met\n' + file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1 is not an answer"):
        read_answers(file)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no run\.json"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="holds no answers"):
        write_report(write_run(tmp_path, []))


@pytest.mark.parametrize("kept", [[], [[1]], [[1, 4]], [[-1, 0]]])
def test_survivors_that_do_not_fit_are_refused(tmp_path: Path, kept: list[list[int]]) -> None:
    survivors = [{"title": "a text", "arm": OBCACHE.to_dict(), "num_heads": 3, "tokens": ["a", "b"], "kept": kept}]
    with pytest.raises(ConfigError, match=r"entry 0 \(a text\)"):
        write_report(write_run(tmp_path, [answer(EXACT, 0, accuracy=1)], survivors))


# --- what is written ----------------------------------------------------------------------------------------------------


def write_arms(folder: Path, right: dict[Arm, int], number: int = 20) -> list[str]:
    """A report of arms that answer the first so many of `number` samples right; its Markdown, line by line."""
    lines = [answer(arm, i, accuracy=float(i < count)) for arm, count in right.items() for i in range(number)]
    write_report(write_run(folder, lines))
    return (folder / "table.md").read_text(encoding="utf-8").splitlines()


def in_words(ours: int, theirs: int, number: int = 20) -> str:
    """The interval of two arms of `write_arms`."""
    low, high = newcombe(
        {
            (1.0, 1.0): min(ours, theirs),
            (0.0, 1.0): max(0, theirs - ours),
            (1.0, 0.0): max(0, ours - theirs),
            (0.0, 0.0): number - max(ours, theirs),
        }
    )
    return "(" + " to ".join(f"{'+' if end > 0 else '−'}{abs(end):.3f}" for end in (low, high)) + ")"


def test_the_report_begins_with_its_verdict_and_with_where_it_hurts_worst_first(tmp_path: Path) -> None:
    replay = Arm("replay", "obcache-v", "global", 0.7)
    replay_attention = Arm("replay", "attention", "global", 0.7)
    text = write_arms(tmp_path, {EXACT: 20, ATTENTION: 12, OBCACHE: 7, replay: 20, replay_attention: 10})
    assert text[0] == (
        "Verdict: 3 of 4 compressed arms lose accuracy against the exact cache; most of all tova + obcache-v, uniform, query-agnostic, "
        f"ratio 0.5: −0.650 {in_words(7, 20)}; the most compressed without a loss that was seen is replay + obcache-v, global, "
        "query-agnostic, ratio 0.7, which keeps 30.0 % of the KV: no pair differs (95 %: under 14.0 points)."
    )
    assert text[2] == f"- command: `{RUN['command']}`"
    assert "sglang 0.5.23" in text[4]
    assert "two cores" in text[5]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("<p class='verdict'>Verdict: 3 of 4") < page.index("<dl>")
    hurts = text.index("## Where compression hurts")
    assert text[hurts + 2 : hurts + 7] == [
        "accuracy, minus exact (they differ in compression):",
        "",
        f"- tova + obcache-v, uniform, query-agnostic: −0.650 {in_words(7, 20)}, to 0.350 at ratio 0.5 (n = 20).",
        f"- replay + attention, global, query-agnostic: −0.500 {in_words(10, 20)}, to 0.500 at ratio 0.7 (n = 20).",
        f"- tova + attention, uniform, query-agnostic: −0.400 {in_words(12, 20)}, to 0.600 at ratio 0.5 (n = 20).",
    ]
    # tova: five pairs differ, which the exact test does not take for a difference; Newcombe's interval reaches to about 0.45.
    worse = text.index("## Where an OBCache score is worse than attention")
    assert text[worse + 2].startswith("- No arm is worse than attention with the same method, budget, mode and ratio. ")
    assert text[worse + 2].endswith(f"unseen: accuracy up to {in_words(7, 12)[2:7]}.")
    helps, score = text.index("## Where it helps"), "score: attention (largest of all queries) -> obcache-v"
    assert text[helps + 2 : helps + 5] == [
        "accuracy, minus attention:",
        "",
        f"- replay + obcache-v, global, query-agnostic ({score}): +0.500 {in_words(20, 10)}, to 1.000 at ratio 0.7 (n = 20).",
    ]
    assert hurts < worse < helps < text.index("## accuracy: needle")


def test_a_difference_of_two_things_is_not_called_the_effect_of_one(tmp_path: Path) -> None:
    """KVzip, KVzip with the eight recent tokens, and replay + OBCache-V, which differs in its score and more."""
    kvzip = Arm("kvzip", "attention", "global", 0.7)
    recent = replace(kvzip, options="recent_tokens=8")
    ours = Arm("replay", "obcache-v", "global", 0.7)
    text = "\n".join(write_arms(tmp_path, {EXACT: 20, kvzip: 5, recent: 12, ours: 18}))
    rows = [
        line.split(" | ") for line in text.split("## Other pairs of arms")[1].split("##")[0].splitlines() if "ratio 0.7" in line
    ]
    effects = {(row[0].removeprefix("| "), row[1]): row[2] for row in rows}
    assert effects == {
        ("kvzip + attention, global, recent tokens 8, query-agnostic, ratio 0.7", "kvzip + attention, global, query-agnostic"): (
            "recent tokens: 0 -> 8"
        ),
        ("replay + obcache-v, global, query-agnostic, ratio 0.7", "kvzip + attention, global, query-agnostic"): (
            "not the effect of one thing; they differ in 4: score: attention (largest of all queries) -> obcache-v; preset: kvzip -> "
            "default; recent tokens: 0 -> 8; budget divided by measured errors: no -> yes"
        ),
    }
    # Nothing is said of an OBCache score beside attention's: no arm here differs in its score alone.
    assert "accuracy, minus attention:" not in text and "worse than attention" not in text


def test_a_run_of_few_samples_says_so(tmp_path: Path) -> None:
    text = write_arms(tmp_path, {EXACT: 3, OBCACHE: 3, ATTENTION: 0}, number=3)
    assert text[0] == "Verdict: too few samples to tell whether compression costs accuracy (n = 3)."
    report = "\n".join(text)
    assert "- Whether an arm loses against exact: too few samples to tell." in text
    assert "no pair differs (too few samples to tell)" in report and "−1.000 (too few samples to tell)" in report
    assert "unseen" not in report


def test_no_heading_stands_without_content(report_dir: Path, tmp_path: Path) -> None:
    write_arms(tmp_path / "alike", {EXACT: 20, OBCACHE: 20})
    write_report(write_run(tmp_path / "exact", [answer(EXACT, 0, accuracy=1)]))
    for folder in (report_dir, tmp_path / "alike", tmp_path / "exact"):
        lines = [line for line in (folder / "table.md").read_text(encoding="utf-8").splitlines() if line]
        for line, following in zip(lines, [*lines[1:], "## end"], strict=True):
            if line.startswith("##") or (line.endswith(":") and not line.startswith("-")):
                assert not following.startswith("##") and not (following.endswith(":") and line.endswith(":")), (folder, line)
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert not re.search(r"</h2>\s*(<h2>|</?section>)|</h3>\s*(<h[23]>|</?section>)", page)
    alike = (tmp_path / "alike" / "table.md").read_text(encoding="utf-8")
    assert (
        "No arm loses against exact. What may be there and unseen: accuracy no pair differs (95 %: under 14.0 points)." in alike
    )
    assert "served exactly:" not in alike


def test_memory_saved_is_told(tmp_path: Path) -> None:
    """1,000 tokens of which 500 are kept, of 2 MiB per token in all."""
    lines = [answer(arm, i, accuracy=1) for arm in (EXACT, OBCACHE) for i in range(2)]
    write_report(write_run(tmp_path, lines, run=RUN | {"kv_bytes_per_token": 2 * 2**20}))
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| tova + obcache-v, uniform, query-agnostic | 0.5 | 1,000 | 500 | 50.0 % | 2,000.0 MiB | 1,000.0 MiB |" in text


def test_three_answers_are_shown_arm_beside_arm(tmp_path: Path) -> None:
    """One that exact answers better than the arm, one as well, one worse."""
    right = {EXACT: [1, 1, 0, 0, 1], OBCACHE: [1, 1, 0, 1, 0]}
    lines = [
        answer(arm, i, accuracy=float(value)) | {"output": f"{arm.method} says\n{i}|"}
        for arm, values in right.items()
        for i, value in enumerate(values)
    ]
    write_report(write_run(tmp_path, lines))
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = text.split("## Three answers, arm beside arm")[1].split("##")[0].strip().splitlines()
    assert rows[0] == "| question | reference | exact | tova + obcache-v, uniform, query-agnostic, ratio 0.5 |"
    assert rows[2:] == [
        "| needle 4.0: Which number? | zwölf | right: 'exact says 4\\|' | wrong: 'tova says 4\\|' **worse** |",
        "| needle 0.0: Which number? | zwölf | right: 'exact says 0\\|' | right: 'tova says 0\\|' |",
        "| needle 3.0: Which number? | zwölf | wrong: 'exact says 3\\|' | right: 'tova says 3\\|' **better** |",
    ]


def test_rows_that_are_not_comparable_say_so(tmp_path: Path) -> None:
    lines = [answer(EXACT, i, task="vt", accuracy=1) | {"not_comparable": "other words"} for i in range(2)]
    lines += [answer(EXACT, i, task="needle", accuracy=1) for i in range(2)]
    write_report(write_run(tmp_path, lines))
    tables = (tmp_path / "table.md").read_text(encoding="utf-8").split("## accuracy: ")[1:]
    told = {table.split("\n")[0]: "| not comparable: other words |" in table for table in tables}
    assert told == {ALL_TASKS: True, "needle": False, "vt": True}


def test_what_did_not_fit_the_model_is_named(tmp_path: Path) -> None:
    lines = [answer(EXACT, i, task="longbench/qasper", accuracy=1) | ({"cut": 1} if i < 2 else {}) for i in range(3)]
    write_run(tmp_path, lines)
    (tmp_path / "skipped.json").write_text(json.dumps({"facts 3": "a prompt of 9 tokens does not fit"}), encoding="utf-8")
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "- longbench/qasper: 2 of 3 contexts lost their middle, to fit the model, by LongBench's rule." in text
    assert "- facts 3 was left out: a prompt of 9 tokens does not fit." in text
    assert "did not fit the model:" in text


def test_a_loss_on_one_task_is_found_where_the_others_hide_it(tmp_path: Path) -> None:
    lines = []
    for i in range(10):
        for task in "abcd":
            noise = (i % 2) * (1 if task == "a" else 0.9) if task != "d" else 0.5
            lines.append(answer(EXACT, i, task=task, nll=2.0))
            lines.append(answer(OBCACHE, i, task=task, nll=2.0 + (0.2 if task == "d" else noise * (-1) ** (i // 2))))
    write_report(write_run(tmp_path, lines))
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "query-agnostic: +0.200 (+0.200 to +0.200), to 2.200 on d alone at ratio 0.5 (n = 10)." in text


def test_answers_served_exactly_are_counted_and_shown(tmp_path: Path) -> None:
    lines = [answer(EXACT, i, accuracy=1) for i in range(4)]
    lines += [answer(OBCACHE, i, accuracy=1, status="exact" if i < 3 else "reused") for i in range(4)]
    row = rows_of(tmp_path, lines)["accuracy", "needle", OBCACHE]
    assert (row.served_exactly, row.kept_share) == (3, pytest.approx((3 + 0.5) / 4))
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "ratio 0.5: 3 of 4 answers were served exactly, and count so: no KV slots (3)." in text
    assert re.search(r"^\| tova \+ obcache-v.* \| 3 \|$", text, re.MULTILINE)
    assert re.search(r"^\| exact \|.* \|  \|$", text, re.MULTILINE)


def test_the_table_for_programs_has_every_row(report_dir: Path) -> None:
    answers, _ = read_answers(report_dir / "answers.jsonl")
    rows = summarise(answers)
    with (report_dir / "table.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) > 100
    for line, row in zip(table, rows, strict=True):
        assert (line["metric"], line["task"], line["method"], float(line["ratio"])) == (
            row.metric,
            row.task,
            row.arm.method,
            row.arm.ratio,
        )
        assert (float(line["value_mean"]), int(line["value_samples"])) == (row.value.mean, row.value.samples)
        assert line["minus_attention_mean"] == ("" if row.against_attention is None else str(row.against_attention.mean))


def test_the_same_answers_give_the_same_bytes(report_dir: Path, tmp_path: Path) -> None:
    """In any order: a run that was resumed wrote its answers in another."""
    for file in report_dir.iterdir():
        if file.name in ("run.json", "survivors.json", "answers.jsonl"):
            shutil.copy(file, tmp_path)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines))
    write_report(tmp_path)
    names = sorted(file.name for file in report_dir.iterdir())
    assert names == sorted(
        [
            "accuracy.svg",
            "answers.jsonl",
            "kl.svg",
            "nll.svg",
            "report.html",
            "run.json",
            "survivors.json",
            "table.csv",
            "table.md",
        ]
    )
    for name in set(names) - {"answers.jsonl"}:
        assert (tmp_path / name).read_bytes() == (report_dir / name).read_bytes(), name


def test_a_run_without_compressed_answers_has_a_report(tmp_path: Path) -> None:
    write_report(write_run(tmp_path, [answer(EXACT, 0, accuracy=1)]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "noted no survivors" in page and "Which tokens survived" not in page


# --- the page -----------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Elements of a page, checked to close in order, and the text directly in each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, int]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1][1]] += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag


def test_the_page_stands_alone_and_is_well_formed(report_dir: Path) -> None:
    text = (report_dir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    assert referred
    assert referred <= set(ids)
    assert not any({"src", "data"} & attributes.keys() for _, attributes in page.elements)
    assert not any(attributes.get("href", "#").startswith("http") for _, attributes in page.elements)
    assert sum(tag == "svg" for tag, _ in page.elements) == 3
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert "<model>" not in text


def dump_dom(page: Path, fragment: str, tmp_path: Path) -> str:
    """The page's HTML after its script has run."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    assert CHROMIUM is not None
    command = [CHROMIUM, *flags, page.resolve().as_uri() + fragment]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize(
    ("fragment", "doc", "arm", "layer"), [("", 0, 0, None), ("#layer=3&doc=1&arm=1", 1, 1, 3), ("#layer=99&doc=x", 0, 0, None)]
)
def test_the_survivor_view_in_a_browser(
    report_dir: Path, tmp_path: Path, fragment: str, doc: int, arm: int, layer: int | None
) -> None:
    given = json.loads((report_dir / "survivors.json").read_text(encoding="utf-8"))[2 * doc + arm]
    layers = given["kept"] if layer is None else [given["kept"][layer]]
    expected = [sum(column) for column in zip(*layers, strict=True)]
    heads = 3 * len(layers)

    dom = dump_dom(report_dir / "report.html", fragment, tmp_path)
    page = Page(dom)
    tokens = [
        (attributes, text) for (tag, attributes), text in zip(page.elements, page.texts, strict=True) if "title" in attributes
    ]
    assert [attributes["data-kept"] for attributes, _ in tokens] == [str(count) for count in expected]
    assert [attributes["class"] for attributes, _ in tokens] == ["kept" if count else "dropped" for count in expected]
    assert [attributes["title"] for attributes, _ in tokens] == [
        f"token {i}: kept by {count} of {heads} heads" for i, count in enumerate(expected)
    ]
    assert [attributes["style"] for attributes, _ in tokens] == [
        f"--share: {math.sqrt(count / heads):.3f};" for count in expected
    ]
    assert [text for _, text in tokens] == [token.replace("\n", "↵\n") for token in given["tokens"]]
    assert "<title>Evaluation of small &lt;model&gt;</title>" in dom
    kept, lost = sum(expected), expected.count(0)
    summary = f"{kept:,} of {heads * len(expected):,} KV pairs kept ({100 * kept / (heads * len(expected)):.1f} %)"
    assert f"{summary}; {lost} of {len(expected)} tokens kept by no head." in dom
    assert dom.count("<option") == 2 + 2 + 6
