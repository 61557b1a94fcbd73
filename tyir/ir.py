"""The IR in memory: values, operations, blocks, regions.

    Op ─ operands → Value ─ owner → Op | Block        an op has results, properties, attributes, regions, successors, a location
    Op ─ regions → Region ─ blocks → Block ─ ops → Op  ops of a block are a doubly linked list: insert and erase are O(1)

Invariants kept by every method here: `value.uses` lists each using op once per use; an op is in at most
one block.  Everything else (types, dominance, terminators) is the verifier's business (`tyir.verifier`).

A registered op is a class declared with `tyir.opdef`; an unregistered one gets a bare class per name, so
`op.name` and `type(op)` always tell what it is.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from tyir.attributes import Attribute, DictAttr, StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.location import UNKNOWN, Location
from tyir.process.collector import collector_paused
from tyir.types import Type

if TYPE_CHECKING:
    from tyir.traits import Trait

__all__ = ["EMPTY_DICT", "Block", "Op", "Region", "Value", "unregistered_op"]

EMPTY_DICT = DictAttr()


class Value:
    """An SSA value: the `index`-th result of an op or the `index`-th argument of a block."""

    __slots__ = ("index", "name", "owner", "type", "uses")

    def __init__(self, type: Type, owner: Op | Block, index: int, name: str | None = None) -> None:
        self.type = type
        self.owner = owner
        self.index = index
        self.uses: list[Op] = []
        self.name = name

    @property
    def op(self) -> Op | None:
        """The defining op, None for a block argument."""
        return self.owner if isinstance(self.owner, Op) else None

    @property
    def block(self) -> Block | None:
        return self.owner.block if isinstance(self.owner, Op) else self.owner

    def replace_all_uses_with(self, new: Value, unless: Callable[[Op], bool] | None = None) -> None:
        """Make every user (except those for which `unless` holds) use `new`; `new` takes over the name if it
        has none.
        """
        if new is self:
            return
        kept, moved = [], self.uses
        if unless is not None:
            kept = [user for user in self.uses if unless(user)]
            moved = [user for user in self.uses if not unless(user)]
        for user in dict.fromkeys(moved):
            user._operands = tuple([new if v is self else v for v in user._operands])
        new.uses.extend(moved)
        self.uses = kept
        if new.name is None:
            new.name = self.name

    @property
    def users(self) -> list[Op]:
        """The distinct using ops, in order of first use."""
        return list(dict.fromkeys(self.uses))

    def __repr__(self) -> str:
        return f"<Value {'%' + self.name if self.name else '%?'}#{self.index} : {self.type}>"


class Op:
    """An operation.  Make one with the declared constructor of its class or with `Class.create(...)`."""

    __slots__ = (
        "_next",
        "_operands",
        "_prev",
        "attributes",
        "block",
        "loc",
        "properties",
        "regions",
        "results",
        "successors",
    )

    name: ClassVar[str] = ""
    traits: ClassVar[frozenset[type[Trait]]] = frozenset()
    registered: ClassVar[bool] = False

    _operands: tuple[Value, ...]
    results: tuple[Value, ...]
    properties: DictAttr
    attributes: DictAttr
    regions: tuple[Region, ...]
    successors: tuple[Block, ...]
    loc: Location
    block: Block | None
    _prev: Op | None
    _next: Op | None

    @classmethod
    def create(
        cls,
        operands: Iterable[Value] = (),
        result_types: Iterable[Type] = (),
        properties: DictAttr = EMPTY_DICT,
        attributes: DictAttr = EMPTY_DICT,
        regions: Iterable[Region] = (),
        successors: Iterable[Block] = (),
        loc: Location = UNKNOWN,
        result_names: Sequence[str | None] = (),
    ) -> Self:
        """A detached op from its parts, unchecked."""
        op = cls.__new__(cls)
        op._operands = operands = tuple(operands)
        for value in operands:
            value.uses.append(op)
        op.results = tuple([Value(t, op, i) for i, t in enumerate(result_types)])
        for value, value_name in zip(op.results, result_names):
            value.name = value_name
        op.properties = properties
        op.attributes = attributes
        op.regions = tuple(regions)
        for region in op.regions:
            region.op = op
        op.successors = tuple(successors)
        op.loc = loc
        op.block = op._prev = op._next = None
        return op

    # -- operands
    # -------------------------------------------------------------------------------------------------
    @property
    def operands(self) -> tuple[Value, ...]:
        return self._operands

    @operands.setter
    def operands(self, values: Iterable[Value]) -> None:
        for value in self._operands:
            value.uses.remove(self)
        self._operands = tuple(values)
        for value in self._operands:
            value.uses.append(self)

    def set_operand(self, index: int, value: Value) -> None:
        old = self._operands[index]
        if old is not value:
            old.uses.remove(self)
            value.uses.append(self)
            self._operands = (*self._operands[:index], value, *self._operands[index + 1 :])

    # -- results
    # --------------------------------------------------------------------------------------------------
    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    @property
    def is_unused(self) -> bool:
        return not any(r.uses for r in self.results)

    def replace_with(self, values: Sequence[Value] | Op) -> None:
        """Replace all uses of the results and erase this op."""
        if isinstance(values, Op):
            values = values.results
        if len(values) != len(self.results):
            raise ValueError(f"{self.name} has {len(self.results)} results, {len(values)} replacements given")
        for old, new in zip(self.results, values):
            old.replace_all_uses_with(new)
        self.erase()

    # -- place
    # ----------------------------------------------------------------------------------------------------
    @property
    def next_op(self) -> Op | None:
        return self._next

    @property
    def prev_op(self) -> Op | None:
        return self._prev

    @property
    def parent_op(self) -> Op | None:
        """The op whose region holds this one."""
        return None if self.block is None or self.block.region is None else self.block.region.op

    def detach(self) -> Self:
        """Take the op out of its block; it keeps operands and uses."""
        block = self.block
        if block is not None:
            if self._prev is None:
                block.first_op = self._next
            else:
                self._prev._next = self._next
            if self._next is None:
                block.last_op = self._prev
            else:
                self._next._prev = self._prev
            self.block = self._prev = self._next = None
        return self

    def insert_before(self, other: Op) -> Self:
        assert other.block is not None
        other.block.insert(self, before=other)
        return self

    def insert_after(self, other: Op) -> Self:
        assert other.block is not None
        other.block.insert(self, before=other._next)
        return self

    def erase(self) -> None:
        """Delete the op and everything in its regions.  `ValueError` if a result is still used."""
        for value in self.results:
            if value.uses:
                raise ValueError(
                    f"cannot erase {self.name}: its result is still used by {value.uses[0].name}"
                )
        self.detach()
        self.drop_references()

    def drop_references(self) -> None:
        """Forget all operands, here and in nested ops (which are about to disappear together)."""
        for op in self.walk():
            for value in op._operands:
                value.uses.remove(op)
            op._operands = ()

    # -- facts
    # ----------------------------------------------------------------------------------------------------
    @property
    def dialect(self) -> str:
        return self.name.partition(".")[0]

    @classmethod
    def has_trait(cls, trait: type[Trait]) -> bool:
        return trait in cls.traits

    @property
    def sym_name(self) -> str | None:
        """The symbol this op defines, if any."""
        value = self.properties.get("sym_name")
        return value.value if isinstance(value, StringAttr) else None

    @property
    def body(self) -> Block:
        """The entry block of the first region; `TyirError` when there is none (a function that is only
        declared).
        """
        if not self.regions or not self.regions[0].blocks:
            raise TyirError(f"'{self.name}'{' @' + self.sym_name if self.sym_name else ''} has no body")
        return self.regions[0].blocks[0]

    def set_attribute(self, key: str, value: Attribute) -> None:
        self.attributes = self.attributes.with_entry(key, value)

    def set_property(self, key: str, value: Attribute) -> None:
        self.properties = self.properties.with_entry(key, value)

    # -- traversal
    # ------------------------------------------------------------------------------------------------
    def walk(self) -> Iterator[Op]:
        """This op and every op below it, parents first.

        The op just yielded may be erased or moved by the caller.
        """
        yield self
        stack: list[Iterator[Op]] = []
        current = _region_ops(self)
        while True:
            for op in current:
                regions = op.regions
                yield op
                if regions:
                    stack.append(current)
                    current = _region_ops(op)
                    break
            else:
                if not stack:
                    return
                current = stack.pop()

    def walk_type(self, op_class: type[_OpT]) -> Iterator[_OpT]:
        """Every op of a class at or below this one."""
        for op in self.walk():
            if isinstance(op, op_class):
                yield op

    def is_ancestor_of(self, op: Op) -> bool:
        """Whether `op` is this op or nested in it."""
        current: Op | None = op
        while current is not None and current is not self:
            current = current.parent_op
        return current is self

    def clone(self, mapping: dict[Value, Value] | None = None) -> Self:
        """A detached deep copy.

        `mapping` translates operands (values it lacks are used as they are) and is extended with what is
        copied.
        """
        with collector_paused():
            new: Self = _clone(self, {} if mapping is None else mapping)
            return new

    def verify(self) -> Iterator[Diagnostic | str]:
        """What the declaration's types cannot say; yields messages.  Overridden by declared ops."""
        return iter(())

    def __str__(self) -> str:
        from tyir.printer import print_op

        return print_op(self)

    def __repr__(self) -> str:
        return f"<{self.name}{' @' + self.sym_name if self.sym_name else ''}>"


