"""What `tyir-sim --probe-host` measures: kernels of a library, of shapes that no known model has.

A point is a kernel's op at a position of a cache, called as often as its copies' weights fill a footprint, so that
they come from where a step's come from.  Constants follow from several points of a kind (`host_probe`).
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tyir.attributes import SymbolRefAttr
from tyir.dialects import kv, ty
from tyir.dialects.func import Func, Return
from tyir.dialects.ty import GetGlobal
from tyir.ir import Op, Value
from tyir.runtime_sim.host.kernels import bytes_of
from tyir.runtime_sim.host.machine import CACHES, FOOTPRINTS
from tyir.types import TensorType, Type, f16, f32, i8, i32, ui4

__all__ = ["Point", "function_of", "points"]

Make = Callable[[Sequence[Value]], Op]
_MOST_COPIES: Final = 12000
_WARM: Final = 8  # copies of a kernel whose weights do not matter


@dataclass(frozen=True)
class Point:
    """One kernel: what it takes among the arguments of a step (`given`), and what lies elsewhere for each
    copy (`stored`); `footprint` bytes of the latter in all, a few copies without.

    `activations`: of the library.  `threaded`: measured on all threads too.
    """

    kind: str
    activations: str
    given: tuple[Type, ...]
    stored: tuple[Type, ...]
    make: Make
    footprint: int = 0
    positions: tuple[int, ...] = (0,)
    threaded: bool = False

    def op(self) -> Op:
        """The op between values of its own."""
        function = Func.make("one", [*self.given, *self.stored])
        return self.make(function.args)

    def copies(self) -> int:
        """How often the kernel is called in a pass."""
        op = self.op()
        size = sum(bytes_of(v) for v in op.operands[len(self.given) :])
        if not self.footprint or not size:
            return _WARM
        return max(2, min(_MOST_COPIES, self.footprint // size))


def function_of(point: Point) -> tuple[Func, tuple[tuple[str, TensorType], ...]]:
    """A step that calls the kernel for each copy, and the weights that it names."""
    function = Func.make("main", point.given)
    weights: list[tuple[str, TensorType]] = []
    for _ in range(point.copies()):
        stored: list[Value] = []
        for kind in point.stored:
            assert isinstance(kind, TensorType)
            name = f"w{len(weights)}"
            weights.append((name, kind))
            found = GetGlobal(symbol=SymbolRefAttr(name), result_types=[kind])
            function.body.append(found)
            stored.append(found.out)
        function.body.append(point.make([*function.args, *stored]))
    function.body.append(Return(values=()))
    return function, tuple(weights)


def points(modes: Sequence[str]) -> Iterator[Point]:
    """Those for libraries of such activations, the first of which stands for all where it does not matter."""
    for mode in modes:
        yield from _products(mode, mode)
    yield from _products("f16", modes[0])
    for cache in CACHES:
        yield from _attention(cache, modes[0])
    yield from _rowwise(modes[0])


# ------------------------------------------------------------------------------------------------- products


def _product(
    kind: str, activations: str, m: int, n: int, k: int, group: int, at: int, threaded: bool
) -> Point:
    x = TensorType((1, m, k), f16)
    if kind.startswith("product_f16"):
        return Point(
            kind,
            activations,
            (x,),
            (TensorType((n, k), f16),),
            lambda v: ty.Linear(v[0], v[1], None),
            at,
            threaded=threaded,
        )
    sizes = (TensorType((n, k), ui4), TensorType((n, k // group), f16), TensorType((n, k // group), ui4))
    return Point(
        kind,
        activations,
        (x,),
        sizes,
        lambda v: ty.QuantizedLinear(v[0], v[1], v[2], v[3], None, group_size=group),
        at,
        threaded=threaded,
    )


def _products(mode: str, activations: str) -> Iterator[Point]:
    few, many, some = f"product_{mode}_token", f"product_{mode}_chunk", FOOTPRINTS["256mb"]

    def point(
        kind: str, m: int, n: int, k: int, group: int = 128, at: int = some, threaded: bool = False
    ) -> Point:
        return _product(kind, activations, m, n, k, group, at, threaded)

    for at in FOOTPRINTS.values():
        yield point(few, 1, 2304, 640, at=at, threaded=at != FOOTPRINTS["16mb"])
    yield point(few, 1, 1152, 3200)
    yield point(few, 1, 1152, 3200, at=FOOTPRINTS["1gb"])
    yield point(few, 1, 96, 640)
    yield point(few, 4, 1152, 640)
    small = 8 << 20
    yield point(many, 128, 1152, 640, at=small, threaded=True)
    yield point(many, 128, 384, 3200, at=small)
    yield point(many, 128, 256, 9600, at=small)
    yield point(many, 128, 96, 640, at=small // 8)
    yield point(many, 32, 1152, 640, at=small)
    if mode == "f16":
        yield point(many, 64, 576, 640, at=small)
    else:
        yield point(many, 128, 576, 640, group=32, at=small // 2)


# ------------------------------------------------------------------------------------------------ attention


def _attention(cache: str, activations: str) -> Iterator[Point]:
    shapes = [(12, 3, 64), (10, 2, 128), (16, 2, 64), (4, 4, 128), (8, 1, 128)]
    for number, (heads, groups, width) in enumerate(shapes):
        yield _attend(cache, activations, 1, heads, groups, width, number == 1)
    for number, (heads, groups, width) in enumerate(((6, 2, 64), (4, 1, 128))):
        yield _attend(cache, activations, 64, heads, groups, width, number == 0)


def _attend(
    cache: str, activations: str, tokens: int, heads: int, groups: int, width: int, threaded: bool
) -> Point:
    held = 4096
    element = f16 if cache == "f16" else i8
    rows, scales = TensorType((1, groups, held, width), element), TensorType((1, groups, held), f16)
    stored = (rows, rows, *((scales, scales) if element is i8 else ()))
    given = (TensorType((1, tokens, heads, width), f16), TensorType((1,), i32))
    kv_heads = tuple(h * groups // heads for h in range(heads))

    def make(v: Sequence[Value]) -> Op:
        q, pos, k, values, *rest = v
        return kv.CachedAttention(q, k, values, pos, tuple(rest), scale=0.125, kv_heads=kv_heads)

    kind = f"attention_{cache}_{'token' if tokens == 1 else 'chunk'}"
    positions = (90, 900, 3600) if tokens == 1 else (0, 900, 3600)
    at = FOOTPRINTS["256mb"] if tokens == 1 else 2 * 4 * groups * held * width
    return Point(kind, activations, given, stored, make, at, positions, threaded)


# --------------------------------------------------------------------------------------------- row by row


def _rowwise(activations: str) -> Iterator[Point]:
    def point(kind: str, given: Sequence[Type], make: Make, threaded: bool = False) -> Point:
        return Point(kind, activations, tuple(given), (), make, threaded=threaded)

    width, heads, head = 1280, 10, 128
    flag = TensorType((1,), i32)
    for m in (1, 96):
        x, wide = TensorType((1, m, width), f16), TensorType((1, m, 7168), f16)
        rows, cos = TensorType((1, m, heads, head), f16), TensorType((1, m, head // 2), f16)
        cache, table = TensorType((1, heads, 256, head), f16), TensorType((2048, width), f16)
        ids = TensorType((1, m), i32)
        more = m > 1
        yield point("norm", (x, TensorType((width,), f16)), lambda v: ty.RmsNorm(v[0], v[1], eps=1e-6), more)
        yield point("rope", (rows, cos, cos), lambda v: ty.Rope(v[0], v[1], v[2]), more)
        yield point("elementwise", (x, x), lambda v: ty.Add(v[0], v[1]), more)
        yield point("activation", (wide, wide), lambda v: ty.SiluMul(v[0], v[1]), more)
        yield point("movement", (cache, rows, flag), lambda v: kv.Append(v[0], v[1], v[2]), more)
        yield point("movement", (table, ids), lambda v: ty.Embedding(v[0], v[1]))
        yield point("quantize_rows", (rows,), lambda v: kv.QuantizeRows(v[0]), more)
        parts = TensorType((1, m, heads, 4 * (head + 2)), f32)
        yield point("merge_attention", (parts,), lambda v: kv.MergeAttention(v[0], count=4), more)
    for size in (2000, 40000):
        scores = TensorType((1, 1, size), f32)
        yield point("top_k", (scores,), lambda v: ty.TopK(v[0], k=20), size > 2000)
