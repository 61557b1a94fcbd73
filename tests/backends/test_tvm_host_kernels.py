"""Every host kernel against its op's own `evaluate`, on random data, for shapes that fill tiles and shapes
that do not.

The cases are compiled into one library per target: all of them with this machine's vectors, and, of AVX2
vectors and code without any, each a third of them; `--slow` takes all.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.artifacts.sparse_prefill import BlockChoice
from tyir.backends.host.tvm_host import GENERIC_CPU, HostTarget, assign_kernels, build_library, detected_cpu
from tyir.diagnostics import TyirError
from tyir.dialects import func, kv, ty
from tyir.execution.storage import pack
from tyir.interpreter import evaluate_op
from tyir.ir import Op, Value
from tyir.runtime_sim.session.host_runtime import HostLibrary
from tyir.types import (
    IntegerType,
    TensorType,
    Type,
    bf16,
    f16,
    f32,
    i8,
    i32,
    i64,
    storage_dtype,
    ui4,
    ui8,
    ui16,
)

Array = npt.NDArray[Any]
MakeOp = Callable[[Sequence[Value]], Op]


def t(*shape: int, e: Type = f16) -> TensorType:
    return TensorType(shape, e)


@dataclass(frozen=True)
class Case:
    """An op over operands of given types; `data` overrides the random operands by index."""

    name: str
    types: tuple[TensorType, ...]
    make: MakeOp
    data: tuple[tuple[int, Any], ...] = ()

    def operands(self) -> list[Array]:
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        given = dict(self.data)
        return [
            np.asarray(given[i], storage_dtype(x.element)) if i in given else _random(rng, x)
            for i, x in enumerate(self.types)
        ]


def _random(rng: np.random.Generator, type: TensorType) -> Array:
    dtype = storage_dtype(type.element)
    if type.element is bf16:
        return (rng.standard_normal(type.static_shape).astype(np.float32).view(np.uint32) >> 16).astype(
            np.uint16
        )
    if isinstance(type.element, IntegerType):
        return rng.integers(0, 16, type.static_shape).astype(dtype)
    return rng.standard_normal(type.static_shape).astype(dtype)


def linear(
    m: tuple[int, ...], k: int, n: int, bias: bool = False, element: Type | None = None, x: Type = f16
) -> Case:
    types = (t(*m, k, e=x), t(n, k), *([t(n)] if bias else []))
    return Case(f"linear_{m}_{k}_{n}_{bias}_{element}", types, lambda v: ty.Linear(*v, element=element))


def quantized(
    m: tuple[int, ...], k: int, n: int, group: int, bias: bool = False, element: Type | None = None
) -> Case:
    groups = k // group
    types = (t(*m, k), t(n, k, e=ui4), t(n, groups), t(n, groups, e=ui4), *([t(n)] if bias else []))
    scales = np.random.default_rng(k + n).uniform(0.001, 0.02, (n, groups))
    return Case(
        f"quantized_{m}_{k}_{n}_g{group}_{bias}",
        types,
        lambda v: ty.QuantizedLinear(*v, group_size=group, element=element),
        ((2, scales),),
    )


def attention(
    s: int,
    kv_heads: tuple[int, ...],
    d: int,
    capacity: int,
    pos: tuple[int, ...],
    window: int = 0,
    cap: float | None = None,
    blocks: tuple[int, int, int] | None = None,
) -> Case:
    cache = t(len(pos), max(kv_heads) + 1, capacity, d)
    types = (t(len(pos), s, len(kv_heads), d), cache, cache, t(len(pos), e=i32))

    def make(values: Sequence[Value]) -> Op:
        options = {"window": window, "softcap": cap, "blocks": blocks}
        return kv.CachedAttention(*values, scale=d**-0.5, kv_heads=kv_heads, **options)

    name = f"attention_s{s}_{kv_heads}_d{d}_cap{capacity}_pos{pos}_w{window}_c{cap}"
    return Case(name + (f"_blocks{blocks}" if blocks else ""), types, make, ((3, pos),))


def merge_parts(b: int, s: int, heads: int, d: int, count: int) -> Case:
    """The first die has no key that the first query sees."""
    parts = np.random.default_rng(count).standard_normal((b, s, heads, count, d + 2)).astype(np.float32)
    parts[..., d + 1] += 5
    parts[0, 0, :, 0] = [0] * d + [-1e30, 0]
    wide = parts.reshape(b, s, heads, -1)
    return Case(
        f"merge_{b}_{s}_{heads}_{d}_{count}",
        (t(*wide.shape, e=f32),),
        lambda v: kv.MergeAttention(*v, count=count),
        ((0, wide),),
    )


def dual_chunk(
    s: int,
    kv_heads: tuple[int, ...],
    d: int,
    capacity: int,
    pos: tuple[int, ...],
    step: int,
    e: Type = f16,
    blocks: tuple[int, int, int] | None = None,
) -> Case:
    """Steps in the first chunk, the second and a later one; heat of every sequence its own."""
    cache, scale = t(len(pos), max(kv_heads) + 1, capacity, d, e=e), t(len(pos), max(kv_heads) + 1, capacity)
    q, scales = t(len(pos), s, len(kv_heads), d), (scale, scale) if e is i8 else ()
    types = (q, cache, cache, t(len(pos), e=i32), *scales, q, q, t(len(pos), e=f32))
    rng = np.random.default_rng(step)
    data = [(3, pos), (len(types) - 1, rng.uniform(1, 1.5, len(pos)))]
    if e is i8:
        data += [(i, rng.integers(-127, 128, cache.static_shape)) for i in (1, 2)]
        data += [(i, rng.uniform(0, 0.02, scale.static_shape)) for i in (4, 5)]

    def make(values: Sequence[Value]) -> Op:
        q, k, v, positions, *scales, successive, inter, temperature = values
        far = {"successive": successive, "inter": inter, "temperature": temperature}
        return kv.DualChunkAttention(
            *(q, k, v, positions, tuple(scales)),
            **far,
            step=step,
            scale=d**-0.5,
            kv_heads=kv_heads,
            blocks=blocks,
        )

    name = f"dual_chunk_s{s}_{kv_heads}_d{d}_pos{pos}_{step}_{e}"
    return Case(name + (f"_blocks{blocks}" if blocks else ""), types, make, tuple(data))


def sparse(
    kind: type[Op],
    s: int,
    kv_heads: tuple[int, ...],
    d: int,
    capacity: int,
    pos: int,
    numbers: tuple[int, int, int, int],
    step: int | None = None,
    e: Type = f16,
    cap: float | None = None,
) -> Case:
    """`kv.block_scores`, or `kv.sparse_attention` to blocks that are drawn among the candidates."""
    choice, groups = BlockChoice(*numbers), max(kv_heads) + 1
    cache, scale = t(1, groups, capacity, d, e=e), t(1, groups, capacity)
    q, samples = t(1, s, len(kv_heads), d), choice.samples(s)
    whole = kind is kv.SparseAttention
    scales = (scale,) * (1 + whole) if e is i8 else ()
    types = [q, cache, t(1, e=i32), *scales, *((q, q, t(1, e=f32)) if step else ())]
    rng = np.random.default_rng(pos)
    data: list[tuple[int, Any]] = [(2, (pos,)), *([(len(types) - 1, (1.2,))] if step else [])]
    if whole:
        blocks = np.zeros((1, groups, 3 if step else 1, choice.keep), np.int32)
        for which, (first, end) in enumerate(choice.ranges(pos, step)):
            count = min(choice.keep, end - first)
            for group in range(groups):
                blocks[0, group, which, :count] = first + rng.permutation(end - first)[:count]
        data += [(len(types) + 1, blocks), (len(types) + 2, np.full((1, samples, len(kv_heads)), 5.0))]
        types += [cache, t(*blocks.shape, e=i32), t(1, samples, len(kv_heads), e=f32)]
    if e is i8:
        data += [(1, rng.integers(-127, 128, cache.static_shape))]
        data += [(3 + i, rng.uniform(0, 0.02, scale.static_shape)) for i in range(len(scales))]
        data += [(len(types) - 3, rng.integers(-127, 128, cache.static_shape))] if whole else []

    def make(values: Sequence[Value]) -> Op:
        q, k, positions, *more = values
        rest = dict(zip(("v", "blocks", "totals"), more[-3:])) if whole else {}
        more = more[:-3] if whole else more
        known = {"scale": d**-0.5, "kv_heads": kv_heads, "sparse": numbers, "step": step, "softcap": cap}
        return kind(q, k, positions, tuple(more), **known, **rest)  # type: ignore[call-arg]

    name = f"{kind.name}_s{s}_{kv_heads}_d{d}_cap{capacity}_pos{pos}_{numbers}_{step}_{e}"
    return Case(name, tuple(types), make, tuple(data))


def pick_blocks(
    n: int, s: int, kv_heads: tuple[int, ...], pos: int, numbers: tuple[int, int, int, int], step: int | None
) -> Case:
    samples = BlockChoice(*numbers).samples(s)
    types = (
        t(1, n, samples, len(kv_heads), e=f32),
        t(1, samples, len(kv_heads), e=f32),
        t(1, e=i32),
    )
    totals = np.random.default_rng(n).uniform(2, 4, types[1].static_shape)
    return Case(
        f"pick_blocks_{n}_{s}_{kv_heads}_pos{pos}_{numbers}_{step}",
        types,
        lambda v: kv.PickBlocks(*v, kv_heads=kv_heads, sparse=numbers, tokens=s, step=step),
        ((1, totals), (2, (pos,))),
    )


def attention_of_nan() -> Case:
    """A query that is not finite has no weights: the kernel's exponential must not make some."""
    q = np.random.default_rng(0).standard_normal((1, 4, 2, 16))
    q[0, 1] = np.nan
    q[0, 3, 1, 5] = np.inf
    case = attention(4, (0, 1), 16, 16, (3,))
    return Case("attention_of_nan", case.types, case.make, (*case.data, (0, q)))


