"""Which program a compiled step is of: a number that the library says and that the IR beside it gives.

A step takes its weights by address alone, so that a library beside the program of another build would read
past their ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from tyir.dialects.func import Func
from tyir.ir import Op
from tyir.text.attribute_printer import AttributeText
from tyir.types import Type

__all__ = ["step_identity"]


def step_identity(functions: Sequence[Func], weights: Iterable[tuple[str, Type]]) -> int:
    """Of the functions of a step, the entry last, and its weights in their addresses' order: 63 bits."""
    digest, text = hashlib.sha256(), AttributeText()
    for line in (*_lines(functions, text), *(f"{name} {text(type)}" for name, type in weights)):
        digest.update(line.encode() + b"\n")
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _lines(functions: Sequence[Func], text: AttributeText) -> Iterator[str]:
    for function in functions:
        numbers: dict[object, int] = {}
        yield f"{function.sym_name} {[text(a.type) for a in function.args]}"
        for value in function.args:
            numbers[value] = len(numbers)
        for op in function.body:
            taken = [numbers[value] for value in op.operands]
            numbers.update((value, len(numbers) + i) for i, value in enumerate(op.results))
            yield _line(op, taken, text)


def _line(op: Op, taken: Sequence[int], text: AttributeText) -> str:
    types = [text(value.type) for value in (*op.operands, *op.results)]
    kernel = op.attributes.get("tyir.kernel")
    named = None if kernel is None else text(kernel)
    return f"{op.name} {taken} {types} {text(op.properties)} {named}"
