"""Settings of a server: the defaults of its requests, and how it offers compression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from obcache_sglang.errors import InvalidValue
from obcache_sglang.settings import methods
from obcache_sglang.settings.methods import METHODS
from obcache_sglang.settings.options import OPTIONS
from obcache_sglang.settings.values import CompressionSettings


@dataclass(frozen=True)
class ServerSettings:
    """One server's settings: the defaults of its requests, and how it offers compression.

    compression: the settings of a request that gives none.
    mode: `marked`: prompts say where their context ends; `auto`: prefixes that prompts share are contexts; `prompt`: the context is all of a prompt but its last token, which scores it.
    head_profile: file of a head profile, or the name of one in the package. Then the default budget is `profile`, except for methods that compare all heads.
    gates: file of gates, or the name of those in the package; they bring a head profile. Then the default method is `gate`.
    hidden_gates: published gates that read hidden states, as of `find_hidden_gates`. Then the default method is `hidden-gate`, without `gates`.
    calibrate: `serve`: a server without gates makes them of the first contexts that are asked about.
    when: `first`: a context's first question compresses it; `idle`: questions are served exactly until the engine has nothing
        else to do or its pool gets tight; then their contexts are compressed; `pressure`: until the pool needs a context's room.
    ladder: ratios to which a context is compressed again, one after the other, where the pool would evict it; with when=pressure.
    min_tokens: shorter contexts are served exactly.
    exclude: values of cache_salt and extra_key, and names of LoRA adapters, whose requests are served exactly.
    marker: the text that ends a context.
    max_contexts: remembered at once. max_pinned_slots: that pinned contexts may hold together; None for half of the pool.
    folder: in which contexts last; None for none. save: which ones are saved there: `asked` by somebody, or each one once it is `compressed`, or `reused`.
    folder_gb: 10^9 bytes that the folder's files may take; None for no limit. preload: whether they are loaded from there before the server serves.
    head_attention: the kernels that attend to contexts with per-head budgets on GPUs. decode_graphs: `on`: decode batches with such budgets
        run in CUDA graphs, a second set of which is captured at start-up; `auto`: on if the server's own budget is not uniform.
    allow_untested_sglang: start on another SGLang release than the tested one.
    given: the compression settings that were given explicitly, from which a request's overrides are resolved.
    """

    compression: CompressionSettings = field(default_factory=CompressionSettings)
    mode: str = "marked"
    when: str = "first"
    head_profile: str | None = None
    gates: str | None = None
    hidden_gates: str | None = None
    calibrate: str = "off"
    ladder: tuple[float, ...] = ()
    min_tokens: int = 256
    exclude: tuple[str, ...] = ()
    marker: str = "<|obcache|>"
    max_contexts: int = 1024
    max_pinned_slots: int | None = None
    folder: str | None = None
    save: str = "asked"
    folder_gb: float | None = None
    preload: bool = False
    head_attention: str = "triton"
    decode_graphs: str = "auto"
    allow_untested_sglang: bool = False
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Raises InvalidValue for settings that exclude each other."""
        if self.when != "first" and self.mode == "prompt":
            raise InvalidValue(
                "when", self.when, "has no effect with mode=prompt, where each context has one question. Set when=first."
            )
        if self.when == "pressure" and not self.compression.uses_gates:
            raise InvalidValue(
                "when",
                "pressure",
                f"needs method=gate: contexts are compressed from their cached KV, where method={self.compression.method} reads them anew. "
                "Start the server with --obcache-gates, or set when=first or idle.",
            )
        if self.ladder and self.when != "pressure":
            raise InvalidValue("ladder", self.ladder, f"has no effect with when={self.when}. Set when=pressure, or leave it out.")
        if self.ladder and self.ladder[0] <= self.compression.compression_ratio:
            raise InvalidValue(
                "ladder",
                self.ladder,
                f"begins below compression_ratio={self.compression.compression_ratio:g}, with which contexts are compressed first. "
                "Give higher ratios, or lower compression_ratio.",
            )
        if self.decode_graphs == "on" and self.head_attention != "triton":
            raise InvalidValue(
                "decode_graphs",
                "on",
                f"cannot be used with head_attention={self.head_attention}, which plans each step on the host. Set head_attention=triton.",
            )
        for name, unset in (("save", "asked"), ("folder_gb", None), ("preload", False)):
            if self.folder is None and (value := getattr(self, name)) != unset:
                raise InvalidValue(name, value, "needs a folder, in which contexts last. Give the folder too.")
        self._check(self.compression)

    @property
    def has_profile(self) -> bool:
        """Whether there is a head profile, by itself or with gates."""
        return self.head_profile is not None or self.gates is not None

    def rungs(self, compression: CompressionSettings) -> list[CompressionSettings]:
        """What contexts with these settings are compressed to, one after the other, under lasting pressure."""
        return [replace(compression, compression_ratio=ratio) for ratio in self.ladder if ratio > compression.compression_ratio]

    @property
    def captures_decode_graphs(self) -> bool:
        """Whether decode graphs for per-head budgets are wanted, now or once the server has made gates."""
        if self.decode_graphs == "auto":
            return (self.compression.budget != "uniform" or self.calibrate == "serve") and self.head_attention == "triton"
        return self.decode_graphs == "on"

    def _check(self, compression: CompressionSettings) -> CompressionSettings:
        """The settings, if the server has what they need. Raises InvalidValue."""
        if compression.budget == "profile" and not self.has_profile:
            raise InvalidValue(
                "budget",
                "profile",
                "needs a server started with --obcache-head-profile or --obcache-gates. Choose uniform, adakv or global.",
            )
        others = ", ".join(name for name in METHODS if name != compression.method)
        if compression.uses_gates and self.gates is None:
            raise InvalidValue(
                "method",
                "gate",
                f"needs a server started with --obcache-gates, or one that has made its own (POST /obcache/calibrate). Choose {others}.",
            )
        if compression.reads_hidden_states and self.hidden_gates is None:
            raise InvalidValue(
                "method",
                "hidden-gate",
                f"needs a server started with --obcache-hidden-gates. Choose {others}.",
            )
        if compression.segment_ratios and self.when == "pressure":
            raise InvalidValue(
                "segment_ratios",
                list(compression.segment_ratios),
                "cannot be used with when=pressure, where a context is compressed as a whole. Set exact_segments for what is to stay exact, or "
                "start the server with when=first or idle.",
            )
        return compression

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> ServerSettings:
        """Settings from the values that were given, under their field names. Raises InvalidValue, also for unknown names."""
        for name in given:
            if name not in OPTIONS:
                raise InvalidValue(name, given[name], f"is not a setting; the settings are {', '.join(OPTIONS)}.")
        values = {name: OPTIONS[name].check(name, value) for name, value in given.items()}
        compression = {name: value for name, value in values.items() if OPTIONS[name].per_request}
        server = {name: value for name, value in values.items() if not OPTIONS[name].per_request}
        if server.get("mode") == "auto":
            server.setdefault("when", "pressure")
        return cls(
            compression=CompressionSettings.resolve(
                compression,
                has_profile="head_profile" in server or "gates" in server,
                has_gates="gates" in server,
                has_hidden_gates="hidden_gates" in server,
            ),
            given=compression,
            **server,
        )

    def compression_for(self, overrides: Mapping[str, Any]) -> CompressionSettings:
        """The settings of a request that overrides some. Raises InvalidValue.

        If it names another method or preset than the server's, window, pooling and heads start from that method's or preset's own.
        """
        if not overrides:
            return self.compression
        dropped = methods.superseded({"preset": self.compression.preset, "method": self.compression.method}, overrides)
        kept = {name: value for name, value in self.given.items() if name not in dropped}
        given = {**kept, **overrides}
        return self._check(
            CompressionSettings.resolve(
                given,
                has_profile=self.has_profile,
                has_gates=self.gates is not None,
                has_hidden_gates=self.hidden_gates is not None,
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for reports. A marker that the operator chose is left out: documents must not contain it. So are namespaces, which open
        what is cached in them."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("compression", "given", "exclude")}
        if self.marker != ServerSettings.marker:
            shown["marker"] = None
        return shown | {"compression": self.compression.to_dict()}
