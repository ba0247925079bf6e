"""Arms that a server answers: stock SGLang, and OBCache's ways to compress."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import torch

from obcache_sglang.bench.rounds import Answer, Cost, Round, stream_times, summarise
from obcache_sglang.bench.workload import Ask
from obcache_sglang.errors import ConfigError
from obcache_sglang.eval.arms import EXACT, Arm, parse_arms, parse_ratios
from obcache_sglang.eval.metrics import METRICS
from obcache_sglang.local_server import Client

POLICIES = ("fcfs", "lpm")
"""SGLang's --schedule-policy: its default, and longest prefix first, which alone has in-batch prefix caching."""


@dataclass(frozen=True)
class Stock:
    """A server without OBCache.

    policy: one of `POLICIES`. fp8: whether its KV cache is in fp8, with twice the slots: the bytes of a 16-bit cache. (Where the model
    runs in float32, because a CPU has no 16-bit arithmetic, its cache stands for one of 16 bits.)
    """

    policy: str
    fp8: bool = False

    @property
    def name(self) -> str:
        return f"stock/{self.policy}{'/fp8' if self.fp8 else ''}"

    def flags(self, pool_slots: int) -> list[str]:
        """For the server. pool_slots: as the other servers have them."""
        flags = ["--schedule-policy", self.policy, "--max-total-tokens", str(pool_slots * (2 if self.fp8 else 1))]
        return [*flags, "--kv-cache-dtype", fp8_dtype()] if self.fp8 else flags


def parse_stock(texts: Iterable[str]) -> list[Stock]:
    """The servers named by POLICY, or POLICY/fp8. Raises ConfigError."""
    known = {
        stock.name.removeprefix("stock/"): stock for policy in POLICIES for stock in (Stock(policy), Stock(policy, fp8=True))
    }
    for text in texts:
        if text not in known:
            raise ConfigError(f"--stock {text}: give {', '.join(known)}.")
    return [known[text] for text in dict.fromkeys(texts)]


def obcache_server(policy: str) -> str:
    return f"obcache/{policy}"


def fp8_dtype() -> str:
    """The more precise fp8 format that this machine can hold a KV cache in; NVIDIA GPUs before Ada and Hopper have one only."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
    return "fp8_e5m2" if old else "fp8_e4m3"


def _with_policy(name: str, policy: str) -> str:
    """The name of an arm, which says its server's policy where that is not SGLang's default."""
    return name if policy == POLICIES[0] else f"{name}, {policy}"


AUTO = "auto"


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


def sampling_params(arm: Arm, context_len: int, max_new_tokens: int, *, ignore_eos: bool) -> dict[str, Any]:
    """Of a question whose first `context_len` tokens are the document, asked of `arm`."""
    params: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": ignore_eos}
    return params if arm.is_exact else params | {"custom_params": {"obcache": arm.wish_for(context_len)}}


class ServedArm:
    """Asks a server in a closed loop: `clients` clients, each with its next question when it has its answer.

    arm: `EXACT` for a server without OBCache. marks: whether questions say where their document ends; in mode auto they are stock's own.
    """

    def __init__(self, client: Client, name: str, arm: Arm, clients: int, server_name: str, *, marks: bool = True) -> None:
        self.client = client
        self.name = name
        self.arm = arm
        self.clients = clients
        self.server_name = server_name
        self.marks = marks

    @classmethod
    def auto(cls, client: Client, arm: Arm, policy: str, clients: int) -> ServedArm:
        """A server in mode auto, which compresses like arm. Nothing in its questions says so."""
        name = f"{AUTO}@{arm.ratio:g}"
        return cls(client, _with_policy(name, policy), arm, clients, f"{name}/{policy}", marks=False)

    @classmethod
    def stock(cls, client: Client, stock: Stock, clients: int) -> ServedArm:
        return cls(client, stock.name, EXACT, clients, stock.name)

    @classmethod
    def obcache(cls, client: Client, arm: Arm, policy: str, clients: int) -> ServedArm:
        """policy: the server's; the name says it where it is not SGLang's default."""
        options = "".join(f"+{option}" for option in arm.options.split(",") if option)
        name = f"{arm.method}/{arm.score}/{arm.budget}{options}@{arm.ratio:g}"
        return cls(client, _with_policy(name, policy), arm, clients, obcache_server(policy))

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
        return {
            "input_ids": ask.input_ids,
            "sampling_params": sampling_params(
                self.arm if self.marks else EXACT, ask.context_len, max_new_tokens, ignore_eos=ask.ignore_eos
            ),
        }

    def _answer(self, ask: Ask) -> Answer:
        body = self._body(ask, ask.question.max_new_tokens) | {"stream": True}
        start = time.perf_counter()
        last, events = None, []
        for last in self.client.stream("/generate", body):
            events.append((time.perf_counter() - start, last["text"], last["meta_info"]["completion_tokens"]))
        seconds = time.perf_counter() - start
        if last is None:
            raise RuntimeError(f"{self.client.url} ended a stream without an answer")
        meta = last["meta_info"]
        report = meta.get("obcache") or {}
        ttft, itls = stream_times(events)
        return Answer(
            ask.document,
            METRICS["starts_with"](last["text"], ask.question.references, ()),
            seconds,
            meta["completion_tokens"],
            meta["prompt_tokens"],
            meta["cached_tokens"],
            seconds if ttft is None else ttft,
            ask.context_len if report.get("status", "exact") == "exact" else report["kept_tokens"],
            itls,
        )

    def _replayed_tokens(self) -> int:
        return 0 if self.arm.is_exact else self.client.get("/obcache/status")["counters"]["replayed_tokens"]

    def _resident(self, asks: Sequence[Ask]) -> int:
        """Documents in the pool after `asks`.

        The server lists compressed ones; in mode auto there are exact ones beside them, which are not looked for. Exact ones are looked for from the one asked last on, until one is not there (SGLang evicts what
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
