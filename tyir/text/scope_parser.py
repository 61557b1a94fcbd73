"""What names mean while IR is parsed: values and blocks of the regions being read, defined or only used so
far.

Values may be used before their definition within one isolated op; what stays undefined is reported at its
end, and order is the verifier's business. Regions are a stack of frames of our own: their nesting is not
bounded by Python's recursion limit, but by `MAX_REGIONS`.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Final

from tyir.diagnostics import Diagnostic, SourceText, TyirError, did_you_mean
from tyir.ir import Block, Op, Region, Value
from tyir.location import UNKNOWN, Location
from tyir.text.attribute_parser import AttributeParser
from tyir.text.lexer import MAX_REGIONS
from tyir.text.parser_state import Frame, Header, Scope
from tyir.types import NoneType, Type

__all__ = ["BLOCK", "ScopeParser", "starts_location"]

_VALUE: Final = re.compile(r"%(?:[0-9]+|[A-Za-z$._-][A-Za-z0-9$._-]*)(?:#[0-9]+)?")
BLOCK: Final = re.compile(r"\^([A-Za-z0-9$._-]+)")
_NUMBERED: Final = re.compile(r"bb\d+")
_UNSET: Final = NoneType()  # type of a value used before its definition, until a signature tells
MAX_PROBLEMS: Final = 20


class ScopeParser(AttributeParser):
    """Attributes plus scopes.  With `positions`, remembers where in the text each op begins."""

    def __init__(self, source: SourceText, positions: dict[Op, int] | None = None) -> None:
        super().__init__(source)
        self._positions = positions
        self._frames: list[Frame] = []
        self._frame: Frame
        self._scope = Scope()

    # -- regions
    # ----------------------------------------------------------------------------------------------------
    def _open_region(self, header: Header | None, region: Region, isolated: bool) -> None:
        scope = Scope() if isolated else self._scope
        block = Block()
        region.append(block)
        if header is not None and len(self._frames) - self._is_in_a_module > MAX_REGIONS:
            self.fail(
                f"regions are nested deeper than {MAX_REGIONS} levels",
                header.start,
                help="call functions instead of nesting what they would hold",
            )
        frame = Frame(header, region, block, scope, len(scope.values))
        self._frames.append(frame)
        self._frame = frame
        self._scope = scope

    @property
    def _is_in_a_module(self) -> bool:
        """Whether the outermost op is a module, which printing puts around whatever has none."""
        outermost = self._frames[1].header if len(self._frames) > 1 else None
        return outermost is not None and outermost.name == "builtin.module"

    def _close_region(self) -> None:
        """Leave the innermost region: its names go out of scope, its labels and values must all be
        defined.
        """
        frame = self._frames.pop()
        missing = [
            self.diagnostic(f"block ^{label} is not defined", at, at + len(label) + 1)
            for label, at in islice(frame.forward.values(), MAX_PROBLEMS)
        ]
        outer = self._frames[-1].scope if self._frames else None
        if outer is not frame.scope:
            missing += [
                self._undefined(name, at, frame.scope)
                for name, (_, at) in islice(frame.scope.pending.items(), MAX_PROBLEMS)
            ]
        else:
            values = frame.scope.values
            for name in list(values)[frame.visible :]:
                del values[name]
        if missing:
            raise TyirError(missing[:MAX_PROBLEMS])
        if outer is not None:
            self._frame = self._frames[-1]
            self._scope = outer

    def _undefined(self, name: str, at: int, scope: Scope) -> Diagnostic:
        return self.diagnostic(
            f"use of undefined value {name}", at, at + len(name), help=did_you_mean(name, scope.values)
        )

    # -- values and blocks
    # ------------------------------------------------------------------------------------------
    def _operand(self) -> tuple[str, int]:
        match = self.match(_VALUE)
        if match is None:
            self.expected("a value such as %0")
        return match[0], match.start()

    def _successor(self) -> Block:
        match = self.match(BLOCK)
        if match is None:
            self.expected("a block such as ^bb1")
        return self._forward_block(match[1], match.start())

    def _forward_block(self, label: str, at: int) -> Block:
        """The block of a label in the current region, which may come later."""
        frame = self._frame
        block = frame.labels.get(label)
        if block is None:
            block = frame.labels[label] = Block()
            frame.forward[block] = (label, at)
        return block

    def _begin_block(self, label: str, at: int) -> Block:
        """Make the block of a label the current one."""
        frame = self._frame
        block = frame.labels.get(label)
        if block is not None and block not in frame.forward:
            self.fail(f"block ^{label} is defined twice", at, at + len(label) + 1)
        if block is not None:
            del frame.forward[block]
        if frame.entry_is_open:
            block = frame.block
        else:
            block = frame.region.append(block or Block())
        frame.entry_is_open = False
        frame.labels[label] = frame.block = block
        block.label = None if _NUMBERED.fullmatch(label) else label
        return block

    def _add_argument(self, block: Block, text: str, kind: Type, loc: Location, at: int) -> None:
        value = block.add_arg(kind, None if text[1].isdigit() else text[1:])
        if loc is not UNKNOWN or block.arg_locs:
            known = len(block.arg_locs)
            block.arg_locs = (*block.arg_locs, *[UNKNOWN] * (value.index - known), loc)
        self._define(text, value, at)

    def _use(self, text: str, wanted: Type, at: int, help: str = "") -> Value:
        scope = self._scope
        name = text.removesuffix("#0")  # %a#0 is %a
        value = scope.values.get(name)
        if value is None:
            pending = scope.pending.get(name)
            if pending is None:
                value = Value(_UNSET, Block(), 0)
                scope.pending[name] = value, at
            else:
                value = pending[0]
            if value.type is _UNSET:
                value.type = wanted
        if value.type is not wanted:
            message = f"{text} has type {value.type} but is used as {wanted}"
            self.fail(message, at, at + len(text), help=help)
        return value

    def _define(self, text: str, value: Value, at: int) -> None:
        scope = self._scope
        if text in scope.values:
            self.fail(f"{text} is defined twice", at, at + len(text))
        scope.values[text] = value
        if scope.pending:
            self._resolve(text, value, scope)

    def _resolve(self, text: str, value: Value, scope: Scope) -> None:
        pending = scope.pending.pop(text, None)
        if pending is None:
            return
        placeholder, at = pending
        if placeholder.type is not value.type:
            self.fail(f"{text} has type {value.type} but is used as {placeholder.type}", at, at + len(text))
        placeholder.replace_all_uses_with(value)


def starts_location(text: str, pos: int) -> bool:
    return text.startswith("loc", pos) and text[pos + 3 : pos + 23].lstrip()[:1] == "("
