"""Calibration in a server: what the manager does with the texts, on SGLang's own radix tree, and how the ranks' sums come together."""

from __future__ import annotations

import asyncio
import shutil
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.sampling.sampling_params import SamplingParams
from transformers import LlamaForCausalLM

from obcache_sglang import calibrate, measured_files, plugin
from obcache_sglang.compress.calibration import Findings, is_left_out, normalised, scoring_settings
from obcache_sglang.compress.compression import AttentionCall, Compressor, ScoringRows
from obcache_sglang.compress.gates import GateFile, Gates
from obcache_sglang.compress.head_profile import PACKAGED, HeadProfile, ModelIdentity
from obcache_sglang.compress.measurement import Measurement
from obcache_sglang.compress.replay import ReplayPrompts
from obcache_sglang.errors import ConfigError, RequestError
from obcache_sglang.frontend import calibration_watch
from obcache_sglang.frontend.calibration_watch import CalibrationWatch
from obcache_sglang.kv.context import Context, ContextState
from obcache_sglang.messages import Plan
from obcache_sglang.scheduler import control_calls
from obcache_sglang.scheduler.calibration import MAX_ATTEMPTS, SHARED, Calibration
from obcache_sglang.scheduler.calibration_run import settings_with
from obcache_sglang.scheduler.rank_gates import RankGates
from obcache_sglang.scheduler.requests import CompressionJob
from obcache_sglang.scheduler.wiring import _agreement
from obcache_sglang.settings import CompressionSettings, ServerSettings, with_gates
from tests.unit.engine import KEPT, Driven, sleeps
from tests.unit.test_profile import attention_inputs, model_config

MODEL = ModelIdentity("LlamaForCausalLM", 1, 1, 1, 8, 8, 100, "0" * 16)
LENGTH = 140


class Words:
    """A tokenizer without a chat template, whose words are numbers."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [len(word) for word in text.split()] or [0]


class Rank:
    """Stands for `RankGates` of the only rank: a model of one head, whose K and V are drawn."""

    lanes, is_first = (0, 1), True

    def __init__(self) -> None:
        self.refused: str | None = None
        self.fails = False
        self.read: list[int] = []
        self.cannot_place = False
        self.installed: list[Gates] = []
        self.written: list[str | None] = []
        self.disk_is_full = False

    def refusal(self) -> str | None:
        return self.refused

    def identity(self) -> ModelIdentity:
        return MODEL

    def keys_values(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert not self.fails
        self.read.append(len(slots))
        return torch.randn(len(slots), 1, 8), torch.randn(len(slots), 1, 8)

    def of_all_ranks(self, own: torch.Tensor) -> torch.Tensor:
        return own

    def own(self, file: GateFile) -> Gates:
        assert not self.cannot_place
        return file.gates

    def install(self, own: Gates, profile: HeadProfile) -> None:
        self.installed.append(own)

    def write(self, file: GateFile, name: str | None) -> Path:
        self.written.append(name)
        if self.disk_is_full:
            raise OSError("No space left on device")
        return Path("made.gates.safetensors")


def driven(size: int = 2000, **settings: Any) -> tuple[Driven, Rank]:
    torch.manual_seed(0)
    rank = Rank()
    drive = Driven(size, rank_gates=rank, **settings)
    drive.engine.tokenizer = Words()
    return drive, rank


def text(number: int, length: int = LENGTH) -> array[int]:
    return array("q", range(1000 * number, 1000 * number + length))


def call(drive: Driven, action: str, **more: Any) -> dict[str, Any]:
    return control_calls.answer(drive.manager, {"op": "calibrate", "action": action, **more})


def begin_texts(drive: Driven, number: int = 5) -> dict[str, Any]:
    texts = [(each, list(text(each))) for each in range(1, number + 1)]
    return call(drive, "begin", source="texts", wanted=number, texts=texts)


def jobs(reqs: list[Any]) -> list[CompressionJob]:
    return [each for each in reqs if isinstance(each, CompressionJob)]


def cache_exactly(drive: Driven, tokens: array[int]) -> None:
    slots = drive.engine.tree.token_to_kv_pool_allocator.alloc(len(tokens))
    drive.engine.tree.insert(InsertParams(key=RadixKey(tokens, None), value=slots))


ANY = torch.empty(0)


def forward(drive: Driven, job: CompressionJob, scores: torch.Tensor | None = ANY) -> CompressionJob | None:
    """One prefill of a text's job, to its end. What follows it in the queue. scores: [kv_heads, tokens] of its layer; None if scoring fails."""
    drive.engine.take(job)
    assert not job.is_final
    assert drive.manager.jobs.slots_to_admit(job) == 0
    if job.replay is not None and scores is not None:
        job.compression._scores[0] = torch.rand(1, job.context.num_tokens) if scores is ANY else scores
        job.compression._squares[0] = torch.tensor(1.0)
    is_first = job.replay is None
    drive.end(job)
    if is_first:  # as SGLang does with it
        cache_exactly(drive, job.context.tokens)
    return next(iter(jobs(drive.engine.queue)), None)


