"""Contexts that last: saved by one server, which is killed, and loaded by the next one. On the real engine, in float32."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from obcache_sglang import contexts as command
from obcache_sglang.kv.folder import KEY_FILE, SUFFIX
from obcache_sglang.local_server import Server, serve
from tests.serving.client import QUESTIONS, document, flush, generate, question, report
from tests.serving.conftest import COMMON, STRICT, checked
from tests.serving.test_lifetimes import wait_for

L = 304
FLAGS = (*COMMON, "--max-total-tokens", "8192", "--chunked-prefill-size", "512", "--enable-metrics", "--obcache")
FLAGS += ("--obcache-min-tokens", "32", "--obcache-compression-ratio", "0.5", "--obcache-gates", "smollm2-135m")
TOPICS = {"uniform": "assignment", "adakv": "binary", "global": "calls", "profile": "booleans"}
WISHES: dict[str, dict[str, Any]] = {
    "uniform": {"method": "snapkv", "budget": "uniform"},
    "adakv": {"method": "snapkv", "budget": "adakv"},
    "global": {"method": "snapkv", "budget": "global"},
    "profile": {},
}
LONG = 1200


@dataclass
class Lasting:
    """What a first server saved by itself before it was killed. wanted: by budget, its answer. files: by budget, or what else they are of."""

    folder: Path
    model_dir: Path
    wanted: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def ask(self, server: Server, budget: str, **fields: Any) -> dict[str, Any]:
        prompt = document(self.model_dir, L, TOPICS[budget]) + question(self.model_dir, QUESTIONS[0])
        return generate(server, prompt, obcache={"context_len": L, **WISHES[budget]}, max_new_tokens=6, **fields)

    def new_file(self) -> str:
        """The name of the one file that is not known yet, once it is there."""

        def unknown() -> set[str]:
            return {file.name.partition(".")[0] for file in self.folder.glob(f"*{SUFFIX}")} - {*self.files.values()}

        wait_for(unknown)
        (found,) = unknown()
        return found

    def path(self, name: str) -> Path:
        return self.folder / f"{self.files[name]}.0of1.context.safetensors"


def names(server: Server, **headers: str) -> list[str]:
    return [each["name"] for each in server.get("/obcache/contexts", headers=headers)["contexts"]]


def save(server: Server, name: str, **headers: str) -> dict[str, Any]:
    response = server.request("POST", f"/obcache/contexts/{name}/save", headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def hang_up(server: Server, prompt: list[int]) -> None:
    """Has a context compressed, and so saved, on a server that may not live to answer."""
    with contextlib.suppress(requests.RequestException, RuntimeError):
        generate(server, prompt + [1], obcache={"context_len": len(prompt), "compression_ratio": 0.1}, max_new_tokens=1)


@pytest.fixture(scope="module")
def lasting(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Lasting:
    """Four contexts and one with a salt are saved without anybody's asking; while a fifth one is, the server is killed."""
    made = Lasting(tmp_path_factory.mktemp("lasting") / "folder", model_dir)
    flags = (*FLAGS, "--obcache-folder", str(made.folder), "--obcache-save", "compressed", "--obcache-folder-gb", "1")
    with serve(model_dir, made.folder.parent / "first", flags, STRICT) as server:
        for budget in TOPICS:
            made.ask(server, budget)
            answer = made.ask(server, budget)
            assert (report(answer)["status"], report(answer)["tier"]) == ("reused", "device")
            made.wanted[budget] = answer["output_ids"]
            made.files[budget] = made.new_file()
            kept = report(answer)["kept_tokens"]
            assert made.path(budget).stat().st_size < 1.03 * kept * 30 * 2 * 3 * 64 * 4
        compressed = server.post(
            "/obcache/compress", {"input_ids": document(model_dir, L, TOPICS["uniform"]), **WISHES["uniform"]}
        )
        assert save(server, compressed["id"])["file"] == made.files["uniform"], "who asks for it is answered when it is there"
        made.ask(server, "uniform", cache_salt="one")
        made.files["salted"] = made.new_file()
        (name,) = names(server, **{"X-Cache-Salt": "one"})
        assert save(server, name, **{"X-Cache-Salt": "one"})["file"] == made.files["salted"]
        listed = server.get("/obcache/files")["files"]
        assert {each["file"] for each in listed} == {made.files[budget] for budget in TOPICS}, "that of the salt is another's"
        assert all(each["on_disk"] for each in server.get("/obcache/contexts")["contexts"])
        text = server.request("GET", "/metrics").text
        assert server.get("/obcache/status")["counters"]["file_saves"] == len(TOPICS) + 1 + 2, "each by itself, and two again"
        assert "sglang:obcache_file_saves_total" in text and "sglang:obcache_file_save_seconds" in text
        log = server.log()
        assert "Traceback" not in log and "leak" not in log, log[-4000:]
        prompt = document(model_dir, LONG)
        asking = threading.Thread(target=hang_up, args=(server, prompt))
        asking.start()
        wait_for(lambda: list(made.folder.glob("*.partial")))
        os.killpg(server.process.pid, signal.SIGKILL)
        asking.join()
    return made


