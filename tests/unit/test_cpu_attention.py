"""The CPU attention backend against attention written out in float64, on SGLang's own pools."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from obcache_sglang.cpu.attention import CpuAttentionBackend
from obcache_sglang.kv.cells import KeptTokens, KVSpace, create_one_space
from obcache_sglang.scheduler.forward import ForwardPlan

HEAD_DIM = 32
POOL_TOKENS = 4096
# Of values of order 1 in the dtype's own rounding (float32 2^-24, bfloat16 2^-9), summed over up to 1000 keys.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@dataclass
class Batch:
    """One batch in SGLang's form, and the outputs and log-sum-exps that attention over it must give, unless the test says them."""

    forward_batch: ForwardBatch
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    expected: torch.Tensor | None = None
    expected_lse: torch.Tensor | None = None


class Engine:
    """The parts of a model runner that an attention backend reads: two pools, with slots in random order."""

    device = "cpu"

    def __init__(self, num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.req_to_token_pool = ReqToTokenPool(8, 2048, "cpu", enable_memory_saver=False)
        self.token_to_kv_pool = MHATokenToKVPool(
            POOL_TOKENS, 1, dtype, num_kv_heads, HEAD_DIM, layer_num=2, device="cpu", enable_memory_saver=False
        )
        self.layer = RadixAttention(num_heads, HEAD_DIM, HEAD_DIM**-0.5, num_kv_heads, layer_id=1)

    def batch(self, mode: ForwardMode, prefix_lens: list[int], new_lens: list[int]) -> Batch:
        """Random requests: prefixes lie in the pool, new tokens are in k and v. Unused slots hold NaN."""
        layer = self.layer
        generator = torch.Generator().manual_seed(sum(prefix_lens) + 7 * sum(new_lens))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        key_pool = self.token_to_kv_pool.get_key_buffer(layer.layer_id).fill_(float("nan"))
        value_pool = self.token_to_kv_pool.get_value_buffer(layer.layer_id).fill_(float("nan"))
        free = torch.randperm(POOL_TOKENS, generator=generator).int() + 1
        q, k, v, new_slots, expected = [], [], [], [], []
        expected_lse = []
        for row, (prefix_len, new_len) in enumerate(zip(prefix_lens, new_lens, strict=True), start=1):
            length = prefix_len + new_len
            slots, free = free[:length], free[length:]
            self.req_to_token_pool.req_to_token[row, :length] = slots
            keys = random(length, layer.tp_k_head_num, HEAD_DIM)
            values = random(length, layer.tp_k_head_num, HEAD_DIM)
            queries = random(new_len, layer.tp_q_head_num, HEAD_DIM)
            key_pool[slots[:prefix_len].long()] = keys[:prefix_len]
            value_pool[slots[:prefix_len].long()] = values[:prefix_len]
            q.append(queries)
            k.append(keys[prefix_len:])
            v.append(values[prefix_len:])
            new_slots.append(slots[prefix_len:])
            output, lse = attention(queries, keys, values, layer.scaling)
            expected.append(output)
            expected_lse.append(lse)
        forward_batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(new_lens),
            input_ids=torch.zeros(sum(new_lens), dtype=torch.int64),
            req_pool_indices=torch.arange(1, len(new_lens) + 1),
            seq_lens=torch.tensor(prefix_lens) + torch.tensor(new_lens),
            out_cache_loc=torch.cat(new_slots).long(),
            seq_lens_sum=sum(prefix_lens) + sum(new_lens),
        )
        if mode.is_extend():
            forward_batch.extend_prefix_lens = torch.tensor(prefix_lens)
            forward_batch.extend_seq_lens = torch.tensor(new_lens)
        return Batch(
            forward_batch,
            torch.cat(q).flatten(1),
            torch.cat(k),
            torch.cat(v),
            torch.cat(expected).flatten(1),
            torch.cat(expected_lse),
        )

    def attend(self, backend: TorchNativeAttnBackend, batch: Batch) -> torch.Tensor:
        backend.init_forward_metadata(batch.forward_batch)
        return backend.forward(batch.q, batch.k, batch.v, self.layer, batch.forward_batch)


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention in float64: queries [n, heads, d] are the last n positions of keys and values [length, kv_heads, d].

    Returns the outputs, shaped like queries, and the log-sum-exps, [n, heads].
    """
    group = queries.shape[1] // keys.shape[1]
    q, k, v = queries.double(), keys.double().repeat_interleave(group, 1), values.double().repeat_interleave(group, 1)
    logits = torch.einsum("ihd,jhd->hij", q, k) * scale
    position = torch.arange(len(keys))
    logits.masked_fill_(position > position[-len(queries) :, None], float("-inf"))
    return torch.einsum("hij,jhd->ihd", logits.softmax(-1), v), logits.logsumexp(-1).T


HEADS = [(3, 3), (9, 3), (7, 1), (16, 2)]
DTYPES = list(TOLERANCE)


def case_id(value: Any) -> str:
    """Of a number of heads, a dtype, a list of (prefix, new) lengths or a name."""
    if isinstance(value, list):
        return "_".join(f"{prefix}+{new}" for prefix, new in value)
    return f"heads{value}" if isinstance(value, int) else str(value).removeprefix("torch.")


heads = pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS, ids=case_id)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)


LENGTHS = [
    [(0, 1)],
    [(0, 63), (0, 500), (0, 1)],
    [(1, 1), (500, 63), (63, 500)],
    [(0, 63), (500, 1), (1, 500)],
    [(300, 513)],
]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dtype", "lengths"),
    # All heads with all lengths; each of these in both dtypes.
    [(*HEADS[i], DTYPES[(i + j) % 2], lengths) for j, lengths in enumerate(LENGTHS) for i in range(len(HEADS))],
    ids=case_id,
)
def test_extend(num_heads: int, num_kv_heads: int, dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    engine = Engine(num_heads, num_kv_heads, dtype)
    batch = engine.batch(ForwardMode.EXTEND, [p for p, _ in lengths], [n for _, n in lengths])
    output = engine.attend(CpuAttentionBackend(engine), batch)
    torch.testing.assert_close(output.double(), batch.expected, atol=TOLERANCE[dtype], rtol=0)


@heads
@dtypes
@pytest.mark.parametrize("prefixes", [[0], [62, 499, 1000, 1]], ids=lambda lens: "prefix" + "-".join(map(str, lens)))
def test_decode(num_heads: int, num_kv_heads: int, dtype: torch.dtype, prefixes: list[int]) -> None:
    engine = Engine(num_heads, num_kv_heads, dtype)
    batch = engine.batch(ForwardMode.DECODE, prefixes, [1] * len(prefixes))
    output = engine.attend(CpuAttentionBackend(engine), batch)
    torch.testing.assert_close(output.double(), batch.expected, atol=TOLERANCE[dtype], rtol=0)


@heads
@dtypes
def test_the_log_sum_exps_that_scores_are_made_of(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    engine = Engine(num_heads, num_kv_heads, dtype)
    backend = CpuAttentionBackend(engine)
    backend.plan = ForwardPlan(engine.token_to_kv_pool, engine.req_to_token_pool)
    batch = engine.batch(ForwardMode.EXTEND, [0, 500, 63], [63, 1, 500])
    engine.attend(backend, batch)
    assert backend.plan.row_lse is not None
    torch.testing.assert_close(backend.plan.row_lse.double(), batch.expected_lse, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE], ids=lambda mode: mode.name.lower())
def test_sliding_windows_are_left_to_torch_native(mode: ForwardMode) -> None:
    engine = Engine(9, 3, torch.float32)
    engine.layer.sliding_window_size = 16
    batch = engine.batch(mode, [50, 3], [1, 1])
    ours = engine.attend(CpuAttentionBackend(engine), batch)
    torch.testing.assert_close(ours, engine.attend(TorchNativeAttnBackend(engine), batch), atol=0, rtol=0)
    engine.layer.sliding_window_size = -1
    assert not torch.allclose(ours, engine.attend(CpuAttentionBackend(engine), batch))


def test_new_tokens_are_written_to_the_pool_unless_told_not_to() -> None:
    engine = Engine(9, 3, torch.float32)
    backend = CpuAttentionBackend(engine)
    batch = engine.batch(ForwardMode.EXTEND, [5], [4])
    slots = batch.forward_batch.out_cache_loc
    keys = engine.token_to_kv_pool.get_key_buffer(1)
    backend.init_forward_metadata(batch.forward_batch)
    backend.forward(batch.q, batch.k, batch.v, engine.layer, batch.forward_batch, save_kv_cache=False)
    assert keys[slots].isnan().all()
    backend.forward(batch.q, batch.k, batch.v, engine.layer, batch.forward_batch)
    torch.testing.assert_close(keys[slots], batch.k, atol=0, rtol=0)


def test_an_idle_batch_gives_no_rows() -> None:
    engine = Engine(9, 3, torch.float32)
    forward_batch = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    output = CpuAttentionBackend(engine).forward(torch.empty(0, 9 * HEAD_DIM), None, None, engine.layer, forward_batch)
    assert output.shape == (0, 9 * HEAD_DIM)


# --- heads of different length ------------------------------------------------------------------------------------------

NUM_LAYERS = 3


class UnevenEngine(Engine):
    """Requests behind contexts whose heads keep different numbers of tokens; `layer` is the middle one of three."""

    def __init__(self, num_heads: int, num_kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MHATokenToKVPool, "_create_buffers_normal", create_one_space)
        self.dtype = dtype
        self.req_to_token_pool = ReqToTokenPool(16, 2048, "cpu", enable_memory_saver=False)
        self.token_to_kv_pool = MHATokenToKVPool(
            POOL_TOKENS, 1, dtype, num_kv_heads, HEAD_DIM, layer_num=NUM_LAYERS, device="cpu", enable_memory_saver=False
        )
        self.layer = RadixAttention(num_heads, HEAD_DIM, HEAD_DIM**-0.5, num_kv_heads, layer_id=1)
        space = KVSpace.of(self.token_to_kv_pool)
        assert space is not None
        self.space = space
        space.k.fill_(float("nan"))
        space.v.fill_(float("nan"))
        self.generator = torch.Generator().manual_seed(num_heads)
        self.free = torch.randperm(POOL_TOKENS, generator=self.generator).int() + 1

    def take(self, count: int) -> torch.Tensor:
        slots, self.free = self.free[:count], self.free[count:]
        return slots

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def context(self, shares: list[float], num_slots: int) -> tuple[SimpleNamespace, torch.Tensor, list[torch.Tensor]]:
        """A context whose heads keep these shares of all its cells, its slots, and K and V of the layer's heads, [2, kept, dim]."""
        num_cells = num_slots * self.space.num_heads
        counts = (torch.tensor(shares) / sum(shares) * num_cells).int()
        counts[counts.argmax()] += num_cells - counts.sum()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        slots = self.take(num_slots)
        cells = self.random(2, num_cells, HEAD_DIM)
        # The numbering of obcache_sglang.kv.cells, written out; what follows must find the same cells.
        for number, (keys, values) in enumerate(cells.unflatten(1, (-1, num_slots)).transpose(0, 1)):
            layer, lane = divmod(number, self.space.num_kv_heads)
            self.token_to_kv_pool.get_key_buffer(layer)[slots.long(), lane] = keys
            self.token_to_kv_pool.get_value_buffer(layer)[slots.long(), lane] = values
        kept = KeptTokens(torch.zeros(num_cells, dtype=torch.int32), offsets, self.space.cell_rows(slots.long()).int())
        first = self.layer.layer_id * self.space.num_kv_heads
        heads = [cells[:, offsets[head] : offsets[head + 1]] for head in range(first, first + self.space.num_kv_heads)]
        context = Reader(kept=kept, num_slots=num_slots, num_exact=0, is_uneven=True)
        return context, slots, heads


