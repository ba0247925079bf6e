"""Contexts that last in files: what is written comes back cell by cell, and whatever is wrong with a file is a miss. On SGLang's own radix tree."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from obcache_sglang import contexts
from obcache_sglang.errors import ConfigError, RequestError
from obcache_sglang.kv import files as format_of_files
from obcache_sglang.kv.cells import KeptTokens, KVSpace
from obcache_sglang.kv.context import Context, ContextState, Namespace
from obcache_sglang.kv.files import BadFile, Head, Served
from obcache_sglang.kv.folder import KEY_FILE, Folder, listed
from obcache_sglang.scheduler import control_calls, file_threads, tree
from obcache_sglang.scheduler.context_files import ContextFiles
from obcache_sglang.scheduler.requests import CompressionJob, ContextReq
from tests.unit.engine import Driven, make_tree, sleeps
from tests.unit.test_manager import report

CONTEXT = array("q", range(100, 140))
LAYERS, HEADS, DIM, M = 3, 2, 8, 20
SERVED = Served("0" * 32, "float32", LAYERS, HEADS, DIM, DIM, page_size=1)
SHARED = Namespace(None, None, None)
BUDGETS: dict[str, dict[str, Any]] = {
    "uniform": {"budget": "uniform"},
    "adakv": {"budget": "adakv", "heads": "per-head"},
    "global": {"budget": "global", "heads": "per-head"},
    "profile": {"budget": "profile", "heads": "per-head", "head_profile": "smollm2-135m"},
}


def kept_by(budget: str) -> KeptTokens:
    """Which tokens heads keep, of M slots; with another number for each head where the budget allows it."""
    counts = [M] * LAYERS * HEADS
    if budget == "adakv":
        counts = [M - 5, M + 5] * LAYERS
    elif budget != "uniform":
        counts = [M - 7, M + 2, M + 9, M - 4, M, M]
    positions = torch.cat([torch.arange(count, dtype=torch.int32) + head for head, count in enumerate(counts)])
    return KeptTokens(positions, torch.tensor([0, *counts]).cumsum(0))


def server(
    folder: Path,
    agree: Any = bool,
    size: int = 300,
    served: Served = SERVED,
    chooser: str = "",
    *,
    save: str = "asked",
    most_bytes: int | None = None,
    **settings: Any,
) -> Driven:
    """A server whose contexts last in a folder."""
    made = make_tree(size, LAYERS, HEADS, getattr(torch, served.dtype))
    pool = made.token_to_kv_pool_allocator.get_kvcache()
    files = ContextFiles(Folder.opened(folder), served, lambda settings: chooser, pool, KVSpace.of(pool), save, most_bytes)
    return Driven(size, agree=agree, tree=made, files=files, **{**BUDGETS["uniform"], **settings})


def slots_of(drive: Driven, context: Context) -> torch.Tensor:
    found = tree.compressed_slots(drive.engine.tree, context)
    assert found is not None
    return found[1]


def content(drive: Driven, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of all cells of a context, in order."""
    space = KVSpace.of(drive.engine.tree.token_to_kv_pool_allocator.get_kvcache())
    assert space is not None
    rows = space.cell_rows(slots_of(drive, context))
    return space.k[rows].clone(), space.v[rows].clone()


def compressed(
    drive: Driven, budget: str = "uniform", tokens: array[int] = CONTEXT, kept: KeptTokens | None = None, **ask: Any
) -> Context:
    """A context with content of its own."""
    req = drive.ask(tokens, **ask)
    deadline = time.monotonic() + 20
    while not (jobs := [each for each in drive.step() if isinstance(each, CompressionJob)]):
        assert time.monotonic() < deadline
    drive.forward(jobs[0], kept or kept_by(budget))
    drive.end(jobs[0])
    drive.step()
    drive.engine.queue.remove(req)
    assert req.context is not None
    slots = slots_of(drive, req.context)
    pool = drive.engine.tree.token_to_kv_pool_allocator.get_kvcache()
    for layer in range(LAYERS):
        for buffer in (pool.get_key_buffer(layer), pool.get_value_buffer(layer)):
            buffer[slots] = torch.randn(len(slots), HEADS, DIM, generator=torch.Generator().manual_seed(layer)).to(buffer.dtype)
    return req.context


def result(drive: Driven, asked: str) -> dict[str, Any]:
    """What came of a save or a load."""
    deadline = time.monotonic() + 20
    while (found := drive.manager.stored.result(asked)) is not None and found["state"] == "under way":
        assert time.monotonic() < deadline
    assert found is not None
    return found


def saved(drive: Driven, context: Context) -> str:
    """The name of the file that a context is saved to."""
    drive.manager.stored.save(context, "a save")
    found = result(drive, "a save")
    assert found["state"] == "done", found
    name: str = found["file"]
    return name


