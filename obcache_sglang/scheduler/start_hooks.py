"""Where SGLang calls us while a scheduler process starts. What fails here stops the server."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from obcache_sglang.host import Touch, hook_in_place, hook_rows, scheduler_hook
from obcache_sglang.kv.cells import create_one_space
from obcache_sglang.scheduler.wiring import Wiring, manager_of
from obcache_sglang.settings import published_settings


def around_create_buffers_normal(create: Any, pool: Any) -> None:
    if type(pool) is not MHATokenToKVPool or not create_one_space(pool):
        create(pool)


def after_init_attention_backends(result: None, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    settings = published_settings()
    if settings is not None and not model_runner.is_draft_worker:
        Wiring.for_model(model_runner, settings).hang_on(model_runner)


def after_init_cuda_graphs(result: None, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    settings, wiring = published_settings(), Wiring.of(model_runner)
    if settings is not None and wiring is not None:
        wiring.capture_graphs(model_runner, settings)


def after_scheduler_init(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    settings, wiring = published_settings(), Wiring.of(scheduler.tp_worker.model_runner)
    assert settings is not None, "scheduler hooks are registered only with settings"
    assert wiring is not None, "attention backends are made before the scheduler is complete"
    wiring.add_manager(scheduler, settings)
    wiring.hang_on(scheduler, scheduler.tree_cache)


def after_get_init_info(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Tells the launcher that compression is active here; without this entry it refuses to serve."""
    hooks = hooks_in_place()
    return info if manager_of(scheduler) is None or not all(hooks.values()) else {**info, "obcache": {"hooks": hooks}}


def hooks_in_place() -> dict[str, bool]:
    """Of this process: each hook's target, and whether it is really called."""
    return {touch.target: hook_in_place(touch) for touch in hook_rows("scheduler")}


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"

TOUCHES: tuple[Touch, ...] = (
    scheduler_hook(f"{_SCHEDULER}.__init__", "after", after_scheduler_init, "makes the manager of this process"),
    scheduler_hook(
        f"{_SCHEDULER}.get_init_info", "after", after_get_init_info, "proves to the launcher that the hooks are in place"
    ),
    scheduler_hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",
        "after",
        after_init_attention_backends,
        "scoring runs after the attention backend's forward",
    ),
    scheduler_hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs",
        "after",
        after_init_cuda_graphs,
        "decode graphs for per-head budgets",
    ),
    scheduler_hook(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers_normal",
        "around",
        around_create_buffers_normal,
        "all layers' K and V in one address space, for per-head budgets",
    ),
)
