"""Unrolling a command program for one step: what the command processor of a die does.

`unroll` walks the entry function, follows calls, runs loops, evaluates scalars and addresses, and gives the
commands in program order, each with the commands it waits for.  Both engines consume exactly this stream.

A function is walked once for all its calls with the same scalars (the layers of a model): what it waits for
outside and the addresses that it is given are left open, and each call fills them in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple, Self, overload

from tyir.attributes import IntegerAttr, StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.func import Call, Func, Return
from tyir.edge10.command_times import Transfer, Work
from tyir.ir import Block, Value
from tyir.location import module_path
from tyir.process.collector import collector_paused

__all__ = ["Command", "Kind", "Kinds", "Position", "Step", "chained", "position_of", "unroll"]

Tokens = tuple[
    int, ...
]  # commands that must be done, by number; in a function's body -1 - i is everything that argument i stands for  # noqa: E501
Address = tuple[int, int]  # the argument it is relative to (_ABSOLUTE for none) and a byte offset
_ABSOLUTE: Final = -1
_ADDRESS: Final = edge10.ADDRESS
_TOKEN: Final = edge10.TOKEN


@dataclass(frozen=True, eq=False)
class Kind:
    """What commands that differ only in where their data is have in common.

    `scalars` are the sizes given by registers.
    """

    op: edge10.Command
    unit: str
    scalars: tuple[int, ...]

    @cached_property
    def source(self) -> str:
        """The op of the program stage that the commands implement."""
        value = self.op.attributes.get("tyir.source")
        return value.value if isinstance(value, StringAttr) else ""

    @cached_property
    def path(self) -> str:
        """The model's module path they come from, `*` for the layer's number."""
        return module_path(self.op.loc) or self.source

    @cached_property
    def cost(self) -> Transfer | Work:
        """What their time depends on: bytes and runs of a transfer (for a collective on its own die's side),
        sizes of anything else.
        """
        return self.op.cost(self.scalars)


class _Operands(NamedTuple):
    """A command's unit and its operands by what they are."""

    unit: str
    tokens: list[Value]
    addresses: list[Value]
    scalars: list[Value]

    @classmethod
    def of(cls, op: edge10.Command) -> Self:
        tokens = [v for v in op.operands if v.type is _TOKEN]
        addresses = [v for v in op.operands if v.type is _ADDRESS]
        return cls(
            op.unit,
            tokens,
            addresses,
            [v for v in op.operands if v.type is not _TOKEN and v.type is not _ADDRESS],
        )


@dataclass
class Kinds:
    """The kinds of a program's commands by number, the same for all its steps."""

    all: list[Kind] = field(default_factory=list)
    _operands: dict[edge10.Command, _Operands] = field(default_factory=dict)
    _numbers: dict[tuple[edge10.Command, tuple[int, ...]], int] = field(default_factory=dict)

    def operands(self, op: edge10.Command) -> _Operands:
        """A command's unit and operands, sorted once."""
        found = self._operands.get(op)
        if found is None:
            found = self._operands[op] = _Operands.of(op)
        return found

    def number(self, op: edge10.Command, scalars: tuple[int, ...]) -> int:
        """The number of a command's kind."""
        number = self._numbers.get((op, scalars))
        if number is None:
            number = self._numbers[op, scalars] = len(self.all)
            self.all.append(Kind(op, self.operands(op).unit, scalars))
        return number


@dataclass(
    slots=True, eq=False
)  # not frozen: a step has hundreds of thousands, and a frozen one takes three times as long to make
class Command:
    """One command of a step, not changed after it is made.  `deps` are numbers of earlier commands;
    `addresses` are the DRAM address operands.

    `layer` is the decoder layer (the number of the call it stands in) or -1.
    """

    kind: Kind
    index: int
    deps: Tokens
    addresses: tuple[int, ...]
    layer: int

    @property
    def op(self) -> edge10.Command:
        return self.kind.op

    @property
    def unit(self) -> str:
        return self.kind.unit

    @property
    def scalars(self) -> tuple[int, ...]:
        return self.kind.scalars

    @property
    def source(self) -> str:
        return self.kind.source

    @property
    def path(self) -> str:
        """The model's module path this command comes from, with its layer's number."""
        return self.kind.path.replace("*", str(self.layer)) if self.layer >= 0 else self.kind.path

    def describe(self) -> str:
        """For error messages."""
        return f"#{self.index} {self.op.name} on {self.unit}" + (f" ({self.path})" if self.path else "")


@dataclass(frozen=True, eq=False)
class Step(Sequence[Command]):
    """All commands of one step in program order, by columns: a model has hundreds of thousands, of a few
    thousand kinds.

    `kind[i]` is command i's number in `kinds`; it waits for the commands `base[i] + d` for d in `near[i]`,
    which equal layers share.
    """

    kinds: list[Kind]
    kind: list[int]
    near: list[Tokens]
    base: list[int]
    layer: list[int]
    _body: _Body

    @cached_property
    def addresses(self) -> dict[int, tuple[int, ...]]:
        """The DRAM addresses of commands that have some.  Only the functional engine asks."""
        return {
            index: tuple([offset for _, offset in pairs])
            for index, pairs in self._body.all_addresses([]).items()
        }

    def __len__(self) -> int:
        return len(self.kind)

    @overload
    def __getitem__(self, index: int) -> Command: ...
    @overload
    def __getitem__(self, index: slice) -> list[Command]: ...
    def __getitem__(self, index: int | slice) -> Command | list[Command]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index, base = range(len(self))[index], self.base[index]
        deps = tuple([base + d for d in self.near[index]])
        return Command(
            self.kinds[self.kind[index]], index, deps, self.addresses.get(index, ()), self.layer[index]
        )

    def __iter__(self) -> Iterator[Command]:
        for index, (kind, near, base, layer) in enumerate(zip(self.kind, self.near, self.base, self.layer)):
            yield Command(
                self.kinds[kind], index, tuple([base + d for d in near]), self.addresses.get(index, ()), layer
            )


def chained(steps: Sequence[Step]) -> Step:
    """Steps of one die, each of which begins when the one before is done; of equal `kinds`."""
    first, *_ = steps
    made = Step(first.kinds, [], [], [], [], first._body)
    last: dict[str, int] = {}
    for step in steps:
        offset, before, seen = len(made.kind), tuple(last.values()), set[str]()
        made.kind.extend(step.kind)
        made.near.extend(step.near)
        made.base.extend(base + offset for base in step.base)
        made.layer.extend(step.layer)
        for index, kind in enumerate(step.kind, offset):
            unit = first.kinds[kind].unit
            if unit not in seen:
                seen.add(unit)
                made.near[index] = (*made.near[index], *(done - made.base[index] for done in before))
            last[unit] = index
    return made


Position = int | tuple[int, ...]  # tokens cached: of all sequences, or of each


def position_of(pos: Position, sequence: int) -> int:
    """The register `pos` of one sequence."""
    return pos if isinstance(pos, int) else pos[sequence]


def unroll(
    functions: Mapping[str, Func],
    buffers: Mapping[str, edge10.Buffer],
    entry: str,
    kinds: Kinds,
    pos: Position,
    layers: Collection[int] | None = None,
    wanted: bool = True,
) -> Step:
    """One step at position `pos` of the program that begins at function `entry`; its kinds are added to
    `kinds`.  With `layers`, the calls of other decoder layers are left out; `wanted`: the register of that
    name.  `TyirError` for what is no command program.
    """
    with collector_paused():
        return _Unroller(functions, buffers, kinds, pos, layers, wanted).step(entry)


class _Placed(NamedTuple):
    """A call: where the callee's commands begin, and the address that each of its arguments is (anything for
    those that are none).
    """

    base: int
    callee: _Body
    given: list[Address]


@dataclass(slots=True)
class _Body:
    """A function's commands for given scalars, numbered from 0 (`Step` says what the columns are); `Tokens`
    and `Address` say what its arguments leave open.
    """

    kind: list[int] = field(default_factory=list)
    near: list[Tokens] = field(default_factory=list)
    base: list[int] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)
    waits_outside: list[int] = field(
        default_factory=list
    )  # the commands that wait for a token argument; their base is 0
    addresses: dict[int, tuple[Address, ...]] = field(default_factory=dict)
    calls: list[_Placed] = field(default_factory=list)
    results: tuple[Any, ...] = ()

    def add(self, kind: int, deps: Tokens) -> int:
        """Append a command; returns its number."""
        index = len(self.kind)
        self.kind.append(kind)
        self.near.append(deps)
        self.base.append(0)
        self.layer.append(-1)
        if deps and deps[0] < 0:
            self.waits_outside.append(index)
        return index

    def all_addresses(self, given: Sequence[Address]) -> dict[int, tuple[Address, ...]]:
        """Those of the calls too, when the arguments are `given`."""
        found = {
            index: tuple([_address(pair, given) for pair in pairs]) for index, pairs in self.addresses.items()
        }
        for call in self.calls:
            inner = [_address(pair, given) for pair in call.given]
            found.update(
                {call.base + index: pairs for index, pairs in call.callee.all_addresses(inner).items()}
            )
        return found


