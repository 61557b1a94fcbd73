"""tyir behind the interface of the benchmark that times IR implementations beside xDSL: `--impl
tests.benchmarks.bench_adapter:tyir`.

The harness hands over text of its own dialect `tyb` (family `llm`) or of nine ops of MLIR's arith, math and
tensor (family `std`).  They are declared here like any dialect's: kinds of properties, a verifier where the
harness' xDSL adapter has one, `Pure`, and one canonicalization pattern.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Any

from tyir.attributes import Attribute
from tyir.dialects.builtin import Module
from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result, variadic_operand
from tyir.parser import parse_module
from tyir.passes.cse import merge_equal
from tyir.passes.dce import eliminate_dead_code
from tyir.printer import print_op
from tyir.registry import load_dialect_module
from tyir.rewrite import Rewriter, pattern, rewrite_greedily
from tyir.traits import Commutative, ConstantLike, Pure
from tyir.types import TensorType
from tyir.verifier import verify

__all__ = ["make"]


def _same(a: Value, b: Value) -> Iterator[str]:
    if a.type is not b.type:
        yield "result type must equal the type of operand 0"


def _shape(value: Value) -> tuple[int | None, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.dims


class Param(DeclaredOp, name="tyb.param", traits=(Pure,)):
    """A weight."""

    _: KW_ONLY
    key: str = attr(key="name")
    value: Attribute | None = attr(default=None)
    index: int | None = attr(default=None)
    r0: Value = result()


class RmsNorm(DeclaredOp, name="tyb.rmsnorm", traits=(Pure,)):
    """A norm."""

    o0: Value = operand()
    o1: Value = operand()
    _: KW_ONLY
    eps: float = attr()
    axis: int = attr()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.o0, self.r0)


class AwqMatmul(DeclaredOp, name="tyb.awq_matmul", traits=(Pure,)):
    """A product with packed weights: x, q, scales, zeros."""

    o0: Value = operand()
    o1: Value = operand()
    o2: Value = operand()
    o3: Value = operand()
    _: KW_ONLY
    bits: int = attr()
    group_size: int = attr()
    acc_type: Attribute = attr()
    transpose_b: Attribute = attr()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        x, q, s, out = _shape(self.o0), _shape(self.o1), _shape(self.o2), _shape(self.r0)
        if x[-1] != q[0]:
            yield "contraction dimension mismatch"
        if (q[1] or 0) * 8 != out[-1]:
            yield "packed width mismatch"
        if (s[0] or 0) * self.group_size != q[0]:
            yield "group_size mismatch"


class RopeTable(DeclaredOp, name="tyb.rope_table", traits=(Pure,)):
    """Angles."""

    o0: Value = operand()
    _: KW_ONLY
    dim: int = attr()
    theta: float = attr()
    part: str = attr()
    r0: Value = result()


class Reshape(DeclaredOp, name="tyb.reshape", traits=(Pure,)):
    """Another shape."""

    o0: Value = operand()
    _: KW_ONLY
    shape: tuple[int, ...] = attr()
    r0: Value = result()


class Transpose(DeclaredOp, name="tyb.transpose", traits=(Pure,)):
    """Axes permuted."""

    o0: Value = operand()
    _: KW_ONLY
    perm: tuple[int, ...] = attr()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        shape = _shape(self.o0)
        if tuple(shape[p] for p in self.perm) != _shape(self.r0):
            yield "result shape is not the permuted operand shape"


class Rope(DeclaredOp, name="tyb.rope", traits=(Pure,)):
    """Rotation."""

    o0: Value = operand()
    o1: Value = operand()
    o2: Value = operand()
    o3: Value = operand()
    _: KW_ONLY
    interleaved: Attribute = attr()
    dims: int = attr()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.o0, self.r0)


class KvUpdate(DeclaredOp, name="tyb.kv_update", traits=(Pure,)):
    """Caches with new rows."""

    o0: Value = operand()
    o1: Value = operand()
    o2: Value = operand()
    o3: Value = operand()
    o4: Value = operand()
    _: KW_ONLY
    layer: int = attr()
    axis: int = attr()
    max_seq: int = attr()
    r0: Value = result()
    r1: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.o0, self.r0)


class Attention(DeclaredOp, name="tyb.attention", traits=(Pure,)):
    """Attention over the caches."""

    o0: Value = operand()
    o1: Value = operand()
    o2: Value = operand()
    o3: Value = operand()
    o4: Value = operand()
    _: KW_ONLY
    scale: float = attr()
    heads: int = attr()
    kv_heads: int = attr()
    causal: Attribute = attr()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.o0, self.r0)


class Add(DeclaredOp, name="tyb.add", traits=(Pure,)):
    """Sum."""

    o0: Value = operand()
    o1: Value = operand()
    _: KW_ONLY
    fuse: Attribute = attr()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.o0, self.r0)


class Mul(DeclaredOp, name="tyb.mul", traits=(Pure,)):
    """Product."""

    o0: Value = operand()
    o1: Value = operand()
    _: KW_ONLY
    fuse: Attribute = attr()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.o0, self.r0)


class Silu(DeclaredOp, name="tyb.silu", traits=(Pure,)):
    """x * sigmoid(x)."""

    o0: Value = operand()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.o0, self.r0)


class _Elementwise(DeclaredOp, name="arith.elementwise"):
    """What elementwise ops share: all operands and the result have one type."""

    def verify(self) -> Iterator[str]:
        for value in self.operands:
            yield from _same(value, self.results[0])


class Constant(DeclaredOp, name="arith.constant", traits=(Pure, ConstantLike)):
    """A constant."""

    value: Attribute = attr()
    r0: Value = result()


class AddF(_Elementwise, name="arith.addf", traits=(Pure, Commutative)):
    """Sum."""

    o0: Value = operand()
    o1: Value = operand()
    _: KW_ONLY
    fastmath: Attribute = attr()
    r0: Value = result()


class MulF(_Elementwise, name="arith.mulf", traits=(Pure, Commutative)):
    """Product."""

    o0: Value = operand()
    o1: Value = operand()
    _: KW_ONLY
    fastmath: Attribute = attr()
    r0: Value = result()


class MaximumF(_Elementwise, name="arith.maximumf", traits=(Pure, Commutative)):
    """The larger one."""

    o0: Value = operand()
    o1: Value = operand()
    _: KW_ONLY
    fastmath: Attribute = attr()
    r0: Value = result()


class Select(DeclaredOp, name="arith.select", traits=(Pure,)):
    """The second operand where the first holds, else the third."""

    o0: Value = operand()
    o1: Value = operand()
    o2: Value = operand()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.o1, self.r0)
        yield from _same(self.o2, self.r0)


class Fma(_Elementwise, name="math.fma", traits=(Pure,)):
    """Product plus a third."""

    o0: Value = operand()
    o1: Value = operand()
    o2: Value = operand()
    _: KW_ONLY
    fastmath: Attribute = attr()
    r0: Value = result()


class Exp(_Elementwise, name="math.exp", traits=(Pure,)):
    """Exponential."""

    o0: Value = operand()
    _: KW_ONLY
    fastmath: Attribute = attr()
    r0: Value = result()


class ExtractSlice(DeclaredOp, name="tensor.extract_slice", traits=(Pure,)):
    """A part of a tensor; the dynamic offsets, sizes and strides follow it."""

    source: Value = operand()
    dynamic: tuple[Value, ...] = variadic_operand()
    _: KW_ONLY
    segments: Attribute = attr(key="operandSegmentSizes")
    static_offsets: tuple[int, ...] = attr()
    static_sizes: tuple[int, ...] = attr()
    static_strides: tuple[int, ...] = attr()
    r0: Value = result()


class InsertSlice(DeclaredOp, name="tensor.insert_slice", traits=(Pure,)):
    """A tensor with a part replaced."""

    source: Value = operand()
    dest: Value = operand()
    dynamic: tuple[Value, ...] = variadic_operand()
    _: KW_ONLY
    segments: Attribute = attr(key="operandSegmentSizes")
    static_offsets: tuple[int, ...] = attr()
    static_sizes: tuple[int, ...] = attr()
    static_strides: tuple[int, ...] = attr()
    r0: Value = result()

    def verify(self) -> Iterator[str]:
        yield from _same(self.dest, self.r0)


@pattern(Transpose)
def fold_pair(op: Transpose, rewriter: Rewriter) -> bool:
    """Two transposes that undo each other."""
    inner = op.o0.op
    if not isinstance(inner, Transpose) or any(inner.perm[q] != i for i, q in enumerate(op.perm)):
        return False
    rewriter.replace(op, [inner.o0])
    return True


class _Adapter:
    """What the harness calls."""

    def version(self) -> str:
        from importlib.metadata import version

        return "tyir " + version("tyir")

    def parse(self, text: str) -> Module:
        return parse_module(text)

    def print(self, module: Module) -> str:
        return print_op(module)

    def print_pretty(self, module: Module) -> str:
        return print_op(module, pretty=True)

    def verify(self, module: Module) -> None:
        verify(module)

    def clone(self, module: Module) -> Module:
        return module.clone()

    def walk(self, module: Module) -> int:
        return sum(1 for _ in module.walk())

    def cse(self, module: Module) -> None:
        merge_equal(module)

    def dce(self, module: Module) -> None:
        eliminate_dead_code(module)

    def canonicalize(self, module: Module) -> None:
        rewrite_greedily(module, [fold_pair])

    def greedy_nop(self, module: Module) -> None:
        """The driver over every op with patterns that never match."""
        rewrite_greedily(
            module, [pattern(cls)(_never) for cls in {type(op) for op in module.walk()}], dead_code=False
        )


def _never(op: Any, rewriter: Rewriter) -> bool:
    return False


def make(flavour: str) -> Any:
    """The adapter; `flavour` is `tyir`."""
    load_dialect_module(sys.modules[__name__])
    return _Adapter()
