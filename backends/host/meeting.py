"""How dies of one process run and meet in compiled code, without Python between the parts of their steps.

    int32_t exchange(void *context, int32_t site, const void *operand, void *result)      `EXCHANGE`
    int32_t run(void *worker)                                                             `RUN`

`run` takes a thread's dies through their steps, each on a stack of its own: where a die must wait for others, the
next one goes on.  Only a worker none of whose dies can go on looks some times and then sleeps (futex(2)).
`exchange` is the one that those steps are to be given; memory for both is laid out as `tyir.execution.meetings` says.

The last die that comes to a collective makes the results of all, in the order of dies and with the roundings of the
op's `combine`.  A send copies into its place and does not wait, unless what it sent before is still there.

Loads and stores that threads share are atomic and sequentially consistent: a worker that is about to sleep has
counted itself before the system compares the number of events, and whoever wakes has counted that up before looking
at who sleeps.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tvm.ir import Call, GlobalVar, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Expr,
    bind,
    f32,
    lanes_for,
    load,
    loop,
    store,
)
from tyir.dialects import dist
from tyir.dialects.ty import tensor_type
from tyir.execution.lockstep import Layout, Recv, Request, Send
from tyir.execution.meetings import EXCHANGE, FIRST_SITE, PLACE_HEAD, RUN, WORDS, request_of, site_words
from tyir.execution.storage import packed_shape
from tyir.ir import Op, Value
from tyir.types import storage_dtype

__all__ = ["EXCHANGE", "RUN", "knows_system", "meeting_of"]

_BEGIN: Final = "tyir_begin"
_MOST: Final = 1 << 20  # dies: nobody counts them here
_BLOCK: Final = 128  # numbers that are added together: their sums are on the stack

# By the first word of LLVM's triple: the number of futex(2), and the instruction of a loop that waits.
_SYSTEMS: Final = {"x86_64": (202, "pause"), "aarch64": (98, "yield")}

_HELPERS: Final = """
declare i64 @syscall(i64, ...)
declare i32 @getcontext(ptr)
declare void @makecontext(ptr, ptr, i32, ...)
declare i32 @swapcontext(ptr, ptr)
declare i32 @{begin}(ptr)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define ptr @tyir_at(i64 %address) alwaysinline {{
  %pointer = inttoptr i64 %address to ptr
  ret ptr %pointer
}}

define ptr @tyir_words(ptr %place, i64 %number) alwaysinline {{
  %pointer = getelementptr i64, ptr %place, i64 %number
  ret ptr %pointer
}}

define void @tyir_copy(ptr %target, ptr %source, i64 %bytes) alwaysinline {{
  call void @llvm.memcpy.p0.p0.i64(ptr %target, ptr %source, i64 %bytes, i1 false)
  ret void
}}

; Returns when *word is not `old`, or the group has given up; until then other dies of the worker go on.
define internal void @tyir_wait(ptr %worker, ptr %word, i32 %old) noinline {{
start:
  %group = load ptr, ptr %worker
  %die.at = getelementptr i64, ptr %worker, i64 {current}
  %die = load ptr, ptr %die.at
  %own = load ptr, ptr %die
  %main.at = getelementptr i64, ptr %worker, i64 {main}
  %main = load ptr, ptr %main.at
  %word.at = getelementptr i64, ptr %die, i64 {word}
  %old.at = getelementptr i64, ptr %die, i64 {old}
  br label %look
look:
  %seen = load atomic i32, ptr %word seq_cst, align 4
  %unchanged = icmp eq i32 %seen, %old
  br i1 %unchanged, label %still, label %on
still:
  %given.up = load atomic i32, ptr %group seq_cst, align 4
  %waiting = icmp eq i32 %given.up, 0
  br i1 %waiting, label %leave, label %on
leave:
  store ptr %word, ptr %word.at
  store i32 %old, ptr %old.at
  %code = call i32 @swapcontext(ptr %own, ptr %main)
  br label %look
on:
  ret void
}}

