"""What every command of the chip says of itself, over all of them."""

from __future__ import annotations

import math
from types import FunctionType, MethodType
from typing import Any

import pytest

from tyir.attributes import ArrayAttr
from tyir.dialects import edge10
from tyir.edge10.command_times import Transfer, Work
from tyir.ir import Value
from tyir.opdef import operand, result, variadic_operand
from tyir.registry import dialect_ops
from tyir.runtime_sim.execution.functional import FunctionalDie, method_of
from tyir.types import f16

COMMANDS = {c.name: c for c in dialect_ops("edge10").values() if issubclass(c, edge10.Command)}
STRIDES = {"dram_strides": (1024, 64), "sram_strides": (1024, 64)}
EXAMPLES: dict[str, edge10.Command] = {
    c.name: c
    for c in (
        edge10.Load((), sram=100, shape=(2, 3, 32), queue="ebdma", **STRIDES),
        edge10.Store((), sram=100, shape=(2, 3, 32), **STRIDES),
        edge10.Gather((), index="ids", sram=100, rows=4, row_bytes=32, table_rows=50),
        edge10.Dequant(
            (),
            q=0,
            q_stride=8,
            scales=0,
            scale_stride=2,
            zeros=0,
            zero_stride=1,
            group_size=16,
            out=100,
            n=4,
            k=16,
        ),
        edge10.DequantRows((), q=0, scales=0, out=100, planes=2, plane_rows=8, rows=5, k=16),
        edge10.Matmul(
            (), lhs=0, lhs_strides=(32, 0), rhs=0, rhs_stride=32, acc=0, acc_stride=64, m=(3, 2), n=16, k=16
        ),
        edge10.Drain((), acc=0, acc_stride=64, m=(3, 2), n=16, sram=100, sram_strides=(80, 40), element=f16),
        edge10.VectorOp(
            (), function="add", inputs=(0, 0), outputs=(100,), input_types=ArrayAttr([f16, f16]),
            output_types=ArrayAttr([f16]), rows=4, cols=8,
        ),
        edge10.SoftmaxBlock(
            (), scores=0, score_stride=64, probabilities=100, probability_stride=32, maximum=900, total=1000,
            alpha=1100, rows=4, cols=16, first_key=0, heads=2, scale=1.0,
        ),
        edge10.ScoreBlock(
            (), scores=0, score_stride=64, out=900, total=1000, rows=4, cols=16, first_key=0, heads=2,
            every=3, scale=1.0,
        ),
        edge10.BlockWeights(
            (), x=0, totals=500, total_stride=8, out=900, rows=6, samples=4, heads=2, seen=5, low=0, high=4,
            measures=1,
        ),
        edge10.TopK(
            (), values=0, stride=64, element=f16, rows=2, cols=16, best=(100, 300, 400),
            best_strides=(40, 40, 40), k=8,
        ),
        edge10.AllReduce((), source=0, destination=100, nbytes=64, element=f16),
        edge10.AllGather(
            (), source=0, destination=100, rows=3, sizes=(8, 16), displacements=(0, 8), stride=50, die=0
        ),
        edge10.Send((), source=0, nbytes=64, targets=(1,)),
        edge10.Recv((), destination=100, nbytes=64, peer=0),
    )
}  # fmt: skip
# The first byte after what each writes of SRAM, by hand.
ENDS = {
    "load": 100 + 1024 + 2 * 64 + 32, "store": 0, "gather": 100 + 4 * 32, "dequant": 100 + 4 * 16 * 2,
    "dequant_rows": 100 + 2 * 8 * 16 * 2, "matmul": 0, "drain": 100 + 2 * 80 + 40 + 32,
    "vector": 100 + 4 * 8 * 2, "softmax_block": 1100 + 4 * 4,
    "score_block": 1000 + 4 * 4, "block_weights": 900 + 6 * 4, "top_k": 400 + 40 + 4, "all_reduce": 164,
    "all_gather": 100 + 2 * 50 + 24, "send": 0, "recv": 164,
}  # fmt: skip


