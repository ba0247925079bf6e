"""`python -m obcache_sglang.gpu.kernel_report`: what the scoring kernels need of a GPU, without one.

Two tables. The resources of the shipped configurations, from offline compilation: registers, spilled bytes, shared memory and its
limit. And a roofline: the least time that bandwidth and arithmetic of a chip allow, as a share of the least time of the prefill.
Neither is a measurement.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from obcache_sglang.gpu.gate_kernel import _score_by_gates, gate_config
from obcache_sglang.gpu.score_kernel import _score_tokens, needs_outputs, score_config
from obcache_sglang.gpu.score_lse import SPLIT_TOKENS, _split_lse, lse_config
from obcache_sglang.settings import SCORES

_BF16_BYTES = 2
_MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """shared_limit: bytes of shared memory of a block; bandwidth: bytes/s; flops: dense bfloat16 FLOP/s. From NVIDIA's data sheets."""

    name: str
    capability: int
    shared_limit: int
    bandwidth: float
    flops: float


A100 = Chip("A100 SXM 80 GB", 80, 163 * 1024, 2.039e12, 312e12)
H100 = Chip("H100 SXM", 90, 227 * 1024, 3.35e12, 989e12)
B200 = Chip("B200", 100, 227 * 1024, 8.0e12, 2250e12)


@dataclass(frozen=True)
class Configuration:
    """A kernel as it is shipped, for pages of one token. score: one of config.SCORES, "max", "lse" or "gate"; dtype: as Triton names it."""

    score: str
    head_dim: int
    group: int
    rows: int
    dtype: str = "bf16"

    @property
    def element_size(self) -> int:
        return 4 if self.dtype == "fp32" else 2


def shipped_configurations() -> Iterator[Configuration]:
    """Windows of 64 rows for all group sizes (longer ones use the same kernels), of one row for one: its tiles are smaller.
    float32 for what needs most shared memory."""
    for score in (*SCORES, "max", "lse"):
        for head_dim in (64, 128, 256):
            for group in (1, 4, 7, 8):
                yield Configuration(score, head_dim, group, rows=64)
            yield Configuration(score, head_dim, group=4, rows=1)
    for head_dim in (64, 128, 256):
        yield Configuration("gate", head_dim, group=1, rows=0)
    for score in ("obcache-kv", "lse"):
        yield Configuration(score, head_dim=256, group=8, rows=64, dtype="fp32")


@dataclass(frozen=True)
class Resources:
    """registers: of a thread; spilled: bytes of its stack and local memory; shared: bytes of a block."""

    registers: int
    spilled: int
    shared: int


def compile_offline(configuration: Configuration, chip: Chip) -> Resources:
    """Compiles a kernel for a chip as a launch with aligned pointers and strides would. Needs no GPU; takes seconds."""
    head_dim, group, rows = configuration.head_dim, configuration.group, configuration.rows
    if configuration.score == "gate":
        types = dict.fromkeys(("k", "v"), f"*{configuration.dtype}")
        types |= dict.fromkeys(("scores", "cos_sin", "weights", "bias"), "*fp32") | {"slots": "*i64"}
        return _compiled(_score_by_gates, types, gate_config(head_dim, head_dim // 2, is_neox_style=True), {}, chip)
    constants: dict[str, Any] = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": head_dim, "PAGE_SIZE": 1}
    if configuration.score == "lse":
        kernel, config = _split_lse, lse_config(head_dim, group, rows, configuration.element_size)
        constants["SPLIT"] = SPLIT_TOKENS
    else:
        kernel, config = _score_tokens, score_config(head_dim, group, rows, configuration.element_size)
        score = "attention" if configuration.score == "max" else configuration.score
        constants |= {"SCORE": score, "MAX": configuration.score == "max"}
        if not needs_outputs(score):
            constants |= {"o": None, "o_sq": None}
    options = {name: config.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
    constants |= config

    types = dict.fromkeys(("q", "o", "k_cache", "v_cache"), f"*{configuration.dtype}")
    types |= dict.fromkeys(("scores", "o_sq", "lse", "partial"), "*fp32")
    types |= dict.fromkeys(("score_indptr", "q_indptr", "starts", "kv_indptr", "kv_last_page_len"), "*i32")
    types |= dict.fromkeys(("scale_log2", "v_factor", "lse_factor"), "fp32")
    types |= {"kv_indices": "*i64"}
    return _compiled(kernel, types, constants, options, chip)


def _compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], chip: Chip) -> Resources:
    """types: of arguments that are no int32; constants: compile-time arguments; options: of the compiler."""
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    varying = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, type_) in enumerate(signature.items())
        if type_.startswith("*") or (type_ == "i32" and name not in varying)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(figures["REG"], figures["STACK"] + figures["LOCAL"], compiled.metadata.shared)


@dataclass(frozen=True)
class Model:
    """parameters: those of the layers' matrices, without embeddings."""

    name: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    parameters: float


LLAMA = Model("Llama-3.1-8B", 32, 32, 8, 128, 6.98e9)
QWEN = Model("Qwen2.5-7B", 28, 28, 4, 128, 6.53e9)


@dataclass(frozen=True)
class Cost:
    """bytes and flops of all layers."""

    bytes: float
    flops: float

    def seconds(self, chip: Chip) -> float:
        """The least time: the larger of memory's and arithmetic's, each at the chip's peak."""
        return max(self.bytes / chip.bandwidth, self.flops / chip.flops)


