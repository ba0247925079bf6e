"""Slots and peak memory of a compression with uneven heads, against KVPress, which masks them:  python -m launch.bench_memory

One document is compressed with AdaKV (SnapKV's scores): by a server on the CPU, and by KVPress's pipeline in an environment of its
own (made if need be). Both start from a short document, so that weights and libraries are there; then the most resident memory
(VmHWM of Linux) is read that the process reaches beyond what it had before. An exact prefill is measured too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil
from transformers import AutoTokenizer

from launch.model import cache_dir, ensure_model
from obcache_sglang.bench.kvpress import Kvpress, ensure_environment
from obcache_sglang.bench.workload import make_workload
from obcache_sglang.local_server import Server, serve

WARM_UP_TOKENS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of the document (default: 4096)")
    parser.add_argument("--ratio", type=float, default=0.7, help="compression ratio (default: 0.7)")
    parser.add_argument("--kvpress-python", type=Path, help="an environment with KVPress (default: one is made)")
    arguments = parser.parse_args()
    model = ensure_model("bfloat16")
    python = arguments.kvpress_python or ensure_environment(cache_dir() / "kvpress-venv")
    tokenizer = AutoTokenizer.from_pretrained(model)
    workloads = [
        make_workload(tokenizer, documents=1, tokens=tokens, questions=1, seed=0, answer_tokens=1)
        for tokens in (WARM_UP_TOKENS, arguments.tokens)
    ]
    print(f"{workloads[1].context_tokens} tokens, ratio {arguments.ratio:g}", flush=True)
    print("                        KV slots held    peak memory, MiB", flush=True)
    settings = {"method": "snapkv", "budget": "adakv", "compression_ratio": arguments.ratio}
    # A server for each: what one prefill took from the system, the next would find there.
    for name, wish in (("exact prefill, here", False), ("compression, here", settings)):
        flags = ("--obcache", "--max-total-tokens", str(4 * arguments.tokens), "--chunked-prefill-size", "8192")
        with serve(model, cache_dir() / "bench-memory.log", flags) as server:
            process = scheduler_of(server)
            for workload in workloads:
                ask = workload.asks[0]
                before = reset_peak(process)
                obcache = wish and {"context_len": ask.context_len, **settings}
                server.post(
                    "/generate",
                    {"input_ids": ask.input_ids, "sampling_params": {"max_new_tokens": 1, "custom_params": {"obcache": obcache}}},
                )
            contexts = server.get("/obcache/contexts")["contexts"]
            slots = contexts[-1]["slots"] if contexts else ask.context_len
            print(f"{name:23s} {slots:13d} {peak(process) - before:19.0f}", flush=True)
    with Kvpress.running(python, str(model), "adakv", arguments.ratio, cache_dir() / "bench-kvpress.log") as kvpress:
        process = psutil.Process(kvpress.pid)
        for workload in workloads:
            before = reset_peak(process)
            slots = kvpress.ask(workload.asks, workload.samples[0].context)["slots"]
        print(f"compression, KVPress    {slots:13d} {peak(process) - before:19.0f}", flush=True)


def scheduler_of(server: Server) -> psutil.Process:
    """The server's process that holds the model and the KV pool: of all, the one with the most memory."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return max(processes, key=lambda process: process.memory_info().rss)


def reset_peak(process: psutil.Process) -> float:
    """Lets the peak count from now on. Returns resident memory in MiB."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return float(process.memory_info().rss / 2**20)


def peak(process: psutil.Process) -> float:
    """The most resident memory, in MiB, since `reset_peak`."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
