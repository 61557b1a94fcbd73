"""The lowering: what the program looks like, what it refuses, and that every program it makes verifies and
round-trips.
"""

from __future__ import annotations

import pytest

from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.tiling import MatmulShape, attention_blocks, choose_tiles
from tyir.backends.edge10.memory.allocate import DramLayout, Interval, place_intervals, sram_plan
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.parser import parse_module
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.targets.machine import load_machine
from tyir.verifier import verify

MACHINE = load_machine("edge10")
PROGRAM = """"builtin.module"() <{sym_name = "die0"}> ({
  "func.func"() <{function_type = (tensor<1x2x64xf16>, tensor<1xi32>) -> tensor<1x2x96xf32>, arg_attrs = [{}, {tyir.role = "position"}], sym_name = "main_s2"}> ({
  ^bb0(%x: tensor<1x2x64xf16>, %pos: tensor<1xi32>):
    %w = "ty.get_global"() <{symbol = @w}> : () -> tensor<96x64xf16>
    %a = "ty.add"(%x, %x) : (tensor<1x2x64xf16>, tensor<1x2x64xf16>) -> tensor<1x2x64xf16>
    %y = "ty.linear"(%a, %w) <{element = f32}> : (tensor<1x2x64xf16>, tensor<96x64xf16>) -> tensor<1x2x96xf32>
    "func.return"(%y) : (tensor<1x2x96xf32>) -> ()
  }) {tyir.entry = 2 : i64} : () -> ()
}) {tyir.stage = "program"} : () -> ()
"""  # noqa: E501


def lowered(text: str = PROGRAM, seqlen: int = 2) -> Module:
    return lower_die(parse_module(text), seqlen, MACHINE)


def commands(module: Module) -> list[str]:
    return [op.name.removeprefix("edge10.") for op in module.walk() if isinstance(op, edge10.Command)]


def test_a_sum_and_a_product() -> None:
    module = lowered()
    verify(module)
    assert print_op(parse_module(print_op(module))) == print_op(module)
    # x comes to SRAM, the sum stays there, the weight streams through a slot; the result goes out because it
    # is the function's.
    assert commands(module) == ["load", "load", "vector", "load", "matmul", "drain", "store"]
    buffers = {b.sym_name: (b.kind, b.address % 4096) for b in module.walk_type(edge10.Buffer)}
    assert buffers == {"w": ("weight", 0), "x": ("input", 0), "logits": ("output", 0)}


def test_commands_carry_where_they_come_from() -> None:
    sources = {str(op.attributes["tyir.source"]) for op in lowered().walk() if isinstance(op, edge10.Command)}
    assert sources == {'"ty.add"', '"ty.linear"'}


def test_unknown_length_and_unknown_op_are_explained() -> None:
    with pytest.raises(
        TyirError, match=r"no entry point for 4 tokens \(tyir.entry = 4\)\nhelp: sequence lengths here: 2"
    ):
        lowered(seqlen=4)
    text = PROGRAM.replace(
        '"ty.add"(%x, %x) : (tensor<1x2x64xf16>, tensor<1x2x64xf16>)',
        '"ty.slice"(%x) <{axis = 0 : i64, offset = 0 : i64, size = 1 : i64}> : (tensor<1x2x64xf16>)',
    )
    with pytest.raises(TyirError, match=r"'ty\.slice' has no edge10 command"):
        lowered(text)


def test_dram_that_does_not_suffice_is_reported_by_kind() -> None:
    with pytest.raises(TyirError, match=r"needs 0\.0 MB of DRAM but a die has 0\.0 MB \(weight .*input"):
        lower_die(parse_module(PROGRAM), 2, MACHINE.with_overrides({"dram.capacity_bytes": 4096}))


def test_sram_parts_do_not_overlap_and_fit() -> None:
    for capacity in (32 << 10, 1 << 20, 3 << 20):
        plan = sram_plan(MACHINE.with_overrides({"sram.capacity_bytes": capacity}))
        edges = [0, plan.arena, plan.temp + plan.temp_bytes, *(s.high for s in plan.slots)]
        assert edges == sorted(edges) and edges[-1] <= capacity
    with pytest.raises(TyirError, match="too few to stream weights"):
        sram_plan(MACHINE.with_overrides({"sram.capacity_bytes": 4096}))


def test_intervals_that_live_together_do_not_overlap() -> None:
    intervals = [Interval(str(i), 100 + i, start=i, end=i + 3, weight=i % 3) for i in range(20)]
    place_intervals(intervals, 0, 500)
    placed = [i for i in intervals if i.offset is not None]
    assert len(placed) >= 15
    for a in placed:
        for b in placed:
            if a is not b and a.start <= b.end and b.start <= a.end:
                assert a.offset is not None and b.offset is not None
                assert a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset


