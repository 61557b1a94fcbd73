"""The verifier: everything that must hold of IR beyond what its data structures enforce.

    structure      terminators end blocks and only blocks; successors stay in their region
    order          a use follows its definition: in its block, or in a block that dominates it (graph regions included)
    isolation      no operand of an isolated op's region comes from outside
    declarations   counts, kinds and inferred types of registered ops, and their own `verify`
    attributes     those named `tyir.*` are known ones (`tyir.checking.own_attributes`)
    symbols, calls, in-place updates, aliases: `tyir.checking.rules`;  stages: `tyir.stages`

One walk visits every op with the values defined so far in its block; enclosing blocks form a stack.  What
a declaration says of an op depends on its properties and types alone, so each such combination is checked
once. All problems are reported together (at most 20).
"""  # noqa: E501

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tyir.attributes import DictAttr
from tyir.checking.dominance import DominanceTree
from tyir.checking.own_attributes import unknown_attributes
from tyir.checking.rules import (
    check_call,
    check_function,
    check_in_place,
    check_symbols,
)
from tyir.checking.symbols import SymbolTables
from tyir.diagnostics import Diagnostic, Label, TyirError
from tyir.ir import Block, Op, Region, Value
from tyir.location import CallSiteLoc, FileLoc, FusedLoc, Location, NameLoc
from tyir.opdef import DeclaredOp
from tyir.printer import op_excerpt
from tyir.stages import check_stage
from tyir.traits import InPlace, IsolatedFromAbove, NoTerminator, Pure, SymbolTable, SymbolUser, Terminator

__all__ = ["location_text", "verify"]

MAX_PROBLEMS: Final = 20
LabelOf = Callable[[Op], Label | None]


def verify(op: Op, label_of: LabelOf | None = None) -> None:
    """Check `op` and everything in it.  Raises `TyirError` with all problems (20 at most).

    `label_of` tells where in a source text an op stands; without it the op's location and a one-line excerpt
    say which op is meant.
    """
    verifier = _Verifier(label_of)
    with suppress(_Full):
        verifier.run(op)
    if verifier.problems:
        raise TyirError(verifier.problems)


class _Full(Exception):
    """Enough problems have been found."""


@dataclass(slots=True)
class _Facts:
    """What the walk needs to know of an op class."""

    terminator: bool
    declared: bool
    repeats: bool  # declaration and `verify` depend on properties and types alone
    own_verify: bool
    rule: Callable[[Any, SymbolTables], Iterator[str]] | None


@dataclass(slots=True)
class _Level:
    """A block being walked."""

    block: Block
    defined: set[Value]
    ops: Iterator[Op]
    isolated: bool  # the block's region may not look outside
    rest: Iterator[Block]  # the op's further blocks


