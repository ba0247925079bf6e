"""`python -m obcache_sglang.bench MODEL`: questions per second about many documents, stock SGLang against OBCache and KVPress.

Starts stock servers and one with OBCache, all with a KV pool that holds only a share of the documents exactly, and puts the same
questions to all arms in turn. Stock SGLang is asked under both of its scheduling policies that matter here, and with an fp8 KV cache of
the same bytes where the platform has one; ratios are against the fastest of these. The answers are scored too. Where compression hurts,
the first lines of the report say so.

    python -m obcache_sglang.bench MODEL --arms replay/obcache-v/global@0.7,0.85 --kvpress adakv@0.85
    python -m obcache_sglang.bench MODEL --output-tokens 8 128 256 --bench-serving 256
    python -m obcache_sglang.bench MODEL --arms --auto 0.85 --obcache-flags "--obcache-gates auto"
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

import requests
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from obcache_sglang.bench.cases import CASES, SCALING_DOCUMENTS, SCALING_TOKENS, Case
from obcache_sglang.bench.client import MODULE, ClientRun, SharedPrefixClient
from obcache_sglang.bench.kvpress import Kvpress, KvpressArm, ensure_environment, parse_press
from obcache_sglang.bench.report import Point, write_report
from obcache_sglang.bench.rounds import Round
from obcache_sglang.bench.served import (
    POLICIES,
    Contender,
    ServedArm,
    Stock,
    compression_cost,
    obcache_server,
    parse_bench_arms,
    parse_stock,
)
from obcache_sglang.bench.workload import Workload, least_pool, make_workload, pool_size
from obcache_sglang.errors import ConfigError, ObcacheError
from obcache_sglang.eval.arms import check_measured_files
from obcache_sglang.eval.provenance import provenance
from obcache_sglang.eval.report import check_requirements
from obcache_sglang.local_server import Server, serve

DEFAULT_STOCK = ("fcfs", "lpm", "lpm/fp8")
DEFAULT_ARMS = ("replay/obcache-v/global@0.7,0.85", "tova/obcache-v/uniform@0.85")
KVPRESS_FOLDER = Path(".cache", "obcache_sglang", "kvpress-venv")
COST_DOCUMENTS = 3

_MODEL_MARGIN = 128  # room for a question and its answer after the longest documents of --scaling


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
        nargs="*",
        default=list(DEFAULT_ARMS),
        metavar="METHOD/SCORE/BUDGET@RATIO",
        help=f"or PRESET@RATIO; several ratios: @0.7,0.85 (default: {' '.join(DEFAULT_ARMS)})",
    )
    parser.add_argument(
        "--stock",
        nargs="+",
        default=list(DEFAULT_STOCK),
        metavar="POLICY[/fp8]",
        help="stock SGLang by its --schedule-policy, fcfs (its default) or lpm (longest prefix first, with in-batch prefix caching); /fp8: "
        f"with an fp8 KV cache of twice the slots, the bytes of a 16-bit one, where the platform has one (default: {' '.join(DEFAULT_STOCK)})",
    )
    parser.add_argument(
        "--auto",
        nargs="+",
        type=float,
        default=[],
        metavar="RATIO",
        help="also a server in mode auto for each ratio, asked what stock is asked: nothing is marked. Needs --obcache-gates in --obcache-flags",
    )
    parser.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=["fcfs"], help="of OBCache's servers, one for each (default: fcfs)"
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
    parser.add_argument(
        "--bench-serving-questions", type=int, metavar="N", help="of those runs, about each document (default: as --questions)"
    )
    parser.add_argument("--documents", type=int, help="default: the case's")
    parser.add_argument("--tokens", type=int, help="of each document (default: the case's)")
    parser.add_argument(
        "--system-tokens", type=int, default=0, help="that all prompts begin with, before their documents (default: 0)"
    )
    parser.add_argument("--questions", type=int, help="about each document (default: the case's)")
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument("--answer-tokens", type=int, metavar="N", help="the most tokens of an answer (default: 16)")
    answers.add_argument(
        "--output-tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="answers of exactly N tokens (ignore_eos), all of it once for each N; sglang.bench_serving's shared prefixes have 256",
    )
    parser.add_argument(
        "--bench-serving",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="also one run of sglang.bench_serving (generated-shared-prefix) against each arm's server, with answers of N tokens",
    )
    parser.add_argument("--pool-share", type=float, metavar="SHARE", help="of the documents, held exactly (default: the case's)")
    parser.add_argument("--clients", type=int, help="questions under way at once (default: the case's)")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of documents, questions and their order (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("bench"), metavar="FOLDER", help="default: bench")
    parser.add_argument("--server-flags", default="", help='of all servers, as one text: "--tp 2 --mem-fraction-static 0.4"')
    parser.add_argument("--obcache-flags", default="", help='of the OBCache server: "--obcache-head-profile FILE"')
    return parser


class Bench:
    """One call of the command. Raises ConfigError for arguments that cannot be."""

    def __init__(self, arguments: argparse.Namespace, given: list[str]) -> None:
        check_requirements()
        self.arguments = arguments
        self.facts = provenance("obcache_sglang.bench", given, arguments.model) | {"seed": str(arguments.seed)}
        self.arms = parse_bench_arms(arguments.arms)
        if not self.arms and not arguments.auto:
            raise ConfigError("--arms is empty: name an arm, or give --auto.")
        self.auto = parse_bench_arms(f"gate/obcache-v/profile@{ratio:g}" for ratio in arguments.auto)
        self.press = parse_press(arguments.kvpress) if arguments.kvpress else None
        obcache_flags = shlex.split(arguments.obcache_flags)
        check_measured_files([*self.arms, *self.auto], obcache_flags, "--obcache-flags")
        self.obcache_flags = ["--obcache", *obcache_flags]
        self.stock = parse_stock(arguments.stock)
        chosen = {name: getattr(arguments, name) for name in ("documents", "tokens", "questions", "pool_share", "clients")}
        self.case = replace(CASES[arguments.case], **{name: value for name, value in chosen.items() if value is not None})
        numbers = {**chosen, "rounds": arguments.rounds, "kvpress_questions": arguments.kvpress_questions}
        numbers["bench_serving_questions"] = arguments.bench_serving_questions
        numbers |= {"output_tokens": min(arguments.output_tokens or [1]), "bench_serving": min(arguments.bench_serving or [1])}
        for name, value in numbers.items():
            if value is not None and value <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: give more than 0.")
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.workloads = [
            (case, self._workload(case, output_tokens))
            for case in self._cases()
            for output_tokens in arguments.output_tokens or [None]
        ]
        # One pool for all workloads, so that servers start once: the share is of the first, which has the most documents.
        kept = 1 - min(arm.ratio for arm in (*self.arms, *self.auto))
        workloads = [workload for _, workload in self.workloads]
        self.pool_slots = max(
            pool_size(workloads[0], self.case.pool_share, kept), *(least_pool(each, kept) for each in workloads)
        )
        self.skipped: list[str] = []

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

    def _workload(self, case: Case, output_tokens: int | None) -> Workload:
        return make_workload(
            self.tokenizer,
            documents=case.documents,
            tokens=case.tokens,
            questions=case.questions,
            seed=self.arguments.seed,
            answer_tokens=output_tokens or self.arguments.answer_tokens,
            ignore_eos=output_tokens is not None,
            system_tokens=self.arguments.system_tokens,
        )

    def run(self) -> None:
        """Measures, writes the report into --output and prints its findings and tables."""
        output: Path = self.arguments.output
        output.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            served = self._start_servers(stack, output)
            kvpress = self._start_kvpress(stack, output) if self.press else None
            points: list[Point] = []
            for number, (case, workload) in enumerate(self.workloads, 1):
                if len(self.workloads) > 1:
                    _say(f"workload {number} of {len(self.workloads)}: {_describe(case, workload)}")
                points.append(self._measure(case, workload, served, self._peers(kvpress, workload), first=not points))
            client_runs = list(self._client_runs(served, output))
        print(write_report(output, self.facts, points, self._notes(), client_runs))
        _say(f"{output / 'bench.md'} and {output / 'bench.json'} written")

    def _start_servers(self, stack: contextlib.ExitStack, output: Path) -> list[ServedArm]:
        """Stock's arms, then OBCache's."""
        clients, arms = self.case.clients, []

        def start(name: str, flags: Sequence[str]) -> Server:
            log_file = output / f"server-{name.replace('/', '-')}.log"
            _say(f"starting the server {name} (its log: {log_file})")
            all_flags = ["--sleep-on-idle", *shlex.split(self.arguments.server_flags), *flags]
            return stack.enter_context(serve(self.arguments.model, log_file, all_flags))

        for stock in self.stock:
            flags = stock.flags(self.pool_slots)
            try:
                server = start(stock.name, flags)
                server.post("/generate", {"text": "1", "sampling_params": {"max_new_tokens": 2}})
            except (RuntimeError, requests.RequestException) as error:
                if not stock.fp8:
                    raise
                self._skip(stock, str(error))
            else:
                arms.append(ServedArm.stock(server, stock, clients))
        if not arms:
            raise RuntimeError("no stock server runs: nothing to compare with.")
        for policy in self.arguments.policies:
            flags = ["--max-total-tokens", str(self.pool_slots), "--schedule-policy", policy, *self.obcache_flags]
            if self.arms:
                server = start(obcache_server(policy), flags)
                arms += [ServedArm.obcache(server, arm, policy, clients) for arm in self.arms]
            for arm in self.auto:
                ratio = f"{arm.ratio:g}"
                more = [*flags, "--obcache-mode", "auto", "--obcache-compression-ratio", ratio]
                arms.append(ServedArm.auto(start(f"auto-{policy}-{ratio}", more), arm, policy, clients))
        return arms

    def _skip(self, stock: Stock, error: str) -> None:
        """This platform has no fp8 KV cache, in SGLang's own words: the last line of an error that names one."""
        lines = [line.strip() for line in error.splitlines() if "Error" in line] or [error.strip()]
        self.skipped.append(f"{stock.name} was not asked, the platform serves no fp8 KV cache: {lines[-1]}")
        _say(self.skipped[-1])

    def _client_runs(self, served: list[ServedArm], output: Path) -> Iterator[ClientRun]:
        case = replace(self.case, questions=self.arguments.bench_serving_questions or self.case.questions)
        client = SharedPrefixClient(self.arguments.model, case, self.arguments.seed, output)
        for output_tokens in self.arguments.bench_serving:
            asked: set[str] = set()
            for arm in served:
                if not arm.arm.is_exact and arm.server_name not in asked:
                    # What the plugin makes of prompts that say nothing: once for each server, whatever its arms.
                    asked.add(arm.server_name)
                    yield client.run_unmarked(arm, output_tokens)
                if arm.marks:
                    yield client.run(arm, output_tokens)

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

    def _measure(self, case: Case, workload: Workload, served: list[ServedArm], peers: list[KvpressArm], *, first: bool) -> Point:
        """first: whether nothing was asked before, so that servers must warm up, and costs are not known."""
        contenders: list[Contender] = [*served, *peers]
        rounds = _rounds(
            contenders, workload, self.arguments.rounds, warm_up=case.clients if first or self.arguments.scaling else 0
        )
        costs = []
        stock, ours = ([arm for arm in served if arm.arm.is_exact is exact] for exact in (True, False))
        if first and not self.arguments.scaling:
            documents = list({ask.document: ask for ask in workload.asks}.values())[:COST_DOCUMENTS]
            costs = [
                cost
                for arm in tqdm([arm for arm in ours if arm.marks], desc="costs", unit="arm")
                if (cost := compression_cost(stock[0], arm, documents))
            ]
        return Point(
            case.documents,
            case.tokens,
            case.questions,
            max(ask.question.max_new_tokens for ask in workload.asks),
            workload.asks[0].ignore_eos,
            self.pool_slots,
            case.clients,
            workload.digest,
            tuple(arm.name for arm in served),
            tuple(arm.name for arm in stock),
            tuple(arm.name for arm in peers),
            rounds,
            costs,
        )

    def _notes(self) -> Iterator[str]:
        yield (
            "stock: the same SGLang with the same KV pool, without --obcache. fcfs: its default. lpm: longest prefix first; only then does it "
            "let one request read a prefix that several wait for (in-batch prefix caching). fp8: twice the KV slots, as many bytes as a 16-bit cache."
        )
        yield from self.skipped
        if self.facts["machine"].endswith("no GPU"):
            yield (
                "SGLang has no CPU attention of its own in its wheel: on a CPU, stock runs on the platform that this package brings, whose "
                "attention is several times as fast as torch_native's (launch.bench_attention), and is stock in everything else."
            )
        if self.arguments.bench_serving:
            yield (
                f"{MODULE}: the client as released, with random tokens as prompts. It does not mark where a document ends, and the plugin does "
                "nothing with unmarked prompts, except in mode auto: those rows are served exactly. The other rows of OBCache are given the boundary by the client's own "
                "--extra-request-body. A server in mode auto gets what stock gets. Its answers are not scored."
            )
        if self.press:
            yield (
                "kvpress: one pipeline call for each question as it arrives; grouped: one for each document, with all its questions at "
                f"once, which takes knowing them in advance. About {self.arguments.kvpress_questions} questions a round; its answers "
                "come whole, and seconds are those of the pipeline alone."
            )


def _rounds(contenders: Sequence[Contender], workload: Workload, number: int, *, warm_up: int) -> list[Round]:
    """All contenders in turn, round by round; another one begins each round."""
    for contender in tqdm(contenders if warm_up else [], desc="warm-up", unit="arm", disable=not warm_up):
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


def _describe(case: Case, workload: Workload) -> str:
    return f"{case.documents} documents of {case.tokens} tokens, {workload.asks[0].question.max_new_tokens} output tokens"


def _context_length(model: str) -> int:
    return int(AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # End like on Ctrl-C, through the `with` blocks that stop the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
