"""Hostile clients beside ordinary ones, on a real server:  python -m tests.fuzz [--seed N] [--requests N] [--seconds S] [--flags ...]

Malformed and hostile requests over every endpoint (`tests/fuzzing/hostile.py`) come from a few threads, while ordinary clients ask in
namespaces of their own. Wanted: the server lives and answers everybody; no error of ours (a 500 must come from stock SGLang too, which
is asked afterwards, or be in `ALLOWED`); no changed answer; nothing told to a stranger; no slot lost, no map or process that grows.

Prints its progress, one line for each finding, and a verdict; exit code 1 with findings.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from launch.model import ensure_model
from obcache_sglang.local_server import Server, serve
from tests.fuzzing.hostile import MARKER, Attempt, Hostile
from tests.serving.client import document, flush, tokenizer
from tests.serving.conftest import COMMON, STRICT

ANSWER_SECONDS = 300.0
"""Nothing that is asked here takes so long, on a machine that is busy with other things too."""

MAX_GROWTH = 400 << 20
"""Bytes by which one process of the server may grow over a run: the allocator's noise, and none of 2,000 requests' own."""

MAX_CONTEXTS = 24

FLAGS = (
    "--max-total-tokens",
    "6000",
    "--chunked-prefill-size",
    "256",
    "--max-running-requests",
    "16",
    "--grammar-backend",
    "xgrammar",
)
OBCACHE_FLAGS = ("--obcache", "--obcache-min-tokens", "32", "--obcache-method", "snapkv", "--obcache-compression-ratio", "0.5")
OBCACHE_FLAGS += ("--obcache-max-contexts", str(MAX_CONTEXTS), "--obcache-head-profile", "auto")

ALLOWED: tuple[tuple[str, str], ...] = ()
"""Server errors that are SGLang's: (what their text holds, why they are not ours and cannot be shown by asking a stock server)."""

_TOPICS = ("exceptions", "formatstrings")
_QUESTIONS = (" In short, this means", "\n\nThe first rule above says")


@dataclass
class Findings:
    """What went wrong, from all threads."""

    lines: list[str] = field(default_factory=list)
    errors: list[tuple[Attempt, int, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, line: str) -> None:
        self.lines.append(line)
        print(f"FINDING: {line}", flush=True)


class Ordinary:
    """A client that asks about two documents in a namespace of its own, and knows all answers beforehand."""

    def __init__(self, server: Server, model_dir: Path, number: int) -> None:
        self.server = server
        self.salt = f"tenant-{number}-of-the-fuzzer"
        texts = [tokenizer(model_dir).decode(document(model_dir, 150 + 10 * number, topic)) for topic in _TOPICS]
        self.asked = [(text, ask) for text in texts for ask in _QUESTIONS]
        self.exact = [self.ask(text + MARKER + ask, False)["text"] for text, ask in self.asked]
        flush(server)  # with --obcache-when pressure, what is cached exactly is read so
        for text in texts:
            server.post("/obcache/compress", {"text": text, "cache_salt": self.salt})
        compressed = [self.ask(text + MARKER + ask) for text, ask in self.asked]
        assert all(answer["meta_info"]["obcache"]["status"] == "reused" for answer in compressed), "a fresh server compresses"
        self.compressed = [answer["text"] for answer in compressed]
        self.ids = [answer["meta_info"]["obcache"]["context_id"] for answer in compressed]
        listed = server.get("/obcache/contexts", headers={"X-Cache-Salt": self.salt})["contexts"]
        self.names = [context["name"] for context in listed]
        assert len(self.names) == len(texts)

    def ask(self, text: str, wish: Any = None) -> Any:
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}
        if wish is not None:
            params["custom_params"] = {"obcache": wish}
        return self.server.post(
            "/generate", {"text": text, "sampling_params": params, "cache_salt": self.salt}, timeout=ANSWER_SECONDS
        )

    def check(self, index: int, how: str, findings: Findings) -> None:
        """One question, by `text`, by context `id`, or `exact`; its answer is the one it has alone."""
        text, ask = self.asked[index]
        try:
            if how == "id":
                answer = self.ask(MARKER + ask, {"context_id": self.ids[index]})
            else:
                answer = self.ask(text + MARKER + ask, False if how == "exact" else None)
        except RuntimeError as error:
            if how == "id" and " 404: " in str(error):  # forgotten: others made more contexts than are remembered
                findings.counts["ordinary by a forgotten id"] += 1
                return
            findings.add(f"an ordinary question ({how}) failed: {error}")
            return
        except requests.RequestException as error:
            findings.add(f"an ordinary question ({how}) was not answered: {error}")
            return
        if answer["meta_info"]["finish_reason"]["type"] == "abort":  # abort_all
            findings.counts["ordinary aborted"] += 1
            return
        status = answer["meta_info"].get("obcache", {}).get("status", "plain")
        findings.counts[f"ordinary {status}"] += 1
        wanted = (self.exact if status in ("exact", "plain") else self.compressed)[index]
        if answer["text"] != wanted:
            findings.add(f"an ordinary answer ({how}, {status}) changed: {answer['text']!r}, not {wanted!r}")