; Sets *word and wakes the workers that sleep.
define internal void @tyir_set(ptr %group, ptr %word, i32 %value) noinline {{
  store atomic i32 %value, ptr %word seq_cst, align 4
  %event = getelementptr i32, ptr %group, i64 2
  %events = atomicrmw add ptr %event, i32 1 seq_cst
  %sleepers = getelementptr i32, ptr %group, i64 1
  %count = load atomic i32, ptr %sleepers seq_cst, align 4
  %nobody = icmp eq i32 %count, 0
  br i1 %nobody, label %done, label %wake
wake:
  %code = call i64 (i64, ...) @syscall(i64 {futex}, ptr %event, i32 129, i32 2147483647)
  br label %done
done:
  ret void
}}

; A die comes to a place: 1 for the last, which is to make the results and to call tyir_go_on; 0 for another,
; when that is done or the group has given up.
define i32 @tyir_come(ptr %worker, ptr %place, i64 %members, i64 %me, ptr %operand, ptr %result) noinline {{
  %group = load ptr, ptr %worker
  %given.up = load atomic i32, ptr %group seq_cst, align 4
  %together = icmp eq i32 %given.up, 0
  br i1 %together, label %come, label %done
come:
  %turn = load atomic i32, ptr %place seq_cst, align 4
  %operands = getelementptr i64, ptr %place, i64 {head}
  %operand.at = getelementptr i64, ptr %operands, i64 %me
  store ptr %operand, ptr %operand.at
  %results = getelementptr i64, ptr %operands, i64 %members
  %result.at = getelementptr i64, ptr %results, i64 %me
  store ptr %result, ptr %result.at
  %arrived.at = getelementptr i32, ptr %place, i64 1
  %before = atomicrmw add ptr %arrived.at, i32 1 seq_cst
  %count = add i32 %before, 1
  %all = trunc i64 %members to i32
  %last = icmp eq i32 %count, %all
  br i1 %last, label %make, label %wait
make:
  store atomic i32 0, ptr %arrived.at seq_cst, align 4
  ret i32 1
wait:
  call void @tyir_wait(ptr %worker, ptr %place, i32 %turn)
  br label %done
done:
  ret i32 0
}}

define void @tyir_go_on(ptr %worker, ptr %place) noinline {{
  %group = load ptr, ptr %worker
  %turn = load atomic i32, ptr %place seq_cst, align 4
  %next = add i32 %turn, 1
  call void @tyir_set(ptr %group, ptr %place, i32 %next)
  ret void
}}

define void @tyir_send(ptr %worker, ptr %place, ptr %operand, i64 %bytes) noinline {{
  call void @tyir_wait(ptr %worker, ptr %place, i32 1)
  %group = load ptr, ptr %worker
  %data.at = getelementptr i64, ptr %place, i64 1
  %data = load ptr, ptr %data.at
  call void @llvm.memcpy.p0.p0.i64(ptr %data, ptr %operand, i64 %bytes, i1 false)
  call void @tyir_set(ptr %group, ptr %place, i32 1)
  ret void
}}

define void @tyir_receive(ptr %worker, ptr %place, ptr %result, i64 %bytes) noinline {{
  call void @tyir_wait(ptr %worker, ptr %place, i32 0)
  %group = load ptr, ptr %worker
  %data.at = getelementptr i64, ptr %place, i64 1
  %data = load ptr, ptr %data.at
  call void @llvm.memcpy.p0.p0.i64(ptr %result, ptr %data, i64 %bytes, i1 false)
  call void @tyir_set(ptr %group, ptr %place, i32 0)
  ret void
}}

; A die's step, on its own stack.
define void @tyir_whole_step(ptr %die) noinline {{
  %nothing = alloca {{ i64, i64 }}
  store {{ i64, i64 }} zeroinitializer, ptr %nothing
  %function.at = getelementptr i64, ptr %die, i64 {function}
  %function = load ptr, ptr %function.at
  %arguments.at = getelementptr i64, ptr %die, i64 {arguments}
  %arguments = load ptr, ptr %arguments.at
  %count.at = getelementptr i64, ptr %die, i64 {count}
  %count = load i32, ptr %count.at
  %code = call i32 %function(ptr null, ptr %arguments, i32 %count, ptr %nothing)
  %code.at = getelementptr i64, ptr %die, i64 {code}
  store i32 %code, ptr %code.at
  %state.at = getelementptr i64, ptr %die, i64 {state}
  store i32 2, ptr %state.at
  ret void
}}

