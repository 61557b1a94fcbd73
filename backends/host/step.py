"""A die's whole step as one exported function of its library, `step`: kernels are called from compiled code.

    step(inputs.., outputs.., weights, workspace, exchange, context)

`inputs`: the entry point's arguments in their order, caches included, which are written in place.  `outputs`: its
results that are not caches.  `weights`: addresses of the tensors that the program names (`ty.global`), in the order of
the file, i64 [n].  `workspace`: bytes for what lives between kernels, u8, of any content, beginning at a multiple of
64; how many says `step_workspace_bytes()`.  `step_program()` says of which program the step is
(`tyir.execution.step_identity`), `step_weights()` where the names of its weights are: `int64_t` how many, and as many
`const char *`.  Tensors are `DLTensor*`, contiguous, on the CPU.

Where no row of the results is wanted (all of the input `row` negative), what stands behind the layers is not computed
and the outputs stay as they are (`tyir.execution.optional_tail`).

Where dies meet, the step calls `exchange`, a C function of its caller's, with `context`:

    int32_t exchange(void *context, int32_t site, const void *operand, void *result)

`site` is the number of the collective among those of the program's text, from 0 on; `operand` is null for a die that
has nothing to give, `result` for a send.  It returns when `result` is there.  Programs without collectives never call
it, so that both may be null.

**Code and tables.**  The code is `step.c`, the same for every program: it walks tables that are data of the library
(`tables_of`), so that no compiler sees how many layers a model has.  A function of the IR is a table of rows, each a
kernel, a function, a site, or the end of a step that wants no row, with references to what it is given:

    given * 4          number `given` of the pointers that the function was called with
    offset * 4 + 1     a place in its frame
    weight * 4 + 2     a weight by its number among the addresses
    3                  nothing

Values of a function lie in a frame of the workspace, at offsets chosen here; behind them is room for the pointers of
the functions that it calls, whose frames begin where their caller's ends.
"""  # noqa: E501

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call, Func, Return
from tyir.dialects.ty import GetGlobal, Reshape, tensor_type
from tyir.execution.entry_points import arguments
from tyir.execution.meetings import collectives_of
from tyir.execution.optional_tail import optional_tail
from tyir.execution.step_identity import step_identity
from tyir.execution.storage import packed_shape
from tyir.ir import Op, Value
from tyir.traits import Collective, InPlace
from tyir.types import TensorType, storage_dtype

__all__ = ["Program", "array", "kernel_symbol", "section", "step_code", "tables_of"]

_ALIGNMENT: Final = 64  # of values in the workspace: a cache line
_POINTER: Final = 8  # bytes
_KERNEL, _CALL, _MEET, _WANTED = 1, 2, 3, 4  # what a row does; 0 ends a table
_GIVEN, _LOCAL, _WEIGHT, _NOTHING = range(4)  # what a reference is
_FEW: Final = 16  # pointers that every step's code passes to a kernel
_CODE: Final = Path(__file__).with_name("step.c")
_DLPACK_CODES: Final = {"i": 0, "u": 1, "f": 2, "b": 6}  # dlpack.h


def kernel_symbol(name: str) -> str:
    """What a kernel is called in its object file: a function of pointers to operands and then results."""
    return f"tyir_{name}"


def bytes_of(type: TensorType) -> int:
    """Bytes of a tensor as it is stored."""
    return int(np.prod(packed_shape(type), dtype=np.int64)) * storage_dtype(type.element).itemsize


@dataclass(frozen=True)
class Program:
    """What is to be one step: `functions`, each after those that it calls, the entry last; `weights`: the
    tensors that they name with their types, in the order of their addresses.
    """

    functions: tuple[Func, ...]
    weights: tuple[tuple[str, TensorType], ...]

    @functools.cached_property
    def identity(self) -> int:
        """What a library says of which program its step is."""
        return step_identity(self.functions, self.weights)

    @functools.cached_property
    def frames(self) -> dict[str, _Frame]:
        """Where each function's values lie."""
        frames: dict[str, _Frame] = {}
        for function in self.functions:
            frames[str(function.sym_name)] = _Frame(function, frames)
        return frames

    @property
    def entry(self) -> _Frame:
        """That of the function which the step begins with."""
        return self.frames[str(self.functions[-1].sym_name)]

    @property
    def workspace_bytes(self) -> int:
        """The pointers of the entry, its frame, and the largest chain of frames below it."""
        return self.entry.pointer_bytes + self.entry.total

    def collectives(self) -> list[Op]:
        """The ops where dies meet, in the order of their numbers."""
        return collectives_of(self.functions)


# ---------------------------------------------------------------------------------------------------- frames


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass
class _Memory:
    """Offsets for values that come and go, lowest first."""

    size: int = 0
    taken: list[tuple[int, int]] = field(default_factory=list)  # sorted (first, end)

    def take(self, size: int) -> int:
        size = _aligned(size)
        offset = 0
        for first, end in self.taken:
            if offset + size <= first:
                break
            offset = end
        self.taken = sorted([*self.taken, (offset, offset + size)])
        self.size = max(self.size, offset + size)
        return offset

    def give_back(self, offset: int) -> None:
        self.taken = [t for t in self.taken if t[0] != offset]


