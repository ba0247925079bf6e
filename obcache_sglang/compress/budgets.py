"""How a context's kept tokens are divided over heads: one class for each word of `--obcache-budget`.

A budget is asked layer by layer, in the layers' order, with what `ranking.rank_positions` gives. It answers which positions these
heads keep, as soon as that is known. It knows no job, and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from obcache_sglang.compress.measured_errors import divide_by_errors
from obcache_sglang.compress.ranking import keep_across_heads, keep_counts, keep_per_head, protect_recent

Division = tuple[torch.Tensor, torch.Tensor]
"""What the next heads keep, in the order of all heads of all layers: positions [kept tokens] int32, head by head and ascending in each,
and offsets [heads + 1] int64: head i's are ``positions[offsets[i]:offsets[i + 1]]``."""

Measure = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""The errors [num_kv_heads, len(numbers)] float32 of a layer's heads, given their ranks and the numbers of kept tokens."""


class Budget(Protocol):
    """One way to divide."""

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division | None:
        """What heads keep; None until it is known.

        ranked: [num_kv_heads, context_len] float32, of the next layer. measure: of that layer, for budgets that ask.
        """


@dataclass(frozen=True)
class Uniform:
    """Every head keeps num_slots tokens. recent: of the last ones, so many at least."""

    num_slots: int
    recent: int = 0

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division:
        """As `Budget.divide`."""
        positions = keep_per_head(protect_recent(ranked, [self.recent] * len(ranked)), self.num_slots)
        offsets = torch.arange(len(positions) + 1, device=positions.device) * self.num_slots
        return positions.reshape(-1).to(torch.int32), offsets


@dataclass(frozen=True)
class AdaKV:
    """The heads of a layer share its cells (AdaKV, arXiv 2407.11550). safe_per_head: what each keeps whatever others score."""

    num_slots: int
    safe_per_head: int

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division:
        """As `Budget.divide`."""
        return keep_across_heads(ranked, self.num_slots * len(ranked), safe_per_head=self.safe_per_head)


class Profile:
    """What each head keeps is known beforehand.

    counts: of all heads of all layers, [num_layers * num_kv_heads]. recent: likewise, of the last tokens so many at least.
    """

    def __init__(self, counts: list[int], recent: list[int]) -> None:
        self._counts = iter(counts)
        self._recent = iter(recent)

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division:
        """As `Budget.divide`."""
        counts, recent = (list(islice(each, len(ranked))) for each in (self._counts, self._recent))
        return keep_counts(protect_recent(ranked, recent), counts)


class Global:
    """All heads of all layers share all cells: nothing is known before the last layer's scores are."""

    def __init__(self, num_slots: int, num_layers: int) -> None:
        self.num_slots = num_slots
        self.num_layers = num_layers
        self._ranked: list[torch.Tensor] = []

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division | None:
        """As `Budget.divide`."""
        self._ranked.append(ranked)
        if len(self._ranked) < self.num_layers:
            return None
        everything = torch.cat(self._ranked)
        self._ranked = []
        return self._choose(everything)

    def _choose(self, ranked: torch.Tensor) -> Division:
        """What all heads keep. ranked: [num_layers * num_kv_heads, context_len]."""
        return keep_across_heads(ranked, self.num_slots * len(ranked))


class MeasuredGlobal(Global):
    """Budget global, divided by what removing tokens really costs each head (`measured_errors`); ranks order a head's tokens only.

    numbers: of kept tokens, for which errors are measured.
    """

    def __init__(self, num_slots: int, num_layers: int, numbers: list[int]) -> None:
        super().__init__(num_slots, num_layers)
        self.numbers = numbers
        self._errors: list[torch.Tensor] = []

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division | None:
        """As `Budget.divide`."""
        self._errors.append(measure(ranked, self.numbers))
        return super().divide(ranked, measure)

    def _choose(self, ranked: torch.Tensor) -> Division:
        """As `Global._choose`."""
        errors, self._errors = torch.cat(self._errors), []
        return keep_counts(ranked, divide_by_errors(errors, self.numbers, self.num_slots * len(ranked)))