; The steps of a worker's dies, from beginning to end.
define void @tyir_work(ptr %worker) noinline {{
start:
  %time = alloca {{ i64, i64 }}
  store i64 0, ptr %time
  %fraction = getelementptr i64, ptr %time, i64 1
  store i64 50000000, ptr %fraction
  %group = load ptr, ptr %worker
  %sleepers = getelementptr i32, ptr %group, i64 1
  %event.at = getelementptr i32, ptr %group, i64 2
  %current = getelementptr i64, ptr %worker, i64 {current}
  %main.at = getelementptr i64, ptr %worker, i64 {main}
  %main = load ptr, ptr %main.at
  %limit.at = getelementptr i64, ptr %worker, i64 {looks}
  %limit = load i64, ptr %limit.at
  %dies.at = getelementptr i64, ptr %worker, i64 {dies}
  %dies = load i64, ptr %dies.at
  %list = getelementptr i64, ptr %worker, i64 {list}
  br label %round

round:
  %looks = phi i64 [ 0, %start ], [ 0, %went ], [ %looks.next, %again ], [ %limit, %woken ]
  %event = load atomic i32, ptr %event.at seq_cst, align 4
  br label %each

each:
  %number = phi i64 [ 0, %round ], [ %number.next, %next ]
  %left = phi i1 [ false, %round ], [ %left.next, %next ]
  %moved = phi i1 [ false, %round ], [ %moved.next, %next ]
  %over = icmp eq i64 %number, %dies
  br i1 %over, label %after, label %one
one:
  %die.at = getelementptr i64, ptr %list, i64 %number
  %die = load ptr, ptr %die.at
  %own = load ptr, ptr %die
  %state.at = getelementptr i64, ptr %die, i64 {state}
  %state = load i32, ptr %state.at
  switch i32 %state, label %next [ i32 0, label %first
                                   i32 1, label %maybe ]
first:
  store i32 1, ptr %state.at
  %got = call i32 @getcontext(ptr %own)
  %link = getelementptr i64, ptr %own, i64 1
  store ptr %main, ptr %link
  %stack.from = getelementptr i64, ptr %die, i64 {stack}
  %stack = load i64, ptr %stack.from
  %stack.to = getelementptr i64, ptr %own, i64 2
  store i64 %stack, ptr %stack.to
  %size.from = getelementptr i64, ptr %die, i64 {stack_bytes}
  %size = load i64, ptr %size.from
  %size.to = getelementptr i64, ptr %own, i64 4
  store i64 %size, ptr %size.to
  call void (ptr, ptr, i32, ...) @makecontext(ptr %own, ptr @{begin}, i32 1, ptr %die)
  br label %go
maybe:
  %word.at = getelementptr i64, ptr %die, i64 {word}
  %word = load ptr, ptr %word.at
  %old.at = getelementptr i64, ptr %die, i64 {old}
  %old = load i32, ptr %old.at
  %seen = load atomic i32, ptr %word seq_cst, align 4
  %changed = icmp ne i32 %seen, %old
  %given.up = load atomic i32, ptr %group seq_cst, align 4
  %released = icmp ne i32 %given.up, 0
  %ready = or i1 %changed, %released
  br i1 %ready, label %go, label %next
go:
  store ptr %die, ptr %current
  %swapped = call i32 @swapcontext(ptr %main, ptr %own)
  %failed.at = getelementptr i64, ptr %die, i64 {code}
  %failed.code = load i32, ptr %failed.at
  %failed = icmp ne i32 %failed.code, 0
  br i1 %failed, label %give, label %next
give:
  store atomic i32 1, ptr %group seq_cst, align 4
  br label %next
next:
  %left.next = phi i1 [ %left, %one ], [ true, %maybe ], [ true, %go ], [ true, %give ]
  %moved.next = phi i1 [ %moved, %one ], [ %moved, %maybe ], [ true, %go ], [ true, %give ]
  %number.next = add i64 %number, 1
  br label %each

after:
  br i1 %left, label %unfinished, label %done
unfinished:
  br i1 %moved, label %went, label %idle
went:
  br label %round
idle:
  %tired = icmp sge i64 %looks, %limit
  br i1 %tired, label %sleep, label %again
again:
  call void asm sideeffect "{pause}", ""()
  %looks.next = add i64 %looks, 1
  br label %round
sleep:
  %counted = atomicrmw add ptr %sleepers, i32 1 seq_cst
  %code = call i64 (i64, ...) @syscall(i64 {futex}, ptr %event.at, i32 128, i32 %event, ptr %time)
  br label %woken
woken:
  %uncounted = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  br label %round

done:
  ret void
}}
"""


def knows_system(triple: str) -> bool:
    """Whether it is known here how threads wait on the system of LLVM's name."""
    return triple.partition("-")[0] in _SYSTEMS and "linux-gnu" in triple