class Reader(SimpleNamespace):
    """What the backend reads of a Context."""

    __hash__ = object.__hash__


SHARES = {
    "a-head-with-nothing": lambda heads: [0.0 if head == heads // 2 else 1.0 for head in range(heads)],
    "heads-differ": lambda heads: [1.0 + 3 * (head % 3) for head in range(heads)],
    "a-layer-with-almost-everything": lambda heads: [
        100.0 if heads // 3 <= head < 2 * heads // 3 else 1.0 for head in range(heads)
    ],
    "a-layer-with-almost-nothing": lambda heads: [1.0 if heads // 3 <= head < 2 * heads // 3 else 50.0 for head in range(heads)],
}


# By mode: (context or none, cached tokens behind it, new tokens) of each request. Two contexts, of 63 and 150 slots.
REQUESTS: dict[str, tuple[ForwardMode, list[tuple[int | None, int, int]]]] = {
    "decode-alone": (ForwardMode.DECODE, [(0, 0, 1)]),
    "decode-together": (ForwardMode.DECODE, [(0, 62, 1), (0, 0, 1), (1, 5, 1), (None, 499, 1), (0, 300, 1)]),
    "extend-alone": (ForwardMode.EXTEND, [(0, 0, 1)]),
    "extend-together": (ForwardMode.EXTEND, [(0, 0, 63), (None, 5, 9), (1, 63, 500), (0, 500, 1)]),
}


@dtypes
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "shares", "requests"),
    # All shares with all requests, each with other heads. With the only KV head of its layer, the head with nothing makes a layer with
    # nothing.
    [(*HEADS[(i + j) % 4], shares, requests) for i, shares in enumerate(SHARES) for j, requests in enumerate(REQUESTS)]
    + [(7, 1, "a-head-with-nothing", requests) for requests in ("decode-alone", "decode-together", "extend-together")],
    ids=case_id,
)
def test_heads_of_different_length(
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    shares: str,
    requests: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mode, of_requests = REQUESTS[requests]
    engine = UnevenEngine(num_heads, num_kv_heads, dtype, monkeypatch)
    layer = engine.layer
    contexts = [engine.context(SHARES[shares](engine.space.num_heads), num_slots) for num_slots in (63, 150)]
    q, k, v, new_slots, expected, behind, lengths = [], [], [], [], [], [], []
    for row, (which, cached, new) in enumerate(of_requests, start=1):
        context, slots, kept = contexts[which] if which is not None else (None, torch.empty(0, dtype=torch.int32), None)
        suffix = engine.take(cached + new)
        keys, values = engine.random(2, cached + new, num_kv_heads, HEAD_DIM)
        engine.token_to_kv_pool.get_key_buffer(1)[suffix[:cached].long()] = keys[:cached]
        engine.token_to_kv_pool.get_value_buffer(1)[suffix[:cached].long()] = values[:cached]
        engine.req_to_token_pool.req_to_token[row, : len(slots) + cached + new] = torch.cat([slots, suffix])
        queries = engine.random(new, num_heads, HEAD_DIM)
        group = num_heads // num_kv_heads
        outputs = []
        for head in range(num_kv_heads):
            before = kept[head] if kept is not None else engine.random(2, 0, HEAD_DIM)
            head_keys, head_values = (
                torch.cat([part, own[:, head]])[:, None] for part, own in zip(before, (keys, values), strict=True)
            )
            rows_of = queries[:, head * group : (head + 1) * group]
            outputs.append(attention(rows_of, head_keys, head_values, layer.scaling)[0])
        expected.append(torch.cat(outputs, 1))
        q.append(queries)
        k.append(keys[cached:])
        v.append(values[cached:])
        new_slots.append(suffix[cached:])
        behind.append(context)
        lengths.append(len(slots) + cached + new)
    num_new = torch.tensor([new for _, _, new in of_requests])
    forward_batch = ForwardBatch(
        forward_mode=mode,
        batch_size=len(of_requests),
        input_ids=torch.zeros(int(num_new.sum()), dtype=torch.int64),
        req_pool_indices=torch.arange(1, len(of_requests) + 1),
        seq_lens=torch.tensor(lengths),
        out_cache_loc=torch.cat(new_slots).long(),
        seq_lens_sum=sum(lengths),
    )
    if mode.is_extend():
        forward_batch.extend_prefix_lens = torch.tensor(lengths) - num_new
        forward_batch.extend_seq_lens = num_new
    backend = CpuAttentionBackend(engine)
    backend.plan = SimpleNamespace(contexts=lambda batch: behind, space=engine.space)
    output = engine.attend(backend, Batch(forward_batch, torch.cat(q).flatten(1), torch.cat(k), torch.cat(v)))
    torch.testing.assert_close(output.double(), torch.cat(expected).flatten(1), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("num_exact", [0, 8])
def test_what_no_head_keeps_is_not_read(num_exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local pass of a replay: some first tokens, none of the next 42, which are NaN here, 30 more and 10 new ones."""
    engine = UnevenEngine(9, 3, torch.float32, monkeypatch)
    slots, seen = engine.take(num_exact + 42 + 40), num_exact + 40
    keys, values = engine.random(2, seen, 3, HEAD_DIM)
    read = torch.cat([slots[:num_exact], slots[-40:]]).long()
    engine.token_to_kv_pool.get_key_buffer(1)[read[:-10]] = keys[:-10]
    engine.token_to_kv_pool.get_value_buffer(1)[read[:-10]] = values[:-10]
    engine.req_to_token_pool.req_to_token[1, : len(slots)] = slots
    q = engine.random(10, 9, HEAD_DIM)
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.zeros(10, dtype=torch.int64),
        req_pool_indices=torch.tensor([1]),
        seq_lens=torch.tensor([len(slots)]),
        out_cache_loc=slots[-10:].long(),
        seq_lens_sum=len(slots),
    )
    forward_batch.extend_prefix_lens, forward_batch.extend_seq_lens = torch.tensor([len(slots) - 10]), torch.tensor([10])
    kept = KeptTokens(torch.arange(num_exact).repeat(9), torch.arange(10) * num_exact, num_exact=num_exact)
    context = Reader(kept=kept, num_slots=num_exact + 42, num_exact=num_exact, is_uneven=True)
    backend = CpuAttentionBackend(engine)
    backend.plan = SimpleNamespace(contexts=lambda batch: [context], space=engine.space)
    output = engine.attend(backend, Batch(forward_batch, q.flatten(1), keys[-10:], values[-10:]))
    expected, lse = attention(q, keys, values, engine.layer.scaling)
    torch.testing.assert_close(output.double(), expected.flatten(1), atol=TOLERANCE[torch.float32], rtol=0)
    torch.testing.assert_close(backend.plan.row_lse.double(), lse, atol=1e-5, rtol=0)


def test_readers_of_an_even_context_are_attended_together_too() -> None:
    engine = Engine(9, 3, torch.float32)
    batch = engine.batch(ForwardMode.DECODE, [300, 340, 320], [1, 1, 1])
    table = engine.req_to_token_pool.req_to_token
    for layer_buffer in (engine.token_to_kv_pool.get_key_buffer(1), engine.token_to_kv_pool.get_value_buffer(1)):
        for row in (2, 3):
            layer_buffer[table[row, :256].long()] = layer_buffer[table[1, :256].long()]
    alone = engine.attend(CpuAttentionBackend(engine), batch)
    table[2:4, :256] = table[1, :256]
    context = Reader(kept=None, num_slots=256, is_uneven=False)
    backend = CpuAttentionBackend(engine)
    backend.plan = SimpleNamespace(contexts=lambda batch: [context] * 3, space=None)
    torch.testing.assert_close(engine.attend(backend, batch), alone, atol=TOLERANCE[torch.float32], rtol=0)


def test_one_space_has_the_shapes_of_sglangs_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [Engine(9, 3, torch.bfloat16).token_to_kv_pool]
    assert KVSpace.of(pools[0]) is None  # SGLang allocates each layer by itself
    monkeypatch.setattr(MHATokenToKVPool, "_create_buffers_normal", create_one_space)
    pools.append(Engine(9, 3, torch.bfloat16).token_to_kv_pool)
    space = KVSpace.of(pools[1])
    assert space is not None
    for stock, ours in zip(pools[0].k_buffer + pools[0].v_buffer, pools[1].k_buffer + pools[1].v_buffer, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (stock.shape, stock.stride(), stock.dtype)
    for layer in range(2):
        for slot, lane in ((0, 0), (7, 2), (POOL_TOKENS, 1)):
            row = space.rows(layer, torch.tensor(slot), lane)
            assert space.k[row].data_ptr() == pools[1].k_buffer[layer][slot, lane].data_ptr()
            assert space.v[row].data_ptr() == pools[1].v_buffer[layer][slot, lane].data_ptr()