def attention8(
    s: int, kv_heads: tuple[int, ...], d: int, capacity: int, pos: tuple[int, ...], window: int = 0
) -> Case:
    cache, scale = t(len(pos), max(kv_heads) + 1, capacity, d, e=i8), t(len(pos), max(kv_heads) + 1, capacity)
    types = (t(len(pos), s, len(kv_heads), d), cache, cache, t(len(pos), e=i32), scale, scale)
    rng = np.random.default_rng(capacity)
    data = [(i, rng.integers(-127, 128, cache.static_shape)) for i in (1, 2)]
    data += [(i, rng.uniform(0, 0.02, scale.static_shape)) for i in (4, 5)]

    def make(values: Sequence[Value]) -> Op:
        q, k, v, positions, *scales = values
        return kv.CachedAttention(
            q, k, v, positions, tuple(scales), scale=d**-0.5, kv_heads=kv_heads, window=window
        )

    return Case(
        f"attention8_s{s}_{kv_heads}_d{d}_cap{capacity}_pos{pos}_w{window}", types, make, ((3, pos), *data)
    )


def attention4(
    s: int,
    kv_heads: tuple[int, ...],
    d: int,
    capacity: int,
    pos: tuple[int, ...],
    *,
    keys: int = 4,
    layout: str = "HND",
    blocks: tuple[int, int, int] | None = None,
    step: int = 0,
) -> Case:
    """Caches as `kv.quantize_groups` and, of keys of 8 bits, `kv.quantize_rows` make them."""
    batch, heads = len(pos), max(kv_heads) + 1
    rng = np.random.default_rng(capacity)
    shape = (batch, heads, capacity, d) if layout == "HND" else (batch, capacity, heads, d)
    rows = [rng.standard_normal(shape).astype(np.float16) for _ in range(2)]
    groups = kv.channel_groups(d)
    k = kv.quantize_groups(rows[0], groups) if keys == 4 else kv.quantize_rows(rows[0])
    v = kv.quantize_groups(rows[1], groups)
    arrays = (k[0], v[0], k[1], v[1])
    elements = (ui8 if keys == 4 else i8, ui8, ui16 if keys == 4 else f16, ui16)
    kinds = [t(*a.shape, e=e) for a, e in zip(arrays, elements)]
    q = t(batch, s, len(kv_heads), d)
    far = (q, q, t(batch, e=f32)) if step else ()
    types = (q, *kinds[:2], t(batch, e=i32), *kinds[2:], *far)

    def make(values: Sequence[Value]) -> Op:
        given = (*values[:4], values[4:6])
        options = {"scale": d**-0.5, "kv_heads": kv_heads, "layout": layout, "blocks": blocks}
        if not step:
            return kv.CachedAttention(*given, **options)
        names = dict(zip(("successive", "inter", "temperature"), values[6:]))
        return kv.DualChunkAttention(*given, **names, step=step, **options)

    data = tuple((i, a) for i, a in zip((1, 2, 4, 5), arrays))
    return Case(
        f"attention4_s{s}_{kv_heads}_d{d}_{pos}_k{keys}_{layout}_{blocks}_{step}",
        types,
        make,
        ((3, pos), *data),
    )


