"""Unrolling a command program for one step: what the command processor of a die does.

`EdgeProgram` holds one die's module; `expand(pos)` walks the entry function, follows calls, runs loops, evaluates scalars and addresses, and yields the
commands in program order, each with the indices of the commands it waits for.  Both engines consume exactly this stream.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

from tyir.attributes import IntegerAttr, StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func, Return
from tyir.ir import Block, Op, Value
from tyir.location import module_path
from tyir.manifest import Manifest
from tyir.parser import parse_file, parse_module

__all__ = ["Command", "EdgeProgram", "load_program", "load_programs"]

Tokens = tuple[int, ...]
_KEPT_COMMANDS: Final = 300_000
_ADDRESS: Final = edge10.ADDRESS
_TOKEN: Final = edge10.TOKEN


@dataclass(slots=True, eq=False)  # not frozen: a step has hundreds of thousands, and a frozen one takes three times as long to make
class Command:
    """One command of a step, not changed after it is made.  `deps` are indices of earlier commands; `address` is the DRAM address operand(s), `scalars` the sizes given by registers.

    `layer` is the decoder layer (the number of the call it stands in) or -1.
    """

    op: Op
    unit: str
    index: int
    deps: Tokens
    addresses: tuple[int, ...]
    scalars: tuple[int, ...]
    layer: int

    @property
    def source(self) -> str:
        """The op of the program stage that this command implements."""
        value = self.op.attributes.get("tyir.source")
        return value.value if isinstance(value, StringAttr) else ""

    @property
    def path(self) -> str:
        """The model's module path this command comes from, with its layer's number."""
        path = module_path(self.op.loc) or self.source
        return path.replace("*", str(self.layer)) if self.layer >= 0 else path

    def describe(self) -> str:
        """For error messages."""
        return f"#{self.index} {self.op.name} on {self.unit}" + (f" ({self.path})" if self.path else "")


class EdgeProgram:
    """One die's command program."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.functions = {f.sym_name: f for f in module.body if isinstance(f, Func)}
        self.buffers = {b.sym_name: b for b in module.body if isinstance(b, edge10.Buffer)}
        mains = [n for n in self.functions if n.startswith("main_s")]
        if len(mains) != 1:
            raise TyirError(
                f"a command program has one @main_s<n>, this one has {len(mains)}",
                help="give the llm_die<i>.edge10 file of one sequence length",
            )
        self.entry = mains[0]
        self.seqlen = _int_attribute(module, "tyir.seqlen", int(self.entry.removeprefix("main_s")))
        self.die = _int_attribute(module, "tyir.die", 0)
        self._expanded: dict[int, list[Command]] = {}

    @classmethod
    def parse(cls, text: str, name: str = "<string>") -> Self:
        """A program from its printed form."""
        return cls(parse_module(text, name))

    def expand(self, pos: int) -> list[Command]:
        """All commands of one step at position `pos`, in program order.  The last few steps are kept: a report times them on several machines."""
        if pos not in self._expanded:
            while self._expanded and sum(map(len, self._expanded.values())) > _KEPT_COMMANDS:
                del self._expanded[next(iter(self._expanded))]
            walk = _Walk(self, pos)
            walk.run(self.functions[self.entry].body, {}, -1)
            self._expanded[pos] = walk.commands
        return self._expanded[pos]

    @cached_property
    def signature(self) -> Hashable:
        """Equal for programs that differ at most in where and what their data is: same functions, ops, properties and operands."""
        return tuple((name, self.functions[name].function_type, _block_signature(self.functions[name].body)) for name in self.functions)


def load_programs(folder: Path, manifest: Manifest, seqlen: int) -> list[EdgeProgram]:
    """The command programs of all dies of an artifact folder, for one of its sequence lengths."""
    return [load_program(folder, manifest, die, seqlen) for die in range(manifest.options.dies)]


def load_program(folder: Path, manifest: Manifest, die: int, seqlen: int) -> EdgeProgram:
    """One die's command program; `TyirError` when the artifacts were compiled for several sequences, which have none."""
    path = manifest.program(die, seqlen).program
    if not path:
        raise TyirError(
            f"{folder} holds no command programs: it was compiled for batch {manifest.options.batch}, they run one sequence",
            help="compile with --batch 1",
        )
    return EdgeProgram(parse_file(folder / path))


def _int_attribute(module: Module, name: str, default: int) -> int:
    value = module.attributes.get(name)
    return value.value if isinstance(value, IntegerAttr) else default