@pytest.mark.long
def test_what_waits_to_be_saved_is_saved_before_a_server_ends(model_dir: Path, tmp_path: Path) -> None:
    """After SIGTERM. Each takes 8 seconds here, one after the other; SGLang ends after 5."""
    folder, topics = tmp_path / "folder", [*TOPICS.values()][:3]
    flags = (*FLAGS, "--obcache-folder", str(folder), "--obcache-save", "compressed")
    with serve(model_dir, tmp_path / "log", flags, STRICT, module="tests.serving.slow_disk") as server:
        for topic in topics:
            generate(server, document(model_dir, L, topic) + question(model_dir, QUESTIONS[0]), obcache={"context_len": L})
        assert len(list(folder.glob(f"*{SUFFIX}"))) < len(topics)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=120)
        assert len(list(folder.glob(f"*{SUFFIX}"))) == len(topics) and not list(folder.glob("*.partial"))
        log = server.log()
        assert "Traceback" not in log, log[-4000:]


@pytest.fixture(scope="module")
def second(lasting: Lasting) -> Iterator[Server]:
    flags = (*FLAGS, "--obcache-folder", str(lasting.folder))
    with serve(lasting.model_dir, lasting.folder.parent / "second", flags, STRICT) as server:
        yield from checked(server)


def loads(server: Server) -> int:
    return int(server.get("/obcache/status")["counters"]["file_loads"])


@pytest.mark.parametrize("budget", TOPICS)
def test_the_next_server_answers_as_the_first_and_reads_nothing_again(second: Server, lasting: Lasting, budget: str) -> None:
    before = loads(second)
    answer = lasting.ask(second, budget)
    assert (report(answer)["status"], report(answer)["tier"]) == ("reused", "disk")
    assert answer["meta_info"]["cached_tokens"] == L
    assert answer["output_ids"] == lasting.wanted[budget]
    again = lasting.ask(second, budget)
    assert (report(again)["tier"], again["output_ids"]) == ("device", lasting.wanted[budget])
    assert loads(second) == before + 1


def test_salts_stay_apart(second: Server, lasting: Lasting) -> None:
    assert report(lasting.ask(second, "uniform", cache_salt="two"))["status"] == "compressed"
    answer = lasting.ask(second, "uniform", cache_salt="one")
    assert (report(answer)["status"], report(answer)["tier"]) == ("reused", "disk")
    for raw in (lasting.path("salted").read_bytes(), *(each.encode() for each in os.listdir(lasting.folder))):
        assert b"cache_salt" not in raw and b'"one"' not in raw
    flush(second)
    response = second.request("POST", "/obcache/contexts/load", json={"file": lasting.files["salted"]})
    assert (response.status_code, "namespace" in response.text) == (404, True)
    loaded = second.post("/obcache/contexts/load", {"file": lasting.files["salted"], "cache_salt": "one"})
    assert names(second, **{"X-Cache-Salt": "one"}) == [loaded["name"]]


def test_what_was_being_saved_when_the_server_was_killed_is_a_miss(second: Server, lasting: Lasting) -> None:
    assert list(lasting.folder.glob("*.partial")), "the server was killed in the middle"
    prompt = document(lasting.model_dir, LONG) + [1]
    answer = generate(second, prompt, obcache={"context_len": LONG, "compression_ratio": 0.1}, max_new_tokens=1)
    assert report(answer)["status"] == "compressed"


def test_a_corrupt_file_is_compressed_anew_with_one_line_in_the_log(second: Server, lasting: Lasting) -> None:
    flush(second)
    path = lasting.path("adakv")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert command.main(["verify", "--folder", str(lasting.folder)]) == 1
    for _ in range(2):
        answer = lasting.ask(second, "adakv")
        assert (report(answer)["status"], answer["output_ids"]) == ("compressed", lasting.wanted["adakv"])
        flush(second)
    assert second.log().count(f"file {lasting.files['adakv']} is not used") == 1
    path.write_bytes(whole)
    second.post("/obcache/contexts/load", {"file": lasting.files["adakv"]})
    assert report(lasting.ask(second, "adakv"))["status"] == "reused"


def test_paths_and_unknown_files_are_refused(second: Server, lasting: Lasting) -> None:
    (lasting.folder.parent / "secret").write_text("secret")
    for file in ("../secret", "/etc/passwd", lasting.path("uniform").name, "..", "", None, 7, ["x"], KEY_FILE):
        response = second.request("POST", "/obcache/contexts/load", json={"file": file})
        assert (response.status_code, "64 hexadecimal digits" in response.text) == (400, True), response.text
    for path in ("..%2Fsecret", KEY_FILE):
        assert second.request("DELETE", f"/obcache/files/{path}").status_code in (400, 404)
    assert second.request("POST", "/obcache/contexts/load", json={"file": "0" * 64}).status_code == 404
    assert second.request("DELETE", f"/obcache/files/{'0' * 64}").status_code == 404
    assert second.request("POST", f"/obcache/contexts/{'0' * 32}/save").status_code == 404
    assert second.request("POST", "/obcache/contexts/load", json={"file": "0" * 64, "path": "x"}).status_code == 400
    assert (lasting.folder.parent / "secret").exists() and (lasting.folder / KEY_FILE).exists()