def read_a_text(drive: Driven) -> array[int]:
    """A pass that starts the job of a text, and all its prefills. The text."""
    (job,) = jobs(drive.step())
    following = forward(drive, job)
    while following is not None:
        following = forward(drive, following)
    return job.context.tokens


def read_all(drive: Driven, number: int = 5) -> list[array[int]]:
    read = [read_a_text(drive) for _ in range(number)]
    for _ in range(3):
        drive.step()
    return read


def test_texts_are_read_one_after_the_other_and_become_gates() -> None:
    drive, rank = driven()
    assert begin_texts(drive)["state"] == "measuring"
    assert read_all(drive) == [text(each) for each in range(1, 6)]
    state = call(drive, "state")
    assert (state["state"], state["scored"], state["tokens"], state["file"]) == ("done", 5, 5 * LENGTH, "made.gates.safetensors")
    assert state["skipped"] == {} and state["error"] is None and state["made"] == 1
    assert rank.read == [LENGTH] * 5
    (made,) = rank.installed
    assert made.weights.shape == (1, 1, 34)
    # Nothing is held; the texts are cached like any other.
    assert drive.accounts() == (2000 - 5 * LENGTH, 5 * LENGTH, 0)
    assert list(drive.manager.cache) == [] and drive.manager.jobs.all() == []
    assert drive.manager.metrics.to_dict()["compressions"] == 0


def test_a_scheduler_stays_awake_while_texts_are_read_and_sleeps_while_none_comes() -> None:
    drive, _ = driven()
    begin_texts(drive)
    assert not sleeps(drive)
    for _ in range(5):
        read_a_text(drive)
        assert not sleeps(drive), "its K and V are read in the next pass"
    while call(drive, "state")["state"] != "done":
        assert not sleeps(drive)
        drive.step()
    assert sleeps(drive)
    drive = collecting()
    assert sleeps(drive)
    drive.ask(text(1))
    assert not sleeps(drive)


def test_every_fifth_text_judges_the_others() -> None:
    drive, _ = driven()
    begin_texts(drive, 10)
    for _ in range(5):
        read_a_text(drive)
    drive.step()
    findings = drive.manager.calibration._run.findings
    assert (findings.equations(left_out=True).num_texts, findings.equations(left_out=False).num_texts) == (1, 4)


def test_method_gate_is_the_default_from_then_on() -> None:
    drive, _ = driven()
    drive.manager.settings = ServerSettings.resolve({"min_tokens": 4, "compression_ratio": 0.5})
    begin_texts(drive)
    assert drive.manager.settings.gates is None
    read_all(drive)
    settings = drive.manager.settings
    assert settings.gates is not None and drive.manager.under_pressure.settings is settings
    assert (settings.compression.method, settings.compression.budget) == ("gate", "profile")
    assert call(drive, "state")["default_follows"] is True


def test_an_operators_own_method_stays_the_default() -> None:
    drive, _ = driven(method="snapkv")
    begin_texts(drive)
    read_all(drive)
    settings = drive.manager.settings
    assert settings.compression.method == "snapkv" and settings.compression_for({"method": "gate"}).method == "gate"


def test_a_server_that_cannot_divide_by_profile_keeps_its_default() -> None:
    drive, _ = driven()
    drive.manager.uneven_refusal = "the attention backend cannot"
    drive.manager.settings = ServerSettings.resolve({"min_tokens": 4})
    begin_texts(drive)
    read_all(drive)
    assert drive.manager.settings.compression.budget == "uniform" and drive.manager.settings.gates is not None
    assert call(drive, "state")["default_follows"] is False


