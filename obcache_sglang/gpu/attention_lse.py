"""The log-sum-exps that SGLang's attention backends compute, for the scoring that would else read K once more to have them.

FlashAttention's backend returns them when asked. FlashInfer's has them from its wrappers, and drops them. Others (Triton) have
none: `gpu.score_lse` computes them.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from obcache_sglang.kv.batch import BatchContexts

logger = logging.getLogger(__name__)

_LN2 = math.log(2)


def leave_lse(backend: Any, plan: BatchContexts) -> Callable[..., torch.Tensor]:
    """The backend's `forward`, which returns [rows, query heads * head_dim]. In forwards that score a context it leaves the log-sum-exps in `plan.row_lse`.

    They are natural, [rows, query heads] float32, if the backend has them. Where getting them fails, the call is made again as SGLang makes it, and they are not asked for any more.
    """
    plain: Callable[..., torch.Tensor] = backend.forward
    with_lse = _with_lse(backend)

    def forward(
        q: torch.Tensor, k: Any, v: Any, layer: RadixAttention, forward_batch: ForwardBatch, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As the backend's. q: [rows, query heads * head_dim]; returns the attention outputs, like q."""
        nonlocal with_lse
        if with_lse is not None and plan.is_scored(forward_batch):
            try:
                output, plan.row_lse = with_lse(q, k, v, layer, forward_batch, *args, **kwargs)
                return output
            except Exception:  # whatever it is, the batch must be served; what is wrong without us is raised again below
                with_lse = None
                logger.exception(
                    "obcache: %s gave no log-sum-exps; they are computed separately from now on", type(backend).__name__
                )
        return plain(q, k, v, layer, forward_batch, *args, **kwargs)

    return plain if with_lse is None else forward


def _with_lse(backend: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """The backend's `forward` that also returns natural log-sum-exps, [rows, query heads] float32; None where there is none."""
    forward = backend.forward
    if isinstance(backend, FlashInferAttnBackend):

        def of_flashinfer(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            """Returns the outputs, [rows, query heads * head_dim], and natural log-sum-exps, [rows, query heads] float32."""
            """Returns the outputs, [rows, query heads * head_dim], and the log-sum-exps, [rows, query heads] float32."""
            with _recorded(backend.prefill_wrapper_ragged, *backend.forward_metadata.prefill_wrappers) as parts:
                output = forward(*args, **kwargs)
            if not parts:
                raise RuntimeError("none of FlashInfer's prefill wrappers was called")
            lse = parts[0]
            for part in parts[1:]:  # the new tokens and what stands before them, attended apart
                lse = torch.logaddexp2(lse, part)
            return output, lse * _LN2

        return of_flashinfer
    if "return_lse" in inspect.signature(backend.forward_extend).parameters:
        return lambda *args, **kwargs: forward(*args, return_lse=True, **kwargs)
    return None


@contextmanager
def _recorded(*wrappers: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the log-sum-exps, [rows, query heads] float32 to base 2, of all calls of FlashInfer's prefill wrappers."""
    parts: list[torch.Tensor] = []

    def record(wrapper: Any) -> None:
        original = wrapper.forward_return_lse

        def forward_return_lse(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            """As FlashInfer's: outputs [rows, query heads, head_dim], log-sum-exps [rows, query heads] float32, to base 2."""
            output, lse = original(*args, **kwargs)
            parts.append(lse)
            return output, lse

        wrapper.forward_return_lse = forward_return_lse
        wrapper.forward = lambda *args, **kwargs: forward_return_lse(*args, **kwargs)[0]

    distinct = list({id(wrapper): wrapper for wrapper in wrappers}.values())
    try:
        for wrapper in distinct:
            record(wrapper)
        yield parts
    finally:
        for wrapper in distinct:  # the class's own again
            vars(wrapper).pop("forward", None)
            vars(wrapper).pop("forward_return_lse", None)