def test_deleting_deletes_everywhere(second: Server, lasting: Lasting) -> None:
    lasting.ask(second, "global")
    answer = lasting.ask(second, "global")
    identity = report(answer)["context_id"]
    assert second.request("DELETE", f"/obcache/contexts/{identity}").status_code == 200
    wait_for(lambda: not lasting.path("global").exists())
    assert report(lasting.ask(second, "global"))["status"] == "compressed"
    assert second.request("DELETE", f"/obcache/files/{lasting.files['profile']}").status_code == 200
    assert not lasting.path("profile").exists()
    flush(second)
    assert report(lasting.ask(second, "profile"))["status"] == "compressed"


def test_a_folder_that_cannot_be_written_says_so_and_the_server_goes_on(second: Server, lasting: Lasting) -> None:
    lasting.ask(second, "uniform")
    moved = lasting.folder.parent / "moved"
    shutil.move(lasting.folder, moved)
    try:
        (name, *_) = [each["name"] for each in second.get("/obcache/contexts")["contexts"] if each["state"] == "resident"]
        response = second.request("POST", f"/obcache/contexts/{name}/save")
        assert response.status_code == 500
        assert "the folder is not there any more" in response.text
        assert lasting.ask(second, "uniform")["output_ids"] == lasting.wanted["uniform"]
    finally:
        shutil.rmtree(lasting.folder, ignore_errors=True)
        shutil.move(moved, lasting.folder)


@pytest.mark.long
def test_replicas_that_share_a_folder_compress_each_document_once(model_dir: Path, tmp_path: Path) -> None:
    number, flags = 12, (*FLAGS, "--obcache-folder", str(tmp_path / "folder"), "--obcache-save", "compressed")
    prompts = [[1, 100 + each, *document(model_dir, L - 2)] for each in range(number)]
    obcache = {"context_len": L}

    def ask(server: Server, prompt: list[int]) -> tuple[str, list[int]]:
        answer = generate(server, prompt + question(model_dir, QUESTIONS[0]), obcache=obcache, max_new_tokens=12)
        return report(answer)["status"], answer["output_ids"]

    with contextlib.ExitStack() as stack:
        replicas = [stack.enter_context(serve(model_dir, tmp_path / f"replica{each}", flags, STRICT)) for each in range(2)]
        first = [ask(replicas[each % 2], prompt) for each, prompt in enumerate(prompts)]
        wait_for(lambda: len(list((tmp_path / "folder").glob(f"*{SUFFIX}"))) == number)
        again = [ask(replicas[1 - each % 2], prompt) for each, prompt in enumerate(prompts)]
        assert [status for status, _ in first] == ["compressed"] * number
        assert [status for status, _ in again] == ["reused"] * number
        assert [answer for _, answer in first] == [answer for _, answer in again]
        made = [each.get("/obcache/status")["counters"] for each in replicas]
        assert sum(each["compressions"] for each in made) == number
        assert sum(each["file_loads"] for each in made) == number
        for replica in replicas:
            for _ in checked(replica):
                pass


@pytest.mark.long
def test_three_ranks_save_load_and_preload(model_dir: Path, tmp_path: Path) -> None:
    lasting = Lasting(tmp_path / "folder", model_dir)
    env = {**STRICT, "SGLANG_CPU_OMP_THREADS_BIND": "0|0|0"}  # all ranks on one core
    flags = (*FLAGS, "--obcache-folder", str(lasting.folder), "--tp-size", "3")
    with serve(model_dir, tmp_path / "first", flags, env) as server:
        for budget in TOPICS:
            before = set(names(server))
            lasting.ask(server, budget)
            lasting.wanted[budget] = lasting.ask(server, budget)["output_ids"]
            (name,) = set(names(server)) - before
            lasting.files[budget] = save(server, name)["file"]
        for _ in checked(server):
            pass
    assert len(list(lasting.folder.glob("*.safetensors"))) == 3 * len(TOPICS)
    (lasting.folder / f"{lasting.files['global']}.1of3.context.safetensors").unlink()
    with serve(model_dir, tmp_path / "second", (*flags, "--obcache-preload"), env) as server:
        assert "3 of 3 contexts are there from the start" in server.log()
        for budget in TOPICS:
            answer = lasting.ask(server, budget)
            assert answer["output_ids"] == lasting.wanted[budget]
            assert report(answer)["status"] == ("compressed" if budget == "global" else "reused")
        flush(server)
        answer = lasting.ask(server, "uniform")
        assert (report(answer)["tier"], answer["output_ids"]) == ("disk", lasting.wanted["uniform"])
        for _ in checked(server):
            pass
