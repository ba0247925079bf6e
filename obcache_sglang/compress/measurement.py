"""The scoring of a context for calibration: as for a replay, but nothing is selected and nothing copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from obcache_sglang.compress.compression import AttentionCall, Compression, Compressor, ScoringRows
from obcache_sglang.compress.replay import ReplayPass

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

    from obcache_sglang.kv.context import Context


class Measurement(Compression):
    """One text's. A job has it in the place of a `Compression`; no chunk of that job is the last one, so all scores stay here.

    scored: called once, when the last pass has run and its K and V are still cached.
    """

    def __init__(self, context: Context, scored: Callable[[], None]) -> None:
        # By layer id: the sums of the squares of this rank's attention outputs, of the passes before this one, and of this one.
        self._earlier_squares: dict[int, torch.Tensor] = {}
        self._squares: dict[int, torch.Tensor] = {}
        self.scored = scored
        super().__init__(context)

    def next_pass(self, replay: ReplayPass) -> None:
        """As of `Compression`."""
        for layer_id, squares in self._squares.items():
            self._earlier_squares[layer_id] = self._earlier_squares.get(layer_id, 0) + squares
        super().next_pass(replay)

    def restart_pass(self) -> None:
        """As of `Compression`."""
        super().restart_pass()
        self._squares = {}

    def score(
        self,
        compressor: Compressor,
        rows: ScoringRows,
        layer: RadixAttention,
        call: AttentionCall | None = None,
    ) -> None:
        """As of `Compression`. Raises UnsupportedAttention."""
        super().score(compressor, rows, layer, call)
        assert call is not None
        squares = call.output[rows.mine].float().square().sum()
        self._squares[layer.layer_id] = self._squares.get(layer.layer_id, 0) + squares

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [layers, kv_heads of this rank, tokens] float32, sums of the squares of its attention outputs [layers] float32), of all passes."""
        layers = sorted(self._scores)
        scores = torch.stack([self._joined(each, self._scores[each]) for each in layers])
        squares = [torch.as_tensor(self._squares[each] + self._earlier_squares.get(each, 0)) for each in layers]
        return scores, torch.stack(squares)
