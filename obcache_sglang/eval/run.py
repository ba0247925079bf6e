"""Asks a server every question under every arm, and writes one JSON line per answer.

A sample is asked under all arms before the next, so that a run that was stopped half-way compares what it has pair by pair. The exact
cache goes first: every arm finds its KV again, and compresses it once for all of the sample's questions.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from obcache_sglang.eval.arms import EXACT, Arm
from obcache_sglang.eval.metrics import METRICS
from obcache_sglang.eval.prompts import Prompt, Prompts, TooLong
from obcache_sglang.eval.samples import Sample
from obcache_sglang.local_server import Client

TOP_LOGPROBS = 256
"""Next-token probabilities compared for the KL divergence: the others count as one token, which can only make it smaller."""

BATCH = 16
"""Questions that are sent together, in one request: the engine decodes them side by side, and groups them alike in each run."""

Key = tuple[Arm, str, int, int]
Ask = tuple[Arm, int]
"""An arm, and the number of a sample's question."""


class Runner:
    """Asks `client` what is not answered yet in the answers.jsonl of `run_dir`, and appends it there.

    Samples whose prompts do not fit the model are left out, and named in its skipped.json.
    """

    def __init__(self, client: Client, tokenizer: Any, run_dir: Path) -> None:
        self.client = client
        self.prompts = Prompts(tokenizer)
        self.answers_file = run_dir / "answers.jsonl"
        self.survivors_file = run_dir / "survivors.json"
        self.skipped_file = run_dir / "skipped.json"
        self.skipped: dict[str, str] = {}
        # Tokens of a prompt with its answer: the scheduler's bound of prompts, a few tokens below the model's and the pool's.
        self.limit = int(client.get("/server_info")["max_req_input_len"]) - 1
        # Of the sample that was asked last: its key, the exact cache's answer, and its next-token distributions.
        self._exact: tuple[tuple[str, int], Any, list[Any]] | None = None

    def run(self, samples: Sequence[Sample], arms: Sequence[Arm]) -> None:
        done = _answered(self.answers_file)
        self.skipped_file.unlink(missing_ok=True)
        total = sum(len(sample.questions) for sample in samples) * len(arms)
        with self.answers_file.open("a", encoding="utf-8") as file, tqdm(total=total, unit="answer", smoothing=0.05) as bar:
            for sample in samples:
                bar.set_description(f"{sample.task} {sample.index}")
                asked = [(arm, i) for arm in arms for i in range(len(sample.questions))]
                missing = [(arm, i) for arm, i in asked if (arm, sample.task, sample.index, i) not in done]
                bar.update(len(asked) - len(missing))
                if not missing:
                    continue
                try:
                    prompts, cut = self.prompts.fitted(sample, self.limit)
                except TooLong as error:
                    self._skip(sample, str(error))
                    bar.update(len(missing))
                    continue
                for batch in _batches(missing):
                    for line in self._answers(sample, prompts, batch):
                        file.write(json.dumps(line | ({"cut": cut} if cut else {}), ensure_ascii=False) + "\n")
                    file.flush()
                    bar.update(len(batch))

    def _skip(self, sample: Sample, reason: str) -> None:
        self.skipped[f"{sample.task} {sample.index}"] = reason
        self.skipped_file.write_text(json.dumps(self.skipped, indent=1, ensure_ascii=False), encoding="utf-8")

    def _answers(self, sample: Sample, prompts: Sequence[Prompt], batch: Sequence[Ask]) -> list[dict[str, Any]]:
        """prompts: of all questions of the sample."""
        if sample.metric == "nll":
            return self._continuations(sample, prompts[0], [arm for arm, _ in batch if arm.mode == "agnostic"])
        stop: dict[str, Any] = {}
        if sample.stop_at_newline:
            stop = {"min_new_tokens": 1, "stop_token_ids": self.prompts.tokenizer.encode("\n", add_special_tokens=False)[-1:]}
        params = [
            {
                "max_new_tokens": sample.questions[i].max_new_tokens,
                "temperature": 0,
                "custom_params": {"obcache": arm.wish_for(len(prompts[i][0]))},
                **stop,
            }
            for arm, i in batch
        ]
        body = {"input_ids": [prompts[i][0] + prompts[i][1] for _, i in batch], "sampling_params": params}
        lines = []
        for (arm, i), answer in zip(batch, self.client.post("/generate", body), strict=True):
            question = sample.questions[i]
            accuracy = METRICS[sample.metric](answer["text"], question.references, sample.options)
            line = _line(sample, arm, i, {"accuracy": accuracy}, answer, len(prompts[i][0]))
            asked = f"{question.text}{question.answer_prefix}"
            lines.append(line | {"asked": asked, "output": answer["text"], "references": list(question.references)})
        return lines

    def _continuations(self, sample: Sample, prompt: Prompt, arms: Sequence[Arm]) -> list[dict[str, Any]]:
        """NLL of the tokens of the sample's question, which continue its context, and their KL from the exact distribution."""
        context, rest = prompt
        key = (sample.task, sample.index)
        if arms and (self._exact is None or self._exact[0] != key):
            ((answer, top),) = self._score(context, rest, [EXACT])
            self._exact = key, answer, top
        lines = []
        asked = [arm for arm in arms if not arm.is_exact]
        scored = dict(zip(asked, self._score(context, rest, asked), strict=True)) if asked else {}
        for arm in arms:
            assert self._exact is not None
            answer, top = scored.get(arm) or self._exact[1:]
            # The first token's probability belongs to the context's last query, which a compressed context no longer has.
            logprobs = [value for value, *_ in answer["meta_info"]["input_token_logprobs"][-len(rest) + 1 :]]
            kl = 0.0 if arm.is_exact else math.fsum(map(divergence, self._exact[2], top)) / len(top)
            metrics = {"nll": -math.fsum(logprobs) / len(logprobs), "kl": kl}
            lines.append(_line(sample, arm, 0, metrics, answer, len(context)))
        return lines

    def _score(self, context: list[int], rest: list[int], arms: Sequence[Arm]) -> list[tuple[Any, list[Any]]]:
        """For each arm the server's answer, and the most likely tokens at the place of each of `rest` but the first."""
        params = [
            {"max_new_tokens": 1, "temperature": 0, "custom_params": {"obcache": arm.wish_for(len(context))}} for arm in arms
        ]
        body = {"input_ids": [context + rest] * len(arms), "sampling_params": params, "return_logprob": True}
        answers = self.client.post("/generate", body | {"logprob_start_len": len(context), "top_logprobs_num": TOP_LOGPROBS})
        return [(answer, answer["meta_info"]["input_top_logprobs"][-len(rest) + 1 :]) for answer in answers]

    def note_survivors(self, samples: Iterable[Sample], arms: Iterable[Arm]) -> None:
        """Writes down which tokens of the samples' contexts each arm's heads keep; exact and query-aware arms are left out."""
        arms = [arm for arm in arms if not arm.is_exact and arm.mode == "agnostic"]
        noted = []
        for sample in samples:
            if f"{sample.task} {sample.index}" in self.skipped:
                continue
            context, _ = self.prompts.fitted(sample, self.limit)[0][0]
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


def _batches(asked: Sequence[Ask]) -> Iterator[Sequence[Ask]]:
    """What is sent together: the exact cache by itself, before all others."""
    exact = [each for each in asked if each[0].is_exact]
    others = [each for each in asked if not each[0].is_exact]
    for some in (exact, others):
        yield from (some[first : first + BATCH] for first in range(0, len(some), BATCH))


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
    } | ({"not_comparable": sample.not_comparable} if sample.not_comparable else {})
