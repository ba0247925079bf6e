"""Attention over heads of different length on GPUs, against attention written out in float64."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from obcache_sglang.gpu import flashinfer_heads, head_tables, triton_heads
from obcache_sglang.gpu.flashinfer_heads import FlashInferHeads
from obcache_sglang.gpu.head_attention import HeadStep
from obcache_sglang.gpu.head_graphs import HeadGraphBackend, HeadGraphs
from obcache_sglang.gpu.head_tables import HeadBatch, HeadTables
from obcache_sglang.gpu.overlay import HeadOverlay
from obcache_sglang.gpu.triton_heads import MAX_SPLITS, SPLIT_LENGTH, TritonHeads
from obcache_sglang.kv.cells import KeptTokens, KVSpace, create_one_space
from tests.kernels.conftest import DEVICE

NUM_LAYERS = 3
POOL_TOKENS = 2500
MAX_TOKENS = 900
# float32 sums of up to 2000 terms of order 1; on GPUs Triton multiplies float32 as TF32, with 10 bits.
TOLERANCE = {torch.float32: 3e-6 if DEVICE == "cpu" else 5e-3, torch.float16: 2e-3}


@dataclass
class Request:
    """kept: cells of each head of each layer, in order, or none; earlier: ordinary tokens before the new ones.

    exact: tokens that every head has before its cells. unseen: tokens after the cells that no head reads.
    """

    earlier: int
    num_new: int
    kept: list[int] = field(default_factory=list)
    exact: int = 0
    unseen: int = 0


def evenly(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def adakv(num_slots: int, num_kv_heads: int) -> list[int]:
    """Each layer holds num_slots * num_kv_heads cells: its first head only the floor of 4, the others what is left."""
    cells = num_slots * num_kv_heads
    floor = min(4, cells) if num_kv_heads > 1 else cells
    return [floor, *evenly(cells - floor, num_kv_heads - 1)] * NUM_LAYERS


def global_budget(num_slots: int, num_kv_heads: int) -> list[int]:
    """A layer of 4 cells and heads without any, one that holds almost everything, and one of a cell per head."""
    cells = num_slots * num_kv_heads * NUM_LAYERS
    small = [min(4, cells), *[0] * (num_kv_heads - 1)]
    last = [1] * num_kv_heads if cells - small[0] > num_kv_heads else [0] * num_kv_heads
    large = cells - sum(small) - sum(last)
    return small + evenly(large, num_kv_heads) + last


class Engine:
    """SGLang's pool and page table, with requests in it; all that no request owns is NaN."""

    def __init__(self, requests: list[Request], num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.requests, self.num_kv_heads, self.head_dim, self.dtype = requests, num_kv_heads, head_dim, dtype
        self.random = torch.Generator().manual_seed(7)
        self.pool = MHATokenToKVPool(
            POOL_TOKENS, 1, dtype, num_kv_heads, head_dim, layer_num=NUM_LAYERS, device=DEVICE, enable_memory_saver=False
        )
        assert create_one_space(self.pool)
        for buffer in self.pool.k_buffer + self.pool.v_buffer:
            buffer.fill_(float("nan"))
        space = KVSpace.of(self.pool)
        assert space is not None
        self.space = space
        # Rows of the page table are not the batch's, and tokens behind a sequence's end have slots that do not exist.
        self.req_to_token = torch.full((len(requests) + 3, MAX_TOKENS), 2**30, dtype=torch.int32, device=DEVICE)
        self.rows = torch.randperm(len(requests) + 3, generator=self.random)[: len(requests)]
        # Where the K and V of each (request, layer, head) lie: (layer, slot, lane), in the sequence's order.
        self.places: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
        free = (torch.randperm(POOL_TOKENS, generator=self.random) + 1).tolist()
        for number, request in enumerate(requests):
            num_slots = self.num_slots(request)
            slots = [free.pop() for _ in range(num_slots + request.earlier + request.num_new)]
            self.req_to_token[self.rows[number], : len(slots)] = torch.tensor(slots, dtype=torch.int32)
            cell, own = 0, slots[request.exact : num_slots - request.unseen]
            for layer in range(NUM_LAYERS):
                for head in range(num_kv_heads):
                    places = [(layer, slot, head) for slot in slots[: request.exact]]
                    for _ in range(request.kept[layer * num_kv_heads + head] if request.kept else 0):
                        lanes = cell // len(own)
                        places.append((lanes // num_kv_heads, own[cell % len(own)], lanes % num_kv_heads))
                        cell += 1
                    places += [(layer, slot, head) for slot in slots[num_slots:]]
                    self.places[number, layer, head] = places
                    for where, slot, lane in places:
                        for pool in (self.pool.k_buffer, self.pool.v_buffer):
                            pool[where][slot, lane] = torch.randn(head_dim, generator=self.random)
            assert cell == len(own) * NUM_LAYERS * num_kv_heads

    def num_slots(self, request: Request) -> int:
        return request.exact + sum(request.kept) // (NUM_LAYERS * self.num_kv_heads) + request.unseen

    def batch(self, dtype: torch.dtype = torch.int64) -> HeadBatch:
        """The batch as an engine gives it; max_entries is as small as it may be."""
        heads = range(self.num_kv_heads)
        layers = [
            sum(len(self.places[number, layer, head]) for number in range(len(self.requests)) for head in heads)
            for layer in range(NUM_LAYERS)
        ]
        slots = [self.num_slots(request) for request in self.requests]
        lengths = [m + request.earlier + request.num_new for m, request in zip(slots, self.requests, strict=True)]
        offsets = torch.zeros(len(self.requests), NUM_LAYERS * self.num_kv_heads + 1, dtype=dtype)
        for number, request in enumerate(self.requests):
            if request.kept:
                offsets[number, 1:] = (torch.tensor(request.kept) + request.exact).cumsum(0)
        num_new = [request.num_new for request in self.requests]
        return HeadBatch(
            req_pool_indices=self.rows.to(DEVICE),
            seq_lens=torch.tensor(lengths, device=DEVICE),
            num_slots=torch.tensor(slots, dtype=dtype, device=DEVICE),
            num_exact=torch.tensor([request.exact for request in self.requests], dtype=dtype, device=DEVICE),
            offsets=offsets.to(DEVICE),
            max_entries=max(layers),
            num_new=torch.tensor(num_new, device=DEVICE) if max(num_new) > 1 else None,
            max_new=max(num_new),
        )

    def uneven_contexts(self, batch: HeadBatch) -> list[tuple[int, SimpleNamespace]]:
        """What `ForwardPlan.uneven_contexts` has of the requests that have cells."""
        rows = [(row, request) for row, request in enumerate(self.requests) if request.kept]
        return [
            (
                row,
                SimpleNamespace(
                    kept=KeptTokens(torch.empty(0), batch.offsets[row]),
                    num_slots=self.num_slots(request),
                    num_exact=request.exact,
                ),
            )
            for row, request in rows
        ]

    def row(self, place: tuple[int, int, int]) -> int:
        """The KVSpace row of a place, from the addresses of SGLang's own buffers."""
        layer, slot, lane = place
        row = self.pool.k_buffer[layer][slot, lane]
        return (row.data_ptr() - self.space.k.data_ptr()) // (self.head_dim * row.element_size())

    def on(self, batch: HeadBatch, device: str) -> HeadBatch:
        tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        return replace(batch, **tensors)

    def triton_step(self, group_size: int) -> HeadStep:
        return TritonHeads(self.space, self.req_to_token, group_size * self.num_kv_heads).step(self.batch())

    def queries(self, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of all new tokens, beside K and V as a fused projection leaves them, and an output to write to."""
        num_tokens = sum(request.num_new for request in self.requests)
        width = group_size * self.num_kv_heads * self.head_dim
        fused = torch.randn(num_tokens, width + 2 * self.num_kv_heads * self.head_dim, generator=self.random)
        return fused.to(DEVICE, self.dtype)[:, :width], torch.full(
            (num_tokens, width), float("nan"), dtype=self.dtype, device=DEVICE
        )

    def check_attention(self, group_size: int, step: HeadStep) -> None:
        """One forward pass through all layers."""
        scale = 1.5 * self.head_dim**-0.5
        for layer in range(NUM_LAYERS):
            q, out = self.queries(group_size)
            step.attend(q, layer, scale, out)
            expected = self.expected(q.double().cpu(), layer, group_size, scale)
            torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=TOLERANCE[self.dtype])

    def expected(self, q: torch.Tensor, layer: int, group_size: int, scale: float) -> torch.Tensor:
        queries = q.view(q.shape[0], self.num_kv_heads, group_size, self.head_dim)
        out = torch.empty_like(queries)
        first = 0
        for number, request in enumerate(self.requests):
            new = slice(first, first + request.num_new)
            first = new.stop
            for head in range(self.num_kv_heads):
                places = self.places[number, layer, head]
                keys = torch.stack([self.pool.k_buffer[where][slot, lane] for where, slot, lane in places]).double().cpu()
                values = torch.stack([self.pool.v_buffer[where][slot, lane] for where, slot, lane in places]).double().cpu()
                logits = torch.einsum("tgd,nd->gtn", queries[new, head], keys) * scale
                hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(len(places) - request.num_new + 1)
                weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
                out[new, head] = torch.einsum("gtn,nd->tgd", weights, values)
        return out.view_as(q)


def mixed_requests(num_kv_heads: int, num_slots: int, new: tuple[int, int, int, int]) -> list[Request]:
    """Contexts under both budgets, and an ordinary request; two have earlier tokens of their own."""
    return [
        Request(earlier=63 - new[0], num_new=new[0]),
        Request(earlier=0, num_new=new[1], kept=global_budget(1, num_kv_heads)),
        Request(earlier=5, num_new=new[2], kept=adakv(63, num_kv_heads)),
        Request(earlier=7, num_new=new[2], kept=global_budget(num_slots, num_kv_heads), exact=70),
        Request(earlier=0, num_new=new[3], kept=global_budget(num_slots, num_kv_heads)),
    ]


@pytest.fixture(autouse=True)
def poisoned_memory() -> object:
    """torch.empty() gives NaN and the largest integers: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


DECODE, EXTEND, SHORT_EXTEND = (1, 1, 1, 1), (63, 1, 9, 70), (2, 1, 1, 5)


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time over splits, used or not."""
    monkeypatch.setattr(triton_heads, "MAX_SPLITS", 2)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize(
    ("new", "group_size", "num_slots"),
    [
        pytest.param(DECODE, 1, 100, marks=pytest.mark.long),
        (EXTEND, 1, 100),
        (DECODE, 3, 500),
        pytest.param(EXTEND, 3, 500, marks=pytest.mark.long),
    ],
)
def test_attention_equals_float64(new: tuple[int, int, int, int], group_size: int, num_slots: int) -> None:
    """Also of a local pass of a replay: the first tokens of its context, none of the next ones, and all after these."""
    local = Request(earlier=30, num_new=new[2], kept=[0] * 2 * NUM_LAYERS, exact=8, unseen=50)
    engine = Engine([*mixed_requests(2, num_slots, new), local], 2, 16, torch.float32)
    engine.check_attention(group_size, engine.triton_step(group_size))


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("group_size", [pytest.param(7, marks=pytest.mark.long), 8])
@pytest.mark.parametrize("new", [DECODE, pytest.param(SHORT_EXTEND, marks=pytest.mark.long)], ids=["decode", "extend"])
def test_attention_with_large_groups(group_size: int, new: tuple[int, int, int, int]) -> None:
    engine = Engine(mixed_requests(2, 63, new)[2:], 2, 16, torch.float32)
    engine.check_attention(group_size, engine.triton_step(group_size))


# Not bfloat16: the interpreter multiplies its bits as integers.
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("new", [DECODE, pytest.param(SHORT_EXTEND, marks=pytest.mark.long)], ids=["decode", "extend"])
def test_attention_with_three_kv_heads_and_an_odd_head_dim_in_float16(new: tuple[int, int, int, int]) -> None:
    engine = Engine(mixed_requests(3, 63, new), 3, 80, torch.float16)
    engine.check_attention(2, engine.triton_step(2))


def test_decode_merges_the_splits_of_a_long_head() -> None:
    """A head of more than MAX_SPLITS * SPLIT_LENGTH keys beside heads of one split."""
    num_slots = MAX_SPLITS * SPLIT_LENGTH // (2 * NUM_LAYERS) + 20
    requests = [Request(0, 1, global_budget(num_slots, 2))]
    requests[0].kept = [0, 1, sum(requests[0].kept) - 6, 5, 0, 0]
    engine = Engine(requests, 2, 16, torch.float32)
    assert len(engine.places[0, 1, 0]) > MAX_SPLITS * SPLIT_LENGTH
    engine.check_attention(2, engine.triton_step(2))


@pytest.mark.parametrize("new", [DECODE, EXTEND], ids=["decode", "extend"])
@pytest.mark.parametrize(("num_kv_heads", "dtype"), [(1, torch.int32), (3, torch.int64)])
def test_tables_equal_their_definition(num_kv_heads: int, dtype: torch.dtype, new: tuple[int, int, int, int]) -> None:
    engine = Engine(mixed_requests(num_kv_heads, 500, new), num_kv_heads, 2, torch.float32)
    tables = HeadTables(engine.space, engine.req_to_token, engine.batch(dtype), index_dtype=dtype)
    order = [(number, head) for number in range(len(engine.requests)) for head in range(engine.num_kv_heads)]
    if new is EXTEND:
        order.sort(key=lambda sequence: sequence[1])
    for layer in range(NUM_LAYERS):
        places = [engine.places[number, layer, head] for number, head in order]
        rows = [engine.row(place) for sequence in places for place in sequence]
        indices = tables.indices(layer)
        assert indices.dtype == dtype
        assert indices[: len(rows)].tolist() == rows
        assert tables.lengths[layer].tolist() == [len(sequence) for sequence in places]
        assert tables.indptr[layer].tolist() == [sum(map(len, places[:i])) for i in range(len(places) + 1)]
        assert tables.indptr[layer].data_ptr() % 16 == 0
        # Nothing is written behind the last sequence, where the poison of torch.empty() or of the last layer's end is.
        assert (indices[len(rows) :] == torch.iinfo(dtype).max).all()
        indices.fill_(torch.iinfo(dtype).max)


def test_rows_beyond_32_bits() -> None:
    """Two of a context's heads have cells, in lanes of all three layers."""
    stride = 2**30
    space = KVSpace(torch.empty(0, 8), torch.empty(0, 8), num_layers=3, num_kv_heads=3, layer_stride=stride)
    batch = HeadBatch(
        req_pool_indices=torch.tensor([0], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor([2], dtype=torch.int32, device=DEVICE),
        num_slots=torch.tensor([1], dtype=torch.int32, device=DEVICE),
        num_exact=torch.tensor([0], dtype=torch.int32, device=DEVICE),
        offsets=torch.tensor([[0, 0, 0, 7, 7, 7, 7, 7, 7, 9]], dtype=torch.int32, device=DEVICE),
        max_entries=10,
    )
    req_to_token = torch.tensor([[11, 13]], dtype=torch.int32, device=DEVICE)
    tables = HeadTables(space, req_to_token, batch, index_dtype=torch.int64)
    cells = [(layer * stride + 11) * 3 + lane for layer in range(3) for lane in range(3)]
    assert tables.indices(0).tolist() == [39, 40, *cells[:7], 41]
    last = (2 * stride + 13) * 3
    assert tables.indices(2)[:5].tolist() == [last, last + 1, *cells[7:], last + 2]


@pytest.mark.parametrize("new", [DECODE, EXTEND], ids=["decode", "extend"])
def test_nothing_waits_for_the_device(new: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the meta device have no values: whoever asks for one, or for a shape that depends on one, gets an error."""
    engine = Engine(mixed_requests(2, 63, new), 2, 16, torch.float32)
    space = replace(engine.space, k=engine.space.k.to("meta"), v=engine.space.v.to("meta"))
    q, out = (tensor.to("meta") for tensor in engine.queries(2))
    for kernel in ("decode_attention_fwd", "extend_attention_fwd_unified"):
        monkeypatch.setattr(triton_heads, kernel, lambda *args, **kwargs: None)
    monkeypatch.setattr(head_tables, "_write_indices", defaultdict(lambda: lambda *args, **kwargs: None))
    step = TritonHeads(space, engine.req_to_token.to("meta"), 4).step(engine.on(engine.batch(), "meta"))
    step.attend(q, 1, 0.25, out)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("new", [DECODE, SHORT_EXTEND], ids=["decode", "extend"])
@pytest.mark.parametrize("mixed", [True, False], ids=["beside-an-ordinary-request", "alone"])
def test_overlay_on_a_stock_backend(new: tuple[int, int, int, int], mixed: bool) -> None:
    """SGLang's own backend computes the ordinary request; where there is none, it is not asked at all."""
    requests = mixed_requests(2, 63, new)[0 if mixed else 1 :]
    engine = Engine(requests, 2, 16, torch.float32)
    batch, group_size = engine.batch(), 3
    num_new = [request.num_new for request in requests]
    slots = torch.cat(
        [
            engine.req_to_token[row, length - count : length]
            for row, length, count in zip(batch.req_pool_indices, batch.seq_lens, num_new, strict=True)
        ]
    ).long()
    decode = max(num_new) == 1
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        batch_size=len(requests),
        input_ids=torch.zeros(sum(num_new), dtype=torch.int64),
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens,
        out_cache_loc=slots,
        seq_lens_sum=int(batch.seq_lens.sum()),
        seq_lens_cpu=batch.seq_lens.cpu(),
    )
    if not decode:
        forward_batch.extend_seq_lens = torch.tensor(num_new, device=DEVICE)
        forward_batch.extend_seq_lens_cpu = num_new
        forward_batch.extend_prefix_lens = batch.seq_lens - torch.tensor(num_new, device=DEVICE)
    pools = SimpleNamespace(req_to_token=engine.req_to_token)
    runner = SimpleNamespace(
        device=DEVICE, dtype=engine.dtype, token_to_kv_pool=engine.pool, req_to_token_pool=pools, model_config=None
    )
    backend = TorchNativeAttnBackend(runner)
    uneven = engine.uneven_contexts(batch)
    plan = SimpleNamespace(serial=0, kv_pool=engine.pool, uneven_contexts=lambda batch: uneven, row_lse=torch.zeros(1))
    asked = []

    def stock(*args: object, **kwargs: object) -> torch.Tensor:
        asked.append(args)
        return backend.forward(*args, **kwargs)

    overlay = HeadOverlay(plan, TritonHeads(engine.space, engine.req_to_token, group_size * 2))
    backend.init_forward_metadata(forward_batch)
    for number in range(NUM_LAYERS):
        layer = RadixAttention(group_size * 2, engine.head_dim, 0.3, 2, layer_id=number)
        q = engine.queries(group_size)[0].contiguous()
        k, v = engine.pool.get_key_buffer(number)[slots], engine.pool.get_value_buffer(number)[slots]
        engine.pool.get_key_buffer(number)[slots] = float("nan")  # whoever computes it must also write it
        output = overlay.over(stock)(q, k, v, layer, forward_batch)
        expected = engine.expected(q.double().cpu(), number, group_size, 0.3)
        torch.testing.assert_close(output.double().cpu(), expected, rtol=0, atol=TOLERANCE[engine.dtype])
    assert plan.row_lse is None, "the backend's are not of what the replaced rows attend to"
    assert len(asked) == (NUM_LAYERS if mixed else 0)


@pytest.mark.usefixtures("few_splits")
def test_graphs_read_what_is_loaded() -> None:
    """As in a replay: tables that another batch left, other contexts then, and two requests of padding."""
    engine = Engine(mixed_requests(2, 63, DECODE), 2, 16, torch.float32)
    batch, group_size, padded = engine.batch(), 3, len(engine.requests) + 2
    contexts = engine.uneven_contexts(batch)
    padding = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    lengths = torch.cat([batch.seq_lens, padding + 1])
    rows = torch.cat([batch.req_pool_indices, padding + batch.req_pool_indices[0]])
    tokens = engine.req_to_token[rows, lengths - 1].long()
    slots = torch.cat([tokens[: len(engine.requests)], padding])
    forward_batch = SimpleNamespace(
        batch_size=padded, req_pool_indices=rows, seq_lens=lengths, seq_lens_cpu=None, out_cache_loc=slots
    )
    plan = SimpleNamespace(uneven_contexts=lambda batch: contexts, kv_pool=engine.pool)
    backend = HeadGraphBackend(TritonHeads(engine.space, engine.req_to_token, group_size * 2), engine.pool)
    graphs = HeadGraphs(plan, backend, None, None)
    graphs.backend.init_cuda_graph_state(padded + 1, padded + 1)
    assert graphs.prepare(
        SimpleNamespace(batch_size=len(engine.requests), seq_lens=batch.seq_lens, seq_lens_cpu=batch.seq_lens.cpu())
    )
    new = [[pool[slots] for pool in pools] for pools in zip(engine.pool.k_buffer, engine.pool.v_buffer, strict=True)]
    queries = []
    for k, v in new:
        k[-2:], v[-2:] = 0, 0
        q = engine.queries(group_size)[0]
        queries.append(torch.cat([q, torch.zeros_like(q[:2])]))

    def step() -> list[torch.Tensor]:
        graphs.backend.init_forward_metadata_in_graph(forward_batch)
        layers = [RadixAttention(group_size * 2, engine.head_dim, 0.3, 2, layer_id=number) for number in range(NUM_LAYERS)]
        return [
            graphs.backend.forward_decode(q, k, v, layer, forward_batch)
            for layer, q, (k, v) in zip(layers, queries, new, strict=True)
        ]

    if DEVICE == "cuda":
        graphs.backend.load([(0, contexts[-1][1])], 1)
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        graphs.prepare(forward_batch)
        for layer in range(NUM_LAYERS):  # whoever computes them must also write them
            engine.pool.get_key_buffer(layer)[slots] = float("nan")
        graph.replay()
    else:
        graphs.prepare(forward_batch)
        for layer in range(NUM_LAYERS):
            engine.pool.get_key_buffer(layer)[slots] = float("nan")
        outputs = step()
    for number, (q, output) in enumerate(zip(queries, outputs, strict=True)):
        expected = engine.expected(q[:-2].double().cpu(), number, group_size, 0.3)
        torch.testing.assert_close(output[:-2].double().cpu(), expected, rtol=0, atol=TOLERANCE[engine.dtype])


def test_batches_beyond_the_tables_run_eagerly() -> None:
    engine = Engine(mixed_requests(2, 63, DECODE), 2, 16, torch.float32)
    batch = engine.batch()
    plan = SimpleNamespace(uneven_contexts=lambda batch: engine.uneven_contexts(engine.batch()))
    graphs = HeadGraphs(plan, HeadGraphBackend(TritonHeads(engine.space, engine.req_to_token, 4), engine.pool), None, None)
    graphs.backend.init_cuda_graph_state(5, 5)
    forward_batch = SimpleNamespace(batch_size=len(engine.requests), seq_lens=batch.seq_lens, seq_lens_cpu=batch.seq_lens.cpu())
    graphs.backend.max_entries = 2 * batch.max_entries
    assert graphs.prepare(forward_batch)
    graphs.backend.max_entries = batch.max_entries - 1
    assert not graphs.prepare(forward_batch)


class PagedWrapper:
    """FlashInfer's contract in torch: calls must bind to its own signatures, and its page table means what it says."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        bound = inspect.signature(BatchPrefillWithPagedKVCacheWrapper.__init__).bind(self, *args, **kwargs)
        assert bound.arguments["kv_layout"] == "NHD"

    def plan(self, *args: object, **kwargs: object) -> None:
        bound = inspect.signature(BatchPrefillWithPagedKVCacheWrapper.plan).bind(self, *args, **kwargs)
        self.planned = SimpleNamespace(**bound.arguments)
        for table in (self.planned.qo_indptr, self.planned.paged_kv_indptr, self.planned.paged_kv_last_page_len):
            assert table.dtype == torch.int32 and table.device.type == "cpu"
        assert self.planned.paged_kv_indices.dtype == torch.int32
        assert self.planned.page_size == self.planned.num_kv_heads == 1 and self.planned.causal

    def run(self, *args: object, **kwargs: object) -> None:
        bound = inspect.signature(BatchPrefillWithPagedKVCacheWrapper.run).bind(self, *args, **kwargs)
        q, out, plan = bound.arguments["q"], bound.arguments["out"], self.planned
        k_pages, v_pages = bound.arguments["paged_kv_cache"]
        scale = bound.arguments["q_scale"] * plan.sm_scale
        assert q.shape == out.shape == (plan.qo_indptr[-1], plan.num_qo_heads, plan.head_dim_qk)
        assert q.is_contiguous() and out.is_contiguous() and (plan.paged_kv_last_page_len == 1).all()
        ranges = zip(pairwise(plan.qo_indptr.tolist()), pairwise(plan.paged_kv_indptr.tolist()), strict=True)
        for (first_query, end_query), (first_page, end_page) in ranges:
            pages = plan.paged_kv_indices[first_page:end_page].long()
            hidden = torch.ones(end_query - first_query, len(pages), dtype=torch.bool)
            hidden = hidden.triu(len(pages) - len(hidden) + 1).to(DEVICE)
            logits = torch.einsum("tgd,nd->gtn", q[first_query:end_query], k_pages[pages, 0]) * scale
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            out[first_query:end_query] = torch.einsum("gtn,nd->tgd", weights, v_pages[pages, 0])


@pytest.mark.parametrize("new", [DECODE, EXTEND], ids=["decode", "extend"])
def test_flashinfer_gets_pages_of_one_row(new: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_heads, "BatchPrefillWithPagedKVCacheWrapper", PagedWrapper)
    engine = Engine(mixed_requests(3, 500, new), 3, 16, torch.float32)
    batch, workspace = engine.batch(), torch.empty(0, device=DEVICE)
    heads = FlashInferHeads(engine.space, engine.req_to_token, 3 * 7, torch.float32, workspace)
    engine.check_attention(7, heads.step(batch, engine.on(batch, "cpu")))


def test_flashinfer_refuses_more_rows_than_int32() -> None:
    rows = torch.empty(8).expand(2**31, 8)
    space = KVSpace(rows, rows, num_layers=2, num_kv_heads=2, layer_stride=2**29)
    with pytest.raises(ValueError, match="int32"):
        FlashInferHeads(space, torch.empty(1, 1, dtype=torch.int32), 2, torch.float32, torch.empty(0))