def decided(drive: Driven, req: ContextReq) -> str:
    """What becomes of a question: the status of its report, or "job" where its context is compressed for it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        admitted = drive.step()
        if any(isinstance(each, CompressionJob) for each in admitted):
            return "job"
        if req in admitted:
            return str(report(req)["status"])
    raise AssertionError("the question waits for ever")


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_context_comes_back_cell_by_cell(tmp_path: Path, budget: str) -> None:
    first = server(tmp_path, **BUDGETS[budget])
    context = compressed(first, budget)
    before, written = content(first, context), context.kept
    free = first.accounts()
    saved(first, context)
    assert first.accounts() == free, "it is held no longer"

    second = server(tmp_path, **BUDGETS[budget])
    req = second.ask(CONTEXT)
    assert decided(second, req) == "reused"
    assert (report(req)["tier"], req.is_virtual) == ("disk", True)
    loaded = req.context
    assert loaded is not None and loaded.kept is not None and written is not None
    assert loaded.kept.positions.equal(written.positions) and loaded.kept.offsets.equal(written.offsets)
    assert all(one.equal(other) for one, other in zip(before, content(second, loaded), strict=True))
    assert second.accounts() == (300 - M, M, 0)
    assert (loaded.kept.rows is not None) == (budget != "uniform")
    if loaded.kept.rows is not None:
        space = KVSpace.of(second.engine.tree.token_to_kv_pool_allocator.get_kvcache())
        assert space is not None
        assert loaded.kept.rows.tolist() == space.cell_rows(slots_of(second, loaded)).tolist()
    again = second.ask(CONTEXT, question=8)
    assert decided(second, again) == "reused"
    assert report(again)["tier"] == "device"
    counters = second.manager.metrics.to_dict()
    assert (counters["file_loads"], counters["file_misses"], counters["compressions"]) == (1, 0, 0)


@pytest.mark.parametrize("budget", ["uniform", "profile"])
@pytest.mark.parametrize("is_cached", [True, False])
def test_exact_text_before_a_context_lasts_with_it(tmp_path: Path, budget: str, is_cached: bool) -> None:
    """Where the tree has it the context shares it as before; else its slots are the context's own, with what the file has."""
    num_exact, given = 8, {"method": "gate", "gates": "smollm2-135m", "budget": budget}
    num_slots = num_exact + (len(CONTEXT) - num_exact) // 2
    counts = [num_slots] * LAYERS * HEADS if budget == "uniform" else [num_slots - 3, num_slots + 3] * LAYERS
    positions = torch.cat([torch.arange(count, dtype=torch.int32) for count in counts])
    kept = KeptTokens(positions, torch.tensor([0, *counts]).cumsum(0), num_exact=num_exact)

    def cells(drive: Driven, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all that it keeps, in order."""
        space = KVSpace.of(drive.engine.tree.token_to_kv_pool_allocator.get_kvcache())
        assert space is not None and context.kept is not None
        rows = context.kept.rows_in(space, slots_of(drive, context))
        assert context.kept.rows is None or context.kept.rows.tolist() == rows.tolist()
        return space.k[rows].clone(), space.v[rows].clone()

    def cache_exactly(drive: Driven, value: float) -> torch.Tensor:
        """The text before the context, and its slots."""
        slots = drive.engine.tree.token_to_kv_pool_allocator.alloc(num_exact)
        drive.engine.tree.insert(InsertParams(key=RadixKey(CONTEXT[:num_exact], None), value=slots))
        pool = drive.engine.tree.token_to_kv_pool_allocator.get_kvcache()
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer[slots] = value
        return slots

    first = server(tmp_path, **given)
    settings = replace(first.manager.settings.compression, exact_tokens=num_exact)
    shared = cache_exactly(first, 0.5)
    context = compressed(first, settings=settings, kept=kept)
    assert (context.num_slots, context.own_slots) == (num_slots, num_slots - num_exact)
    assert slots_of(first, context)[:num_exact].tolist() == shared.tolist()
    saved(first, context)
    before = cells(first, context)

    second = server(tmp_path, **given)
    if is_cached:
        shared = cache_exactly(second, 0.25)  # exact text as this server has computed it
    req = second.ask(CONTEXT, settings=settings)
    assert decided(second, req) == "reused"
    loaded = req.context
    assert loaded is not None
    assert (loaded.owns_exact, loaded.own_slots) == (not is_cached, num_slots - num_exact * is_cached)
    assert second.accounts() == (300 - num_slots, num_slots, 0)
    after = cells(second, loaded)
    if is_cached:
        assert slots_of(second, loaded)[:num_exact].tolist() == shared.tolist()
        heads = torch.cat([torch.arange(count) for count in counts]) < num_exact
        assert all((each[heads] == 0.25).all() for each in after), "what others read is not written"
        assert all(one[~heads].equal(other[~heads]) for one, other in zip(before, after, strict=True))
    else:
        assert all(one.equal(other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_come_back_as_they_were(tmp_path: Path, dtype: str) -> None:
    served = replace(SERVED, dtype=dtype)
    first, second = server(tmp_path, served=served), server(tmp_path, served=served)
    before = content(first, context := compressed(first))
    saved(first, context)
    assert decided(second, req := second.ask(CONTEXT)) == "reused"
    assert req.context is not None
    assert before[0].dtype == getattr(torch, dtype)
    assert all(one.equal(other) for one, other in zip(before, content(second, req.context), strict=True))


def test_the_file_is_a_safetensors_file_of_little_more_than_k_and_v(tmp_path: Path) -> None:
    drive = server(tmp_path)
    saved(drive, compressed(drive))
    tensors = safetensors.torch.load_file(the_file(tmp_path))
    assert tensors["k"].shape == tensors["v"].shape == (LAYERS, M, HEADS, DIM)
    assert tensors["tokens"].tolist() == CONTEXT.tolist()
    assert the_file(tmp_path).stat().st_mode & 0o777 == (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600


# --- whatever is wrong is a miss ----------------------------------------------------------------------------------------------------


def flip(file: Path, offset: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def of_another_format(file: Path) -> None:
    raw = file.read_bytes()
    before, after = b'\\"format\\": 1', b'\\"format\\": 2'
    assert raw.count(before) == 1
    file.write_bytes(raw.replace(before, after))


def a_link(file: Path) -> None:
    moved = file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(moved)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of v": (lambda file: flip(file, -1), "checksum"),
    "a byte of k": (lambda file: flip(file, -3 * M * HEADS * DIM * 4 - 5), "checksum"),
    "a token": (lambda file: flip(file, file.read_bytes().index(CONTEXT.tobytes())), "its name stands for"),
    "the header": (lambda file: flip(file, 0), "header|metadata"),
    "truncated": (cut, "torn"),
    "empty": (emptied, "torn|header"),
    "another format": (of_another_format, "format 2"),
    "a link": (a_link, "symbolic links"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_miss_with_one_line_in_the_log(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    first, second = server(folder), server(folder)
    saved(first, compressed(first))
    change, said = DAMAGES[damage]
    change(the_file(folder))
    caplog.set_level(logging.WARNING)
    req = second.ask(CONTEXT)
    assert decided(second, req) == "job"
    (line,) = [each for each in caplog.messages if "is not used" in each]
    assert re.search(said, line), line
    assert second.accounts() == (300, 0, 0), "nothing is lost"
    # It is remembered: the next one does not read it again.
    context = req.context
    assert context is not None
    (job,) = second.manager.jobs.all()
    second.forward(job, kept_by("uniform"))
    second.end(job)
    second.evict_all()
    second.engine.queue.clear()
    assert decided(second, second.ask(CONTEXT, question=9)) == "job"
    assert len([each for each in caplog.messages if "is not used" in each]) == 1
    assert second.manager.metrics.to_dict()["file_misses"] == 1


@pytest.mark.parametrize(
    "other",
    [
        {"compression_ratio": 0.4},
        {"budget": "adakv", "heads": "per-head"},
        {"served": replace(SERVED, model="1" * 32)},
        {"served": replace(SERVED, dtype="float16")},
        {"served": replace(SERVED, rank=0, num_ranks=2)},
        {"served": replace(SERVED, rank=1, num_ranks=2)},
        {"chooser": "other gates"},
    ],
    ids=str,
)
def test_another_server_does_not_find_it(tmp_path: Path, other: dict[str, Any]) -> None:
    first, second = server(tmp_path), server(tmp_path, **other)
    saved(first, compressed(first))
    assert decided(second, second.ask(CONTEXT)) == "job"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"served": replace(SERVED, model="1" * 32)}, "model"),
        ({"served": replace(SERVED, dtype="float16")}, "dtype"),
        ({"chooser": "other gates"}, "other gates"),
    ],
)
def test_a_file_of_another_server_under_the_right_name_is_refused(
    tmp_path: Path, other: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As it would be with a digest that does not tell them apart."""
    first, second = server(tmp_path), server(tmp_path, **other)
    name = saved(first, context := compressed(first))
    own = second.manager.cache.obtain(SHARED, context.settings, CONTEXT)
    assert own is not None
    own.file_name = name
    assert decided(second, second.ask(CONTEXT)) == "job"
    (line,) = [each for each in caplog.messages if "is not used" in each]
    assert said in line


def test_namespaces_stay_apart_and_no_salt_is_on_the_disk(tmp_path: Path) -> None:
    first, second = server(tmp_path), server(tmp_path)
    req = first.ask(CONTEXT)
    assert decided(first, req) == "job"
    salted = first.manager.cache.obtain(Namespace(None, "the salt", None), first.manager.settings.compression, CONTEXT)
    plain = req.context
    assert salted is not None and plain is not None
    files = first.manager.stored._files
    assert files is not None
    assert files.name(salted) != files.name(plain)
    (job,) = first.manager.jobs.all()
    first.forward(job, kept_by("uniform"))
    first.end(job)
    name = saved(first, plain)
    with pytest.raises(RequestError, match="64 hexadecimal"):
        second.manager.stored.load("../" + name, SHARED, "outside")
    second.manager.stored.load(name, Namespace(None, "the salt", None), "a load")
    failed = result(second, "a load")
    assert (failed["state"], failed["missing"]) == ("failed", True)
    second.manager.stored.load(name, SHARED, "another")
    assert result(second, "another")["state"] == "done"
    folder = Folder.opened(tmp_path)
    assert [each["file"] for each in listed(folder, SHARED)] == [name]
    assert listed(folder, Namespace(None, "the salt", None)) == []


def test_names_depend_on_the_key_of_the_folder(tmp_path: Path) -> None:
    names = []
    for folder in ("one", "other"):
        drive = server(tmp_path / folder)
        names.append(saved(drive, compressed(drive)))
    assert names[0] != names[1]


# --- several ranks ------------------------------------------------------------------------------------------------------------------


class Ranks:
    """Ranks of one group, each in a thread of its own. A vote that not all come to ends the test."""

    def __init__(self, number: int = 2) -> None:
        self._barrier = threading.Barrier(number, timeout=20)
        self._votes = [True] * number
        self.num_votes = [0] * number

    def agree(self, rank: int) -> Callable[[bool], bool]:
        def vote(verdict: bool) -> bool:
            self.num_votes[rank] += 1
            self._votes[rank] = verdict
            self._barrier.wait()
            agreed = all(self._votes)
            self._barrier.wait()
            return agreed

        return vote

    def run(self, what: Callable[[int], Any]) -> list[Any]:
        """What each rank returns."""
        found: list[Any] = [None] * len(self._votes)

        def of(rank: int) -> None:
            try:
                found[rank] = what(rank)
            except BaseException:
                self._barrier.abort()
                raise

        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(len(found))]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return found


