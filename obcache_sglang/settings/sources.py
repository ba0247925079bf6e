"""Where a server's settings come from: its command line or Python; in its other processes, the environment."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from obcache_sglang.errors import ConfigError, InvalidValue
from obcache_sglang.settings.options import OPTIONS, SERVER_OPTIONS
from obcache_sglang.settings.server import ServerSettings

SETTINGS_ENV = "OBCACHE_SGLANG_SETTINGS"
"""Environment variable that carries the server's settings, as JSON, from the launcher to every process it starts."""

_SECRET_ENV = "OBCACHE_SGLANG_SECRET"


def add_cli_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--obcache` and `--obcache-*` to `parser`, in a group of their own. All default to None, for not given."""
    group = parser.add_argument_group("obcache", "KV-cache compression of shared contexts (package obcache_sglang)")
    group.add_argument(
        "--obcache",
        action="store_true",
        default=None,
        help="Compress marked contexts once and answer many prompts from them.",
    )
    for option in OPTIONS.values():
        if option.is_switch:
            group.add_argument(option.flag, action="store_true", default=None, help=option.help)
        else:
            group.add_argument(option.flag, type=option.cli_type, default=None, metavar=option.metavar, help=option.help)


def flags_help() -> str:
    """The help of our flags alone."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    add_cli_flags(parser)
    return parser.format_help()


def add_flags_to_serve_help(argv: Sequence[str]) -> None:
    """If `argv` is `sglang serve --help`, prints the help of our flags when this process ends.

    SGLang prints the help of this command before it loads plugins, so its parser does not have our flags.
    """
    if argv[1:2] == ["serve"] and Path(argv[0]).name == "sglang" and not {"-h", "--help"}.isdisjoint(argv):
        atexit.register(print, f"\n{flags_help()}", end="")


def settings_from_cli(args: argparse.Namespace) -> ServerSettings | None:
    """The settings that parsed flags ask for, or None without `--obcache`. Raises ConfigError, naming the flag."""
    given = {name: value for name in OPTIONS if (value := getattr(args, f"obcache_{name}", None)) is not None}
    if not getattr(args, "obcache", None):
        if given:
            flags = ", ".join(OPTIONS[name].flag for name in given)
            raise ConfigError(
                f"{flags} given without --obcache, which turns compression on. Add --obcache, or remove these flags."
            )
        return None
    try:
        return ServerSettings.resolve(given)
    except InvalidValue as error:
        raise ConfigError(f"{OPTIONS[error.name].flag}={error.value} {error.reason}") from error


def settings_from_python(obcache: bool | Mapping[str, Any]) -> ServerSettings | None:
    """The settings of `Engine(obcache=...)`: True for the defaults, a mapping of settings, or False. Raises ConfigError."""
    if isinstance(obcache, bool):
        return ServerSettings() if obcache else None
    if not isinstance(obcache, Mapping):
        raise ConfigError(f"obcache={obcache!r} is not True, False or a dict of settings ({', '.join(OPTIONS)}).")
    try:
        return ServerSettings.resolve(obcache)
    except InvalidValue as error:
        raise ConfigError(f"obcache={{{error.name!r}: {error.value!r}}} {error.reason}") from error


def _given(settings: ServerSettings) -> dict[str, Any]:
    """The values from which these settings resolve."""
    defaults = ServerSettings()
    server = {
        option.name: getattr(settings, option.name)
        for option in SERVER_OPTIONS
        if getattr(settings, option.name) != getattr(defaults, option.name)
    }
    return server | dict(settings.given)


MADE_HERE = "made by this server"
"""What gates are called that have no file."""


def with_gates(settings: ServerSettings, gates: str) -> ServerSettings | None:
    """A server's settings once it has gates, which then are its default where no method was given.

    gates: their file, or what they are called. None where that and what was given exclude each other.
    """
    try:
        return ServerSettings.resolve({**_given(settings), "gates": gates})
    except InvalidValue:
        return None


def publish(settings: ServerSettings) -> None:
    """Hands the settings to every process started from this one, in the environment variable `SETTINGS_ENV`."""
    os.environ[SETTINGS_ENV] = json.dumps(_given(settings), sort_keys=True)
    os.environ[_SECRET_ENV] = secrets.token_hex(32)


def published_settings() -> ServerSettings | None:
    """The settings that a parent process published, or None if compression was not asked for. Raises ConfigError."""
    text = os.environ.get(SETTINGS_ENV)
    if not text:
        return None
    try:
        given = json.loads(text)
        return ServerSettings.resolve(given)
    except (InvalidValue, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{SETTINGS_ENV}={text!r} cannot be read ({error}). It is set by --obcache, as a JSON object. Unset it, and start the server again."
        ) from error


def server_secret() -> bytes:
    """The secret that context ids are made with: 32 random bytes, the same in all processes of a server."""
    return bytes.fromhex(os.environ[_SECRET_ENV])
