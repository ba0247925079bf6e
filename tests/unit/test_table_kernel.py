"""The kernel that writes the tables of per-head budgets compiles: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_table_kernel_compiles(capability: int) -> None:
    """ptxas needs no GPU."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from obcache_sglang.gpu.head_tables import _write_indices

    tables = {"indices": "*i64", "req_pool_indices": "*i64", "offsets": "*i64"}
    constants = {"NUM_KV_HEADS": 3, "BLOCK": 512}
    others = ["indptr", "req_to_token", "num_slots", "num_exact"]
    types = {name: tables.get(name, "*i32" if name in others else "i32") for name in _write_indices.arg_names}
    source = ASTSource(_write_indices, {**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
