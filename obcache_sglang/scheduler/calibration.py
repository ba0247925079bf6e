"""Gates that a server makes of itself: texts are replayed by its own forward, one at a time, and what their scores say is summed up and solved.

Texts are an operator's, or the beginnings of contexts that clients ask about. Each is scored by an internal job like that of method replay.
It reserves no slots and publishes nothing: what it leaves in the tree is the text's ordinary exact cache. Then the scores, and K and V from
the pool, go into the normal equations of this rank's heads.

Ranks of one tensor-parallel group run this in step. `agree` and `of_all_ranks` are collectives: all come to them, or none.
"""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from obcache_sglang.compress.calibration import (
    GATE_TOKENS,
    HELD_OUT,
    MIN_TOKENS,
    Findings,
    is_left_out,
    normalised,
    scoring_settings,
)
from obcache_sglang.compress.gates import Gates, NormalEquations, ScoredText
from obcache_sglang.compress.measurement import Measurement
from obcache_sglang.errors import HostError
from obcache_sglang.kv.context import SHARED, Context, Namespace
from obcache_sglang.messages import CalibrationPhase, Plan
from obcache_sglang.scheduler import tree
from obcache_sglang.scheduler.calibration_run import Nobody, Reading, Run, Text, counted
from obcache_sglang.scheduler.identity import context_id
from obcache_sglang.scheduler.in_place import InPlace
from obcache_sglang.scheduler.requests import CompressionJob
from obcache_sglang.settings import MADE_HERE, ServerSettings

if TYPE_CHECKING:
    from obcache_sglang.scheduler.rank_gates import RankGates

logger = logging.getLogger(__name__)

SERVED_CONTEXTS = 40
"""That `--obcache-calibrate serve` makes gates of."""

MAX_ATTEMPTS = 3
"""Of a text whose job was aborted or flushed away, before it is skipped."""

# Of systems of equations, in multiplications: one step while nothing runs, some tenths of a second on a CPU core.
_SOLVED_AT_ONCE = 1 << 34