def rank_of_two(folder: Path, ranks: Ranks, rank: int, **options: Any) -> Driven:
    return server(folder, agree=ranks.agree(rank), served=replace(SERVED, rank=rank, num_ranks=2), **options)


def steps(drive: Driven, req: ContextReq, number: int = 60) -> list[str]:
    """The same number of passes on each rank: what a question came to in each."""
    seen = []
    for _ in range(number):
        admitted = drive.step()
        jobs = any(isinstance(each, CompressionJob) for each in admitted)
        seen.append("job" if jobs else str(report(req)["status"]) if req in admitted else "held")
    return seen


@pytest.mark.parametrize("damage", [None, "missing", "a byte of v", "truncated"])
def test_ranks_do_the_same_whatever_one_of_them_finds(tmp_path: Path, damage: str | None) -> None:
    writers = Ranks()

    def write(rank: int) -> str:
        drive = rank_of_two(tmp_path, writers, rank)
        context = compressed(drive)
        drive.manager.stored.save(context, "a save")
        for _ in range(60):
            drive.step()
        found = drive.manager.stored._files
        assert found is not None
        return str(found.results["a save"]["file"])

    names = writers.run(write)
    assert names[0] == names[1] is not None
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name.split(".")[1] for file in files] == ["0of2", "1of2"]
    if damage == "missing":
        files[1].unlink()
    elif damage is not None:
        DAMAGES[damage][0](files[1])
    readers = Ranks()

    def read(rank: int) -> tuple[list[str], Any]:
        drive = rank_of_two(tmp_path, readers, rank)
        seen = steps(drive, drive.ask(CONTEXT))
        return seen, drive.accounts()

    one, other = readers.run(read)
    assert one == other and readers.num_votes[0] == readers.num_votes[1]
    assert ("reused" if damage is None else "job") in one[0]
    assert ("job" if damage is None else "reused") not in one[0]


