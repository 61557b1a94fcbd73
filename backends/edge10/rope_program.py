"""compute_rope_param: the program that fills a request's rotary tables (mRoPE).

    @compute_rope_param(%positions: tensor<3xCAPxi32>) -> (rope_cos, rope_sin: tensor<CAPxD/2xf16>)
      row s of either = time[positions[0, s]] + row[positions[1, s]] + column[positions[2, s]]

It runs once, when a request begins; its results are the language programs' arguments of the same names, a row
for each slot of the cache.  Each axis has tables of the positions 0..CAP-1, zero in the channels that another
axis turns: the sum is a choice, no angle is computed on a die, and a row is what `rope_rows` makes of it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tyir.artifacts.vision import Rope
from tyir.attributes import DenseElementsAttr, SymbolRefAttr
from tyir.backends.edge10.programs import ProgramFiles, ProgramWriter
from tyir.backends.edge10.weight_files import WeightFiles
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.dialects.ty import (
    Add,
    Constant,
    Embedding,
    GetGlobal,
    MultiplyChannels,
    Param,
    Reshape,
    RopeTable,
    Slice,
    Yield,
    tensor_type,
)
from tyir.execution.entry_points import argument, mark_entry, result
from tyir.ir import Block, Region, Value
from tyir.manifest import DieProgram
from tyir.types import TensorType, f16, i32

__all__ = ["RopeProgram"]

_NAME: Final = "compute_rope_param"
_FILES: Final = ProgramFiles(_NAME, f"{_NAME}.params")
_AXES: Final = ("time", "row", "column")
_TABLES: Final = ("cos", "sin")
_DIE: Final = 0  # the host gives the results to all


class RopeProgram:
    """The program for caches of `slots` tokens, which know as many positions."""

    def __init__(self, rope: Rope, slots: int) -> None:
        self.rope, self.slots = rope, slots
        self.module = Module.empty(f"die{_DIE}")
        Module.empty().body.append(self.module)  # what a die's program is lowered in
        self._params = {
            (axis, table): self._param(axis, table)
            for table in range(len(_TABLES))
            for axis in range(len(_AXES))
        }
        for param in self._params.values():
            self.module.body.append(param)
        self.module.body.append(self._function())

    def params(self, files: WeightFiles) -> None:
        """Adds the file of tables."""
        name = _FILES.shared(_DIE)
        file = files.add(name, list(self._params.values()))
        for param in self._params.values():
            files.places.add(_DIE, param, file, name)

    def write(self, writer: ProgramWriter) -> DieProgram:
        """The program's files; returns its entry for the manifest."""
        return writer.write(self.module, _DIE, self.slots, _FILES)

    def _param(self, axis: int, table: int) -> Param:
        block = Block()
        tables = RopeTable(
            inv_freq=DenseElementsAttr.from_numpy(np.array(self.rope.inv_freq, np.float32)),
            positions=self.slots,
            scale=self.rope.scale,
            element=f16,
        )
        block.append(tables)
        own = block.append(
            Constant(
                value=DenseElementsAttr.from_numpy((np.array(self.rope.axes) == axis).astype(np.float32))
            )
        )
        chosen = block.append(MultiplyChannels(tables.results[table], own.result, axis=1))
        block.append(Yield(chosen.result))
        return Param(
            sym_name=f"{_AXES[axis]}.{_TABLES[table]}",
            type=tensor_type(chosen.result),
            initializer=Region([block]),
        )

    def _function(self) -> Func:
        function = Func.make(_NAME, [TensorType((len(_AXES), self.slots), i32)], ["positions"])
        block = function.body
        ids = [
            block.append(Slice(function.args[0], axis=0, offset=axis, size=1)).result
            for axis in range(len(_AXES))
        ]
        made: list[Value] = []
        for table in range(len(_TABLES)):
            rows = []
            for axis, positions in enumerate(ids):
                param = self._params[axis, table]
                weight = GetGlobal(symbol=SymbolRefAttr(str(param.sym_name)), result_types=[param.type])
                rows.append(block.append(Embedding(block.append(weight).result, positions)).result)
            total = rows[0]
            for row in rows[1:]:
                total = block.append(Add(total, row)).result
            shape = tensor_type(total).static_shape[1:]
            made.append(block.append(Reshape(total, shape=shape)).result)
        block.append(Return(tuple(made)))
        function.set_arg_attrs([argument("positions", "positions")])
        function.set_res_attrs([result(f"rope_{table}") for table in _TABLES])
        function.refresh_type()
        mark_entry(function, self.slots)
        return function
