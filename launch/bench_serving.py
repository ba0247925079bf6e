"""What compression costs and what a later question saves, on real servers:  python -m launch.bench_serving

Prints three tables: a context's compression by a window, by a window with a head profile, by gates (prefilled, and from its cached exact KV)
and by replay, whole and local, against its exact prefill (which is what the first question waits for with --obcache-when idle), with the share spent on scoring, selecting and copying; time
to the first token of a later question, exact radix hit against compressed hit, in turn; and plain requests (no compression asked
for) on a server with --obcache against one without, burst by burst. Machines are noisy: medians, and ratios pair by pair.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.model import cache_dir, ensure_model
from obcache_sglang.eval.arms import Arm, parse_arms
from obcache_sglang.eval.prose import opticks
from obcache_sglang.local_server import Server, serve

ARMS = parse_arms(
    (
        "snapkv/obcache-k/adakv",
        "snapkv/obcache-k/profile",
        "gate/obcache-v/profile",
        "replay/obcache-v/global",
        "replay/obcache-v/global+replay_attention=local",
    ),
    [0.7],
    ["agnostic"],
)[1:]
IN_PLACE = "gate, exact KV cached"
COMMON = ("--chunked-prefill-size", "8192", "--sleep-on-idle")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each measurement (default: 5)")
    parser.add_argument("--model", type=Path, help="model directory (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the default model (bfloat16)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="context lengths (1024 2048 4096)")
    arguments = parser.parse_args()
    model_dir = arguments.model or ensure_model(arguments.dtype)
    ids = tokenize(model_dir, max(arguments.tokens))
    logs = cache_dir()
    # Room for a context, its compressed copy and a replay's chunk, several times.
    common = (*COMMON, "--max-total-tokens", str(8 * len(ids)), *(() if arguments.model else ("--dtype", arguments.dtype)))
    flags = (*common, "--obcache", *(() if arguments.model else ("--obcache-gates", "smollm2-135m")))
    arms = [arm for arm in ARMS if arguments.model is None or arm.budget != "profile"]
    with serve(model_dir, logs / "bench-obcache.log", flags) as server:
        generate(server, ids[:200])
        print(
            "\ntokens  slots  arm                                                  s  scoring share  / exact prefill, pair by pair (min median max)",
            flush=True,
        )
        for length in arguments.tokens:
            for row in compression_rows(server, ids[:length], arms, arguments.repeats):
                print(row, flush=True)
        print("\ntokens  exact hit s  compressed hit s  exact / compressed, pair by pair (min median max)", flush=True)
        for length in arguments.tokens:
            print(first_token_row(server, ids[:length], arguments.repeats), flush=True)
        with serve(model_dir, logs / "bench-stock.log", common) as stock:
            print("\nplain requests, seconds per burst of 16: --obcache / stock, pair by pair (min median max)", flush=True)
            print(plain_row(server, stock, ids, arguments.repeats), flush=True)


def tokenize(model_dir: Path, num_tokens: int) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(model_dir)(opticks()[: 8 * num_tokens]).input_ids[:num_tokens])


def generate(server: Server, ids: list[int], *, obcache: Any = False, max_new_tokens: int = 1) -> float:
    """Seconds until the answer is complete."""
    params: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    if obcache is not None:
        params["custom_params"] = {"obcache": obcache}
    start = time.perf_counter()
    server.post("/generate", {"input_ids": ids, "sampling_params": params})
    return time.perf_counter() - start


def compression_rows(server: Server, ids: list[int], arms: Sequence[Arm], repeats: int) -> Iterator[str]:
    runs: dict[str, list[dict[str, Any]]] = {}
    exact = []

    def compress(name: str, arm: Arm, *, counts: bool) -> None:
        made = server.post("/obcache/compress", {"input_ids": ids, **arm.wish})
        if counts:
            runs.setdefault(name, []).append(server.get(f"/obcache/contexts/{made['id']}"))

    for repeat in range(repeats + 1):
        server.flush_cache()
        seconds = generate(server, ids)
        if repeat:  # the first warms up
            exact.append(seconds)
        for arm in arms:
            if arm.method == "gate":  # before what it reads is flushed
                compress(IN_PLACE, arm, counts=bool(repeat))
        for arm in arms:
            server.flush_cache()
            compress(f"{arm.method}/{arm.score}/{arm.budget} {arm.options}", arm, counts=bool(repeat))
    for name, made in runs.items():
        seconds = statistics.median(run["seconds"] for run in made)
        share = statistics.median(run["scoring_seconds"] / run["seconds"] for run in made)
        ratios = spread([run["seconds"] / prefill for run, prefill in zip(made, exact, strict=True)])
        yield f"{len(ids):6d} {made[0]['slots']:6d}  {name:48s} {seconds:5.2f} {share:14.1%}  {ratios}"


def first_token_row(server: Server, ids: list[int], repeats: int) -> str:
    wish = {"context_len": len(ids)}
    generate(server, ids + [1], obcache=wish)
    generate(server, ids + [1])
    exact, compressed = [], []
    for repeat in range(repeats):
        question = ids[10 * repeat : 10 * repeat + 16]
        exact.append(generate(server, ids + question))
        compressed.append(generate(server, ids + question, obcache=wish))
    return (
        f"{len(ids):6d} {statistics.median(exact):12.3f} {statistics.median(compressed):17.3f}  "
        f"{spread([a / b for a, b in zip(exact, compressed, strict=True)])}"
    )


def plain_row(server: Server, stock: Server, ids: list[int], repeats: int) -> str:
    def burst(target: Server) -> float:
        prompts = [ids[20 * i : 20 * i + 100] for i in range(16)]
        target.flush_cache()
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: generate(target, prompt, obcache=None, max_new_tokens=16), prompts))
        return time.perf_counter() - start

    burst(server), burst(stock)
    return spread([burst(server) / burst(stock) for _ in range(repeats)])


def spread(values: list[float]) -> str:
    return f"{min(values):.3f} {statistics.median(values):.3f} {max(values):.3f}"


if __name__ == "__main__":
    main()
