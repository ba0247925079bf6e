"""Runs KVPress's own pipeline, in its own environment, which has no SGLang and nothing of this package.

    python kvpress_runner.py MODEL PRESS RATIO

Talks in lines of JSON: first it writes the versions it runs with; then, for each line {"context", "questions": [[text, answer
prefix], ...], "max_new_tokens", "ignore_eos"} it reads, one {"answers": [text, ...], "seconds", "slots"}. slots: tokens per KV head that the cache
holds after compression (presses that mask what they evict hold all of them).
"""

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any


def main() -> None:
    # Lines of JSON and nothing else go to stdout: whatever libraries print goes where errors do.
    answers_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    model, press_name, ratio = sys.argv[1:]
    pipeline, press = load(model, press_name, float(ratio))
    eos = pipeline.model.generation_config.eos_token_id

    def write(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers_to, flush=True)

    write({name: version(name) for name in ("kvpress", "transformers", "torch")})
    for line in sys.stdin:
        asked = json.loads(line)
        # Where the pipeline stops, beside the number of tokens.
        pipeline.model.generation_config.eos_token_id = [] if asked["ignore_eos"] else eos
        write(answer(pipeline, press, asked["context"], asked["questions"], asked["max_new_tokens"]))


def load(model: str, press_name: str, ratio: float) -> tuple[Any, Any]:
    """The pipeline, and the press to call it with."""
    import kvpress  # type: ignore[import-not-found]
    import torch
    from transformers import pipeline

    presses = {
        "snapkv": lambda: kvpress.SnapKVPress(compression_ratio=ratio),
        "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio)),
        "tova": lambda: kvpress.TOVAPress(compression_ratio=ratio),
        "kvzip": lambda: kvpress.KVzipPress(compression_ratio=ratio),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline("kv-press-text-generation", model=model, device=device, dtype="auto"), presses[press_name]()


def answer(pipeline: Any, press: Any, context: str, questions: list[list[str]], max_new_tokens: int) -> dict[str, Any]:
    """The answers to `questions`, [text, answer prefix] each, from one prefill of `context`."""
    from transformers import DynamicCache

    cache = DynamicCache()
    start = time.perf_counter()
    if len(questions) == 1:
        ((text, prefix),) = questions
        asked = pipeline(context, question=text, answer_prefix=prefix, press=press, max_new_tokens=max_new_tokens, cache=cache)
        answers = [asked["answer"]]
    else:
        # The pipeline takes several questions, but one answer prefix for all: its steps, with a prefix for each.
        limit = pipeline.tokenizer.model_max_length
        inputs = [pipeline.preprocess(context, [text], prefix, limit) for text, prefix in questions]
        joined = {"context_ids": inputs[0]["context_ids"], "questions_ids": [each["questions_ids"][0] for each in inputs]}
        answers = pipeline.forward(joined, press=press, max_new_tokens=max_new_tokens, cache=cache)
    return {"answers": answers, "seconds": time.perf_counter() - start, "slots": cache.get_seq_length()}


if __name__ == "__main__":
    main()
