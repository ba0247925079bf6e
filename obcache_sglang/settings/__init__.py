"""Settings: `values` (of a compression), `server`, `methods` (what each method decides), `options` (flags, checks, help), `sources`."""

from obcache_sglang.settings.bounds import BOUNDS
from obcache_sglang.settings.checks import check_number, check_whole_number, number_or_text
from obcache_sglang.settings.methods import BUDGETS, EVERY_QUERY, METHODS, POOLINGS, PRESETS, SCORES
from obcache_sglang.settings.options import (
    COMPRESSION_OPTIONS,
    MODES,
    OPTIONS,
    SERVER_OPTIONS,
    Option,
)
from obcache_sglang.settings.server import ServerSettings
from obcache_sglang.settings.sources import (
    MADE_HERE,
    SETTINGS_ENV,
    add_cli_flags,
    add_flags_to_serve_help,
    flags_help,
    publish,
    published_settings,
    server_secret,
    settings_from_cli,
    settings_from_python,
    with_gates,
)
from obcache_sglang.settings.values import CompressionSettings

__all__ = [
    "BOUNDS",
    "BUDGETS",
    "COMPRESSION_OPTIONS",
    "EVERY_QUERY",
    "MADE_HERE",
    "METHODS",
    "MODES",
    "OPTIONS",
    "POOLINGS",
    "PRESETS",
    "SCORES",
    "SERVER_OPTIONS",
    "SETTINGS_ENV",
    "CompressionSettings",
    "Option",
    "ServerSettings",
    "add_cli_flags",
    "add_flags_to_serve_help",
    "check_number",
    "check_whole_number",
    "flags_help",
    "number_or_text",
    "publish",
    "published_settings",
    "server_secret",
    "settings_from_cli",
    "settings_from_python",
    "with_gates",
]
