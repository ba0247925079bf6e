"""Arms that a server answers: stock SGLang, and OBCache's ways to compress."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any, Protocol

from obcache_sglang.bench.rounds import Answer, Cost, Round, summarise
from obcache_sglang.bench.workload import Ask
from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import Arm, parse_arms, parse_ratios
from obcache_sglang.eval.metrics import METRICS
from obcache_sglang.server import Client

STOCK = "stock"


class Contender(Protocol):
    """An arm of the bench."""

    name: str

    def part(self, asks: Sequence[Ask]) -> list[Ask]:
        """What it is asked of a round's questions."""

    def run(self, index: int, asks: Sequence[Ask], answered: Callable[[], Any]) -> Round:
        """Answers `asks` from an empty cache. answered: called after each."""


def parse_bench_arms(texts: Iterable[str]) -> list[Arm]:
    """The arms named by METHOD/SCORE/BUDGET@RATIO[,RATIO...], or PRESET@RATIO. Raises ConfigError."""
    arms: list[Arm] = []
    for text in texts:
        settings, at, ratios = text.partition("@")
        if not at:
            raise ConfigError(f"--arms {text}: say at which ratio, as in {text}@0.7.")
        arms += [arm for arm in parse_arms([settings], parse_ratios(ratios.split(",")), ["agnostic"]) if not arm.is_exact]
    return list(dict.fromkeys(arms))


class ServedArm:
    """Asks a server in a closed loop: `clients` clients, each with its next question when it has its answer.

    arm: `EXACT` for a server without OBCache.
    """

    def __init__(self, client: Client, arm: Arm, clients: int) -> None:
        self.client = client
        self.arm = arm
        self.clients = clients
        self.name = STOCK if arm.is_exact else f"{arm.method}/{arm.score}/{arm.budget}@{arm.ratio:g}"

    def part(self, asks: Sequence[Ask]) -> list[Ask]:
        return list(asks)

    def run(self, index: int, asks: Sequence[Ask], answered: Callable[[], Any]) -> Round:
        self.client.flush_cache()
        replayed = self._replayed_tokens()

        def answer(ask: Ask) -> Answer:
            result = self._answer(ask)
            answered()
            return result

        start = time.perf_counter()
        with ThreadPoolExecutor(self.clients) as pool:
            answers = list(pool.map(answer, asks))
        seconds = time.perf_counter() - start
        replayed = self._replayed_tokens() - replayed
        return summarise(self.name, index, answers, seconds, resident=self._resident(asks), replayed_tokens=replayed)

    def _body(self, ask: Ask, max_new_tokens: int) -> dict[str, Any]:
        params: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0}
        if not self.arm.is_exact:
            params["custom_params"] = {"obcache": self.arm.wish_for(ask.context_len)}
        return {"input_ids": ask.input_ids, "sampling_params": params}

    def _answer(self, ask: Ask) -> Answer:
        body = self._body(ask, ask.question.max_new_tokens) | {"stream": True}
        start = time.perf_counter()
        first, last = None, None
        for last in self.client.stream("/generate", body):
            first = first or time.perf_counter() - start
        seconds = time.perf_counter() - start
        if last is None:
            raise RuntimeError(f"{self.client.url} ended a stream without an answer")
        meta = last["meta_info"]
        report = meta.get("obcache") or {}
        return Answer(
            ask.document,
            METRICS["starts_with"](last["text"], ask.question.references, ()),
            seconds,
            meta["completion_tokens"],
            meta["prompt_tokens"],
            meta["cached_tokens"],
            first,
            ask.context_len if report.get("status", "exact") == "exact" else report["kept_tokens"],
        )

    def _replayed_tokens(self) -> int:
        return 0 if self.arm.is_exact else self.client.get("/obcache/status")["counters"]["replayed_tokens"]

    def _resident(self, asks: Sequence[Ask]) -> int:
        """Documents in the pool after `asks`.

        The server lists compressed ones. Exact ones are looked for from the one asked last on, until one is not there (SGLang evicts what
        was used least recently, and a look that finds its document evicts nothing).
        """
        contexts = [] if self.arm.is_exact else self.client.get("/obcache/contexts")["contexts"]
        if contexts:
            return sum(context["state"] == "resident" for context in contexts)
        exact = 0
        last = {ask.document: (place, ask) for place, ask in enumerate(asks)}
        for _, ask in sorted(last.values(), key=itemgetter(0), reverse=True):
            meta = self.client.post("/generate", self._body(ask, 1))["meta_info"]
            if meta["cached_tokens"] < ask.context_len:
                break
            exact += 1
        return exact


def compression_cost(stock: ServedArm, arm: ServedArm, asks: Iterable[Ask]) -> Cost | None:
    """What compressing the documents of `asks` costs in `arm`; None where it leaves one exact (too short)."""
    made, reads, num_tokens = [], [], []
    for ask in asks:
        context = ask.input_ids[: ask.context_len]
        for each in (stock, arm):
            each.client.flush_cache()
        start = time.perf_counter()
        stock.client.post("/generate", {"input_ids": context, "sampling_params": {"max_new_tokens": 1, "temperature": 0}})
        reads.append(time.perf_counter() - start)
        report = arm.client.post("/obcache/compress", {"input_ids": context, **arm.arm.wish})
        if report["status"] == "exact":
            return None
        made.append(arm.client.get(f"/obcache/contexts/{report['id']}"))
        num_tokens.append(ask.context_len)
    return Cost(
        arm.name,
        int(statistics.median(num_tokens)),
        int(statistics.median(each["slots"] for each in made)),
        statistics.median(each["seconds"] for each in made),
        statistics.median(each["scoring_seconds"] for each in made),
        statistics.median(reads),
    )
