"""Evaluation tasks that are generated offline, at any length, with the served model's tokenizer.

The same task, length, seed and index give the same sample, whatever else is generated.
"""

from obcache_sglang.eval.tasks.continuation import CONTINUATION_TOKENS
from obcache_sglang.eval.tasks.facts import MAX_FACTS
from obcache_sglang.eval.tasks.registry import MULTI_QUESTION_TASKS, TASKS, generate

__all__ = ["CONTINUATION_TOKENS", "MAX_FACTS", "MULTI_QUESTION_TASKS", "TASKS", "generate"]
