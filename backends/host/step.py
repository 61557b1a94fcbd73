"""A die's whole step as one exported function of its library, `step`: kernels are called from compiled code.

    step(inputs.., outputs.., weights, workspace, exchange, context)

`inputs`: the entry point's arguments in their order, caches included, which are written in place.  `outputs`: its
results that are not caches.  `weights`: addresses of the tensors that the program names (`ty.global`), in the order of
the file, i64 [n].  `workspace`: bytes for what lives between kernels, u8, of any content, beginning at a multiple of
64; how many says a second function, `step_workspace_bytes()`; a third, `step_program()`, says of
which program the step is (`tyir.execution.step_identity`).  Tensors are `DLTensor*`, contiguous, on the CPU.

Where dies meet, the step calls `exchange`, a C function of its caller's, with `context`:

    int32_t exchange(void *context, int32_t site, const void *operand, void *result)

`site` is the number of the collective among those of the program's text, from 0 on; `operand` is null for a die that
has nothing to give, `result` for a send.  It returns when `result` is there.  Programs without collectives never call
it, so that both may be null.

A function of the IR becomes a function of the library: kernels, layers and the entry take pointers and call each
other directly.  Values of a function lie in a frame of the workspace, at offsets chosen here; a called function's
frame begins where its caller's ends.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from tvm.ir import Call as TirCall
from tvm.ir import GlobalVar, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call, Func, Return
from tyir.dialects.ty import GetGlobal, Reshape, tensor_type
from tyir.execution.meetings import collectives_of
from tyir.execution.step_identity import step_identity
from tyir.execution.storage import packed_shape
from tyir.ir import Op, Value
from tyir.traits import Collective, InPlace
from tyir.types import TensorType, storage_dtype

__all__ = ["PROGRAM", "STEP", "WORKSPACE_BYTES", "Program", "kernel_symbol", "step_of"]

STEP: Final = "step"
WORKSPACE_BYTES: Final = "step_workspace_bytes"
PROGRAM: Final = "step_program"
_ALIGNMENT: Final = 64  # of values in the workspace: a cache line

# What TensorIR cannot say: a call through a pointer, and a pointer out of an address.
_HELPERS: Final = """
define i32 @tyir_exchange(ptr %function, ptr %context, i32 %site, ptr %operand, ptr %result) alwaysinline {
  %code = call i32 %function(ptr %context, i32 %site, ptr %operand, ptr %result)
  ret i32 %code
}
define ptr @tyir_pointer(i64 %address) alwaysinline {
  %pointer = inttoptr i64 %address to ptr
  ret ptr %pointer
}
"""


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

    def identity(self) -> int:
        """What a library says of which program its step is."""
        return step_identity(self.functions, self.weights)

    def frames(self) -> dict[str, _Frame]:
        """Where each function's values lie."""
        frames: dict[str, _Frame] = {}
        for function in self.functions:
            frames[str(function.sym_name)] = _Frame(function, frames)
        return frames

    def workspace_bytes(self) -> int:
        """The entry's frame and the largest of those that it calls."""
        *inner, entry = self.frames().values()
        return max(entry.size + max((frame.size for frame in inner), default=0), _ALIGNMENT)

    def collectives(self) -> list[Op]:
        """The ops where dies meet, in the order of their numbers."""
        return collectives_of(self.functions)


# ---------------------------------------------------------------------------------------------------- frames


@dataclass
class _Memory:
    """Offsets for values that come and go, lowest first."""

    size: int = 0
    taken: list[tuple[int, int]] = field(default_factory=list)  # sorted (first, end)

    def take(self, size: int) -> int:
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
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
    are those of roots in the workspace, `returned` of roots that the caller has memory for.
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
        self.size = self._place()

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


# ------------------------------------------------------------------------------------------------- functions


