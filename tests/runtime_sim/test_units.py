"""The formulas of `tyir.edge10.command_times`, worked by hand (the numbers of their docstrings)."""

from __future__ import annotations

import pytest

from tyir.edge10.command_times import (
    Transfer,
    all_gather_ns,
    all_reduce_ns,
    dequant_ns,
    drain_ns,
    matmul_ns,
    softmax_ns,
    transfer_of,
    vector_ns,
)
from tyir.targets.machine import load_machine
from tyir.types import f16

MACHINE = load_machine("edge10")


def test_matmul() -> None:
    assert (
        matmul_ns(1, 48, 3584, MACHINE) == 960.0
    )  # 3 blocks on 3 cubes, 448 steps of k, 32 fill; 2 ns a cycle
    assert matmul_ns(16, 48, 3584, MACHINE) == 960.0  # sixteen rows cost the same as one
    assert matmul_ns(17, 48, 3584, MACHINE) == 2 * (32 + 2 * 448)
    assert matmul_ns(96, 240, 640, MACHINE) == 2 * (32 + 30 * 80)  # 6 * 15 blocks on 3 cubes
    assert matmul_ns(1, 0, 64, MACHINE) == 0.0


def test_other_units() -> None:
    assert drain_ns(1, 48, MACHINE) == 4.0
    assert dequant_ns(48, 3584, MACHINE) == 2752.0
    assert vector_ns("rms_norm", 3584, MACHINE) == 176.0
    assert softmax_ns(7, 128, MACHINE) == 128.0


def test_transfers() -> None:
    assert transfer_of([1, 48, 1792], [0, 7168]) == Transfer(86016, 48)
    assert transfer_of([1, 48, 1792], [0, 1792]) == Transfer(86016, 1)
    assert transfer_of([2, 100, 64], [65536, 64]) == Transfer(12800, 2)
    assert transfer_of([2, 100, 64], [65536, 128]) == Transfer(12800, 200)
    assert transfer_of([2, 100, 64], [6400, 64]) == Transfer(12800, 1)
    assert transfer_of([2, 1, 64], [4096, 64]) == Transfer(128, 2)
    assert transfer_of([2, 0, 64], [4096, 64]) == Transfer(0, 0)
    assert Transfer(86016, 48).cost_bytes(MACHINE) == 48 * (1792 + 64)


def test_collectives() -> None:
    assert all_reduce_ns(7168, f16, 4, MACHINE) == pytest.approx(2000 + 1000 + 672 + 84)
    assert all_reduce_ns(7168, f16, 1, MACHINE) == 0.0
    large = all_reduce_ns(1 << 20, f16, 4, MACHINE)  # two phases win: 3/4 of a MiB each way
    assert large == pytest.approx(2000 + 2 * (1000 + 0.75 * (1 << 20) / 32) + 2 * 1536)
    assert all_reduce_ns(7168, f16, 16, MACHINE) > 2 * all_reduce_ns(7168, f16, 4, MACHINE)  # two levels
    assert all_gather_ns(1, [1000] * 4, MACHINE) == pytest.approx(3093.75)
