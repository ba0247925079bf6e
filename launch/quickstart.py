"""Reads a real document with a real server, and asks the same questions with exact and with compressed cache.

    python -m launch.quickstart [--tokens 3000] [--ratios 0.8 0.9] [--method M] [--score S]

The document is the first pages of Newton's Opticks (1730) with eight facts hidden in it, which the questions ask for. Nothing
of a question is known when the document is compressed: it is compressed once, by the first question, and reused by all. How much
each head keeps comes from the head profile of the model, which was measured on other texts. With `--method gate` the document is
compressed from the exact KV cache that the questions before have left.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.model import MODEL_NAME, cache_dir, ensure_model, served_dtype
from obcache_sglang.eval.prose import opticks
from obcache_sglang.lang import context
from obcache_sglang.local_server import Server, serve

# Facts are hidden in the document as "{subject} {answer}."; a question asks for the subject, and the model, which is small,
# is given the beginning of the answer.
FACTS = [
    ("Who is the captain of the ship Aurora?", "The captain of the ship Aurora is called", "Margaret Olsen"),
    ("When does the bakery in Milton Street open?", "The bakery in Milton Street opens at", "half past six"),
    ("Who was the winner of the chess tournament?", "The winner of the chess tournament was", "Oscar Lindqvist"),
    ("What does the painting in the dining hall show?", "The painting in the dining hall shows", "a white horse"),
    ("Where was the wedding of Anna and Tomas held?", "The wedding of Anna and Tomas was held in", "Lisbon"),
    ("What is the lighthouse keeper's dog named?", "The lighthouse keeper's dog is named", "Biscuit"),
    ("What is the secret ingredient of the soup?", "The secret ingredient of the soup is", "ginger"),
    ("What is the favourite colour of Doctor Hale?", "The favourite colour of Doctor Hale is", "turquoise"),
]
# The end of the context, since the last tokens decide what is kept: it says what kind of question will come, and no more.
INSTRUCTION = "Answer a question about the text above: a name, a time, a place or a thing that it mentions."
MAX_NEW_TOKENS = 6


@dataclass(frozen=True)
class Question:
    """text: the question; expected: what the document says; prompt: the document, the question and the answer's beginning."""

    text: str
    expected: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """One answer of the server. seconds: to the first token; meta: SGLang's meta_info of the last chunk."""

    text: str
    seconds: float
    meta: dict[str, Any]


@dataclass(frozen=True)
class Round:
    """All questions asked of one kind of cache. slots: KV slots the document holds; rate: questions per second, at once."""

    answers: list[Answer]
    slots: int
    first_seconds: float
    later_seconds: float
    rate: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3000, help="length of the document in tokens (default: 3000)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.9], help="fractions of the KV cache removed (0.8 0.9)")
    parser.add_argument("--method", default="tova", help="which queries score (default: tova)")
    parser.add_argument("--score", default="obcache-v", help="how they score (default: obcache-v)")
    arguments = parser.parse_args()
    # End like on Ctrl-C, through the `with` block that stops the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    dtype = served_dtype()
    model_dir = ensure_model(dtype)
    questions, num_tokens = make_questions(model_dir, arguments.tokens)
    flags = [
        f"--dtype={dtype}",  # what SGLang takes by itself is 16-bit
        "--obcache",
        f"--obcache-method={arguments.method}",
        f"--obcache-score={arguments.score}",
        "--obcache-head-profile=smollm2-135m",
        "--obcache-gates=smollm2-135m",
    ]
    log_file = cache_dir() / "quickstart-server.log"
    progress(f"starting: sglang serve --model-path {model_dir} {' '.join(flags)}")
    progress(f"(its log: {log_file}; half a minute, the first time in a new environment two)")
    with serve(model_dir, log_file, flags) as server:
        progress("the server is ready; warming up")
        ask(server, "Hello", False)
        rounds = {"exact": ask_all(server, questions, "exact", False)}
        for ratio in arguments.ratios:
            rounds[f"{ratio:g} removed"] = ask_all(server, questions, f"{ratio:g} removed", {"compression_ratio": ratio})
    print_tables(questions, num_tokens, arguments, rounds)