class _Frame:
    """Where the values of a function lie: `root` of a value is the value whose memory it shares, `offsets`
    are those of roots in its frame, `returned` the numbers of roots that the caller has memory for.

    `given`: number of a root among the pointers that the function is called with.  `pointers`: where those
    of the functions that it calls go.  Bytes: `size` of the frame, `total` with the frames below it.
    """

    def __init__(self, function: Func, frames: Mapping[str, _Frame]) -> None:
        self.function = function
        self.root: dict[Value, Value] = {v: v for v in function.args}
        self.offsets: dict[Value, int] = {}
        self.returned: dict[Value, int] = {}
        given = function.body.terminator.operands
        for op in function.body:
            for index, value in enumerate(op.results):
                shared = _shared_operand(op, index, frames)
                self.root[value] = value if shared is None else self.root[shared]
        for number, value in enumerate(given):
            root = self.root[value]
            if root in function.args:
                continue
            if root in self.returned or isinstance(root.op, GetGlobal):
                raise TyirError(f"@{function.sym_name} returns one tensor twice, or a weight")
            self.returned[root] = number
        self.given = {v: i for i, v in enumerate((*function.args, *self.made()))}
        self.pointer_bytes = _aligned(_POINTER * len(self.given))
        below = [frames[op.callee.leaf] for op in function.body if isinstance(op, Call)]
        self.pointers = self._place()
        self.size = self.pointers + max((f.pointer_bytes for f in below), default=0)
        self.total: int = self.size + max((f.total for f in below), default=0)

    def _place(self) -> int:
        last: dict[Value, Op] = {}
        for op in self.function.body:
            for value in op.operands:
                last[self.root[value]] = op
        memory = _Memory()
        for op in self.function.body:
            own = [v for v in op.results if self.root[v] is v and v not in self.returned]
            if not isinstance(op, GetGlobal):
                self.offsets.update((v, memory.take(bytes_of(tensor_type(v)))) for v in own)
            ended = {self.root[v] for v in (*op.operands, *op.results) if last.get(self.root[v], op) is op}
            for value in ended & self.offsets.keys():
                memory.give_back(self.offsets[value])
        return memory.size

    def alias(self, number: int) -> int | None:
        """The argument that result `number` is; None for one of its own."""
        root = self.root[self.function.body.terminator.operands[number]]
        return list(self.function.args).index(root) if root in self.function.args else None

    def made(self) -> list[Value]:
        """The results that the caller has memory for, in their order."""
        return sorted(self.returned, key=lambda v: self.returned[v])


def _shared_operand(op: Op, index: int, frames: Mapping[str, _Frame]) -> Value | None:
    """The operand whose memory a result is."""
    if isinstance(op, Reshape) or op.has_trait(InPlace):
        return op.operands[0]
    if isinstance(op, Call) and (alias := frames[op.callee.leaf].alias(index)) is not None:
        return op.operands[alias]
    return None


# ---------------------------------------------------------------------------------------------------- tables


def tables_of(program: Program) -> str:
    """The tables of a program, in the assembler's language: what `step.c` declares at its top."""
    frames, functions = program.frames, program.functions
    order = {name: number for number, (name, _) in enumerate(program.weights)}
    sites = {op: number for number, op in enumerate(program.collectives())}
    labels = {str(f.sym_name): f"tyir_step_{number}" for number, f in enumerate(functions[:-1])}
    labels[str(functions[-1].sym_name)] = "tyir_step_entry"
    tables = _Tables(frames, order, sites, labels)
    tensors = [*_tensors_of(program, program.entry)]
    sizes = [program.workspace_bytes, program.entry.pointer_bytes, program.identity, len(tensors), len(sites)]
    data = [
        array("tyir_step_sizes", sizes),
        array("tyir_step_tensors", [n for t in tensors for n in t.numbers()]),
        array("tyir_step_names", [f".Lname{number}" for number in range(len(tensors))]),
        array("tyir_step_weights", [len(order), *(f".Lweight{number}" for number in order.values())]),
        *(array(labels[name], [*tables.rows(frame)]) for name, frame in frames.items()),
        *(_text(f".Lname{number}", str(t)) for number, t in enumerate(tensors)),
        *(_text(f".Lweight{number}", name) for name, number in order.items()),
    ]
    return section(data)


def section(data: Sequence[str]) -> str:
    """A file of the assembler's language with data that only the loader writes."""
    return "".join(('\t.section .data.rel.ro,"aw"\n', *data, '\t.section .note.GNU-stack,"",%progbits\n'))