_OpT = TypeVar("_OpT", bound=Op)


def _region_ops(op: Op) -> Iterator[Op]:
    for region in op.regions:
        for block in region.blocks:
            yield from block


def _clone(root: Any, mapping: dict[Value, Value]) -> Any:
    """Copy an op with its regions.

    Regions wait on a list until the block around them is complete, so nesting is not bounded by Python's
    stack.
    """
    new_root = _clone_flat(root, mapping, {})
    waiting: list[tuple[Any, Any]] = [(root, new_root)] if root.regions else []
    while waiting:
        op, new = waiting.pop()
        new.regions = tuple([_clone_region(r, mapping, waiting) for r in op.regions])
        for region in new.regions:
            region.op = new
    return new_root


def _clone_ops(
    source: Block,
    target: Block,
    mapping: dict[Value, Value],
    block_map: dict[Block, Block],
    waiting: list[tuple[Any, Any]],
) -> None:
    """Copy a block's ops to the end of another.

    One loop without calls: specialisation copies whole functions.
    """
    new_object, get = object.__new__, mapping.get
    last: Any = target.last_op
    op: Any = source.first_op
    while op is not None:
        regions = op.regions
        if regions or op.successors:
            new = _clone_flat(op, mapping, block_map)
            if regions:
                waiting.append((op, new))
        else:
            cls: Any = type(op)
            new = new_object(cls)
            operands = op._operands
            if operands:
                operands = tuple([get(v, v) for v in operands])
                for value in operands:
                    value.uses.append(new)
            new._operands = operands
            results = op.results
            if len(results) == 1:
                value = results[0]
                mapping[value] = copy = new_object(Value)
                copy.type = value.type
                copy.owner = new
                copy.index = 0
                copy.uses = []
                copy.name = value.name
                new.results = (copy,)
            elif results:
                new.results = copies = tuple([Value(v.type, new, v.index, v.name) for v in results])
                mapping.update(zip(results, copies))
            else:
                new.results = results
            new.properties = op.properties
            new.attributes = op.attributes
            new.loc = op.loc
            new.successors = new.regions = ()
        new.block = target
        new._prev = last
        if last is None:
            target.first_op = new
        else:
            last._next = new
        last = new
        op = op._next
    if last is not None:
        last._next = None
    target.last_op = last