def _address(pair: Address, given: Sequence[Address]) -> Address:
    """An address with its argument's in place of it."""
    argument, offset = pair
    return pair if argument == _ABSOLUTE else (given[argument][0], given[argument][1] + offset)


class _Unroller:
    """One step's walk through the program.  A token is the set of commands that must be done, at most one per
    unit since units are in order.

    Values of the program are a token's `Tokens`, an address's `Address` or a scalar's number, in `env` by SSA
    value.
    """

    def __init__(
        self,
        functions: Mapping[str, Func],
        buffers: Mapping[str, edge10.Buffer],
        kinds: Kinds,
        pos: Position,
        layers: Collection[int] | None = None,
        wanted: bool = True,
    ) -> None:
        self.functions, self.buffers, self.kinds, self.pos = functions, buffers, kinds, pos
        self.layers, self.wanted = layers, wanted
        self.bodies: dict[tuple[str, tuple[int, ...]], _Body] = {}
        self.open: list[str] = []  # the functions being walked, outermost first

    def step(self, entry: str) -> Step:
        body = self.function(entry, ())
        return Step(self.kinds.all, body.kind, body.near, body.base, body.layer, body)

    def function(self, name: str, scalars: tuple[int, ...]) -> _Body:
        """A function's commands when its scalar arguments are `scalars`; walked once."""
        if (name, scalars) not in self.bodies:
            function = self.functions.get(name)
            if function is None:
                raise TyirError(f"the program calls @{name}, which it does not define")
            if name in self.open:
                path = " -> ".join(f"@{f}" for f in (*self.open[self.open.index(name) :], name))
                raise TyirError(f"the program's functions call each other without end: {path}")
            env: dict[Value, Any] = {}
            given = iter(scalars)
            for number, value in enumerate(function.body.args):
                env[value] = (
                    (-1 - number,)
                    if value.type is _TOKEN
                    else (number, 0)
                    if value.type is _ADDRESS
                    else next(given)
                )
            body = _Body()
            self.open.append(name)
            body.results = self.walk(function.body, env, body)
            self.open.pop()
            self.bodies[name, scalars] = body
        return self.bodies[name, scalars]

    def walk(self, block: Block, env: dict[Value, Any], body: _Body) -> tuple[Any, ...]:
        """Append a block's commands to `body`; returns the values of its terminator."""
        for op in block:
            if isinstance(op, edge10.Command):
                self.command(op, env, body)
            elif isinstance(op, edge10.Join):
                env[op.out] = self.merge([env[v] for v in op.operands], body)
            elif isinstance(op, edge10.AddressOf):
                env[op.out] = (_ABSOLUTE, self.buffer_address(op.symbol.leaf))
            elif isinstance(op, edge10.Offset):
                argument, offset = env[op.base]
                env[op.out] = (argument, offset + env[op.index] * op.scale)
            elif isinstance(op, edge10.Affine):
                env[op.out] = _affine(op, env)
            elif isinstance(op, edge10.Register):
                known = op.register == "pos"
                env[op.out] = position_of(self.pos, op.sequence) if known else int(self.wanted)
            elif isinstance(op, edge10.For):
                self.loop(op, env, body)
            elif isinstance(op, Call):
                self.call(op, env, body)
            elif isinstance(op, (Return, edge10.Yield)):
                return tuple([env[v] for v in op.operands])
            else:
                raise TyirError(
                    f"'{op.name}' is no op of a command program",
                    where=str(op.loc),
                    help="run lower-edge10 first",
                )
        raise TyirError("a block of the command program ends without a terminator")

    def command(self, op: edge10.Command, env: dict[Value, Any], body: _Body) -> None:
        known = self.kinds.operands(op)
        kind = self.kinds.number(op, tuple([env[v] for v in known.scalars]))
        index = body.add(kind, self.merge([env[v] for v in known.tokens], body))
        if known.addresses:
            body.addresses[index] = tuple([env[v] for v in known.addresses])
        env[op.results[0]] = (index,)

    def merge(self, tokens: Sequence[Tokens], body: _Body) -> Tokens:
        """The last command of each unit among the tokens', and what stands for arguments."""
        if len(tokens) == 1:
            return tokens[0]
        latest: dict[str | int, int] = {}
        for token in tokens:
            for index in token:
                key = self.kinds.all[body.kind[index]].unit if index >= 0 else index
                if latest.get(key, index) <= index:
                    latest[key] = index
        return tuple(sorted(latest.values()))

    def buffer_address(self, name: str) -> int:
        buffer = self.buffers.get(name)
        if buffer is None:
            raise TyirError(f"the program refers to buffer @{name}, which it does not declare")
        return int(buffer.address)

    def loop(self, op: edge10.For, env: dict[Value, Any], body: _Body) -> None:
        low, high, *tokens = (env[v] for v in op.operands)
        block = op.body
        for turn in range(low, high):
            env.update(zip(block.args, (turn, *tokens)))
            tokens = list(self.walk(block, env, body))
        env.update(zip(op.results, tokens))

    def call(self, op: Call, env: dict[Value, Any], body: _Body) -> None:
        """Append the callee's commands, with what the caller gives in the places left open."""
        number = op.attributes.get("tyir.layer")
        if self.layers is not None and isinstance(number, IntegerAttr) and number.value not in self.layers:
            self.skip(op, env)
            return
        given = [env[v] for v in op.operands]
        scalars = tuple([env[v] for v in op.operands if v.type is not _TOKEN and v.type is not _ADDRESS])
        callee = self.function(op.callee.leaf, scalars)
        layer = number.value if isinstance(number, IntegerAttr) else len(body.calls)
        base = len(body.kind)
        body.kind += callee.kind
        body.near += callee.near
        body.base += [base + inner for inner in callee.base]
        body.layer += [layer if inner < 0 else inner for inner in callee.layer]

        def placed(tokens: Tokens) -> Tokens:
            return self.merge(
                [(base + index,) if index >= 0 else given[-1 - index] for index in tokens], body
            )

        for index in callee.waits_outside:
            body.near[base + index], body.base[base + index] = deps, _ = placed(callee.near[index]), 0
            if deps and deps[0] < 0:
                body.waits_outside.append(base + index)
        body.calls.append(
            _Placed(base, callee, [env[v] if v.type is _ADDRESS else (_ABSOLUTE, 0) for v in op.operands])
        )
        for value, result in zip(op.results, callee.results):
            env[value] = (
                placed(result)
                if value.type is _TOKEN
                else _address(result, given)
                if value.type is _ADDRESS
                else result
            )

    @staticmethod
    def skip(op: Call, env: dict[Value, Any]) -> None:
        """As if the layer took no time: it hands on, token for token, what it is given."""
        tokens = [env[v] for v in op.operands if v.type is _TOKEN]
        if len(tokens) != len(op.results) or any(v.type is not _TOKEN for v in op.results):
            raise TyirError(
                f"@{op.callee.leaf} takes {len(tokens)} tokens and returns {len(op.results)} values, so"
                " that it cannot be left out",
                help="simulate all layers: at most 32768 tokens",
            )
        env.update(zip(op.results, tokens))


def _affine(op: edge10.Affine, env: dict[Value, Any]) -> int:
    total: int = sum(c * env[v] for c, v in zip(op.coefficients, op.operands)) + op.constant
    value = max(total // op.divisor, op.low)
    return value if op.high is None else min(value, op.high)
