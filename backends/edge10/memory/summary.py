"""What a command program needs of memory: the figures for `buffer_config.json`."""

from __future__ import annotations

from typing import Final

from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.edge10.memory import sram_bytes

__all__ = ["memory_summary"]

_NAMES: Final = {
    "weight": "weights",
    "kv": "kv",
    "activation": "activations",
    "input": "inputs",
    "output": "outputs",
}


def memory_summary(module: Module) -> dict[str, int]:
    """Bytes of one die's program (stage `edge10`), by kind of DRAM buffer and in all.

    `dram` counts from address 0 to the last byte, `sram` up to the last byte written.

    Keys: weights, kv, activations, inputs, outputs, dram, sram.  Buffers do not share addresses, so sums are
    peaks.
    """
    totals = dict.fromkeys(_NAMES.values(), 0)
    end = 0
    for buffer in module.walk_type(edge10.Buffer):
        totals[_NAMES[buffer.kind]] += buffer.nbytes
        end = max(end, buffer.address + buffer.nbytes)
    return {**totals, "dram": end, "sram": sram_bytes(module)}
