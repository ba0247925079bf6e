"""The public sets: RULER and LongBench, from the copies that KVPress's evaluation publishes, and SCBench.

All are read from the Hugging Face Hub, or from a local copy of its files. Questions about the same context come in one sample. Where a
sample's figures are not those that are published under the same name, it says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.samples import Question, Sample

Row = Mapping[str, Any]

_SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class _Ask:
    """One question of a row, with what decides which sample it belongs to. form: other fields of the sample, by name."""

    task: str
    context: str
    question: Question
    metric: str
    options: tuple[str, ...] = ()
    form: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ConfigError where it cannot be asked or scored."""
        if not any(reference.strip() for reference in self.question.references):
            raise ConfigError("it has no answer to compare with.")
        for text in (self.context, self.question.text, self.question.answer_prefix, *self.question.references, *self.options):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"it has half of a surrogate pair, {text[error.start]!a}, which is no text: mend or delete the row."
                ) from error


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
    missing or not readable, and rows that lack a column or an answer or are not text; the file and the row are named.
    """
    if name not in PUBLIC_SETS:
        raise ConfigError(f"data set {name!r} is unknown: choose one of {', '.join(PUBLIC_SETS)}.")
    public = PUBLIC_SETS[name]
    if not (config in public.configs if public.configs else config.isdecimal()):
        raise ConfigError(f"{name} has no config {config!r}: choose {', '.join(public.configs) or 'a length, such as 4096'}.")
    rows = _hub_rows(public, config) if path is None else _local_rows(Path(path), config)
    yield from _grouped(name, (ask for where, row in rows for ask in _asked(public, config, f"{where}, as {name}/{config}", row)))


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
        questions = tuple(ask.question for ask in group)
        yield Sample(f"{name}/{task}", index, context, questions, group[0].metric, options, **group[0].form)


def _asked(public: PublicSet, config: str, where: str, row: Any) -> list[_Ask]:
    """The questions of one row. where: names the row. Raises ConfigError for a row that is not one of this set."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: it is {type(row).__name__}, not an object with columns.")
    missing = [column for column in public.columns if column not in row]
    if missing:
        raise ConfigError(
            f"{where}: it has no {', '.join(missing)}, only {', '.join(map(str, row))}: is it another data set's file?"
        )
    try:
        asks = list(public.ask(config, row))
        for ask in asks:
            ask.check()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{where}: it is not what this data set has: {detail}") from error
    return asks


# --- where rows come from -----------------------------------------------------------------------------------------------


_Rows = Iterator[tuple[str, Any]]
"""Rows, each with the words that name it: its file and number, from 1."""


def _hub_rows(public: PublicSet, config: str) -> _Rows:
    import datasets  # type: ignore[import-untyped]

    where = {"data_dir": config} if public.folders else {"name": config}
    try:
        rows = datasets.load_dataset(public.repo, split="test", **where)
    except Exception as error:  # its many errors have no base of their own
        raise ConfigError(
            f"{public.repo} ({config}) could not be read from the Hugging Face Hub: {error}. "
            "Where the Hub cannot be reached, give the path of a local copy."
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{public.repo} ({config}), row {number}", row


def _local_rows(path: Path, config: str) -> _Rows:
    for file in _local_files(path, config):
        number = 0
        try:
            for number, row in enumerate(_file_rows(file), 1):
                yield f"{file}, row {number}", row
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{file} cannot be read after row {number}: {error}") from error


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


def _file_rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]

        for batch in parquet.ParquetFile(file).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    else:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"it holds {type(rows).__name__}, not a list of rows")
        yield from rows


def _texts(value: Any) -> tuple[str, ...]:
    """One or several answers as texts; none of None."""
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(str(each) for each in several if each is not None)


def _text(value: Any, column: str) -> str:
    """Raises ConfigError for what is no text."""
    if not isinstance(value, str):
        raise ConfigError(f"its {column} is {type(value).__name__}, not text.")
    return value


# --- RULER and LongBench ------------------------------------------------------------------------------------------------


def _ruler(config: str, row: Row) -> Iterator[_Ask]:
    metric = "string_match_part" if row["task"].startswith("qa") else "string_match_all"
    asked, prefix = (_text(row[column], column) for column in ("question", "answer_prefix"))
    question = Question(asked, prefix, _texts(row["answer"]), int(row["max_new_tokens"]))
    form = {"not_comparable": _KVPRESS_RULER}
    yield _Ask(row["task"], _text(row["context"], "context"), question, metric, form=form)


_KVPRESS_RULER = "with RULER's own figures, whose contexts have their lengths in the model's tokens; with KVPress's they are"

# The metric, and the limit of an answer in tokens. KVPress's copy has limits 20 tokens longer.
_LONGBENCH = {
    "narrativeqa": ("qa_f1", 128),
    "qasper": ("qa_f1", 128),
    "multifieldqa_en": ("qa_f1", 64),
    "multifieldqa_zh": ("qa_f1_zh", 64),
    "hotpotqa": ("qa_f1", 32),
    "2wikimqa": ("qa_f1", 32),
    "musique": ("qa_f1", 32),
    "dureader": ("rouge_l_zh", 128),
    "gov_report": ("rouge_l", 512),
    "qmsum": ("rouge_l", 512),
    "multi_news": ("rouge_l", 512),
    "vcsum": ("rouge_l_zh", 512),
    "trec": ("classification", 64),
    "triviaqa": ("qa_f1_first_line", 32),
    "samsum": ("rouge_l_first_line", 128),
    "lsht": ("classification", 64),
    "passage_retrieval_en": ("retrieval", 32),
    "passage_count": ("count", 32),
    "passage_retrieval_zh": ("retrieval_zh", 32),
    "lcc": ("code_similarity", 64),
    "repobench-p": ("code_similarity", 64),
}
_LONGBENCH_PLAIN = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
"""Sets that LongBench asks without a chat template: examples and code go on better as plain text."""


def _longbench(config: str, row: Row) -> Iterator[_Ask]:
    """As published: the whole prompt is the user's turn, or plain text, and loses its middle where it is too long for the model."""
    metric, limit = _LONGBENCH[config]
    asked = _text(row["question"], "question") + _text(row["answer_prefix"], "answer_prefix")
    form = {"plain": config in _LONGBENCH_PLAIN, "cut_middle": True, "stop_at_newline": config == "samsum"}
    question = Question(asked, "", _texts(row["answers"]), limit)
    yield _Ask(config, _text(row["context"], "context"), question, metric, _texts(row["all_classes"] or ()), form)


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
        form = {}
        if kind.metric == "function":
            form["not_comparable"] = "the whole code block counts, not what RepoQA's parsers find in it"
        elif isinstance(turn["answer"], str) and kind.metric.startswith("string_match"):
            form["not_comparable"] = "SCBench compares an answer that is one text letter by letter"
        question = Question(kind.question.format(**fields), "", references, kind.max_new_tokens)
        yield _Ask(task, context, question, kind.metric, options, form)


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
        tuple(_LONGBENCH),
        ("context", "question", "answer_prefix", "answers", "all_classes", "max_new_tokens"),
        _longbench,
    ),
    "scbench": PublicSet("microsoft/SCBench", False, (*_SC_TASKS, *_SC_MIXED), ("context", "multi_turns"), _scbench),
}
"""The public sets by name."""
