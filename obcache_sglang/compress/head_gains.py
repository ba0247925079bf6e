"""How much a layer's output projection amplifies what each of its heads gives, for scores that compare heads and layers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from obcache_sglang.host import use

logger = logging.getLogger(__name__)


def head_gains(model: torch.nn.Module, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """The gains of this rank's query heads, [tp_q_head_num] float32, by layer id: the mean squared gain of a head's dimensions.

    With W_h the columns of the projection that belong to head h, that is ``||W_h||_F^2 / head_dim``, up to a factor that all heads of
    a layer share. Measured by projecting unit vectors, so that quantized and repacked weights need no reading.
    model: SGLang's, loaded; dtype: its activations'. Where a projection is not found or fails, that layer and those after it are
    left out, which is logged.
    """
    gains = {}
    for name, module in model.named_modules():
        attention, projection = getattr(module, "attn", None), getattr(module, "o_proj", None)
        if not isinstance(attention, RadixAttention):
            continue
        try:
            gains[attention.layer_id] = _measured(attention, getattr(projection, "base_layer", projection), dtype)
        except Exception:  # whatever it is, scores can do without
            logger.exception(
                "obcache: measuring the head gains of %s failed; its heads and those of later layers count equally", name
            )
            break
    return gains


@torch.no_grad()
def _measured(attention: RadixAttention, projection: Any, dtype: torch.dtype) -> torch.Tensor:
    """The gains [tp_q_head_num] float32 of one layer's heads. dtype: of the layer's activations."""
    heads, head_dim = attention.tp_q_head_num, attention.v_head_dim
    device = next(projection.parameters()).device
    gains = torch.empty(heads, dtype=torch.float32, device=device)
    # A head at a time: all at once would need the projection's size again, twice in float32.
    for head in range(heads):
        units = torch.zeros(head_dim, heads * head_dim, dtype=dtype, device=device)
        units[:, head * head_dim : (head + 1) * head_dim].fill_diagonal_(1)
        # Not the module's own forward, which adds up what the ranks' heads give.
        gains[head] = projection.quant_method.apply(projection, units, None).float().square().sum() / head_dim
    return gains


TOUCHES = (
    *(
        use(f"sglang.srt.models.{module}.{name}Attention", "read", "attn, and the gains of o_proj: scores across layers")
        for module, name in (
            ("llama", "Llama"),
            ("qwen2", "Qwen2"),
            ("qwen3", "Qwen3"),
            ("qwen2_moe", "Qwen2Moe"),
            ("qwen3_moe", "Qwen3Moe"),
        )
    ),
    use(
        "sglang.srt.layers.quantization.base_config.LinearMethodBase.apply",
        "call",
        "unit vectors through o_proj",
        ("layer", "x", "bias"),
    ),
)