def meeting_of(sites: Sequence[Op], triple: str, cpu: Cpu) -> dict[GlobalVar, Any]:
    """The functions of a program's meetings; `EXCHANGE` and `RUN` are seen outside of the library.

    `sites`: the collectives by number; `triple`: LLVM's name of a system that is known (`knows_system`).
    """
    futex, pause = _SYSTEMS[triple.partition("-")[0]]
    helpers = _HELPERS.format(begin=_BEGIN, futex=futex, pause=pause, head=PLACE_HEAD, **WORDS)
    made: dict[GlobalVar, Any] = {}
    combines: dict[Op, GlobalVar] = {}
    for number, op in enumerate(sites):
        if isinstance(op, dist.AllReduce | dist.AllGather):
            combines[op] = GlobalVar(f"tyir_combine_{number}")
            name = combines[op]
            made.update(_sum(name, op, cpu) if isinstance(op, dist.AllReduce) else _join(name, op))
    return {
        **made,
        GlobalVar("tyir_meet"): _meet(sites, combines),
        GlobalVar("tyir_first"): _calls(_BEGIN, "tyir_whole_step", helpers),
        GlobalVar("tyir_all"): _calls(RUN, "tyir_work", None),
    }


def _calls(symbol: str, helper: str, helpers: str | None) -> Any:
    """A C function of a pointer that calls one of the helpers.

    LLVM's linker takes over only what TensorIR calls by name, and no function whose address alone is taken.
    """
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"symbol": symbol})
        T.func_ret(PrimType("int32"))
        pointer = T.arg("pointer", T.handle())

        def call() -> None:
            T.evaluate(T.call_extern("void", helper, pointer))

        if helpers is None:
            call()
        else:
            with T.attr(T.int32(0), "pragma_import_llvm", helpers):
                call()
        T.Return(T.int32(0))
    return builder.get()


@dataclass(frozen=True)
class _Site:
    """Words of a context that are a site's own, and what the step gives there."""

    worker: Expr
    words: Buffer
    first: int
    operand: Expr
    result: Expr

    def word(self, number: int) -> Expr:
        return self.words[self.first + number]

    def place(self, number: int = 0) -> Expr:
        return _pointer(self.word(number))


def _meet(sites: Sequence[Op], combines: Mapping[Op, GlobalVar]) -> Any:
    requests = [request_of(op) for op in sites]
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"symbol": EXCHANGE})
        T.func_ret(PrimType("int32"))
        context, site = T.arg("context", T.handle("int64")), T.arg("site", T.int32())
        tensors = (T.arg("operand", T.handle()), T.arg("result", T.handle()))
        words = T.decl_buffer((FIRST_SITE + sum(map(site_words, requests)),), "int64", data=context)
        worker, first = bind(_pointer(words[0])), FIRST_SITE
        for number, (op, request) in enumerate(zip(sites, requests)):
            its = _Site(worker, words, first, *tensors)
            with T.If(site == number), T.Then():
                if op in combines:
                    _together(its, combines[op])
                else:
                    _pass_on(its, op, request)
            first += site_words(request)
        T.Return(T.int32(0))
    return builder.get()


def _together(site: _Site, combine: GlobalVar) -> None:
    """A collective."""
    place, me, members = bind(site.place()), site.word(1), bind(site.word(2))
    last = bind(
        T.call_extern("int32", "tyir_come", site.worker, place, members, me, site.operand, site.result)
    )
    with T.If(last == 1), T.Then():
        operands = T.call_extern("handle", "tyir_words", place, T.int64(PLACE_HEAD))
        results = T.call_extern("handle", "tyir_words", place, members + PLACE_HEAD)
        T.evaluate(Call(combine, [operands, results, T.cast(members, "int32")], ret_ty="int32"))
        T.evaluate(T.call_extern("void", "tyir_go_on", site.worker, place))


