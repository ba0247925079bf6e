"""Rows that SGLang's own client makes: `sglang.bench_serving`, unchanged, with its dataset of generated shared prefixes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obcache_sglang.bench.cases import Case
from obcache_sglang.bench.served import ServedArm, sampling_params
from obcache_sglang.eval.arms import EXACT, Arm
from obcache_sglang.local_server import Client

MODULE = "sglang.bench_serving"


@dataclass(frozen=True)
class ClientRun:
    """What the client measured of one arm. output_tokens: of each answer; result: the client's, under its own names."""

    arm: str
    stock: bool
    output_tokens: int
    result: Mapping[str, Any]


class SharedPrefixClient:
    """Runs the client for one case: a group for each document, with as many prompts as it has questions.

    output: its folder. Results are appended to bench_serving.jsonl in it, with the client's own words in bench_serving.log.
    """

    def __init__(self, model: str, case: Case, seed: int, output: Path) -> None:
        self.case = case
        self.results = output / "bench_serving.jsonl"
        self.log = output / "bench_serving.log"
        for file in (self.results, self.log):
            file.unlink(missing_ok=True)
        self._common = ["--backend", "sglang", "--model", model, "--dataset-name", "generated-shared-prefix", "--tokenize-prompt"]
        self._common += ["--gsp-num-groups", str(case.documents), "--gsp-prompts-per-group", str(case.questions)]
        self._common += ["--gsp-system-prompt-len", str(case.tokens), "--max-concurrency", str(case.clients), "--seed", str(seed)]
        self._common += ["--flush-cache", "--cache-report", "--disable-tqdm", "--output-file", str(self.results)]

    def command(self, url: str, name: str, arm: Arm, output_tokens: int) -> list[str]:
        """arm: `EXACT` for prompts as the client makes them; name: the tag of the result."""
        command = [sys.executable, "-m", MODULE, *self._common]
        command += ["--base-url", url, "--gsp-output-len", str(output_tokens), "--tag", name]
        if not arm.is_exact:
            # It replaces the sampling parameters that the client would send: the same ones, and where the document ends.
            body = {"sampling_params": sampling_params(arm, self.case.tokens, output_tokens, ignore_eos=True)}
            command += ["--extra-request-body", json.dumps(body)]
        return command

    def run(self, served: ServedArm, output_tokens: int) -> ClientRun:
        """Each request says where its document ends, if the arm compresses. Raises RuntimeError with the end of the log on a failure."""
        return self._run(served.client, served.name, served.arm, output_tokens, stock=served.arm.is_exact)

    def run_unmarked(self, served: ServedArm, output_tokens: int) -> ClientRun:
        """The client's own prompts, for the server of an arm that compresses."""
        return self._run(served.client, f"{served.server_name}, prompts unmarked", EXACT, output_tokens, stock=False)

    def _run(self, client: Client, name: str, arm: Arm, output_tokens: int, *, stock: bool) -> ClientRun:
        print(f"{MODULE}, {output_tokens} output tokens: {name}", file=sys.stderr, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            command = self.command(client.url, name, arm, output_tokens)
            done = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT)
        result = read_result(self.results)
        if done.returncode or result is None or result["completed"] != self.case.documents * self.case.questions:
            raise RuntimeError(f"{MODULE} failed; the end of {self.log}:\n{self.log.read_text(errors='replace')[-3000:]}")
        return ClientRun(name, stock, output_tokens, result)


def read_result(file: Path) -> dict[str, Any] | None:
    """The last result that the client appended to `file`; what it says of the server is left out."""
    if not file.exists():
        return None
    lines: Sequence[str] = file.read_text(encoding="utf-8").splitlines()
    return {name: value for name, value in json.loads(lines[-1]).items() if name != "server_info"} if lines else None
