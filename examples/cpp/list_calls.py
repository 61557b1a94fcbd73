"""Writes what a step of one die calls, as a list that a C++ program can follow: `python list_calls.py OUT/1die 1 > step.txt`.

The compiled library holds kernels and no step: the order of the calls is the program beside it, `llm_die0.ir`.
Here it is walked once, calls of layers followed, and every value given a number:

    tensor NUMBER CODE BITS DIMS.. ; where it lies     weight FILE OFFSET | input NAME | cache NAME | scratch | same NUMBER
    call KERNEL NUMBERS..                              operands, then results; in-place ops have operands only
    output NUMBER
"""  # noqa: E501

from __future__ import annotations

import sys
from pathlib import Path

from tyir import Op, Value, parse_file
from tyir.attributes import StringAttr
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func, Return
from tyir.dialects.ty import GetGlobal, Global, Reshape, tensor_type
from tyir.execution.storage import packed_shape
from tyir.traits import InPlace
from tyir.types import TensorType, storage_dtype

CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's


class Calls:
    """The tensors and calls of one entry function."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.count = 0
        self.weights: dict[str, int] = {}

    def tensor(self, type: TensorType, where: str) -> int:
        dtype = storage_dtype(type.element)
        dims = " ".join(map(str, packed_shape(type)))
        print(f"tensor {self.count} {CODES[dtype.kind]} {dtype.itemsize * 8} {dims} ; {where}")
        self.count += 1
        return self.count - 1

    def function(self, function: Func, arguments: list[int]) -> list[int]:
        """The numbers of what it returns."""
        known: dict[Value, int] = dict(zip(function.args, arguments))
        for op in function.body:
            operands = [known[value] for value in op.operands]
            if isinstance(op, Return):
                return operands
            known.update(zip(op.results, self.results(op, operands)))
        raise AssertionError("a function ends with func.return")

    def results(self, op: Op, operands: list[int]) -> list[int]:
        if isinstance(op, Call):
            callee = self.module.lookup(op.callee.leaf)
            assert isinstance(callee, Func)
            return self.function(callee, operands)
        if isinstance(op, GetGlobal):
            return [self.weight(op.symbol.leaf)]
        if isinstance(op, Reshape):
            return [self.tensor(tensor_type(op.results[0]), f"same {operands[0]}")]
        kernel = op.attributes.get("tyir.kernel")
        if not isinstance(kernel, StringAttr):
            sys.exit(f"error: {op.name} is no kernel: this example runs one die, which meets no other")
        made = (
            operands[:1]
            if op.has_trait(InPlace)
            else [self.tensor(tensor_type(r), "scratch") for r in op.results]
        )
        numbers = operands if op.has_trait(InPlace) else operands + made
        print("call", kernel.value, *numbers)
        return made

    def weight(self, name: str) -> int:
        if name not in self.weights:
            stored = self.module.lookup(name)
            assert isinstance(stored, Global)
            self.weights[name] = self.tensor(stored.type, f"weight {stored.file} {stored.offset}")
        return self.weights[name]


def main(folder: Path, seqlen: str) -> None:
    module = parse_file(folder / "batch_1" / f"seqlen_{seqlen}" / "llm_die0.ir")
    (die,) = [op for op in module.body if isinstance(op, Module)] or [module]
    entry = die.lookup(f"main_s{seqlen}")
    assert isinstance(entry, Func)
    calls = Calls(die)
    arguments = []
    for argument, said in zip(entry.args, entry.arg_attrs):
        role, name = (said[key].value for key in ("tyir.role", "tyir.name"))
        where = f"cache {name}" if role == "cache" else f"input {name}"
        arguments.append(calls.tensor(argument.type, where))
    print("output", calls.function(entry, arguments)[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
