"""`python -m obcache_sglang.eval MODEL --arms METHOD/SCORE/BUDGET... --tasks TASK...`: what compression does to the answers.

Serves MODEL (or asks the server at --url), puts every task's questions to the exact cache and to each arm at each ratio, and writes
answers, tables, plots and a report into a folder. A run that was stopped goes on where it was when it is called again.

    python -m obcache_sglang.eval MODEL --arms {snapkv,tova}/{attention,obcache-k}/adakv replay/obcache-v/global --ratios 0.5 0.7
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from obcache_sglang.errors import ConfigError, ObcacheError
from obcache_sglang.eval.arms import MODES, RATIO_PRESETS, Arm, check_measured_files, parse_arms, parse_ratios
from obcache_sglang.eval.datasets import load
from obcache_sglang.eval.provenance import kv_bytes_per_token, provenance
from obcache_sglang.eval.report import check_requirements, write_report
from obcache_sglang.eval.run import Runner
from obcache_sglang.eval.samples import Sample
from obcache_sglang.eval.tasks import TASKS, generate
from obcache_sglang.local_server import Client, serve

DEFAULT_ARMS = ("tova/obcache-v/uniform", "replay/obcache-v/global")
NEEDLES = ("needle_prose", "needle_noise", "needle_code", "needle_two_keys")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1, with the reason on stderr, where something given is wrong or the server refuses."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    try:
        check_requirements()
        arms = parse_arms(arguments.arms, parse_ratios(arguments.ratios), arguments.modes)
        model = _model(arguments)
        tokenizer = AutoTokenizer.from_pretrained(model)
        samples = list(_samples(arguments, tokenizer))
        arguments.output.mkdir(parents=True, exist_ok=True)
        _write_run(arguments.output / "run.json", model, arguments, given)
        with _server(arguments, arms) as client:
            runner = Runner(client, tokenizer, arguments.output)
            runner.run(samples, arms)
            if arguments.survivors:
                runner.note_survivors(samples[: arguments.survivors], arms)
        write_report(arguments.output)
    except (ObcacheError, OSError, RuntimeError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 1
    print(f"eval: {arguments.output / 'report.html'} written; the table is {arguments.output / 'table.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m obcache_sglang.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="model directory or Hugging Face name; a server of it is started")
    parser.add_argument("--url", help="ask this server, started with --obcache, instead")
    parser.add_argument(
        "--tasks", nargs="*", default=list(NEEDLES), metavar="TASK", help=f"of {', '.join(TASKS)} (default: {' '.join(NEEDLES)})"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME/CONFIG[=PATH]",
        help="public sets: ruler/4096, longbench/qasper, scbench/scbench_kv; PATH: a local copy",
    )
    parser.add_argument("--samples", type=int, default=15, help="contexts of each task (default: 15)")
    parser.add_argument("--tokens", type=int, default=1024, help="length of a generated context (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the generated tasks (default: 0)")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(DEFAULT_ARMS),
        metavar="METHOD/SCORE/BUDGET",
        help=f"or presets' names, both with +NAME=VALUE for other settings than their own: kvzip+recent_tokens=8 "
        f"(default: {' '.join(DEFAULT_ARMS)}); the exact cache is always asked",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        default=["0.5", "0.7", "0.9"],
        metavar="RATIO",
        help=f"fractions removed, or {', '.join(RATIO_PRESETS)} (default: 0.5 0.7 0.9)",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=["agnostic"],
        help="agnostic: contexts are compressed before their questions are known; aware: with each (default: agnostic)",
    )
    parser.add_argument(
        "--survivors",
        type=int,
        default=0,
        metavar="N",
        help="write down which tokens of the first N contexts survive (default: 0)",
    )
    parser.add_argument("--output", type=Path, default=Path("eval"), metavar="FOLDER", help="default: eval")
    parser.add_argument(
        "--server-flags", default="", help='of the server that is started, as one text: "--tp 2 --obcache-head-profile FILE"'
    )
    return parser


def _model(arguments: argparse.Namespace) -> str:
    if (arguments.model is None) == (arguments.url is None):
        raise ConfigError("give either a model to serve or --url of a server.")
    return str(arguments.model or Client(arguments.url).get("/model_info")["model_path"])


@contextlib.contextmanager
def _server(arguments: argparse.Namespace, arms: list[Arm]) -> Iterator[Client]:
    if arguments.url is not None:
        yield Client(arguments.url)
        return
    flags = ["--obcache", "--obcache-min-tokens", "1", *shlex.split(arguments.server_flags)]
    check_measured_files(arms, flags, "--server-flags")
    log_file = arguments.output / "server.log"
    print(f"eval: starting a server (its log: {log_file})", file=sys.stderr, flush=True)
    with serve(arguments.model, log_file, flags) as server:
        yield server


def _samples(arguments: argparse.Namespace, tokenizer: Any) -> Iterator[Sample]:
    """The samples of all tasks in turn, so that a run that is stopped has some of each; then those of public sets."""
    for index in range(arguments.samples):
        for task in arguments.tasks:
            yield generate(task, tokenizer, arguments.tokens, arguments.seed, index)
    for text in arguments.data:
        source, _, path = text.partition("=")
        name, _, config = source.partition("/")
        for sample in load(name, config, path or None):
            if sample.index < arguments.samples:
                yield sample


def _write_run(file: Path, model: str, arguments: argparse.Namespace, given: list[str]) -> None:
    """What the report says of the run. One that goes on must be the same run."""
    run: dict[str, Any] = provenance("obcache_sglang.eval", given, model)
    run |= {"seed": arguments.seed, "tokens": arguments.tokens, "kv_bytes_per_token": kv_bytes_per_token(model)}
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        for name in ("model", "seed", "tokens"):
            if before[name] != run[name]:
                raise ConfigError(
                    f"{file.parent} holds answers with {name}={before[name]!r}, not {run[name]!r}: they cannot be joined; "
                    "choose another --output."
                )
        run["started"] = before["started"]
    file.write_text(json.dumps(run, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
