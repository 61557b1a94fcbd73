"""Random functions of several blocks, some of which control never reaches, with in-place updates of caches:

* what the verifier accepts computes the same whether updates copy or overwrite (the in-place rule is sound);
* cse, dce, canonicalize and sequences of them keep IR that verifies verifying, and what it computes.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.checking.dominance import DominanceTree, unreachable_blocks
from tyir.diagnostics import TyirError
from tyir.dialects import kv, ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.ir import Block, Op, Region, Value, unregistered_op
from tyir.opdef import DeclaredOp
from tyir.parser import parse_module
from tyir.passes.cse import merge_equal
from tyir.pipeline import PassContext, run_pipeline
from tyir.printer import print_op
from tyir.rewrite import rewrite_greedily
from tyir.traits import InPlace
from tyir.types import FunctionType, TensorType, Type, f16, i32
from tyir.verifier import verify

CACHE, ROWS, POS = TensorType((1, 1, 4, 2), f16), TensorType((1, 1, 1, 2), f16), TensorType((1,), i32)
FLAT = TensorType((4, 2), f16)
KINDS: list[Type] = [CACHE, ROWS, POS]
Array = npt.NDArray[Any]


class _Random:
    """One function.  Operands are values of dominating blocks; in unreachable blocks, any values."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.defined: dict[Block, list[Value]] = {}

    def module(self) -> Module:
        rng = self.rng
        blocks = [Block(KINDS, ["cache", "rows", "pos"]), *(Block() for _ in range(rng.randint(0, 4)))]
        function = Func(
            sym_name="f", function_type=FunctionType(tuple(KINDS), ()), body_region=Region(blocks)
        )
        module = Module.empty()
        module.body.append(function)
        for block in blocks:
            others = [b for b in blocks[1:] if rng.random() < 0.4]
            end = unregistered_op("t.jump").create(successors=others) if others else Return()
            block.append(end)
        tree, lost = DominanceTree(function.regions[0]), unreachable_blocks(function.regions[0])
        self.defined = {block: list(block.args) for block in blocks}
        order = [*tree.preorder(), *lost]
        for _ in range(2):  # twice, so that unreachable blocks use each other's values
            for block in order:
                above = [b for b in blocks if b is not block and tree.dominates(b, block)]
                outside = [v for b in above for v in self.defined[b]]
                for _ in range(rng.randint(0, 4)):
                    self.op(block, [*outside, *self.defined[block]], self.defined[block])
        return module

    def op(self, block: Block, visible: list[Value], own: list[Value], depth: int = 0) -> None:
        rng, before = self.rng, block.last_op if depth == 0 else None

        def some(kind: Type) -> Value:
            return rng.choice([v for v in visible if v.type is kind])

        kind: Type = rng.choice([CACHE, CACHE, ROWS])
        flat = [v for v in visible if v.type is FLAT]
        made: list[Op] = []
        choice = rng.randint(0, 13)
        if choice <= 1 and depth == 0:
            inner = Block()
            values: list[Value] = []
            for _ in range(rng.randint(1, 3)):
                self.op(inner, [*visible, *values], values, depth + 1)
            made = [unregistered_op("t.inside").create(regions=[Region([inner])])]
        elif choice <= 3:
            made = [kv.Append(some(CACHE), some(ROWS), some(POS))]
        elif choice <= 5:
            made = [unregistered_op("t.observe").create([some(rng.choice(KINDS))])]
        elif choice == 6:
            made = [ty.Add(some(kind), some(kind))]
        elif choice == 7:
            made = [ty.Silu(some(kind))]
        elif choice == 8:
            made = [ty.Reshape(some(CACHE), shape=(4, 2))]
        elif choice == 9 and flat:
            made = [ty.Reshape(rng.choice(flat), shape=rng.choice([(1, 1, 4, 2), (4, 2)]))]
        elif choice == 10:
            offset, size = rng.choice([(0, 4), (0, 1), (1, 1)])
            made = [ty.Slice(some(CACHE), axis=2, offset=offset, size=size)]
        elif choice == 11:
            made = [ty.Transpose(some(kind), perm=(0, 1, 2, 3))]
        else:
            made = [ty.Cast(some(kind), element=f16)]
        for op in made:
            block.insert(op, before)
            own += op.results
            visible += op.results


def _run(module: Module, seed: int, overwrite: bool) -> list[Any]:
    """What the function lets see: the block it is in, and every observed array.  Jumps are drawn from
    `seed`.
    """
    (function,) = (op for op in module.body if isinstance(op, Func))
    rng, seen = random.Random(seed), list[Any]()
    numbers = np.random.default_rng(seed)
    env: dict[Value, Array] = {}
    for arg in function.args:
        assert isinstance(arg.type, TensorType)
        floats = numbers.standard_normal(arg.type.static_shape)
        env[arg] = floats.astype(np.float16) if arg.type is not POS else np.ones(1, np.int32)

    def run_ops(block: Block) -> None:
        for op in block:
            if op.regions:
                run_ops(op.regions[0].blocks[0])
            elif isinstance(op, DeclaredOp) and op.results:
                operands = [env[v] for v in op.operands]
                if not (overwrite and op.has_trait(InPlace)):
                    operands = [x.copy() for x in operands]
                env[op.result] = op.evaluate(*operands)
            elif op.name == "t.observe":
                seen.append(env[op.operands[0]].copy().tobytes())

    block: Block | None = function.body
    for _ in range(12):
        if block is None:
            break
        run_ops(block)
        successors = block.terminator.successors
        block = rng.choice(successors) if successors else None
        seen.append(function.regions[0].blocks.index(block) if block is not None else "end")
    return seen


