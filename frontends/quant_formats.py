"""Quantised checkpoints, one `WeightFormat` each; all end in the same ops: q [N, K], scales and zeros [N,
K/g], `ty.dequantize`.

A weight is quantised if and only if its packed tensor exists.  Layouts: AutoAWQ's WQLinear_GEMM, GPTQModel's
README (formats gptq and gptq_v2), compressed-tensors' pack_to_int32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from tyir.attributes import DenseElementsAttr
from tyir.dialects import quant, ty
from tyir.frontends.checkpoint import StoredTensor
from tyir.frontends.quant_config import QuantConfig
from tyir.frontends.weights import Emit, Weights
from tyir.ir import Value
from tyir.types import TensorType, Type, f16, i32, i64, ui4

__all__ = ["AwqFormat", "CompressedTensorsFormat", "GptqFormat", "emit_dequantized", "quantized_format"]

Tensors = Mapping[str, StoredTensor]
ReadInts = Callable[[StoredTensor], npt.NDArray[Any]]
_SCALE_ELEMENTS: Final = ("f16", "bf16", "f32")


def emit_dequantized(
    q: Value,
    scales: Value,
    zeros: Value | None,
    group_size: int,
    element: Type,
    emit: Emit,
    groups: Value | None = None,
) -> Value:
    """The weight [N, K] of q, scales [N, K/g] and zeros (None: 8 everywhere) in `element`; `groups` [K] says
    the group of each column where groups are not ranges of `group_size` columns.
    """
    scale_type = scales.type
    assert isinstance(scale_type, TensorType)
    if scale_type.element is not f16:
        scales = emit(ty.Cast(scales, element=f16)).result
    if zeros is None:
        zeros = emit(ty.Constant(value=DenseElementsAttr(bytes((8,)), scale_type.with_element(ui4)))).result
    if groups is not None:
        out = emit(quant.DequantizeIndexed(q, scales, zeros, groups)).result
    else:
        out = emit(ty.Dequantize(q, scales, zeros, group_size=group_size)).result
    return out if element is f16 else emit(ty.Cast(out, element=element)).result


def _transposed(value: Value, emit: Emit) -> Value:
    return emit(ty.Transpose(value, perm=(1, 0))).result


@dataclass(frozen=True)
class _PackedFormat(ABC):
    """What the three formats share: names, and shapes that follow from [N, K] and the group size.

    `read` gives the values of small index tensors.
    """

    config: QuantConfig
    read: ReadInts

    packed: ClassVar[str]
    needed: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    index: ClassVar[str]

    def stored_keys(self, name: str, tensors: Tensors) -> tuple[str, ...]:
        base = name.removesuffix(".weight")
        if base == name or f"{base}.{self.packed}" not in tensors:
            return ()
        return tuple(key for part in (*self.needed, *self.optional) if (key := f"{base}.{part}") in tensors)

    def problem(self, name: str, shape: tuple[int, ...], tensors: Tensors) -> str | None:
        return "; ".join(self.problems(name.removesuffix(".weight"), shape, tensors)) or None

    def problems(self, base: str, shape: tuple[int, ...], tensors: Tensors) -> Iterator[str]:
        """Everything that keeps the stored tensors from being a weight of this shape."""
        missing = [f"{base}.{part}" for part in self.needed if f"{base}.{part}" not in tensors]
        if missing:
            yield (
                f"'{base}' is quantised, but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'}"
                " missing"
            )
            return
        if len(shape) != 2:
            yield f"'{base}' is quantised, but the model's weight has {len(shape)} dimensions"
            return
        n, k = shape
        group = self.group(base, k, tensors)
        declared = self.config.group_size or k
        if group is None or k % group:
            yield f"the scales of '{base}' do not divide its {k} input channels into equal groups"
            return
        if group != declared:
            yield f"'{base}' has groups of {group} input channels, the quantisation config says {declared}"
        for part, wanted, elements in self.layout(n, k, group, base, tensors):
            stored = tensors.get(f"{base}.{part}")
            if stored is not None and stored.type.dims != wanted:
                yield (
                    f"tensor '{stored.key}' has shape {list(stored.type.dims)}, a {n}x{k} weight in groups of"
                    f" {group} needs {list(wanted)}"
                )
            if stored is not None and str(stored.type.element) not in elements:
                yield (
                    f"tensor '{stored.key}' has element type {stored.type.element}, expected"
                    f" {' or '.join(elements)}"
                )
        yield from self.index_problems(base, k, group, tensors)

    def index_problems(self, base: str, k: int, group: int, tensors: Tensors) -> Iterator[str]:
        """Each input channel must have a group that there is."""
        stored = tensors.get(f"{base}.{self.index}")
        if stored is None:
            if self.config.reordered:
                yield f"'{base}' was quantised in order of activations but has no {self.index}"
            return
        if self.unset(stored):
            return
        if stored.type.dims != (k,):
            yield f"tensor '{stored.key}' has shape {list(stored.type.dims)}, expected {[k]}"
        elif stored.type.element not in (i32, i64):
            yield f"tensor '{stored.key}' has element type {stored.type.element}, expected i32 or i64"
        elif k and not 0 <= (groups := self.read(stored)).min() <= groups.max() < k // group:
            yield f"tensor '{stored.key}' names groups from {groups.min()} to {groups.max()} of {k // group}"

    def unset(self, index: StoredTensor) -> bool:
        """Whether an index says nothing: compressed-tensors begins it with -1 and takes groups in order while
        one is left.
        """
        of_channels = len(index.type.dims) == 1 and index.type.element in (i32, i64)
        return (
            self.config.method == "compressed-tensors"
            and of_channels
            and bool((self.read(index) == -1).any())
        )

    def scattered(self, base: str, tensors: Tensors) -> bool:
        """Whether the groups of a weight are not ranges of input channels (GPTQ's desc_act,
        compressed-tensors' actorder "group").
        """
        stored = tensors.get(f"{base}.{self.index}")
        if stored is None or self.index not in self.optional or len(stored.type.dims) != 1:
            return False
        if self.unset(stored) or any(f"{base}.{part}" not in tensors for part in self.needed):
            return False  # what is missing is said by `problems`
        (k,) = stored.type.static_shape
        group = self.group(base, k, tensors)
        return group is not None and not np.array_equal(self.read(stored), np.arange(k) // group)

    def dequantized(
        self, base: str, q: Value, scales: Value, zeros: Value | None, weights: Weights, element: Type,
        emit: Emit,
    ) -> Value:  # fmt: skip
        """The weight of q [N, K], scales and zeros [N, K/g], in groups that are ranges of columns or not."""
        groups = None
        if self.scattered(base, weights.checkpoint.tensors):
            groups = emit(weights.reference(f"{base}.{self.index}")).result
        group = _dims(q)[1] // _dims(scales)[1]
        return emit_dequantized(q, scales, zeros, group, element, emit, groups)

    @abstractmethod
    def group(self, base: str, k: int, tensors: Tensors) -> int | None:
        """Input channels per scale, from the shape of the scales."""

    @abstractmethod
    def layout(
        self, n: int, k: int, group: int, base: str, tensors: Tensors
    ) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        """(part, shape, element types) of each stored tensor."""

    @abstractmethod
    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value: ...


def _rows_to_group(stored: StoredTensor, axis: int, k: int) -> int | None:
    count = stored.type.dims[axis] if len(stored.type.dims) == 2 else None
    return k // count if count and k % count == 0 else None


class AwqFormat(_PackedFormat):
    """AutoAWQ "gemm": qweight [K, N/8] and qzeros [K/g, N/8] in the interleaved order, scales [K/g, N]."""

    packed, needed, optional, index = "qweight", ("qweight", "qzeros", "scales"), (), "g_idx"

    def group(self, base: str, k: int, tensors: Tensors) -> int | None:
        return _rows_to_group(tensors[f"{base}.scales"], 0, k)

    def layout(
        self, n: int, k: int, group: int, base: str, tensors: Tensors
    ) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        words = -(-n // 8)
        return [
            ("qweight", (k, words), ("i32",)),
            ("qzeros", (k // group, words), ("i32",)),
            ("scales", (k // group, n), _SCALE_ELEMENTS),
        ]

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        base = name.removesuffix(".weight")
        words, zeros, scales = (emit(weights.reference(f"{base}.{part}")).result for part in self.needed)
        k = _dims(words)[0]
        q, z = (emit(quant.Unpack(v, axis=1, order=quant.AWQ_ORDER)).result for v in (words, zeros))
        group = k // _dims(scales)[0]
        return emit_dequantized(
            _transposed(q, emit), _transposed(scales, emit), _transposed(z, emit), group, element, emit
        )


class GptqFormat(_PackedFormat):
    """GPTQ: qweight [K/8, N] packed along K, qzeros [K/g, N/8] along N, both in natural order; format 1
    stores zero - 1 (modulo 16).
    """

    packed, needed, optional, index = "qweight", ("qweight", "qzeros", "scales"), ("g_idx",), "g_idx"

    def group(self, base: str, k: int, tensors: Tensors) -> int | None:
        return _rows_to_group(tensors[f"{base}.scales"], 0, k)

    def layout(
        self, n: int, k: int, group: int, base: str, tensors: Tensors
    ) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        return [
            ("qweight", (-(-k // 8), n), ("i32",)),
            ("qzeros", (k // group, -(-n // 8)), ("i32",)),
            ("scales", (k // group, n), _SCALE_ELEMENTS),
            ("g_idx", (k,), ("i32", "i64")),
        ]

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        base = name.removesuffix(".weight")
        words, zeros, scales = (emit(weights.reference(f"{base}.{part}")).result for part in self.needed)
        n, k = weights.shape(name)
        q = emit(quant.Unpack(words, axis=0, size=k)).result
        z = emit(quant.Unpack(zeros, axis=1, size=n)).result
        if self.config.zero_shift:
            z = emit(quant.AddWrapping(z, value=self.config.zero_shift)).result
        q, scales, z = (_transposed(v, emit) for v in (q, scales, z))
        return self.dequantized(base, q, scales, z, weights, element, emit)


class CompressedTensorsFormat(_PackedFormat):
    """compressed-tensors "pack-quantized": weight_packed [N, K/8] of value + 8, weight_scale [N, K/g],
    weight_zero_point [N/8, K/g] of zero + 8.
    """

    packed, needed, index = "weight_packed", ("weight_packed", "weight_scale"), "weight_g_idx"
    optional = ("weight_zero_point", "weight_shape", "weight_g_idx")

    def group(self, base: str, k: int, tensors: Tensors) -> int | None:
        return _rows_to_group(tensors[f"{base}.weight_scale"], 1, k)

    def problems(self, base: str, shape: tuple[int, ...], tensors: Tensors) -> Iterator[str]:
        yield from super().problems(base, shape, tensors)
        stated = tensors.get(f"{base}.weight_shape")
        if (
            stated is not None
            and stated.type.dims == (2,)
            and str(stated.type.element) in ("i32", "i64")
            and tuple(self.read(stated)) != shape
        ):
            yield (
                f"'{base}.weight_shape' says {self.read(stated).tolist()}, config.json asks for {list(shape)}"
            )
        if not self.config.symmetric and f"{base}.weight_zero_point" not in tensors:
            yield f"'{base}' is quantised asymmetrically, but {base}.weight_zero_point is missing"

    def layout(
        self, n: int, k: int, group: int, base: str, tensors: Tensors
    ) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
        return [
            ("weight_packed", (n, -(-k // 8)), ("i32",)),
            ("weight_scale", (n, k // group), _SCALE_ELEMENTS),
            ("weight_zero_point", (-(-n // 8), k // group), ("i32",)),
            ("weight_shape", (2,), ("i32", "i64")),
        ]

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        base = name.removesuffix(".weight")
        words, scales = (emit(weights.reference(f"{base}.{part}")).result for part in self.needed)
        n, k = weights.shape(name)
        q = emit(quant.Unpack(words, axis=1, size=k)).result
        zeros = None
        if f"{base}.weight_zero_point" in weights.checkpoint.tensors:
            packed = emit(weights.reference(f"{base}.weight_zero_point")).result
            zeros = emit(quant.Unpack(packed, axis=0, size=n)).result
        return self.dequantized(base, q, scales, zeros, weights, element, emit)


def _dims(value: Value) -> tuple[int, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.static_shape


def quantized_format(config: QuantConfig, read: ReadInts) -> AwqFormat | GptqFormat | CompressedTensorsFormat:
    """The format of a checkpoint quantised as `config` says."""
    if config.method == "awq":
        return AwqFormat(config, read)
    return GptqFormat(config, read) if config.method == "gptq" else CompressedTensorsFormat(config, read)
