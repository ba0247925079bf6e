"""What calibration learns from scored texts: shares of heads, and gates. Without a model: `calibrate` has one in transformers, and a server
its own (`scheduler.calibration`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from obcache_sglang.compress.gates import GateFile, Gates, NormalEquations
from obcache_sglang.compress.head_profile import HeadProfile, ModelIdentity
from obcache_sglang.compress.ranking import keep_across_heads, rank_positions
from obcache_sglang.compress.replay import ReplayPrompts
from obcache_sglang.settings import CompressionSettings

DEFAULT_RATIOS = (0.3, 0.5, 0.7, 0.8, 0.9)
"""Compression ratios that a profile has shares for."""

DEFAULT_MAX_TOKENS = 4096

GATE_TOKENS = 1024
"""Tokens of one text for gates, by default: many short texts teach more than a few long ones in the same time."""

MIN_TOKENS = 128
"""Of a text. Shorter ones say little about a head: most of what it keeps would be sinks."""

HELD_OUT = 5
"""Every so many texts one is left out to say how good the gates are."""

# A profile has four digits of a share.
_SMALL_SHARE = 5e-5


def scoring_settings(score: str = "obcache-v") -> CompressionSettings:
    """Those that texts are scored with: queries are not weighted, as they are for budget global.

    Profiles that were measured with weights kept fewer needles.
    """
    return CompressionSettings.resolve({"method": "replay", "score": score, "budget": "uniform"})


def normalised(scores: torch.Tensor, output_squares: torch.Tensor) -> torch.Tensor:
    """Obcache scores that can be compared across layers, in place.

    scores: [layers, kv_heads, tokens] float32. output_squares: [layers] float32, of each layer's attention outputs, summed over all heads and
    all queries that scored.
    """
    return scores.div_(output_squares.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None])


def text_parts(tokenizer: Any, prompts: ReplayPrompts, text: str, max_tokens: int, *, whole: bool) -> list[array[int]]:
    """A text as in a prompt: after what the chat template puts before a user's turn, if there is a template.

    whole: all parts of max_tokens that it has, but for a short rest; else the first.
    """
    ids = tokenizer.encode(text, add_special_tokens=not prompts.before)
    last = len(ids) - MIN_TOKENS if whole else 1
    return [prompts.before + array("q", ids[first : first + max_tokens]) for first in range(0, max(1, last), max_tokens)]


def is_left_out(number: int, part: int, num_texts: int) -> bool:
    """Whether the gates are judged by a part, and not made with it: every fifth text, or of fewer than five texts every fifth part.

    number: of its text, and part: among the parts of all texts, both from 1 on.
    """
    return (number if num_texts >= HELD_OUT else part) % HELD_OUT == 0


def kept_shares(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """The share [layers, kv_heads] float64 of the tokens that each head keeps, if 1 - ratio of them is kept across all heads.

    scores: [layers, kv_heads, tokens], comparable across layers.
    """
    heads, num_tokens = scores.shape[:2], scores.shape[2]
    settings = scoring_settings()
    ranked = rank_positions(
        scores.flatten(0, 1),
        max(1, int(num_tokens * (1 - ratio))),
        window=0,
        sink_tokens=settings.sink_tokens,
        pooling=settings.pooling,
        kernel_size=settings.kernel_size,
        shrink_window=False,
    )
    # Counted in cells, not in whole slots: then the mean of the shares is 1 - ratio for any length, but for the rounding of one cell.
    _, offsets = keep_across_heads(ranked, round(scores.numel() * (1 - ratio)))
    shares = offsets.diff().double() / num_tokens
    mean, wanted = float(shares.mean()), 1 - ratio
    if abs(mean - wanted) > _SMALL_SHARE:
        # A few heads and a short text have so few cells that it shows. All heads move alike, towards 0 or towards 1.
        shares = shares * wanted / mean if mean > wanted else 1 - (1 - shares) * ratio / (1 - mean)
    return shares.view(heads).cpu()


class Findings:
    """What was learnt from the texts so far.

    shares: [ratios, layers, kv_heads] float64, sums over texts, of all heads of the model.
    made_with, left_out: of the texts that gates are made with and judged by; None where only a profile is made. Of `lanes` alone.
    """

    def __init__(
        self,
        model: ModelIdentity,
        *,
        ratios: Sequence[float] = DEFAULT_RATIOS,
        lanes: tuple[int, int] | None = None,
        with_gates: bool,
    ) -> None:
        """ratios: ascending. lanes: (first, last + 1) of a layer's KV heads that this process has; None for all."""
        self.model, self.ratios = model, list(ratios)
        heads = (model.num_hidden_layers, model.num_key_value_heads)
        first, last = lanes or (0, heads[1])
        self.lanes = slice(first, last)
        self.shares = torch.zeros(len(ratios), *heads, dtype=torch.float64)
        self.num_texts = self.num_tokens = 0
        self.made_with, self.left_out = (
            NormalEquations(heads[0], last - first, model.head_dim) if with_gates else None for _ in range(2)
        )

    def add_shares(self, scores: torch.Tensor) -> None:
        """One text more. scores: [layers, kv_heads, tokens] float32 of all heads of the model, comparable across layers."""
        self.shares += torch.stack([kept_shares(scores, ratio) for ratio in self.ratios])
        self.num_texts += 1
        self.num_tokens += scores.shape[2]

    def equations(self, *, left_out: bool) -> NormalEquations:
        """Those that a text goes to. Only with gates."""
        found = self.left_out if left_out else self.made_with
        assert found is not None
        return found

    def add(self, scores: torch.Tensor, keys_values: Iterator[tuple[torch.Tensor, torch.Tensor]], *, left_out: bool) -> None:
        """One text more, in one go. scores: as in `add_shares`; keys_values: as in `NormalEquations.add`, read only with gates."""
        self.add_shares(scores)
        if self.made_with is not None:
            self.equations(left_out=left_out).add(keys_values, scores, self.lanes)

    def forget_equations(self) -> None:
        """They are by far the largest part, and of no use once they are solved."""
        self.made_with = self.left_out = None

    def profile(self, made: dict[str, Any]) -> HeadProfile:
        """made: how, for people."""
        return HeadProfile(self.model, self.ratios, (self.shares / self.num_texts).tolist(), made)

    def solve(self, layers: slice = slice(None)) -> tuple[Gates, torch.Tensor]:
        """The gates of some layers, made with all texts, and the R^2 [layers, kv_heads] float32, on the texts left out, of those made without.

        To be asked for once for each layer: what was left out is added to the others.
        """
        assert self.made_with is not None and self.left_out is not None
        made_with, left_out = self.made_with.layers(layers), self.left_out.layers(layers)
        r_squared = left_out.r_squared(made_with.solve())
        made_with += left_out
        return made_with.solve(), r_squared

    def gate_file(self, gates: Gates, r_squared: torch.Tensor, made: dict[str, Any]) -> GateFile:
        """gates, r_squared [layers, kv_heads] float32: of all layers and heads of the model. Raises ValueError for what is not finite."""
        return GateFile(gates, r_squared, self.profile(made), made)