def test_a_rank_that_cannot_write_leaves_no_file_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    original = format_of_files.Writer.finish

    def finish(writer: Any) -> int:
        if writer.head.served.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(writer)

    monkeypatch.setattr(format_of_files.Writer, "finish", finish)

    def write(rank: int) -> tuple[dict[str, Any], Any]:
        drive = rank_of_two(tmp_path, ranks, rank)
        drive.manager.stored.save(compressed(drive), "a save")
        for _ in range(60):
            drive.step()
        assert drive.manager.stored._files is not None
        return drive.manager.stored._files.results["a save"], drive.accounts()

    (one, accounts), (other, others) = ranks.run(write)
    assert one["state"] == other["state"] == "failed"
    assert "No space left" in other["error"] and "another rank" in one["error"]
    assert accounts == others and accounts[2] == 0
    wait_for(lambda: [file.name for file in tmp_path.iterdir()] == [KEY_FILE])


# --- disks that fail or stall -------------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_disk_that_stalls_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = server(tmp_path), server(tmp_path)
    saved(first, compressed(first))
    answers = threading.Event()
    monkeypatch.setattr(file_threads, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(format_of_files.Reader, "layer", lambda *_: answers.wait(20))
    started = time.monotonic()
    assert decided(second, second.ask(CONTEXT)) == "job"
    assert time.monotonic() - started < 5
    # Until it answers nobody waits for it.
    second.ask(array("q", range(500, 540)), question=8)
    second.step()
    assert second.manager.stored._loads.under_way == []
    answers.set()
    wait_for(lambda: second.manager.stored._files is not None and second.manager.stored._files.may_read("0" * 64))


def test_a_disk_that_is_full_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = server(tmp_path)
    context = compressed(drive)

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        drive.manager.stored.save(context, "a save")
        found = result(drive, "a save")
    assert (found["state"], "No space left on device" in found["error"]) == ("failed", True)
    wait_for(lambda: [file.name for file in tmp_path.iterdir()] == [KEY_FILE])
    assert drive.accounts()[2] == 0
    wait_for(lambda: not drive.manager.stored._files.going)  # type: ignore[union-attr]
    assert saved(drive, context)


def test_a_folder_that_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Give a folder that this user may write to"):
        Folder.opened(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / KEY_FILE).write_bytes(b"short")
    with pytest.raises(ConfigError, match="not a key"):
        Folder.opened(tmp_path / "folder")


def test_what_a_writer_left_that_was_killed_is_no_file_and_goes(tmp_path: Path) -> None:
    drive = server(tmp_path)
    name = saved(drive, compressed(drive))
    left = tmp_path / f".{name}.0of1.0123456789abcdef.partial"
    the_file(tmp_path).rename(left)
    folder = Folder.opened(tmp_path)
    assert folder.complete() == {}
    folder.clean()
    assert left.exists(), "its writer may be alive"
    os.utime(left, (0, 0))
    folder.clean()
    assert not left.exists()


# --- what else happens --------------------------------------------------------------------------------------------------------------


def test_deleting_a_context_deletes_its_file(tmp_path: Path) -> None:
    drive = server(tmp_path)
    context = compressed(drive)
    saved(drive, context)
    listing = {"op": "list", "namespace": None}
    assert control_calls.answer(drive.manager, listing)["contexts"][0]["on_disk"]
    answer = control_calls.answer(drive.manager, {"op": "delete", "name": context.id, "namespace": None})
    assert answer["ok"]
    wait_for(lambda: not list(tmp_path.glob("*.safetensors")))
    assert decided(drive, drive.ask(CONTEXT)) == "job"


def test_one_that_is_only_on_the_disk_is_listed_and_deleted(tmp_path: Path) -> None:
    drive = server(tmp_path)
    context = compressed(drive)
    saved(drive, context)
    drive.evict_all()
    (shown,) = control_calls.answer(drive.manager, {"op": "list", "namespace": None})["contexts"]
    assert (shown["state"], shown["slots"], shown["on_disk"]) == ("absent", 0, True)
    assert control_calls.answer(drive.manager, {"op": "delete", "name": context.id, "namespace": None})["gone"]
    wait_for(lambda: not list(tmp_path.glob("*.safetensors")))
    assert decided(drive, drive.ask(CONTEXT)) == "job"


def test_a_context_that_expires_takes_its_file_with_it(tmp_path: Path) -> None:
    drive = server(tmp_path)
    context = compressed(drive, ttl_seconds=10.0)
    saved(drive, context)
    drive.manager.advance_clock(drive.now + 20)
    wait_for(lambda: not list(tmp_path.glob("*.safetensors")))


def test_a_context_that_is_deleted_while_it_is_saved_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = server(tmp_path)
    context = compressed(drive)
    goes_on = threading.Event()
    original = format_of_files.Writer.layer

    def layer(*args: Any) -> None:
        goes_on.wait(20)
        original(*args)

    monkeypatch.setattr(format_of_files.Writer, "layer", layer)
    drive.manager.stored.save(context, "a save")
    drive.step()
    control_calls.answer(drive.manager, {"op": "delete", "name": context.id, "namespace": None})
    assert drive.accounts() == (300, 0, 0), "it is held no longer"
    goes_on.set()
    assert result(drive, "a save")["state"] == "failed"
    wait_for(lambda: [file.name for file in tmp_path.iterdir()] == [KEY_FILE])


def test_a_context_that_is_replaced_while_it_is_saved_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the ladder does: its slots are another one's from then on."""
    drive = server(tmp_path)
    context = compressed(drive)
    with monkeypatch.context() as patched:
        patched.setattr(file_threads.Writing, "has_room", False)
        drive.manager.stored.save(context, "a save")
        drive.step()
    drive.manager.cache.replaced(context, replace(context))
    assert "not resident" in result(drive, "a save")["error"]
    wait_for(lambda: [file.name for file in tmp_path.iterdir()] == [KEY_FILE])
    drive.evict_all()
    assert drive.accounts() == (300, 0, 0)


def test_a_flush_ends_loads_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = server(tmp_path), server(tmp_path)
    saved(first, context := compressed(first))
    monkeypatch.setattr(file_threads.Reading, "take", lambda reading: None)
    monkeypatch.setattr(file_threads.Writing, "has_room", False)
    req = second.ask(CONTEXT)
    while req.context is None or req.context.state is not ContextState.COMPRESSING:
        assert second.step() == []
    first.manager.stored.save(context, "a save")
    first.step()
    for drive in (first, second):
        drive.engine.queue.clear()
        drive.engine.tree.reset()
        drive.engine.tree.token_to_kv_pool_allocator.clear()
        drive.manager.after_flush()
        assert drive.accounts() == (300, 0, 0)
    assert "flushed" in result(first, "a save")["error"]
    assert req.context.state is ContextState.ABSENT and not req.context.is_queued
    monkeypatch.undo()
    assert decided(second, second.ask(CONTEXT)) == "reused"


def test_where_requests_run_it_goes_on_in_bounded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = server(tmp_path), server(tmp_path)
    saved(first, compressed(first))
    monkeypatch.setattr("obcache_sglang.scheduler.context_files.STEP_BYTES", 1)
    second.engine.running = [object()]  # type: ignore[list-item]
    req = second.ask(CONTEXT)
    done: list[int] = []
    deadline = time.monotonic() + 20
    while req not in second.step():
        assert time.monotonic() < deadline
        loads = second.manager.stored._loads.under_way
        done += [load.num_layers_done for load in loads if not done or load.num_layers_done != done[-1]]
    assert [each for each in done if each] == [1, 2, 3][: len([each for each in done if each])]
    assert 1 in done and 2 in done


@pytest.mark.parametrize("name", ["publish", "reserve", "withdraw"])
def test_a_defect_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    first, second = server(tmp_path), server(tmp_path)
    saved(first, compressed(first))
    failed = []

    def defect(*args: Any, **more: Any) -> None:
        failed.append(name)
        raise RuntimeError("a defect")

    with monkeypatch.context() as patched:
        for each in {name, "publish"} if name == "withdraw" else {name}:  # what is published is not withdrawn
            patched.setattr(second.manager.cache, each, defect)
        req = second.ask(CONTEXT)
        deadline = time.monotonic() + 20
        while len(failed) < (2 if name == "withdraw" else 1):
            second.step()
            assert time.monotonic() < deadline
    assert decided(second, req) in ("job", "exact")
    second.manager.sweep()
    assert second.accounts() == (300, 0, 0)


def test_a_pool_without_room_compresses_or_serves_as_without_a_file(tmp_path: Path) -> None:
    first, second = server(tmp_path), server(tmp_path, size=M - 2)
    saved(first, compressed(first))
    assert decided(second, second.ask(CONTEXT)) == "exact"
    assert second.accounts() == (M - 2, 0, 0)


def test_preloading_takes_those_used_last_as_far_as_they_fit(tmp_path: Path) -> None:
    first = server(tmp_path)
    texts = [array("q", range(1000 * number, 1000 * number + 40)) for number in range(1, 6)]
    for age, text in enumerate(texts):
        name = saved(first, compressed(first, tokens=text))
        os.utime(tmp_path / f"{name}.0of1.context.safetensors", (10_000 - age, 10_000 - age))
    second = server(tmp_path, size=90)
    second.manager.stored.preload()
    there = [each.tokens for each in second.manager.cache if second.manager.cache.is_resident(each)]
    assert there == [texts[3], texts[2], texts[1], texts[0]]  # the one used last goes last
    assert second.manager.metrics.to_dict()["file_loads"] == 4, "what does not fit is not read"
    req = second.ask(texts[0])
    assert decided(second, req) == "reused"
    assert report(req)["tier"] == "device"


def test_contexts_of_adapters_are_not_saved(tmp_path: Path) -> None:
    drive = server(tmp_path)
    context = compressed(drive)
    object.__setattr__(context.namespace, "lora_id", "an adapter")
    answer = control_calls.answer(drive.manager, {"op": "save", "name": context.id, "namespace": None, "asked": "a save"})
    assert (answer["ok"], answer["status_code"], "LoRA" in answer["error"]) == (False, 400, True)


def test_updated_weights_turn_files_off(tmp_path: Path) -> None:
    first, second = server(tmp_path), server(tmp_path)
    saved(first, compressed(first))
    second.manager.stored.turn_off("the model's weights were updated")
    assert decided(second, second.ask(CONTEXT)) == "job"
    with pytest.raises(RequestError, match="weights were updated"):
        second.manager.stored.load("0" * 64, SHARED, "a load")
    # What is deleted is deleted everywhere all the same.
    context = compressed(second)
    second.manager.cache.delete(context)
    wait_for(lambda: [file.name for file in tmp_path.iterdir()] == [KEY_FILE])


def test_the_command_lists_verifies_and_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drive = server(tmp_path / "folder")
    name = saved(drive, compressed(drive))
    folder = ["--folder", str(tmp_path / "folder")]
    assert contexts.main(["list", *folder]) == 0
    assert capsys.readouterr().out.startswith(f"{name}  40 tokens, 20 kept, 0.0 MB, tova uniform ratio 0.5")
    assert contexts.main(["verify", *folder]) == 0
    assert capsys.readouterr().out.endswith("ok\n")
    flip(the_file(tmp_path / "folder"), -1)
    assert contexts.main(["verify", *folder]) == 1
    assert "corrupt" in capsys.readouterr().out
    assert contexts.main(["delete", *folder, name]) == 0
    assert not list((tmp_path / "folder").glob("*.safetensors"))
    assert contexts.main(["list", "--folder", str(tmp_path)]) == 1
    assert "No such file" in capsys.readouterr().err


def test_heads_that_mean_nothing_are_refused() -> None:
    settings = Driven().manager.settings.compression
    text = Head(SERVED, settings, "", 40, M, 0).to_json()
    assert Head.from_json(text).num_slots == M
    for name, value in (
        ("num_slots", 0),
        ("num_slots", "20"),
        ("num_tokens", -1),
        ("num_judges", -1),
        ("settings", {"method": "x"}),
    ):
        with pytest.raises(BadFile):
            Head.from_json(json.dumps(json.loads(text) | {name: value}))
    with pytest.raises(BadFile):
        Head.from_json("[]")


def test_a_save_waits_for_the_deletion_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deletions are by name, and a slow disk may come to one long after."""
    drive = server(tmp_path)
    context = compressed(drive)
    saved(drive, context)
    held = threading.Event()
    delete = Folder.delete
    monkeypatch.setattr(Folder, "delete", lambda self, name: held.wait(20) and delete(self, name))
    drive.manager.cache.delete(context)
    drive.manager.sweep()
    again = compressed(drive)
    with pytest.raises(RequestError, match="is being deleted"):
        drive.manager.stored.save(again, "too early")
    held.set()
    wait_for(lambda: not drive.manager.stored._files.going)  # type: ignore[union-attr]
    saved(drive, again)
    assert the_file(tmp_path)


def test_a_file_lives_no_longer_than_its_context_was_to(tmp_path: Path) -> None:
    """Also where the context has been evicted, and on the next server."""
    first, second, third = (server(tmp_path) for _ in range(3))
    for drive in (first, second, third):
        drive.now = time.time()
    context = compressed(first, ttl_seconds=60.0)
    saved(first, context)
    first.evict_all()
    req = second.ask(CONTEXT)
    assert decided(second, req) == "reused" and req.context is not None
    assert req.context.expires_at == pytest.approx(first.now + 60, abs=1)
    assert control_calls.answer(first.manager, {"op": "expire", "now": first.now + 30})["next"] == pytest.approx(
        first.now + 60, abs=1
    )
    assert the_file(tmp_path)
    assert control_calls.answer(first.manager, {"op": "expire", "now": first.now + 61})["next"] is None
    wait_for(lambda: [file.name for file in tmp_path.iterdir()] == [KEY_FILE])
    assert decided(third, third.ask(CONTEXT)) == "job"


def test_a_file_whose_time_has_passed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = server(tmp_path), server(tmp_path)
    first.now = time.time()
    saved(first, compressed(first, ttl_seconds=60.0))
    monkeypatch.setattr("obcache_sglang.kv.files.time.time", lambda: first.now + 61)
    assert decided(second, second.ask(CONTEXT)) == "job"


def test_whether_one_file_is_there_is_told_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = server(tmp_path)
    names = [saved(drive, compressed(drive, tokens=array("q", range(first, first + 40)))) for first in (100, 200, 300)]
    folder, opened = Folder.opened(tmp_path), []
    reading = Folder.reading
    monkeypatch.setattr(Folder, "reading", lambda self, name, *rank: opened.append(name) or reading(self, name, *rank))
    assert [each["file"] for each in listed(folder, SHARED, only=names[1])] == [names[1]] == opened
    assert listed(folder, Namespace(None, "another", None), only=names[1]) == listed(folder, SHARED, only="0" * 64) == []
    assert {each["file"] for each in listed(folder, SHARED)} == {*names}


# --- saved without anybody's asking --------------------------------------------------------------------------------------------------


def files_of(drive: Driven) -> ContextFiles:
    found = drive.manager.stored._files
    assert found is not None
    return found


def settled(drive: Driven, folder: Path) -> list[str]:
    """The names of the files once nothing is being saved any more."""
    deadline = time.monotonic() + 20
    saves = drive.manager.stored._saves
    drive.step()
    while saves.under_way or saves._waiting:
        assert time.monotonic() < deadline
        drive.step()
    return sorted(each.name for each in Folder.opened(folder).entries())


def names_in(folder: Path) -> set[str]:
    """Of the contexts that have files there."""
    return {each.name for each in Folder.opened(folder).entries()}


def file_size(folder: Path) -> int:
    """Of one of the files there, which are of equally long contexts."""
    return Folder.opened(folder).entries()[0].num_bytes


@contextmanager
def nothing_begins(drive: Driven) -> Iterator[None]:
    """What is to be saved waits, until the block ends."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drive.manager.stored._saves, "_begin_waiting", lambda: None)
        yield


def finish_waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set no file becomes complete."""
    may_go_on = threading.Event()
    original = format_of_files.Writer.finish
    monkeypatch.setattr(format_of_files.Writer, "finish", lambda writer: (may_go_on.wait(20), original(writer))[1])
    return may_go_on


def answered(drive: Driven, tokens: array[int] = CONTEXT) -> str:
    """What a question comes to; it ends at once."""
    req = drive.ask(tokens, question=9)
    found = decided(drive, req)
    drive.engine.queue[:] = [each for each in drive.engine.queue if each is not req]
    return found


def counters(drive: Driven) -> dict[str, Any]:
    return drive.manager.metrics.to_dict()


def test_each_context_is_saved_once_it_is_compressed(tmp_path: Path) -> None:
    first = server(tmp_path, save="compressed")
    context = compressed(first)
    assert settled(first, tmp_path) == [files_of(first).name(context)]
    assert answered(first) == "reused"
    second = server(tmp_path, save="compressed")
    assert answered(second) == "reused"
    settled(second, tmp_path)
    assert (counters(second)["file_loads"], counters(second)["file_saves"]) == (1, 0), "it was saved already"
    assert counters(first)["file_saves"] == 1
    (entry,) = Folder.opened(tmp_path).entries()
    wait_for(lambda: first.step() is not None and counters(first)["folder_bytes"] == entry.num_bytes)
    assert (counters(first)["folder_contexts"], counters(second)["folder_contexts"]) == (1, 1)
    assert first.accounts()[2] == second.accounts()[2] == 0, "nothing is held any more"


def test_a_scheduler_stays_awake_while_contexts_are_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps for a second where nobody sends anything, and each step is a pass of its own."""
    drive = server(tmp_path, save="compressed")
    assert sleeps(drive)
    may_go_on = finish_waits(monkeypatch)
    with nothing_begins(drive):
        compressed(drive)
        assert not sleeps(drive), "its turn comes with the next pass"
    drive.step()
    assert drive.manager.stored._saves.under_way and not sleeps(drive)
    may_go_on.set()
    (name,) = settled(drive, tmp_path)
    assert sleeps(drive)
    drive.evict_all()
    drive.manager.stored.load(name, SHARED, "a load")
    assert not sleeps(drive)
    result(drive, "a load")
    assert sleeps(drive)


def test_a_scheduler_sleeps_while_a_disk_that_has_refused_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = server(tmp_path, save="compressed")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with nothing_begins(drive):
        compressed(drive), compressed(drive, tokens=array("q", range(500, 540)))
    saves = drive.manager.stored._saves
    wait_for(lambda: drive.step() is not None and not saves.under_way)
    assert saves._waiting and not drive.manager.stored.is_busy and drive.manager.stored.num_unsaved == 0


def test_each_context_is_saved_once_a_second_question_reads_it(tmp_path: Path) -> None:
    drive = server(tmp_path, save="reused")
    first, second = compressed(drive), compressed(drive, tokens=array("q", range(500, 540)))
    # Its first question, for which it was compressed, is not a second one.
    assert settled(drive, tmp_path) == []
    for _ in range(3):
        assert answered(drive) == "reused"
    assert settled(drive, tmp_path) == [files_of(drive).name(first)]
    assert counters(drive)["file_saves"] == 1
    assert answered(drive, second.tokens) == "reused"
    assert len(settled(drive, tmp_path)) == 2


def test_nothing_is_saved_that_nobody_asks_for_by_default(tmp_path: Path) -> None:
    drive = server(tmp_path)
    compressed(drive)
    assert answered(drive) == "reused"
    assert settled(drive, tmp_path) == []


def test_one_that_is_gone_before_its_turn_is_counted_and_saved_when_it_is_made_again(tmp_path: Path) -> None:
    drive = server(tmp_path, save="compressed")
    with nothing_begins(drive):
        context = compressed(drive)
    drive.manager.cache.drop_node(context)
    assert settled(drive, tmp_path) == []
    assert counters(drive)["file_unsaved"] == 1
    compressed(drive)
    assert settled(drive, tmp_path) == [files_of(drive).name(context)]


def test_of_too_many_the_first_to_come_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.saves.MOST_WAITING", 2)
    drive = server(tmp_path, save="compressed")
    with nothing_begins(drive):
        made = [compressed(drive, tokens=array("q", range(first, first + 40))) for first in (100, 200, 300)]
    assert settled(drive, tmp_path) == sorted(files_of(drive).name(each) for each in made[1:])
    assert counters(drive)["file_unsaved"] == 1


def test_a_deleted_one_is_not_saved(tmp_path: Path) -> None:
    drive = server(tmp_path, save="compressed")
    with nothing_begins(drive):
        context = compressed(drive)
    drive.manager.cache.delete(context)
    drive.manager.sweep()
    assert settled(drive, tmp_path) == []


def test_updated_weights_end_what_waits(tmp_path: Path) -> None:
    drive = server(tmp_path, save="compressed")
    with nothing_begins(drive):
        compressed(drive)
    drive.manager.stored.turn_off("the weights were updated")
    compressed(drive, tokens=array("q", range(500, 540)))
    assert settled(drive, tmp_path) == []


def test_places_stay_for_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = server(tmp_path, save="compressed", size=2000)
    may_go_on = finish_waits(monkeypatch)
    made = [compressed(drive, tokens=array("q", range(first, first + 40))) for first in range(100, 700, 100)]
    drive.step()
    saves = drive.manager.stored._saves
    assert len(saves.under_way) == 1 and len(saves._waiting) == 5, "one at a time: it locks its context at the pace of a disk"
    for number in range(1, 4):
        drive.manager.stored.save(made[-number], f"save {number}")
    may_go_on.set()
    assert [result(drive, f"save {number}")["state"] for number in range(1, 4)] == ["done"] * 3
    assert len(settled(drive, tmp_path)) == 6


def test_who_asks_for_what_is_being_saved_is_told_what_comes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = server(tmp_path, save="compressed")
    may_go_on = finish_waits(monkeypatch)
    context = compressed(drive)
    drive.step()
    drive.manager.stored.save(context, "a save")
    with pytest.raises(RequestError, match="being saved already"):
        drive.manager.stored.save(context, "another save")
    may_go_on.set()
    assert result(drive, "a save")["file"] == files_of(drive).name(context)
    assert counters(drive)["file_saves"] == 1


def test_ranks_stay_in_step_where_one_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    original = format_of_files.Writer.finish

    def finish(writer: Any) -> int:
        if writer.head.served.rank == 1 and writer.head.num_tokens == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(writer)

    monkeypatch.setattr(format_of_files.Writer, "finish", finish)
    monkeypatch.setattr("obcache_sglang.scheduler.saves.PASSES_AFTER_FAILURE", 5)

    def write(rank: int) -> tuple[list[str], Any]:
        drive = rank_of_two(tmp_path, ranks, rank, save="compressed")
        compressed(drive)
        kept = KeptTokens(kept_by("uniform").positions, kept_by("uniform").offsets)
        longer = compressed(drive, tokens=array("q", range(500, 541)), kept=kept)
        for _ in range(60):
            drive.step()
        return [files_of(drive).name(longer)], drive.accounts()

    (one, accounts), (other, others) = ranks.run(write)
    assert one == other and accounts == others and accounts[2] == 0
    assert ranks.num_votes[0] == ranks.num_votes[1]
    wait_for(lambda: sorted(names_in(tmp_path)) == one)


def test_the_folder_keeps_within_its_bounds_and_those_used_longest_ago_go(tmp_path: Path) -> None:
    drive = server(tmp_path, save="compressed", size=2000)
    made = []
    for first in (100, 200, 300):
        made.append(files_of(drive).name(compressed(drive, tokens=array("q", range(first, first + 40)))))
        settled(drive, tmp_path)
        os.utime(Folder.opened(tmp_path).path_of(made[-1], 0, 1), (first, first))
    size = file_size(tmp_path)
    tight = server(tmp_path, save="compressed", size=2000, most_bytes=3 * size)
    # The first one is used again.
    assert answered(tight, array("q", range(100, 140))) == "reused"
    fourth = files_of(tight).name(compressed(tight, tokens=array("q", range(400, 440))))
    settled(tight, tmp_path)
    wait_for(lambda: len(Folder.opened(tmp_path).entries()) == 3)
    assert names_in(tmp_path) == {made[0], made[2], fourth}
    wait_for(lambda: tight.step() is not None and files_of(tight).on_disk == {made[0], made[2], fourth})
    # What went is compressed anew, and saved anew.
    compressed(tight, tokens=array("q", range(200, 240)))
    settled(tight, tmp_path)
    wait_for(lambda: names_in(tmp_path) == {made[0], made[1], fourth})


def test_what_is_saved_lives_no_longer_than_its_first_question_wants(tmp_path: Path) -> None:
    drive = server(tmp_path, save="compressed")
    context = compressed(drive, ttl_seconds=60.0)
    assert context.expires_at is not None
    settled(drive, tmp_path)
    with Folder.opened(tmp_path).reading(files_of(drive).name(context), 0, 1) as reader:
        assert reader.head.expires_at == context.expires_at


def test_a_file_that_cannot_be_used_is_written_anew(tmp_path: Path) -> None:
    first = server(tmp_path)
    saved(first, compressed(first))
    flip(the_file(tmp_path), -1)
    second = server(tmp_path, save="compressed")
    files_of(second).look()
    compressed(second)
    settled(second, tmp_path)
    assert counters(second)["file_saves"] == 1
    third = server(tmp_path)
    assert decided(third, third.ask(CONTEXT)) == "reused"


def test_so_is_one_whose_time_has_passed(tmp_path: Path) -> None:
    first = server(tmp_path)
    context = compressed(first)
    context.expires_at = time.time() + 0.2
    saved(first, context)
    time.sleep(0.3)
    second = server(tmp_path, save="compressed")
    req = second.ask(CONTEXT)
    assert decided(second, req) == "job"
    files_of(second).look()  # somebody lists what there is
    (job,) = second.manager.jobs.all()
    second.forward(job, kept_by("uniform"))
    second.end(job)
    second.step()
    settled(second, tmp_path)
    assert counters(second)["file_saves"] == 1


def test_a_file_larger_than_the_folder_may_be_is_not_written_and_costs_no_other(tmp_path: Path) -> None:
    drive = server(tmp_path, save="compressed", size=2000)
    names = []
    for first in (100, 200):
        names.append(files_of(drive).name(compressed(drive, tokens=array("q", range(first, first + 40)))))
        settled(drive, tmp_path)
    size = file_size(tmp_path)
    files_of(drive).most_bytes = 3 * size
    large = array("q", range(1000, 1400))
    kept = KeptTokens(torch.arange(200, dtype=torch.int32).repeat(LAYERS * HEADS), torch.arange(LAYERS * HEADS + 1) * 200)
    context = compressed(drive, tokens=large, kept=kept)
    settled(drive, tmp_path)
    with pytest.raises(RequestError, match="--obcache-folder-gb"):
        drive.manager.stored.save(context, "a save")
    # One that another server has written goes first of all.
    files_of(drive).most_bytes = None
    saved(drive, context)
    assert Folder.opened(tmp_path).shrink(3 * size) == [files_of(drive).name(context)]
    assert names_in(tmp_path) == set(names)


def test_what_cannot_be_deleted_stays_and_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = server(tmp_path, save="compressed", size=2000)
    names = []
    for first in (100, 200, 300, 400):
        names.append(files_of(drive).name(compressed(drive, tokens=array("q", range(first, first + 40)))))
        settled(drive, tmp_path)
        os.utime(Folder.opened(tmp_path).path_of(names[-1], 0, 1), (first, first))
    size = file_size(tmp_path)
    original = Path.unlink

    def unlink(path: Path, **options: Any) -> None:
        if names[0] in path.name:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        original(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert Folder.opened(tmp_path).shrink(2 * size) == names[1:3]


def test_what_is_read_again_and_again_is_not_the_first_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obcache_sglang.scheduler.context_files.TOUCH_SECONDS", 0.0)
    drive = server(tmp_path, save="compressed", size=2000)
    first, second = compressed(drive), compressed(drive, tokens=array("q", range(500, 540)))
    settled(drive, tmp_path)
    for number, each in enumerate((first, second)):
        os.utime(Folder.opened(tmp_path).path_of(files_of(drive).name(each), 0, 1), (number, number))
    assert answered(drive) == "reused"
    wait_for(lambda: max(each.used_at for each in Folder.opened(tmp_path).entries()) > 100)
    size = file_size(tmp_path)
    assert Folder.opened(tmp_path).shrink(size) == [files_of(drive).name(second)]


def test_a_deleted_context_does_not_come_back_as_what_an_earlier_record_of_it_was_saved_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = server(tmp_path, save="compressed", size=2000, max_contexts=2)
    may_go_on, original, begun = threading.Event(), format_of_files.Writer.finish, []

    def finish(writer: Any) -> int:
        begun.append(writer)
        if len(begun) == 1:
            may_go_on.wait(20)
        return original(writer)

    monkeypatch.setattr(format_of_files.Writer, "finish", finish)
    old = compressed(drive)
    name = files_of(drive).name(old)
    wait_for(lambda: drive.step() is not None and begun and not drive.manager.stored._saves.under_way[0].holds)
    for first in (500, 600):
        compressed(drive, tokens=array("q", range(first, first + 40)))
    assert drive.manager.cache.get(old.id) is None, "its record was forgotten"
    new = compressed(drive)
    assert new is not old and new.id == old.id
    answer = control_calls.answer(drive.manager, {"op": "delete", "name": new.id, "namespace": None, "now": drive.now})
    assert answer["ok"], answer
    may_go_on.set()
    settled(drive, tmp_path)
    wait_for(lambda: name not in files_of(drive).going)
    assert name not in names_in(tmp_path)


def test_a_save_that_nobody_asked_for_gives_way_before_a_pin_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_threads, "BUFFER_BYTES", 1)
    may_go_on, original = threading.Event(), format_of_files.Writer.layer
    monkeypatch.setattr(format_of_files.Writer, "layer", lambda *given: (may_go_on.wait(20), original(*given))[1])
    drive = server(tmp_path)
    pinned, held = compressed(drive, tokens=array("q", range(900, 940))), compressed(drive)
    drive.manager.cache.pin(pinned)
    drive.manager.stored._saves.begin(held, None)
    assert held.num_holders == 1
    drive.ask(array("q", range(3000, 3060)))
    nothing = (None, drive.engine.running_batch_now())
    drive.manager._give_way_if_starved(nothing, asked=True)
    assert (held.num_holders, pinned.pinned) == (0, True)
    drive.manager._give_way_if_starved(nothing, asked=True)
    assert not pinned.pinned
    may_go_on.set()
    assert counters(drive)["file_unsaved"] == 1


def test_a_gauge_that_cannot_be_set_ends_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = server(tmp_path), server(tmp_path)
    saved(first, compressed(first))

    def defect(*_: int) -> None:
        raise ValueError

    monkeypatch.setattr(second.manager.metrics, "in_folder", defect)
    assert decided(second, second.ask(CONTEXT)) == "reused"