def make_questions(model_dir: Path, num_tokens: int) -> tuple[list[Question], int]:
    """Questions about one document of about `num_tokens` tokens, and its real length in tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    facts = [f"{subject} {answer}." for _, subject, answer in FACTS]
    prose = opticks()
    prose_tokens = num_tokens - len(tokenizer("\n\n".join(facts)).input_ids)
    # The tokenizer's own offsets cut the text at exactly that many tokens.
    end = tokenizer(prose, return_offsets_mapping=True).offset_mapping[prose_tokens - 1][1]
    paragraphs = prose[:end].split("\n\n")
    # One fact in each eighth of the document, from the end, so that the places before stay what they are.
    rng = random.Random(1704)
    stretch = len(paragraphs) // len(facts)
    for number, fact in reversed(list(enumerate(facts))):
        paragraphs.insert(number * stretch + rng.randrange(stretch), fact)
    document = "\n\n".join(paragraphs)

    def prompt(question: str, subject: str) -> str:
        messages = [
            {"role": "user", "content": context(f"{document}\n\n{INSTRUCTION}") + f"\n\n{question}"},
            {"role": "assistant", "content": subject},
        ]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True))

    questions = [Question(question, answer, prompt(question, subject)) for question, subject, answer in FACTS]
    return questions, len(tokenizer(document).input_ids)


def ask(server: Server, prompt: str, wish: Any) -> Answer:
    """wish: what the request says in custom_params["obcache"]."""
    body = {
        "text": prompt,
        "stream": True,
        "sampling_params": {
            "max_new_tokens": MAX_NEW_TOKENS,
            "temperature": 0,
            "custom_params": {"obcache": wish},
        },
    }
    start = time.perf_counter()
    seconds, last = 0.0, {}
    for event in server.stream("/generate", body):
        seconds, last = seconds or time.perf_counter() - start, event
    return Answer(last["text"].strip(), seconds, last["meta_info"])


def ask_all(server: Server, questions: list[Question], name: str, wish: Any) -> Round:
    """Asks one by one, which shows what each waits for, and then all at once, which shows how many a second. wish: as in `ask`."""
    answers = []
    for number, question in enumerate(questions, start=1):
        answers.append(ask(server, question.prompt, wish))
        progress(f"{name}: question {number} of {len(questions)}, {answers[-1].seconds:.2f} s to the first token")
    progress(f"{name}: all {len(questions)} questions at once")
    start = time.perf_counter()
    with ThreadPoolExecutor(len(questions)) as pool:
        list(pool.map(lambda question: ask(server, question.prompt, wish), questions))
    rate = len(questions) / (time.perf_counter() - start)
    if wish:
        report = answers[-1].meta.get("obcache") or {}
        if report.get("status") != "reused":
            raise RuntimeError(f"the last question was not answered from the compressed context: {report}")
        slots = report["kept_tokens"]
    else:
        # A slot for every token that any later question finds in the tree; the smallest number, since a question may find
        # words of its own that another one began with.
        slots = min(answer.meta["cached_tokens"] for answer in answers[1:])
    later = statistics.median(answer.seconds for answer in answers[1:])
    return Round(answers, slots, answers[0].seconds, later, rate)


def print_tables(questions: list[Question], num_tokens: int, arguments: argparse.Namespace, rounds: dict[str, Round]) -> None:
    """rounds: by name, the exact one first."""
    print()
    print(f"{MODEL_NAME}, {served_dtype()}; a document of {num_tokens} tokens; {arguments.method}, {arguments.score}")
    print()
    print(f"{'question':48}" + "".join(f" {name:24}" for name in rounds))
    for number, question in enumerate(questions):
        answers = [each.answers[number] for each in rounds.values()]
        cells = [f"{'right' if is_right(question, answer) else 'WRONG'}  {answer.text[:16]!r}" for answer in answers]
        print(f"{question.text:48}" + "".join(f" {cell:24}" for cell in cells))
    print()
    rows: list[tuple[str, str, list[float]]] = [
        ("right answers", "{:.0f}", [sum(map(is_right, questions, each.answers)) for each in rounds.values()]),
        ("KV slots held by the document", "{:.0f}", [each.slots for each in rounds.values()]),
        ("first question, seconds to first token", "{:.2f}", [each.first_seconds for each in rounds.values()]),
        ("later questions, seconds to first token", "{:.2f}", [each.later_seconds for each in rounds.values()]),
        ("questions per second, all at once", "{:.2f}", [each.rate for each in rounds.values()]),
    ]
    print(f"{'':40}" + "".join(f"{name:>13}" for name in rounds))
    for name, form, values in rows:
        print(f"{name:40}" + "".join(f"{form.format(value):>13}" for value in values))


def is_right(question: Question, answer: Answer) -> bool:
    return answer.text.lower().startswith(question.expected.lower())


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
