"""Settings: defaults, what is refused and in which words, and the way from a command line to a child process."""

import argparse
import json

import pytest

from obcache_sglang import settings as config
from obcache_sglang.errors import ConfigError, InvalidValue
from obcache_sglang.settings import (
    EVERY_QUERY,
    SETTINGS_ENV,
    CompressionSettings,
    ServerSettings,
    add_cli_flags,
    publish,
    published_settings,
    settings_from_cli,
    settings_from_python,
)


def parse(*argv: str) -> ServerSettings | None:
    parser = argparse.ArgumentParser()
    add_cli_flags(parser)
    return settings_from_cli(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("given", "window", "pooling", "kernel_size", "sink_tokens", "heads", "budget"),
    [
        ({}, 1, "none", 1, 4, "shared", "uniform"),
        ({"method": "snapkv"}, 64, "average", 5, 4, "per-head", "adakv"),
        ({"preset": "kvpress"}, 64, "average", 5, 0, "per-head", "uniform"),
        ({"preset": "paper"}, 16, "max", 7, 4, "per-head", "uniform"),
        ({"method": "tova"}, 1, "none", 1, 4, "shared", "uniform"),
        ({"method": "tova", "preset": "kvpress"}, 1, "none", 1, 0, "shared", "uniform"),
        ({"method": "tova", "heads": "per-head"}, 1, "none", 1, 4, "per-head", "uniform"),
        ({"method": "h2o"}, 64, "none", 1, 4, "per-head", "adakv"),
        ({"method": "h2o", "window": "all"}, EVERY_QUERY, "none", 1, 4, "per-head", "adakv"),
        ({"method": "h2o", "pooling": "max"}, 64, "max", 5, 4, "per-head", "adakv"),
        ({"method": "random"}, 64, "none", 1, 4, "per-head", "uniform"),
        ({"pooling": "max"}, 1, "max", 5, 4, "shared", "uniform"),
        ({"method": "snapkv", "pooling": "none"}, 64, "none", 1, 4, "per-head", "adakv"),
        ({"preset": "paper", "window": 32, "kernel_size": 3}, 32, "max", 3, 4, "per-head", "uniform"),
        ({"method": "tova", "budget": "global"}, 1, "none", 1, 4, "per-head", "global"),
        ({"method": "random", "budget": "adakv"}, 64, "none", 1, 4, "per-head", "adakv"),
        ({"budget": "adakv"}, 1, "none", 1, 4, "per-head", "adakv"),
        ({"method": "snapkv", "heads": "shared"}, 64, "average", 5, 4, "shared", "uniform"),
        ({"method": "replay"}, EVERY_QUERY, "none", 1, 4, "per-head", "global"),
        ({"preset": "kvzip"}, EVERY_QUERY, "none", 1, 4, "per-head", "global"),
        ({"preset": "kvpress", "budget": "adakv"}, 64, "average", 5, 0, "per-head", "adakv"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "defaults" if isinstance(value, dict) else None,
)
def test_method_and_preset_decide_what_is_not_given(given, window, pooling, kernel_size, sink_tokens, heads, budget):
    settings = CompressionSettings.resolve(given)
    assert (settings.window, settings.pooling, settings.kernel_size) == (window, pooling, kernel_size)
    assert (settings.sink_tokens, settings.heads, settings.budget) == (sink_tokens, heads, budget)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compression_ratio": 1.2}, "1.2 is outside [0, 1)"),
        ({"compression_ratio": True}, "outside [0, 1)"),
        ({"compression_ratio": float("nan")}, "outside [0, 1)"),
        ({"method": "kvzip"}, "choose snapkv, h2o, tova, replay, gate, hidden-gate, streaming or random"),
        ({"budget": "pyramid"}, "choose uniform, adakv, global or profile"),
        ({"budget": "adakv", "heads": "shared"}, "Set budget=uniform"),
        ({"adakv_safeguard": 1.5}, "1.5 is outside [0, 1]"),
        ({"method": "replay", "window": 64}, "cannot be used with method=replay"),
        ({"preset": "kvzip", "score": "obcache-v"}, "score=attention"),
        ({"preset": "kvzip", "method": "snapkv"}, "method=replay"),
        ({"preset": "kvzip", "replay_attention": "local"}, "replay_attention=whole"),
        ({"method": "replay", "budget": "uniform", "replay_attention": "local"}, "Set budget=global, profile or adakv"),
        ({"replay_attention": "near"}, "choose whole or local"),
        ({"normalization": "head"}, "choose layer or none"),
        ({"window": "all"}, "h2o only"),
        ({"window": 0, "method": "h2o", "score": None}, "choose attention"),
        ({"window": 2, "method": "tova"}, "last query only"),
        ({"method": "gate", "pooling": "average"}, "cannot be used with method=gate. Choose none or max."),
        ({"window": 1.5}, 'a whole number from 1 to 8192, or "all"'),
        ({"kernel_size": 4}, "an odd whole number"),
        ({"kernel_size": 3, "pooling": "none"}, "no effect without pooling"),
        ({"kernel_size": 3, "method": "h2o"}, "no effect without pooling"),
        ({"sink_tokens": -1}, "from 0 to"),
        ({"max_kept_tokens": 0}, "from 1 to"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused_with_what_is_allowed(given, words):
    with pytest.raises(InvalidValue) as refused:
        CompressionSettings.resolve(given)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("ratio", "max_kept", "context_tokens", "page_size", "kept", "slots"),
    [
        (0.7, None, 1000, 1, 300, 300),
        (0.7, None, 1008, 16, 302, 304),  # 302 tokens need 19 pages
        (0.0, None, 77, 1, 77, 77),
        (0.9, None, 1000, 1, 99, 99),  # 1000 * (1 - 0.9) is 99.99..., as in KVPress
        (0.5, 64, 1000, 1, 64, 64),
        (0.99, None, 32, 16, 1, 16),  # int() gives 0; a context holds at least one token
        (0.01, None, 48, 16, 47, 48),
    ],
)
def test_kept_tokens_and_slots(ratio, max_kept, context_tokens, page_size, kept, slots):
    settings = CompressionSettings.resolve({"compression_ratio": ratio, "max_kept_tokens": max_kept})
    assert settings.kept_tokens(context_tokens) == kept
    assert settings.kept_slots(context_tokens, page_size) == slots


def test_settings_survive_json_and_identify_themselves():
    settings = CompressionSettings.resolve({"method": "h2o", "window": "all", "max_kept_tokens": 50})
    again = CompressionSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert again.fingerprint() == settings.fingerprint()
    assert len(settings.fingerprint()) == 16
    different = {CompressionSettings.resolve({"sink_tokens": n}).fingerprint() for n in range(8)}
    assert len(different) == 8
    # Contexts outlive a process: a fingerprint that changes makes every stored one unreachable.
    assert CompressionSettings().fingerprint() == "33b9a504341aa96e"


def test_every_setting_has_an_option_and_every_option_a_setting():
    of_compression = {option.name for option in config.COMPRESSION_OPTIONS}
    # Where a prompt's segments end is what the prompt says, and no setting of a server.
    assert of_compression == set(CompressionSettings.__dataclass_fields__) - {"boundaries", "exact_tokens"}
    of_server = {option.name for option in config.SERVER_OPTIONS}
    assert of_server == set(ServerSettings.__dataclass_fields__) - {"compression", "given"}


def test_flags_take_their_defaults_from_the_settings():
    assert parse() is None
    assert parse("--obcache") == ServerSettings()


def test_flags_reach_the_settings():
    settings = parse(
        *[
            "--obcache",
            "--obcache-compression-ratio",
            "0.5",
            "--obcache-method",
            "h2o",
            "--obcache-window",
            "all",
            "--obcache-mode",
            "prompt",
        ],
        *[
            "--obcache-marker",
            "<|cut|>",
            "--obcache-min-tokens",
            "10",
            "--obcache-max-pinned-slots",
            "0",
            "--obcache-decode-graphs",
            "on",
            "--obcache-allow-untested-sglang",
        ],
    )
    assert settings is not None
    assert settings.captures_decode_graphs
    assert settings.compression.compression_ratio == 0.5
    assert settings.compression.window == EVERY_QUERY
    assert (settings.mode, settings.marker, settings.min_tokens, settings.max_pinned_slots) == ("prompt", "<|cut|>", 10, 0)
    assert settings.allow_untested_sglang


def test_decode_graphs_go_with_triton_only():
    with pytest.raises(ConfigError, match="--obcache-decode-graphs=on cannot be used with head_attention=flashinfer"):
        parse("--obcache", "--obcache-decode-graphs", "on", "--obcache-head-attention", "flashinfer")


@pytest.mark.parametrize(
    ("flags", "captured"),
    [
        ([], False),
        (["--obcache-budget", "adakv"], True),
        (["--obcache-head-profile", "smollm2-135m"], True),
        (["--obcache-budget", "adakv", "--obcache-head-attention", "flashinfer"], False),
        (["--obcache-budget", "adakv", "--obcache-decode-graphs", "off"], False),
        (["--obcache-decode-graphs", "on"], True),
    ],
    ids=str,
)
def test_decode_graphs_are_for_servers_whose_budget_needs_them(flags: list[str], captured: bool):
    settings = parse("--obcache", *flags)
    assert settings is not None and settings.captures_decode_graphs is captured


def test_wrong_flags_are_named_as_the_operator_wrote_them():
    with pytest.raises(ConfigError) as error:
        parse("--obcache", "--obcache-compression-ratio=1.2")
    assert str(error.value) == (
        "--obcache-compression-ratio=1.2 is outside [0, 1). It is the fraction of KV pairs that is removed: 0.7 keeps 30 %."
    )
    with pytest.raises(ConfigError, match="--obcache-window=many is not a whole number"):
        parse("--obcache", "--obcache-window", "many")
    with pytest.raises(ConfigError, match="--obcache-method, --obcache-window given without --obcache"):
        parse("--obcache-method", "h2o", "--obcache-window", "8")


def test_every_flag_is_explained_in_the_help():
    parser = argparse.ArgumentParser()
    add_cli_flags(parser)
    text = " ".join(parser.format_help().split())
    assert "0.7 keeps 30 %." in text
    for option in config.OPTIONS.values():
        assert option.flag in text


def test_engine_settings_are_checked_like_flags():
    assert settings_from_python(False) is None
    assert settings_from_python(True) == ServerSettings()
    assert settings_from_python({"compression_ratio": 0.5}).compression.compression_ratio == 0.5
    with pytest.raises(ConfigError, match=r"obcache=\{'ratio': 0\.5\} is not a setting; the settings are compression_ratio"):
        settings_from_python({"ratio": 0.5})
    with pytest.raises(ConfigError, match="is not True, False or a dict"):
        settings_from_python("yes")


def test_settings_travel_through_the_environment(monkeypatch):
    monkeypatch.delenv(SETTINGS_ENV, raising=False)
    assert published_settings() is None
    settings = settings_from_python({"method": "tova", "mode": "prompt", "max_pinned_slots": 100, "marker": "¶"})
    monkeypatch.setenv(SETTINGS_ENV, "")  # so that the variable set below is taken back
    publish(settings)
    received = published_settings()
    assert received == settings
    assert received.given == {"method": "tova"}
    monkeypatch.setenv(SETTINGS_ENV, '{"method": 3}')
    with pytest.raises(ConfigError, match="It is set by --obcache"):
        published_settings()


def test_a_request_that_names_another_method_gets_that_methods_window():
    server = settings_from_python({"method": "snapkv", "window": 32, "compression_ratio": 0.5, "sink_tokens": 8})
    assert server.compression_for({}) is server.compression
    assert server.compression_for({"score": "attention"}).window == 32
    tova = server.compression_for({"method": "tova"})
    assert (tova.window, tova.heads, tova.compression_ratio, tova.sink_tokens) == (1, "shared", 0.5, 8)
    paper = server.compression_for({"preset": "paper"})
    assert (paper.window, paper.pooling, paper.sink_tokens) == (16, "max", 4)
    assert server.compression_for({"method": "snapkv"}).window == 32


def test_a_head_profile_decides_budgets_unless_told():
    server = settings_from_python({"head_profile": "smollm2-135m", "method": "tova"})
    assert (server.compression.budget, server.compression.heads) == ("profile", "per-head")
    assert server.compression_for({"method": "snapkv"}).budget == "profile"
    assert server.compression_for({"method": "replay"}).budget == "global"
    assert server.compression_for({"preset": "kvzip"}).budget == "global"
    assert server.compression_for({"budget": "uniform"}).heads == "shared"
    alone = settings_from_python({"head_profile": "smollm2-135m"}).compression
    assert (alone.method, alone.score, alone.budget, alone.heads) == ("tova", "obcache-v", "profile", "per-head")
    assert settings_from_python({"head_profile": "smollm2-135m", "budget": "global"}).compression.budget == "global"
    replay = settings_from_python({"head_profile": "smollm2-135m", "method": "replay"})
    assert (replay.compression.budget, replay.compression_for({"method": "tova"}).budget) == ("global", "profile")
    for without in (
        lambda: settings_from_python({"budget": "profile"}),
        lambda: settings_from_python(True).compression_for({"budget": "profile"}),
    ):
        with pytest.raises((ConfigError, InvalidValue), match="--obcache-head-profile"):
            without()


def test_methods_and_presets_have_scores_of_their_own_unless_told():
    scores = {method: CompressionSettings.resolve({"method": method}).score for method in ("tova", "snapkv", "h2o", "replay")}
    assert scores == {"tova": "obcache-v", "snapkv": "obcache-k", "h2o": "obcache-k", "replay": "obcache-v"}
    presets = {preset: CompressionSettings.resolve({"preset": preset}) for preset in ("default", "kvpress", "paper", "kvzip")}
    assert [each.method for each in presets.values()] == ["tova", "snapkv", "snapkv", "replay"]
    assert [each.score for each in presets.values()] == ["obcache-v", "obcache-k", "obcache-k", "attention"]
    assert (
        CompressionSettings.resolve({"preset": "kvzip"}).to_dict().items() >= {"method": "replay", "score": "attention"}.items()
    )
    assert [CompressionSettings.resolve({"method": "replay", "score": s}).reduce for s in ("attention", "obcache-k")] == [
        "max",
        "sum",
    ]


def test_recent_tokens_are_kept_where_no_window_is():
    kept = {method: CompressionSettings.resolve({"method": method}).kept_window for method in ("snapkv", "tova", "replay")}
    assert kept == {"snapkv": 64, "tova": 1, "replay": 8}
    assert CompressionSettings.resolve({"preset": "kvzip"}).kept_window == 0
    assert CompressionSettings.resolve({"method": "replay", "budget": "adakv"}).kept_window == 0
    assert CompressionSettings.resolve({"method": "tova", "recent_tokens": 5}).kept_window == 5
    server = settings_from_python({"method": "replay", "recent_tokens": 30})
    assert [server.compression_for({"method": m}).recent_tokens for m in ("replay", "tova")] == [30, 0]


def test_a_budget_that_was_given_holds_for_every_method():
    server = settings_from_python({"budget": "global"})
    assert server.compression_for({"method": "tova"}).budget == "global"
    assert server.compression_for({"preset": "kvpress"}).budget == "global"
    adakv = settings_from_python({"budget": "adakv", "score": "obcache-k"})
    assert adakv.compression_for({"preset": "kvzip"}).budget == "global"  # kvzip is one thing
    assert settings_from_python(True).compression_for({"method": "tova"}).budget == "uniform"


def test_a_local_replay_reads_shorter_chunks_unless_told():
    server = settings_from_python({"method": "replay", "replay_attention": "local"})
    assert server.compression.replay_chunk == 256
    assert server.compression_for({"replay_attention": "whole"}).replay_chunk == 2048
    assert server.compression_for({"replay_chunk": 100}).replay_chunk == 100
    assert server.compression_for({"preset": "kvzip"}).replay_attention == "whole"
    # Where a replay does not score, it may be said all the same: for the requests that ask for one.
    assert settings_from_python({"replay_attention": "local"}).compression_for({"method": "replay"}).replay_attention == "local"


@pytest.mark.parametrize(
    ("given", "weighs", "measures"),
    [
        ({"method": "replay"}, True, True),
        ({"method": "replay", "score": "attention"}, False, True),
        ({"preset": "kvzip"}, False, False),
        ({"preset": "kvzip", "recent_tokens": 8}, False, False),
        ({"method": "replay", "score": "attention", "normalization": "none"}, False, False),
        ({"method": "replay", "normalization": "none"}, False, False),
        ({"method": "replay", "budget": "adakv"}, False, False),
        ({"method": "snapkv", "budget": "global"}, True, False),
        ({"method": "snapkv", "score": "attention", "budget": "global"}, False, False),
    ],
    ids=str,
)
def test_what_is_weighted_and_what_is_measured(given, weighs, measures):
    settings = CompressionSettings.resolve(given)
    assert (settings.weighs_queries, settings.measures_errors) == (weighs, measures)
