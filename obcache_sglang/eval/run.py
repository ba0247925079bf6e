"""Asks a server every question under every arm, and writes one JSON line per answer.

A sample's arms follow one another, so that a run that was stopped half-way compares what it has pair by pair. Its exact cache is
found again by each arm, and each compresses it once for all of the sample's questions.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from obcache_sglang.eval.arms import EXACT, Arm
from obcache_sglang.eval.metrics import METRICS
from obcache_sglang.eval.samples import Question, Sample
from obcache_sglang.server import Client

TOP_LOGPROBS = 256
"""Next-token probabilities compared for the KL divergence: the others count as one token, which can only make it smaller."""

_SEPARATOR = "<|obcache-eval-context-ends-here|>"

Key = tuple[Arm, str, int, int]
Prompt = tuple[list[int], list[int]]
"""Token ids of a context, and of all behind it."""


class Prompts:
    """Token ids of contexts and questions, as the served model reads them.

    tokenizer: of transformers. With a chat template, context and question stand in the user's turn, and the answer's prefix begins
    the assistant's; without one, they follow each other.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def split(self, sample: Sample) -> list[Prompt]:
        """The prompt of each question of a sample."""
        split = self.continuation if sample.metric == "nll" else self.ask
        return [split(sample.context, question) for question in sample.questions]

    def ask(self, context: str, question: Question) -> Prompt:
        """Ids of the context, with what the template puts before it, and of all behind it."""
        text = f"{context}{_SEPARATOR}{question.text}"
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
            text += question.answer_prefix
            before, after = text.split(_SEPARATOR)
            return self._encode(before, special=False), self._encode(after, special=False)
        return self.continuation(context, question)

    def continuation(self, context: str, question: Question) -> Prompt:
        """Ids of plain text, and of what follows it."""
        return self._encode(context, special=True), self._encode(question.text + question.answer_prefix, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))


class Runner:
    """Asks `client` what is not answered yet in the answers.jsonl of `run_dir`, and appends it there."""

    def __init__(self, client: Client, tokenizer: Any, run_dir: Path) -> None:
        self.client = client
        self.prompts = Prompts(tokenizer)
        self.answers_file = run_dir / "answers.jsonl"
        self.survivors_file = run_dir / "survivors.json"
        # The exact next-token distributions of the sample that was asked last, with its key.
        self._exact: tuple[tuple[str, int], list[Any]] | None = None

    def run(self, samples: Sequence[Sample], arms: Sequence[Arm]) -> None:
        done = _answered(self.answers_file)
        total = sum(len(sample.questions) for sample in samples) * len(arms)
        with self.answers_file.open("a", encoding="utf-8") as file, tqdm(total=total, unit="answer", smoothing=0.05) as bar:
            for sample in samples:
                bar.set_description(f"{sample.task} {sample.index}")
                asked = range(len(sample.questions))
                missing = {arm: [i for i in asked if (arm, sample.task, sample.index, i) not in done] for arm in arms}
                prompts = self.prompts.split(sample) if any(missing.values()) else []
                for arm in arms:
                    for line in self._answers(sample, prompts, arm, missing[arm]):
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    bar.update(len(sample.questions))

    def _answers(self, sample: Sample, prompts: Sequence[Prompt], arm: Arm, missing: list[int]) -> list[dict[str, Any]]:
        """prompts: of all questions of the sample; missing: those to ask."""
        if not missing:
            return []
        if sample.metric == "nll":
            return self._continuation(sample, prompts[0], arm) if arm.mode == "agnostic" else []
        prompts = [prompts[i] for i in missing]
        params = [
            {
                "max_new_tokens": sample.questions[i].max_new_tokens,
                "temperature": 0,
                "custom_params": {"obcache": arm.wish_for(len(context))},
            }
            for i, (context, _) in zip(missing, prompts, strict=True)
        ]
        body = {"input_ids": [context + rest for context, rest in prompts], "sampling_params": params}
        lines = []
        for i, answer in zip(missing, self.client.post("/generate", body), strict=True):
            question = sample.questions[i]
            accuracy = METRICS[sample.metric](answer["text"], question.references, sample.options)
            line = _line(sample, arm, i, {"accuracy": accuracy}, answer, len(prompts[0][0]))
            lines.append(line | {"output": answer["text"], "references": list(question.references)})
        return lines

    def _continuation(self, sample: Sample, prompt: Prompt, arm: Arm) -> list[dict[str, Any]]:
        """NLL of the tokens of the sample's question, which continue its context, and their KL from the exact distribution."""
        context, rest = prompt
        answer, top = self._score(context, rest, arm)
        # The first token's probability belongs to the context's last query, which a compressed context no longer has.
        logprobs = [value for value, *_ in answer["meta_info"]["input_token_logprobs"][-len(rest) + 1 :]]
        key = (sample.task, sample.index)
        if self._exact is None or self._exact[0] != key:
            self._exact = key, top if arm.is_exact else self._score(context, rest, EXACT)[1]
        kl = 0.0 if arm.is_exact else math.fsum(map(divergence, self._exact[1], top)) / len(top)
        return [_line(sample, arm, 0, {"nll": -math.fsum(logprobs) / len(logprobs), "kl": kl}, answer, len(context))]

    def _score(self, context: list[int], rest: list[int], arm: Arm) -> tuple[Any, list[Any]]:
        """The server's answer, and the most likely tokens at the place of each of `rest` but the first."""
        params = {"max_new_tokens": 1, "temperature": 0, "custom_params": {"obcache": arm.wish_for(len(context))}}
        body = {"input_ids": context + rest, "sampling_params": params, "return_logprob": True}
        answer = self.client.post("/generate", body | {"logprob_start_len": len(context), "top_logprobs_num": TOP_LOGPROBS})
        return answer, answer["meta_info"]["input_top_logprobs"][-len(rest) + 1 :]

    def note_survivors(self, samples: Iterable[Sample], arms: Iterable[Arm]) -> None:
        """Writes down which tokens of the samples' contexts each arm's heads keep; exact and query-aware arms are left out."""
        arms = [arm for arm in arms if not arm.is_exact and arm.mode == "agnostic"]
        noted = []
        for sample in samples:
            context, _ = self.prompts.split(sample)[0]
            noted += [self._survivors(sample, context, arm) for arm in tqdm(arms, unit="arm", desc=f"{sample.task} kept")]
        self.survivors_file.write_text(json.dumps([each for each in noted if each], ensure_ascii=False), encoding="utf-8")

    def _survivors(self, sample: Sample, context: list[int], arm: Arm) -> dict[str, Any] | None:
        made = self.client.post("/obcache/compress", {"input_ids": context, **arm.wish})
        if made["status"] == "exact":
            return None
        heads = self.client.get(f"/obcache/contexts/{made['id']}", params={"positions": "true"})["positions"]
        kept = [[0] * len(context) for _ in heads]
        for layer, positions in zip(kept, heads, strict=True):
            for position in itertools.chain.from_iterable(positions):
                layer[position] += 1
        return {
            "title": f"{sample.task} {sample.index}",
            "arm": arm.to_dict(),
            "num_heads": len(heads[0]),
            "tokens": [self.prompts.tokenizer.decode([token]) for token in context],
            "kept": kept,
        }


