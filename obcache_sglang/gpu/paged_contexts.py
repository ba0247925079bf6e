"""Contexts in a paged KV pool and the query rows that score them, as FlashInfer's paged wrappers describe them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LAYOUTS = ("NHD", "HND")


@dataclass(frozen=True)
class PagedCache:
    """K and V of one layer.

    k, v: [pages, page_size, num_kv_heads, head_dim] (layout "NHD") or [pages, num_kv_heads, page_size, head_dim] ("HND"), any
        strides but of the last dimension, which is contiguous; float32, float16, bfloat16 or float8_e4m3fn.
    k_scale, v_scale: what the stored K and V are to be multiplied with; 1 unless they are float8.

    Raises ValueError when k, v or layout is not so.
    """

    k: torch.Tensor
    v: torch.Tensor
    layout: str = "NHD"
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
        if self.k.dim() != 4 or self.k.shape != self.v.shape or self.k.dtype != self.v.dtype:
            raise ValueError(f"k {_kind(self.k)} and v {_kind(self.v)} must have one dtype and shape, with 4 dimensions")
        if self.k.stride(3) != 1 or self.v.stride(3) != 1:
            raise ValueError("the last dimension of k and v must be contiguous")
        if self.k.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
            raise ValueError(f"K and V of {self.k.dtype} are not supported; use float32, float16, bfloat16 or float8_e4m3fn")

    @classmethod
    def of_slots(cls, k: torch.Tensor, v: torch.Tensor) -> PagedCache:
        """k, v: [slots, num_kv_heads, head_dim], each slot a page of one token, as in SGLang's pools."""
        return cls(k.unsqueeze(1), v.unsqueeze(1), "NHD")

    @property
    def page_size(self) -> int:
        return self.k.shape[1 if self.layout == "NHD" else 2]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2 if self.layout == "NHD" else 1]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def is_fp8(self) -> bool:
        return self.k.dtype == torch.float8_e4m3fn

    @property
    def k_factor(self) -> float:
        """What K is multiplied with after `load_tokens`."""
        return self.k_scale * (_E4M3_FACTOR if self.is_fp8 else 1)

    @property
    def v_factor(self) -> float:
        """What V is multiplied with after `load_tokens`."""
        return self.v_scale * (_E4M3_FACTOR if self.is_fp8 else 1)

    def kernel_arguments(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
        """k or v as kernels take it (float8 as bytes), and its strides, in elements, from page to page, token to token and head to head.

        tensor: [pages, page_size, num_kv_heads, head_dim], or heads before tokens in layout HND.
        """
        page, second, third, _ = tensor.stride()
        token, head = (second, third) if self.layout == "NHD" else (third, second)
        return tensor.view(torch.uint8) if self.is_fp8 else tensor, page, token, head

    def check_queries(self, name: str, rows: torch.Tensor) -> None:
        """Raises ValueError when rows is not [rows, num_q_heads, head_dim] in a dtype that goes with these K and V."""
        fits = rows.dim() == 3 and rows.shape[2] == self.head_dim and rows.shape[1] % self.num_kv_heads == 0
        if not fits or rows.stride(2) != 1:
            raise ValueError(
                f"{name} {_kind(rows)} must be [rows, a multiple of {self.num_kv_heads} query heads, {self.head_dim}], "
                "the last dimension contiguous"
            )
        if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not (self.is_fp8 or rows.dtype == self.k.dtype):
            raise ValueError(f"{name} {_kind(rows)} does not go with K and V of {self.k.dtype}")


@dataclass(frozen=True)
class PagedContexts:
    """C contexts, the query rows that score each, and how many of its tokens get scores. Tensors: int32 or int64, on the device.

    q_indptr: [C + 1], as FlashInfer's qo_indptr: rows q_indptr[c] ... q_indptr[c + 1] - 1 of q are those of context c.
    starts: [C], the position of each context's first row in its context; the next rows follow. Attention is causal: a row at
        position p sees tokens 0 ... p, as far as there are any.
    kv_indices, kv_indptr [C + 1], kv_last_page_len [C]: FlashInfer's page table of each context's tokens.
    score_indptr: [C + 1]: the first score_indptr[c + 1] - score_indptr[c] tokens of context c get scores, which lie there.
    max_rows, max_tokens, max_scored: no context has more rows, tokens, scored tokens. These are bounds, not checked: what
        lies beyond a smaller figure is left out.
    """

    q_indptr: torch.Tensor
    starts: torch.Tensor
    kv_indices: torch.Tensor
    kv_indptr: torch.Tensor
    kv_last_page_len: torch.Tensor
    score_indptr: torch.Tensor
    max_rows: int
    max_tokens: int
    max_scored: int

    @classmethod
    def one(cls, slots: torch.Tensor, *, rows: int, start: int, num_scored: int) -> PagedContexts:
        """A context whose tokens lie in `slots` ([tokens] int32 or int64), pages of one token; its rows begin at `start`."""
        tokens = len(slots)
        # Rows of 16 bytes: Triton compiles a kernel anew for pointers at other addresses.
        tables = torch.tensor([[0, rows, 0, 0], [start, 0, 0, 0], [0, tokens, 0, 0], [1, 0, 0, 0], [0, num_scored, 0, 0]])
        tables = tables.to(torch.int32)
        if slots.device.type == "cuda":  # a copy from other memory would wait for the device
            tables = tables.pin_memory()
        q_indptr, starts, kv_indptr, last_page_len, score_indptr = tables.to(slots.device, non_blocking=True).unbind()
        return cls(q_indptr[:2], starts[:1], slots, kv_indptr[:2], last_page_len[:1], score_indptr[:2], rows, tokens, num_scored)

    @property
    def num_contexts(self) -> int:
        return len(self.starts)


def _kind(tensor: torch.Tensor) -> str:
    """A tensor of any shape, for an error: its shape and dtype, "[2, 3] torch.float32"."""
    return f"{list(tensor.shape)} {tensor.dtype}"


# load_tokens leaves float8 this much too small.
_E4M3_FACTOR = 256


@triton.jit
def num_tokens(kv_indptr: tl.tensor, kv_last_page_len: tl.tensor, context: tl.tensor, PAGE_SIZE: tl.constexpr) -> tl.tensor:
    """Tokens of a context in its page table; not positive where it has no page."""
    num_pages = tl.load(kv_indptr + context + 1) - tl.load(kv_indptr + context)
    return (num_pages - 1) * PAGE_SIZE + tl.load(kv_last_page_len + context)


@triton.jit
def load_tokens(
    cache: tl.tensor,
    pages: tl.tensor,
    positions: tl.tensor,
    inside: tl.tensor,
    head: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
) -> tl.tensor:
    """K or V [positions, BLOCK_D] in dtype, 0 where not inside and past HEAD_DIM; float8 divided by _E4M3_FACTOR.

    pages: the context's kv_indices.
    """
    dims = tl.arange(0, BLOCK_D)
    page = tl.load(pages + positions // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    rows = page * page_stride + (positions % PAGE_SIZE) * token_stride + head.to(tl.int64) * head_stride
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    loaded = tl.load(cache + rows[:, None] + dims[None, :], mask=mask, other=0)
    if cache.dtype.element_ty == tl.uint8:
        # Sign, exponent and mantissa of e4m3 as those of a float16, whose exponent counts from 15 instead of 7. By hand,
        # as Triton has no such conversion below sm_89.
        bits = ((loaded & 0x80).to(tl.uint16) << 8) | ((loaded & 0x7F).to(tl.uint16) << 7)
        loaded = bits.to(tl.float16, bitcast=True)
    return loaded.to(dtype)
