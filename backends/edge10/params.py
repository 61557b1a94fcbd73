"""Writing `.params` files: safetensors, one tensor at a time, so that a compile never holds more than a few
tensors.

All dies' files are written side by side, source tensor by source tensor: the checkpoint is read once and an
expensive expression (quantising a whole weight) is computed once for all the dies that take slices of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.ty import GetGlobal, Global, Param, Yield
from tyir.dialects.ty.tensors import bf16_to_f32
from tyir.dtypes import by_element
from tyir.execution.finite import number_problem
from tyir.execution.safetensors_layout import SafetensorsLayout
from tyir.execution.storage import pack, packed_shape
from tyir.execution.weights import WeightSource
from tyir.interpreter import evaluate_op, lookup_symbol
from tyir.ir import Value
from tyir.process.progress import track
from tyir.types import FloatType, Type, bf16, f16, from_dtype, storage_dtype

__all__ = ["ParamEvaluator", "ParamsFile", "write_params"]

Array = npt.NDArray[Any]


class ParamsFile:
    """The layout of one `.params` file: tensors in order of first use."""

    def __init__(self, path: Path, params: Sequence[Param]) -> None:
        self.path = path
        self.params = params
        self.layout = SafetensorsLayout(
            {
                str(param.sym_name): (_dtype_name(param.type.element), packed_shape(param.type))
                for param in params
            },
            {"format": "tyir"},
        )
        self.slots = {param: self.layout.slots[str(param.sym_name)] for param in params}

    def create(self) -> IO[bytes]:
        """The file at its full size with its header; tensors are then written at their offsets."""
        return self.layout.create(self.path)

    def global_for(self, param: Param, file: str) -> Global:
        """The reference by which a program names this tensor."""
        slot = self.slots[param]
        return Global(
            sym_name=str(param.sym_name),
            type=param.type,
            file=file,
            key=str(param.sym_name),
            offset=slot.offset,
            nbytes=slot.nbytes,
            loc=param.loc,
        )


def write_params(files: Sequence[ParamsFile], weights: WeightSource, *, progress: bool = False) -> None:
    """Evaluate every parameter and write it.

    `TyirError` lists the tensors that hold NaN or infinity or overflow f16.
    """
    evaluator = ParamEvaluator(weights)
    handles = [file.create() for file in files]
    problems: list[Diagnostic] = []
    try:
        order = sorted(
            ((file_index, param) for file_index, file in enumerate(files) for param in file.params),
            key=lambda item: (_source(item[1]), str(item[1].sym_name), item[0]),
        )
        for file_index, param in track(order, "weights", "tensor", show=progress):
            with np.errstate(all="ignore"):  # reported below, by the tensor's name
                array = evaluator.evaluate(param)
            if (problem := _check(param, array, weights)) is not None:
                problems.append(problem)
            handles[file_index].seek(files[file_index].slots[param].offset)
            handles[file_index].write(pack(array, param.type).tobytes())
    finally:
        for handle in handles:
            handle.close()
    if problems:
        raise TyirError(problems)


def _dtype_name(element: Type) -> str:
    """What safetensors calls an element; packed 4-bit elements are bytes."""
    found = by_element.get(str(element)) or by_element[str(from_dtype(storage_dtype(element)))]
    return found.safetensors


def _source(param: Param) -> tuple[str, int]:
    """The checkpoint tensor a parameter is made of, as a place to sort by."""
    return next(((source.file, source.offset) for source in _sources(param)), ("", 0))


def _check(param: Param, array: Array, weights: WeightSource) -> Diagnostic | None:
    """What of a parameter cannot be computed with, by the stored tensor that it comes from."""
    if not isinstance(param.type.element, FloatType) or array.dtype.kind != "f" or np.isfinite(array).all():
        return None
    sources = _sources(param)
    for source in sources:
        found = weights.read(source)
        if source.type.element is bf16:
            found = bf16_to_f32(found)
        if (problem := number_problem(found, f16=param.type.element is f16)) is not None:
            where = f"{source.file}: " if source.file else ""
            return Diagnostic(f"{where}tensor '{source.key}' {problem[0]}", help=problem[1])
    made = f", made of {', '.join(repr(s.key) for s in sources)}" if sources else ""
    what, help = number_problem(array, f16=False) or ("", "")
    return Diagnostic(f"weight {param.sym_name}{made}, {what}", help=help)


def _sources(param: Param) -> list[Global]:
    """The stored tensors that a parameter is made of."""
    found = (lookup_symbol(param, op.symbol.leaf) for op in param.body if isinstance(op, GetGlobal))
    return [target for target in found if isinstance(target, Global)]


class ParamEvaluator:
    """Evaluates initializers, remembering the last few costly results across parameters that share them."""

    def __init__(self, weights: WeightSource, remember: int = 2) -> None:
        self.weights = weights
        self.recent: OrderedDict[Any, tuple[Array, ...]] = OrderedDict()
        self.remember = remember

    def evaluate(self, param: Param) -> Array:
        keys: dict[Value, Any] = {}
        for op in param.body:
            if isinstance(op, Yield):
                return self._value(op.value, keys, {})
            key = (op.name, op.properties, *(keys[v] for v in op.operands))
            keys.update((value, (value.index, *key)) for value in op.results)
        raise TyirError(f"the initializer of @{param.sym_name} yields nothing")

    def _value(self, value: Value, keys: dict[Value, Any], known: dict[Value, Array]) -> Array:
        """One value of an initializer; nothing is computed that a remembered result is made of."""
        if value in known:
            return known[value]
        op, key = value.op, keys[value][1:]
        assert op is not None
        if isinstance(op, GetGlobal):
            target = lookup_symbol(op, op.symbol.leaf)
            if not isinstance(target, Global):
                raise TyirError(f"@{op.symbol.leaf} is not a tensor of the checkpoint")
            results: tuple[Array, ...] = (self.weights.read(target),)
        elif key in self.recent:
            self.recent.move_to_end(key)
            results = self.recent[key]
        else:
            result = evaluate_op(op, [self._value(v, keys, known) for v in op.operands])
            results = result if isinstance(result, tuple) else (result,)
            if len(results) > 1 or op.dialect == "quant":
                self.recent[key] = results
                if len(self.recent) > self.remember:
                    self.recent.popitem(last=False)
        known.update(zip(op.results, results))
        return known[value]
