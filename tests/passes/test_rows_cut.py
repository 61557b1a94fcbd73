"""Towers cut by rows of patches: the dies compute what the whole tower does, windows stay whole, and the cut
is a matter of cost.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.llm import ArrayWeights, dies_of
from tyir.dialects.builtin import Module
from tyir.dialects.dist import AllGather, AllReduce
from tyir.dialects.ty import Attention, Linear, tensor_type
from tyir.interpreter import Interpreter, run_lockstep
from tyir.parser import parse_module
from tyir.pipeline import run_pipeline
from tyir.text.attribute_parser import parse_type_text
from tyir.types import TensorType

HEADS, DIM = 2, 16
HIDDEN = HEADS * DIM
SEGMENTS = (0, 8, 16, 20, 28, 36, 40)  # windows of a picture whose border windows are smaller


def tower(
    rows: int = SEGMENTS[-1], segments: tuple[int, ...] = SEGMENTS, hidden: int = HIDDEN, inner: int = 0
) -> Module:
    """Patches [rows, 12] through a block with windows and one without; four rows are merged at the end, by
    one product, or by two with `inner` channels between them.
    """
    heads = hidden // DIM
    x, q = f"tensor<1x{rows}x{hidden}xf32>", f"tensor<1x{rows}x{heads}x{DIM}xf32>"
    lines: list[str] = []
    weights: dict[str, str] = {}

    def weight(name: str, shape: str) -> str:
        weights[name] = f"tensor<{shape}xf32>"
        lines.append(f'%{name} = "ty.get_global"() <{{symbol = @{name}}}> : () -> {weights[name]}')
        return f"%{name}"

    def linear(out: str, source: str, given: str, n: int, k: int, made: str) -> None:
        name = weight(f"w_{out}", f"{n}x{k}")
        lines.append(f'%{out} = "ty.linear"({source}, {name}) : ({given}, tensor<{n}x{k}xf32>) -> {made}')

    patches = f"tensor<1x{rows}x12xf32>"
    lines.append(
        f'%p = "ty.reshape"(%patches) <{{shape = array<i64: 1, {rows}, 12>}}>'
        f" : (tensor<{rows}x12xf32>) -> {patches}"
    )
    linear("h0", "%p", patches, hidden, 12, x)
    angles = f"tensor<1x{rows}x{DIM // 2}xf32>"
    cos, sin = (weight(name, f"1x{rows}x{DIM // 2}") for name in ("cos", "sin"))
    for number, bounds in enumerate((segments, (0, rows))):
        norm = weight(f"norm{number}", str(hidden))
        n = f"n{number}"
        lines.append(
            f'%{n} = "ty.rms_norm"(%h{number}, {norm}) <{{eps = 1.0e-6 : f64}}>'
            f" : ({x}, tensor<{hidden}xf32>) -> {x}"
        )
        for letter in "qkv":
            linear(f"{letter}{number}", f"%{n}", x, hidden, hidden, x)
            lines.append(
                f'%{letter}h{number} = "ty.reshape"(%{letter}{number})'
                f" <{{shape = array<i64: 1, {rows}, {heads}, {DIM}>}}> : ({x}) -> {q}"
            )
        for letter in "qk":
            lines.append(
                f'%{letter}r{number} = "ty.rope"(%{letter}h{number}, {cos}, {sin})'
                f" : ({q}, {angles}, {angles}) -> {q}"
            )
        lines.append(
            f'%a{number} = "ty.attention"(%qr{number}, %kr{number}, %vh{number})'
            f" <{{causal = false, scale = 0.25 : f64, segments = array<i64: {', '.join(map(str, bounds))}>}}>"
            f" : ({q}, {q}, {q}) -> {q}"
        )
        lines.append(
            f'%j{number} = "ty.reshape"(%a{number}) <{{shape = array<i64: 1, {rows}, {hidden}>}}>'
            f" : ({q}) -> {x}"
        )
        linear(f"o{number}", f"%j{number}", x, hidden, hidden, x)
        lines.append(f'%h{number + 1} = "ty.add"(%h{number}, %o{number}) : ({x}, {x}) -> {x}')
    tokens = rows // 4
    merged, out = f"tensor<1x{tokens}x{4 * hidden}xf32>", f"tensor<1x{tokens}x8xf32>"
    result = f"tensor<{tokens}x8xf32>"
    lines.append(
        f'%m = "ty.reshape"(%h2) <{{shape = array<i64: 1, {tokens}, {4 * hidden}>}}> : ({x}) -> {merged}'
    )
    if inner:
        between = f"tensor<1x{tokens}x{inner}xf32>"
        linear("m0", "%m", merged, inner, 4 * hidden, between)
        lines.append(f'%m1 = "ty.gelu"(%m0) : ({between}) -> {between}')
        linear("e", "%m1", between, 8, inner, out)
    else:
        linear("e", "%m", merged, 8, 4 * hidden, out)
    lines.append(f'%r = "ty.reshape"(%e) <{{shape = array<i64: {tokens}, 8>}}> : ({out}) -> {result}')
    lines.append(f'"func.return"(%r) : ({result}) -> ()')
    stored = "\n".join(
        f'"ty.global"() <{{file = "m", key = "{n}", nbytes = {_bytes(t)} : i64, offset = 0 : i64,'
        f' sym_name = "{n}", type = {t}}}> : () -> ()'
        for n, t in weights.items()
    )
    body = "\n".join(lines)
    given = f"tensor<{rows}x12xf32>"
    return parse_module(
        f'"builtin.module"() ({{\n{stored}\n"func.func"() <{{sym_name = "tower", function_type ='
        f" ({given}) -> {result}}}> ({{\n^bb0(%patches: {given}):\n{body}\n}}) : () -> ()\n}})"
        ' {tyir.stage = "kv"} : () -> ()'
    )


def _bytes(text: str) -> int:
    type = parse_type_text(text)
    assert isinstance(type, TensorType)
    return type.nbytes


def drawn(module: Module) -> ArrayWeights:
    """Weights of the shapes of a module's globals."""
    rng, found = np.random.default_rng(0), ArrayWeights()
    for op in module.body:
        if op.name == "ty.global":
            shape = op.type.static_shape  # type: ignore[attr-defined]
            array = rng.standard_normal(shape) / np.sqrt(shape[-1])
            found[str(op.sym_name)] = array.astype(np.float32)  # type: ignore[attr-defined]
    return found


