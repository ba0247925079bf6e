"""The host table against the installed SGLang: names, parameters, and that the hooks really take hold."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from obcache_sglang import check, host
from obcache_sglang.host import Touch, check_touch, hook_in_place, host_table
from obcache_sglang.settings import OPTIONS


@pytest.mark.parametrize("touch", host_table(), ids=lambda touch: f"{touch.kind}-{touch.target.removeprefix('sglang.srt.')}")
def test_sglang_has_every_name_and_parameter_we_rely_on(touch):
    state = check_touch(touch)
    assert state.found, f"SGLang {host.installed_sglang()} has no {touch.target}: {touch.why}"
    assert not state.missing_parameters


def test_the_installed_sglang_is_the_tested_one():
    assert host.installed_sglang() == host.TESTED_SGLANG


def test_no_hook_is_declared_twice_and_every_row_says_why():
    hooks = [(touch.target, touch.hook) for touch in host_table() if touch.is_hook]
    assert len(hooks) == len(set(hooks))
    assert all(touch.why for touch in host_table())


def test_a_name_or_parameter_that_is_gone_is_noticed():
    gone = check_touch(Touch("sglang.srt.managers.scheduler.Scheduler.no_such_method", "call", "x"))
    assert (gone.found, gone.ok) == (False, False)
    renamed = check_touch(Touch("sglang.srt.plugins.hook_registry.HookRegistry.register", "call", "x", ("target", "no_such")))
    assert (renamed.found, renamed.missing_parameters) == (True, ("no_such",))
    assert not check_touch(Touch("no_such_module.name", "read", "x")).found


def test_rows_with_a_hook_function_are_hooks_and_no_others():
    with pytest.raises(TypeError, match="hook function"):
        Touch("a.b", "after", "x")
    with pytest.raises(TypeError, match="hook function"):
        Touch("a.b", "call", "x", hook=print)


# In a process of their own: a hook, once applied, stays.
_IN_PLACE = """
import sys, types
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from obcache_sglang.host import Touch, hook_in_place

host = types.ModuleType("fake_host")
class Thing:
    def plain(self): return 1
    @classmethod
    def of_class(cls): return 1
host.Thing = Thing
sys.modules["fake_host"] = host

def hook(original, *args): return original(*args) + 1
def late(original, *args): return original(*args) + 10
rows = [Touch(f"fake_host.Thing.{name}", "around", "x", hook=hook) for name in ("plain", "of_class")]
assert [hook_in_place(row) for row in rows] == [False, False]
for row in rows:
    HookRegistry.register(row.target, row.hook, HookType.AROUND)
HookRegistry.apply_hooks()
assert [hook_in_place(row) for row in rows] == [True, True]
assert (Thing().plain(), Thing.of_class()) == (2, 2)
# SGLang skips a target it has patched: its record says "patched", but this hook is never called.
HookRegistry.register("fake_host.Thing.plain", late, HookType.AROUND)
HookRegistry.apply_hooks()
assert not hook_in_place(Touch("fake_host.Thing.plain", "around", "x", hook=late))
assert hook_in_place(rows[0])
"""


_LAUNCHER = """
import sys
from obcache_sglang import host, plugin
from obcache_sglang.settings import publish, settings_from_python
plugin.register()
launcher = [t for t in host.host_table() if t.is_hook and t.process in ("launcher", "tokenizer", "all")]
from obcache_sglang.frontend.hooks import GUARD_TOUCHES
alone = {t.target for t in (*plugin.CLI_TOUCHES, *GUARD_TOUCHES)}
assert {t.target for t in launcher if host.hook_in_place(t)} == alone, "without --obcache only flags and refusals are there"
plugin.activate(settings_from_python(True))
plugin.activate(settings_from_python(True))
assert all(host.hook_in_place(t) for t in launcher)
from sglang.srt.plugins.hook_registry import HookRegistry
assert all(len(HookRegistry._hooks[t.target]) == 1 for t in launcher), "a second activation registered hooks again"
"""


_MISSING = """
from obcache_sglang import host, plugin
from obcache_sglang.settings import publish, settings_from_python
from obcache_sglang.errors import HostError
import sglang.srt.managers.tokenizer_manager as module
del module.TokenizerManager._wait_one_response
try:
    plugin.activate(settings_from_python(True))
