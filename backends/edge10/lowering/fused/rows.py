"""A layer of very many tokens, some rows at a time: as many as fit SRAM and fill the cube, each block of
rows through the whole layer.

    layer_s512(h [1, 512, H])   -->   for each block of rows: the layer on h[first : first + count], its positions `first` later

Nothing but the cache goes from row to row, and a block's keys are appended before the next block attends
to them.  Weights are read once for each block: that many tokens are bound by the cube all the same, while
activations that do not fit SRAM would be read again for every tile of a weight.

A layer of a vision tower attends to rows after its own: it takes the rows twice, first up to queries, keys and
values, which lie in DRAM, and when those of all rows are there from the attention on.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Collection, Iterator

from tyir.backends.edge10.lowering.order import makers
from tyir.dialects.dist import AllGather
from tyir.dialects.func import Func, Return
from tyir.dialects.kv import Append
from tyir.dialects.ty import Attention
from tyir.ir import Value
from tyir.targets.machine import Machine
from tyir.types import TensorType, Type

__all__ = ["gathered", "in_two", "row_blocks", "rows_part"]


def row_blocks(tokens: int, machine: Machine, each: int = 2) -> Iterator[tuple[int, int]]:
    """(first, count) of blocks of nearly equal size, at most `each` of the cube's rows for each of its units:
    an even number deals every tile evenly.  The same on all dies.
    """
    unit = machine.cube.rows
    units = -(-tokens // unit)
    blocks = -(-units // (each * machine.cube.count))
    first = 0
    for number in range(blocks):
        count = min((units + blocks - 1 - number) // blocks * unit, tokens - first)
        yield first, count
        first += count


def gathered(value: Value) -> AllGather | None:
    """What joins the dies' rows of keys or values; None where a die needs none of the others'."""
    return value.op if isinstance(value.op, AllGather) and value.op.axis == 1 else None


def in_two(function: Func) -> tuple[Func, Func] | None:
    """A layer with one attention that sees both ways, as what makes its queries, keys and values, which it
    returns, and the rest, which takes these after the layer's own arguments; None for other layers.

    Of rows that are gathered over the dies the first returns its own, the rest takes all.
    """
    found = list(function.walk_type(Attention))
    if len(found) != 1:
        return None
    handed = found[0].operands
    gathers = [g for v in handed if (g := gathered(v)) is not None]
    own = [v if (g := gathered(v)) is None else _given_to(g) for v in handed]
    before = makers(own)
    types, names = [a.type for a in function.args], [a.name for a in function.args]
    first = Func.make(f"{function.sym_name}.qkv", types, names)
    second = Func.make(
        f"{function.sym_name}.rest", [*types, *(v.type for v in handed)], [*names, "q", "k", "v"]
    )
    mapping: dict[Value, Value] = dict(zip(function.args, first.args))
    for op in [o for o in function.body if o in before]:
        first.body.append(op.clone(mapping))
    first.body.append(Return(values=[mapping[v] for v in own]))
    mapping = dict(zip((*function.args, *handed), second.args))
    for op in [o for o in function.body if o not in before and o not in gathers]:
        if any(v not in mapping for v in op.operands):
            return None  # the rest takes something else of what stands before the attention
        second.body.append(op.clone(mapping))
    for part in (first, second):
        part.refresh_type()
    return first, second


def _given_to(gather: AllGather) -> Value:
    assert gather.x is not None, "a die without rows has no tower"
    return gather.x


def rows_part(function: Func, tokens: int, first: int, count: int, whole: Collection[int] = ()) -> Func:
    """A copy of a layer function of `tokens` tokens for `count` of them; arguments in `whole` keep all
    rows.
    """
    part = function.clone()
    part.sym_name = f"{function.sym_name}.{first}"
    caches = {v for op in part.walk_type(Append) for v in (op.cache, op.out)}
    caches |= {part.args[index] for index in whole}
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