def _clone_flat(op: Any, mapping: dict[Value, Value], block_map: dict[Block, Block]) -> Any:
    """Copy an op without its regions, detached."""
    cls: Any = type(op)
    new = cls.__new__(cls)
    new._operands = operands = tuple([mapping.get(v, v) for v in op._operands])
    for value in operands:
        value.uses.append(new)
    new.results = tuple([Value(v.type, new, v.index, v.name) for v in op.results])
    mapping.update(zip(op.results, new.results))
    new.properties = op.properties
    new.attributes = op.attributes
    new.loc = op.loc
    new.block = new._prev = new._next = None
    new.successors = tuple([block_map.get(b, b) for b in op.successors])
    new.regions = ()
    return new


def _clone_region(region: Region, mapping: dict[Value, Value], waiting: list[tuple[Any, Any]]) -> Region:
    """Copy a region's blocks with their ops; ops that have regions themselves are put on `waiting`."""
    new = Region()
    block_map: dict[Block, Block] = {}
    for block in region.blocks:
        copy = Block([a.type for a in block.args], [a.name for a in block.args])
        copy.label = block.label
        copy.arg_locs = block.arg_locs
        mapping.update(zip(block.args, copy.args))
        block_map[block] = new.append(copy)
    for block in region.blocks:
        _clone_ops(block, block_map[block], mapping, block_map, waiting)
    if len(region.blocks) > 1:  # operands defined in a block that stands later in the text
        for block in region.blocks:
            for op, op_copy in zip(block, block_map[block]):
                for index, value in enumerate(op._operands):
                    op_copy.set_operand(index, mapping.get(value, value))
    return new