except HostError as error:
    assert "these hooks are not in place: " in str(error) and "_wait_one_response" in str(error), error
else:
    raise AssertionError("a hook was missing and nothing was said")
"""


_FLAGS = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args

def refused(*flags):
    try:
        prepare_server_args(["--model-path", "x", *flags])
    except SystemExit as stop:
        return str(stop)
    raise AssertionError(f"{flags} were accepted")

assert "--obcache-compression-ratio=1.2 is outside [0, 1)" in refused("--obcache", "--obcache-compression-ratio", "1.2")
assert "given without --obcache" in refused("--obcache-method", "h2o")
import contextlib, io
said = io.StringIO()
with contextlib.redirect_stderr(said):
    refused("--obcache", "--obcache-compresion-ratio", "0.5")
    refused("--obcache", "--no-such-flag")
assert "Did you mean --obcache-compression-ratio?" in said.getvalue(), said.getvalue()
assert said.getvalue().count("Did you mean") == 1
both = refused("--obcache", "--pp-size", "2", "--disable-radix-cache")
assert "leave out --disable-radix-cache" in both and "use --tp-size" in both
assert "leave out --tokenizer-worker-num" in refused("--obcache", "--tokenizer-worker-num", "2")
assert "there is no such file" in refused("--obcache", "--obcache-head-profile", "no_such_profile")
import json, pathlib, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "profile.json").write_text('{"format": 1}')
assert "lacks 'model'" in refused("--obcache", "--obcache-head-profile", str(folder / "profile.json"))
# Of another model: known once SGLang has read that one's configuration, before anything is started.
shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 64}
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, **shape}
(folder / "config.json").write_text(json.dumps(config))
from sglang.srt.server_args import ServerArgs
from obcache_sglang import plugin
from obcache_sglang.settings import publish, settings_from_python
publish(settings_from_python({"head_profile": "smollm2-135m"}))
try:
    plugin._check_before_launch(None, ServerArgs(model_path=str(folder)))
except SystemExit as stop:
    assert "for another model than the one served" in str(stop), stop
else:
    raise AssertionError("a head profile of another model was accepted")
plugin.deactivate()
prepare_server_args(["--model-path", "x"])
"""


# `sglang serve` first: it answers before it loads plugins, and plugins stay loaded. Its last words come when the process ends.
_HELP = """
import contextlib, io, runpy, sys
from importlib.metadata import entry_points

def run(command, *argv):
    sys.argv = [command, *argv]
    if command == "sglang":
        (script,) = entry_points(group="console_scripts", name="sglang")
        return script.load()()
    return runpy.run_module(command, run_name="__main__")

def stopped(command, *argv):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        run(command, *argv)
        raise AssertionError(f"{command} {argv} did not stop")
    return said.getvalue()

run("sglang", "serve", "--help")
shown = stopped("sglang.launch_server", "--help")
assert "--obcache-compression-ratio RATIO" in shown and shown.count("KV-cache compression of shared contexts") == 1
model = ["--model-path", "x", "--obcache"]
for command in (["sglang", "serve", "--model-type", "llm"], ["sglang.launch_server"]):
    said = stopped(*command, *model, "--obcache-compresion-ratio=0.5")
    assert "Did you mean --obcache-compression-ratio?" in said, said
    said = stopped(*command, *model, "--obcache-head", "x")  # ambiguous, not unknown
    assert "--obcache-head-profile" in said and "Did you mean" not in said, said
"""


_BROKEN_SETTINGS = """
import multiprocessing, os
multiprocessing.parent_process = lambda: object()
os.environ["OBCACHE_SGLANG_SETTINGS"] = '{"method": 1}'
from sglang.srt.plugins import load_plugins
load_plugins()
"""

_PROGRAMS = {
    "a_hook_is_in_place_only_if_it_is_called": _IN_PLACE,
    "activation_puts_every_hook_of_the_launcher_in_place": _LAUNCHER,
    "a_missing_hook_stops_the_launcher": _MISSING,
    "a_wrong_start_is_refused_with_the_reason": _FLAGS,
    "both_commands_show_our_flags": _HELP,
    "a_child_process_with_broken_settings_does_not_go_on": _BROKEN_SETTINGS,
}


