"""What deciding on waiting questions costs a scheduling pass:  python -m launch.bench_scheduling [--waiting 10 100 1000]

A server that runs two requests at a time answers two long ones, while so many questions wait behind contexts of many slots. Seconds
per pass are the server's own counters (`GET /obcache/status`: schedule_seconds / schedule_passes).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from launch.model import ensure_model
from obcache_sglang.local_server import Server, serve

CONTEXTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--waiting", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--slots", type=int, default=4000, help="KV slots that each of the contexts holds")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long passes are counted for each number")
    args = parser.parse_args()
    flags: tuple[str, ...] = (
        "--max-total-tokens",
        str(8 * args.slots),
        "--max-running-requests",
        "2",
        "--obcache",
        "--obcache-compression-ratio",
        "0.0",
    )
    flags += ("--obcache-max-kept-tokens", str(args.slots), "--sleep-on-idle")
    with tempfile.TemporaryDirectory() as folder, serve(ensure_model("float32"), Path(folder) / "log", flags) as server:
        texts = [(name + topics["class"] + topics["typesseq"] * 9)[: 5 * args.slots] for name in list(topics)[:CONTEXTS]]
        made = [server.post("/obcache/compress", {"text": text}) for text in texts]
        print(f"{CONTEXTS} contexts of {', '.join(str(each['kept_tokens']) for each in made)} slots")
        for waiting in args.waiting:
            print(f"{waiting:6,} waiting: {measure(server, texts, waiting, args.seconds) * 1e3:8.3f} ms a pass")


def measure(server: Server, texts: list[str], waiting: int, seconds: float) -> float:
    """Seconds of one pass, while so many questions wait behind two requests that run on and on."""
    endless = {
        "text": ["Once", "Twice"],
        "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True},
        "rid": ["endless-1", "endless-2"],
    }
    prompts = [f"{texts[number % len(texts)]}<|obcache|> {number}" for number in range(waiting)]
    asked = {"text": prompts, "sampling_params": {"max_new_tokens": 1}, "rid": [f"asked-{number}" for number in range(waiting)]}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.request, "POST", "/generate", json=endless, timeout=3600)]
        time.sleep(2)
        running.append(pool.submit(server.request, "POST", "/generate", json=asked, timeout=3600))
        while server.get("/v1/loads")["loads"][0]["num_waiting_reqs"] < waiting:
            time.sleep(0.5)
        before: dict[str, Any] = server.get("/obcache/status")["counters"]
        time.sleep(seconds)
        after: dict[str, Any] = server.get("/obcache/status")["counters"]
        server.request("POST", "/abort_request", json={"abort_all": True})
    return float(
        (after["schedule_seconds"] - before["schedule_seconds"]) / (after["schedule_passes"] - before["schedule_passes"])
    )


if __name__ == "__main__":
    main()
