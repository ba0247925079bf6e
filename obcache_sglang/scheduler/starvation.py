"""Nothing hangs: compressions that hold something and wait for room, while nothing runs and nothing fits."""

from __future__ import annotations

import logging

from obcache_sglang.scheduler.jobs import Jobs

logger = logging.getLogger(__name__)

MAX_STARVED_PASSES = 64
"""Passes one after the other in which nothing runs and nothing is admitted, before a job gives up the beginning that it holds. More than
SGLang delays a prefill for (prefill_delayer_max_delay_passes)."""


def end_a_waiting_segment(jobs: Jobs) -> None:
    """Of the jobs that wait while nothing runs and nothing fits, the latest gives back the beginning that it holds.

    Not at once: SGLang may admit nothing in a pass for other reasons.
    """
    holding = [job for job in jobs.all() if (job.holds_base or job.exact_lock) and not job.kv.holds_kv]
    for job in holding:
        job.starved_passes += 1
    if any(job.starved_passes >= MAX_STARVED_PASSES for job in holding):
        latest = max(holding, key=lambda job: job.started_at)  # least of it is lost
        logger.warning("obcache: context %s waits for room no longer, others need its beginning's", latest.target.id)
        not_starved(jobs)
        jobs.give_up(latest, "starved")


def not_starved(jobs: Jobs) -> None:
    """Something runs."""
    for job in jobs.all():
        job.starved_passes = 0
