"""The buffers of a die's program in DRAM, in the order of their addresses: weights, caches, inputs, and what
the functions need.

    ty.param @l0.w, @l0.q, @l1.w, @l1.q, @norm   -->   edge10.buffer @l0.w (address 0), @l0.q, @l1.w, @l1.q, @norm
                                                       a layer's together, each at the same distance from its first
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Collection, Iterable

from tyir.attributes import DictAttr, IntegerAttr
from tyir.backends.edge10.lowering.layers import LayerLayout, symbol_of
from tyir.backends.edge10.memory.allocate import ALIGNMENT, DramLayout
from tyir.backends.edge10.memory.edited_plan import activation_address, address_in
from tyir.dialects import edge10, ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.execution.entry_points import name_of, role_of
from tyir.ir import Value
from tyir.types import TensorType, i64, ui8

__all__ = ["DramBuffers", "NoBuffers"]


class DramBuffers:
    """Declares buffers in `program`, at the addresses that a plan in `source` gives them or one after the
    other.
    """

    def __init__(self, source: Module, program: Module, capacity_bytes: int) -> None:
        self._source, self._program = source, program
        self._dram = DramLayout(capacity_bytes)

    def add(
        self,
        name: str,
        kind: str,
        type: TensorType,
        planned: int | None,
        alignment: int = 4096,
        **attributes: int,
    ) -> None:
        """Declare a buffer, at its `planned` address or at the next one."""
        address = self._dram.take(kind, type.nbytes, alignment, planned)
        notes = DictAttr({f"tyir.{k}": IntegerAttr(v, i64) for k, v in attributes.items()})
        self._program.body.append(
            edge10.Buffer(
                sym_name=name, address=address, nbytes=type.nbytes, kind=kind, type=type, attributes=notes
            )
        )

    def add_activations(self, name: str, type: TensorType) -> None:
        """Declare a buffer for what SRAM has no room for."""
        self.add(name, "activation", type, activation_address(self._source, name))

    def add_bytes(self, name: str, nbytes: int) -> None:
        """The same, if there are any bytes; what lies in them is known to the lowering alone."""
        if nbytes:
            self.add_activations(name, TensorType((nbytes,), ui8))

    def check(self) -> None:
        """`TyirError` when the die's DRAM does not suffice."""
        self._dram.check()

    def add_weights(self, main: Func, layers: Iterable[LayerLayout]) -> None:
        """Parameters in the order of the module, except that a layer's lie together, each argument's at the
        same distance from the first.

        What another sequence length alone uses has its place too: weights and caches are shared, so all
        lengths' programs must find them at the same addresses.
        """
        params = {p.sym_name: p for p in self._source.body if isinstance(p, ty.Param)}
        planned = {name: address_in(p.attributes) for name, p in params.items()}
        used = {op.symbol.leaf: ty.tensor_type(op.result) for op in main.body if isinstance(op, ty.GetGlobal)}
        types = {name: p.type for name, p in params.items()}
        types.update({name: type for name, type in used.items() if name not in types})
        in_layers: dict[str, tuple[LayerLayout, Call]] = {}
        for layer in layers:
            for call in layer.calls:
                for index in layer.packed:
                    in_layers[symbol_of(call.operands[index])] = (layer, call)
        done: set[Call] = set()
        for name, type in types.items():
            if name not in used:
                self._dram.take("weight", type.nbytes, planned=planned.get(name))
            elif name not in in_layers:
                self.add(name, "weight", type, planned.get(name))
            elif (call := in_layers[name][1]) not in done:
                done.add(call)
                for number, index in enumerate(in_layers[name][0].packed):
                    symbol = symbol_of(call.operands[index])
                    alignment = 4096 if number == 0 else ALIGNMENT
                    self.add(symbol, "weight", types[symbol], planned.get(symbol), alignment)

    def add_arguments(self, main: Func, caches: Collection[Value], capacity: int) -> dict[Value, str]:
        """The caches, of `capacity` positions, and then the inputs, which differ from length to length.

        Returns the names of all.
        """
        names: dict[Value, str] = {}
        stored = [(i, v) for i, v in enumerate(main.args) if role_of(main, i) != "position"]
        for index, value in sorted(stored, key=lambda pair: pair[1] not in caches):
            name = name_of(main.arg_attr(index)) or value.name or f"arg{index}"
            names[value] = name
            kind = "kv" if value in caches else "input"
            notes = {"argument": index, **({"capacity": capacity} if kind == "kv" else {})}
            self.add(name, kind, ty.tensor_type(value), address_in(main.arg_attr(index)), **notes)
        return names

    def add_result(self, main: Func, index: int) -> str:
        """An output, by the index of main's result; returns its name."""
        name = name_of(main.res_attr(index)) or (f"output{index}" if index else "logits")
        type = ty.tensor_type(main.body.terminator.operands[index])
        self.add(name, "output", type, address_in(main.res_attr(index)), result=index)
        return name


class NoBuffers(DramBuffers):
    """Takes no note of what it is asked for: of lowerings that are priced only."""

    def __init__(self) -> None:
        """Nothing is declared."""

    def add_activations(self, name: str, type: TensorType) -> None:
        """Not kept."""

    def add_bytes(self, name: str, nbytes: int) -> None:
        """Not kept."""
