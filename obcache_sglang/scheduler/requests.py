"""The two kinds of SGLang requests that are ours: a question about a context, and the job that compresses one."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from obcache_sglang.compress.compression import Compression
from obcache_sglang.compress.measurement import Measurement
from obcache_sglang.compress.ranking import effective_window
from obcache_sglang.compress.replay import ReplayPass
from obcache_sglang.host import use
from obcache_sglang.kv.context import Context, KeptContext, Namespace
from obcache_sglang.messages import KEY, Plan
from obcache_sglang.settings import EVERY_QUERY

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

REQ_POSITIONAL = ("rid", "origin_input_text", "origin_input_ids", "sampling_params")
"""Parameters of SGLang's Req that it passes by position."""

MAX_COMPRESSIONS_PER_REQUEST = 2
"""Compressions one request may start: beyond it, a pool that evicts a context before its first reader would loop."""


MAX_LOSSES = 3
"""Times that a request may lose its context between the decision on it and its admission."""


class Verdict(Enum):
    """What a scheduling pass does with a request that waits."""

    ADMIT = "admit"
    HOLD = "hold"
    DONE = "done"


class ContextReq(Req):
    """A request that asks for compression.

    While it uses a context, its `origin_input_ids` are [virtual ids of the context | rest of the prompt], so that SGLang
    matches, schedules and caches it like any other; its positions are offset by `position_offset` in the forward.
    `origin_input_ids_unpadded`, which detokenization reads, always stays real.
    """

    def __init__(self, *args: Any, plan: Plan, count_exact: Callable[[str], None], **kwargs: Any) -> None:
        """count_exact: told the reason, once, when the request is served exactly."""
        super().__init__(*args, **kwargs)
        self.origin_input_ids: array[int]
        self.plan = plan
        self.context: Context | None = None
        self.context_id: str | None = plan.context_id
        """How the client may name its context from now on."""
        self.decided = False
        """Whether the manager has decided on it since it was queued."""
        self.held_since: float | None = None
        """When it began to wait for a compression, of `time.perf_counter`; None while it does not."""
        self.looked_for: str | None = None
        """The context whose file was last looked for on its behalf."""
        self.tier: str | None = None
        """Where the context came from that it reuses: "device", "host" or "disk"."""
        self.position_offset = 0
        self.reads: KeptContext | None = None
        """What it stands after, as it was when it began to."""
        self.real_ids: array[int] | None = None
        self.compressions_started = 0
        self.times_lost = 0
        self.exact_reason: str | None = plan.exact
        self._count_exact = count_exact
        self.is_reported_exact = False
        self.must_be_compressed = False
        """Whether the KV pool cannot hold its prompt exactly."""
        self.suffix_known: int | None = None
        """Generated tokens within the suffix that the context remembers of this request; None for no suffix yet."""
        self._cached_tokens_correction = 0

    @property
    def namespace(self) -> Namespace:
        return Namespace(self.extra_key, self.cache_salt, self.lora_id)

    @property
    def is_virtual(self) -> bool:
        return self.real_ids is not None

    @property
    def prompt_ids(self) -> array[int]:
        """The prompt as the client sent it, without the marker."""
        return self.real_ids if self.real_ids is not None else self.origin_input_ids

    def stand_in(self, num_tokens: int, *, most_new_tokens: int) -> None:
        """Presents a prompt that the pool cannot hold exactly as one of the length that it has after its context, until it is decided on.

        SGLang looks at lengths when a request arrives, and would refuse it. most_new_tokens: that the model's context length leaves; SGLang
        would reckon with the length that is presented.
        """
        self.must_be_compressed = True
        self.real_ids = self.origin_input_ids
        self.origin_input_ids = self.real_ids[:num_tokens]
        self.position_offset = len(self.real_ids) - num_tokens
        asked = self.sampling_params.max_new_tokens
        self.sampling_params.max_new_tokens = most_new_tokens if asked is None else min(asked, most_new_tokens)

    def use_context(self, context: Context, *, cached_tokens: int) -> None:
        """Presents the context as its virtual tokens. cached_tokens: real tokens of it that this request was spared."""
        assert not self.kv.holds_kv, "the ids of a request cannot change while it holds KV"
        if self.is_virtual:
            return
        assert context.resident is not None
        self.context, self.reads = context, context.resident
        self.real_ids = self.origin_input_ids
        self.origin_input_ids = context.engine_ids + self.real_ids[context.num_tokens :]
        self.position_offset = context.position_offset
        if self.logprob_start_len > 0:
            self.logprob_start_len -= self.position_offset
        self.full_untruncated_fill_ids = array("q")
        if not self.retracted_stain:  # SGLang counts cached tokens once, at the first prefill
            self._cached_tokens_correction = cached_tokens - context.num_slots

    def use_real_ids(self) -> None:
        """Back to the prompt as it was sent."""
        if self.real_ids is None:
            return
        assert not self.kv.holds_kv, "the ids of a request cannot change while it holds KV"
        # Of one that has ended with an error, SGLang has taken the prompt already, and here nothing has room for it.
        ended = self.must_be_compressed and self.to_finish is not None
        self.origin_input_ids = array("q", [0]) if ended else self.real_ids
        self.real_ids = None
        if self.logprob_start_len > 0:
            self.logprob_start_len += self.position_offset
        self.position_offset = 0
        self.full_untruncated_fill_ids = array("q")
        if not self.retracted_stain:
            self._cached_tokens_correction = 0

    def prompt_suffix_ids(self) -> array[int]:
        """The prompt after the context."""
        assert self.context is not None
        return self.prompt_ids[self.context.num_tokens :]

    def suffix_ids(self) -> array[int]:
        """All tokens after the context that are known by now."""
        known: array[int] = self.prompt_suffix_ids() + self.output_ids
        return known

    def serve_exact(self, reason: str) -> None:
        """From now on the request is an ordinary one, and says why; or ends with an error, where its prompt has no room."""
        self.use_real_ids()
        self.exact_reason = reason
        if self.must_be_compressed:
            if self.to_finish is None:
                self.end_with_error(
                    f"The prompt has {len(self.origin_input_ids)} tokens, more than the KV pool holds, and its context could not be "
                    f"compressed ({reason}). Send it again later, shorten it, or give a higher compression_ratio.",
                    HTTPStatus.SERVICE_UNAVAILABLE,
                )
            return
        self.report_exact(reason)

    def report_exact(self, reason: str) -> None:
        """Says that the request is served exactly, and counts it once."""
        self.report("exact", reason)
        if not self.is_reported_exact:
            self.is_reported_exact = True
            self._count_exact(reason)

    def end_with_error(self, message: str, status: HTTPStatus) -> None:
        """It runs for one token, and its client gets the message instead. Whatever state it is in, as long as it holds no KV."""
        self.real_ids, self.position_offset, self.finished_reason = None, 0, None
        self.full_untruncated_fill_ids = array("q")
        self.set_finish_with_abort(message, status)

    def report(self, status: str, reason: str | None = None) -> None:
        """Sets what the client reads in meta_info["obcache"]. status: compressed | reused | exact."""
        context = self.context
        settings = self.plan.settings if context is None else context.settings
        self.customized_info = {
            KEY: [
                {
                    "status": status,
                    "reason": reason,
                    "context_id": None if context is None else self.context_id,
                    "context_tokens": 0 if context is None else context.num_tokens,
                    "kept_tokens": 0 if context is None else context.num_slots if status != "exact" else context.num_tokens,
                    "compression_ratio": settings.compression_ratio,
                    "method": settings.method,
                    "score": settings.score,
                    "budget": settings.budget,
                    "pinned": context is not None and context.pinned,
                    "tier": self.tier if status == "reused" else None,
                    "seconds": context.seconds if context is not None and status == "compressed" else None,
                }
            ]
        }

    def init_next_round_input(self, tree_cache: BasePrefixCache | None = None, cow_mamba: bool | None = None) -> None:
        """SGLang's, with two last checks: a request that came into the queue past the manager says that it was served exactly, and
        virtual ids that the tree does not hold must never reach the model's embedding."""
        if tree_cache is not None and not self.decided:
            self.serve_exact("undecided")
            self.decided = True
        super().init_next_round_input(tree_cache, cow_mamba)
        if tree_cache is not None and self.is_virtual:
            assert self.context is not None
            # A context that is coming back from host memory has slots, and nothing in them yet.
            if self.prefix_len < self.context.num_slots or self.reads is not self.context.resident:
                self._lose_context()
                super().init_next_round_input(tree_cache, cow_mamba)

    def _lose_context(self) -> None:
        """Its context went while a batch was picked, for what another one needed: it is decided on anew, and in the end served exactly."""
        self.times_lost += 1
        if self.times_lost > MAX_LOSSES:
            self.serve_exact("evicted")
        else:
            self.use_real_ids()
            self.decided = False


