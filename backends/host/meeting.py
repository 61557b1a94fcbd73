"""How dies of one process run and meet in compiled code, without Python between the parts of their steps.

A library whose program meets others has (`meeting.c`), under TVM FFI's calling convention:

    meeting_sites() -> sites                      where its program meets others
    meeting(workers, looks, sites..) -> meeting   of dies with these sites, in their order; `workers` divides them:
                                                  neighbouring dies share one
    meeting_context(meeting, die) -> context      what `exchange` is to be called with by the die's step
    meeting_exchange() -> exchange
    meeting_step(meeting, die, step, arguments, count)   what is to run: a function, and TVMFFIAny's that the caller keeps
    meeting_run(meeting, worker)                  takes a worker's dies through their steps, and raises what one of them
                                                  raises; each worker is run once for a step of all, in a thread of its own
    meeting_failed(meeting) -> die                that has failed, -1 for none
    meeting_give_up(meeting)                      nobody waits any more; such a meeting is of no further use
    meeting_end(meeting)                          gives its memory back

Each die runs on a stack of its own: where it must wait for others, the next one of its worker goes on.  Only a worker
none of whose dies can go on looks `looks` times and then sleeps (futex(2)).

The last die that comes to a collective makes the results of all, in the order of dies and with the roundings of the
op's `combine`.  A send copies into its place and does not wait, unless what it sent before is still there.

`meeting.c` is the same for every program.  What is a program's own are its sites, which are data, and the sums, which
are TensorIR: one for each size and type.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tvm.ir import Call, GlobalVar, IRModule, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import Buffer, Cpu, Expr, bind, f32, lanes_for, load, loop, store
from tyir.backends.host.step import array, section
from tyir.dialects import dist
from tyir.dialects.ty import tensor_type
from tyir.execution.lockstep import Layout, Recv, Request, Send
from tyir.execution.meetings import request_of
from tyir.execution.storage import packed_shape
from tyir.ir import Op, Value
from tyir.types import storage_dtype

__all__ = ["CODE", "knows_system", "sites_of", "sum_functions", "sums_of"]

CODE: Final = Path(__file__).with_name("meeting.c")
_SUM, _JOIN, _SEND, _RECEIVE = range(4)  # what a site is
_MOST: Final = 1 << 20  # dies: nobody counts them here
_BLOCK: Final = 128  # numbers that are added together: their sums are on the stack


def knows_system(triple: str) -> bool:
    """Whether dies can meet in compiled code on the system of LLVM's name: Linux with glibc."""
    return "linux-gnu" in triple


def _layout(value: Value) -> Layout:
    t = tensor_type(value)
    return Layout(packed_shape(t), storage_dtype(t.element))


# ----------------------------------------------------------------------------------------------------- sites


def sites_of(sites: Sequence[Op]) -> str:
    """The table of a program's sites in the order of their numbers, in the assembler's language."""
    words: list[int | str] = [len(sites)]
    others: list[str] = []
    for number, op in enumerate(sites):
        request = request_of(op)
        kind, size, tag, dies = _passed(op, request)
        named: int | str = 0
        if dies:
            named = f"tyir_dies_{number}"
            others.append(array(named, dies))
        combine: int | str = 0
        if isinstance(op, dist.AllReduce):
            combine = _sum_symbol(_layout(op.out))
        elif isinstance(op, dist.AllGather):
            combine = f"tyir_join_{number}"
            others.append(array(combine, _joined(op)))
        words += (kind, size, tag, len(dies), named, combine)
    return section([array("tyir_sites", words), *others])


def _passed(op: Op, request: Request) -> tuple[int, int, int, tuple[int, ...]]:
    """Kind, bytes, tag and dies of a site."""
    if isinstance(request, Send):
        return _SEND, _layout(op.operands[0]).nbytes, request.tag, tuple(request.targets)
    if isinstance(request, Recv):
        return _RECEIVE, _layout(op.results[0]).nbytes, request.tag, (request.source,)
    return (_SUM if isinstance(op, dist.AllReduce) else _JOIN), 0, 0, tuple(request.dies)


def _joined(op: dist.AllGather) -> list[int]:
    """Rows, then bytes of a row of each member."""
    layout, axis = _layout(op.out), op.axis
    inner = math.prod(layout.shape[axis + 1 :]) * layout.dtype.itemsize
    return [math.prod(layout.shape[:axis]), *(size * inner for size in op.sizes)]


# ------------------------------------------------------------------------------------------------------ sums


def _sum_symbol(layout: Layout) -> str:
    return f"tyir_sum_{math.prod(layout.shape)}_{layout.dtype.name}"


def sums_of(sites: Sequence[Op]) -> dict[str, Layout]:
    """The sums that a program's sites need, by what they are called."""
    layouts = [_layout(op.out) for op in sites if isinstance(op, dist.AllReduce)]
    return {_sum_symbol(layout): layout for layout in layouts}


def sum_functions(symbol: str, layout: Layout, cpu: Cpu) -> IRModule:
    """Functions of which `symbol` is seen outside: of the addresses of all operands, 0 of a die that gives
    nothing, of those of all results, and of how many there are of each.

    Added in f32 in the order of dies and rounded once, a block of numbers at a time.
    """
    size, dtype = math.prod(layout.shape), layout.dtype.name
    block = lanes_for(_BLOCK, size)
    lanes = lanes_for(cpu.lanes, block)
    add, put, whole = (GlobalVar(f"{symbol}{end}") for end in ("_add", "_put", ""))

    def tensors() -> tuple[Buffer, Buffer, Expr]:
        total, numbers = T.arg("total", T.handle("float32")), T.arg("numbers", T.handle(dtype))
        first = T.arg("first", T.int32())
        return (
            T.decl_buffer((block,), "float32", data=total),
            T.decl_buffer((size,), dtype, data=numbers, align=layout.dtype.itemsize),
            first,
        )

    def added() -> None:
        total, numbers, first = tensors()
        with T.serial(0, block // lanes) as i:
            value = load(total, [i * lanes], lanes) + load(numbers, [first + i * lanes], lanes)
            store(total, [i * lanes], value, lanes)

    def rounded() -> None:
        total, numbers, first = tensors()
        with T.serial(0, block // lanes) as i:
            store(numbers, [first + i * lanes], load(total, [i * lanes], lanes), lanes)

    def summed() -> None:
        T.func_attr({"symbol": symbol})
        pointers = [T.arg(name, T.handle("int64")) for name in ("operands", "results")]
        members = T.arg("members", T.int32())
        operands, results = (T.decl_buffer((_MOST,), "int64", data=p) for p in pointers)
        with loop(size // block, cpu, size * 4) as number:
            total = T.alloc_buffer((block,), "float32")
            with T.serial(0, block // lanes) as i:
                store(total, [i * lanes], f32(-0.0, lanes), lanes)  # that much leaves every number as it is
            first = bind(number * block)
            with T.serial(0, members) as i, T.If(operands[i] != T.int64(0)), T.Then():
                T.evaluate(Call(add, [total.data, _pointer(operands[i]), first], ret_ty="int32"))
            with T.serial(0, members) as i:
                T.evaluate(Call(put, [total.data, _pointer(results[i]), first], ret_ty="int32"))

    return IRModule({add: _function(added), put: _function(rounded), whole: _function(summed)})


def _function(emit: Callable[[], None]) -> Any:
    """A function that others of this object call."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True})
        T.func_ret(PrimType("int32"))
        emit()
        T.Return(T.int32(0))
    return builder.get()


def _pointer(address: Expr) -> Expr:
    return T.reinterpret("handle", address)