def scoring_cost(model: Model, tokens: int, rows: int, score: str) -> Cost:
    """A score of a context of so many tokens by so many rows that see all of it, what the score needs being given.

    Counted is what the score's formula needs, each thing once. attention: K, q (bfloat16) and the log-sum-exp (float32) are read,
    one product, q k^T. obcache-v: V too, for its norms; still one product. obcache-k and obcache-kv: V, o and its squared norms too; two
    products, q k^T and what brings v and o together. The scores (float32) are written.
    """
    products = 2 if needs_outputs(score) else 1
    queries, lanes = rows * model.num_q_heads, tokens * model.num_kv_heads
    cache = (1 if score == "attention" else 2) * lanes * model.head_dim * _BF16_BYTES
    # q and the log-sum-exp, o and its squared norms.
    given = queries * products * (model.head_dim * _BF16_BYTES + 4)
    flops = products * 2.0 * queries * tokens * model.head_dim
    return Cost(model.num_layers * (cache + given + lanes * 4), model.num_layers * flops)


def lse_cost(model: Model, tokens: int, rows: int) -> Cost:
    """The log-sum-exp of rows where the backend gives none: K and q once more, one product."""
    queries, lanes = rows * model.num_q_heads, tokens * model.num_kv_heads
    partial = 8 * queries * -(-tokens // SPLIT_TOKENS)
    read = (lanes + queries) * model.head_dim * _BF16_BYTES
    return Cost(model.num_layers * (read + partial), model.num_layers * 2.0 * queries * tokens * model.head_dim)


def prefill_cost(model: Model, tokens: int) -> Cost:
    """The matrices, read once, and causal attention."""
    attention = 2.0 * tokens * tokens * model.num_q_heads * model.head_dim * model.num_layers
    return Cost(model.parameters * _BF16_BYTES, 2.0 * model.parameters * tokens + attention)


def resources_table(configurations: list[Configuration], chips: list[Chip]) -> Iterator[str]:
    """Lines, each when it is known. One that ends in "!" spills, or needs more shared memory than the chip has."""
    yield f"{'kernel':<11}{'dim':>4}{'group':>6}{'rows':>5}{'dtype':>6}  {'chip':<6}{'registers':>10}{'spilled B':>10}{'shared B':>10}{'limit B':>9}"
    for each in configurations:
        for chip in chips:
            got = compile_offline(each, chip)
            wrong = "  !" if got.spilled or got.shared > chip.shared_limit else ""
            yield (
                f"{each.score:<11}{each.head_dim:>4}{each.group:>6}{each.rows:>5}{each.dtype:>6}  sm_{chip.capability:<3}"
                f"{got.registers:>10}{got.spilled:>10}{got.shared:>10}{chip.shared_limit:>9}{wrong}"
            )


def roofline_table() -> Iterator[str]:
    """Lines, with the assumptions first."""
    yield "Least times by peak bandwidth and peak dense bfloat16 FLOP/s, efficiency 1, all layers; predictions, not measurements."
    yield "Each byte comes from memory once: q and o, which every block of positions reads again, are assumed to come from L2."
    yield "window: 64 rows, once. replay: 2048 rows that see the whole context, and as many such chunks as it is long."
    yield "Counted are the products that a score needs: one for attention and obcache-v, two for obcache-k and obcache-kv (whose rows are equal)."
    yield "lse: more, where the attention backend gives no log-sum-exp. %: of the prefill's least time."
    for chip in (A100, H100):
        yield f"{chip.name}: {chip.bandwidth / 1e12:.2f} TB/s, {chip.flops / 1e12:.0f} TFLOP/s"
    yield (
        f"{'model':<13}{'tokens':>7} {'rows':>5}  {'score':<11}{'MiB':>8}{'GFLOP':>9}  {'chip':<16}{'score us':>10}{'lse us':>9}"
        f"{'prefill us':>12}{'score %':>9}{'+ lse %':>9}"
    )
    for model in (LLAMA, QWEN):
        for tokens in (4096, 32768, 131072):
            for rows in (64, 2048):
                yield from _roofline_rows(model, tokens, rows)


def _roofline_rows(model: Model, tokens: int, rows: int) -> Iterator[str]:
    times = tokens // rows if rows == 2048 else 1
    for score in ("attention", "obcache-v", "obcache-k"):
        cost, lse = scoring_cost(model, tokens, rows, score), lse_cost(model, tokens, rows)
        for chip in (A100, H100):
            once, more, whole = (x.seconds(chip) for x in (cost, lse, prefill_cost(model, tokens)))
            yield (
                f"{model.name:<13}{tokens:>7} {rows:>5}  {score:<11}{cost.bytes / _MIB:>8.0f}{cost.flops / 1e9:>9.0f}  {chip.name:<16}"
                f"{once * 1e6:>10.0f}{more * 1e6:>9.0f}{whole * 1e6:>12.0f}"
                f"{100 * times * once / whole:>9.2f}{100 * times * (once + more) / whole:>9.2f}"
            )


def main(argv: list[str] | None = None) -> int:
    """Prints the tables. Returns the exit code: 1 when a configuration spills or needs too much shared memory."""
    parser = argparse.ArgumentParser(
        prog="python -m obcache_sglang.gpu.kernel_report", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--only", choices=("resources", "roofline"), help="one of the tables; compiling takes minutes")
    only = parser.parse_args(argv).only
    healthy = True
    if only != "roofline":
        for line in resources_table(list(shipped_configurations()), [A100, H100, B200]):
            healthy = healthy and not line.endswith("!")
            print(line, flush=True)
    if only != "resources":
        print(*roofline_table(), sep="\n")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