def divergence(exact: Iterable[Any], other: Iterable[Any]) -> float:
    """KL(exact || other) in nats of two next-token distributions, from the most likely tokens of each.

    exact, other: [log-probability, token id, ...] of the most likely tokens. Tokens that only one of them lists count, with
    all others, as one: the result is a lower bound.
    """
    p = {token: math.exp(logprob) for logprob, token, *_ in exact}
    q = {token: math.exp(logprob) for logprob, token, *_ in other}
    both = p.keys() & q.keys()
    rest_p = max(0.0, 1.0 - math.fsum(p[token] for token in both))
    rest_q = max(1e-12, 1.0 - math.fsum(q[token] for token in both))
    result = math.fsum(p[token] * math.log(p[token] / q[token]) for token in both if p[token] > 0)
    return max(0.0, result + (rest_p * math.log(rest_p / rest_q) if rest_p > 0 else 0.0))


def _answered(file: Path) -> set[Key]:
    """What the answers file holds. Takes away what a killed run wrote of its last line, so that the next line is whole."""
    if not file.exists():
        return set()
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    return {_key(json.loads(line)) for line in whole.splitlines()}


def _key(line: dict[str, Any]) -> Key:
    return Arm(**line["arm"]), line["task"], line["sample"], line["question"]


def _line(
    sample: Sample, arm: Arm, question: int, metrics: dict[str, float], answer: dict[str, Any], num_tokens: int
) -> dict[str, Any]:
    report = answer["meta_info"].get("obcache") or {}
    return {
        "arm": arm.to_dict(),
        "task": sample.task,
        "sample": sample.index,
        "question": question,
        "metrics": metrics,
        "status": report.get("status", "exact"),
        "reason": report.get("reason"),
        "context_tokens": report.get("context_tokens") or num_tokens,
        "kept_tokens": report.get("kept_tokens") or num_tokens,
    }