def quantize_groups(s: int, heads: int, d: int, size: float, b: int = 1) -> Case:
    rows = np.random.default_rng(d).standard_normal((b, s, heads, d)) * size
    rows[0, 0, 0] = 0
    rows[-1, -1, -1, : d // 2] = abs(rows[-1, -1, -1, : d // 2])
    return Case(
        f"quantize4_{b}_{s}_{heads}_{d}_{size}",
        (t(b, s, heads, d),),
        lambda v: kv.QuantizeGroups(*v),
        ((0, rows),),
    )


def quantize_rows(s: int, heads: int, d: int, size: float, b: int = 1) -> Case:
    rows = np.random.default_rng(d).standard_normal((b, s, heads, d)) * size
    rows[0, 0, 0] = 0
    rows[-1, -1, -1, : d // 2] = (np.arange(d // 2) - d // 4) / 2 * size  # halves
    return Case(
        f"quantize_{b}_{s}_{heads}_{d}_{size}",
        (t(b, s, heads, d),),
        lambda v: kv.QuantizeRows(*v),
        ((0, rows),),
    )


def append_scales(s: int, heads: int, capacity: int, pos: tuple[int, ...]) -> Case:
    types = (t(len(pos), heads, capacity), t(len(pos), s, heads), t(len(pos), e=i32))
    return Case(f"append_scales_s{s}_{heads}_{capacity}_{pos}", types, lambda v: kv.Append(*v), ((2, pos),))


def append(
    s: int,
    heads: int,
    d: int,
    capacity: int,
    pos: tuple[int, ...],
    blocks: tuple[int, int, int] | None = None,
) -> Case:
    types = (t(len(pos), heads, capacity, d), t(len(pos), s, heads, d), t(len(pos), e=i32))
    name = f"append_s{s}_{heads}_{d}_{capacity}_{pos}" + (f"_blocks{blocks}" if blocks else "")
    return Case(name, types, lambda v: kv.Append(*v, blocks=blocks), ((2, pos),))


def rows(s: int, count: int, d: int, pos: tuple[int, ...], **places: int) -> Case:
    types = (t(count, d), t(len(pos), e=i32), t(len(pos), s, 8))
    return Case(f"rows_s{s}_{count}_{d}_{pos}_{places}", types, lambda v: kv.Rows(*v, **places), ((1, pos),))


def embedding(ids: Sequence[int], element: Type, offset: int, width: int = 96) -> Case:
    types = (t(10, width), t(1, len(ids), e=element))
    return Case(
        f"embedding_{element}_{offset}_{width}",
        types,
        lambda v: ty.Embedding(*v, offset=offset),
        ((1, [ids]),),
    )


def selection(b: int, s: int, rest: tuple[int, ...], row: Sequence[int], element: Type = f16) -> Case:
    types = (t(b, s, *rest, e=element), t(b, e=i32))
    return Case(f"select_row_{b}_{s}_{rest}_{row}_{element}", types, lambda v: ty.SelectRow(*v), ((1, row),))


def unary(shape: tuple[int, ...], make: MakeOp, name: str, e: Type = f16) -> Case:
    return Case(f"{name}_{shape}_{e}", (t(*shape, e=e),), make)


def binary(shape: tuple[int, ...], op: Callable[[Value, Value], Op], e: Type = f16) -> Case:
    return Case(f"{op.__name__}_{shape}_{e}", (t(*shape, e=e), t(*shape, e=e)), lambda v: op(*v))


def rope(b: int, s: int, heads: int, d: int) -> Case:
    return Case(
        f"rope_{b}_{s}_{heads}_{d}",
        (t(b, s, heads, d), t(b, s, d // 2), t(b, s, d // 2)),
        lambda v: ty.Rope(*v),
    )


def logits(rows: tuple[int, ...], width: int, e: Type = f32) -> tuple[TensorType, tuple[int, Any]]:
    """Rows with many equal values, -inf and NaN among them."""
    values = np.random.default_rng(width).integers(-width // 4, width // 4, (*rows, width)).astype(np.float32)
    values[..., :: max(2, width // 5)] = -np.inf
    values[..., 1 :: max(3, width // 3)] = np.nan
    return t(*rows, width, e=e), (0, values)


def top_k(
    rows: tuple[int, ...], width: int, k: int, e: Type = f32, cap: float | None = None, scale: float = 1
) -> Case:
    type, (number, values) = logits(rows, width, e)
    name = f"top_k_{rows}_{width}_{k}_{e}_{cap}_{scale}"
    with np.errstate(invalid="ignore"):
        data = (number, values * scale)
    return Case(name, (type,), lambda v: ty.TopK(*v, k=k, softcap=cap), (data,))


def candidates(
    rows: tuple[int, ...], sizes: tuple[int, ...], k: int, offset: int = 0, cap: float | None = None
) -> Case:
    type, data = logits(rows, sum(sizes))
    return Case(
        f"candidates_{rows}_{sizes}_{k}_{offset}_{cap}",
        (type,),
        lambda v: ty.TopKCandidates(*v, k=k, sizes=sizes, offset=offset, softcap=cap),
        (data,),
    )


def merge(rows: tuple[int, ...], sizes: tuple[int, ...], k: int, cap: float | None = None) -> Case:
    x = np.random.default_rng(sum(sizes)).integers(-3, 4, (*rows, sum(sizes))).astype(np.float32)
    whole = func.Func.make("f", [t(*x.shape, e=f32)]).args[0]
    halves = ty.TopKCandidates(whole, k=k, sizes=sizes, softcap=cap)
    data, counts = halves.evaluate(x), halves.counts()
    return Case(
        f"merge_{rows}_{sizes}_{k}_{cap}",
        (t(*data.shape, e=i32),),
        lambda v: ty.MergeTopK(*v, k=k, counts=counts, softcap=cap),
        ((0, data),),
    )


def both_ways(
    rows: int, heads: int, width: int, segments: tuple[int, ...], groups: int = 0, cap: float | None = None
) -> Case:
    types = (t(1, rows, heads, width), *(t(1, rows, groups or heads, width),) * 2)
    return Case(
        f"both_ways_{rows}_{heads}_{groups}_{width}_{segments}",
        types,
        lambda v: ty.Attention(*v, scale=width**-0.5, causal=False, segments=segments, softcap=cap),
    )


def concat(axis: int, *shapes: tuple[int, ...]) -> Case:
    return Case(
        f"concat_{axis}_{shapes}", tuple(t(*s) for s in shapes), lambda v: ty.Concat(tuple(v), axis=axis)
    )


CASES: list[Case] = [
    linear((1, 1), 64, 33),
    linear((1, 1), 1536, 48, bias=True),
    linear((1, 2), 96, 7),
    linear((1, 3), 100, 5, element=f32),
    linear((1, 8), 224, 50, bias=True),
    linear((2, 7), 192, 17),
    linear((1, 96), 96, 130, element=f32, bias=True),
    linear((1, 13), 33, 9, x=f32),
    linear((1, 1), 1024, 600, bias=True),  # enough work for threads
    quantized((1, 1), 64, 33, 32),
    quantized((1, 1), 256, 30, 128, bias=True),
    quantized((1, 2), 192, 10, 64, element=f32),
    quantized((1, 3), 96, 5, 32),
    quantized((1, 8), 224, 50, 32, bias=True),
    quantized((2, 5), 448, 17, 64),
    quantized((1, 96), 128, 67, 128, bias=True),
    quantized((1, 4), 48, 6, 24),
    quantized((1, 1), 30, 6, 6),
    quantized((1, 1), 1024, 600, 128),
    attention_of_nan(),
    attention(1, (0, 0, 1, 1), 32, 64, (0,)),
    attention(1, (0, 0, 1, 1), 64, 64, (40,)),
    attention(1, (0, 1, 1, 1, 2), 64, 64, (63,)),
    attention(1, (0,) * 7 + (1,) * 7, 64, 64, (40,)),  # the heads of a token that share keys are one tile
    attention(1, (0, 0, 1, 1), 32, 64, (40,), window=9),
    attention(8, (0, 0, 0, 1), 128, 64, (0,)),
    attention(8, (1, 0, 0), 32, 48, (29,)),
    attention(8, (0, 1), 96, 64, (60,)),  # padding beyond the capacity
    attention(7, (0, 1), 80, 64, (20,)),
    attention(5, (0, 0), 12, 64, (3, 50)),
    attention(4, (0, 0, 1), 64, 80, (30, 0), window=9),
    attention(4, (0, 0, 1), 64, 80, (30, 0), window=9, cap=0.7),
    attention(1, (0, 1), 64, 64, (40,), cap=50.0),
    attention(32, (0, 0, 1, 1), 32, 96, (17,), window=0),
    attention(8, (0, 1), 16, 2100, (2045,)),  # a second block, which the first queries do not see
    attention(4, (0, 0, 1), 32, 5000, (4990, 10), window=2500),  # more than a block, with and without others
    attention(1, (0, 0), 24, 4200, (4150,), cap=3.0),
    both_ways(12, 3, 32, ()),
    both_ways(82, 2, 32, ()),  # patches and a class token
    both_ways(37, 2, 80, (), cap=2.0),
    both_ways(40, 3, 72, (0, 16, 24, 40)),  # windows at a border are shorter
    both_ways(60, 2, 16, (0, 4, 36, 44, 60)),
    both_ways(64, 4, 32, (0, 32, 64), groups=2),
    concat(1, (1, 1, 24), (1, 9, 24)),
    concat(1, (2, 3, 5), (2, 1, 5), (2, 4, 5)),
    concat(0, (3, 8), (2, 8)),
    append(1, 2, 32, 40, (0,)),
    append(8, 3, 24, 40, (36,)),
    append(4, 2, 7, 16, (2, 15)),
    append(2, 2, 8, 16, (16,)),
    append_scales(4, 3, 16, (2, 15)),
    append_scales(1, 2, 16, (16,)),
    Case(
        "append_i8",
        (t(1, 2, 9, 32, e=i8), t(1, 4, 2, 32, e=i8), t(1, e=i32)),
        lambda v: kv.Append(*v),
        ((1, np.arange(256).reshape(1, 4, 2, 32) - 128), (2, (7,))),
    ),
    attention8(1, (0, 0, 1, 1), 64, 64, (40,)),
    attention8(8, (1, 0, 0), 32, 48, (29,)),
    attention8(5, (0, 0), 12, 64, (3, 50)),
    attention8(4, (0, 0, 1), 64, 80, (30, 0), window=9),
    dual_chunk(4, (0, 0, 1), 16, 48, (2, 9, 37), 10),
    dual_chunk(1, (0, 1), 12, 40, (5, 39), 7, i8),
    attention8(5, (0, 0), 32, 4500, (4300,)),
    quantize_rows(1, 2, 64, 1.0),
    quantize_rows(3, 5, 32, 3e-6),
    quantize_rows(2, 3, 12, 1000.0, b=2),
    quantize_rows(1, 1, 128, 1e-8),
    attention4(1, (0, 0, 1, 1), 64, 64, (40,)),
    attention4(8, (1, 0, 0), 32, 48, (29,)),
    attention4(5, (0, 0), 16, 64, (3, 50), keys=8),
    attention4(4, (0, 1), 128, 64, (17,), layout="NHD"),
    attention4(3, (0, 1), 80, 64, (17,), blocks=(1, 3, 16)),
    attention4(4, (0, 0, 1), 96, 48, (2, 9, 37), step=10),
    attention4(5, (0, 0), 32, 4500, (4300,)),
    quantize_groups(1, 2, 64, 1.0),
    quantize_groups(3, 5, 32, 3e-6),
    quantize_groups(2, 3, 48, 1000.0, b=2),
    quantize_groups(1, 1, 128, 1e-8),
    quantize_groups(4, 2, 16, 0.1),
    rows(1, 40, 16, (7,)),
    rows(3, 11, 16, (0, 4, 29), modulo=6, offset=6),
    rows(8, 40, 20, (36,)),
    rows(3, 40, 5, (0, 39)),
    embedding((0, 3, 9, 10, 11, 300), i32, 0),
    embedding((4, 5, 9, 14, 15, -1), i64, 5, width=37),
    selection(1, 7, (96,), (6,)),
    selection(4, 5, (37,), (0, 4, -1, 5)),  # the last two are outside: zeros
    selection(2, 3, (2, 24), (2, 1), f32),
    Case("rms_norm_small", (t(1, 1, 256), t(256)), lambda v: ty.RmsNorm(*v, eps=1e-6)),
    Case("rms_norm_odd", (t(2, 3, 84), t(84)), lambda v: ty.RmsNorm(*v, eps=1e-5)),
    Case("rms_norm_prime", (t(1, 2, 7), t(7)), lambda v: ty.RmsNorm(*v, eps=1e-5)),
    Case(
        "rms_norm_zero",
        (t(1, 1, 32), t(32)),
        lambda v: ty.RmsNorm(*v, eps=1e-6),
        ((0, np.zeros((1, 1, 32))),),
    ),
    *(
        Case(f"layer_norm_{shape}_{vectors}", (t(*shape), *vectors), lambda v: ty.LayerNorm(*v, eps=1e-5))
        for shape, vectors in (
            ((1, 1, 256), (t(256),)),
            ((2, 3, 84), (t(84), t(84))),
            ((1, 2, 7), (t(7), t(7))),
            ((2, 3, 4, 16), (t(4, 16),)),
            ((1, 5, 3, 20), (t(3, 20), t(3, 20))),
            ((1, 2, 40), (t(40, e=f32),)),
        )
    ),
    Case(
        "layer_norm_level",
        (t(1, 2, 32), t(32), t(32)),
        lambda v: ty.LayerNorm(*v, eps=1e-5),
        ((0, np.full((1, 2, 32), 3.0)),),
    ),
    *(
        Case(
            f"gelu_{approximate}_wide",
            (t(1, 15),),
            lambda v, approximate=approximate: ty.Gelu(*v, approximate=approximate),
            ((0, [[-60000, -100, -20, -6, -4, -2, -0.5, 0, 0.5, 2, 4, 6, 20, 100, 60000]]),),
        )
        for approximate in ("none", "tanh", "quick")
    ),
    unary((1, 3, 37), lambda v: ty.Gelu(*v), "gelu"),
    unary((1, 3, 37), lambda v: ty.Gelu(*v, approximate="tanh"), "gelu_tanh", f32),
    binary((1, 5, 21), ty.GeluMul),
    binary((1, 8, 768), ty.GeluMul),
    unary((1, 3, 37), lambda v: ty.Relu(*v), "relu"),
    unary((1, 3, 37), lambda v: ty.Softcap(*v, cap=0.5), "softcap"),
    unary((1, 3, 32), lambda v: ty.Softcap(*v, cap=30.0), "softcap", f32),
    rope(1, 1, 4, 64),
    rope(2, 3, 5, 24),
    rope(1, 8, 2, 10),
    unary((1, 3, 37), lambda v: ty.Scale(*v, factor=0.22), "scale"),
    unary((1, 3, 32), lambda v: ty.Scale(*v, factor=12.0), "scale", f32),
    unary((1, 3, 37), lambda v: ty.Silu(*v), "silu"),
    unary((1, 3, 32), lambda v: ty.Silu(*v), "silu", f32),
    Case(
        "silu_wide",
        (t(1, 9),),
        lambda v: ty.Silu(*v),
        ((0, [[-60000, -100, -88, -20, 0, 20, 88, 100, 60000]]),),
    ),
    binary((1, 5, 21), ty.SiluMul),
    binary((1, 8, 768), ty.SiluMul),
    binary((1, 5, 21), ty.Add),
    binary((2, 4, 64), ty.Add, f32),
    binary((1, 1, 5), ty.Mul),
    unary((3, 7), lambda v: ty.Cast(*v, element=f32), "f16_f32"),
    unary((3, 17), lambda v: ty.Cast(*v, element=f16), "f32_f16", f32),
    unary((3, 17), lambda v: ty.Cast(*v, element=f16), "bf16_f16", bf16),
    unary((3, 17), lambda v: ty.Cast(*v, element=i32), "i64_i32", i64),
    unary((2, 3, 4, 16), lambda v: ty.Transpose(*v, perm=(0, 2, 1, 3)), "swap"),
    unary((2, 3, 5), lambda v: ty.Transpose(*v, perm=(2, 0, 1)), "rotate"),
    unary((3, 5), lambda v: ty.Transpose(*v, perm=(1, 0)), "turn", f32),
    unary((2, 6, 5), lambda v: ty.Slice(*v, axis=1, offset=2, size=3), "slice_mid"),
    unary((2, 6, 40), lambda v: ty.Slice(*v, axis=2, offset=3, size=33), "slice_last"),
    unary((6, 4), lambda v: ty.Slice(*v, axis=0, offset=5, size=1), "slice_first"),
    unary((2, 3, 8), lambda v: ty.Repeat(*v, axis=1, times=3), "repeat_mid"),
    unary((2, 5), lambda v: ty.Repeat(*v, axis=1, times=2), "repeat_last"),
    top_k((1, 1), 33, 1),
    top_k((1, 3), 1000, 8),
    top_k((2, 5), 129, 5, f16),
    top_k((1, 1), 7, 7),
    top_k((1, 2), 300000, 4, scale=1e-4),  # enough work for threads
    top_k((1, 2), 151936, 4, scale=0),  # all equal
    top_k((1, 3), 1000, 8, cap=30.0),
    top_k((2, 2), 77, 5, f16, cap=5.0),
    candidates((1, 3), (100, 99, 3, 0), 8),
    candidates((1, 1), (70,), 4, offset=300),
    candidates((1, 2), (170, 40), 4, cap=9.0),
    merge((1, 3), (8, 9, 1, 20), 8),
    merge((2, 1), (5, 0, 2), 5),
    merge((1, 2), (5, 9), 3, cap=2.0),
    # caches that are cut by tokens: of 2 dies the second, before and behind borders of blocks
    attention(1, (0, 0, 1, 1), 32, 48, (0,), blocks=(1, 2, 8)),  # no row is this die's yet
    attention(1, (0,) * 7, 64, 48, (40,), blocks=(1, 2, 8)),
    attention(8, (0, 0, 1), 24, 16, (5,), blocks=(1, 3, 8)),  # keys that some of the queries see
    attention(8, (0, 1), 16, 16, (2, 29), blocks=(0, 2, 8)),
    attention(4, (0, 0, 1), 32, 40, (30, 0), window=9, cap=0.7, blocks=(2, 3, 4)),
    attention(4, (0, 0), 16, 2304, (4200, 300), window=2500, blocks=(1, 2, 256)),
    append(8, 3, 24, 16, (5,), blocks=(1, 2, 8)),
    append(8, 2, 16, 16, (3, 29), blocks=(1, 3, 4)),
    append(1, 2, 32, 8, (40,), blocks=(2, 3, 4)),  # beyond the capacity
    dual_chunk(4, (0, 0, 1), 16, 24, (2, 13, 37), 12, blocks=(1, 2, 4)),
    dual_chunk(1, (0, 1), 12, 24, (5, 39), 8, i8, blocks=(0, 2, 4)),
    merge_parts(2, 3, 4, 24, 3),
    # some blocks of a cache: none to choose from, fewer than are kept, more; borders of chunks and padding
    sparse(kv.BlockScores, 8, (0, 0, 1), 24, 96, 0, (2, 16, 0, 2)),
    sparse(kv.BlockScores, 12, (0, 1, 1), 16, 96, 61, (2, 16, 16, 3), cap=3.0),
    sparse(kv.BlockScores, 8, (0, 0), 16, 4200, 4190, (2, 32, 16, 2)),
    sparse(kv.BlockScores, 9, (0, 1), 12, 160, 101, (2, 16, 8, 2), 48, i8),
    sparse(kv.SparseAttention, 8, (0, 0, 1), 24, 96, 0, (2, 16, 0, 2)),
    sparse(kv.SparseAttention, 12, (0, 1, 1), 16, 192, 150, (3, 16, 16, 3), cap=3.0),
    sparse(kv.SparseAttention, 8, (0, 0), 16, 4200, 4190, (2, 32, 2500, 2)),
    sparse(kv.SparseAttention, 9, (0, 1), 12, 160, 130, (2, 16, 40, 2), 48, i8),
    pick_blocks(12, 8, (0, 0, 1), 100, (3, 16, 16, 2), None),
    pick_blocks(12, 8, (0, 1), 152, (3, 16, 16, 2), None),  # a step that measures
    pick_blocks(12, 8, (0, 1), 20, (3, 16, 16, 2), None),  # one block to choose from
    pick_blocks(40, 12, (0, 0, 0), 600, (4, 16, 32, 3), 96),
    Case("replace", (t(1, 5, 3, e=f32), t(1, 5, 3, e=f32)), lambda v: kv.Replace(*v)),
    merge_parts(1, 1, 7, 64, 4),
]


def _op(case: Case) -> tuple[func.Func, Op]:
    function = func.Func.make("f", case.types)
    op = case.make(function.args)
    function.body.append(op)
    return function, op


TARGETS = (detected_cpu(), GENERIC_CPU, "x86-64")


def _is_slow(target: int, number: int) -> bool:
    return target > 0 and number % 3 != target


@pytest.fixture(scope="module")
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], HostLibrary]:
    """The compiled cases of a target."""

    @functools.cache
    def made(target: int) -> HostLibrary:
        everything = request.config.getoption("--slow")
        cases = [case for i, case in enumerate(CASES) if everything or not _is_slow(target, i)]
        path = tmp_path_factory.mktemp("kernels") / f"{TARGETS[target]}.so"
        kernels = assign_kernels([_op(case)[0] for case in cases])
        build_library(kernels, HostTarget(mcpu=TARGETS[target]), path)
        return HostLibrary(path)

    return made


def assert_close(got: Array, expected: Array) -> None:
    """Equal up to one unit in the last place of the result, and up to the order of an f32 sum for results
    near zero.
    """
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, expected)
        return
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    wide = expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        half = got.dtype == np.float16
        unit = np.spacing(np.abs(expected)).astype(np.float64) if half else np.abs(wide) * 2e-5
        off = np.abs(got.astype(np.float64) - wide) - unit - 3e-5
    assert not np.any(off > 0), f"off by up to {np.nanmax(off)} beyond the tolerance"


@pytest.mark.parametrize(
    ("target", "case"),
    [
        pytest.param(
            target, case, id=f"{mcpu}-{case.name}", marks=[pytest.mark.slow] if _is_slow(target, i) else []
        )
        for target, mcpu in enumerate(TARGETS)
        for i, case in enumerate(CASES)
    ],
)
def test_kernel_computes_what_the_op_says(
    case: Case, target: int, library: Callable[[int], HostLibrary]
) -> None:
    function, op = _op(case)
    assign_kernels([function])
    operands = case.operands()
    with np.errstate(invalid="ignore"):  # some operands are not finite
        expected = _all(evaluate_op(op, [a.copy() for a in operands]))
    stored = [pack(a, x) for a, x in zip(operands, case.types)]
    got = _all(library(target).evaluate(op, stored))
    if isinstance(op, ty.TopKCandidates):
        got, expected = (_unpacked(op, *records) for records in (got, expected))
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs)
    if isinstance(op, (kv.Append, kv.Replace)):
        assert got[0] is stored[0]


def test_a_cache_past_32_bit_indices_is_refused(tmp_path: Path) -> None:
    """Four sequences of a million tokens of the 14B on one die."""
    cache = t(4, 8, 1_010_000, 128)
    heads = tuple(head // 5 for head in range(40))
    types = (t(4, 1, 40, 128), cache, cache, t(4, e=i32))
    case = Case("large", types, lambda v: kv.CachedAttention(*v, scale=1.0, kv_heads=heads))
    with pytest.raises(TyirError, match=r"4136960000 elements, a kernel can index 2147483647"):
        build_library(assign_kernels([_op(case)[0]]), HostTarget(), tmp_path / "large.so")


def _unpacked(op: ty.TopKCandidates, records: Array) -> tuple[Array, ...]:
    """The numbers and the ids of every record: sums are close, not equal."""
    found, first = [], 0
    for count in filter(None, op.counts()):
        record = np.ascontiguousarray(records[..., first : first + ty.record_words(count)])
        numbers = record.view(np.float32)
        found += [numbers[..., :count], record[..., count : 2 * count], numbers[..., 2 * count]]
        first += ty.record_words(count)
    assert first == records.shape[-1]
    return tuple(found)


def _all(results: Array | tuple[Array, ...]) -> tuple[Array, ...]:
    return results if isinstance(results, tuple) else (results,)