def send(server: Server, attempt: Attempt, secrets: set[str], hostile: Hostile, findings: Findings) -> None:
    """One attempt, and what must hold for its answer."""
    patience = attempt.hang_up or ANSWER_SECONDS
    started_at = time.monotonic()
    body, status = b"", 0
    try:
        with requests.request(
            attempt.method, server.url + attempt.path, data=attempt.body, headers=attempt.headers, params=attempt.params,
            timeout=patience, stream=True,
        ) as response:  # fmt: skip
            status = response.status_code
            for chunk in response.iter_content(1 << 14):
                body += chunk
                if time.monotonic() - started_at > patience:
                    raise requests.Timeout
    except requests.RequestException as error:
        if attempt.hang_up is None and not (status and isinstance(error, requests.exceptions.ChunkedEncodingError)):
            findings.add(f"not answered in {time.monotonic() - started_at:.0f} s ({error!r:.300}): {attempt}")
        findings.counts["hung up" if attempt.hang_up is not None else "broken off"] += 1
        return
    findings.counts[f"{status}"] += 1
    text = body.decode(errors="replace")
    if status >= 500:
        findings.errors.append((attempt, status, text))
    if status < 400:
        told = [secret for secret in secrets if secret in text]
        if told or (attempt.foreign and attempt.path.startswith("/obcache/contexts/")):
            findings.add(f"a stranger was told {told or attempt.path}: {attempt}")
        key = "id" if attempt.path == "/obcache/compress" else "context_id"
        hostile.own_ids = (hostile.own_ids + re.findall(rf'"{key}": ?"([0-9a-f]{{32}})"', text))[-40:]


