"""`sgl.Engine` with compression: the offline engine's form of `--obcache`."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from sglang.srt.entrypoints.engine import Engine as SGLangEngine

from obcache_sglang import plugin
from obcache_sglang.frontend import files, service
from obcache_sglang.host import Touch
from obcache_sglang.settings import settings_from_python

T = TypeVar("T")


class Engine(SGLangEngine):
    """SGLang's Engine, serving marked contexts from compressed KV caches.

    obcache: True for the defaults, or a dict of settings, named like the flags without `--obcache-`, with underscores:
        `Engine(model_path=..., obcache={"compression_ratio": 0.5, "min_tokens": 64})`. False gives a plain Engine.
    All other arguments are SGLang's. `generate` and `async_generate` take the marker in prompts and
    `sampling_params={"custom_params": {"obcache": ...}}`; answers carry `meta_info["obcache"]`.

    Raises ConfigError for a wrong setting. The methods below are synchronous, like `generate`: from a running event loop await
    the functions of `obcache_sglang.frontend.service` instead.
    """

    def __init__(self, *, obcache: bool | Mapping[str, Any] = True, **kwargs: Any) -> None:
        settings = settings_from_python(obcache)
        if settings is not None:
            model = getattr(kwargs.get("server_args"), "model_path", kwargs.get("model_path"))
            plugin.activate(plugin.with_measured_files(settings, str(model)))
        try:
            super().__init__(**kwargs)
        finally:
            # The child processes have their settings by now; another Engine of this process must not inherit them.
            plugin.deactivate()

    def compress(self, **body: Any) -> dict[str, Any]:
        """Compresses a context ahead of its questions; see `service.compress_context`.

        body: one of `text`, `messages`, `input_ids`, and settings: `engine.compress(text=document, compression_ratio=0.5)`.
        """
        return self._run(service.compress_context(self.tokenizer_manager, self._serving_chat, body))

    def contexts(self, caller: service.Caller = service.ANYBODY) -> list[dict[str, Any]]:
        """The contexts that the caller sees (`service.Caller(cache_salt="...")`; all of them with `is_operator=True`), by name."""
        return self._run(service.list_contexts(self.tokenizer_manager, caller))

    def context(self, context_id: str, *, positions: bool = False, caller: service.Caller = service.ANYBODY) -> dict[str, Any]:
        """One context; if `positions`, with its kept positions, `[layer][kv_head][kept]`. Raises ContextNotFound."""
        return self._run(service.get_context(self.tokenizer_manager, context_id, positions=positions, caller=caller))

    def delete_context(
        self,
        context_id: str,
        *,
        caller: service.Caller = service.ANYBODY,
        wait_seconds: float = service.DELETE_WAIT_SECONDS,
    ) -> str:
        """Deletes a context: "deleted", or "deleting" if it still has readers after `wait_seconds`. Raises ContextNotFound."""
        return self._run(service.delete_context(self.tokenizer_manager, context_id, caller=caller, wait_seconds=wait_seconds))

    def save_context(self, name: str, *, caller: service.Caller = service.ANYBODY) -> dict[str, Any]:
        """Saves a context to the folder (`obcache={"folder": ...}`), by its name or its context id. Returns its `file`, `bytes` and `seconds`."""
        return self._run(files.save_context(self.tokenizer_manager, name, caller))

    def load_context(self, file: str, *, caller: service.Caller = service.ANYBODY) -> dict[str, Any]:
        """Loads a file of the folder by its name. Questions find it by themselves; this is for ahead of them. Returns the context's `name`."""
        return self._run(files.load_context(self.tokenizer_manager, file, caller))

    def obcache_status(self) -> dict[str, Any]:
        """What `GET /obcache/status` answers: active or not, settings, hooks, counters."""
        return self._run(service.status(self.tokenizer_manager))

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        result: T = self.loop.run_until_complete(call)
        return result

    def _serving_chat(self) -> Any:
        return self.tokenizer_manager.serving_chat_class(self.tokenizer_manager, self.template_manager)


TOUCHES = (
    Touch(
        "sglang.srt.entrypoints.engine.Engine",
        "subclass",
        "loop, tokenizer_manager and template_manager of the offline engine",
        (),
        "launcher",
    ),
    Touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.serving_chat_class",
        "read",
        "renders messages given to Engine.compress",
        (),
        "launcher",
    ),
)