def _text(label: str, text: str) -> str:
    """A C string; whatever is not plain ASCII is spelled byte by byte."""
    bytes_ = text.encode()
    plain = "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in bytes_)
    return f'{label}:\n\t.asciz "{plain}"\n'


def array(label: str, words: Sequence[int | str]) -> str:
    """Words of 8 bytes, which the library calls `label`: numbers, or addresses of what is called so."""
    lines = (", ".join(map(str, words[i : i + 8])) for i in range(0, len(words), 8))
    body = "".join(f"\t.quad {line}\n" for line in lines)
    return f"\t.balign 8\n\t.globl {label}\n\t.hidden {label}\n{label}:\n{body}"


@dataclass(frozen=True)
class _Tables:
    """Makes the rows of functions."""

    frames: Mapping[str, _Frame]
    order: Mapping[str, int]
    sites: Mapping[Op, int]
    labels: Mapping[str, str]

    def rows(self, frame: _Frame) -> Iterator[int | str]:
        """The words of a function's table."""
        tail = optional_tail(frame.function)
        for op in frame.function.body:
            if tail and op is tail[0]:
                yield from self._wanted(frame)
            if not isinstance(op, (Return, Reshape, GetGlobal)):
                yield from self._row(frame, op)
        yield 0

    def _wanted(self, frame: _Frame) -> Iterator[int | str]:
        """What ends the step before its tail, where no row is wanted."""
        (row,) = arguments(frame.function, "row")
        yield from (_WANTED, tensor_type(row).static_shape[0], 1, 0, 0, self._reference(frame, row))

    def _row(self, frame: _Frame, op: Op) -> Iterator[int | str]:
        what: tuple[int, int | str]
        pointers = end = 0
        references = [self._reference(frame, value) for value in op.operands]
        if isinstance(op, Call):
            callee = self.frames[op.callee.leaf]
            what, pointers, end = (_CALL, self.labels[op.callee.leaf]), frame.pointers, frame.size
            results = [op.results[callee.returned[v]] for v in callee.made()]
        elif op.has_trait(Collective):
            what, results = (_MEET, self.sites[op]), list(op.results[:1])
            references = references[:1] or [_NOTHING]
        else:
            name = op.attributes.get("tyir.kernel")
            assert isinstance(name, StringAttr), f"{op.name} has no kernel"
            what = (_KERNEL, kernel_symbol(name.value))
            results = [] if op.has_trait(InPlace) else list(op.results)
        references += [self._reference(frame, value) for value in results]
        if what[0] == _MEET and not results:
            references.append(_NOTHING)
        yield from (*what, len(references), pointers, end, *references)

    def _reference(self, frame: _Frame, value: Value) -> int:
        root = frame.root[value]
        if root in frame.given:
            return frame.given[root] * 4 + _GIVEN
        if isinstance(root.op, GetGlobal):
            return self.order[root.op.symbol.leaf] * 4 + _WEIGHT
        return frame.offsets[root] * 4 + _LOCAL


@dataclass(frozen=True)
class _Argument:
    """A tensor among the arguments of a step; written as messages call it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def numbers(self) -> list[int]:
        """DLPack's code and bits, dimensions, extents."""
        return [_DLPACK_CODES[self.dtype.kind], self.dtype.itemsize * 8, len(self.shape), *self.shape]

    def __str__(self) -> str:
        extents = ", ".join(map(str, self.shape))
        return f"{self.name}, {self.dtype.name} [{extents}]"


def _tensors_of(program: Program, entry: _Frame) -> Iterator[_Argument]:
    function = entry.function
    for number, value in enumerate(entry.given):
        t = tensor_type(value)
        attributes = (
            function.arg_attr(number)
            if number < len(function.args)
            else function.res_attr(entry.returned[value])
        )
        name = attributes.get("tyir.name")
        called = name.value if isinstance(name, StringAttr) else "the tensor"
        known = "".join(c if (c.isalnum() and c.isascii()) or c in "_.-" else "_" for c in called)
        yield _Argument(known, packed_shape(t), storage_dtype(t.element))
    yield _Argument("the addresses of weights", (max(len(program.weights), 1),), np.dtype(np.int64))
    yield _Argument("the workspace", (program.workspace_bytes,), np.dtype(np.uint8))


# ------------------------------------------------------------------------------------------------------ code


def step_code(program: Program) -> str:
    """The C code that walks the tables: the same for every program whose kernels take few tensors."""
    counts = (
        len(op.operands) + len(op.results)
        for f in program.functions
        for op in f.walk()
        if "tyir.kernel" in op.attributes
    )
    most = max(_FEW, *counts, 0)
    cases = (
        f"case {n}: return ((int32_t (*)({', '.join(['void *'] * n)}))kernel)"
        f"({', '.join(f'p[{i}]' for i in range(n))});"
        for n in range(1, most + 1)
    )
    lines = " \\\n".join(cases)
    return f"#define MOST {most}\n#define CASES \\\n{lines}\n\n{_CODE.read_text()}"
