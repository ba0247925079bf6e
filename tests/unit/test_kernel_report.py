"""The scoring kernels compile for GPUs without spills, and the report of it says what it should."""

from __future__ import annotations

import pytest

from obcache_sglang.gpu import kernel_report
from obcache_sglang.gpu.kernel_report import (
    A100,
    B200,
    H100,
    LLAMA,
    Chip,
    Configuration,
    Cost,
    Resources,
    compile_offline,
    lse_cost,
    prefill_cost,
    scoring_cost,
    shipped_configurations,
)

CHIPS = [pytest.param(chip, id=f"sm_{chip.capability}") for chip in (A100, H100, B200)]


def check(configuration: Configuration, chip: Chip) -> None:
    resources = compile_offline(configuration, chip)
    assert 32 <= resources.registers <= 255
    assert resources.spilled == 0
    # K, and a block of queries, at least; a program that needs more than the chip has is not launched.
    assert 2**12 < resources.shared <= chip.shared_limit


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("score", ["obcache-kv", "lse"])
def test_a_large_group_fits(score: str, chip: Chip) -> None:
    check(Configuration(score, head_dim=128, group=7, rows=64), chip)


@pytest.mark.parametrize("score", ["obcache-kv", "lse"])
def test_wide_float32_heads_fit_the_smallest_chip(score: str) -> None:
    check(Configuration(score, head_dim=256, group=8, rows=64, dtype="fp32"), A100)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gates_take_few_registers(head_dim: int, chip: Chip) -> None:
    resources = compile_offline(Configuration("gate", head_dim, group=1, rows=0), chip)
    assert resources.registers <= 255 and resources.spilled == 0
    assert resources.shared < 2**14


@pytest.mark.long
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("configuration", [each for each in shipped_configurations() if each.score != "gate"], ids=str)
def test_all_shipped_configurations_fit(configuration: Configuration, chip: Chip) -> None:
    check(configuration, chip)


def test_roofline_by_hand() -> None:
    """Llama-3.1-8B: a token's K and V are 128 KiB. A chip takes the longer of memory and arithmetic."""
    window = scoring_cost(LLAMA, 4096, 64, "obcache-k")
    assert scoring_cost(LLAMA, 4096, 64, "obcache-kv") == window
    assert window.bytes == 4096 * 131072 + 32 * (2 * 64 * 4096 * 2 + 2 * 64 * 32 * 4 + 4096 * 8 * 4)
    assert window.flops == 2 * 2 * 64 * 4096 * 4096 * 32
    assert lse_cost(LLAMA, 4096, 64).bytes == 4096 * 65536 + 32 * (64 * 4096 * 2 + 4 * 2 * 64 * 32 * 4)
    assert prefill_cost(LLAMA, 1024).flops == pytest.approx(2 * 6.98e9 * 1024 + 32 * 2 * 1024**2 * 4096)
    assert Cost(2.039e12, 312e11).seconds(A100) == 1.0
    assert Cost(3.35e11, 989e12).seconds(H100) == 1.0


def test_a_floor_counts_the_products_and_bytes_that_its_score_needs() -> None:
    """obcache-v needs q k^T and the norms of V; obcache-k a second product and o; attention neither V nor o."""
    product = 2 * 64 * 4096 * 4096 * 32  # 64 rows of 32 heads of 128, 4096 tokens, 32 layers
    of_k, q, lse, scores = 4096 * 65536, 32 * 64 * 4096 * 2, 32 * 64 * 32 * 4, 32 * 4096 * 8 * 4
    assert scoring_cost(LLAMA, 4096, 64, "attention") == Cost(of_k + q + lse + scores, product)
    assert scoring_cost(LLAMA, 4096, 64, "obcache-v") == Cost(2 * of_k + q + lse + scores, product)
    assert scoring_cost(LLAMA, 4096, 64, "obcache-k") == Cost(2 * of_k + 2 * (q + lse) + scores, 2 * product)
    # Where arithmetic decides, as with a replay's 2048 rows, the value score's floor is half of the key score's.
    value, key = (scoring_cost(LLAMA, 32768, 2048, score).seconds(H100) for score in ("obcache-v", "obcache-k"))
    assert value == pytest.approx(key / 2)


def test_the_command_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernel_report, "compile_offline", lambda configuration, chip: Resources(255, 0, A100.shared_limit))
    assert kernel_report.main(["--only", "resources"]) == 0
    monkeypatch.setattr(kernel_report, "compile_offline", lambda configuration, chip: Resources(255, 0, A100.shared_limit + 1))
    assert kernel_report.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("!") for line in lines) == len(list(shipped_configurations()))
    rows = [line for line in lines if line.startswith(("Llama-3.1-8B", "Qwen2.5-7B"))]
    # Two models, three lengths, two numbers of rows, three scores, two chips.
    assert len(rows) == 72
    assert sum(" obcache-v " in line for line in rows) == sum(" obcache-k " in line for line in rows) == 24
    monkeypatch.setattr(kernel_report, "compile_offline", lambda configuration, chip: Resources(255, 8, 1024))
    assert kernel_report.main(["--only", "resources"]) == 1
