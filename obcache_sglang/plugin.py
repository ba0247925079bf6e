"""Entry point of SGLang's plugin system: with `--obcache`, either all hooks are in place or the server does not start.

SGLang calls `register` in every process of a server (`sglang.srt.plugins.load_plugins`), and goes on if a plugin or a hook fails. So
activation has two stages, and each is verified:

1. In the launcher, `register` adds the command-line flags, and the hooks that refuse requests which rely on compression. Parsing
   `--obcache` (or `Engine(obcache=...)`) calls `activate`: it puts the settings into the environment, applies the hooks of this process
   and checks that they are in place.
2. In a child process, `register` finds the settings and applies the hooks of that process. Each scheduler reports that it is active
   when it is ready. The launcher refuses to serve if one does not.

Whatever must stop the server raises SystemExit, since SGLang would swallow an Exception.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, NoReturn

from obcache_sglang import __version__
from obcache_sglang.compress.gates import GateFile
from obcache_sglang.compress.head_profile import AUTO, HeadProfile
from obcache_sglang.compress.hidden_gates import find_hidden_gates, load_hidden_gates
from obcache_sglang.errors import ConfigError, HostError
from obcache_sglang.frontend.hooks import GUARD_TOUCHES
from obcache_sglang.host import Touch, hook_in_place, hook_rows
from obcache_sglang.kv.folder import Folder
from obcache_sglang.settings import (
    MADE_HERE,
    OPTIONS,
    SETTINGS_ENV,
    ServerSettings,
    add_cli_flags,
    publish,
    published_settings,
    settings_from_cli,
    with_gates,
)
from obcache_sglang.support import check_supported

logger = logging.getLogger(__name__)

_registered: set[tuple[str, int]] = set()


def register() -> None:
    """Called by SGLang in every process. Idempotent."""
    if multiprocessing.parent_process() is None:
        # A launcher gets its settings from its own flags: a variable left in a shell must not turn anything on.
        if not _registered:
            deactivate()
        _apply((*CLI_TOUCHES, *GUARD_TOUCHES))
        return
    try:
        settings = published_settings()
        if settings is not None:
            apply_hooks("scheduler")
    except Exception as error:
        raise SystemExit(f"obcache_sglang: this process cannot run with compression: {error}") from error


def activate(settings: ServerSettings) -> None:
    """Turns compression on in the launcher and in every process it starts from now on.

    Raises HostError if a hook of the launcher is not in place afterwards.
    """
    publish(settings)
    apply_hooks("launcher")
    compression = settings.compression
    logger.info(
        "obcache_sglang %s is active: ratio %s, method %s, score %s, preset %s, mode %s, contexts of %s tokens or more.",
        __version__,
        compression.compression_ratio,
        compression.method,
        compression.score,
        compression.preset,
        settings.mode,
        settings.min_tokens,
    )
    if not settings.has_profile and settings.mode == "marked" and compression.own_queries_score:
        logger.warning(
            "obcache: method %s scores a context with its own last queries, which do not know the question. At high ratios it loses "
            "details. --obcache-gates auto, --obcache-head-profile auto or --obcache-method replay keeps more of them (see Limits in the README).",
            compression.method,
        )


def with_measured_files(settings: ServerSettings, model: str) -> ServerSettings:
    """The settings with the files of the model's head profile and gates in place of `auto`; measures what there is none of.

    Raises HostError if that fails, and ConfigError for a file that is not what it should be.
    """
    if settings.folder is not None:
        Folder.opened(settings.folder)
    head_profile = _measured_file("head_profile", settings.head_profile, HeadProfile.load, model)
    gates = _measured_file("gates", settings.gates, GateFile.load, model)
    hidden_gates = settings.hidden_gates
    if hidden_gates is not None:
        # Fetched once, not by each process.
        hidden_gates = str(find_hidden_gates(hidden_gates))
    settings = replace(settings, head_profile=head_profile, gates=gates, hidden_gates=hidden_gates)
    if gates is None and settings.calibrate == "serve":
        return _with_gates_made_before(settings, model)
    return settings


def _with_gates_made_before(settings: ServerSettings, model: str) -> ServerSettings:
    """The settings with the gates that a server made of itself at an earlier start, if there are any."""
    from obcache_sglang import measured_files

    try:
        file = measured_files.made_gates(model)
    except (OSError, ValueError) as error:
        raise HostError(f"--obcache-calibrate serve: {error}") from error
    later = with_gates(settings, MADE_HERE if file is None else str(file))
    if later is None:
        raise ConfigError(
            "--obcache-calibrate serve makes method gate the default, which other flags exclude (see --obcache-gates). Remove them, "
            "or give --obcache-method too."
        )
    return settings if file is None else later


def _measured_file(name: str, file: str | None, load: Callable[[str], Any], model: str) -> str | None:
    """The file of one setting, made where it is `auto`, else tried with `load`."""
    if file is None:
        return None
    if file != AUTO:
        load(file)
        return file
    # Imports transformers' models, which a launcher does not need otherwise.
    from obcache_sglang import measured_files

    try:
        return str((measured_files.profile_for if name == "head_profile" else measured_files.gates_for)(model))
    except (OSError, ValueError) as error:
        raise HostError(f"{OPTIONS[name].flag} auto: {error}") from error


def deactivate() -> None:
    """Turns compression off in processes started from now on. Hooks in this process stay, and do nothing without settings."""
    os.environ.pop(SETTINGS_ENV, None)


def apply_hooks(process: Literal["launcher", "scheduler"]) -> None:
    """Applies the hooks of a `launcher` or a `scheduler` (any child process). Raises HostError naming those that are not in place."""
    touches = hook_rows(process)
    _apply(touches)
    missing = [touch.target for touch in touches if not hook_in_place(touch)]
    if missing:
        raise HostError(
            f"--obcache cannot be used, since these hooks are not in place: {', '.join(missing)}. "
            "Run `python -m obcache_sglang.check` to see what this SGLang lacks, or start without --obcache."
        )


def _apply(touches: Iterable[Touch]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for touch in touches:
        key = (touch.target, id(touch.hook))
        if touch.hook is not None and key not in _registered:
            _registered.add(key)
            HookRegistry.register(touch.target, touch.hook, HookType(touch.kind))
    HookRegistry.apply_hooks()


# --- hooks of the launcher ----------------------------------------------------------------------------------------------


def _add_flags(result: None, parser: argparse.ArgumentParser) -> None:
    """After ServerArgs.add_cli_args: adds our flags to SGLang's parser, and a suggestion to its error for a misspelt flag."""
    add_cli_flags(parser)
    plain = parser.error

    def error(message: str) -> NoReturn:
        flags = [option.flag for option in OPTIONS.values()]
        # argparse also names flags that exist: what it does not know, it lists after these words.
        unknown = message.partition("unrecognized arguments: ")[2].split()
        wrong = [each for word in unknown if (each := word.partition("=")[0]).startswith("--obcache")]
        near = [match for each in wrong for match in difflib.get_close_matches(each, flags, n=1)]
        hint = f". Did you mean {', '.join(near)}? `python -m obcache_sglang.check --flags` lists all flags" if near else ""
        plain(message + hint)

    parser.error = error  # type: ignore[method-assign]


