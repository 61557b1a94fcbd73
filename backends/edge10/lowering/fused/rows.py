"""A layer of very many tokens, some rows at a time: as many as fit SRAM and fill the cube, each block of
rows through the whole layer.

    layer_s512(h [1, 512, H])   -->   for each block of rows: the layer on h[first : first + count], its positions `first` later

Nothing but the cache goes from row to row, and a block's keys are appended before the next block attends
to them.  Weights are read once for each block: that many tokens are bound by the cube all the same, while
activations that do not fit SRAM would be read again for every tile of a weight.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator

from tyir.dialects.func import Func
from tyir.dialects.kv import Append
from tyir.targets.machine import Machine
from tyir.types import TensorType, Type

__all__ = ["row_blocks", "rows_part"]


def row_blocks(tokens: int, machine: Machine) -> Iterator[tuple[int, int]]:
    """(first, count) of blocks of nearly equal size, at most two of the cube's rows for each of its units:
    what deals every tile evenly.  The same on all dies.
    """
    unit = machine.cube.rows
    units = -(-tokens // unit)
    blocks = -(-units // (2 * machine.cube.count))
    first = 0
    for number in range(blocks):
        count = min((units + blocks - 1 - number) // blocks * unit, tokens - first)
        yield first, count
        first += count


def rows_part(function: Func, tokens: int, first: int, count: int) -> Func:
    """A copy of a layer function of `tokens` tokens for `count` of them."""
    part = function.clone()
    part.sym_name = f"{function.sym_name}.{first}"
    caches = {v for op in part.walk_type(Append) for v in (op.cache, op.out)}
    for value in (*part.args, *(r for op in part.body for r in op.results)):
        if value not in caches:
            value.type = _part_type(value.type, tokens, count)
    part.refresh_type()
    return part


def _part_type(type: Type, tokens: int, count: int) -> Type:
    """[1, tokens, ..] becomes [1, count, ..]; everything else stays."""
    if not isinstance(type, TensorType) or type.rank < 3 or type.dims[:2] != (1, tokens):
        return type
    return TensorType((1, count, *type.dims[2:]), type.element)