class Block:
    """A list of ops with arguments."""

    __slots__ = ("arg_locs", "args", "first_op", "label", "last_op", "region")

    def __init__(
        self, arg_types: Iterable[Type] = (), arg_names: Sequence[str | None] = (), ops: Iterable[Op] = ()
    ) -> None:
        self.args: list[Value] = []
        self.arg_locs: tuple[Location, ...] = ()
        self.first_op: Op | None = None
        self.last_op: Op | None = None
        self.label: str | None = None
        self.region: Region | None = None
        for index, arg_type in enumerate(arg_types):
            self.add_arg(arg_type, arg_names[index] if index < len(arg_names) else None)
        for op in ops:
            self.append(op)

    def add_arg(self, type: Type, name: str | None = None) -> Value:
        value = Value(type, self, len(self.args), name)
        self.args.append(value)
        return value

    def erase_arg(self, index: int) -> None:
        """Remove an argument that has no uses."""
        if self.args[index].uses:
            raise ValueError(f"block argument {index} is still used by {self.args[index].uses[0].name}")
        del self.args[index]
        self.arg_locs = (*self.arg_locs[:index], *self.arg_locs[index + 1 :])
        for i, arg in enumerate(self.args):
            arg.index = i

    @property
    def parent_op(self) -> Op | None:
        return None if self.region is None else self.region.op

    def append(self, op: Op) -> Op:
        assert op.block is None, f"{op.name} is already in a block"
        op.block = self
        last = self.last_op
        op._prev = last
        if last is None:
            self.first_op = op
        else:
            last._next = op
        self.last_op = op
        return op

    def insert(self, op: Op, before: Op | None) -> Op:
        """Insert a detached op before `before` (at the end when None)."""
        if before is None:
            return self.append(op)
        assert op.block is None and before.block is self
        op.block = self
        op._next = before
        op._prev = before._prev
        if before._prev is None:
            self.first_op = op
        else:
            before._prev._next = op
        before._prev = op
        return op

    def __iter__(self) -> Iterator[Op]:
        """The ops in order; the op just yielded may be erased or replaced during iteration."""
        op = self.first_op
        while op is not None:
            following = op._next
            yield op
            op = following

    def __reversed__(self) -> Iterator[Op]:
        op = self.last_op
        while op is not None:
            preceding = op._prev
            yield op
            op = preceding

    @property
    def ops(self) -> list[Op]:
        return list(self)

    @property
    def terminator(self) -> Op:
        """The last op; `ValueError` in an empty block."""
        if self.last_op is None:
            raise ValueError("empty block has no terminator")
        return self.last_op


class Region:
    """A list of blocks owned by an op; the first is the entry."""

    __slots__ = ("blocks", "op")

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self.blocks: list[Block] = []
        self.op: Op | None = None
        for block in blocks:
            self.append(block)

    def append(self, block: Block) -> Block:
        assert block.region is None, "block is already in a region"
        block.region = self
        self.blocks.append(block)
        return block

    @property
    def entry(self) -> Block:
        return self.blocks[0]


_unregistered: dict[str, type[Op]] = {}


def unregistered_op(name: str) -> type[Op]:
    """The class that stands for all ops of a name nobody declared (one class per name for the life of the
    process).
    """
    op_class = _unregistered.get(name)
    if op_class is None:
        op_class = type(name, (Op,), {"__slots__": (), "name": name})
        _unregistered[name] = op_class
    return op_class
