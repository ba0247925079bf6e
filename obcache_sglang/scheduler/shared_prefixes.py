"""Where prompts part: prefixes that several prompts share, found without anybody marking them (`--obcache-mode auto`).

Prompts are remembered by chained hashes of their blocks, as prefix caches know them, and not by their tokens: so a shared prefix is known
also when the pool has evicted it long ago. Of each block, the table knows whether what follows it was always the same, and how many
different contexts stand behind it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise

from obcache_sglang.kv.context import Namespace
from obcache_sglang.messages import Plan

BLOCK_TOKENS = 64
"""Boundaries are multiples of it, so that questions that begin with the same few words still find the same one."""

MAX_BLOCKS = 1 << 17
"""Remembered at once, some 20 MB; the least recently seen are forgotten: 8 million tokens of different prompts ago."""

SLACK_BLOCKS = 4
"""Prompts that part within so many blocks of one another have one boundary, the first: questions may begin alike for longer than that."""

WIDELY = 4
"""Different contexts behind one beginning that show it to be that of many texts, such as a system prompt."""

_PARTS = b""

_DIGEST = 16


class SharedPrefixes:
    """Of one scheduler. Ranks of one tensor-parallel group see the same prompts in the same order.

    secret: hashes cannot be guessed without it.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        # By hash of a block and all before it: hash of what followed it, or _PARTS.
        self._followed_by: OrderedDict[bytes, bytes] = OrderedDict()
        # Likewise: hashes of what followed it in contexts, different ones, at most WIDELY, one after the other.
        self._contexts_behind: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._followed_by)

    def plan(self, plan: Plan, namespace: Namespace, prompt: array[int], min_tokens: int) -> Plan:
        """The plan of a prompt that is not marked: its context is what it shares, of which the beginning of many texts stays exact."""
        boundary, widely_shared = self.boundary(namespace, prompt, min_tokens)
        exact = widely_shared if plan.settings.uses_gates else 0
        return replace(plan, context_len=boundary, settings=replace(plan.settings, exact_tokens=exact))

    def boundary(self, namespace: Namespace, prompt: array[int], min_tokens: int) -> tuple[int, int]:
        """Remembers a prompt. Returns (how many of its first tokens are its context, how many of these begin many texts).

        The first is what it shares with a prompt that went on differently: the most that is known, but for `SLACK_BLOCKS`, and `min_tokens`
        or more; else 0. At least one token follows. The second is less by `min_tokens` or more; 0 where there is no such beginning.
        """
        following = self._blocks(namespace, prompt)
        parts = []
        for number, (block, after) in enumerate(pairwise(following), 1):
            known = self._followed_by.setdefault(block, after)
            if known != after:
                self._followed_by[block] = _PARTS
                if min_tokens <= number * BLOCK_TOKENS < len(prompt):
                    parts.append(number)
            self._followed_by.move_to_end(block)
        while len(self._followed_by) > MAX_BLOCKS:
            self._contexts_behind.pop(self._followed_by.popitem(last=False)[0], None)
        if not parts:
            return 0, 0
        boundary = BLOCK_TOKENS * next(number for number in parts if number >= parts[-1] - SLACK_BLOCKS)
        widely = [0]
        for number, (block, after) in enumerate(pairwise(following), 1):
            if number * BLOCK_TOKENS <= boundary - min_tokens and self._followed_by.get(block) == _PARTS:
                behind = self._contexts_behind.get(block, b"")
                if all(behind[first : first + _DIGEST] != after for first in range(0, len(behind), _DIGEST)):
                    self._contexts_behind[block] = behind = (behind + after)[: WIDELY * _DIGEST]
                if len(behind) == WIDELY * _DIGEST:
                    widely.append(number)
        return boundary, BLOCK_TOKENS * widely[-1]

    def _blocks(self, namespace: Namespace, prompt: array[int]) -> list[bytes]:
        """A hash for each whole block with all before it, and one with the rest, which may be empty: that a prompt ends is a continuation too."""
        size = BLOCK_TOKENS
        last = repr(namespace).encode()
        hashes = []
        for start in range(0, len(prompt) + 1, size):
            last = hashlib.blake2b(last + prompt[start : start + size].tobytes(), digest_size=_DIGEST, key=self._secret).digest()
            hashes.append(last)
        return hashes
