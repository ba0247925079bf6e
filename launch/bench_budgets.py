"""What heads of different length cost when they are read:  python -m launch.bench_budgets

Decode seconds per step with each budget, at the same number of slots, for several batch sizes. The budgets take turns within
each repeat, and are compared pair by pair in it: machines are noisy.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.bench_serving import generate, spread, tokenize
from launch.model import cache_dir, ensure_model
from obcache_sglang.local_server import Server, serve

BUDGETS = ("uniform", "adakv", "global")
FEW_TOKENS, MANY_TOKENS = 8, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each measurement (default: 5)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the context (default: 2048)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default: 1 8 32)")
    parser.add_argument("--model", type=Path, help="model directory (default: SmolLM2-135M-Instruct in bfloat16)")
    arguments = parser.parse_args()
    model_dir = arguments.model or ensure_model("bfloat16")
    ids = tokenize(model_dir, arguments.tokens)
    # Room for the exact context and its three compressed ones.
    flags = ("--max-total-tokens", str(16 * len(ids)), "--chunked-prefill-size", "8192", "--sleep-on-idle", "--obcache")
    with serve(model_dir, cache_dir() / "bench-budgets.log", flags) as server:
        made = [server.post("/obcache/compress", {"input_ids": ids, "budget": budget, "pin": True}) for budget in BUDGETS]
        assert len({context["kept_tokens"] for context in made}) == 1, made
        print(f"\n{len(ids)} tokens, {made[0]['kept_tokens']} slots under each budget")
        print("batch  uniform s/step  adakv / uniform, pair by pair (min median max)   global / uniform", flush=True)
        for batch in arguments.batches:
            steps: dict[str, list[float]] = {budget: [] for budget in BUDGETS}
            for repeat in range(arguments.repeats + 1):
                for budget in BUDGETS:
                    seconds = step_seconds(server, ids, budget, batch)
                    if repeat:  # the first warms up
                        steps[budget].append(seconds)
            ratios = [spread([a / b for a, b in zip(steps[budget], steps["uniform"], strict=True)]) for budget in BUDGETS[1:]]
            print(f"{batch:5d} {sorted(steps['uniform'])[arguments.repeats // 2]:15.4f}  {'   '.join(ratios)}", flush=True)


def step_seconds(server: Server, ids: list[int], budget: str, batch: int) -> float:
    """Seconds of one decode step of `batch` requests: what MANY_TOKENS take longer than FEW_TOKENS, for each."""
    prompts = [ids + ids[8 * i : 8 * i + 8] for i in range(batch)]
    wish = {"context_len": len(ids), "budget": budget}

    def burst(num_tokens: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(batch) as pool:
            list(pool.map(lambda prompt: generate(server, prompt, obcache=wish, max_new_tokens=num_tokens), prompts))
        return time.perf_counter() - start

    return (burst(MANY_TOKENS) - burst(FEW_TOKENS)) / (MANY_TOKENS - FEW_TOKENS)


if __name__ == "__main__":
    main()
