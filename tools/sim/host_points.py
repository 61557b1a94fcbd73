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

__all__ = ["ABOUT_THREADS", "Point", "function_of", "points"]

Make = Callable[[Sequence[Value]], Op]
ABOUT_THREADS: Final = ("start", "beside", "memory", "first")
_MOST_COPIES: Final = 12000
_IN_CACHE: Final = 1 << 20  # bytes that a core's cache holds
_FAR: Final = 8 << 20  # and that it does not
_WARM: Final = 8  # copies of a kernel whose weights do not matter


@dataclass(frozen=True)
class Point:
    """One kernel: what it takes among the arguments of a step (`given`), and what lies elsewhere for each
    copy (`stored`); `footprint` bytes of the latter in all, a few copies without.

    `activations`: of the library.  `about`: what it is measured for, the constants of its kind or one of
    `ABOUT_THREADS`, for which it runs on all threads beside one.
    """

    kind: str
    activations: str
    given: tuple[Type, ...]
    stored: tuple[Type, ...]
    make: Make
    footprint: int = 0
    positions: tuple[int, ...] = (0,)
    about: str = ""

    def op(self) -> Op:
        """The op between values of its own."""
        function = Func.make("one", [*self.given, *self.stored])
        return self.make(function.args)

    def copies(self) -> int:
        """How often the kernel is called in a pass."""
        function = Func.make("one", [*self.given, *self.stored])
        size = sum(bytes_of(v) for v in function.args[len(self.given) :])
        if not self.footprint or not size:
            return _WARM
        return max(1, min(_MOST_COPIES, self.footprint // size))


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
    kind: str, activations: str, m: int, n: int, k: int, at: int, group: int = 128, about: str = ""
) -> Point:
    x = TensorType((1, m, k), f16)
    if kind.startswith("product_f16"):
        weight = (TensorType((n, k), f16),)
        return Point(kind, activations, (x,), weight, lambda v: ty.Linear(v[0], v[1], None), at, about=about)
    sizes = (TensorType((n, k), ui4), TensorType((n, k // group), f16), TensorType((n, k // group), ui4))
    return Point(
        kind,
        activations,
        (x,),
        sizes,
        lambda v: ty.QuantizedLinear(v[0], v[1], v[2], v[3], None, group_size=group),
        at,
        about=about,
    )


def _products(mode: str, activations: str) -> Iterator[Point]:
    few, many = f"product_{mode}_token", f"product_{mode}_chunk"
    part = 4 if mode == "f16" else 1  # of as many rows, for as many bytes
    for m, n, k in (
        (1, 1152, 640),
        (1, 384, 1920),
        (1, 192, 3200),
        (1, 64, 9600),
        (1, 96, 640),
        (4, 576, 640),
    ):
        yield _product(few, activations, m, n // part, k, _IN_CACHE)
    for n, k in ((2304, 640), (1152, 3200)):
        yield _product(few, activations, 1, n // part, k, FOOTPRINTS["256mb"])
    if mode == "f16":
        for at in FOOTPRINTS.values():
            yield _product(few, activations, 1, 480, 3200, at, about="memory")
        yield _product(few, activations, 1, 24, 640, FOOTPRINTS["256mb"], about="first")
    chunks = ((128, 1152, 640), (128, 1152, 1920), (128, 384, 3200), (128, 256, 9600), (32, 1152, 640))
    for m, n, k in chunks:
        yield _product(many, activations, m, n, k, _FAR)
    yield _product(many, activations, 128, 4608, 640, _FAR, about="beside")
    yield _product(many, activations, 128, 96, 640, _FAR // 8)
    if mode == "f16":
        yield _product(many, activations, 64, 576, 640, _FAR)
    else:
        yield _product(many, activations, 128, 576, 640, _FAR // 2, group=32)


# ------------------------------------------------------------------------------------------------ attention


def _attention(cache: str, activations: str) -> Iterator[Point]:
    for heads, groups, width in ((12, 3, 64), (10, 2, 128), (16, 2, 64), (4, 4, 128), (8, 1, 128)):
        yield _attend(cache, activations, 1, heads, groups, width, (60, 240, 720), _IN_CACHE)
    for heads, groups, width in ((12, 3, 64), (10, 2, 128)):
        yield _attend(cache, activations, 1, heads, groups, width, (3600,), FOOTPRINTS["256mb"])
    for tokens, heads, groups, width in ((64, 6, 2, 64), (64, 4, 1, 128), (128, 10, 2, 64)):
        yield _attend(cache, activations, tokens, heads, groups, width, (0, 300, 900), _IN_CACHE)
    yield _attend(cache, activations, 1, 10, 2, 128, (0,), _IN_CACHE, "start")
    yield _attend(cache, activations, 96, 6, 1, 128, (0, 900), _IN_CACHE, "beside")


def _attend(
    cache: str,
    activations: str,
    tokens: int,
    heads: int,
    groups: int,
    width: int,
    positions: tuple[int, ...],
    at: int,
    about: str = "",
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
    return Point(kind, activations, given, stored, make, at, positions, about)


# --------------------------------------------------------------------------------------------- row by row


def _rowwise(activations: str) -> Iterator[Point]:
    """Of one token what is read was just written; of many something comes from beyond the core's cache."""

    def point(kind: str, given: Sequence[Type], make: Make, far: Sequence[Type] = ()) -> Point:
        return Point(kind, activations, tuple(given), tuple(far), make, _FAR if far else 0)

    width, heads, head = 1280, 10, 128
    flag = TensorType((1,), i32)
    for m in (1, 96):
        x, wide = TensorType((1, m, width), f16), TensorType((1, m, 7168), f16)
        rows, cos = TensorType((1, m, heads, head), f16), TensorType((1, m, head // 2), f16)
        cache, table = TensorType((1, heads, 256, head), f16), TensorType((2048, width), f16)
        ids, scale = TensorType((1, m), i32), TensorType((width,), f16)
        parts = TensorType((1, m, heads, 4 * (head + 2)), f32)
        several: tuple[tuple[str, tuple[Type, ...], Make], ...] = (
            ("norm", (scale, x), lambda v: ty.RmsNorm(v[1], v[0], eps=1e-6)),
            ("rope", (cos, rows), lambda v: ty.Rope(v[1], v[0], v[0])),
            ("elementwise", (x, x), lambda v: ty.Add(v[0], v[1])),
            ("activation", (wide, wide), lambda v: ty.SiluMul(v[0], v[1])),
            ("movement", (flag, rows, cache), lambda v: kv.Append(v[2], v[1], v[0])),
            ("movement", (ids, table), lambda v: ty.Embedding(v[1], v[0])),
            ("quantize_rows", (rows,), lambda v: kv.QuantizeRows(v[0])),
            ("merge_attention", (parts,), lambda v: kv.MergeAttention(v[0], count=4)),
        )
        for kind, types, make in several:
            near = len(types) - (m > 1)
            yield point(kind, types[:near], make, types[near:])
    for size in (2000, 40000):
        yield point("top_k", (TensorType((1, 1, size), f32),), lambda v: ty.TopK(v[0], k=20))
