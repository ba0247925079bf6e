"""Writes obcache_sglang/docs/options.md from the table of options:  python -m launch.make_options [--output FILE]

A test compares the page with what this makes, so run it after every change of an option.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from obcache_sglang.settings import (
    BOUNDS,
    COMPRESSION_OPTIONS,
    EVERY_QUERY,
    METHODS,
    PRESETS,
    SERVER_OPTIONS,
    CompressionSettings,
    Option,
)

PAGE = Path(__file__).parent.parent / "obcache_sglang" / "docs" / "options.md"

_HEAD = """\
# Options

Made by `python -m launch.make_options`: change an option's help where it is declared, not here.

`--obcache` turns compression on. Every other flag needs it. `sglang serve --help` lists these flags at its end, and
`python -m sglang.launch_server --help` among SGLang's own; `python -m obcache_sglang.check --flags` lists only them.
`Engine(obcache={...})` takes the same settings, under the keys of the tables. A wrong value stops the server, with the reason.
"""

_PER_REQUEST = """
## What decides which tokens are kept

These settings are part of a context's identity: the same text with other settings is another context. A request may set each of them in
`custom_params["obcache"]`, and so may the body of `POST /obcache/compress`. A request that names another method or preset than the server's
starts from that one's own window, pooling, heads and last tokens.
"""

_DEFAULTS = """
## What each method and preset decides

Settings that are not given, from the tables in `obcache_sglang/settings/methods.py`. On a server with a head profile the budget of every method
but `replay` and `hidden-gate` is `profile`, and heads are `per-head`.
"""

_DECIDED = ("score", "window", "pooling", "kernel_size", "sink_tokens", "recent_tokens", "heads", "budget")

_SERVER = """
## How the server offers it

The server's alone, but for `mode`, which a request may set too.
"""

_BOUNDS = """
## Bounds

A number outside its bounds is refused: at start-up for a flag, with a 400 for a request.
`context_len` and `ttl_seconds` are keys of requests; `wait_seconds` is a query parameter of `DELETE`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE", help="default: obcache_sglang/docs/options.md")
    output: Path = parser.parse_args().output
    output.write_text(make_page(), encoding="utf-8")
    print(output)


def make_page() -> str:
    """The page, as Markdown."""
    bounds = ["", "| key | lowest | highest | reason |", "|---|---|---|---|"]
    bounds += [f"| `{name}` | {lowest:,} | {highest:,} | {reason} |" for name, (lowest, highest, reason) in BOUNDS.items()]
    return "\n".join(
        [
            _HEAD + _PER_REQUEST,
            *_table(COMPRESSION_OPTIONS),
            _DEFAULTS,
            *_defaults(),
            _SERVER,
            *_table(SERVER_OPTIONS),
            _BOUNDS[:-1],
            *bounds,
            "",
        ]
    )


def _defaults() -> list[str]:
    rows = [(f"method `{name}`", {"method": name}) for name in METHODS]
    rows += [(f"preset `{name}`", {"preset": name}) for name in PRESETS if name != "default"]
    table = [f"| | {' | '.join(f'`{name}`' for name in _DECIDED)} |", "|---" * (len(_DECIDED) + 1) + "|"]
    for label, given in rows:
        settings = CompressionSettings.resolve(given)
        values = ["all" if (value := getattr(settings, name)) == EVERY_QUERY and name == "window" else value for name in _DECIDED]
        table.append(f"| {label} | {' | '.join(map(str, values))} |")
    return table


def _table(options: Iterable[Option]) -> list[str]:
    return ["| flag and key | values | default | effect |", "|---|---|---|---|", *map(_row, options)]


def _row(option: Option) -> str:
    # argparse wants percent signs twice.
    # The page has a table of what the method decides.
    help_text = option.help.replace("%%", "%").replace("(docs/options.md)", "(below)")
    effect, _, default = help_text.partition("Default: ")
    default = default.strip().removesuffix(".") or "off"
    values = "switch" if option.metavar is None else f"`{option.metavar}`"
    # The marker would be read as HTML.
    cells = (
        f"`{option.flag}`<br>`{option.name}`",
        values,
        f"`{default}`" if default.startswith("<") else default,
        effect.strip(),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
