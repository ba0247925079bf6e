"""Talks to an SGLang server, or runs one for the length of a `with` block. For the evaluation, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import requests

# Start-up takes 20 s on an idle machine with two cores. The first start in a new environment took 4 minutes on a busy machine.
START_TIMEOUT_SECONDS = 600
STOP_TIMEOUT_SECONDS = 30
REQUEST_TIMEOUT_SECONDS = 300
FLUSH_TIMEOUT_SECONDS = 60
# More flags for every server started here, such as "--attention-backend triton" for tests and benchmarks on a GPU.
FLAGS_VARIABLE = "OBCACHE_SERVER_FLAGS"


class Client:
    """Sends requests to a server at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        """The response, whatever its status; `kwargs` as in `requests.request`."""
        kwargs.setdefault("timeout", REQUEST_TIMEOUT_SECONDS)
        return requests.request(method, self.url + path, **kwargs)

    def post(self, path: str, body: Mapping[str, Any], **kwargs: Any) -> Any:
        """The JSON answer to `body`. Raises RuntimeError with the server's own words on any status but 200."""
        return self._json(self.request("POST", path, json=body, **kwargs))

    def get(self, path: str, **kwargs: Any) -> Any:
        """The JSON answer. Raises RuntimeError with the server's own words on any status but 200."""
        return self._json(self.request("GET", path, **kwargs))

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The server-sent JSON events that answer `body`, as they come.

        Raises RuntimeError with the server's own words on any status but 200, and on an event that is an error.
        """
        with self.request("POST", path, json=body, stream=True) as response:
            self._check(response)
            for line in response.iter_lines():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(f"{response.url} answered: {event['error']}")
                yield event

    def flush_cache(self) -> None:
        """Empties the radix cache once the server is idle. Raises RuntimeError if it is not idle within `FLUSH_TIMEOUT_SECONDS`."""
        self._check(self.request("POST", "/flush_cache", params={"timeout": FLUSH_TIMEOUT_SECONDS}))

    @classmethod
    def _json(cls, response: requests.Response) -> Any:
        cls._check(response)
        return response.json()

    @staticmethod
    def _check(response: requests.Response) -> None:
        if response.status_code != 200:
            raise RuntimeError(f"{response.url} answered {response.status_code}: {response.text}")


class Server(Client):
    """A server that runs as a child of this process, with its log."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
        super().__init__(f"http://127.0.0.1:{port}")
        self.process = process
        self.log_file = log_file

    def log(self) -> str:
        """Everything the server's processes wrote so far."""
        return self.log_file.read_text(errors="replace")


@contextlib.contextmanager
def serve(
    model: Path | str,
    log_file: Path,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    *,
    module: str = "sglang.launch_server",
) -> Iterator[Server]:
    """A server on a free port, ready for requests. Its whole process group is gone afterwards, even if this process is terminated.

    model: a directory, or a name on the Hugging Face Hub.
    flags: for `python -m sglang.launch_server`; flags in the environment variable `FLAGS_VARIABLE` come after them.
    env: added to this process's environment.
    module: started in place of `sglang.launch_server`, with its flags.
    Raises RuntimeError with the end of the log if the server exits or is not healthy after `START_TIMEOUT_SECONDS`.
    """
    port = free_port()
    command = [sys.executable, "-m", module, "--model-path", str(model), "--port", str(port), *flags]
    command += shlex.split(os.environ.get(FLAGS_VARIABLE, ""))
    with running(command, port, log_file, env) as server:
        yield server


@contextlib.contextmanager
def running(command: Sequence[str], port: int, log_file: Path, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """As `serve`, for any command that answers `GET /health` on `port`: a router, say."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with _signals_unwind():
        with log_file.open("wb") as log:
            process = start_process(command, log, {**os.environ, **(env or {})})
        server = Server(process, port, log_file)
        try:
            _wait_until_healthy(server)
            yield server
        finally:
            _stop(process)


def start_process(command: Sequence[str], log: BinaryIO, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The command as a child, in a group of its own: the scheduler and detokenizer end with it. The tests replace this function."""
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as an exception would, so that the server it started ends too."""

    def unwind(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    replaced = []
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        # Handlers that others have set stay, nohup's too.
        replaced = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server exited with {server.process.returncode}; {_log_tail(server)}")
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if server.request("GET", "/health", timeout=30).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server was not healthy after {START_TIMEOUT_SECONDS} s; {_log_tail(server)}")


def _log_tail(server: Server) -> str:
    lines = server.log().splitlines()[-60:]
    return f"the end of {server.log_file}:\n" + "\n".join(lines)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_SECONDS)
    # Ends what is left of the group. If all its processes have ended, there is no such group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
