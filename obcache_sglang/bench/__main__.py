"""`python -m obcache_sglang.bench MODEL`: questions per second about many documents, stock SGLang against OBCache and KVPress.

Starts a stock server and one with OBCache, both with a KV pool that holds only a share of the documents exactly, and puts the same
questions to all arms in turn. The answers are scored too. Where compression hurts, the first lines of the report say so.

    python -m obcache_sglang.bench MODEL --arms replay/obcache-v/global@0.7,0.85 --kvpress adakv@0.85
    python -m obcache_sglang.bench MODEL --case fits
    python -m obcache_sglang.bench MODEL --scaling
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from obcache_sglang.bench.cases import CASES, SCALING_DOCUMENTS, SCALING_TOKENS, Case
from obcache_sglang.bench.kvpress import Kvpress, KvpressArm, ensure_environment, parse_press
from obcache_sglang.bench.report import Point, write_report
from obcache_sglang.bench.rounds import Round
from obcache_sglang.bench.served import Contender, ServedArm, compression_cost, parse_bench_arms
from obcache_sglang.bench.workload import Workload, make_workload, pool_size
from obcache_sglang.errors import ConfigError, ObcacheError
from obcache_sglang.eval.arms import EXACT, check_head_profile
from obcache_sglang.eval.provenance import provenance
from obcache_sglang.eval.report import check_requirements
from obcache_sglang.server import serve

DEFAULT_ARMS = ("replay/obcache-v/global@0.7,0.85", "tova/obcache-v/uniform@0.85")
KVPRESS_FOLDER = Path(".cache", "obcache_sglang", "kvpress-venv")
COST_DOCUMENTS = 3

_MODEL_MARGIN = 128  # room for a question and its answer behind the longest documents of --scaling


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1, with the reason on stderr, where something given is wrong or a server refuses."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    try:
        Bench(arguments, given).run()
    except (ObcacheError, OSError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m obcache_sglang.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model directory or Hugging Face name")
    cases = "; ".join(f"{name}: {case.text}" for name, case in CASES.items())
    parser.add_argument("--case", choices=CASES, default="thrash", help=f"{cases} (default: thrash)")
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="how cost grows: 1 to 64 documents of --tokens tokens, and 4 documents of 512 to 8192 tokens, in one pool (long)",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(DEFAULT_ARMS),
        metavar="METHOD/SCORE/BUDGET@RATIO",
        help=f"or PRESET@RATIO; several ratios: @0.7,0.85 (default: {' '.join(DEFAULT_ARMS)}); stock SGLang is always asked",
    )
    parser.add_argument(
        "--kvpress", metavar="PRESS@RATIO", help="also KVPress's pipeline: snapkv, adakv, tova or kvzip, as in adakv@0.85"
    )
    parser.add_argument(
        "--kvpress-python",
        type=Path,
        metavar="FILE",
        help=f"an environment with KVPress (default: one is made in {KVPRESS_FOLDER})",
    )
    parser.add_argument(
        "--kvpress-questions", type=int, default=16, metavar="N", help="that KVPress is asked in each round, about (default: 16)"
    )
    parser.add_argument("--documents", type=int, help="default: the case's")
    parser.add_argument("--tokens", type=int, help="of each document (default: the case's)")
    parser.add_argument("--questions", type=int, help="about each document (default: the case's)")
    parser.add_argument("--answer-tokens", type=int, metavar="N", help="the most tokens of an answer (default: 16)")
    parser.add_argument("--pool-share", type=float, metavar="SHARE", help="of the documents, held exactly (default: the case's)")
    parser.add_argument("--clients", type=int, help="questions under way at once (default: the case's)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of documents, questions and their order (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("bench"), metavar="FOLDER", help="default: bench")
    parser.add_argument("--server-flags", default="", help='of both servers, as one text: "--tp 2 --mem-fraction-static 0.4"')
    parser.add_argument("--obcache-flags", default="", help='of the OBCache server: "--obcache-head-profile FILE"')
    return parser


class Bench:
    """One call of the command. Raises ConfigError for arguments that cannot be."""

    def __init__(self, arguments: argparse.Namespace, given: list[str]) -> None:
        check_requirements()
        self.arguments = arguments
        self.facts = provenance("obcache_sglang.bench", given, arguments.model) | {"seed": str(arguments.seed)}
        self.arms = parse_bench_arms(arguments.arms)
        self.press = parse_press(arguments.kvpress) if arguments.kvpress else None
        obcache_flags = shlex.split(arguments.obcache_flags)
        check_head_profile(self.arms, obcache_flags, "--obcache-flags")
        self.obcache_flags = ["--obcache", *obcache_flags]
        chosen = {name: getattr(arguments, name) for name in ("documents", "tokens", "questions", "pool_share", "clients")}
        self.case = replace(CASES[arguments.case], **{name: value for name, value in chosen.items() if value is not None})
        for name, value in {**chosen, "rounds": arguments.rounds, "kvpress_questions": arguments.kvpress_questions}.items():
            if value is not None and value <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: give more than 0.")
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.workloads = [self._workload(case) for case in self._cases()]
        # One pool for all workloads, so that servers start once: the share is of the first, which has the most documents.
        longest = max(workload.longest for workload in self.workloads)
        self.pool_slots = max(pool_size(self.workloads[0], self.case.pool_share), 2 * longest)

    def _cases(self) -> Iterator[Case]:
        if not self.arguments.scaling:
            yield self.case
            return
        tokens = self.arguments.tokens or self.case.tokens
        for documents in sorted(SCALING_DOCUMENTS, reverse=True):
            yield replace(self.case, documents=documents, tokens=tokens)
        limit = _context_length(self.arguments.model) - _MODEL_MARGIN
        for length in sorted({min(length, limit) for length in SCALING_TOKENS} - {tokens}):
            yield replace(self.case, documents=4, tokens=length)

    def _workload(self, case: Case) -> Workload:
        return make_workload(
            self.tokenizer,
            documents=case.documents,
            tokens=case.tokens,
            questions=case.questions,
            seed=self.arguments.seed,
            answer_tokens=self.arguments.answer_tokens,
        )

    def run(self) -> None:
        """Measures, writes the report into --output and prints its findings and tables."""
        output: Path = self.arguments.output
        output.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            served = self._start_servers(stack, output)
            kvpress = self._start_kvpress(stack, output) if self.press else None
            points = []
            for number, (case, workload) in enumerate(zip(self._cases(), self.workloads, strict=True), 1):
                if len(self.workloads) > 1:
                    _say(f"workload {number} of {len(self.workloads)}: {case.documents} documents of {case.tokens} tokens")
                points.append(self._measure(case, workload, served, self._peers(kvpress, workload)))
        print(write_report(output, self.facts, points, self._notes()))
        _say(f"{output / 'bench.md'} and {output / 'bench.json'} written")

    def _start_servers(self, stack: contextlib.ExitStack, output: Path) -> list[ServedArm]:
        flags = ["--max-total-tokens", str(self.pool_slots), "--sleep-on-idle", *shlex.split(self.arguments.server_flags)]
        servers = []
        for name, more in (("stock", []), ("obcache", self.obcache_flags)):
            log_file = output / f"server-{name}.log"
            _say(f"starting the {name} server (its log: {log_file})")
            servers.append(stack.enter_context(serve(self.arguments.model, log_file, [*flags, *more])))
        stock, obcache = servers
        clients = self.case.clients
        return [ServedArm(stock, EXACT, clients), *(ServedArm(obcache, arm, clients) for arm in self.arms)]

    def _start_kvpress(self, stack: contextlib.ExitStack, output: Path) -> Kvpress:
        assert self.press is not None
        python = self.arguments.kvpress_python or ensure_environment(KVPRESS_FOLDER)
        _say(f"starting KVPress's pipeline with {python}")
        running = Kvpress.running(python, self.arguments.model, *self.press, output / "kvpress.log")
        kvpress = stack.enter_context(running)
        self.facts["kvpress runs with"] = ", ".join(f"{name} {number}" for name, number in kvpress.versions.items())
        return kvpress

    def _peers(self, kvpress: Kvpress | None, workload: Workload) -> list[KvpressArm]:
        if kvpress is None:
            return []
        name, limit = f"kvpress {self.arguments.kvpress}", self.arguments.kvpress_questions
        return [KvpressArm(kvpress, name, workload, self.tokenizer, limit, grouped=grouped) for grouped in (False, True)]

    def _measure(self, case: Case, workload: Workload, served: list[ServedArm], peers: list[KvpressArm]) -> Point:
        contenders: list[Contender] = [*served, *peers]
        rounds = _rounds(contenders, workload, self.arguments.rounds, warm_up=2 * case.clients)
        costs = []
        if not self.arguments.scaling:
            documents = list({ask.document: ask for ask in workload.asks}.values())[:COST_DOCUMENTS]
            costs = [
                cost
                for arm in tqdm(served[1:], desc="costs", unit="arm")
                if (cost := compression_cost(served[0], arm, documents))
            ]
        return Point(
            case.documents,
            case.tokens,
            case.questions,
            self.pool_slots,
            case.clients,
            workload.digest,
            tuple(arm.name for arm in served),
            tuple(arm.name for arm in peers),
            rounds,
            costs,
        )

    def _notes(self) -> Iterator[str]:
        yield "stock: the same SGLang with the same KV pool, without --obcache."
        if self.facts["machine"].endswith("no GPU"):
            yield (
                "SGLang has no CPU attention of its own in its wheel: on a CPU, stock runs on the platform that this package brings, whose "
                "attention is several times as fast as torch_native's (launch.bench_attention), and is stock in everything else."
            )
        if self.press:
            yield (
                "kvpress: one pipeline call for each question as it arrives; grouped: one for each document, with all its questions at "
                f"once, which takes knowing them in advance. About {self.arguments.kvpress_questions} questions a round; its answers "
                "come whole, and seconds are those of the pipeline alone."
            )


def _rounds(contenders: Sequence[Contender], workload: Workload, number: int, *, warm_up: int) -> list[Round]:
    """All contenders in turn, round by round; another one begins each round."""
    for contender in tqdm(contenders, desc="warm-up", unit="arm"):
        contender.run(-1, contender.part(workload.order(-1)[:warm_up]), lambda: None)
    rounds = []
    for index in range(number):
        first = index % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            asks = contender.part(workload.order(index))
            with tqdm(
                total=len(asks), desc=f"round {index + 1} of {number}, {contender.name}", unit="answer", smoothing=0.1
            ) as bar:
                rounds.append(contender.run(index, asks, bar.update))
    return rounds


def _context_length(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # End like on Ctrl-C, through the `with` blocks that stop the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
