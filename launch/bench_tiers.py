"""Seconds to the first token of a question, by where its context lies:  python -m launch.bench_tiers

One server with host memory (`--enable-hierarchical-cache`) and a folder. About each document the same questions are asked one after the
other, with its context in each place in turn, so that all ratios are paired. First all is done with a document that is not counted.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from typing import Any

from transformers import AutoTokenizer

from launch.model import cache_dir, ensure_model
from obcache_sglang.bench.workload import Ask, make_workload
from obcache_sglang.eval.intervals import difference
from obcache_sglang.local_server import Server, serve

EXACT = "nowhere, read exactly"

OTHER_TEXT_TOKENS = 256
"""Of each prompt that pushes contexts out of the pool."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="of the documents (default: 1024 4096)")
    parser.add_argument("--documents", type=int, default=8, help="of each length (default: 8)")
    parser.add_argument("--ratio", type=float, default=0.7, help="compression ratio (default: 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents (default: 0)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model (default: bfloat16)")
    arguments = parser.parse_args()
    model = ensure_model(arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for tokens in arguments.tokens:
        workload = make_workload(
            tokenizer, documents=arguments.documents + 1, tokens=tokens, questions=2, seed=arguments.seed, answer_tokens=1
        )
        with tempfile.TemporaryDirectory() as folder:
            pool = ("--max-total-tokens", str(3 * workload.longest), "--chunked-prefill-size", "8192", "--dtype", arguments.dtype)
            host = ("--enable-hierarchical-cache", "--hicache-ratio", "2")
            ours = ("--obcache", "--obcache-gates", "smollm2-135m", "--obcache-compression-ratio", str(arguments.ratio))
            flags = (*pool, *host, *ours, "--obcache-folder", folder, "--obcache-save", "compressed")
            with serve(model, cache_dir() / "bench-tiers.log", flags) as server:
                places = Places(server)
                seconds = [places.measure(*workload.asks[2 * each : 2 * each + 2]) for each in range(arguments.documents + 1)][1:]
        print(f"\n{tokens} tokens, {arguments.documents} documents, ratio {arguments.ratio:g}, {arguments.dtype}\n", flush=True)
        print("| the context is | first token, median | of an exact prefill |\n|---|---|---|")
        for place in seconds[0]:
            ratio = paired_ratio([each[place] for each in seconds], [each[EXACT] for each in seconds])
            print(f"| {place} | {statistics.median(each[place] for each in seconds):.3f} s | {ratio} |", flush=True)


class Places:
    """Brings a document's context to each place and asks about it there."""

    def __init__(self, server: Server) -> None:
        self.server, self._pushed = server, 0

    def measure(self, first: Ask, second: Ask) -> dict[str, float]:
        """By place, seconds to the first token of a question."""
        found: dict[str, float] = {}
        gate: dict[str, Any] = {"context_len": first.context_len}
        self.server.flush_cache()
        found[EXACT] = self.seconds(first, False)
        found["cached exactly"] = self.seconds(second, False)
        self.server.flush_cache()
        found["nowhere, compressed by gates"] = self.seconds(first, gate, "compressed")
        found["in the pool"] = self.seconds(second, gate, "reused", "device")
        while not self._context()["on_disk"]:
            time.sleep(0.1)
        while self._context()["tier"] != "host":
            self._push()
        found["in host memory"] = self.seconds(second, gate, "reused", "host")
        self.server.flush_cache()
        found["in a file"] = self.seconds(second, gate, "reused", "disk")
        self.server.request("DELETE", f"/obcache/contexts/{self._context()['name']}?wait_seconds=10")
        self.server.flush_cache()
        found["nowhere, compressed by replay"] = self.seconds(
            first, {**gate, "method": "replay", "budget": "global"}, "compressed"
        )
        return found

    def seconds(self, ask: Ask, obcache: Any, *wanted: str) -> float:
        """Until the answer's one token. wanted: the status and the tier that the answer must report."""
        params = {"max_new_tokens": 1, "temperature": 0, "custom_params": {"obcache": obcache}}
        started = time.perf_counter()
        answer = self.server.post("/generate", {"input_ids": ask.input_ids, "sampling_params": params})
        seconds = time.perf_counter() - started
        report = answer["meta_info"].get("obcache", {})
        said = [report.get(key) for key in ("status", "tier")[: len(wanted)]]
        assert said == list(wanted), f"the context is not where it should be: {report}"
        return seconds

    def _push(self) -> None:
        """Other text takes room in the pool."""
        self._pushed += 1
        prompt = [10 + self._pushed % 1000, 10 + self._pushed // 1000, *range(1000, 998 + OTHER_TEXT_TOKENS)]
        self.server.post("/generate", {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}})

    def _context(self) -> dict[str, Any]:
        contexts = self.server.get("/obcache/contexts")["contexts"]
        return next(each for each in contexts if each["state"] in ("resident", "host"))


def paired_ratio(these: list[float], those: list[float]) -> str:
    """The geometric mean of the ratios of pairs, with its 95 % interval (Student's t of their logarithms)."""
    logs = {index: [(math.log(one), math.log(other))] for index, (one, other) in enumerate(zip(these, those, strict=True))}
    found = difference({"": logs}, bounded=False)
    assert found is not None, "there are documents"
    if found.equal or found.low is None or found.high is None:
        return f"{math.exp(found.mean):.3f}x"
    return f"{math.exp(found.mean):.3f}x [{math.exp(found.low):.3f}, {math.exp(found.high):.3f}]"


if __name__ == "__main__":
    main()