@cache
def _accepted(count: int = 250) -> list[tuple[int, Module]]:
    """So many random modules that verify, and the seeds they come from."""
    found: list[tuple[int, Module]] = []
    seed = 0
    while len(found) < count:
        module = _Random(seed).module()
        try:
            verify(module)
        except TyirError as error:
            assert all("in place" in d.message for d in error.diagnostics), str(error)
        else:
            found.append((seed, module))
        seed += 1
    return found


def test_the_modules_have_what_is_to_be_tested() -> None:
    seen: Counter[str] = Counter()
    for _, module in _accepted():
        region = next(op for op in module.body if isinstance(op, Func)).regions[0]
        seen["several blocks"] += len(region.blocks) > 1
        seen["unreachable"] += bool(unreachable_blocks(region))
        seen["in place"] += any(op.has_trait(InPlace) for op in module.walk())
        seen["in place in a loop or branch"] += any(
            op.has_trait(InPlace) for block in region.blocks[1:] for op in block
        )
        seen["merges"] += merge_equal(module.clone()) > 0
    assert min(seen.values()) > 30, seen


@pytest.mark.parametrize("part", range(10))
def test_overwriting_is_not_seen(part: int) -> None:
    for seed, module in _accepted()[part::10]:
        for jumps in range(3):
            assert _run(module, jumps, overwrite=True) == _run(module, jumps, overwrite=False), (
                f"seed {seed}\n{print_op(module)}"
            )


def _without_blocks(seen: list[Any]) -> list[Any]:
    return [x for x in seen if isinstance(x, bytes)]


@pytest.mark.parametrize("pipeline", ["cse", "dce", "canonicalize", "cse,canonicalize,cse,dce"])
@pytest.mark.parametrize("part", range(10))
def test_passes_keep_it_valid_and_its_meaning(part: int, pipeline: str) -> None:
    for seed, module in _accepted()[part::10]:
        changed = module.clone()
        try:
            run_pipeline(changed, pipeline, PassContext())
            verify(changed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}\n{print_op(module)}") from error
        for jumps in range(3):
            before, after = (_run(m, jumps, overwrite=True) for m in (module, changed))
            assert _without_blocks(after) == _without_blocks(before), f"seed {seed}\n{print_op(module)}"


def _parsed(body: str) -> Module:
    head = f"func.func @f(%c: {CACHE}, %rows: {ROWS}, %pos: {POS}) {{"
    return parse_module("\n".join([head, *body.replace("C", str(CACHE)).splitlines(), "}"]))


@pytest.mark.parametrize(
    ("pipeline", "body"),
    [
        (
            "cse",
            f"""
  %a = ty.silu %c : C
  %b = ty.silu %c : C
  %n = kv.append %b, %rows, %pos : (C, {ROWS}, {POS}) -> C
  "t.observe"(%a) : (C) -> ()
  return""",
        ),
        (
            "canonicalize",
            f"""
  %a = ty.reshape %c {{shape = array<i64: 8>}} : (C) -> tensor<8xf16>
  %n = kv.append %c, %rows, %pos : (C, {ROWS}, {POS}) -> C
  %b = ty.reshape %a {{shape = array<i64: 4, 2>}} : (tensor<8xf16>) -> tensor<4x2xf16>
  "t.observe"(%b) : (tensor<4x2xf16>) -> ()
  return""",
        ),
        (
            "canonicalize",
            """
  return
^one:
  %a = ty.reshape %b {shape = array<i64: 1, 1, 4, 2>} : C
  "t.jump"()[^two] : () -> ()
^two:
  %b = ty.reshape %a {shape = array<i64: 1, 1, 4, 2>} : C
  "t.jump"()[^one] : () -> ()""",
        ),
    ],
)
def test_what_must_stay(pipeline: str, body: str) -> None:
    module = _parsed(body)
    text = print_op(module)
    run_pipeline(module, pipeline, PassContext())
    assert print_op(module) == text


def test_the_driver_stays_below_its_root() -> None:
    module = _parsed("""
  %unused = ty.silu %c : C
  %outer = ty.cast %c {element = f16} : C
  "t.inside"() ({
    %inner = ty.cast %outer {element = f16} : C
    "t.observe"(%inner) : (C) -> ()
  }) : () -> ()
  return""")
    (inside,) = (op for op in module.walk() if op.name == "t.inside")
    assert rewrite_greedily(inside, ()) == 1
    names = [op.name for op in module.walk()]
    assert names.count("ty.silu") == 1 and names.count("ty.cast") == 1 and inside.block is not None
