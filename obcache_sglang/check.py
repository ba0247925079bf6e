"""`python -m obcache_sglang.check`: does this installation fit the SGLang it finds, and can this machine serve?

Prints the verdict and the problems first; then versions, whether SGLang will load the plugin, the device it would serve on, and
every SGLang name that the package touches. Exit code 0 if all is well, 1 if not. `--flags` prints the command-line flags instead.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import textwrap
from contextlib import redirect_stdout
from importlib.metadata import entry_points, version

from obcache_sglang import __version__
from obcache_sglang.host import TESTED_SGLANG, check_host, installed_sglang
from obcache_sglang.settings import flags_help

_WIDTH = 80

PLUGIN_GROUP, PLUGIN_NAME = "sglang.srt.plugins", "obcache"
PLATFORM_GROUP, PLATFORM_NAME = "sglang.srt.platforms", "obcache_cpu"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m obcache_sglang.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--flags", action="store_true", help="print the flags that --obcache adds to `sglang serve`")
    if parser.parse_args(argv).flags:
        print(flags_help(), end="")
        return 0
    checks = (_check_versions, _check_entry_points, _check_device, _check_table)
    report = io.StringIO()
    with redirect_stdout(report):
        # A list, so that every check prints.
        problems = [problem for check in checks for problem in check()]
    print(
        "OK: this machine can serve with --obcache."
        if not problems
        else f"Not OK: {len(problems)} problem{'s' * (len(problems) > 1)}."
    )
    for problem in problems:
        print(textwrap.fill(f"PROBLEM: {problem}", _WIDTH, break_on_hyphens=False))
    print(f"\n{report.getvalue().strip()}")
    return 1 if problems else 0


def _check_versions() -> list[str]:
    print(f"obcache_sglang {__version__}, python {sys.version.split()[0]}")
    print(", ".join(f"{name} {version(name)}" for name in ("sglang", "torch", "transformers")))
    if installed_sglang() == TESTED_SGLANG:
        return []
    problem = f"SGLang {installed_sglang()} is installed, but this package is tested with {TESTED_SGLANG}"
    return [f"{problem}: install that release, or add --obcache-allow-untested-sglang."]


def _check_entry_points() -> list[str]:
    """Whether SGLang will find and load us: the rules of sglang.srt.plugins.load_plugins."""
    problems = []
    for group, name in ((PLUGIN_GROUP, PLUGIN_NAME), (PLATFORM_GROUP, PLATFORM_NAME)):
        found = any(point.name == name for point in entry_points(group=group))
        print(f"entry point {group}: {name} {'found' if found else 'MISSING'}")
        if not found:
            problems.append(f"the entry point {name} of {group} is missing: install the package (pip install obcache-sglang).")
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and PLUGIN_NAME not in allowed:
        problems.append(
            f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} excludes this plugin: add {PLUGIN_NAME} to it, or unset it."
        )
    platform = os.environ.get("SGLANG_PLATFORM")
    if platform and platform != PLATFORM_NAME:
        # SGLang skips the plugins of every package that offers a platform other than the selected one, and this package offers one.
        problems.append(f"SGLANG_PLATFORM={platform} excludes this package's plugins: unset it.")
    return problems


def _check_table() -> list[str]:
    states = sorted(check_host(), key=lambda state: state.touch.target)
    print(f"\n{len(states)} SGLang names, by module: what we do with each, and why")
    for module, group in itertools.groupby(states, key=lambda state: _module_of(state.touch.target)):
        print(f"\n{module}")
        for state in group:
            touch = state.touch
            verdict = "ok" if state.ok else "MISSING" if not state.found else f"LACKS {', '.join(state.missing_parameters)}"
            print(f"  {verdict}  {touch.kind}  {touch.target.removeprefix(module + '.')}")
            print(textwrap.fill(touch.why, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    missing = [state.touch.target for state in states if not state.ok]
    return [f"this SGLang lacks names that we rely on: {', '.join(missing)}."] if missing else []


def _module_of(target: str) -> str:
    """The module of a dotted name: what comes before its first capital letter, or before its last part."""
    parts = target.split(".")
    classes = [index for index, part in enumerate(parts) if part[0].isupper()]
    return ".".join(parts[: classes[0] if classes else len(parts) - 1])


def _check_device() -> list[str]:
    from sglang.srt.platforms import current_platform

    name = type(current_platform).__name__
    device = getattr(current_platform, "device_name", None)
    print(f"\nplatform {name}, device {device}")
    if device is None:
        return ["SGLang finds no accelerator, and our CPU platform is not active: see the entry points above."]
    return []


if __name__ == "__main__":
    sys.exit(main())