class _Emitter:
    """Emits the calls of one function's body."""

    def __init__(self, step: _Step, frame: _Frame, known: dict[Value, Any], caller: tuple[Any, ...]) -> None:
        self.step, self.frame, self.known = step, frame, known
        self.workspace, self.exchange, self.context = caller

    def body(self) -> None:
        for op in self.frame.function.body:
            if not isinstance(op, Return):
                self._op(op)

    def pointer(self, value: Value) -> Any:
        root = self.frame.root[value]
        if root not in self.known:
            self.known[root] = T.Bind(T.address_of(self.workspace[self.frame.offsets[root]]))
        return self.known[root]

    def _op(self, op: Op) -> None:
        if isinstance(op, Reshape):
            return
        if isinstance(op, GetGlobal):
            self.known[op.results[0]] = self.step.weight(op.symbol.leaf)
        elif isinstance(op, Call):
            self._call(op)
        elif op.has_trait(Collective):
            self._collective(op)
        else:
            self._kernel(op)

    def _kernel(self, op: Op) -> None:
        name = op.attributes.get("tyir.kernel")
        assert isinstance(name, StringAttr), f"{op.name} has no kernel"
        values = (*op.operands, *(() if op.has_trait(InPlace) else op.results))
        T.evaluate(T.call_extern("int32", kernel_symbol(name.value), *(self.pointer(v) for v in values)))

    def _call(self, op: Call) -> None:
        frame = self.step.frames[op.callee.leaf]
        results = [op.results[frame.returned[v]] for v in frame.made()]
        rest = T.address_of(self.workspace[self.frame.size])
        pointers = [self.pointer(v) for v in (*op.operands, *results)]
        _call(self.step.names[op.callee.leaf], [*pointers, rest, self.exchange, self.context])

    def _collective(self, op: Op) -> None:
        nothing = T.reinterpret("handle", T.uint64(0))
        operand = self.pointer(op.operands[0]) if op.operands else nothing
        result = self.pointer(op.results[0]) if op.results else nothing
        site = T.int32(self.step.sites[op])
        T.evaluate(
            T.call_extern("int32", "tyir_exchange", self.exchange, self.context, site, operand, result)
        )


def _call(function: GlobalVar, pointers: Sequence[Any]) -> None:
    T.evaluate(TirCall(function, list(pointers), ret_ty="int32"))


class _Step:
    """The functions of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = {name: number for number, (name, _) in enumerate(program.weights)}
        *self.functions, self.entry = program.functions
        self.frames = program.frames()
        self.names = {str(f.sym_name): GlobalVar(f"tyir_{f.sym_name}") for f in self.functions}
        self.sites = {op: number for number, op in enumerate(program.collectives())}
        self.table: Any = None

    def weight(self, name: str) -> Any:
        return T.Bind(T.call_extern("handle", "tyir_pointer", self.table[self.order[name]]))

    def build(self) -> dict[GlobalVar, Any]:
        made = {self.names[str(f.sym_name)]: self._inner(f) for f in self.functions}
        said = {WORKSPACE_BYTES: self.program.workspace_bytes(), PROGRAM: self.program.identity()}
        numbers = {GlobalVar(name): _number(name, value) for name, value in said.items()}
        return {**made, GlobalVar(STEP): self._outer(), **numbers}

    def _inner(self, function: Func) -> Any:
        frame = self.frames[str(function.sym_name)]
        with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
            T.func_ret(PrimType("int32"))
            known = {
                v: T.arg(f"p{i}", T.handle(storage_dtype(tensor_type(v).element).name))
                for i, v in enumerate((*function.args, *frame.made()))
            }
            space = T.arg("workspace", T.handle("uint8"))
            caller = (T.arg("exchange", T.handle()), T.arg("context", T.handle()))
            workspace = T.decl_buffer((max(frame.size, 1) + 1,), "uint8", data=space)
            _Emitter(self, frame, known, (workspace, *caller)).body()
            T.Return(T.int32(0))
        return builder.get()

    def _outer(self) -> Any:
        frame = self.frames[str(self.entry.sym_name)]
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name(STEP)
            T.func_attr({"global_symbol": STEP})
            known: dict[Value, Any] = {}
            for number, value in enumerate((*self.entry.args, *frame.made())):
                t = tensor_type(value)
                dtype = storage_dtype(t.element)
                buffer = T.arg(f"p{number}", T.buffer(packed_shape(t), dtype.name, align=dtype.itemsize))
                known[value] = buffer.data
            self.table = T.arg("weights", T.buffer((max(len(self.order), 1),), "int64", align=8))
            workspace = T.arg("workspace", T.buffer((self.program.workspace_bytes(),), "uint8"))
            caller = (T.arg("exchange", T.handle()), T.arg("context", T.handle()))
            with T.attr(T.int32(0), "pragma_import_llvm", _HELPERS):
                _Emitter(self, frame, known, (workspace, *caller)).body()
        return builder.get()


def _number(name: str, value: int) -> Any:
    """An exported function that returns a number."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name})
        T.Return(T.int64(value))
    return builder.get()


def step_of(program: Program) -> dict[GlobalVar, Any]:
    """The functions of a program's step; `STEP`, `WORKSPACE_BYTES` and `PROGRAM` are exported."""
    return _Step(program).build()
