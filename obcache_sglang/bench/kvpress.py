"""KVPress's pipeline as arms of the bench: a process of its own environment answers, one question after another."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from obcache_sglang.bench.rounds import Answer, Round, summarise
from obcache_sglang.bench.workload import Ask, Workload
from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.metrics import METRICS

REQUIREMENTS = ("kvpress==0.5.5", "transformers==5.2.0", "torch==2.13.0", "accelerate")
"""What the environment holds. KVPress wants an older transformers than SGLang brings."""

PRESSES = ("snapkv", "adakv", "tova", "kvzip")
"""Its presses that the bench knows; adakv: around snapkv, as here."""

_RUNNER = Path(__file__).with_name("kvpress_runner.py")
_STOP_SECONDS = 30


def parse_press(text: str) -> tuple[str, float]:
    """Press and compression ratio of PRESS@RATIO. Raises ConfigError."""
    press, _, ratio = text.partition("@")
    try:
        number = float(ratio)
    except ValueError:
        number = -1.0
    if press not in PRESSES or not 0 <= number < 1:
        raise ConfigError(
            f"--kvpress {text}: give PRESS@RATIO, as in adakv@0.85; presses are {', '.join(PRESSES)}, ratios in [0, 1)."
        )
    return press, number


def ensure_environment(folder: Path, requirements: Sequence[str] = REQUIREMENTS) -> Path:
    """The Python of a virtual environment with these packages in `folder`, which is made or completed if need be (minutes).

    Raises RuntimeError with pip's words where it cannot be.
    """
    python, wanted = folder / "bin" / "python", " ".join(requirements)
    # Written last: an install that was interrupted, or was of other versions, starts again.
    stamp = folder / "made-of"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"bench: installing {wanted} into {folder} (minutes)", file=sys.stderr, flush=True)
    make = [sys.executable, "-m", "venv", str(folder)]
    for command in (make, [str(python), "-m", "pip", "install", "--quiet", *requirements]):
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{wanted} cannot be installed into {folder}:\n{done.stderr}")
    stamp.write_text(wanted)
    return python


class Kvpress:
    """KVPress's pipeline with one model and press, in a process of `python`. Made by `running`."""

    def __init__(self, process: subprocess.Popen[str], log_file: Path) -> None:
        self._process = process
        self._log_file = log_file
        self.versions: dict[str, str] = self._read()

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    @contextlib.contextmanager
    def running(cls, python: Path, model: str, press: str, ratio: float, log_file: Path) -> Iterator[Kvpress]:
        """Raises RuntimeError with the end of the log when the process ends by itself, ConfigError when it cannot start."""
        # Isolated: the runner's own folder has a module called kvpress.
        command = [str(python), "-I", str(_RUNNER), model, press, str(ratio)]
        with log_file.open("w", encoding="utf-8") as log:
            try:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            except OSError as error:
                raise ConfigError(f"--kvpress-python {python}: {error.strerror}.") from error
        try:
            yield cls(process, log_file)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(timeout=_STOP_SECONDS)
            process.kill()
            process.wait()

    def ask(self, asks: Sequence[Ask], context: str) -> dict[str, Any]:
        """What `kvpress_runner` answers to all questions of `asks`, which are about `context`."""
        questions = [[ask.question.text, ask.question.answer_prefix] for ask in asks]
        body = {
            "context": context,
            "questions": questions,
            "max_new_tokens": asks[0].question.max_new_tokens,
            "ignore_eos": asks[0].ignore_eos,
        }
        stdin = self._process.stdin
        assert stdin is not None
        print(json.dumps(body), file=stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"KVPress's process ended; the end of {self._log_file}:\n{self._log_file.read_text()[-3000:]}")
        return dict(json.loads(line))


class KvpressArm:
    """KVPress's pipeline, one call after another.

    It keeps nothing between calls. As questions arrive it is called once for each; grouped: once for each document with all its
    questions, which is its best case and takes knowing them in advance. Its speed does not depend on what it answered before, so
    that a part of a round's questions, about `limit`, is enough (grouped: of all questions about some documents).
    """

    def __init__(self, kvpress: Kvpress, name: str, workload: Workload, tokenizer: Any, limit: int, *, grouped: bool) -> None:
        self.kvpress = kvpress
        self.name = f"{name}, grouped" if grouped else name
        self.workload = workload
        self.tokenizer = tokenizer
        self.limit = limit
        self.grouped = grouped

    def part(self, asks: Sequence[Ask]) -> list[Ask]:
        if not self.grouped:
            return list(asks[: self.limit])
        documents = list(dict.fromkeys(ask.document for ask in asks))
        chosen = documents[: max(1, self.limit * len(documents) // len(asks))]
        return [ask for ask in asks if ask.document in chosen]

    def run(self, index: int, asks: Sequence[Ask], answered: Callable[[], Any]) -> Round:
        calls: dict[int, list[Ask]] = {}
        for number, ask in enumerate(asks):
            calls.setdefault(ask.document if self.grouped else number, []).append(ask)
        answers: list[Answer] = []
        seconds = 0.0
        for call in calls.values():
            result = self.kvpress.ask(call, self.workload.samples[call[0].document].context)
            seconds += result["seconds"]
            cached = 0
            for ask, text in zip(call, result["answers"], strict=True):
                answers.append(self._answer(ask, text, result, cached))
                cached = ask.context_len
                answered()
        return summarise(self.name, index, answers, seconds)

    def _answer(self, ask: Ask, text: str, result: dict[str, Any], cached_tokens: int) -> Answer:
        return Answer(
            ask.document,
            METRICS["starts_with"](text, ask.question.references, ()),
            result["seconds"],
            ask.question.max_new_tokens if ask.ignore_eos else len(self.tokenizer.encode(text, add_special_tokens=False)),
            len(ask.input_ids),
            cached_tokens,
            slots=result["slots"],
        )