@dataclass
class _Verifier:
    label_of: LabelOf | None
    problems: list[Diagnostic] = field(default_factory=list)
    levels: list[_Level] = field(default_factory=list)
    facts: dict[type[Op], _Facts] = field(default_factory=dict)
    checked: set[tuple[Any, ...]] = field(default_factory=set)
    trees: dict[Region, DominanceTree] = field(default_factory=dict)
    tables: SymbolTables = field(default_factory=SymbolTables)
    seen: set[DictAttr] = field(default_factory=set)  # attributes whose names have been looked at

    def run(self, root: Op) -> None:
        self._names(root)
        self._declaration(root, self._facts(root))
        self._enter(root)
        while self.levels:
            self._block()
        for problem_op, message in check_stage(root):
            self.problem(problem_op, message)

    def problem(self, op: Op, message: str | Diagnostic) -> None:
        diagnostic = message if isinstance(message, Diagnostic) else Diagnostic(f"'{op.name}' {message}")
        label = self.label_of(op) if self.label_of is not None else None
        if diagnostic.label is None and label is not None:
            diagnostic = replace(diagnostic, label=label)
        elif not diagnostic.where:
            diagnostic = replace(
                diagnostic, where=location_text(op.loc), excerpt=diagnostic.excerpt or op_excerpt(op)
            )
        self.problems.append(diagnostic)
        if len(self.problems) >= MAX_PROBLEMS:
            raise _Full

    # -- the walk
    # ---------------------------------------------------------------------------------------------------
    def _enter(self, op: Op) -> None:
        """Begin the blocks of an op's regions, one after the other."""
        isolated = IsolatedFromAbove in op.traits
        if SymbolTable in op.traits:
            for inner, message in check_symbols(op, self.tables):
                self.problem(inner, message)
        self._next_block(isolated, iter([block for region in op.regions for block in region.blocks]))

    def _next_block(self, isolated: bool, rest: Iterator[Block]) -> None:
        block = next(rest, None)
        if block is not None:
            self.levels.append(_Level(block, set(block.args), iter(block), isolated, rest))

    def _block(self) -> None:
        """Walk the innermost block up to its next op with regions, or to its end."""
        level = self.levels[-1]
        defined, facts = level.defined, self.facts
        checked, seen = self.checked, self.seen
        for op in level.ops:
            for value in op._operands:
                if value not in defined:
                    self._look_outside(op, value)
            results = op.results
            if results:
                if len(results) == 1:
                    defined.add(results[0])
                else:
                    defined.update(results)
            if op.attributes not in seen or op.regions:
                self._names(op)
            cls = type(op)
            fact = facts.get(cls) or self._facts(op)
            if fact.declared:
                if fact.repeats:
                    key = (
                        cls,
                        op.properties,
                        *[v.type for v in op._operands],
                        None,
                        *[v.type for v in results],
                    )
                    as_declared = key in checked or self._declaration(op, fact)
                    if as_declared:
                        checked.add(key)
                else:
                    as_declared = self._declaration(op, fact)
                if as_declared and fact.rule is not None:
                    for message in fact.rule(op, self.tables):
                        self.problem(op, message)
            if (fact.terminator or op.successors) and op._next is not None:
                self.problem(op, "must end its block")
            if op.successors:
                self._successors(op)
            if op.regions:
                self._enter(op)
                return
        self._end(level)

    def _end(self, level: _Level) -> None:
        self.levels.pop()
        self._block_end(level.block)
        self._next_block(level.isolated, level.rest)

    def _block_end(self, block: Block) -> None:
        parent = block.parent_op
        if parent is None or not parent.registered or NoTerminator in parent.traits:
            return
        last = block.last_op
        if last is None:
            self.problem(parent, "has an empty block; it must end in a terminator")
        elif last.registered and Terminator not in last.traits:
            self.problem(last, f"ends a block of '{parent.name}' but is not a terminator")

    def _successors(self, op: Op) -> None:
        region = op.block.region if op.block is not None else None
        for block in op.successors:
            if block.region is not region:
                self.problem(op, "jumps to a block outside its region")
            elif region is not None and block is region.blocks[0]:
                self.problem(op, "jumps to the entry block")

    def _names(self, op: Op) -> None:
        for message in unknown_attributes(op):
            self.problem(op, message)
        self.seen.add(op.attributes)

    # -- values
    # -----------------------------------------------------------------------------------------------------
    def _look_outside(self, op: Op, value: Value) -> None:
        """`value` is not defined before `op` in its own block: look in dominating and in enclosing blocks."""
        for level in reversed(self.levels):
            if value in level.defined:
                return
            if (
                value.block is not None
                and value.block.region is level.block.region
                and value.block is not level.block
            ):
                if not self._dominates(value.block, level.block):
                    self.problem(op, f"uses {_shown(value)}, whose block does not dominate this one")
                return
            if level.isolated:
                break
        self.problem(op, self._why_invisible(op, value))

    def _dominates(self, above: Block, below: Block) -> bool:
        region = below.region
        assert region is not None
        tree = self.trees.get(region)
        if tree is None:
            tree = self.trees[region] = DominanceTree(region)
        return tree.dominates(above, below)

    def _why_invisible(self, op: Op, value: Value) -> str:
        owner = value.owner
        if owner.block is None if isinstance(owner, Op) else owner.region is None:
            return f"uses {_shown(value)}, which is in no block (its op was erased)"
        current: Op | None = op
        while current is not None:
            if current.block is value.block:
                return f"uses {_shown(value)} before its definition"
            current = current.parent_op
            if (
                current is not None
                and IsolatedFromAbove in current.traits
                and current is not owner
                and value.block is not None
            ):
                if _contains(current, value):
                    return f"uses {_shown(value)}, which is defined in a region that this op is not in"
                return (
                    f"uses {_shown(value)}, which is defined outside of '{current.name}'{_symbol(current)},"
                    " an isolated op"
                )
        return f"uses {_shown(value)}, which is defined in a region that this op is not in"

    # -- declarations
    # -----------------------------------------------------------------------------------------------
    def _facts(self, op: Op) -> _Facts:
        cls = type(op)
        traits = cls.traits
        declared = issubclass(cls, DeclaredOp)
        facts = self.facts[cls] = _Facts(
            terminator=Terminator in traits,
            declared=declared,
            repeats=issubclass(cls, DeclaredOp) and Pure in traits and not cls.region_fields,
            own_verify=cls.verify is not Op.verify,
            rule=_RULES.get(cls.name) if declared else None,
        )
        if facts.rule is None and declared and InPlace in traits:
            facts.rule = check_in_place
        elif facts.rule is None and issubclass(cls, DeclaredOp) and SymbolUser in traits:
            facts.rule = cls.verify_symbols
        return facts

    def _declaration(self, op: Op, facts: _Facts) -> bool:
        """Whether an op is as its class declares."""
        if not isinstance(op, DeclaredOp):
            return True
        try:
            messages = list(op.check_declaration())
            if not messages and facts.own_verify:
                messages = list(op.verify())
        except TyirError as error:
            messages = [d.message for d in error.diagnostics]
        except Exception as error:
            messages = [_faulty_declaration(op, error)]
        for message in messages:
            self.problem(op, message)
        return not messages