def test_one_at_a_time() -> None:
    drive, _ = driven()
    begin_texts(drive)
    again = begin_texts(drive)
    assert (again["ok"], again["status_code"]) == (False, 409)
    assert "DELETE it first" in again["error"]
    read_all(drive)
    assert begin_texts(drive)["ok"]  # after its end, gates may be made anew


def test_servers_that_cannot_are_told_why() -> None:
    drive, rank = driven()
    rank.refused = "Calibration does not work here."
    assert begin_texts(drive)["error"] == "Calibration does not work here."
    drive.engine.tokenizer = None
    assert "--skip-tokenizer-init" in begin_texts(drive)["error"]
    assert call(Driven(), "state")["state"] == "none"


@pytest.mark.parametrize("when", ["queued", "running", "scored", "between"])
def test_cancelled_at_any_time_it_leaves_nothing(when: str) -> None:
    drive, rank = driven()
    begin_texts(drive)
    (job,) = jobs(drive.step())
    if when == "running":
        drive.engine.take(job)
    elif when != "queued":
        following = forward(drive, job)
        while following is not None and when == "scored":
            following = forward(drive, following)
    assert call(drive, "cancel")["state"] == "cancelled"
    if when == "running":
        drive.end(job)
    assert jobs(drive.step()) == [] and drive.manager.jobs.all() == []
    assert drive.accounts()[2] == 0 and rank.installed == []
    assert call(drive, "cancel")["status_code"] == 404
    assert begin_texts(drive)["ok"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_text_that_is_aborted_starts_over_some_times(cached: bool) -> None:
    drive, _ = driven()
    begin_texts(drive)
    for attempt in range(MAX_ATTEMPTS):
        (job,) = jobs(drive.step())
        assert job.context.tokens == text(1), attempt
        following = forward(drive, job) if cached else job
        assert following is not None
        drive.engine.take(following)
        drive.end(following, FINISH_ABORT("gone"))
    (job,) = jobs(drive.step())
    assert job.context.tokens == text(2)
    assert call(drive, "state")["skipped"] == {"aborted": 1}


def test_a_text_that_cannot_be_scored_is_skipped_at_once() -> None:
    drive, _ = driven()
    begin_texts(drive)
    (job,) = jobs(drive.step())
    drive.engine.take(job)
    job.error = "unsupported_attention"
    drive.end(job)
    (job,) = jobs(drive.step())
    assert job.context.tokens == text(2)
    assert call(drive, "state")["skipped"] == {"unsupported_attention": 1}


def test_if_too_few_are_left_it_fails_and_says_why() -> None:
    drive, rank = driven(size=200, context_len=4000)
    begin_texts(drive)
    for _ in range(7):
        drive.step()
    state = call(drive, "state")
    assert state["state"] == "failed" and "pool_too_small: 5" in state["error"]
    assert rank.installed == [] and drive.manager.settings.gates is None


def test_a_failure_while_summing_up_changes_nothing() -> None:
    drive, rank = driven()
    rank.fails = True
    begin_texts(drive)
    read_a_text(drive)
    drive.step()
    state = call(drive, "state")
    assert state["state"] == "failed" and "Summing up a text failed" in state["error"]
    assert drive.accounts()[2] == 0 and rank.installed == []


def test_a_full_disk_does_not_stop_the_gates() -> None:
    drive, rank = driven()
    rank.disk_is_full = True
    begin_texts(drive)
    read_all(drive)
    state = call(drive, "state")
    assert state["state"] == "done" and state["file"] is None and "No space left" in state["error"]
    assert len(rank.installed) == 1


def test_gates_that_cannot_be_placed_change_nothing() -> None:
    drive, rank = driven()
    rank.cannot_place = True
    begin_texts(drive)
    read_all(drive)
    state = call(drive, "state")
    assert state["state"] == "failed" and "could not be put in place" in state["error"]
    assert drive.manager.settings.gates is None


def test_on_a_gpu_without_decode_graphs_for_them_gates_have_to_be_asked_for() -> None:
    given = {"uneven_refusal": None, "on_cpu": False}
    assert settings_with(ServerSettings.resolve({}), "file", **given)[1] is False
    for settings in ({"calibrate": "serve"}, {"decode_graphs": "on"}, {"decode_graphs": "off"}):
        later, follows = settings_with(ServerSettings.resolve(settings), "file", **given)
        assert follows and later.compression.method == "gate"


def test_ranks_that_do_not_agree_skip_the_text() -> None:
    drive, _ = driven()
    begin_texts(drive)
    read_a_text(drive)
    drive.manager.jobs.agree = lambda verdict: False
    drive.step()
    assert call(drive, "state")["skipped"] == {"error": 1}
    assert drive.accounts()[2] == 0


def test_while_requests_run_a_layer_is_summed_up_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    drive, rank = driven()
    monkeypatch.setattr(Rank, "identity", lambda self: replace(MODEL, num_hidden_layers=3))
    begin_texts(drive)
    (job,) = jobs(drive.step())
    following = forward(drive, job)
    while following is not None:
        for layer in range(3):
            following.compression._scores[layer] = torch.rand(1, LENGTH)
            following.compression._squares[layer] = torch.tensor(1.0)
        following = forward(drive, following)
    drive.engine.running = [object()]  # type: ignore[list-item]
    for done in (1, 2, 3):
        drive.evict_all()
        drive.step()
        assert len(rank.read) == done
        assert drive.accounts()[2] == (LENGTH if done < 3 else 0)  # nobody may evict what is read
    assert call(drive, "state")["scored"] == 1


def test_a_flush_meanwhile_reads_to_the_end_first_or_starts_the_text_over() -> None:
    drive, rank = driven()
    begin_texts(drive)
    read_a_text(drive)  # scored, not read yet

    def flush() -> None:
        drive.manager.before_flush()
        drive.engine.tree.reset()
        drive.engine.tree.token_to_kv_pool_allocator.clear()
        drive.manager.after_flush()

    flush()
    assert read_a_text(drive) == text(1)
    drive.step()
    assert call(drive, "state")["scored"] == 1 and len(rank.read) == 1


@pytest.mark.parametrize(
    "name", ["_next", "_start", "_begin_reading", "_read_some", "_solve_some", "_make", "_switch", "offer", "_scored"]
)
def test_a_defect_ends_a_calibration_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drive, _ = driven()
    begin_texts(drive)

    def defect(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Calibration, name, defect)
    for _ in range(16):
        found = jobs(drive.step())
        if found and forward(drive, found[0]) is not None:
            while following := next(iter(jobs(drive.engine.queue)), None):
                forward(drive, following)
    state = call(drive, "state")
    if name == "offer":
        assert state["state"] == "done"
    else:
        assert state["state"] == "failed" and state["error"], state
    assert drive.accounts()[2] == 0 and drive.manager.jobs.all() == []
    monkeypatch.undo()
    assert drive.manager.settings.gates is None or name == "offer"
    assert drive.compress(array("q", range(40))).state is ContextState.RESIDENT


# --- contexts -----------------------------------------------------------------------------------------------------------


def collecting(**settings: Any) -> Driven:
    drive, _ = driven(**settings)
    assert call(drive, "begin", source="contexts", wanted=5)["state"] == "collecting"
    return drive


def waiting(drive: Driven) -> list[array[int]]:
    run = drive.manager.calibration._run
    assert run is not None
    return [each.tokens for each in run.waiting]


def test_contexts_are_taken_as_clients_ask_about_them() -> None:
    drive = collecting()
    drive.ask(text(1))
    drive.ask(text(1), question=8)
    drive.ask(text(2, 100))  # too short to say anything
    drive.ask(text(3, 1500))
    assert waiting(drive) == [text(1), text(3, 872)]  # as much as can be read twice


@pytest.mark.parametrize("field", ["cache_salt", "extra_key", "lora_id"])
def test_a_tenants_context_is_never_read(field: str) -> None:
    drive = collecting()
    fields = {"rid": "r", "origin_input_text": "", "origin_input_ids": text(1) + array("q", [7]), field: "tenant"}
    plan = Plan(LENGTH, drive.manager.settings.compression).to_dict()
    drive.manager.create_request({**fields, "sampling_params": SamplingParams(max_new_tokens=1)}, plan)
    assert waiting(drive) == []


def test_excluded_contexts_are_not_read() -> None:
    drive = collecting()
    drive.ask(text(1), exact="excluded")
    assert waiting(drive) == []


def test_contexts_are_read_only_when_nobody_waits() -> None:
    drive = collecting()
    req = drive.ask(text(1))
    (job,) = jobs(drive.step())
    assert job.context is req.context  # the question's own compression
    drive.forward(job)
    drive.end(job)
    drive.step()
    assert drive.manager.jobs.all() == []
    drive.engine.queue.remove(req)
    drive.engine.running = [req]
    assert jobs(drive.step()) == []
    drive.engine.running = []
    (job,) = jobs(drive.step())
    assert job.unattended and job.context.tokens == text(1) and job.context is not req.context
    # Somebody comes before its next pass: that waits.
    following = forward(drive, job)
    drive.ask(text(2))
    assert following not in drive.step()


def test_as_many_as_were_asked_for_are_taken() -> None:
    drive = collecting()
    for number in range(1, 9):
        drive.ask(text(number))
    assert waiting(drive) == [text(number) for number in range(1, 6)]


def test_the_one_that_is_being_scored_is_one_of_them() -> None:
    drive = collecting()
    for number in range(1, 6):
        drive.ask(text(number))
    drive.engine.queue = []
    assert len(jobs(drive.step())) == 1 and len(waiting(drive)) == 4
    drive.ask(text(9))
    assert text(9) not in waiting(drive)


def test_a_context_that_is_skipped_is_made_up_for() -> None:
    drive = collecting()
    for number in range(1, 6):
        drive.ask(text(number))
    drive.engine.queue = []
    (job,) = jobs(drive.step())
    drive.engine.take(job)
    job.error = "error"
    drive.end(job)
    drive.step()
    drive.ask(text(9))
    assert text(9) in waiting(drive)


def test_with_serve_the_server_begins_by_itself() -> None:
    drive, _ = driven(calibrate="serve")
    drive.manager.calibration.begin_if_asked(drive.manager.settings)
    state = call(drive, "state")
    assert (state["state"], state["source"], state["texts"]) == ("collecting", "serve", 40)


# --- the switch ---------------------------------------------------------------------------------------------------------

GATE = CompressionSettings.resolve({"method": "gate", "compression_ratio": 0.5, "budget": "uniform"})


def test_contexts_of_former_gates_are_made_anew() -> None:
    drive, _ = driven(size=4000, gates="former", method="gate", budget="uniform")
    context = drive.compress(array("q", range(40)))
    context.ttl_seconds, context.expires_at = 60.0, 2000.0
    other = drive.ask(array("q", range(100, 140)), settings=CompressionSettings.resolve({"compression_ratio": 0.5}))
    (job,) = jobs(drive.step())
    drive.forward(job)
    drive.end(job)
    drive.engine.queue.remove(other)
    begin_texts(drive)
    read_all(drive)
    assert call(drive, "state")["state"] == "done"
    assert context.state is ContextState.ABSENT and drive.matched(context) == 0
    assert (context.ttl_seconds, context.expires_at) == (60.0, 2000.0)
    assert drive.manager.cache.get(context.id) is context  # clients' ids of it go on to work
    assert other.context is not None and other.context.state is ContextState.RESIDENT


def test_a_pinned_context_of_former_gates_is_pinned_again_when_it_is_made_anew() -> None:
    drive, _ = driven()
    context = drive.compress(array("q", range(40)))
    drive.manager.cache.pin(context)
    drive.manager.cache.retire(context)
    assert (context.pinned, context.is_wanted_pinned, drive.accounts()[2]) == (False, True, 0)
    drive.ask(array("q", range(40)))
    (job,) = jobs(drive.step())
    drive.forward(job)
    drive.end(job)
    assert job.context is context and context.pinned


def test_the_switch_waits_for_compressions_with_former_gates() -> None:
    drive, rank = driven(size=4000, gates="former", method="gate", budget="uniform")
    begin_texts(drive)
    for _ in range(5):
        read_a_text(drive)
    req = drive.ask(array("q", range(40)))
    (job,) = [each for each in jobs(drive.step()) if each.context is req.context]
    drive.step()
    assert call(drive, "state")["state"] == "switching" and rank.installed == []
    drive.forward(job, KEPT)
    drive.end(job)
    drive.step()
    assert call(drive, "state")["state"] == "done" and len(rank.installed) == 1


# --- sums of several ranks ----------------------------------------------------------------------------------------------


def test_ranks_find_what_one_process_with_all_heads_finds() -> None:
    torch.manual_seed(1)
    model = ModelIdentity("LlamaForCausalLM", 2, 3, 3, 8, 24, 100, "0" * 16)
    whole = Findings(model, with_gates=True)
    ranks = [Findings(model, lanes=(first, last), with_gates=True) for first, last in ((0, 1), (1, 3))]
    for number in range(1, 11):
        scores = torch.rand(2, 3, LENGTH) * torch.logspace(-2, 2, 3)[:, None]
        scores[0, 1, 20] = 0.0
        keys_values = [(torch.randn(LENGTH, 3, 8), torch.randn(LENGTH, 3, 8)) for _ in range(2)]
        left_out = is_left_out(number, number, 10)
        whole.add(scores, iter(keys_values), left_out=left_out)
        for each in ranks:
            mine = [(k[:, each.lanes], v[:, each.lanes]) for k, v in keys_values]
            each.add(scores, iter(mine), left_out=left_out)
    gates, r_squared = whole.solve()
    # Layer by layer, as a server does.
    parts = [[each.solve(slice(layer, layer + 1)) for layer in range(2)] for each in ranks]
    weights = torch.cat([torch.cat([part[0].weights for part in rank]) for rank in parts], 1)
    bias = torch.cat([torch.cat([part[0].bias for part in rank]) for rank in parts], 1)
    torch.testing.assert_close(weights, gates.weights)
    torch.testing.assert_close(bias, gates.bias)
    torch.testing.assert_close(torch.cat([torch.cat([part[1] for part in rank]) for rank in parts], 1), r_squared)
    assert ranks[0].profile({}).shares == ranks[1].profile({}).shares == whole.profile({}).shares


class OneOfTwo(Rank):
    """A rank with one of two heads, which talks to the other one as in a server."""

    def __init__(self, rank: int, num_ranks: int = 2) -> None:
        super().__init__()
        self.lanes, self.is_first = (rank, rank + 1) if num_ranks == 2 else (0, 2), rank == 0
        self._num_ranks, self._group = num_ranks, None
        self.file: GateFile | None = None

    def identity(self) -> ModelIdentity:
        return replace(MODEL, num_key_value_heads=2, num_attention_heads=2)

    def keys_values(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.read.append(len(slots))
        drawn = torch.randn(2, len(slots), 2, 8, generator=torch.Generator().manual_seed(len(self.read)))
        return drawn[0][:, slice(*self.lanes)], drawn[1][:, slice(*self.lanes)]

    def of_all_ranks(self, own: torch.Tensor) -> torch.Tensor:
        """As of a real rank: [layers, kv_heads, ...]."""
        return RankGates.of_all_ranks(self, own)  # type: ignore[arg-type]

    def own(self, file: GateFile) -> Gates:
        self.file = file
        return file.gates


def calibrate_on(rank: int, num_ranks: int, folder: str) -> None:
    """What one process of a group does: five texts, one of which this rank alone fails to score. Leaves the gates in folder."""
    if num_ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    mine = OneOfTwo(rank, num_ranks)
    drive = Driven(3000, rank_gates=mine, agree=_agreement(None, num_ranks))
    drive.engine.tokenizer = Words()
    begin_texts(drive, 6)
    for number in range(1, 7):
        (job,) = jobs(drive.step())
        following = forward(drive, job)
        while following is not None:
            scores = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(number))[slice(*mine.lanes)]
            fails = number == 3 and rank == num_ranks - 1
            following = forward(drive, following, scores=None if fails else scores)
    for _ in range(3):
        drive.step()
    state = call(drive, "state")
    assert (state["state"], state["scored"], state["skipped"]) == ("done", 5, {"error": 1}), state
    assert mine.file is not None
    torch.save([mine.file.gates.weights, mine.file.gates.bias, mine.file.r_squared, mine.written], f"{folder}/{num_ranks}-{rank}")
    if num_ranks > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.long
def test_two_ranks_in_step_make_the_gates_of_one(tmp_path: Path) -> None:
    """In processes of their own, with real collectives: one that is not met by both would never return."""
    calibrate_on(0, 1, str(tmp_path))
    context = torch.multiprocessing.spawn(calibrate_on, (2, str(tmp_path)), nprocs=2, join=False)
    while not context.join(timeout=240):
        assert not all(each.is_alive() for each in context.processes), "a collective hangs"
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    for each in (first, second):
        torch.testing.assert_close(each[:3], one[:3])
    assert (one[3], first[3], second[3]) == ([None], [None], [])  # the first rank writes


# --- scores -------------------------------------------------------------------------------------------------------------


def test_a_text_is_scored_as_calibrate_scores_it() -> None:
    """Chunk by chunk and pass by pass, one pass retracted, from K and V in a pool."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(initializer_range=0.5)).eval()
    tokens = array("q", torch.randint(0, 128, (50,)).tolist())
    prompts = ReplayPrompts(Words())
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(model.state_dict())
    settings = scoring_settings()
    measurement = Measurement(Context("0" * 32, SHARED, settings, tokens, 25), lambda: None)
    for replayed in prompts.passes(tokens, 20):
        measurement.next_pass(replayed)
        inputs = attention_inputs(plain, tokens + replayed.tokens)
        _, keys, values = zip(*inputs, strict=True)
        pool = SimpleNamespace(get_key_buffer=keys.__getitem__, get_value_buffer=values.__getitem__)
        compressor = Compressor(pool, None)
        length, half = len(tokens) + len(replayed.tokens), len(replayed.tokens) // 2
        chunks = [(50, 50 + half), (50 + half, length)]
        for part in ([chunks[0], None] if replayed.first == 20 else []) + chunks:
            if part is None:
                measurement.restart_pass()
                continue
            first, last = part
            for number, (q, k, v) in enumerate(inputs):
                heads = (each[:last].transpose(0, 1).repeat_interleave(4 // each.shape[1], 0) for each in (q, k, v))
                output = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1)[first:last]
                rows = ScoringRows(3, last - first, first, torch.arange(last), last=False)
                # Rows of other requests stand before and after.
                given = [
                    torch.cat([torch.ones(3, 32), each.reshape(-1, 32), torch.ones(2, 32)]) for each in (q[first:last], output)
                ]
                layer = SimpleNamespace(
                    layer_id=number, logit_cap=0, is_cross_attention=False, tp_q_head_num=4, tp_k_head_num=2,
                    v_head_dim=8, qk_head_dim=8, scaling=8**-0.5,
                )  # fmt: skip
                measurement.score(compressor, rows, layer, AttentionCall(*given))
    scores, squares = measurement.result()
    wanted = calibrate.Replay(model, "obcache-v").score(tokens, prompts, chunk_tokens=20)
    torch.testing.assert_close(normalised(scores, squares), wanted, rtol=1e-4, atol=1e-7)


# --- a rank, and the tokenizer process ----------------------------------------------------------------------------------


def rank_gates(num_kv_heads: int = 4, num_ranks: int = 2, dp_size: int = 1, itemsize: int = 2) -> RankGates:
    pool = SimpleNamespace(dtype=torch.float16, store_dtype=SimpleNamespace(itemsize=itemsize), layer_num=0)
    scheduler = SimpleNamespace(
        attn_tp_cpu_group=None,
        attn_tp_group=SimpleNamespace(world_size=num_ranks, rank_in_group=0),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: num_kv_heads),
        server_args=SimpleNamespace(dp_size=dp_size),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Linear(1, 1), token_to_kv_pool=pool, device="cpu")),
    )
    return RankGates(scheduler, Compressor(pool, None, lanes=(0, num_kv_heads // num_ranks)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dp_size": 2}, "does not work with data parallelism"),
        ({"num_ranks": 8}, "the model has 4, for 8 ranks"),
        ({"num_ranks": 3}, "the model has 4, for 3 ranks"),
        ({"itemsize": 1}, "cannot read a KV cache of torch.float16. Start the server with --kv-cache-dtype auto"),
    ],
    ids=str,
)
def test_a_rank_says_why_it_cannot_make_gates(given: dict[str, int], words: str) -> None:
    refusal = rank_gates(**given).refusal()
    assert refusal is not None and words in refusal
    assert rank_gates().refusal() is None


def test_the_tokenizer_process_learns_of_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = SimpleNamespace(settings=ServerSettings.resolve({}))
    answer = {"ok": True, "state": "measuring", "made": 0, "default_follows": False, "file": None}

    async def ask(tokenizer_manager: Any, operation: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        return [(0, dict(answer))]

    monkeypatch.setattr(calibration_watch.control, "call", ask)
    monkeypatch.setattr(calibration_watch, "_PAUSE_SECONDS", 0.01)

    async def watched() -> None:
        watch = CalibrationWatch(frontend)
        assert (await watch.call(None, "state"))["default"] == {"method": "tova", "budget": "uniform"}
        assert frontend.settings.gates is None
        answer.update(state="done", made=1, default_follows=True, file="made")
        await asyncio.sleep(0.2)  # nobody asks
        assert frontend.settings == ServerSettings.resolve({"gates": "made"})
        # Gates were made anew, and the default is the operator's.
        frontend.settings = ServerSettings.resolve({"method": "snapkv"})
        answer.update(made=2, default_follows=False, file=None)
        assert (await watch.call(None, "state"))["default"]["method"] == "snapkv"
        assert frontend.settings.gates == calibration_watch.MADE_HERE
        answer.update(ok=False, status_code=409, error="A calibration is under way.")
        with pytest.raises(RequestError, match="under way"):
            await watch.call(None, "begin")

    asyncio.run(watched())


def test_with_serve_the_tokenizer_process_asks_from_the_first_request_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def ask(tokenizer_manager: Any, operation: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        asked.append(operation)
        return [(0, {"ok": True, "state": "done", "made": 1, "default_follows": True, "file": "made"})]

    monkeypatch.setattr(calibration_watch.control, "call", ask)
    monkeypatch.setattr(calibration_watch, "_PAUSE_SECONDS", 0.01)

    async def watched(**settings: Any) -> ServerSettings:
        frontend = SimpleNamespace(settings=ServerSettings.resolve(settings))
        watch = CalibrationWatch(frontend)
        for _ in range(3):
            watch.begin_if_asked(None)
        await asyncio.sleep(0.1)
        return frontend.settings

    assert asyncio.run(watched()).gates is None and asked == []
    assert asyncio.run(watched(calibrate="serve", gates="a file")).gates == "a file" and asked == []
    assert asyncio.run(watched(calibrate="serve")).compression.method == "gate" and len(asked) == 1


def test_settings_with_gates_are_those_of_a_start_with_gates() -> None:
    given = {"compression_ratio": 0.5, "min_tokens": 40}
    assert with_gates(ServerSettings.resolve(given), "file") == ServerSettings.resolve({**given, "gates": "file"})
    assert with_gates(ServerSettings.resolve({"pooling": "average"}), "file") is None
    assert ServerSettings.resolve({"calibrate": "serve"}).captures_decode_graphs


def test_the_next_start_with_serve_has_the_gates_of_the_last(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = ServerSettings.resolve({"calibrate": "serve"})
    assert plugin.with_measured_files(settings, str(model_dir)) == settings
    path = measured_files.made_gates_path(str(model_dir))
    assert path.parent == tmp_path / "obcache_sglang" and measured_files.made_gates(str(model_dir)) is None
    path.parent.mkdir()
    shutil.copy(PACKAGED / "smollm2-135m.gates.safetensors", path)
    later = plugin.with_measured_files(settings, str(model_dir))
    assert (later.gates, later.compression.method) == (str(path), "gate")
    assert measured_files.gates_for(str(model_dir)) == path  # before the package's
    path.write_bytes(b"broken")
    assert plugin.with_measured_files(settings, str(model_dir)) == settings
    assert measured_files.gates_for(str(model_dir)).parent == PACKAGED
    with pytest.raises(ConfigError, match="which other flags exclude"):
        plugin.with_measured_files(ServerSettings.resolve({"calibrate": "serve", "pooling": "average"}), str(model_dir))
