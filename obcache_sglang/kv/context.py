"""A compressed context: what it is, what it holds, who may use it.

During a compression of L tokens to M slots, slots have these owners; nothing is held twice, and nothing by us alone:

    step                                   the exact KV, L slots         the compressed KV, M slots
    a job waits                            -                             -  (SGLang admits it when both fit)
    its first chunk is made into a batch   the job (SGLang's Req)        the tree's node, locked by us  (`ContextCache.reserve`)
    its last chunk scores and copies       read                          written
    the job ends: published                freed by SGLang, or cached    the node, evictable; locked on while pinned
    the job ends: failed or aborted        freed by SGLang, or cached    freed with the node  (`ContextCache.withdraw`)
    its base, meanwhile                    -                             the node, held by the job  (`ContextCache.hold`)
    a question reads it                    -                             the node, locked by the question (SGLang)
    evicted, flushed                       -                             freed by SGLang; we look before each use
    evicted to host memory (HiCache)       -                             freed; others when it comes back (`HostMemory`)
    deleted                                -                             freed once no reader is left  (`ContextCache.sweep`)
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from obcache_sglang.kv.cells import KeptTokens
from obcache_sglang.settings import CompressionSettings

FIRST_VIRTUAL_ID = 1 << 61
"""Virtual ids are drawn from [2**61, 2**62 + 2**61): far above any vocabulary, and room for a long run below 2**63."""


class ContextState(Enum):
    ABSENT = "absent"
    """Known (its tokens can be compressed again), but holding no slots."""
    COMPRESSING = "compressing"
    RESIDENT = "resident"
    ON_HOST = "host"
    """Its content is in host memory (SGLang's HiCache), and holds no slots. Known once it is looked for."""
    DELETING = "deleting"
    """Deleted by a client; its slots go when its readers have ended."""


@dataclass(frozen=True)
class Namespace:
    """Who may share a context: requests that agree in all of these. lora_id is already part of extra_key (as in SGLang)."""

    extra_key: str | None
    cache_salt: str | None
    lora_id: str | None

    @classmethod
    def of(cls, *, extra_key: str | None, cache_salt: str | None, lora_id: str | None) -> Namespace:
        """From what a request says: as SGLang's Req joins the LoRA adapter to the extra key."""
        return cls((extra_key or "") + lora_id if lora_id else extra_key, cache_salt or None, lora_id)


SHARED = Namespace(None, None, None)
"""Of requests that give no namespace."""


@dataclass(frozen=True, eq=False)
class KeptContext:
    """What a compression has left of a context, as its readers know it. They keep it as long as they hold the slots: the context may be compressed
    anew meanwhile, in other slots.

    num_slots, num_exact, position_offset, is_uneven, kept: as in `Context`.
    """

    num_slots: int
    num_exact: int
    position_offset: int
    is_uneven: bool
    kept: KeptTokens


@dataclass(eq=False)
class Context:
    """One compressed context.

    id: 32 hexadecimal digits, see `scheduler.identity.context_id`.
    tokens: its L real token ids, whole pages.
    num_slots: M, its tokens for the engine: the exact ones that it begins with, and its own slots.
    engine_ids: [M], these tokens and virtual ids, empty until slots are reserved.
    judges: the tokens after it that score it as its own last ones do, and are no part of it.
    is_queued: whether a job of the scheduler's is to compress it, or does.
    is_segment: whether nobody has asked for it but a longer context, whose beginning it is (`CompressionSettings.segment_start`).
    targets: ids of the contexts that were compressed after it since it ends at a boundary of theirs.
    node: its node in the radix tree, None where it has none.
    owns_exact: whether the exact tokens that it begins with lie in slots of its own too, since the tree had them not.
    tree_lock: held while it is compressed, pinned, or the base of a compression.
    num_holders: compressions whose base it is.
    failed_in_place: whether its last compression from cached KV failed, and nobody has asked about it since.
    is_wanted_pinned: whether it is to be pinned when it is compressed.
    ttl_seconds: how long it was to live when that was set last; None for as long as the tree holds it.
    expires_at: when it is deleted, in seconds since the epoch; None likewise.
    resident: what its readers are given; None unless resident.
    kept_away: what it keeps, on the host, while it is in host memory alone.
    seconds: wall time of its compression.
    scoring_seconds: the part of it spent on scoring, selecting and copying, as the host saw it.
    job_cached_tokens: its tokens that the compression found in the exact cache.
    reuses: questions that it served after the one that had it compressed.
    beginnings: the tokens and ids of the shorter contexts that it is compressed after, segment by segment, ascending; None until asked for.
    slots_needed: about so many a compression of it takes at once; None until asked for.
    rungs: ids of the same tokens on the steps of the ladder (`ServerSettings.rungs`); None until asked for.
    file_name: what its files are called (`kv.files.file_name`); None until asked for.
    is_offered: whether it has been in the queue of those to be saved since it was made (`Saves.wants`).
    tails: by context id, the tokens between the last whole page and the end that a client gave it.
    suffixes: what requests left in the tree after it, as token ids.
    suffixes_complete: whether that is all of it.
    """

    id: str
    namespace: Namespace
    settings: CompressionSettings
    tokens: array[int]
    num_slots: int
    engine_ids: array[int] = field(default_factory=lambda: array("q"))
    judges: array[int] = field(default_factory=lambda: array("q"))
    state: ContextState = ContextState.ABSENT
    is_queued: bool = False
    is_segment: bool = False
    targets: set[str] = field(default_factory=set)
    node: int | None = None
    owns_exact: bool = False
    tree_lock: Any = None
    num_holders: int = 0
    pinned: bool = False
    is_wanted_pinned: bool = False
    failed_in_place: bool = False
    ttl_seconds: float | None = None
    expires_at: float | None = None
    resident: KeptContext | None = None
    kept_away: KeptTokens | None = None
    created_at: float = field(default_factory=time.time)
    seconds: float | None = None
    scoring_seconds: float | None = None
    job_cached_tokens: int = 0
    reuses: int = 0
    beginnings: list[tuple[int, str]] | None = None
    slots_needed: int | None = None
    rungs: list[str] | None = None
    file_name: str | None = None
    is_offered: bool = False
    tails: OrderedDict[str, array[int]] = field(default_factory=OrderedDict)
    suffixes: dict[bytes, None] = field(default_factory=dict)
    suffixes_complete: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def kept(self) -> KeptTokens | None:
        """Which tokens this rank's heads keep, and where; None unless resident."""
        return None if self.resident is None else self.resident.kept

    @kept.setter
    def kept(self, kept: KeptTokens | None) -> None:
        facts = (self.num_slots, self.num_exact, self.position_offset, self.is_uneven)
        self.resident = None if kept is None else KeptContext(*facts, kept)

    @property
    def is_made(self) -> bool:
        """Whether it was compressed, and its content is somewhere, as far as is known without looking."""
        return self.state in (ContextState.RESIDENT, ContextState.ON_HOST)

    @property
    def num_exact(self) -> int:
        """Tokens that it begins with and that stay exact."""
        return self.settings.exact_tokens

    @property
    def num_shared(self) -> int:
        """Of these, those whose slots are not its own: the tree has them, for all texts that begin so."""
        return 0 if self.owns_exact else self.num_exact

    @property
    def own_slots(self) -> int:
        """KV slots that nobody has but this context."""
        return self.num_slots - self.num_shared

    @property
    def position_offset(self) -> int:
        """What must be added to the engine's positions after the context: L - M."""
        return len(self.tokens) - self.num_slots

    @property
    def is_uneven(self) -> bool:
        """Whether its heads may keep different numbers of tokens, so that only attention that knows of it can read them."""
        return self.settings.budget != "uniform" and self.num_slots < len(self.tokens)

    @property
    def gives_way(self) -> bool:
        """Whether it is the first to go, as a beginning of one longer context."""
        return self.is_segment and len(self.targets) < 2

    def begins(self, tokens: array[int]) -> bool:
        """Whether these begin with its tokens."""
        length = self.num_tokens
        # Copies the whole only where it may be equal.
        return tokens[max(0, length - 8) : length] == self.tokens[-8:] and tokens[:length] == self.tokens

    def begins_like(self, other: Context) -> bool:
        """Whether both begin with the same exact tokens."""
        length = self.num_exact
        return (
            length > 0
            and (length, self.namespace) == (other.num_exact, other.namespace)
            and self.tokens[:length] == other.tokens[:length]
        )

    def describe(self) -> dict[str, Any]:
        """JSON-safe facts for the control endpoints."""
        return {
            "name": self.id,
            "state": self.state.value,
            "tier": {ContextState.RESIDENT: "device", ContextState.ON_HOST: "host"}.get(self.state),
            "context_tokens": self.num_tokens,
            "kept_tokens": self.num_slots,
            "slots": self.own_slots if self.state in (ContextState.RESIDENT, ContextState.DELETING) else 0,
            "settings": self.settings.to_dict(),
            "pinned": self.pinned,
            "segment": self.is_segment,
            "ttl_seconds": self.ttl_seconds,
            "reuses": self.reuses,
            "seconds": self.seconds,
            "scoring_seconds": self.scoring_seconds,
            "age_seconds": time.time() - self.created_at,
        }