def outputs(module: Module, weights: ArrayWeights, patches: np.ndarray) -> list[np.ndarray]:
    """The embeddings on every die."""
    runs = [Interpreter(die, weights).run("tower", [patches]) for die in dies_of(module)]
    return [result[0] for result in run_lockstep(runs)]


@pytest.mark.parametrize("dies", [2, 3, 4])
def test_dies_compute_what_the_whole_tower_does(dies: int) -> None:
    module = tower()
    weights = drawn(module)
    patches = np.random.default_rng(1).standard_normal((SEGMENTS[-1], 12)).astype(np.float32)
    (wanted,) = outputs(module, weights, patches)
    run_pipeline(module, f"partition-dies{{dies={dies} strategy=rows}}")
    for found in outputs(module, weights, patches):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * abs(wanted).max())
    rows = [next(die.walk_type(Attention)).segments for die in dies_of(module)]
    assert sum(bounds[-1] for bounds in rows if bounds) == SEGMENTS[-1]
    assert not list(module.walk_type(AllReduce))
    axes = [gather.axis for gather in dies_of(module)[0].walk_type(AllGather)]
    assert axes == [1, 1, 1]  # keys and values of the second block, and the embeddings


def test_large_weights_of_few_rows_are_cut_by_channels() -> None:
    """What merges rows into tokens: rows are gathered before it, and its second product's sums are added."""
    windows = tuple(range(0, 257, 64))
    wide, narrow = (tower(256, windows, 128, inner) for inner in (4096, 16))
    weights = drawn(wide)
    patches = np.random.default_rng(1).standard_normal((256, 12)).astype(np.float32)
    (wanted,) = outputs(wide, weights, patches)
    for module, sums in ((wide, 1), (narrow, 0)):
        run_pipeline(module, "partition-dies{dies=4 strategy=rows}")
        assert [len(list(die.walk_type(AllReduce))) for die in dies_of(module)] == [sums] * 4
    for found in outputs(wide, weights, patches):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * abs(wanted).max())
    shapes = {tensor_type(op.operands[1]).dims for op in dies_of(wide)[0].walk_type(Linear)}
    assert (1024, 512) in shapes and (8, 1024) in shapes, "a die has a quarter of the weights"


def test_a_tower_of_fewer_windows_than_dies_is_refused() -> None:
    with pytest.raises(Exception, match="cannot be cut by rows over 8 dies"):
        run_pipeline(tower(), "partition-dies{dies=8 strategy=rows}")


def test_the_cut_is_chosen_by_cost() -> None:
    """Many rows pay for weights on every die, few do not; a pin decides otherwise."""
    few, many = tower(hidden=512), tower(4096, tuple(range(0, 4097, 64)), 512)
    chosen = []
    for module in (few, many):
        run_pipeline(module, "annotate-sharding{dies=4}")
        said = [str(op.attributes.get("tyir.choice")) for op in module.walk()]
        chosen.append(next((s for s in said if re.search("rows: .* ms by rows against", s)), None))
    assert chosen[0] is None and chosen[1] is not None
