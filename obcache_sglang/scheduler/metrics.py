"""What compression did: counted once, for `GET /obcache/status` and, with `--enable-metrics`, for Prometheus."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from obcache_sglang.kv.context import Context, ContextState
from obcache_sglang.scheduler import tree

if TYPE_CHECKING:
    from obcache_sglang.scheduler.context_cache import ContextCache

logger = logging.getLogger(__name__)

GAUGE_PASSES = 64
"""Scheduling passes between two looks at what is resident."""


class Metrics:
    """Counters of one scheduler process. Not thread safe: the scheduler's loop is the only caller.

    Made by `create`. Prometheus names start with `sglang:obcache_`, carry SGLang's own labels, and go through its
    multi-process directory, which the launcher sets up before any process imports prometheus_client.
    """

    def __init__(self, prometheus: _Prometheus | None) -> None:
        self._prometheus = prometheus
        self._totals: Counter[str] = Counter()
        self._exact: Counter[str] = Counter()
        self._seconds = 0.0
        self._replay_seconds = 0.0
        self._schedule_seconds = 0.0
        self._load_seconds = 0.0
        self._save_seconds = 0.0
        self._host_load_seconds = 0.0
        self._contexts = 0
        self._host_contexts = 0
        self._in_folder = 0, 0
        self._pinned = 0
        self._waiting = 0
        self._waiting_seconds = 0.0
        self._slots_saved_now = 0
        self._lost_share = 0.0

    @classmethod
    def create(cls, enabled: bool, labels: Mapping[str, str]) -> Metrics:
        """enabled: whether Prometheus gets them too (SGLang's `--enable-metrics`). labels: of the SGLang scheduler's own metrics."""
        return cls(_Prometheus(labels) if enabled else None)

    def compressed(self, seconds: float, context_tokens: int, kept_slots: int) -> None:
        """A context of `context_tokens` tokens was compressed to `kept_slots` KV slots, in `seconds` from start to publication."""
        self._totals["compressions"] += 1
        self._totals["context_tokens"] += context_tokens
        self._totals["slots_saved"] += context_tokens - kept_slots
        self._seconds += seconds
        if self._prometheus:
            self._prometheus.compressions.inc()
            self._prometheus.seconds.observe(seconds)
            self._prometheus.slots_saved.inc(context_tokens - kept_slots)

    def published(
        self, context: Context, started_at: float, scoring_seconds: float, cached_tokens: int, cache: ContextCache
    ) -> None:
        """What a compression took, in its context, the counters and the log.

        started_at: of `time.perf_counter`. cached_tokens: of the context, found cached. cache: the scheduler's.
        """
        context.seconds = time.perf_counter() - started_at
        context.scoring_seconds = scoring_seconds
        context.job_cached_tokens = cached_tokens
        self.compressed(context.seconds, context.num_tokens, context.num_slots)
        self.set_gauges(cache)
        logger.info(
            "obcache: compressed context %s: %d tokens to %d slots in %.3f s (scoring %.3f s), %s %s %s ratio %g",
            context.id, context.num_tokens, context.num_slots, context.seconds, context.scoring_seconds,
            context.settings.method, context.settings.score, context.settings.budget, context.settings.compression_ratio,
        )  # fmt: skip

    def compressed_in_place(self) -> None:
        """That compression took its context from the cache and read no token of it."""
        self._totals["in_place"] += 1
        if self._prometheus:
            self._prometheus.in_place.inc()

    def restored(self, cache: ContextCache) -> None:
        """A context that was compressed for want of room is cached exactly again."""
        self._totals["restored"] += 1
        if self._prometheus:
            self._prometheus.restored.inc()
        self.set_gauges(cache)

    def loaded(self, seconds: float, num_bytes: int) -> None:
        """A context was loaded from its file of so many bytes, in `seconds` from the look for it to publication."""
        self._totals["file_loads"] += 1
        self._totals["file_bytes_read"] += num_bytes
        self._load_seconds += seconds
        if self._prometheus:
            self._prometheus.file_loads.inc()
            self._prometheus.file_bytes_read.inc(num_bytes)
            self._prometheus.file_load_seconds.observe(seconds)

    def came_back(self, seconds: float, num_slots: int) -> None:
        """A context of so many slots came back from host memory, in `seconds` from the question that asked for it."""
        self._totals["host_loads"] += 1
        self._totals["host_slots_loaded"] += num_slots
        self._host_load_seconds += seconds
        if self._prometheus:
            self._prometheus.host_loads.inc()
            self._prometheus.host_slots_loaded.inc(num_slots)
            self._prometheus.host_load_seconds.observe(seconds)

    def saved(self, seconds: float, num_bytes: int) -> None:
        """A context was saved to its file of so many bytes, in `seconds` until it was on the disk."""
        self._totals["file_saves"] += 1
        self._totals["file_bytes_written"] += num_bytes
        self._save_seconds += seconds
        if self._prometheus:
            self._prometheus.file_saves.inc()
            self._prometheus.file_bytes_written.inc(num_bytes)
            self._prometheus.file_save_seconds.observe(seconds)

    def in_folder(self, contexts: int, num_bytes: int) -> None:
        """So many contexts lie in the folder, and their files have so many bytes."""
        if (contexts, num_bytes) == self._in_folder:  # as in most passes
            return
        self._in_folder = contexts, num_bytes
        if self._prometheus:
            self._prometheus.folder_contexts.set(contexts)
            self._prometheus.folder_bytes.set(num_bytes)

    def unsaved(self) -> None:
        """A context that was to be saved without anybody's asking was not."""
        self._totals["file_unsaved"] += 1
        if self._prometheus:
            self._prometheus.file_unsaved.inc()

    def file_missed(self) -> None:
        """A file was looked for, and there was none that could be used."""
        self._totals["file_misses"] += 1
        if self._prometheus:
            self._prometheus.file_misses.inc()

    def replayed(self, tokens: int, seconds: float) -> None:
        """A pass of method replay has read `tokens` tokens after its context, in `seconds` from its start."""
        self._totals["replayed_tokens"] += tokens
        self._replay_seconds += seconds
        if self._prometheus:
            self._prometheus.replayed_tokens.inc(tokens)

    def reused(self, tokens_saved: int) -> None:
        """A request used a resident context, and `tokens_saved` tokens of its prompt were not prefilled again."""
        self._totals["reuses"] += 1
        self._totals["tokens_saved"] += tokens_saved
        if self._prometheus:
            self._prometheus.reuses.inc()
            self._prometheus.tokens_saved.inc(tokens_saved)

    def pass_decided(self, seconds: float, used_slots: int) -> bool:
        """What is waiting was decided on for one scheduling pass, which took `seconds`. Whether the gauges are to be looked at again, since
        nobody tells us what the tree evicts. used_slots: KV slots that hold something now.
        """
        self._totals["schedule_passes"] += 1
        self._schedule_seconds += seconds
        lost = self._slots_saved_now
        share = lost / (lost + used_slots) if lost else 0.0
        if share != self._lost_share:
            self._lost_share = share
            if self._prometheus:
                self._prometheus.lost_share.set(share)
        return self._contexts + self._host_contexts > 0 and self._totals["schedule_passes"] % GAUGE_PASSES == 0

    def exact(self, reason: str) -> None:
        """A request that asked for compression was served with the exact cache. reason: a fixed short word, not free text."""
        self._exact[reason] += 1
        if self._prometheus:
            self._prometheus.exact.labels(reason=reason).inc()

    def evicted(self) -> None:
        """A context was evicted, from the pool and from host memory; noticed when it is looked for."""
        self._totals["evictions"] += 1
        if self._prometheus:
            self._prometheus.evictions.inc()

    def waiting(self, requests: int) -> None:
        """So many requests wait for a compression now."""
        if requests == self._waiting:  # as in most passes
            return
        self._waiting = requests
        if self._prometheus:
            self._prometheus.waiting.set(requests)

    def waited(self, seconds: float) -> None:
        """A request that waited for a compression is served now."""
        self._waiting_seconds += seconds
        if self._prometheus:
            self._prometheus.waiting_seconds.observe(seconds)

    def set_gauges(self, cache: ContextCache) -> list[Context]:
        """What is resident now: contexts, and the KV slots their exact caches would hold more; and how many are in host memory alone.

        Returns the resident ones. Nothing is marked: ranks may look at different times.
        """
        places = {context: tree.place(cache.tree, context) for context in cache if context.is_made}
        resident = [each for each, place in places.items() if place == "device" and each.state is ContextState.RESIDENT]
        self._host_contexts = list(places.values()).count("host")
        self._contexts = len(resident)
        self._pinned = sum(context.pinned for context in resident)
        self._slots_saved_now = sum(context.position_offset for context in resident)
        if self._prometheus:
            self._prometheus.contexts.set(self._contexts)
            self._prometheus.host_contexts.set(self._host_contexts)
            self._prometheus.pinned.set(self._pinned)
            self._prometheus.slots_saved_now.set(self._slots_saved_now)
        return resident

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for `GET /obcache/status`."""
        names = (
            "compressions",
            "in_place",
            "restored",
            "reuses",
            "context_tokens",
            "slots_saved",
            "tokens_saved",
            "replayed_tokens",
            "schedule_passes",
            "evictions",
            "host_loads",
            "host_slots_loaded",
            "file_loads",
            "file_saves",
            "file_unsaved",
            "file_misses",
            "file_bytes_read",
            "file_bytes_written",
        )
        return {name: self._totals[name] for name in names} | {
            "compression_seconds": self._seconds,
            "replay_seconds": self._replay_seconds,
            "schedule_seconds": self._schedule_seconds,
            "host_load_seconds": self._host_load_seconds,
            "file_load_seconds": self._load_seconds,
            "file_save_seconds": self._save_seconds,
            "exact": dict(self._exact),
            "contexts": self._contexts,
            "host_contexts": self._host_contexts,
            "folder_contexts": self._in_folder[0],
            "folder_bytes": self._in_folder[1],
            "pinned": self._pinned,
            "waiting": self._waiting,
            "waiting_seconds": self._waiting_seconds,
            "slots_saved_now": self._slots_saved_now,
            "lost_share": self._lost_share,
        }


class _Prometheus:
    def __init__(self, labels: Mapping[str, str]) -> None:
        # Imported here: prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is first imported.
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge, Histogram

        names = list(labels)

        def counter(name: str, text: str) -> Any:
            return PrometheusCounter(f"sglang:obcache_{name}", text, labelnames=names).labels(**labels)

        def gauge(name: str, text: str) -> Any:
            made = Gauge(f"sglang:obcache_{name}", text, labelnames=names, multiprocess_mode="mostrecent").labels(**labels)
            # One that was never set has no sample, and no labels: sglang-router cannot join it with another replica's.
            made.set(0)
            return made

        self.compressions = counter("compressions_total", "Contexts compressed.")
        self.in_place = counter("in_place_total", "Contexts compressed from their cached exact KV, without a forward.")
        self.restored = counter("restored_total", "Contexts compressed for want of room that are cached exactly again.")
        self.reuses = counter("reuses_total", "Requests that used a resident compressed context.")
        self.replayed_tokens = counter("replayed_tokens_total", "Tokens read after contexts to score them by replay.")
        self.tokens_saved = counter("tokens_saved_total", "Prompt tokens not prefilled again thanks to a compressed context.")
        self.slots_saved = counter("slots_saved_total", "KV slots given back by compressions.")
        self.contexts = gauge("contexts", "Compressed contexts resident now.")
        self.host_contexts = gauge("host_contexts", "Compressed contexts that are in host memory alone now.")
        self.folder_contexts = gauge("folder_contexts", "Contexts in the folder, whoever saved them, when it was last looked at.")
        self.folder_bytes = gauge("folder_bytes", "Bytes of their files.")
        self.pinned = gauge("pinned_contexts", "Compressed contexts that are pinned now.")
        self.waiting = gauge("waiting_requests", "Requests that wait for a compression now.")
        self.evictions = counter("evictions_total", "Compressed contexts that were evicted to make room.")
        self.host_loads = counter("host_loads_total", "Contexts that came back from host memory.")
        self.host_slots_loaded = counter("host_loaded_slots_total", "KV slots of the contexts that came back from host memory.")
        self.file_loads = counter("file_loads_total", "Contexts loaded from their files.")
        self.file_saves = counter("file_saves_total", "Contexts saved to files.")
        self.file_unsaved = counter("file_unsaved_total", "Contexts that were to be saved by themselves, and were not.")
        self.file_misses = counter(
            "file_misses_total", "Files of contexts that were looked for, and were not there or not usable."
        )
        self.file_bytes_read = counter("file_read_bytes_total", "Bytes of the files of contexts that were loaded.")
        self.file_bytes_written = counter("file_written_bytes_total", "Bytes of the files of contexts that were saved.")
        self.slots_saved_now = gauge(
            "resident_slots_saved", "KV slots that the resident contexts hold less than their exact caches would."
        )

        self.lost_share = gauge(
            "lost_share", "Of the tokens that the cache stands for, the part that compressed contexts have lost."
        )

        def histogram(name: str, text: str) -> Any:
            buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
            return Histogram(f"sglang:obcache_{name}", text, labelnames=names, buckets=buckets).labels(**labels)

        self.seconds = histogram("compression_seconds", "Seconds from the start of a compression job to its publication.")
        self.host_load_seconds = histogram(
            "host_load_seconds", "Seconds from the question about a context in host memory until it was back."
        )
        self.file_load_seconds = histogram("file_load_seconds", "Seconds from the look for a context's file to its publication.")
        self.file_save_seconds = histogram("file_save_seconds", "Seconds until a context that was to be saved was on the disk.")
        self.waiting_seconds = histogram("waiting_seconds", "Seconds that requests waited for a compression.")
        exact = PrometheusCounter(
            "sglang:obcache_exact_total",
            "Requests that asked for compression and were served with the exact cache, by reason.",
            labelnames=[*names, "reason"],
        )
        self.exact = _Labelled(exact, labels)


class _Labelled:
    """A Prometheus metric with some of its labels set."""

    def __init__(self, metric: Any, labels: Mapping[str, str]) -> None:
        self._metric = metric
        self._labels = labels

    def labels(self, **more: str) -> Any:
        return self._metric.labels(**self._labels, **more)