def drive(
    server: Server, model_dir: Path, seed: int, num_requests: int, seconds: float, num_hostile: int, findings: Findings
) -> None:
    """The run itself: ordinary clients alone, then everybody, then ordinary clients alone again."""
    ordinary = [Ordinary(server, model_dir, number) for number in range(2)]
    secrets = {each for client in ordinary for each in (*client.ids, *client.names)}
    ids = document(model_dir, 3000, "class")
    marker_id = server.get("/obcache/status")["marker_token_id"]
    plain = tokenizer(model_dir)(MARKER)["input_ids"]
    assert marker_id not in plain
    deadline, left = time.monotonic() + seconds, iter(range(num_requests))
    lock, stop = threading.Lock(), threading.Event()
    sent = 0

    def attack(number: int) -> None:
        nonlocal sent
        foreign = [each for client in ordinary for each in client.ids]
        hostile = Hostile(
            f"{seed}-{number}", words=tokenizer(model_dir).decode(ids), token_ids=ids, marker_id=marker_id, plain=plain, foreign_ids=foreign
        )  # fmt: skip
        while time.monotonic() < deadline and server.process.poll() is None:
            with lock:
                if next(left, None) is None:
                    return
                sent += 1
            send(server, hostile.attempt(), secrets, hostile, findings)

    def live(client: Ordinary) -> None:
        turn = 0
        while not stop.is_set() and server.process.poll() is None:
            client.check(turn % len(client.asked), ("text", "text", "id", "exact")[turn // len(client.asked) % 4], findings)
            turn += 1

    attackers = [threading.Thread(target=attack, args=(number,)) for number in range(num_hostile)]
    clients = [threading.Thread(target=live, args=(client,)) for client in ordinary]
    for thread in (*attackers, *clients):
        thread.start()
    memory, warm_memory, printed_at = {}, {}, 0.0
    while any(thread.is_alive() for thread in attackers):
        time.sleep(0.5)
        if time.monotonic() - printed_at > 15 and server.process.poll() is None:
            printed_at, memory = time.monotonic(), memory_of(server)
            if sent > num_requests // 4 and not warm_memory:
                warm_memory = memory
            watch(server, findings)
            print(
                f"{sent}/{num_requests} sent, {dict(findings.counts.most_common(8))}, MB {[m >> 20 for m in memory.values()]}",
                flush=True,
            )
    stop.set()
    for thread in clients:
        thread.join()
    if server.process.poll() is not None:
        findings.add(f"the server ended with {server.process.returncode}; its log: {server.log()[-3000:]}")
        return
    for name, size in memory_of(server).items():
        if name in warm_memory and size - warm_memory[name] > MAX_GROWTH:
            findings.add(f"process {name} has grown from {warm_memory[name] >> 20} to {size >> 20} MB")
    settle(server, ordinary, findings)


def memory_of(server: Server) -> dict[str, int]:
    """Resident bytes of each process of the server."""
    root = psutil.Process(server.process.pid)
    sizes = {}
    for process in (root, *root.children(recursive=True)):
        try:
            sizes[f"{process.pid} {process.name()}"] = process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return sizes


def watch(server: Server, findings: Findings) -> None:
    try:
        pool = server.get("/obcache/status", timeout=ANSWER_SECONDS)["ranks"][0]["pool"]
    except (RuntimeError, requests.RequestException) as error:
        findings.add(f"no status: {error}")
        return
    if pool["contexts"] > 2 * MAX_CONTEXTS or pool["pinned_slots"] > pool["max_pinned_slots"]:
        findings.add(f"more contexts or pins than allowed: {pool}")


def settle(server: Server, ordinary: Sequence[Ordinary], findings: Findings) -> None:
    """Once all have gone nothing is left running, the pool is whole, and everything works."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while (flushed := server.request("POST", "/flush_cache", params={"timeout": 10})).status_code != 200:
        if time.monotonic() > deadline:
            findings.add(f"something still runs: {flushed.text} {server.get('/v1/loads')['loads']}")
            return
    (load,) = server.get("/v1/loads")["loads"]
    if load["num_used_tokens"] or load["num_waiting_reqs"] or load["num_running_reqs"]:
        findings.add(f"something is left: {load}")
    # Then all is exact as long as there is room.
    by_need = server.get("/obcache/status")["settings"]["when"] == "pressure"
    for client in ordinary:
        for index in range(len(client.asked)):
            before = findings.counts["ordinary compressed"] + findings.counts["ordinary reused"]
            client.check(index, "text", findings)
            if not by_need and findings.counts["ordinary compressed"] + findings.counts["ordinary reused"] == before:
                findings.add("an ordinary question is not compressed any more")


def check_log(log: str, findings: Findings) -> None:
    """Nothing of ours was raised, nor anything that ends a process."""
    for word in ("leak", "panicked", "Fatal", "Segmentation", "SIGQUIT", "never awaited", "never retrieved"):
        for line in sorted({line[:300] for line in log.splitlines() if word in line})[:3]:
            findings.add(f"in the log: {line}")
    seen = Counter()
    for trace in re.findall(r"Traceback \(most recent call last\):\n(?:[ +|].*\n|\n)*.*\n", log):
        files = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace)
        if files and "/obcache_sglang/" in files[-1][0]:
            seen[(*files[-1], trace.strip().splitlines()[-1][:300])] += 1
    for place, count in seen.items():
        findings.add(f"{count} tracebacks that end in {place}")
    for line, count in Counter(re.findall(r"(obcache: .*)\nTraceback", log)).items():
        findings.add(f"{count} times in the log, with a traceback: {line}")


def without_compression(attempt: Attempt) -> Attempt:
    """What a client of a stock server would have sent in its place."""
    if attempt.body is None:
        return attempt
    try:
        body = json.loads(attempt.body)
    except (ValueError, RecursionError):
        return attempt

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(MARKER, "")
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, dict):
            wishes = value.get("custom_params")
            if isinstance(wishes, dict):  # elsewhere the word means nothing, and SGLang says so as it would without the plugin
                value = {**value, "custom_params": {key: each for key, each in wishes.items() if key != "obcache"}}
            return {key: plain(each) for key, each in value.items()}
        return value

    return Attempt(**{**attempt.__dict__, "body": json.dumps(plain(body)).encode()})


def explain_errors(model_dir: Path, log_file: Path, findings: Findings) -> None:
    """Server errors that a stock server gives too are its own; all others are findings."""
    unexplained = [error for error in findings.errors if not any(text in error[2] for text, _ in ALLOWED)]
    findings.counts["5xx allowed"] = len(findings.errors) - len(unexplained)
    if not unexplained:
        return
    print(f"{len(unexplained)} server errors: does a stock server give them too?", flush=True)
    with serve(model_dir, log_file, (*COMMON, *FLAGS)) as stock:
        for attempt, status, text in unexplained:
            stays = None
            if not attempt.path.startswith("/obcache"):
                same = without_compression(attempt)
                stays = requests.request(
                    same.method, stock.url + same.path, data=same.body, headers=same.headers, params=same.params, timeout=ANSWER_SECONDS
                ).status_code  # fmt: skip
            if stays is not None and stays >= 500:
                findings.counts["5xx of stock SGLang"] += 1
            else:
                findings.add(f"{status} (stock: {stays}): {text[:500]} for {attempt}")


def fuzz(
    model_dir: Path, logs: Path, *, seed: int, num_requests: int, seconds: float, num_hostile: int = 4, flags: Sequence[str] = ()
) -> Findings:
    """One whole run."""
    findings = Findings()
    with serve(model_dir, logs / "server.log", (*COMMON, *FLAGS, *OBCACHE_FLAGS, *flags), STRICT) as server:
        drive(server, model_dir, seed, num_requests, seconds, num_hostile, findings)
        check_log(server.log(), findings)
    explain_errors(model_dir, logs / "stock.log", findings)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=2000, help="hostile requests")
    parser.add_argument("--seconds", type=float, default=600, help="no new hostile request after so long")
    parser.add_argument("--clients", type=int, default=4, help="hostile clients at once")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the logs of the servers (default: a temporary one)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for the server; all that follows")
    args = parser.parse_args()
    logs = args.logs or Path(tempfile.mkdtemp(prefix="obcache-fuzz-"))
    started_at = time.monotonic()
    findings = fuzz(
        ensure_model("float32"), logs, seed=args.seed, num_requests=args.requests, seconds=args.seconds, num_hostile=args.clients, flags=args.flags
    )  # fmt: skip
    verdict = f"{len(findings.lines)} findings" if findings.lines else "nothing found"
    print(f"fuzz: {verdict}; seed {args.seed}, {time.monotonic() - started_at:.0f} s, {dict(findings.counts)}, logs in {logs}")
    return 1 if findings.lines else 0


if __name__ == "__main__":
    sys.exit(main())
