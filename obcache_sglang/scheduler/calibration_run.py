"""What one calibration in a server is made of: its texts, how far it is, and what was found."""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch

from obcache_sglang import __version__
from obcache_sglang.compress.calibration import Findings
from obcache_sglang.compress.gates import GateFile, Gates, ScoredText
from obcache_sglang.settings import ServerSettings, with_gates


def settings_with(
    settings: ServerSettings, gates: str, *, uneven_refusal: str | None, on_cpu: bool
) -> tuple[ServerSettings, bool]:
    """A server's settings once it has made gates, and whether requests that give no method use them.

    They do as in a server that is started with gates, unless their per-head budgets could not be served here, or only without the decode
    graphs that are captured at the start.
    """
    later = with_gates(settings, gates)
    has_graphs = on_cpu or settings.captures_decode_graphs or settings.decode_graphs == "off"
    if later is not None and (later.compression.budget == "uniform" or (uneven_refusal is None and has_graphs)):
        return later, True
    return replace(settings, gates=gates), False


@dataclass
class Text:
    """number: of the text that these tokens are of, from 1 on; None for a context, which gets its number when it is scored."""

    tokens: array[int]
    number: int | None = None
    attempts: int = 0


@dataclass
class Run:
    """One calibration.

    source: "texts", "contexts" or "serve". wanted: parts of texts, or contexts. num_texts: that the parts are of.
    max_tokens: that are read of a context. name: of the file. seen: digests of contexts that were taken.
    """

    source: str
    wanted: int
    num_texts: int
    max_tokens: int
    name: str | None
    findings: Findings
    waiting: deque[Text] = field(default_factory=deque)
    seen: set[bytes] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)
    solved: list[tuple[Gates, torch.Tensor]] = field(default_factory=list)
    file: GateFile | None = None
    path: str | None = None
    started_at: float = field(default_factory=time.perf_counter)

    @property
    def in_turn(self) -> bool:
        """Whether its jobs run in their turn, and not only when nobody waits."""
        return self.source == "texts"

    @property
    def num_more(self) -> int:
        """Contexts that are to be taken beside those that wait; one that was skipped is made up for."""
        return 0 if self.in_turn else self.wanted - self.findings.num_texts - len(self.waiting)

    def forget(self) -> None:
        """What is of no use once it has ended."""
        self.findings.forget_equations()
        self.waiting.clear()
        self.seen.clear()
        self.solved.clear()

    def made(self) -> dict[str, Any]:
        """How the gates were made, for people."""
        return {
            "command": "--obcache-calibrate serve" if self.source == "serve" else "POST /obcache/calibrate",
            "method": "replay",
            "score": "obcache-v",
            "texts": self.findings.num_texts,
            "tokens": self.findings.num_tokens,
            "versions": {"obcache_sglang": __version__} | {name: version(name) for name in ("torch", "sglang")},
        }

    @property
    def num_layers(self) -> int:
        return self.findings.model.num_hidden_layers


@dataclass
class Reading:
    """A scored text whose K and V are read, layer by layer. lock: of its node. slots: [tokens] int64."""

    text: Text
    scores: torch.Tensor
    scored: ScoredText
    slots: torch.Tensor
    left_out: bool
    num_layers_done: int = 0


@dataclass(frozen=True)
class Nobody:
    """What a job takes from the request that it is like, where there is none: the shared namespace, and the last turn."""

    eos_token_ids: Any
    vocab_size: int
    priority: int | None
    tokenizer: Any
    lora_id: None = None
    cache_salt: None = None
    extra_key: None = None


def counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items()) or "none was skipped"
