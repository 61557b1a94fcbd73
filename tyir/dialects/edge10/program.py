"""What a program is made of beside commands: buffers of DRAM, scalars, tokens, loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Final

from tyir.attributes import SymbolRefAttr
from tyir.edge10.command import ADDRESS, TOKEN
from tyir.ir import Region, Value
from tyir.opdef import DeclaredOp, attr, operand, region, result, variadic_operand, variadic_result
from tyir.traits import Pure, Symbol, Terminator
from tyir.types import TensorType, Type, bit_width, i64

__all__ = [
    "AddressOf",
    "Affine",
    "Buffer",
    "For",
    "Join",
    "Offset",
    "Register",
    "Yield",
    "byte_width",
]

BUFFER_KINDS: Final = ("weight", "kv", "activation", "input", "output")


class Buffer(DeclaredOp, name="edge10.buffer", traits=(Symbol,)):
    """`nbytes` of DRAM at `address` holding a tensor.

    `kind` says who writes it: weight and input the host, kv and activation the program.
    """

    _: KW_ONLY
    sym_name: str = attr()
    address: int = attr()
    nbytes: int = attr()
    kind: str = attr(choices=BUFFER_KINDS)
    type: TensorType = attr()

    def verify(self) -> Iterator[str]:
        if not self.type.is_storable:
            yield f"holds {self.type}, whose size is not known"
        elif self.type.nbytes > self.nbytes:
            yield f"{self.type} takes {self.type.nbytes} bytes but the buffer has {self.nbytes}"


class AddressOf(DeclaredOp, name="edge10.address_of", traits=(Pure,)):
    """The DRAM address of a buffer."""

    _: KW_ONLY
    symbol: SymbolRefAttr = attr()
    out: Value = result()

    def infer(self) -> Type:
        return ADDRESS


class Offset(DeclaredOp, name="edge10.offset", traits=(Pure,)):
    """base + index * scale, in bytes."""

    base: Value = operand()
    index: Value = operand()
    _: KW_ONLY
    scale: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        return ADDRESS


class Register(DeclaredOp, name="edge10.register", traits=(Pure,)):
    """A register set by the host before the step; `pos` is the number of tokens already in the cache of a
    sequence, one register for each of a batch; `wanted` is 1, or 0 where no row of the results is wanted.
    """

    _: KW_ONLY
    register: str = attr(choices=("pos", "wanted"))
    sequence: int = attr(default=0)
    out: Value = result()

    def infer(self) -> Type:
        return i64


class Affine(DeclaredOp, name="edge10.affine", traits=(Pure,)):
    """min(max(floor((sum_i coefficients[i] * inputs[i] + constant) / divisor), low), high); without `high`
    there is no upper bound.
    """

    inputs: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    coefficients: tuple[int, ...] = attr()
    constant: int = attr(default=0)
    divisor: int = attr(default=1)
    low: int = attr(default=0)
    high: int | None = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return i64

    def verify(self) -> Iterator[str]:
        if len(self.coefficients) != len(self.operands):
            yield f"{len(self.coefficients)} coefficients for {len(self.operands)} inputs"
        if self.divisor <= 0:
            yield f"divisor must be positive, got {self.divisor}"


class Join(DeclaredOp, name="edge10.join", traits=(Pure,)):
    """A token that is done when all of its operands are; no command, costs nothing."""

    tokens: tuple[Value, ...] = variadic_operand(default=())
    out: Value = result()

    def infer(self) -> Type:
        return TOKEN


class For(DeclaredOp, name="edge10.for"):
    """The body once for each i64 from `bounds[0]` up to, not including, `bounds[1]`; tokens are carried
    from one turn to the next.

    %t = "edge10.for"(%low, %high, %t0) ({^bb0(%i: i64, %carried: !edge10.token): ... "edge10.yield"(%next)}) : (i64, i64, !edge10.token) -> !edge10.token
    """  # noqa: E501

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    body_region: Region = region()
    tokens: tuple[Value, ...] = variadic_result()

    def verify(self) -> Iterator[str]:
        types = [v.type for v in self.operands]
        if not self.body_region.blocks:
            yield "has no body"
        elif types[:2] != [i64, i64] or any(t is not TOKEN for t in types[2:]):
            yield "takes two i64 bounds and then tokens"
        elif [a.type for a in self.body.args] != [i64, *types[2:]] or [r.type for r in self.results] != types[
            2:
        ]:
            yield "body arguments must be an i64 and the carried tokens, the results those tokens"


class Yield(DeclaredOp, name="edge10.yield", traits=(Terminator,)):
    """Ends a loop body with the tokens of the next turn."""

    tokens: tuple[Value, ...] = variadic_operand(default=())


def byte_width(element: Type) -> int:
    """Bytes of an element."""
    return bit_width(element) // 8
