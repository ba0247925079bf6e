"""Many questions about one document, in SGLang's frontend language: compressed once, read by all.

    bash launch/serve.sh small --port 30000                      # in one terminal
    python -m launch.many_questions --url http://localhost:30000 [--document FILE]

Shows both ways to ask: `fork`, where one program branches into its questions, and `run_batch`, where each question runs the
program. Either way the server compresses the document with the first question that arrives, the others wait for it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import sglang as sgl

from obcache_sglang.eval.prose import opticks
from obcache_sglang.lang import context

QUESTIONS = [
    "What is this text about?",
    "What does the first sentence say?",
    "What is a ray of light?",
    "What is the angle of incidence?",
]


@sgl.function
def ask_all(s: Any, document: str, questions: list[str]) -> None:
    """One program: the context, then one branch for each question."""
    s += context(document)
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += f"\n\nQuestion: {question}\nAnswer:"
        branch += sgl.gen("answer", max_tokens=24, temperature=0, stop="\n")
    for number, branch in enumerate(branches):
        s.set_var(f"answer_{number}", branch["answer"])


@sgl.function
def ask_one(s: Any, document: str, question: str) -> None:
    """One question: run_batch runs the program once for each."""
    s += context(document)
    s += f"\n\nQuestion: {question}\nAnswer:"
    s += sgl.gen("answer", max_tokens=24, temperature=0, stop="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://localhost:30000", help="a server started with --obcache")
    parser.add_argument("--document", type=Path, help="a text file (default: the first pages of Newton's Opticks)")
    arguments = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(arguments.url))
    document = arguments.document.read_text(encoding="utf-8") if arguments.document else opticks()[:8000]

    start = time.perf_counter()
    state = ask_all.run(document=document, questions=QUESTIONS)
    report(f"fork, {time.perf_counter() - start:.1f} s", [state[f"answer_{n}"] for n in range(len(QUESTIONS))])

    start = time.perf_counter()
    states = ask_one.run_batch([{"document": document, "question": question} for question in QUESTIONS])
    report(f"run_batch, {time.perf_counter() - start:.1f} s", [state["answer"] for state in states])


def report(how: str, answers: list[str]) -> None:
    print(f"\n{how}")
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"  {question:56} {answer.strip()}")


if __name__ == "__main__":
    main()