@pytest.mark.parametrize("m", [1, 8, 96, 512])
@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize(("n", "k"), [(4736, 3584), (3584, 18944), (152064, 3584), (48, 64 * 128)])
def test_tiles_fit(m: int, group: int, n: int, k: int) -> None:
    plan = sram_plan(MACHINE)
    for in_sram in (True, False):
        tiles = choose_tiles(
            MatmulShape(m, n, k, group, in_sram, 0 if in_sram else 4, plan.temp_bytes // 4), MACHINE, plan
        )
        assert tiles.n * tiles.k * 2 <= plan.wide.largest and tiles.k <= MACHINE.cube.max_k
        assert -(-tiles.m // 16) * -(-tiles.block // 16) * 1024 <= MACHINE.accumulator_bytes // 2
        assert (not group or tiles.k % group == 0) and (tiles.block % tiles.n == 0 or tiles.block == n)


def test_what_does_not_fit_is_named() -> None:
    small = MACHINE.with_overrides({"sram.capacity_bytes": 16 << 10})
    with pytest.raises(
        TyirError, match=r"no tile of a \[1, 4096\] x \[4096, 64\] product fits 16384 bytes of SRAM"
    ):
        choose_tiles(MatmulShape(1, 64, 4096, 128, True, 0), small, sram_plan(small))
    with pytest.raises(TyirError, match="one token's attention over 64 heads of 256 does not fit"):
        attention_blocks(1, 64, 8, 256, 8, small, sram_plan(small).temp_bytes)


def test_layers_are_lowered_once() -> None:
    """The program's size does not depend on the number of calls; each call passes its layer's addresses."""
    layer = """  "func.func"() <{function_type = (tensor<1x1x64xf16>, tensor<64xf16>) -> tensor<1x1x64xf16>, sym_name = "layer_s1"}> ({
  ^bb0(%x: tensor<1x1x64xf16>, %w: tensor<64xf16>):
    %y = "ty.rms_norm"(%x, %w) <{eps = 1.0e-6 : f64}> : (tensor<1x1x64xf16>, tensor<64xf16>) -> tensor<1x1x64xf16>
    %z = "ty.add"(%x, %y) : (tensor<1x1x64xf16>, tensor<1x1x64xf16>) -> tensor<1x1x64xf16>
    "func.return"(%z) : (tensor<1x1x64xf16>) -> ()
  }) : () -> ()
"""  # noqa: E501
    calls = "".join(
        f'    %w{i} = "ty.get_global"() <{{symbol = @w{i}}}> : () -> tensor<64xf16>\n    %x{i + 1} ='
        f' "func.call"(%x{i}, %w{i}) <{{callee = @layer_s1}}> : (tensor<1x1x64xf16>, tensor<64xf16>) ->'
        " tensor<1x1x64xf16>\n"
        for i in range(5)
    )
    text = (
        f'"builtin.module"() ({{\n{layer}  "func.func"() <{{function_type = (tensor<1x1x64xf16>) ->'
        f' tensor<1x1x64xf16>, sym_name = "main_s1"}}> ({{\n  ^bb0(%x0: tensor<1x1x64xf16>):\n{calls}   '
        ' "func.return"(%x5) : (tensor<1x1x64xf16>) -> ()\n'
        "  }) {tyir.entry = 1 : i64} : () -> ()\n}) : () -> ()\n"
    )
    module = lowered(text, seqlen=1)
    verify(module)
    function = next(f for f in module.walk_type(Func) if f.sym_name == "layer_s1")
    assert [op.name.removeprefix("edge10.") for op in function.walk() if isinstance(op, edge10.Command)] == [
        "load",
        "vector",
        "vector",
    ]
    addresses = [str(op.symbol) for op in module.walk_type(edge10.AddressOf)]
    outputs = [b.sym_name for b in module.walk_type(edge10.Buffer) if b.kind == "output"]
    assert outputs == ["logits"] and commands(module)[-1] == "store"
    assert [a for a in addresses if a.startswith("@w")] == ["@w0", "@w1", "@w2", "@w3", "@w4"]


def test_dram_layout_aligns() -> None:
    layout = DramLayout(1 << 20)
    assert [layout.take("a", 10), layout.take("b", 10), layout.take("c", 10, 64)] == [0, 4096, 4160]
    layout.check()


def test_the_pass_lowers_every_die() -> None:
    dies = "".join(PROGRAM.replace("die0", f"die{i}") for i in range(2))
    weight = (
        '"ty.global"() <{file = "f", key = "w", nbytes = 12288 : i64, offset = 0 : i64, sym_name = "w", type'
        " = tensor<96x64xf16>}> : () -> ()\n"
    )
    module = parse_module(
        f'"builtin.module"() ({{\n{weight}{dies}}}) {{tyir.stage = "program"}} : () -> ()\n'
    )
    run_pipeline(module, "lower-edge10{seqlen=2}")
    verify(module)
    assert [m.sym_name for m in module.body] == ["die0", "die1"]
    assert commands(module).count("matmul") == 2
    with pytest.raises(TyirError, match="holds no dies"):
        run_pipeline(Module.empty(), "lower-edge10")