def test_every_command_has_an_example() -> None:
    assert set(EXAMPLES) == set(COMMANDS) == {f"edge10.{n}" for n in ENDS}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_says_where_it_runs_and_writes(name: str) -> None:
    op = EXAMPLES[name]
    given = {"queue": "ebdma"} if op.unit_property else {}
    assert op.unit == type(op).unit_with(given) and op.unit in edge10.UNITS
    assert max((end for _, end in op.sram_writes()), default=0) == ENDS[name.removeprefix("edge10.")]
    assert not [p for p in op.check_declaration() if "property" in str(p)]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_its_time_depends_on_what_it_names(name: str) -> None:
    """Prices are kept by these properties: one that `cost` reads besides would be ignored."""
    op = EXAMPLES[name]
    seen: set[str] = set()

    class Watched:
        def __getattr__(self, key: str) -> Any:
            found = getattr(type(op), key)
            if isinstance(found, FunctionType):
                return MethodType(found, self)
            if key in op.property_names:
                seen.add(key)
            return getattr(op, key)

    cost = type(op).cost(Watched(), ())  # type: ignore[arg-type]
    assert cost == op.cost(()) and isinstance(cost, (Transfer, Work))
    assert seen <= {*op.dynamic, *op.priced_by}


@pytest.mark.parametrize("name", sorted(n for n, c in COMMANDS.items() if c.dynamic))
def test_a_size_may_come_from_a_register(name: str) -> None:
    """With all sizes from registers the cost is that of the same sizes given."""
    op = EXAMPLES[name]
    sizes = op.sizes_given()
    assert edge10.DYNAMIC not in sizes and op.sizes_with(()) == sizes
    given = op.clone()
    assert isinstance(given, edge10.Command)
    for key in op.dynamic:
        value = getattr(op, key)
        setattr(given, key, (-1,) * len(value) if isinstance(value, tuple) else -1)
    assert given.sizes_given() == (-1,) * len(sizes)
    assert given.sizes_with(sizes) == sizes and given.cost(sizes) == op.cost(())
    assert given.macs(sizes) == op.macs(())
    assert any(f"{len(sizes)} scalars" in str(p) for p in given.verify())


def test_only_products_multiply() -> None:
    asked = {n for n, op in EXAMPLES.items() if op.macs(())}
    assert asked == {"edge10.matmul"} and EXAMPLES["edge10.matmul"].macs(()) == math.prod((3, 2, 16, 16))


@pytest.mark.parametrize("name", sorted(n for n, c in COMMANDS.items() if not issubclass(c, edge10.Exchange)))
def test_the_functional_engine_executes_it(name: str) -> None:
    assert callable(getattr(FunctionalDie, method_of(EXAMPLES[name]), None))


def test_a_command_that_says_too_little_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x\.a: a command says its unit, one of ewdma, .*, or unit_from"):

        class _NoUnit(edge10.Command, name="x.a"):
            args: tuple[Value, ...] = variadic_operand(default=())
            done: Value = result()

    with pytest.raises(TypeError, match=r"x\.b: a command defines cost, sram_writes"):

        class _NoCost(edge10.Command, name="x.b", unit="cube"):
            args: tuple[Value, ...] = variadic_operand(default=())
            done: Value = result()

    with pytest.raises(TypeError, match=r"x\.c has no property n"):

        class _NoSize(edge10.Command, name="x.c", unit="cube", dynamic=("n",)):
            arg: Value = operand()
            done: Value = result()

    with pytest.raises(TypeError, match=r"x\.d: a command defines .*given_bytes.*taken_bytes"):

        class _NoBytes(edge10.Exchange, name="x.d"):
            done: Value = result()


def test_a_collective_moves_its_own_side_of_dram() -> None:
    """3 rows of 16 bytes in one run, and 3 of 24 in a run for each die and row."""
    gather = edge10.AllGather(
        (), source=0, source_memory="dram", destination=0, destination_memory="dram", rows=3, sizes=(8, 16),
        die=1,
    )  # fmt: skip
    assert gather.cost(()) == Transfer(3 * 16 + 3 * 24, 1 + 3 * 2)
    assert EXAMPLES["edge10.all_reduce"].cost(()) == Transfer(0, 0)