def _faulty_declaration(op: Op, error: Exception) -> Diagnostic:
    """An op whose `infer` or `verify` raised something else than a diagnostic: its declaration's fault."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Diagnostic(
        f"'{op.name}' cannot be checked: its declaration in {type(op).__module__} raises"
        f" {type(error).__name__}: {error} (in {Path(frame.filename).name}:{frame.lineno})",
        help="infer and verify say what is wrong with an op by messages, or by a TyirError",
    )


_RULES: Final[dict[str, Callable[[Any, SymbolTables], Iterator[str]]]] = {
    "func.call": check_call,
    "func.func": check_function,
}


def _contains(op: Op, value: Value) -> bool:
    block = value.block
    parent = block.parent_op if block is not None else None
    return parent is not None and op.is_ancestor_of(parent)


def _shown(value: Value) -> str:
    name = f"%{value.name}" if value.name else "a value"
    if isinstance(value.owner, Op):
        return f"{name} (result {value.index} of '{value.owner.name}')"
    return f"{name} (block argument {value.index})"


def _symbol(op: Op) -> str:
    return f" @{op.sym_name}" if op.sym_name else ""


def location_text(loc: Location) -> str:
    """The place a message names: `file:line:col`, or the module path, or both; empty when unknown."""
    if isinstance(loc, FileLoc):
        return f"{loc.file}:{loc.line}:{loc.col}"
    if isinstance(loc, NameLoc):
        child = location_text(loc.child) if loc.child is not None else ""
        return f"{loc.name} ({child})" if child else loc.name
    if isinstance(loc, FusedLoc):
        texts: dict[str, None] = {location_text(part): None for part in loc.parts}
        return ", ".join(text for text in list(texts)[:3] if text)
    if isinstance(loc, CallSiteLoc):
        return location_text(loc.callee)
    return ""
