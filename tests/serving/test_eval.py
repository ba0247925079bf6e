"""`python -m obcache_sglang.eval` against a real server: answers, resuming, and the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from obcache_sglang.eval.__main__ import main
from obcache_sglang.local_server import Server

TASKS = ["--tasks", "needle_prose", "facts", "continuation", "--tokens", "400", "--samples", "1"]
ARMS = ["--arms", "random/attention/adakv", "--ratios", "0", "0.9"]


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def evaluate(server: Server, folder: Path, *more: str) -> list[dict]:
    assert main(["--url", server.url, "--output", str(folder), *TASKS, *ARMS, *more]) == 0
    return read(folder)


@pytest.fixture(scope="module")
def run_dir(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    evaluate(server, folder, "--modes", "agnostic", "aware", "--survivors", "1")
    return folder


def test_every_question_is_answered_under_every_arm(run_dir: Path) -> None:
    answers = read(run_dir)
    keys = {(json.dumps(a["arm"], sort_keys=True), a["task"], a["sample"], a["question"]) for a in answers}
    assert len(keys) == len(answers)
    agnostic, aware = 1 + 8 + 1, 1 + 8  # continuations have no question to be aware of
    assert len(answers) == agnostic + 2 * (agnostic + aware)  # exact; an arm at two ratios
    for answer in answers:
        compressed = answer["arm"]["method"] != "exact"
        assert (answer["status"] != "exact") == compressed
        kept = answer["context_tokens"] if not compressed else int(answer["context_tokens"] * (1 - answer["arm"]["ratio"]))
        assert answer["kept_tokens"] == kept
    shared = [a for a in answers if a["task"] == "facts" and a["arm"].get("mode") == "agnostic"]
    assert {a["status"] for a in shared if a["question"]} <= {"compressed", "reused"}


def test_ratio_zero_is_exact_and_ratio_nine_tenths_of_chance_is_not(run_dir: Path) -> None:
    def of(method: str, ratio: float, task: str) -> list[dict]:
        found = read(run_dir)
        return [
            a
            for a in found
            if (a["arm"]["method"], a["arm"]["ratio"], a["task"]) == (method, ratio, task) and a["arm"].get("mode") != "aware"
        ]

    for task in ("needle_prose", "facts"):
        assert [a["output"] for a in of("random", 0.0, task)] == [a["output"] for a in of("exact", 0.0, task)]
    exact, same, random = (of(*arm, "continuation") for arm in (("exact", 0.0), ("random", 0.0), ("random", 0.9)))
    for one, two, worse in zip(exact, same, random, strict=True):
        assert one["metrics"]["kl"] == 0
        assert two["metrics"]["kl"] == pytest.approx(0, abs=1e-6)
        assert two["metrics"]["nll"] == pytest.approx(one["metrics"]["nll"], abs=1e-4)
        assert worse["metrics"]["kl"] > 0.01
        assert worse["metrics"]["nll"] > one["metrics"]["nll"]
    right = sum(a["metrics"]["accuracy"] for a in of("exact", 0.0, "needle_prose"))
    assert right > 0


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_where_it_was(server: Server, run_dir: Path, tmp_path: Path) -> None:
    def answers(lines: list[dict]) -> list[dict]:
        """What of an answer does not depend on what the server has cached."""
        rounded = [{name: round(value, 3) for name, value in line["metrics"].items()} for line in lines]
        return [line | {"status": None, "metrics": metrics} for line, metrics in zip(lines, rounded, strict=True)]

    whole = read(run_dir)
    folder = shutil.copytree(run_dir, tmp_path / "eval")
    file = folder / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-30]) + lines[-30][:20])
    again = evaluate(server, folder, "--modes", "agnostic", "aware")
    assert answers(again) == answers(whole)
    assert file.read_bytes().splitlines(keepends=True)[:-30] == lines[:-30]
    before = file.read_bytes()
    evaluate(server, folder, "--modes", "agnostic", "aware")
    assert file.read_bytes() == before


def test_another_run_is_not_mixed_in(server: Server, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", server.url, "--output", str(run_dir), *TASKS, "--seed", "5"]) == 1
    assert "seed=0, not 5" in capsys.readouterr().err


def test_the_report_shows_what_was_measured(run_dir: Path) -> None:
    assert "python -m obcache_sglang.eval" in (run_dir / "table.md").read_text()
    page = (run_dir / "report.html").read_text()
    assert "random" in page
    (survivors, _) = json.loads((run_dir / "survivors.json").read_text())
    assert all(max(layer) <= survivors["num_heads"] for layer in survivors["kept"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--arms", "snapkv/nonsense/adakv"], "nonsense"),
        (["--arms", "snapkv"], "METHOD/SCORE/BUDGET"),
        (["--ratios", "1.5"], "1.5"),
        (["--ratios", "few"], "few"),
        (["--tasks", "riddles"], "riddles"),
    ],
)
def test_wrong_arguments_are_named(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], named: str
) -> None:
    assert main(["--url", server.url, "--output", str(tmp_path), *given]) == 1
    assert named in capsys.readouterr().err
