"""Starts the servers of the tests as forks of one process that has imported SGLang's libraries: a start spends most of its time there.

Nothing of SGLang and nothing of this project is imported before a fork, so plugins, hooks and settings take effect as in any server. Both
the launcher and the processes that it spawns are such forks; each gets the environment and the files that a new interpreter would get.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

# What SGLang imports and takes longest; a name that a later version lacks ends the tests' start with an ImportError.
LIBRARIES = (
    "torch",
    "torch._inductor.compile_fx",
    "torch._inductor.select_algorithm",
    "torch.distributed.tensor",
    "torchvision",
    "transformers",
    "transformers.modeling_utils",
    "transformers.processing_utils",
    "flashinfer",
    "openai",
    "scipy",
    "fastapi",
    "aiohttp",
    "compressed_tensors",
    "xgrammar",
)
# The scheduler and the detokenizer. Further processes (other ranks) are started anew, as without this module.
CHILDREN_OF_A_LAUNCHER = 2
_LARGEST_ORDER = 1 << 20
_ABOVE_ALL_FILES = 512


@contextlib.contextmanager
def preloaded() -> Iterator[None]:
    """Within the block, `local_server.serve` starts its servers that way."""
    from obcache_sglang import local_server  # not where servers are forked

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True) as parent:
        theirs.close()
        as_ever = local_server.start_process

        def start(command: Sequence[str], log: BinaryIO, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
            if "sglang_router" in command[2]:  # another program
                return as_ever(command, log, env)
            return _Started(ours, command, log, env)

        local_server.start_process = start
        try:
            yield
        finally:
            local_server.start_process = as_ever
            ours.close()
            parent.terminate()


class _Started(subprocess.Popen[bytes]):
    """A server as its starter sees it: a child's child, whose exit status comes through a socket."""

    def __init__(self, orders: socket.socket, command: Sequence[str], log: BinaryIO, env: Mapping[str, str]) -> None:
        self._child_created = False  # Popen's own clean-up has nothing to do
        self.args = list(command)
        self.returncode: int | None = None
        self._state, theirs = socket.socketpair()
        with theirs:
            order = {"arguments": command[2:], **_surroundings(env)}
            socket.send_fds(orders, [json.dumps(order).encode()], [theirs.fileno(), log.fileno()])
        try:
            self.pid = int(self._line())
        except RuntimeError:
            self._state.close()
            raise

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._state.settimeout(timeout)
            try:
                self.returncode = int(self._line())
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._state.close()
        return self.returncode

    def _line(self) -> str:
        text = self._state.recv(64)
        if not text:
            raise RuntimeError("the process that starts servers has ended; its last words are in the output of the tests")
        return text.decode()


def _starter(orders: socket.socket) -> NoReturn:
    """Starts a server for each order, until whoever gives them is gone."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy every page
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        text, files, _, _ = socket.recv_fds(orders, _LARGEST_ORDER, 2)
        if not text:
            os._exit(0)
        state, log = files
        if os.fork() == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(socket.socket(fileno=state), log, json.loads(text))
        os.close(state)
        os.close(log)


def _watch(state: socket.socket, log: int, order: dict[str, Any]) -> NoReturn:
    """Forks the launcher; says its process id, and in the end its exit status."""
    launcher = os.fork()
    if launcher == 0:
        state.close()
        _run(lambda: _launch(log, order))
    os.close(log)
    with contextlib.suppress(BrokenPipeError):
        state.sendall(str(launcher).encode())
        _, status = os.waitpid(launcher, 0)
        state.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _launch(log: int, order: dict[str, Any]) -> None:
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    _move_to(order)
    waiting = [_child_that_waits() for _ in range(CHILDREN_OF_A_LAUNCHER)]
    anew = multiprocessing.util.spawnv_passfds

    def spawn(path: bytes, args: Sequence[str], files: Sequence[int]) -> int:
        if not waiting or "--multiprocessing-fork" not in args:
            return anew(path, args, files)
        child, end = waiting.pop(0)
        code, *arguments = args[list(args).index("-c") + 1 :]
        spawned = {"code": code, "arguments": arguments, "files": list(files), **_surroundings(os.environ)}
        with end:
            socket.send_fds(end, [json.dumps(spawned).encode()], list(files))
        return child

    multiprocessing.util.spawnv_passfds = spawn  # type: ignore[assignment]
    sys.path[0] = order["folder"]
    module, *sys.argv[1:] = order["arguments"]
    runpy._run_module_as_main(module)  # type: ignore[attr-defined]


def _child_that_waits() -> tuple[int, socket.socket]:
    """A child as pure as its parent is now; it becomes what its parent spawns later, or ends with its parent."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        _run(lambda: _become_spawned(theirs))
    theirs.close()
    return child, ours


def _become_spawned(orders: socket.socket) -> None:
    text, received, _, _ = socket.recv_fds(orders, _LARGEST_ORDER, 64)
    orders.close()
    if not text:
        return
    order = json.loads(text)
    # The code that runs here names its files by their numbers in the parent.
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, _ABOVE_ALL_FILES) for file in received]
    os.closerange(3, _ABOVE_ALL_FILES)
    for file, number in zip(aside, order["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    _move_to(order)
    sys.argv[:] = ["-c", *order["arguments"]]
    exec(order["code"], {"__name__": "__main__"})


def _surroundings(env: Mapping[str, str]) -> dict[str, Any]:
    """What a process has of its starter beside files, for `_move_to`."""
    return {"environment": dict(env), "folder": os.getcwd()}


def _move_to(order: dict[str, Any]) -> None:
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])


def _run(what: Callable[[], None]) -> NoReturn:
    """Runs it as an interpreter's whole program, in a fork: nothing of the callers' is unwound."""
    status = 1
    try:
        what()
        status = 0
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            status = ending.code or 0
        else:
            print(ending.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # What a finalizing interpreter does, as far as servers need it.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _starter(socket.socket(fileno=int(sys.argv[1])))
