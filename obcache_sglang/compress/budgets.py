"""How a context's kept tokens are divided over heads: one class for each word of `--obcache-budget`.

A budget is asked layer by layer, in the layers' order, with what `ranking.rank_positions` gives. It answers which positions these
heads keep, as soon as that is known. It knows no job, and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from obcache_sglang.compress.measured_errors import divide_by_errors
from obcache_sglang.compress.ranking import keep_across_heads, keep_counts, keep_per_head


@dataclass(frozen=True)
class Division:
    """What some heads keep.

    positions: [kept tokens] int32, head by head, ascending in each. offsets: [heads + 1] int64: head i's are
    ``positions[offsets[i]:offsets[i + 1]]``. first_head: of all heads of all layers, the first of them; first_cell: of the context's
    cells (`kv.cells`), the first of theirs.
    """

    positions: torch.Tensor
    offsets: torch.Tensor
    first_head: int
    first_cell: int


Measure = Callable[[torch.Tensor], torch.Tensor]
"""The errors [num_kv_heads, numbers] float32 of a layer's heads, for each number of kept tokens, given their ranks."""


class Budget(Protocol):
    """One way to divide."""

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division | None:
        """What heads keep; None until it is known.

        ranked: [num_kv_heads, context_len] float32, of the next layer. measure: of that layer, for budgets that ask.
        """


@dataclass
class Uniform:
    """Every head keeps num_slots tokens."""

    num_slots: int
    _heads: int = 0

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division:
        positions = keep_per_head(ranked, self.num_slots)
        offsets = torch.arange(len(positions) + 1, device=positions.device) * self.num_slots
        first = self._heads
        self._heads += len(ranked)
        return Division(positions.reshape(-1).to(torch.int32), offsets, first, first * self.num_slots)


@dataclass
class AdaKV:
    """The heads of a layer share its cells (AdaKV, arXiv 2407.11550). safe_per_head: what each keeps whatever others score."""

    num_slots: int
    safe_per_head: int
    _heads: int = 0

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division:
        chosen = keep_across_heads(ranked, self.num_slots * len(ranked), safe_per_head=self.safe_per_head)
        first = self._heads
        self._heads += len(ranked)
        return Division(*chosen, first, first * self.num_slots)


@dataclass
class Profile:
    """What each head keeps is known beforehand. counts: of all heads of all layers, [num_layers * num_kv_heads]."""

    counts: list[int]
    _heads: int = 0

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division:
        first = self._heads
        self._heads += len(ranked)
        chosen = keep_counts(ranked, self.counts[first : self._heads])
        # A layer's cells begin where those of the layers before end.
        return Division(*chosen, first, sum(self.counts[:first]))


class Global:
    """All heads of all layers share all cells: nothing is known before the last layer's scores are."""

    def __init__(self, num_slots: int, num_layers: int) -> None:
        self.num_slots = num_slots
        self.num_layers = num_layers
        self._ranked: list[torch.Tensor] = []

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division | None:
        self._ranked.append(ranked)
        if len(self._ranked) < self.num_layers:
            return None
        everything = torch.cat(self._ranked)
        self._ranked = []
        return Division(*self._choose(everything), 0, 0)

    def _choose(self, ranked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ranked: [num_layers * num_kv_heads, context_len]. Positions and offsets of all of them."""
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
        self._errors.append(measure(ranked))
        return super().divide(ranked, measure)

    def _choose(self, ranked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        errors, self._errors = torch.cat(self._errors), []
        return keep_counts(ranked, divide_by_errors(errors, self.numbers, self.num_slots * len(ranked)))