def is_decided(req: Req) -> bool:
    """Whether SGLang may admit a request: not one of ours whose context went after it was decided on."""
    return not isinstance(req, ContextReq) or req.decided


class JobId(str):
    """The request id of a job. SGLang aborts all ids that begin with a client's: a job's begins with none but itself."""

    __slots__ = ()

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return bool(prefix == str(self))


class CompressionJob(Req):
    """The internal prefill of one context, `[0, L)`, and of its judges after it, whose attention calls score, select and copy.

    Never streamed, never in the tree: its slots are given back when it ends. If it cannot compress (`error`), what it
    computed is cached exactly, as any prefill is.

    Method replay takes several such prefills in turn: the context alone, which is cached exactly, and each pass after it. The
    last one selects and copies.

    A context that begins with exact tokens, which the tree has not, takes one for them before, which leaves them there (`reads_exact`).

    A context that is compressed segment by segment takes a job for each. Its `origin_input_ids` are [virtual ids of the base | new tokens],
    as those of a question after the base would be, and its positions are offset like a question's.

    base: the compressed context before the segment; None for the first one, and for a context that is compressed whole. reads: what is left of it.
    holds_base: whether the base is held (`ContextCache.hold`), until the job ends.
    exact_lock: of the tree's, on the exact tokens that the context begins with, until the job ends; None where there are none, or a base is held.
        Of local passes of a replay, on the whole context's.
    has_room: whether room was made for it.
    starved_passes: of the scheduler, in which it waited, nothing ran and nothing was admitted.
    target: the whole context, which questions wait for.
    compression: what the forward does for it; carried on from pass to pass. Of one that only scores, a `Measurement`.
    unattended: no request waits for it. in_turn: it runs in its turn all the same, and not only when nobody waits for anything.
    replay: the pass after the context, None for the context alone.
    passes: those still to come.
    error: why nothing will be published.
    slots: [M] int64, the context's, once they are reserved.
    first_cached_tokens: of the first of several prefills, None in that one.
    earlier_tokens: that the prefills before it read.
    pass_started_at: when this one was queued.
    """

    context: Context
    scoring_seconds: float
    extra_key: str | None
    tokenizer: Any

    def __init__(
        self,
        context: Context,
        like: ContextReq | CompressionJob,
        *,
        rid: str,
        passes: Sequence[ReplayPass] = (),
        base: Context | None = None,
        target: Context | None = None,
        reads_exact: bool = False,
        compression: Compression | None = None,
    ) -> None:
        """like: whose LoRA adapter, priority and namespace it has; the prefill that came before it, if one did.

        rid: the same on every rank, and not to be guessed by clients. compression: a new one if not given.
        """
        sampling_params = SamplingParams(max_new_tokens=0, temperature=0)
        sampling_params.normalize(None)
        self.replay: ReplayPass | None = None
        self.passes = list(passes)
        self.base, self.reads_exact = base, reads_exact
        self.reads = None if base is None else base.resident
        self.holds_base = self.has_room = False
        self.exact_lock: Any = None
        self.starved_passes = 0
        self.target = target or context
        self.compression = compression or Compression(context, base)
        self.unattended = self.in_turn = False
        self.started_at = time.perf_counter()
        self.earlier_seconds = 0.0
        self.first_cached_tokens: int | None = None
        self.earlier_tokens = 0
        if isinstance(like, CompressionJob):
            self.unattended, self.in_turn = like.unattended, like.in_turn
            self.started_at, self.earlier_seconds = like.started_at, like.scoring_seconds
            self.first_cached_tokens = like.context_cached_tokens
            if like.context is context:
                self.earlier_tokens = like.progress[0]
                if like.passes:
                    self.replay, *self.passes = like.passes
                    self.compression = like.compression
                    self.compression.next_pass(self.replay)
        tokens = context.tokens + context.judges
        if self.replay is not None:
            tokens = context.tokens[: self.replay.num_before(context.num_tokens)] + self.replay.tokens
        if reads_exact:
            tokens = context.tokens[: context.num_exact]
        elif base is not None:
            tokens = base.engine_ids + tokens[base.num_tokens :]
        super().__init__(
            JobId(rid),
            "",
            tokens,
            sampling_params,
            lora_id=like.lora_id,
            eos_token_ids=like.eos_token_ids,
            vocab_size=like.vocab_size,
            priority=like.priority,
            cache_salt=like.cache_salt,
        )
        self.extra_key = like.extra_key  # already holds the LoRA id
        self.tokenizer = like.tokenizer
        self.logprob_start_len = len(tokens)  # no input log-probabilities
        # What comes after finds the exact KV in the tree; nothing else of a job belongs there.
        self.skip_radix_cache_insert = self.is_final or self.replay is not None
        self.context = context
        self.reset()

    def reset(self) -> None:
        """Forgets what this prefill scored: at the start, and when the job is retracted."""
        settings = self.context.settings
        self.error: str | None = None
        self.slots: torch.Tensor | None = None
        self.pass_started_at = time.perf_counter()
        self.compression.restart_pass()
        self.scoring_seconds = self.earlier_seconds
        self.window = effective_window(settings.window, self.context.num_slots, settings.shrinks_window)

    @property
    def context_cached_tokens(self) -> int:
        """Tokens of the context that its first prefill found in the exact cache; the later ones find what that one left."""
        return int(self.cached_tokens + self.position_offset if self.first_cached_tokens is None else self.first_cached_tokens)

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens read so far, what was found cached included, and in all: the context's, and each pass's."""
        own = self.kv.kv_committed_len if self.kv.holds_kv else len(self.origin_input_ids) if self.finished() else 0
        if self.base is not None or self.target is not self.context or self.context.num_exact:
            return max(own + self.position_offset, 0 if self.base is None else self.base.num_tokens), self.target.num_tokens
        found = 0 if self.replay is None else self.replay.num_before(self.context.num_tokens)  # by the passes, in the cache
        total = self.earlier_tokens + len(self.origin_input_ids) - found + sum(len(each.tokens) for each in self.passes)
        return self.earlier_tokens + max(0, own - found), total

    @property
    def is_final(self) -> bool:
        """Whether its last chunk selects and copies."""
        return not self.passes and not self.reads_exact and not isinstance(self.compression, Measurement)

    @property
    def local_pass(self) -> ReplayPass | None:
        """The local pass of a replay that it reads; None where it reads anything else."""
        return self.replay if self.replay is not None and self.replay.is_local else None

    @property
    def owns_exact(self) -> bool:
        """Whether its base may have all that there is of the exact tokens before it."""
        return self.base is not None and self.base.owns_exact

    @property
    def position_offset(self) -> int:
        """As of a question after the base; in a replay, as of one after the context."""
        if self.replay is not None:
            return self.context.num_tokens - self.replay.num_before(self.context.num_tokens)
        return 0 if self.base is None else self.base.position_offset

    @property
    def first_scoring_position(self) -> int:
        """Tokens from here on, counted in `origin_input_ids`, must be computed, not found in the cache: their queries or hidden states score."""
        num_tokens = self.context.num_tokens - self.position_offset
        settings = self.context.settings
        if settings.is_replay:
            return num_tokens
        if settings.reads_hidden_states:
            return 0
        if not settings.needs_queries:
            return num_tokens - 1
        return 0 if settings.window == EVERY_QUERY else max(0, num_tokens + len(self.context.judges) - self.window)

    def init_next_round_input(self, tree_cache: BasePrefixCache | None = None, cow_mamba: bool | None = None) -> None:
        """SGLang's, with a last check: virtual ids that the tree does not hold never reach the model's embedding, and local passes read no context again."""
        super().init_next_round_input(tree_cache, cow_mamba)
        needed = 0 if self.base is None else self.base.num_slots
        if self.local_pass is not None:
            needed = self.local_pass.last
        if tree_cache is not None and self.prefix_len < needed:
            self.error = "evicted"
            self.set_finish_with_abort("The beginning of the context is gone.", HTTPStatus.INTERNAL_SERVER_ERROR)
            super().init_next_round_input(tree_cache, cow_mamba)

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return min(int(super()._compute_max_prefix_len(input_len)), self.first_scoring_position)


@contextmanager
def client_view(reqs: Iterable[Req]) -> Iterator[None]:
    """Shows real prompts and real cached-token counts for the time that SGLang reports to clients."""
    shown: list[tuple[ContextReq, array[int]]] = []
    try:
        for req in reqs:
            if isinstance(req, ContextReq) and req.is_virtual:
                shown.append((req, req.origin_input_ids))
                req.origin_input_ids = req.prompt_ids
                req.cached_tokens += req._cached_tokens_correction
                req.cached_tokens_device += req._cached_tokens_correction
        yield
    finally:
        for req, ids in shown:
            req.origin_input_ids = ids
            req.cached_tokens -= req._cached_tokens_correction
            req.cached_tokens_device -= req._cached_tokens_correction


_REQ = "sglang.srt.managers.schedule_batch.Req"

TOUCHES = (
    use(_REQ, "subclass", "ContextReq, CompressionJob; fields origin_input_ids, full_untruncated_fill_ids, kv, cached_tokens"),
    use(f"{_REQ}.init_next_round_input", "subclass", "the last check that virtual ids are resident", ("tree_cache", "cow_mamba")),
    use(f"{_REQ}._compute_max_prefix_len", "subclass", "leaves the window to be computed", ("input_len",)),
    use(f"{_REQ}.__init__", "call", "our requests", (*REQ_POSITIONAL, "extra_key", "cache_salt", "lora_id")),
    use(f"{_REQ}.set_finish_with_abort", "call", "answers a wrong request", ("error_msg", "status_code")),
)
