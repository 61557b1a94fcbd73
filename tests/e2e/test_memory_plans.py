"""The memory checker replays the plans of all real shapes, weights, cache types and die counts, and finds
nothing wrong.  Long: --slow.
"""

from __future__ import annotations

import pytest

from tests.e2e.memory_plans import checked_plans, table_head, table_line
from tests.e2e.real_shapes import MODELS
from tyir.targets.machine import load_machine


def check(name: str, int4: bool, kv: str, dies: range | tuple[int, ...]) -> None:
    machine = load_machine("edge10")
    print("\n" + table_head())
    for row in checked_plans(name, int4, kv, dies):
        print(table_line(row), flush=True)
        assert (
            row.memory["sram"] <= machine.sram.capacity_bytes
            and row.memory["dram"] <= machine.dram.capacity_bytes
        )


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["fp16", "int8"])
@pytest.mark.parametrize("int4", [False, True], ids=["w16", "w4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_die_count(name: str, int4: bool, kv: str) -> None:
    check(name, int4, kv, range(1, 17))


def test_a_few() -> None:
    check("Qwen2.5-1.5B", True, "int8", (3, 16))