def _take_settings(server_args: Any, cls: type, args: argparse.Namespace) -> None:
    """After ServerArgs.from_cli_args, which drops arguments it does not know: our flags become settings."""
    try:
        settings = settings_from_cli(args)
        if settings is None:
            deactivate()
            return
        check_supported(settings, server_args)
        activate(with_measured_files(settings, server_args.model_path))
    except (ConfigError, HostError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def _check_before_launch(cls: type, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Before Engine._launch_scheduler_processes, with options resolved and nothing spawned: refuses what is not supported."""
    settings = published_settings()
    if settings is None:
        return
    from sglang.srt.arg_groups.model_override_base import model_config_of

    try:
        model_config = model_config_of(server_args)
        check_supported(settings, server_args, model_config)
        if settings.head_profile is not None:
            HeadProfile.load(settings.head_profile).check_model(model_config.hf_config)
        if settings.gates is not None:
            GateFile.load(settings.gates).check_model(model_config.hf_config)
        if settings.hidden_gates is not None:
            load_hidden_gates(settings.hidden_gates).check_model(model_config.hf_config)
    except (ConfigError, HostError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def _check_after_launch(result: tuple[Any, ...], cls: type, *args: Any, **kwargs: Any) -> None:
    """After Engine._launch_subprocesses: every scheduler must have reported that it runs with compression."""
    if published_settings() is None:
        return
    infos = result[3].scheduler_infos
    silent = [rank for rank, info in enumerate(infos) if not info.get("obcache")]
    if silent or not infos:
        raise SystemExit(
            f"HostError: --obcache was given, but scheduler processes {silent} of {len(infos)} run without compression. Their plugin is "
            "excluded (SGLANG_PLUGINS, SGLANG_PLATFORM) or failed to load. See their log above, and run `python -m obcache_sglang.check`."
        )


def _forward_init_info(result: dict[str, Any], controller: Any) -> None:
    """After DataParallelController.get_init_info: the controller reports for its schedulers, so it must report this too."""
    infos = controller._scheduler_init_infos
    if infos and all(info.get("obcache") for info in infos):
        result["obcache"] = infos[0]["obcache"]


CLI_TOUCHES = (
    Touch(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "after",
        "adds --obcache and its flags to `sglang serve` and `python -m sglang.launch_server`",
        ("parser",),
        "launcher",
        _add_flags,
    ),
    Touch(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "after",
        "takes our flags out of the parsed arguments; SGLang keeps declared fields only",
        ("args",),
        "launcher",
        _take_settings,
    ),
)

TOUCHES = (
    *CLI_TOUCHES,
    Touch(
        "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
        "before",
        "last moment before processes start, first moment with resolved options: unsupported ones are refused",
        ("server_args",),
        "launcher",
        _check_before_launch,
    ),
    Touch(
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        "after",
        "refuses to serve unless every scheduler reported that compression is active",
        (),
        "launcher",
        _check_after_launch,
    ),
    Touch(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info",
        "after",
        "with data parallelism the controller reports in its schedulers' place",
        (),
        "controller",
        _forward_init_info,
    ),
    Touch(
        "sglang.srt.entrypoints.engine.SchedulerInitResult",
        "read",
        "scheduler_infos: what each scheduler reported when it was ready",
        (),
        "launcher",
    ),
    Touch(
        "sglang.srt.plugins.hook_registry.HookRegistry.register",
        "call",
        "registers hooks",
        ("target", "hook", "hook_type"),
    ),
    Touch("sglang.srt.plugins.hook_registry.HookRegistry.apply_hooks", "call", "applies hooks; safe to call again"),
)