def _pass_on(site: _Site, op: Op, request: Request) -> None:
    """A send or a receive."""
    if isinstance(request, Recv):
        size = T.int64(_layout(op.results[0]).nbytes)
        T.evaluate(T.call_extern("void", "tyir_receive", site.worker, site.place(), site.result, size))
        return
    assert isinstance(request, Send)
    size = T.int64(_layout(op.operands[0]).nbytes)
    for target in range(len(request.targets)):
        T.evaluate(T.call_extern("void", "tyir_send", site.worker, site.place(target), site.operand, size))


def _pointer(address: Expr) -> Expr:
    return T.call_extern("handle", "tyir_at", address)


def _layout(value: Value) -> Layout:
    t = tensor_type(value)
    return Layout(packed_shape(t), storage_dtype(t.element))


# ------------------------------------------------------------------------------------------- what is computed


def _function(emit: Callable[[], None]) -> Any:
    """A function that others of this object call."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True})
        T.func_ret(PrimType("int32"))
        emit()
        T.Return(T.int32(0))
    return builder.get()


def _combine(emit: Callable[[Buffer, Buffer, Expr], None]) -> Any:
    """A function of the addresses of all operands, 0 of a die that gives nothing, of those of all results,
    and of how many there are of each.
    """

    def body() -> None:
        pointers = [T.arg(name, T.handle("int64")) for name in ("operands", "results")]
        members = T.arg("members", T.int32())
        operands, results = (T.decl_buffer((_MOST,), "int64", data=p) for p in pointers)
        emit(operands, results, members)

    return _function(body)


def _sum(name: GlobalVar, op: dist.AllReduce, cpu: Cpu) -> dict[GlobalVar, Any]:
    """Added in f32 in the order of dies and rounded once, a block of numbers at a time."""
    layout = _layout(op.out)
    size, dtype = math.prod(layout.shape), layout.dtype.name
    block = lanes_for(_BLOCK, size)
    lanes = lanes_for(cpu.lanes, block)
    add, put = GlobalVar(f"{name.name_hint}_add"), GlobalVar(f"{name.name_hint}_put")

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

    def emit(operands: Buffer, results: Buffer, members: Expr) -> None:
        with loop(size // block, cpu, size * 4) as number:
            total = T.alloc_buffer((block,), "float32")
            with T.serial(0, block // lanes) as i:
                store(total, [i * lanes], f32(-0.0, lanes), lanes)  # that much leaves every number as it is
            first = bind(number * block)
            with T.serial(0, members) as i, T.If(operands[i] != T.int64(0)), T.Then():
                T.evaluate(Call(add, [total.data, _pointer(operands[i]), first], ret_ty="int32"))
            with T.serial(0, members) as i:
                T.evaluate(Call(put, [total.data, _pointer(results[i]), first], ret_ty="int32"))

    return {add: _function(added), put: _function(rounded), name: _combine(emit)}


def _join(name: GlobalVar, op: dist.AllGather) -> dict[GlobalVar, Any]:
    """Each operand's rows copied to where they belong, in all results."""
    layout, axis, sizes = _layout(op.out), op.axis, op.sizes
    outer, inner = math.prod(layout.shape[:axis]), math.prod(layout.shape[axis + 1 :]) * layout.dtype.itemsize
    whole = sum(sizes) * inner

    def emit(operands: Buffer, results: Buffer, members: Expr) -> None:
        before = 0
        for number, size in enumerate(sizes):
            with (
                T.If(operands[number] != T.int64(0)),
                T.Then(),
                T.serial(0, members) as i,
                T.If(T.Or(i == 0, results[i] != results[0])),  # dies may be given the same memory
                T.Then(),
                T.serial(0, outer) as row,
            ):
                target = _pointer(results[i] + T.cast(row, "int64") * whole + before * inner)
                source = _pointer(operands[number] + T.cast(row, "int64") * (size * inner))
                T.evaluate(T.call_extern("void", "tyir_copy", target, source, T.int64(size * inner)))
            before += size

    return {name: _combine(emit)}
