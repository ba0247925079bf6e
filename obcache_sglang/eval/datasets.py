"""The public sets: RULER and LongBench as KVPress's evaluation publishes and scores them, and SCBench.

All are read from the Hugging Face Hub, or from a local copy of its files. Questions about the same context come in one sample.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.samples import Question, Sample

Row = Mapping[str, Any]

_SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class _Ask:
    """One question of a row, with what decides which sample it belongs to."""

    task: str
    context: str
    question: Question
    metric: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublicSet:
    """One data set.

    repo: on the Hub. folders: configs are folders of it. configs: () where they are lengths in tokens.
    columns: what a row must have. ask: the questions of a config's row.
    """

    repo: str
    folders: bool
    configs: tuple[str, ...]
    columns: tuple[str, ...]
    ask: Callable[[str, Row], Iterable[_Ask]]


def load(name: str, config: str, path: str | Path | None = None) -> Iterator[Sample]:
    """The samples of one config of a public set, in the order of their first questions.

    name: of PUBLIC_SETS. config: "4096", ... of ruler; "qasper", ... of longbench; "scbench_kv", ... of scbench.
    path: a parquet, JSON or JSON Lines file, or a folder with files that are called like the config or lie in a folder that is;
        without it, the Hub (through `datasets`, which caches).

    Samples count from 0 within a task; task is "ruler/niah_single_1", "longbench/qasper", "scbench/scbench_kv", and where an SCBench
    config mixes two tasks on one context "scbench/scbench_repoqa_and_kv/scbench_kv".

    Raises ConfigError, when the first sample is asked for or the row is reached: for an unknown name or config, files that are
    missing or not readable, and rows that lack a column.
    """
    if name not in PUBLIC_SETS:
        raise ConfigError(f"data set {name!r} is unknown: choose one of {', '.join(PUBLIC_SETS)}.")
    public = PUBLIC_SETS[name]
    if not (config in public.configs if public.configs else config.isdecimal()):
        raise ConfigError(f"{name} has no config {config!r}: choose {', '.join(public.configs) or 'a length, such as 4096'}.")
    rows = _hub_rows(public, config) if path is None else _local_rows(Path(path), config)
    asks = (ask for row in rows for ask in public.ask(config, _checked(row, public.columns, f"{name}/{config}")))
    yield from _grouped(name, asks)


def _grouped(name: str, asks: Iterable[_Ask]) -> Iterator[Sample]:
    """Joins what is asked about one context in one task, wherever it stands: LongBench repeats contexts far apart."""
    groups: dict[tuple[str, str], list[_Ask]] = {}
    for ask in asks:
        groups.setdefault((ask.task, ask.context), []).append(ask)
    numbers: dict[str, int] = {}
    for (task, context), group in groups.items():
        index = numbers[task] = numbers.get(task, -1) + 1
        # Each question brings its own options, which are the same (classes), or belong together (functions of one repository).
        options = tuple(dict.fromkeys(option for ask in group for option in ask.options))
        yield Sample(f"{name}/{task}", index, context, tuple(ask.question for ask in group), group[0].metric, options)


def _checked(row: Row, columns: Iterable[str], what: str) -> Row:
    missing = [column for column in columns if column not in row]
    if missing:
        raise ConfigError(f"{what}: a row has no {', '.join(missing)}, only {', '.join(row)}: is it another data set's file?")
    return row


# --- where rows come from -----------------------------------------------------------------------------------------------


def _hub_rows(public: PublicSet, config: str) -> Iterator[Row]:
    import datasets  # type: ignore[import-untyped]

    where = {"data_dir": config} if public.folders else {"name": config}
    try:
        rows = datasets.load_dataset(public.repo, split="test", **where)
    except Exception as error:  # its many errors have no base of their own
        raise ConfigError(
            f"{public.repo} ({config}) could not be read from the Hugging Face Hub: {error}. "
            "Where the Hub cannot be reached, give the path of a local copy."
        ) from error
    yield from rows


def _local_rows(path: Path, config: str) -> Iterator[Row]:
    for file in _local_files(path, config):
        try:
            yield from _file_rows(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error


def _local_files(path: Path, config: str) -> list[Path]:
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ConfigError(f"{path} is not a {', '.join(_SUFFIXES)} file.")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    # A copy of SCBench has everything twice: parquet in a folder of the config's name, and one JSON Lines file.
    for chosen in ([file for file in files if file.parent.name == config], [file for file in files if file.stem == config]):
        if chosen:
            return chosen
    raise ConfigError(
        f"{path} has no {', '.join(_SUFFIXES)} file of {config!r}: it must be called so, or lie in a folder that is called so."
    )


def _file_rows(file: Path) -> Iterator[Row]:
    if file.suffix == ".parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]

        for batch in parquet.ParquetFile(file).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    else:
        yield from json.loads(file.read_text(encoding="utf-8"))


def _texts(value: Any) -> tuple[str, ...]:
    """One or several answers as texts."""
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


# --- RULER and LongBench ------------------------------------------------------------------------------------------------


def _kvpress_question(row: Row, answers: str) -> Question:
    return Question(row["question"], row["answer_prefix"], _texts(row[answers]), int(row["max_new_tokens"]))


def _ruler(config: str, row: Row) -> Iterator[_Ask]:
    metric = "string_match_part" if row["task"].startswith("qa") else "string_match_all"
    yield _Ask(row["task"], row["context"], _kvpress_question(row, "answer"), metric)


_LONGBENCH_METRICS = {
    "narrativeqa": "qa_f1",
    "qasper": "qa_f1",
    "multifieldqa_en": "qa_f1",
    "multifieldqa_zh": "qa_f1_zh",
    "hotpotqa": "qa_f1",
    "2wikimqa": "qa_f1",
    "musique": "qa_f1",
    "dureader": "rouge_l_zh",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "vcsum": "rouge_l_zh",
    "trec": "classification",
    "triviaqa": "qa_f1_first_line",
    "samsum": "rouge_l_first_line",
    "lsht": "classification",
    "passage_retrieval_en": "retrieval",
    "passage_count": "count",
    "passage_retrieval_zh": "retrieval_zh",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}


def _longbench(config: str, row: Row) -> Iterator[_Ask]:
    options = _texts(row["all_classes"] or ())
    yield _Ask(config, row["context"], _kvpress_question(row, "answers"), _LONGBENCH_METRICS[config], options)


# --- SCBench ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ScTask:
    """before: introduces the context. max_new_tokens: as SCBench generates."""

    metric: str
    max_new_tokens: int
    before: str = ""
    question: str = "{input}"


_SC_KV = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_SC_REPOQA = (
    "Based on the function description and code context, please retrieve and repeat the exact described function from the code "
    "context in a code block wrapped by ```:\n\n"
)
_SC_BOOK = "Read the book and answer the question."
_SC_CHOICE = "Question: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe the correct answer is"  # SCBench's, with its slip

_SC_TASKS = {
    "scbench_choice_eng": _ScTask("choice", 40, f"{_SC_BOOK}\n\n", _SC_CHOICE),
    "scbench_qa_eng": _ScTask(
        "string_match_part", 40, f"{_SC_BOOK} Be very concise in your answer.\n\n", "Question: {input}\nAnswer:"
    ),
    "scbench_qa_chn": _ScTask("qa_f1_zh_characters", 40, "阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案："),
    "scbench_kv": _ScTask("contains", 150, _SC_KV),
    "scbench_prefix_suffix": _ScTask("contains", 150),
    "scbench_mf": _ScTask("first_number", 5, "{first}\n\n", "{what}\n\n{input}"),
    "scbench_repoqa": _ScTask("function", 1024, _SC_REPOQA),
    "scbench_summary": _ScTask("rouge_l_sum", 200),
    "scbench_vt": _ScTask("string_match_all", 30),
    "scbench_many_shot": _ScTask("string_match_part", 10),
}
# Configs that ask questions of two tasks about one context: their own introduction is none, and answers are longer or shorter.
_SC_MIXED = {
    "scbench_summary_with_needles": {
        "scbench_summary": _ScTask("rouge_l_sum", 800),
        "scbench_passkey": _ScTask("first_integer", 15),
    },
    "scbench_repoqa_and_kv": {"scbench_repoqa": _ScTask("function", 1024), "scbench_kv": _ScTask("contains", 80)},
}


def _scbench(config: str, row: Row) -> Iterator[_Ask]:
    """All requests of one shared context, each on its own ("same context, different query"), not as turns of a conversation.

    Some answers that are plain texts SCBench compares letter by letter, by mistake; here they are compared as a whole.
    """
    turns = row["multi_turns"]
    for turn in turns:
        if config in _SC_MIXED:
            task, kind = f"{config}/{turn['task']}", _SC_MIXED[config][turn["task"]]
        else:
            task, kind = config, _SC_TASKS[config]
        # SCBench introduces the numbers of scbench_mf with the first request about them.
        context = kind.before.format(first=turns[0]["input"]) + f"{row['context']}\n\n"
        references = _texts(turn["answer"])
        fields = {"input": turn["input"]}
        options: tuple[str, ...] = ()
        if kind.metric == "choice":
            letters = dict(zip("ABCD", turn["options"], strict=True))
            fields |= letters
            references += tuple(letter for letter, option in letters.items() if option == turn["answer"])
        elif kind.metric == "function":
            options = references
        elif config == "scbench_mf":
            fields["what"] = _what(turn["input"])
        yield _Ask(
            task, context, Question(kind.question.format(**fields), "", references, kind.max_new_tokens), kind.metric, options
        )


def _what(request: str) -> str:
    """The question that a request of scbench_mf, which ends with "The ... is", asks."""
    target = re.search(r"The (.+) is", request)
    if target is None:
        raise ConfigError(f'scbench_mf: a request has no "The ... is" in it: {request!r}.')
    return f"What is the {target.group(1).lower()}?"


PUBLIC_SETS: dict[str, PublicSet] = {
    "ruler": PublicSet(
        "simonjegou/ruler", True, (), ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens"), _ruler
    ),
    "longbench": PublicSet(
        "Xnhyacinth/LongBench",
        True,
        tuple(_LONGBENCH_METRICS),
        ("context", "question", "answer_prefix", "answers", "all_classes", "max_new_tokens"),
        _longbench,
    ),
    "scbench": PublicSet("microsoft/SCBench", False, (*_SC_TASKS, *_SC_MIXED), ("context", "multi_turns"), _scbench),
}
"""The public sets by name."""