# Runs each program that it is given in a copy of itself, to which nothing has been done. It imports SGLang once for all but the
# launcher's, which are there before SGLang's managers are imported, as in a real start.
_FORKS = """
import json, os, sys, tempfile, traceback

def fork(program, output):
    child = os.fork()
    if child:
        return child
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    code = 1
    try:
        exec(program, {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        print(stop)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

programs = json.load(sys.stdin)
outputs = {name: tempfile.TemporaryFile() for name in programs}
first = sys.argv[1]
children = {first: fork(programs.pop(first), outputs[first])}
import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler
children |= {name: fork(program, outputs[name]) for name, program in programs.items()}
results = {}
for name, child in children.items():
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outputs[name].seek(0)
    results[name] = [code, outputs[name].read().decode(errors="replace")]
print(json.dumps(results))
"""

_LAUNCHERS = "activation_puts_every_hook_of_the_launcher_in_place"

_FRESH = "both_commands_show_our_flags"
"""The program that SGLang must not have been imported for: it tests what the import does."""


@pytest.fixture(scope="session")
def programs() -> Iterator[Callable[[str], tuple[int, str]]]:
    """Gives a program's exit code and output. All run in the background, and import SGLang three times: half a minute of both cores."""
    output = {"stdout": subprocess.PIPE, "text": True}
    forks = subprocess.Popen([sys.executable, "-c", _FORKS, _LAUNCHERS], stdin=subprocess.PIPE, **output)
    fresh = subprocess.Popen([sys.executable, "-c", _PROGRAMS[_FRESH]], stderr=subprocess.STDOUT, **output)
    assert forks.stdin is not None
    json.dump({name: program for name, program in _PROGRAMS.items() if name != _FRESH}, forks.stdin)
    forks.stdin.close()
    forks.stdin = None

    @cache
    def results() -> dict[str, tuple[int, str]]:
        said, _ = forks.communicate(timeout=300)
        return json.loads(said.splitlines()[-1])

    def of(name: str) -> tuple[int, str]:
        if name != _FRESH:
            return results()[name]
        said, _ = fresh.communicate(timeout=300)
        return fresh.returncode, said

    yield of
    for process in (forks, fresh):
        process.kill()
        process.wait()


@pytest.fixture(scope="session", autouse=True)
def start_programs(request: pytest.FixtureRequest) -> None:
    """Before the first test of this file; tests/conftest.py puts those that wait for them after all others."""
    if any("programs" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("programs")


@pytest.mark.parametrize("name", _PROGRAMS)
def test_in_a_process_of_its_own(programs, name):
    code, output = programs(name)
    if name == "a_child_process_with_broken_settings_does_not_go_on":
        assert code == 1, output
        assert "cannot run with compression" in output
    else:
        assert code == 0, output
    if name == _FRESH:
        assert output.count("KV-cache compression of shared contexts") == 1
        ours = output.partition("KV-cache compression of shared contexts")[2]
        assert "usage:" not in ours and all(option.flag in ours for option in OPTIONS.values())


def test_check_says_ok_here(capsys, monkeypatch):
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert check.main([]) == 0
    output = capsys.readouterr().out
    assert output.startswith("OK: this machine can serve")
    assert max(map(len, output.splitlines())) <= 80
    module = ""
    named = set()
    for line in output.splitlines():
        if line.startswith("sglang."):
            module = line
        elif line.startswith("  ok"):
            named.add(f"{module}.{line.split()[-1]}")
    assert {touch.target for touch in host_table()} <= named


@pytest.mark.parametrize("name", ["SGLANG_PLUGINS", "SGLANG_PLATFORM"])
def test_check_says_when_the_plugin_is_excluded(capsys, monkeypatch, name):
    monkeypatch.setenv(name, "something_else")
    assert check.main([]) == 1
    verdict, problem, *_ = capsys.readouterr().out.splitlines()
    assert (verdict, problem.startswith(f"PROBLEM: {name}=something_else excludes")) == ("Not OK: 1 problem.", True)


def test_check_prints_the_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert check.main(["--flags"]) == 0
    output = capsys.readouterr().out
    assert "--obcache-compression-ratio" in output
    assert max(map(len, output.splitlines())) <= 80


def test_hooks_of_this_process_are_untouched():
    """The checks above look, they do not apply anything."""
    assert not any(hook_in_place(touch) for touch in host_table() if touch.is_hook and touch.process == "scheduler")
