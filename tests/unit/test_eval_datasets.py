"""The loaders of public sets, on small files of the same schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets as hub
import pyarrow as pa
import pytest
from pyarrow import parquet

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.datasets import load
from obcache_sglang.eval.metrics import METRICS
from obcache_sglang.eval.samples import Question, Sample


def ruler_row(task: str, context: str, key: str, answer: list[str]) -> dict[str, Any]:
    return {
        "context": context,
        "question": f"What is the special magic number for {key} mentioned in the provided text? ",
        "answer_prefix": f"The special magic number for {key} mentioned in the provided text is",
        "answer": answer,
        "task": task,
        "max_new_tokens": 128,
    }


RULER = [
    ruler_row("niah_single_1", "One context\n", "old-fox", ["123"]),
    ruler_row("niah_single_1", "Another context\n", "red-fox", ["456"]),
    ruler_row("niah_single_1", "One context\n", "new-fox", ["789", "790"]),
    ruler_row("qa_1", "One context\n", "fox", ["1"]),
]


def longbench_row(context: str, question: str, answers: list[str], classes: list[str] | None) -> dict[str, Any]:
    row = {"context": context, "question": question, "answer_prefix": "Answer:", "answers": answers, "all_classes": classes}
    return row | {"task": "any", "max_new_tokens": 84, "length": 1000, "dataset": "any", "language": "en", "_id": "0"}


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), file)


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def scbench(tmp_path: Path, config: str, row: dict[str, Any]) -> list[Sample]:
    write_parquet(tmp_path / config / "test-00000-of-00001.parquet", [row])
    samples = list(load("scbench", config, tmp_path))
    assert all(sample.metric in METRICS for sample in samples)
    return samples


# --- RULER and LongBench ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet in folder", "jsonl", "json", "file"])
def test_ruler(tmp_path: Path, kind: str) -> None:
    path = tmp_path
    if kind == "parquet in folder":
        write_parquet(tmp_path / "4096" / "test-00000-of-00001.parquet", RULER)
        write_parquet(tmp_path / "8192" / "test-00000-of-00001.parquet", RULER[:1])
    elif kind == "jsonl":
        write_lines(tmp_path / "data" / "4096.jsonl", RULER)
    elif kind == "json":
        (tmp_path / "4096.json").write_text(json.dumps(RULER), encoding="utf-8")
    else:
        path = tmp_path / "called anything.parquet"
        write_parquet(path, RULER)
    first, second, qa = load("ruler", "4096", path)
    assert first == Sample(
        task="ruler/niah_single_1",
        index=0,
        context="One context\n",
        questions=(
            Question(RULER[0]["question"], RULER[0]["answer_prefix"], ("123",), 128),
            Question(RULER[2]["question"], RULER[2]["answer_prefix"], ("789", "790"), 128),
        ),
        metric="string_match_all",
        not_comparable="with RULER's own figures, whose contexts have their lengths in the model's tokens; with KVPress's they are",
    )
    assert (second.task, second.index, second.context) == ("ruler/niah_single_1", 1, "Another context\n")
    assert (qa.task, qa.index, qa.metric, len(qa.questions)) == ("ruler/qa_1", 0, "string_match_part", 1)


def test_longbench(tmp_path: Path) -> None:
    rows = [
        longbench_row("An article\n\n", "Question: Who?\n\n", ["Anna", "she"], None),
        longbench_row("Article 2\n\n", "Question: When?\n\n", ["now"], None),
        longbench_row("An article\n\n", "Question: Where?\n\n", ["here"], None),
    ]
    write_lines(tmp_path / "qasper.jsonl", rows)
    first, second = load("longbench", "qasper", tmp_path)
    assert (first.task, first.index, first.metric, first.options) == ("longbench/qasper", 0, "qa_f1", ())
    # The whole prompt is one text, and answers have LongBench's limit, not the 20 tokens more of KVPress's copy.
    assert [question.text for question in first.questions] == ["Question: Who?\n\nAnswer:", "Question: Where?\n\nAnswer:"]
    assert first.questions[0] == Question("Question: Who?\n\nAnswer:", "", ("Anna", "she"), 128)
    assert second.index == 1


def test_longbench_classes(tmp_path: Path) -> None:
    rows = [longbench_row(f"Context {i}", "Who?", ["Person"], ["Date", "Person"]) for i in range(2)]
    write_parquet(tmp_path / "trec.parquet", rows)
    samples = list(load("longbench", "trec", tmp_path))
    assert [(sample.metric, sample.options) for sample in samples] == [("classification", ("Date", "Person"))] * 2


# --- SCBench ------------------------------------------------------------------------------------------------------------


def test_scbench_shares_contexts(tmp_path: Path) -> None:
    turns = [{"input": f"Key: {key}\nThe value is", "answer": value} for key, value in (("a", "1"), ("b", "2"))]
    (sample,) = scbench(tmp_path, "scbench_kv", {"id": 0, "context": '{"a": "1", "b": "2"}', "multi_turns": turns})
    assert (sample.task, sample.metric) == ("scbench/scbench_kv", "contains")
    assert sample.context.startswith("Extract the value") and sample.context.endswith(
        'JSON object below.\n\n{"a": "1", "b": "2"}\n\n'
    )
    assert [(question.text, question.references) for question in sample.questions] == [
        ("Key: a\nThe value is", ("1",)),
        ("Key: b\nThe value is", ("2",)),
    ]
    assert {question.max_new_tokens for question in sample.questions} == {150}


def test_scbench_copy_with_everything_twice(tmp_path: Path) -> None:
    row = {"id": 0, "context": "c", "multi_turns": [{"input": "q", "answer": ["x", "y"]}]}
    write_lines(tmp_path / "data" / "scbench_vt.jsonl", [row])
    (sample,) = scbench(tmp_path, "scbench_vt", row)
    assert sample.questions == (Question("q", "", ("x", "y"), 30),)


def test_scbench_choice(tmp_path: Path) -> None:
    turn = {"input": "Who?", "answer": "Ben", "options": ["Anna", "Ben", "Carl", "Dora"]}
    (sample,) = scbench(tmp_path, "scbench_choice_eng", {"id": 0, "context": "A book.", "multi_turns": [turn]})
    (question,) = sample.questions
    assert question.text == "Question: Who?\nA. Anna\nB. Ben\nC. Carl\nD. Dora\n\nThe the correct answer is"
    assert question.references == ("Ben", "B")
    assert METRICS[sample.metric]("B. Ben", question.references, sample.options) == 1


def test_scbench_numbers(tmp_path: Path) -> None:
    turns = [
        {"input": f"You find the {what}. The {what} is", "answer": answer} for what, answer in (("Median", 4), ("Maximum", 9))
    ]
    (sample,) = scbench(tmp_path, "scbench_mf", {"id": 0, "context": [1, 4, 9], "multi_turns": turns})
    assert sample.context == "You find the Median. The Median is\n\n[1, 4, 9]\n\n"
    assert sample.questions[1].text == "What is the maximum?\n\nYou find the Maximum. The Maximum is"
    assert sample.questions[1].references == ("9",)


def test_scbench_functions_choose_among_those_of_the_context(tmp_path: Path) -> None:
    turns = [{"input": f"It does {name}", "answer": f"def {name}(): pass", "name": name} for name in ("f", "g")]
    (sample,) = scbench(tmp_path, "scbench_repoqa", {"lang": "python", "repo": "r", "context": "code", "multi_turns": turns})
    assert sample.options == ("def f(): pass", "def g(): pass")
    assert [question.references for question in sample.questions] == [("def f(): pass",), ("def g(): pass",)]


def test_scbench_mixed_tasks_become_two_samples_of_one_context(tmp_path: Path) -> None:
    turns = [
        {"input": "Summarise", "answer": "It is short.", "task": "scbench_summary"},
        {"input": "The key is", "answer": "71432", "task": "scbench_passkey"},
    ]
    summary, passkey = scbench(tmp_path, "scbench_summary_with_needles", {"id": 0, "context": "Text", "multi_turns": turns})
    assert summary.context == passkey.context == "Text\n\n"
    assert (summary.task, summary.metric) == ("scbench/scbench_summary_with_needles/scbench_summary", "rouge_l_sum")
    assert (passkey.task, passkey.metric) == ("scbench/scbench_summary_with_needles/scbench_passkey", "first_integer")
    assert (summary.questions[0].max_new_tokens, passkey.questions[0].max_new_tokens) == (800, 15)


# --- the Hub, and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "called"),
    [
        ("ruler", "4096", ("simonjegou/ruler", {"split": "test", "data_dir": "4096"})),
        ("longbench", "qasper", ("Xnhyacinth/LongBench", {"split": "test", "data_dir": "qasper"})),
        ("scbench", "scbench_kv", ("microsoft/SCBench", {"split": "test", "name": "scbench_kv"})),
    ],
)
def test_hub(monkeypatch: pytest.MonkeyPatch, name: str, config: str, called: tuple[str, dict[str, str]]) -> None:
    calls = []
    rows = {"ruler": RULER, "longbench": [longbench_row("c", "q", ["a"], None)]}.get(
        name, [{"context": "c", "multi_turns": [{"input": "q", "answer": "a"}]}]
    )
    monkeypatch.setattr(hub, "load_dataset", lambda repo, **where: calls.append((repo, where)) or rows)
    assert list(load(name, config))
    assert calls == [called]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "load_dataset", fail)
    with pytest.raises(ConfigError, match=r"simonjegou/ruler.*no route.*local copy"):
        list(load("ruler", "4096"))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("rule", "4096", "'rule' is unknown: choose one of ruler, longbench, scbench"),
        ("ruler", "4k", "no config '4k': choose a length, such as 4096"),
        ("longbench", "scbench_kv", "no config 'scbench_kv': choose narrativeqa, qasper"),
        ("scbench", "kv", "no config 'kv': choose scbench_choice_eng"),
        ("ruler", "8192", "has no .parquet, .jsonl, .json file of '8192'"),
        (
            "longbench",
            "qasper",
            r"qasper.jsonl, row 1, as longbench/qasper: it has no answers, all_classes, only context, question",
        ),
        ("longbench", "trec", r"trec.jsonl cannot be read"),
        ("longbench", "lcc", r"lcc.parquet cannot be read"),
    ],
)
def test_refused(tmp_path: Path, name: str, config: str, message: str) -> None:
    write_lines(tmp_path / "qasper.jsonl", RULER)
    (tmp_path / "trec.jsonl").write_text('{"context": ', encoding="utf-8")
    (tmp_path / "lcc.parquet").write_text("not parquet", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        list(load(name, config, tmp_path))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ("qasper", {"answers": []}, "it has no answer to compare with"),
        ("qasper", {"answers": None}, "it has no answer to compare with"),
        ("qasper", {"answers": [" ", ""]}, "it has no answer to compare with"),
        ("qasper", {"context": None}, "its context is NoneType, not text"),
        ("qasper", {"question": ["Who?"]}, "its question is list, not text"),
        ("qasper", {"context": "half a pair: \ud83d"}, r"half of a surrogate pair, '\\ud83d'"),
        ("qasper", {"answers": ["\udc00"]}, r"half of a surrogate pair, '\\udc00'"),
        ("trec", {"all_classes": ["\udc00"]}, r"half of a surrogate pair, '\\udc00'"),
        ("trec", {"all_classes": 3}, None),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_row_that_cannot_be_asked_is_named(
    tmp_path: Path, config: str, change: dict[str, Any], message: str | None, suffix: str
) -> None:
    rows = [longbench_row("c", "q", ["a"], ["a"]) | other for other in ({}, change)]
    text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"{config}.{suffix}").write_text(text, encoding="utf-8")
    if message is None:  # one class, told without a list
        assert next(load("longbench", config, tmp_path)).options == ("a", "3")
        return
    with pytest.raises(ConfigError, match=rf"{config}\.{suffix}, row 2, as longbench/{config}: .*{message}"):
        list(load("longbench", config, tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a", "b"]', r"row 1, as .*it is str, not an object"),
        ('{"context": "c"}', "cannot be read after row 0: it holds dict, not a list of rows"),
        ("[1, 2", "cannot be read after row 0"),
    ],
)
def test_a_file_that_holds_no_rows_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "qasper.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"qasper\.json.*{message}"):
        list(load("longbench", "qasper", tmp_path))


def test_a_line_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(longbench_row("c", "q", ["a"], None)), '{"context": ']
    (tmp_path / "qasper.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"qasper\.jsonl cannot be read after row 1"):
        list(load("longbench", "qasper", tmp_path))


@pytest.mark.parametrize(
    ("config", "turn", "message"),
    [
        ("scbench_kv", {"input": "Key: a"}, "'answer' is missing"),
        ("scbench_kv", {"input": "Key: a", "answer": []}, "it has no answer"),
        ("scbench_choice_eng", {"input": "Who?", "answer": "Ben", "options": ["Ben"]}, "it is not what this data set has"),
        ("scbench_mf", {"input": "Sum?", "answer": 3}, 'has no "The ... is"'),
    ],
)
def test_a_turn_that_cannot_be_asked_is_named(tmp_path: Path, config: str, turn: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / f"{config}.jsonl", [{"context": "c", "multi_turns": [turn]}])
    with pytest.raises(ConfigError, match=rf"{config}\.jsonl, row 1, as scbench/{config}: .*{message}"):
        list(load("scbench", config, tmp_path))


def test_what_scbench_scores_otherwise_says_so(tmp_path: Path) -> None:
    code = {"input": "It does f", "answer": "def f(): pass", "name": "f"}
    (sample,) = scbench(tmp_path, "scbench_repoqa", {"lang": "python", "repo": "r", "context": "code", "multi_turns": [code]})
    assert "RepoQA's parsers" in sample.not_comparable
    for answer, told in (("x", True), (["x"], False)):
        row = {"id": 0, "context": "c", "multi_turns": [{"input": "q", "answer": answer}]}
        (sample,) = scbench(tmp_path, "scbench_vt", row)
        assert ("letter by letter" in sample.not_comparable) == told


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "qasper.csv").write_text("context", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"not a \.parquet, \.jsonl, \.json file"):
        list(load("longbench", "qasper", tmp_path / "qasper.csv"))
