"""The scores that gates give tokens in the pool, in one read of their K and V: gathered, rotated back and weighed in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from obcache_sglang.compress.gates import SMALLEST_SQUARE, Gates
from obcache_sglang.compress.rotary import InverseRotary

# Wider heads in blocks of half as many tokens: else registers spill.
_BLOCK_ELEMENTS = 64 * 128


@triton.jit
def _score_by_gates(
    scores: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    slots: tl.tensor,
    cos_sin: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    num_tokens: tl.tensor,
    slot_stride: tl.tensor,
    rotary_stride: tl.tensor,
    smallest: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # of the rotated dimensions
    NEOX: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """One block of tokens of one head. scores [heads, num_tokens] float32; the others as `gate_scores_paged` says, of one layer."""
    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = tokens < num_tokens
    rows = tl.load(slots + tokens, mask=exists, other=0) * slot_stride + head * HEAD_DIM
    # Of this head: K, V, their squares, and the two logarithms, HEAD_DIM weights each but the last.
    mine = weights + head * (4 * HEAD_DIM + 2)

    half = tl.arange(0, BLOCK_HALF)
    rotates = half < HALF
    if NEOX:
        first, second = half, half + HALF
    else:
        first, second = 2 * half, 2 * half + 1
    both = exists[:, None] & rotates[None, :]
    table = cos_sin + tokens[:, None] * rotary_stride + half[None, :]
    cos = tl.load(table, mask=both, other=1.0).to(tl.float32)
    sin = tl.load(table + HALF, mask=both, other=0.0).to(tl.float32)
    turned_first = tl.load(k + rows[:, None] + first[None, :], mask=both, other=0.0).to(tl.float32)
    turned_second = tl.load(k + rows[:, None] + second[None, :], mask=both, other=0.0).to(tl.float32)
    factor = cos * cos + sin * sin
    k_first = (turned_first * cos + turned_second * sin) / factor
    k_second = (turned_second * cos - turned_first * sin) / factor
    found = k_first * tl.load(mine + first, mask=rotates, other=0.0)[None, :]
    found += k_second * tl.load(mine + second, mask=rotates, other=0.0)[None, :]
    found += k_first * k_first * tl.load(mine + 2 * HEAD_DIM + first, mask=rotates, other=0.0)[None, :]
    found += k_second * k_second * tl.load(mine + 2 * HEAD_DIM + second, mask=rotates, other=0.0)[None, :]
    total = tl.sum(found, 1)
    k_square = tl.sum(k_first * k_first + k_second * k_second, 1)

    dims = tl.arange(0, BLOCK_DIM)
    is_dim = dims < HEAD_DIM
    if 2 * HALF < HEAD_DIM:
        is_rest = is_dim & (dims >= 2 * HALF)
        rest = tl.load(k + rows[:, None] + dims[None, :], mask=exists[:, None] & is_rest[None, :], other=0.0).to(tl.float32)
        total += tl.sum(rest * tl.load(mine + dims, mask=is_rest, other=0.0)[None, :], 1)
        total += tl.sum(rest * rest * tl.load(mine + 2 * HEAD_DIM + dims, mask=is_rest, other=0.0)[None, :], 1)
        k_square += tl.sum(rest * rest, 1)
    values = tl.load(v + rows[:, None] + dims[None, :], mask=exists[:, None] & is_dim[None, :], other=0.0).to(tl.float32)
    total += tl.sum(values * tl.load(mine + HEAD_DIM + dims, mask=is_dim, other=0.0)[None, :], 1)
    total += tl.sum(values * values * tl.load(mine + 3 * HEAD_DIM + dims, mask=is_dim, other=0.0)[None, :], 1)
    v_square = tl.sum(values * values, 1)

    total += tl.log(tl.maximum(k_square, smallest)) * tl.load(mine + 4 * HEAD_DIM)
    total += tl.log(tl.maximum(v_square, smallest)) * tl.load(mine + 4 * HEAD_DIM + 1)
    tl.store(scores + head * num_tokens + tokens, total + tl.load(bias + head), mask=exists)


def gate_scores_paged(
    gates: Gates,
    rotary: InverseRotary,
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    first_position: int = 0,
) -> torch.Tensor:
    """The scores [num_kv_heads, L] float32 of tokens in the pool; as `compress.compression.gate_scores_in_slots`.

    keys, values: [pool slots, num_kv_heads, head_dim], contiguous, any float dtype of 16 bits or more. slots: [L] int64.
    """
    _, heads, head_dim = keys.shape
    cos_sin = rotary.table(first_position + len(slots))[first_position:]
    scores = torch.empty(heads, len(slots), dtype=torch.float32, device=keys.device)
    config = gate_config(head_dim, rotary.rotary_dim // 2, is_neox_style=rotary.is_neox_style)
    grid = (triton.cdiv(len(slots), config["BLOCK"]), heads)
    _score_by_gates[grid](
        scores,
        keys,
        values,
        slots,
        cos_sin,
        gates.weights[layer],
        gates.bias[layer],
        len(slots),
        keys.stride(0),
        cos_sin.stride(0),
        **config,
    )
    return scores


def gate_config(head_dim: int, half: int, *, is_neox_style: bool) -> dict[str, Any]:
    """Compile-time arguments. half: of the rotated dimensions; is_neox_style: as in `rotated_back`."""
    return {
        "smallest": SMALLEST_SQUARE,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "NEOX": is_neox_style,
        "BLOCK": min(64, _BLOCK_ELEMENTS // triton.next_power_of_2(head_dim)),
        "BLOCK_HALF": triton.next_power_of_2(half),
        "BLOCK_DIM": triton.next_power_of_2(head_dim),
    }