def _block_signature(block: Block) -> Hashable:
    """The ops of a block, values by number.  A collective's own die number does not matter, the size of its piece does."""
    numbers: dict[Value, int] = {}
    rows: list[Hashable] = []

    def visit(inner: Block) -> None:
        for value in inner.args:
            numbers[value] = len(numbers)
        for op in inner:
            properties: Hashable = op.properties
            if isinstance(op, edge10.AllGather):
                properties = (op.rows, op.sizes, op.sizes[op.die], op.source_memory, op.destination_memory, op.displacements, op.stride)
            elif isinstance(op, edge10.Gather) and op.index == "ids":  # which rows a die holds does not matter either
                properties = (op.rows, op.row_bytes, op.sram, op.offset)
            rows.append((op.name, properties, tuple(numbers[v] for v in op.operands)))
            for value in op.results:
                numbers[value] = len(numbers)
            for region in op.regions:
                visit(region.entry)

    visit(block)
    return tuple(rows)


def _sorted_operands(op: Op) -> tuple[str, list[Value], list[Value], list[Value]]:
    """A command's unit and its token, address and scalar operands."""
    tokens = [v for v in op.operands if v.type is _TOKEN]
    addresses = [v for v in op.operands if v.type is _ADDRESS]
    return edge10.unit_of(op), tokens, addresses, [v for v in op.operands if v.type is not _TOKEN and v.type is not _ADDRESS]


class _Walk:
    """One step's walk through the program.  A token is the set of commands that must be done, at most one per unit since units are in order."""

    def __init__(self, program: EdgeProgram, pos: int) -> None:
        self.program, self.pos = program, pos
        self.commands: list[Command] = []
        self.operands: dict[Op, tuple[str, list[Value], list[Value], list[Value]]] = {}
        self.calls = 0

    def run(self, block: Block, env: dict[Value, Any], layer: int) -> tuple[Any, ...]:
        """Walk a block; returns the values of its terminator."""
        for op in block:
            if op in self.operands or edge10.is_command(op):
                self._command(op, env, layer)
            elif isinstance(op, edge10.Join):
                env[op.out] = self._merge(env[v] for v in op.operands)
            elif isinstance(op, edge10.AddressOf):
                env[op.out] = self._buffer_address(op.symbol.leaf)
            elif isinstance(op, edge10.Offset):
                env[op.out] = env[op.base] + env[op.index] * op.scale
            elif isinstance(op, edge10.Affine):
                env[op.out] = self._affine(op, env)
            elif isinstance(op, edge10.Register):
                env[op.out] = self.pos
            elif isinstance(op, edge10.For):
                self._loop(op, env, layer)
            elif isinstance(op, Call):
                self._call(op, env)
            elif isinstance(op, (Return, edge10.Yield)):
                return tuple(env[v] for v in op.operands)
            else:
                raise TyirError(f"'{op.name}' is no op of a command program", where=str(op.loc), help="run lower-edge10 first")
        raise TyirError("a block of the command program ends without a terminator")

    def _command(self, op: Op, env: dict[Value, Any], layer: int) -> None:
        known = self.operands.get(op)
        if known is None:
            known = self.operands[op] = _sorted_operands(op)
        unit, tokens, addresses, scalars = known
        if len(tokens) == 1:
            deps = env[tokens[0]]
        else:
            merged: set[int] = set()
            for value in tokens:
                merged.update(env[value])
            deps = tuple(sorted(merged))
        index = len(self.commands)
        self.commands.append(Command(op, unit, index, deps, tuple([env[v] for v in addresses]), tuple([env[v] for v in scalars]), layer))
        env[op.results[0]] = (index,)

    def _merge(self, tokens: Iterable[Tokens]) -> Tokens:
        latest: dict[str, int] = {}
        for token in tokens:
            for index in token:
                unit = self.commands[index].unit
                if latest.get(unit, -1) < index:
                    latest[unit] = index
        return tuple(sorted(latest.values()))

    def _buffer_address(self, name: str) -> int:
        buffer = self.program.buffers.get(name)
        if buffer is None:
            raise TyirError(f"the program refers to buffer @{name}, which it does not declare")
        return int(buffer.address)

    @staticmethod
    def _affine(op: edge10.Affine, env: dict[Value, Any]) -> int:
        total: int = sum(c * env[v] for c, v in zip(op.coefficients, op.operands)) + op.constant
        value = max(total // op.divisor, op.low)
        return value if op.high is None else min(value, op.high)

    def _loop(self, op: edge10.For, env: dict[Value, Any], layer: int) -> None:
        low, high, *tokens = (env[v] for v in op.operands)
        block = op.body
        for turn in range(low, high):
            inner = dict(env)
            inner.update(zip(block.args, (turn, *tokens)))
            tokens = list(self.run(block, inner, layer))
        for result, token in zip(op.results, tokens):
            env[result] = token

    def _call(self, op: Call, env: dict[Value, Any]) -> None:
        callee = self.program.functions.get(op.callee.leaf)
        if callee is None:
            raise TyirError(f"the program calls @{op.callee.leaf}, which it does not define")
        number = op.attributes.get("tyir.layer")
        layer = number.value if isinstance(number, IntegerAttr) else self.calls
        self.calls += 1
        results = self.run(callee.body, dict(zip(callee.args, (env[v] for v in op.operands))), layer)
        env.update(zip(op.results, results))
