"""The command programs by which the timing engine is held against silicon.

Programs of one unit, from which a machine's figures are read off, and compiled ones, which judge it.

    units     one unit alone, or two that wait for each other: every figure of `hopper_sm.toml` is the slope or the intercept of two of them
    waiting   one unit while all others wait for its last command: what looking for tokens costs those that work
    streams   loads, conversions and products that overlap, written by hand: one rule of the engine each
    models    decoder steps that the compiler makes for this machine: many sizes, weights, tokens, positions, dies, and machines with less SRAM or fewer transfers in flight
    blind     more of them, with other sizes, caches and numbers of dies, measured when neither the engine nor the machine file was changed any more;
              the last three models after the rule of waiting units had been added

A die's SRAM and transfers in flight are set by the program, everything else is the multiprocessor's.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final, Literal

from tyir.attributes import ArrayAttr, SymbolRefAttr
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.search import Search
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.execution.entry_points import mark_entry
from tyir.ir import Value
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine
from tyir.tools.estimate.model import ModelShape, few_layers
from tyir.types import TensorType, f16, f32, ui8

__all__ = ["MACHINE", "EnginePrograms", "all_programs"]

MACHINE: Final = "hopper_sm"
_BYTES: Final = 256 << 20  # of DRAM that unit programs read, several times the GPU's L2
_SRAM: Final = 192 << 10
_CAPACITY: Final = 2048


@dataclass(frozen=True)
class EnginePrograms:
    """All dies' programs of one step, by what they are for.

    `machine` changes the machine that the multiprocessor plays into the one they were made for.

    `count`: commands of each die of a unit program, `unit` whose they are, where others wait for them.
    """

    name: str
    kind: Literal["unit", "waiting", "stream", "model", "blind"]
    make: Callable[[Machine], list[EdgeProgram]] = field(repr=False)
    group: str = ""
    pos: int = 0
    changes: tuple[tuple[str, float], ...] = ()
    count: int = 0
    unit: str = ""

    def machine(self, base: Machine) -> Machine:
        return base.with_overrides(dict(self.changes))

    def programs(self, base: Machine) -> list[EdgeProgram]:
        return self.make(self.machine(base))


# ----------------------------------------------------------------------------------- programs written by hand


class _Writer:
    """A program of one function on one die, command by command."""

    def __init__(self, die: int = 0) -> None:
        self.die = die
        self.module = Module.empty(f"die{die}")
        self.module.body.append(
            edge10.Buffer(
                sym_name="data", address=0, nbytes=_BYTES, kind="input", type=TensorType((_BYTES,), ui8)
            )
        )
        self.main = Func.make("main_s1", [])
        mark_entry(self.main, 1)
        self.base = self.main.body.append(
            edge10.AddressOf(symbol=SymbolRefAttr("data"), result_types=[edge10.ADDRESS])
        ).result
        self.offset = 0

    def add(self, cls: type, *tokens: Value | None, **attributes: Any) -> Value:
        args = tuple(t for t in tokens if t is not None)
        value: Value = self.main.body.append(
            cls(args=args, result_types=[edge10.TOKEN], **attributes)
        ).results[0]
        return value

    def load(
        self, nbytes: int, *tokens: Value | None, runs: int = 1, queue: str = "ewdma", sram: int = 0
    ) -> Value:
        """The next bytes of DRAM, in runs that lie apart."""
        row, stride = nbytes // runs, 2 * nbytes // runs if runs > 1 else 0
        self.offset = (self.offset + 2 * nbytes) % (_BYTES - 4 * nbytes) // 128 * 128
        shape = (1, runs, row)
        return self.add(
            edge10.Load,
            self.base,
            *tokens,
            offset=self.offset,
            sram=sram,
            shape=shape,
            dram_strides=(0, stride or row),
            sram_strides=(0, row),
            queue=queue,
        )

    def store(self, nbytes: int, *tokens: Value | None) -> Value:
        self.offset = (self.offset + 2 * nbytes) % (_BYTES - 4 * nbytes) // 128 * 128
        return self.add(
            edge10.Store,
            self.base,
            *tokens,
            offset=self.offset,
            sram=0,
            shape=(1, 1, nbytes),
            dram_strides=(0, nbytes),
            sram_strides=(0, nbytes),
        )

    def matmul(self, m: int, n: int, k: int, *tokens: Value | None) -> Value:
        return self.add(
            edge10.Matmul,
            *tokens,
            lhs=0,
            lhs_strides=(2 * k, 0),
            rhs=0,
            rhs_stride=2 * k,
            acc=0,
            acc_stride=4 * n,
            m=(1, m),
            n=n,
            k=k,
        )

    def drain(self, m: int, n: int, *tokens: Value | None) -> Value:
        return self.add(
            edge10.Drain,
            *tokens,
            acc=0,
            acc_stride=4 * n,
            m=(1, m),
            n=n,
            sram=0,
            sram_strides=(4 * n, 0),
            element=f32,
        )

    def dequant(self, n: int, k: int, *tokens: Value | None) -> Value:
        return self.add(
            edge10.Dequant,
            *tokens,
            q=0,
            q_stride=k // 2,
            scales=0,
            scale_stride=64,
            zeros=0,
            zero_stride=32,
            group_size=128,
            out=0,
            n=n,
            k=k,
        )

    def vector(self, elements: int, *tokens: Value | None) -> Value:
        types = {"input_types": ArrayAttr([f16, f16]), "output_types": ArrayAttr([f16])}
        return self.add(
            edge10.VectorOp,
            *tokens,
            function="add",
            inputs=(0, 0),
            outputs=(0,),
            rows=1,
            cols=elements,
            **types,
        )

    def all_gather(self, nbytes: int, dies: int, *tokens: Value | None) -> Value:
        return self.add(
            edge10.AllGather, *tokens, source=0, destination=0, rows=1, sizes=(nbytes,) * dies, die=self.die
        )

    def all_reduce(self, nbytes: int) -> Value:
        return self.add(edge10.AllReduce, source=0, destination=0, nbytes=nbytes, element=f16)

    def program(self) -> EdgeProgram:
        self.main.body.append(Return(values=[]))
        self.main.refresh_type()
        self.module.body.append(self.main)
        return EdgeProgram(self.module)


def _unit(
    name: str, count: int, write: Callable[[_Writer, int], object], dies: int = 1, **changes: float
) -> EnginePrograms:
    """`count` commands that wait for nothing, the same on all dies."""

    def program(die: int) -> EdgeProgram:
        w = _Writer(die)
        for index in range(count):
            write(w, index)
        return w.program()

    def make(machine: Machine) -> list[EdgeProgram]:
        return [program(die) for die in range(dies)]

    return EnginePrograms(name, "unit", make, changes=_settings(changes), count=count)


def _alternate(
    name: str, count: int, steps: Sequence[Callable[[_Writer, Value | None], Value]]
) -> EnginePrograms:
    """Each command waits for the one before, on another unit."""

    def make(machine: Machine) -> list[EdgeProgram]:
        w, token = _Writer(), None
        for index in range(count):
            token = steps[index % len(steps)](w, token)
        return [w.program()]

    return EnginePrograms(name, "unit", make, count=count)


def _units() -> Iterator[EnginePrograms]:
    for elements in (64, 1024, 16384):
        yield _unit(f"vector {elements}", 400, lambda w, i, e=elements: w.vector(e))
    for k in (16, 512, 4096):
        yield _unit(f"cube 16x16x{k}", 400, lambda w, i, k=k: w.matmul(16, 16, k))
    for n in (1, 16, 128):
        yield _unit(f"dequant {n}x256", 400, lambda w, i, n=n: w.dequant(n, 256))
    for n in (128, 2048, 16384):
        yield _unit(f"drain 1x{n}", 400, lambda w, i, n=n: w.drain(1, n))
    yield _alternate(
        "vector then drain", 400, [lambda w, t: w.vector(64, t), lambda w, t: w.drain(1, 128, t)]
    )
    yield _alternate(
        "cube then vector", 400, [lambda w, t: w.matmul(16, 16, 16, t), lambda w, t: w.vector(64, t)]
    )
    for nbytes in (1024, 4096, 16384):
        yield _unit(
            f"load {nbytes}, one in flight", 300, lambda w, i, n=nbytes: w.load(n), dma__outstanding=1
        )
        yield _unit(f"load {nbytes}", 600, lambda w, i, n=nbytes: w.load(n))
    for nbytes in (49152, 98304):
        yield _unit(f"load {nbytes}", 600, lambda w, i, n=nbytes: w.load(n))
    for runs in (8, 64):
        yield _unit(f"load 16384 in {runs} runs", 600, lambda w, i, r=runs: w.load(16384, runs=r))
    for nbytes, queues in ((16384, 2), (16384, 3), (49152, 2), (49152, 3)):
        yield _unit(
            f"load {nbytes} on {queues} queues",
            900,
            lambda w, i, n=nbytes, q=queues: w.load(n, queue=edge10.DMA_UNITS[i % q]),
        )
    for nbytes in (1024, 16384):
        yield _unit(f"store {nbytes}", 600, lambda w, i, n=nbytes: w.store(n))
    for dies in (2, 4, 8):
        for nbytes in (64, 16384):
            yield _unit(
                f"all-gather {nbytes} on {dies}", 200, lambda w, i, n=nbytes, d=dies: w.all_gather(n, d), dies
            )
        for nbytes in (64, 2048, 16384):
            yield _unit(f"all-reduce {nbytes} on {dies}", 200, lambda w, i, n=nbytes: w.all_reduce(n), dies)


# What each unit does when it only waits, by the unit's name.
_LITTLE: Final[Mapping[str, Callable[[_Writer, Value], Value]]] = {
    **{queue: lambda w, t, q=queue: w.load(1024, t, queue=q) for queue in edge10.DMA_UNITS[:-1]},
    edge10.DMA_UNITS[-1]: lambda w, t: w.store(1024, t),
    "dequant": lambda w, t: w.dequant(1, 256, t),
    "cube": lambda w, t: w.matmul(16, 16, 16, t),
    "drain": lambda w, t: w.drain(1, 128, t),
    "vector": lambda w, t: w.vector(64, t),
}


def _while_others_wait(
    name: str, unit: str, count: int, write: Callable[[_Writer], Value], dies: int
) -> EnginePrograms:
    """`count` commands of a unit; all others, the links too where there are several dies, wait for the last
    of them.
    """

    def program(die: int) -> EdgeProgram:
        w = _Writer(die)
        last = [write(w) for _ in range(count)][-1]
        for other, little in _LITTLE.items():
            if other != unit:
                little(w, last)
        if dies > 1:
            w.all_gather(64, dies, last)
        return w.program()

    where = f", others wait{f' on {dies} dies' if dies > 1 else ''}"
    return EnginePrograms(
        name + where, "waiting", lambda machine: [program(die) for die in range(dies)], count=count, unit=unit
    )


def _waiting() -> Iterator[EnginePrograms]:
    for dies in (1, 2):
        yield _while_others_wait("vector 16384", "vector", 400, lambda w: w.vector(16384), dies)
        yield _while_others_wait("cube 16x16x4096", "cube", 400, lambda w: w.matmul(16, 16, 4096), dies)
        yield _while_others_wait("dequant 128x256", "dequant", 400, lambda w: w.dequant(128, 256), dies)
        yield _while_others_wait("drain 1x16384", "drain", 400, lambda w: w.drain(1, 16384), dies)
        yield _while_others_wait("load 1024", edge10.DMA_UNITS[0], 600, lambda w: w.load(1024), dies)
        yield _while_others_wait("store 1024", edge10.DMA_UNITS[-1], 600, lambda w: w.store(1024), dies)


# --------------------------------------------------------------------------------------------------- overlaps


def _stream(
    name: str,
    tiles: int,
    slots: int,
    load: int,
    steps: Sequence[tuple[str, tuple[int, ...]]],
    **changes: float,
) -> EnginePrograms:
    """`tiles` loads through `slots` places, each worked on by `steps` one after the other.

    A place is free when the last step has read it.
    """

    def make(machine: Machine) -> list[EdgeProgram]:
        w = _Writer()
        last: list[Value | None] = [None] * slots
        for tile in range(tiles):
            token = w.load(load, last[tile % slots], sram=tile % slots * load)
            for what, sizes in steps:
                token = getattr(w, what)(*sizes, token)
            last[tile % slots] = token
        return [w.program()]

    return EnginePrograms(name, "stream", make, changes=_settings(changes))


def _streams() -> Iterator[EnginePrograms]:
    for slots in (1, 2, 4):
        for k in (64, 256, 1024):
            yield _stream(f"12 KB and {k} of k, {slots} slots", 300, slots, 12288, [("matmul", (16, 16, k))])
        yield _stream(
            f"dequantised, {slots} slots",
            300,
            slots,
            4096,
            [("dequant", (32, 256)), ("matmul", (16, 32, 256))],
        )
        yield _stream(
            f"to the end, {slots} slots",
            300,
            slots,
            8192,
            [("matmul", (16, 32, 128)), ("drain", (16, 32)), ("vector", (512,))],
        )
    for outstanding in (1, 2):
        yield _stream(
            f"2 KB, 4 slots, {outstanding} in flight",
            400,
            4,
            2048,
            [("matmul", (16, 16, 64))],
            dma__outstanding=outstanding,
        )


# -------------------------------------------------------------------------------------------- compiled models


def _shape(
    name: str, hidden: int, width: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int
) -> ModelShape:
    return ModelShape(
        name,
        2,
        hidden,
        width,
        heads,
        kv_heads,
        head_dim,
        vocabulary,
        _CAPACITY,
        False,
        False,
        False,
        False,
        False,
    )


SHAPES: Final = {
    shape.name: shape
    for shape in (
        _shape("a", 512, 1408, 8, 2, 64, 4000),
        _shape("b", 768, 2048, 12, 12, 64, 3000),
        _shape("c", 1024, 2816, 8, 4, 128, 8000),
        _shape("d", 1536, 4096, 12, 2, 128, 2000),
        _shape("e", 896, 2432, 14, 2, 64, 5000),
        _shape("f", 1280, 3456, 10, 5, 128, 6000),
        _shape("g", 640, 1792, 10, 2, 64, 3500),
        _shape("h", 1408, 3712, 11, 1, 128, 5000),
        _shape("i", 1792, 4864, 14, 2, 128, 3000),
    )
}


@cache
def _module(shape: str, int4: bool, tokens: int, dies: int, kv: str) -> Module:
    """A model at stage `program`, cut over the dies."""
    module = few_layers(SHAPES[shape], 2)
    quantize = "quantize-weights{group-size=128}," if int4 else ""
    cut = f"partition-dies{{dies={dies} strategy=split mesh={dies}}}"
    run_pipeline(
        module,
        f"{quantize}kv-materialize{{max-kv={_CAPACITY}"
        f" dtype={kv}}},{cut},specialize-seqlen{{seqlens={tokens}}},to-program",
    )
    return module


def _model(
    shape: str, int4: bool, tokens: int, pos: int, dies: int = 1, kv: str = "fp16", **changes: float
) -> EnginePrograms:
    def make(machine: Machine) -> list[EdgeProgram]:
        module = _module(shape, int4, tokens, dies, kv)
        parts = [op for op in module.body if isinstance(op, Module)] or [module]
        search = Search()
        return [EdgeProgram(lower_die(die, tokens, machine, search=search)) for die in parts]

    settings = _settings({"sram__capacity_bytes": _SRAM, **changes})
    note = f", {text}" if (text := _changes_text(changes)) else ""
    name = f"{shape} {'int4' if int4 else 'fp16'} s{tokens} at {pos} on {dies}{note}" + (
        f", {kv} cache" if kv != "fp16" else ""
    )
    group = (
        f"{dies} dies"
        if dies > 1
        else _changes_text(changes) or f"{'int4' if int4 else 'fp16'}, {tokens} token{'s' * (tokens > 1)}"
    )
    return EnginePrograms(name, "model", make, group, pos, settings)


def _settings(changes: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """`dma__outstanding=1` as `EnginePrograms` has it."""
    return tuple((name.replace("__", "."), value) for name, value in changes.items())


def _changes_text(changes: Mapping[str, float]) -> str:
    """What a machine has less of, in words."""
    words = {"dma__outstanding": "one transfer in flight", "sram__capacity_bytes": "half of the SRAM"}
    return ", ".join(words[name] for name in changes)


def _models() -> Iterator[EnginePrograms]:
    for shape in ("a", "b", "c", "d"):
        for int4 in (False, True):
            for tokens, pos in ((1, 0), (1, 1500), (8, 100), (32, 0)):
                yield _model(shape, int4, tokens, pos)
            yield _model(shape, int4, 1, 300, dma__outstanding=1)
            yield _model(shape, int4, 8, 0, sram__capacity_bytes=96 << 10)
    for shape in ("a", "c", "d"):
        for dies in (2, 4, 8):
            yield _model(shape, False, 1, 500, dies)
            yield _model(shape, True, 16, 0, dies)


def _blind() -> Iterator[EnginePrograms]:
    for shape in ("e", "f"):
        for int4 in (False, True):
            for dies, tokens, pos in (
                (1, 1, 700),
                (1, 4, 1000),
                (1, 64, 0),
                (3, 1, 700),
                (3, 24, 50),
                (6, 1, 0),
                (6, 12, 1200),
            ):
                yield _as_blind(_model(shape, int4, tokens, pos, dies), f"{dies} die{'s' * (dies > 1)}")
        for tokens, pos in ((1, 2000), (8, 1000)):
            yield _as_blind(_model(shape, True, tokens, pos, kv="int8"), "8-bit cache")

    for shape in ("g", "h", "i"):
        for int4 in (False, True):
            for dies, tokens, pos in (
                (1, 1, 1200),
                (1, 12, 40),
                (2, 1, 900),
                (2, 48, 0),
                (5, 1, 100),
                (5, 16, 300),
                (7, 2, 1700),
            ):
                if int4 or dies in (1, 5):
                    yield _as_blind(
                        _model(shape, int4, tokens, pos, dies), f"{'int4' if int4 else 'fp16'}, last"
                    )
        yield _as_blind(_model(shape, True, 4, 1500, 2, kv="int8"), "int4, last")


def _as_blind(entry: EnginePrograms, group: str) -> EnginePrograms:
    return replace(entry, kind="blind", group=group)


@cache
def all_programs() -> dict[str, EnginePrograms]:
    """By name."""
    return {p.name: p for p in (*_units(), *_waiting(), *_streams(), *_models(), *_blind())}