class Calibration:
    """Of one scheduler.

    rank: None where there is no model. use: told that gates have been made, under which name; makes the server's settings those of a server
    with gates. Whether its default method follows is returned.
    """

    def __init__(self, in_place: InPlace, rank: RankGates | None, use: Callable[[str], bool]) -> None:
        self._in_place, self._jobs = in_place, in_place.jobs
        self._engine, self._cache = self._jobs.engine, self._jobs.cache
        self._rank, self._use = rank, use
        self.phase = CalibrationPhase.NONE
        self._run: Run | None = None
        self._why: str | None = None
        self._seconds = 0.0
        self._num_made = self._num_measured = 0
        self._follows = False
        # The text under way: first read by a job, then, with its node locked, out of the pool.
        self._text: Text | None = None
        self._measurement: Measurement | None = None
        self._last_job: CompressionJob | None = None
        self._lock: Any = None
        self._reading: Reading | None = None
        self._error = False

    # --- what operators ask -----------------------------------------------------------------------------------------

    def answer(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Answers a control call; action is begin, cancel or state."""
        match call.get("action"):
            case "begin":
                refusal = self.begin(
                    source=call["source"],
                    wanted=call["wanted"],
                    texts=[(number, array("q", tokens)) for number, tokens in call.get("texts", ())],
                    max_tokens=call.get("max_tokens"),
                    name=call.get("name"),
                )
                if refusal is not None:
                    return {"ok": False, "status_code": refusal[0], "error": refusal[1]}
            case "cancel":
                if not self.phase.is_under_way:
                    return {"ok": False, "status_code": 404, "error": "No calibration is under way."}
                self._end(CalibrationPhase.CANCELLED)
        return {"ok": True, **self.state()}

    def begin(
        self,
        *,
        source: str,
        wanted: int,
        texts: list[tuple[int, array[int]]] | None = None,
        max_tokens: int | None = None,
        name: str | None = None,
    ) -> tuple[int, str] | None:
        """Starts a calibration. Returns (HTTP status, reason) where it cannot be.

        source: "texts", "contexts" or "serve". wanted: parts of texts, or contexts. texts: (number from 1 on, tokens) of each part.
        max_tokens: of a context. name: of the file.
        """
        if self.phase.is_under_way:
            return 409, "A calibration is under way. Wait for its end (GET /obcache/calibrate), or DELETE it first."
        if self._engine.tokenizer is None:
            return (
                400,
                "Calibration asks the model to repeat texts, which needs a tokenizer. Start the server without --skip-tokenizer-init.",
            )
        refusal = "There is no model here." if self._rank is None else self._rank.refusal()
        if self._rank is None or refusal is not None:
            return 400, str(refusal)
        parts = texts or []
        longest = min(GATE_TOKENS, self._engine.context_len // 2 - MIN_TOKENS)
        self._run = Run(
            source,
            wanted,
            max((number for number, _ in parts), default=wanted),
            max_tokens or longest,
            name,
            Findings(self._rank.identity(), lanes=self._rank.lanes, with_gates=True),
            deque(Text(tokens, number) for number, tokens in parts),
        )
        self._why, self._seconds = None, 0.0
        self.phase = CalibrationPhase.MEASURING if self._run.in_turn else CalibrationPhase.COLLECTING
        logger.info("obcache: calibration begins: %d %s", wanted, "texts" if self._run.in_turn else "contexts")
        return None

    def begin_if_asked(self, settings: ServerSettings) -> None:
        """With `--obcache-calibrate serve`, and no gates yet. Raises HostError where it cannot be."""
        if settings.calibrate != "serve" or settings.gates is not None:
            return
        refusal = self.begin(source="serve", wanted=SERVED_CONTEXTS)
        if refusal is not None:
            raise HostError(f"--obcache-calibrate serve: {refusal[1]}")

    def state(self) -> dict[str, Any]:
        """JSON-safe, for `GET /obcache/calibrate`."""
        run, phase = self._run, self.phase
        if phase is CalibrationPhase.COLLECTING and run is not None and run.num_more <= 0:
            phase = CalibrationPhase.MEASURING
        state: dict[str, Any] = {"state": phase.value, "made": self._num_made, "default_follows": self._follows}
        if run is None:
            return state
        r_squared = None if run.file is None else run.file.r_squared
        return state | {
            "source": run.source,
            "texts": run.wanted,
            "scored": run.findings.num_texts,
            "skipped": dict(run.skipped),
            "tokens": run.findings.num_tokens,
            "seconds": self._seconds or time.perf_counter() - run.started_at,
            "r_squared": None if r_squared is None else {"mean": float(r_squared.mean()), "lowest": float(r_squared.min())},
            "file": run.path,
            "error": self._why,
        }

    # --- what clients send ------------------------------------------------------------------------------------------

    def offer(self, plan: Plan, namespace: Namespace, prompt: array[int]) -> None:
        """A prompt with a context arrives. The context's beginning is taken if contexts are being collected."""
        run, is_scoring = self._run, self._text is not None  # that one counts
        if self.phase is not CalibrationPhase.COLLECTING or run is None or run.num_more <= is_scoring or plan.exact is not None:
            return
        length = min(plan.boundary(len(prompt), self._cache.page_size), run.max_tokens)
        if namespace != SHARED or length < MIN_TOKENS:
            return
        tokens = prompt[:length]
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        if digest not in run.seen:
            run.seen.add(digest)
            run.waiting.append(Text(tokens))

    # --- a scheduling pass ------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether the next pass has something to do for it where nobody waits for anything."""
        waits_for_contexts = self.phase is CalibrationPhase.COLLECTING and self._text is None
        return self._run is not None and self.phase.is_under_way and not (waits_for_contexts and not self._run.waiting)

    def advance(self) -> None:
        """One step, in each pass of the scheduler. Never raises."""
        run = self._run
        if run is None or not self.phase.is_under_way:
            return
        try:
            self._advance(run)
        except Exception:
            logger.exception("obcache: calibration failed")
            self._end(CalibrationPhase.FAILED, "An internal error, see the server's log. Nothing has changed.")

    def _advance(self, run: Run) -> None:
        if self.phase is CalibrationPhase.SOLVING:
            self._solve_some(run)
        if self.phase is CalibrationPhase.SWITCHING:
            self._switch(run)
        if self.phase not in (CalibrationPhase.COLLECTING, CalibrationPhase.MEASURING):
            return
        if self._lock is not None and self._reading is None:
            self._begin_reading(run)
        if self._reading is not None:
            self._read_some(run, self._reading)
        elif self._measurement is not None:
            self._see_job(run, self._measurement)
        if self._text is None and self.phase.is_under_way:
            self._next(run)

    def _next(self, run: Run) -> None:
        """Starts the next text, or what follows the last one."""
        if sum(run.skipped.values()) > run.wanted:
            self._end(CalibrationPhase.FAILED, f"Too many contexts could not be scored: {counted(run.skipped)}.")
        elif run.num_more <= 0 and not run.waiting:
            findings = run.findings
            if findings.equations(left_out=True).num_texts and findings.equations(left_out=False).num_texts:
                self.phase = CalibrationPhase.SOLVING
            else:
                self._end(
                    CalibrationPhase.FAILED,
                    f"Of {run.wanted} texts {findings.num_texts} could be scored, too few to make gates and to judge them "
                    f"({counted(run.skipped)}). Give {HELD_OUT} or more that fit.",
                )
        elif run.waiting and self._may_start(run):
            self._start(run, run.waiting.popleft())

    def _may_start(self, run: Run) -> bool:
        if self._in_place.is_busy or self._engine.must_become_idle:
            return False
        return run.in_turn or (not self._jobs.all() and self._jobs.engine_is_idle())

    def _start(self, run: Run, text: Text) -> None:
        settings, page_size = scoring_settings(), self._cache.page_size
        tokens = text.tokens[: len(text.tokens) // page_size * page_size]
        # Not the id of the same context, if a client has it replayed.
        self._num_measured += 1
        identity = context_id(SHARED, settings, tokens, (-self._num_measured,))
        context = Context(identity, SHARED, settings, tokens, settings.kept_slots(len(tokens), page_size))
        measurement = Measurement(context, lambda: self._scored(measurement))
        engine = self._engine
        like = Nobody(engine.eos_token_ids, engine.vocab_size, engine.lowest_priority, engine.tokenizer)
        job, refusal = self._jobs.make_measuring(like, measurement)
        if job is None:
            run.skipped[refusal] += 1
            return
        self._text, self._measurement, self._last_job = text, measurement, job
        job.in_turn = run.in_turn
        if run.in_turn:
            engine.queue.append(job)
        else:
            engine.queue.insert(0, job)

    def _scored(self, measurement: Measurement) -> None:
        """The last pass of a text's job has ended. Its exact KV is cached, and locked by the job until that returns."""
        if measurement is not self._measurement:
            return  # cancelled meanwhile
        num_tokens, node = tree.match_exact(self._cache.tree, measurement.context)
        if num_tokens == measurement.context.num_tokens:
            self._lock = self._cache.tree.lock(node)

    def _see_job(self, run: Run, measurement: Measurement) -> None:
        """Whether the job of the text under way is still there. One that was aborted or flushed away starts over, some times."""
        job = self._jobs.get(measurement.context)
        if job is not None:
            self._last_job = job
            return
        assert self._text is not None
        text, error = self._text, None if self._last_job is None else self._last_job.error
        self._drop_text()
        text.attempts += 1
        if error is None and text.attempts < MAX_ATTEMPTS:
            run.waiting.appendleft(text)
        else:
            run.skipped[error or "aborted"] += 1

    # --- K and V of a scored text -----------------------------------------------------------------------------------

    def _begin_reading(self, run: Run) -> None:
        assert self._text is not None and self._measurement is not None and self._rank is not None
        text, context = self._text, self._measurement.context
        self._error = False
        self._contained(self._engine.wait_for_forwards)
        own = self._contained(self._measurement.result)
        found = self._contained(lambda: tree.exact_slots(self._cache.tree, context))
        if not self._jobs.agree(own is not None and found is not None):
            self._drop_text()
            run.skipped["error"] += 1
            return
        assert own is not None and found is not None
        device = own[0].device
        scores = self._rank.of_all_ranks(own[0]).to(device)
        normalised(scores, self._rank.of_all_ranks(own[1][:, None]).sum(1).to(device))
        number = run.findings.num_texts + 1
        left_out = is_left_out(text.number or number, number, run.num_texts)
        scored = self._contained(lambda: ScoredText.of(scores, run.findings.lanes))
        if not self._jobs.agree(scored is not None):
            self._drop_text()
            run.skipped["error"] += 1
            return
        assert scored is not None
        self._reading = Reading(text, scores, scored, found[1], left_out)

    def _read_some(self, run: Run, reading: Reading, *, to_the_end: bool = False) -> None:
        """One layer while requests run, else all. Where that fails on a rank, the sums are worth nothing any more."""
        assert self._rank is not None
        rank, equations = self._rank, run.findings.equations(left_out=reading.left_out)
        first = reading.num_layers_done
        last = run.num_layers if to_the_end or self._jobs.engine_is_idle() else first + 1
        self._contained(self._engine.wait_for_forwards)
        for layer in range(first, last):
            self._contained(partial(self._add_layer, equations, rank, reading, layer))
        reading.num_layers_done = last
        if last < run.num_layers:
            return
        self._contained(lambda: run.findings.add_shares(reading.scores))
        self._contained(lambda: equations.end_text(reading.scored))
        failed = self._error
        self._drop_text()
        if not self._jobs.agree(not failed):
            self._end(CalibrationPhase.FAILED, "Summing up a text failed, see the server's log. Nothing has changed.")

    @staticmethod
    def _add_layer(equations: NormalEquations, rank: RankGates, reading: Reading, layer: int) -> None:
        equations.add_layer(reading.scored, layer, *rank.keys_values(layer, reading.slots))

    def _contained(self, step: Callable[[], Any]) -> Any:
        """A step that may fail on one rank alone, which then still comes to the next vote."""
        if self._error:
            return None
        try:
            return step()
        except Exception:
            self._error = True
            logger.exception("obcache: a step of calibration failed")
            return None

    def _drop_text(self) -> None:
        """The text under way is done with."""
        lock, self._lock = self._lock, None
        self._text = self._measurement = self._last_job = self._reading = None
        if lock is not None:
            self._cache.tree.unlock(lock)

    # --- when all texts are scored ----------------------------------------------------------------------------------

    def _solve_some(self, run: Run) -> None:
        first = sum(len(gates.bias) for gates, _ in run.solved)
        if first == 0:
            self._error = False
        lanes, size = run.findings.lanes, run.findings.equations(left_out=True).projections.shape[-1]
        at_once = max(1, _SOLVED_AT_ONCE // ((lanes.stop - lanes.start) * size**3)) if self._jobs.engine_is_idle() else 1
        solved = self._contained(lambda: run.findings.solve(slice(first, first + at_once)))
        last = first + at_once >= run.num_layers
        if solved is not None:
            run.solved.append(solved)
        if not self._jobs.agree(solved is not None):
            self._end(CalibrationPhase.FAILED, "The equations could not be solved, see the server's log. Nothing has changed.")
        elif last:
            self._make(run)

    def _make(self, run: Run) -> None:
        assert self._rank is not None
        own = [torch.cat(each) for each in zip(*((gates.weights, gates.bias, r) for gates, r in run.solved), strict=True)]
        weights, bias, r_squared = map(self._rank.of_all_ranks, own)
        run.file = self._contained(lambda: run.findings.gate_file(Gates(weights, bias), r_squared, run.made()))
        if not self._jobs.agree(run.file is not None):
            self._end(CalibrationPhase.FAILED, "The gates are not finite numbers, see the server's log. Nothing has changed.")
            return
        if self._rank.is_first:
            try:
                run.path = str(self._rank.write(run.file, run.name))
            except Exception as error:
                logger.exception("obcache: the file of gates could not be written; they are used until the server ends")
                self._why = f"The gates are in use, but their file could not be written: {error}"
        self.phase = CalibrationPhase.SWITCHING

    def _switch(self, run: Run) -> None:
        """As soon as no compression is under way that has begun with other gates."""
        if self._in_place.is_busy or any(job.context.settings.depends_on_gates for job in self._jobs.all()):
            return
        assert self._rank is not None and run.file is not None
        rank, file = self._rank, run.file
        own = self._contained(lambda: rank.own(file))
        if not self._jobs.agree(own is not None):
            self._end(CalibrationPhase.FAILED, "The gates could not be put in place, see the server's log. Nothing has changed.")
            return
        rank.install(own, file.profile)
        self._follows = self._use(run.path or MADE_HERE)
        for context in [each for each in self._cache if each.settings.depends_on_gates and self._cache.has(each)]:
            self._cache.retire(context)
        self._num_made += 1
        logger.info(
            "obcache: gates made of %d texts, %d tokens, in %.1f s: R^2 on texts left out: mean %.2f, lowest head %.2f; %s",
            run.findings.num_texts, run.findings.num_tokens, time.perf_counter() - run.started_at,
            run.file.r_squared.mean(), run.file.r_squared.min(), run.path or "not written",
        )  # fmt: skip
        self._end(CalibrationPhase.DONE, self._why)

    def _end(self, phase: CalibrationPhase, why: str | None = None) -> None:
        """Gives back what the calibration holds: its sums are as large as the models'."""
        run, measurement = self._run, self._measurement
        job = None if measurement is None else self._jobs.get(measurement.context)
        self.phase, self._why = phase, why
        self._drop_text()
        if job is not None:
            self._jobs.give_up(job, phase.value)
        if run is not None:
            self._seconds = time.perf_counter() - run.started_at
            run.forget()
        if phase is CalibrationPhase.FAILED:
            logger.warning("obcache: calibration failed: %s", why)

    # --- what else SGLang does --------------------------------------------------------------------------------------

    def give_up(self, why: str) -> None:
        """What it is of is not what this server serves any more."""
        if self.phase.is_under_way:
            self._end(CalibrationPhase.FAILED, why)

    def before_flush(self) -> None:
        """The pool may be written over: what is being read of it is read to the end."""
        if self._run is not None and self._reading is not None:
            self._read_some(self._run, self._reading, to_the_end=True)

    def forget(self) -> None:
        """The tree was reset: nodes, locks and slots are gone. A text that was scored only starts over."""
        if self._lock is None or self._run is None or self._text is None:
            return
        self._lock = None
        if self._reading is not None:
            self._end(CalibrationPhase.FAILED, "The cache was flushed while a text was summed up. Calibrate again.")
            return
        text = self._text
        self._drop_text()
        self._run.waiting.appendleft(text)
