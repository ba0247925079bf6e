"""How a context's kept tokens are divided over heads: one class for each word of `--obcache-budget`, and `budget_of`, which chooses.

A budget is asked layer by layer, in the layers' order, with what `ranking.rank_positions` gives. It answers which positions these
heads keep, as soon as that is known. It knows no job, and copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Protocol

import torch

from obcache_sglang.compress.measured_errors import divide_by_errors, kept_numbers
from obcache_sglang.compress.ranking import effective_window, keep_across_heads, keep_counts, keep_per_head, protect_recent
from obcache_sglang.kv.cells import KeptTokens, heads_of

if TYPE_CHECKING:
    from obcache_sglang.compress.head_profile import HeadProfile
    from obcache_sglang.kv.context import Context
    from obcache_sglang.settings import CompressionSettings

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


class AfterKept:
    """Every head keeps what it kept of an earlier context, and of the tokens after that what another budget says.

    num_before: tokens of the earlier context. after: asked about the others alone, as if they began at 0.
    """

    def __init__(self, kept: KeptTokens, num_before: int, after: Budget) -> None:
        self._kept, self._num_before, self._after = kept, num_before, after
        self._num_divided = 0

    def divide(self, ranked: torch.Tensor, measure: Measure) -> Division | None:
        """As `Budget.divide`. ranked: [num_kv_heads, new tokens]."""
        division = self._after.divide(ranked, measure)
        if division is None:
            return None
        positions, offsets = division
        first_head, num_heads = self._num_divided, len(offsets) - 1
        self._num_divided += num_heads
        bounds = self._kept.bounds
        first, last = bounds[first_head], bounds[first_head + num_heads]
        before = self._kept.offsets[first_head : first_head + num_heads + 1] - first
        # Each head's new tokens go after its earlier ones: both move by what the heads before have of the other kind.
        joined = torch.empty(last - first + len(positions), dtype=torch.int32, device=positions.device)
        joined[torch.arange(last - first, device=joined.device) + offsets[heads_of(before, last - first)]] = self._kept.positions[
            first:last
        ]
        joined[torch.arange(len(positions), device=joined.device) + before[heads_of(offsets, len(positions)) + 1]] = (
            positions + self._num_before
        )
        return joined, before + offsets


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


@dataclass(frozen=True)
class Part:
    """The tokens of a context that a compression chooses among: all, or those after what stays as it was compressed before.

    before: (tokens, KV slots) of what stays; (0, 0) for none.
    """

    context: Context
    before: tuple[int, int] = (0, 0)

    @property
    def settings(self) -> CompressionSettings:
        return self.context.settings

    @property
    def num_tokens(self) -> int:
        return self.context.num_tokens - self.before[0]

    @property
    def num_slots(self) -> int:
        """Tokens that a head keeps of an even share."""
        return self.context.num_slots - self.before[1]

    @property
    def num_sinks(self) -> int:
        """First tokens that every head keeps."""
        return max(0, self.settings.kept_sinks - self.before[0])

    @property
    def fewest_kept(self) -> int:
        """Tokens that each head keeps at least, where heads keep different numbers: what is always kept, and one."""
        window = effective_window(self.settings.kept_window, self.num_slots, self.settings.shrinks_window)
        return min(self.num_slots, max(1, self.num_sinks + window))

    def recent_kept(self, count: int) -> int:
        """How many of its last tokens a head keeps at least for its method's `recent_share`, if it keeps `count` in all."""
        return int(self.settings.recent_share * max(0, count - self.num_sinks))


def budget_of(
    part: Part,
    base: tuple[int, KeptTokens] | None,
    *,
    num_layers: int,
    head_profile: HeadProfile | None,
    lanes: tuple[int, int],
) -> Budget:
    """What divides the kept tokens of a context.

    base: (tokens of the context that it is compressed after, what the heads kept of them); None for none. num_layers, head_profile, lanes:
    as in `compression.Compressor`.
    """
    settings, num_tokens, num_slots = part.settings, part.num_tokens, part.num_slots
    if settings.budget == "uniform" or num_slots == num_tokens:
        budget: Budget = Uniform(num_slots, part.recent_kept(num_slots))
    elif settings.budget == "adakv":
        budget = AdaKV(num_slots, settings.safeguarded_tokens(num_slots))
    elif settings.budget == "profile":
        assert head_profile is not None
        exact, most = max(0, settings.exact_tokens - part.before[0]), None
        if base is not None and not part.before[0]:
            most = [last - first + num_tokens - base[0] - exact for first, last in pairwise(base[1].bounds)]
        counts = head_profile.counts(num_tokens - exact, num_slots - exact, part.fewest_kept - exact, lanes, most)
        counts = [exact + count for count in counts]
        budget = Profile(counts, [part.recent_kept(count) for count in counts])
    elif settings.measures_errors:
        budget = MeasuredGlobal(num_slots, num_layers, kept_numbers(part.fewest_kept, num_tokens))
    else:
        budget = Global(num_slots, num_layers)
    return AfterKept(base[1], base[0], budget) if base is not None and part.before[0] else budget
