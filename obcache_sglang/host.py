"""The one table of every SGLang name this package touches, and its comparison with the installed SGLang.

Each module that touches SGLang declares its rows (`Touch`) next to that code; this module gathers them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

TESTED_SGLANG = "0.5.23"
"""The SGLang release this package is written for and tested with."""

Kind = Literal["before", "after", "around", "replace", "call", "read", "subclass"]
Process = Literal["launcher", "tokenizer", "scheduler", "controller", "all"]

HOOK_KINDS: frozenset[str] = frozenset({"before", "after", "around", "replace"})

# Modules that declare rows, as TOUCHES.
_DECLARED_IN = (
    "plugin",
    "support",
    "engine",
    "frontend.control",
    "frontend.exchange",
    "frontend.hooks",
    "frontend.openai_reports",
    "frontend.service",
    "frontend.shutdown",
    "frontend.http_api",
    "scheduler.hooks",
    "scheduler.start_hooks",
    "scheduler.wiring",
    "scheduler.rank_gates",
    "scheduler.served_model",
    "scheduler.engine_view",
    "scheduler.manager",
    "scheduler.requests",
    "scheduler.context_cache",
    "scheduler.tree",
    "scheduler.host_memory",
    "scheduler.forward",
    "scheduler.kv_events",
    "compress.head_gains",
    "compress.rotary",
    "kv.cells",
    "cpu.platform",
    "cpu.host_pool",
    "gpu",
)


@dataclass(frozen=True)
class Touch:
    """One SGLang name that we rely on.

    target: dotted path. For a field that exists only on instances, the class; `why` then names the field.
    kind: before | after | around | replace: a hook of ours sits there (`hook`, applied through SGLang's HookRegistry);
        call | read: our code uses it; subclass: a class of ours extends it.
    why: one line.
    parameters: names of its parameters that we pass or read by name.
    process: where we touch it. launcher and tokenizer are one process in the servers we support; controller is the
        data-parallel controller.
    hook: the hook function, for hook kinds only.
    """

    target: str
    kind: Kind
    why: str
    parameters: tuple[str, ...] = ()
    process: Process = "all"
    hook: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if (self.kind in HOOK_KINDS) != (self.hook is not None):
            raise TypeError(f"{self.target}: the kinds {sorted(HOOK_KINDS)} need a hook function, and no other kind may have one")

    @property
    def is_hook(self) -> bool:
        return self.hook is not None


def use(target: str, kind: Kind, why: str, parameters: tuple[str, ...] = (), process: Process = "scheduler") -> Touch:
    """A row without a hook, by default of the scheduler process."""
    return Touch(target, kind, why, parameters, process)


def scheduler_hook(target: str, kind: Kind, hook: Callable[..., Any], why: str, parameters: tuple[str, ...] = ()) -> Touch:
    """A row with a hook in the scheduler process."""
    return Touch(target, kind, why, parameters, "scheduler", hook)


@dataclass(frozen=True)
class TouchState:
    """What the installed SGLang has of one row.

    missing_parameters: names in `touch.parameters` that it lacks.
    in_place: for a hook, whether it is called in this process; None for other kinds.
    """

    touch: Touch
    found: bool
    missing_parameters: tuple[str, ...]
    in_place: bool | None

    @property
    def ok(self) -> bool:
        """Whether SGLang still has what we rely on (says nothing about hooks being applied)."""
        return self.found and not self.missing_parameters


@cache
def host_table() -> tuple[Touch, ...]:
    """Every row, in the order of the modules that declare them."""
    return tuple(row for name in _DECLARED_IN for row in importlib.import_module(f"obcache_sglang.{name}").TOUCHES)


def hook_rows(process: Literal["launcher", "scheduler"]) -> tuple[Touch, ...]:
    """The hooks of the launcher (with its tokenizer), or of the processes it starts: schedulers and their controller."""
    processes = {"launcher": ("launcher", "tokenizer", "all"), "scheduler": ("scheduler", "controller", "all")}[process]
    return tuple(touch for touch in host_table() if touch.is_hook and touch.process in processes)


def check_host() -> list[TouchState]:
    """Compares every row with the installed SGLang."""
    return [check_touch(touch) for touch in host_table()]


def check_touch(touch: Touch) -> TouchState:
    """Compares one row with the installed SGLang. Imports the module it names."""
    in_place = hook_in_place(touch) if touch.is_hook else None
    try:
        target = pkgutil.resolve_name(touch.target)
    except (ImportError, AttributeError):
        return TouchState(touch, False, touch.parameters, in_place)
    return TouchState(touch, True, _missing_parameters(target, touch.parameters), in_place)


def hook_in_place(touch: Touch) -> bool:
    """Whether this row's hook is really called in this process.

    Looks at the function itself, along the chain of wrappers that SGLang's HookRegistry builds. The registry's own record says only
    that a target was patched once; it says so even if this hook was registered too late.
    """
    try:
        function: Any = pkgutil.resolve_name(touch.target)
    except (ImportError, AttributeError):
        return False
    while function is not None:
        if function is touch.hook:
            return True
        function = getattr(function, "__func__", function)
        closure = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is touch.hook for cell in closure):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def installed_sglang() -> str:
    """The installed SGLang's release, as its package metadata says."""
    return version("sglang")


def _missing_parameters(target: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        return ()
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return names
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return ()
    return tuple(name for name in names if name not in parameters)
