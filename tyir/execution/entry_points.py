"""How a compiled model is called: which functions are entered from outside, and what their arguments are.

    func.func @main_s8(%ids {tyir.name = "ids", tyir.role = "tokens"}, %pos {tyir.role = "position", ...},
                       %k0 {tyir.role = "cache", ...}) -> (tensor<..> {tyir.name = "logits"},
                       tensor<..> {tyir.alias = 2 : i64, tyir.name = "k0"})  attributes {tyir.entry = 8 : i64}

`tyir.entry` is the number of tokens of a step; `tyir.alias` says which argument a result updates in place.
Passes write these, everything behind them reads them here: a function's name, and the type of an argument,
only speak to people.
"""

from __future__ import annotations

from typing import Final, Literal

from tyir.attributes import DictAttr, IntegerAttr, StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.ir import Value
from tyir.types import i64

__all__ = [
    "ALIAS",
    "ENTRY",
    "Role",
    "alias_of",
    "aliasing",
    "argument",
    "arguments",
    "entry_point",
    "entry_points",
    "mark_entry",
    "name_of",
    "result",
    "role_of",
    "tokens_of",
]

ENTRY: Final = "tyir.entry"
_ROLE: Final = "tyir.role"
_NAME: Final = "tyir.name"
ALIAS: Final = "tyir.alias"

# What the caller gives: the ids [b, s] or the embeddings [b, s, hidden] of a step's tokens, the number of
# tokens before it [b], and the keys and values of those; what dual chunk attention multiplies scores by, f32
# [b]; of a model with two rotary tables which of their rows, i32 [b, s]; of a model that sees pictures the
# rotary tables [capacity, D/2], filled once per request, and what is added to hidden states [b, s, hidden];
# of its tower the patches of a picture, of what fills those tables the positions of all slots.  Of steps that
# return one row of each sequence, which: i32 [b].
Role = Literal[
    "tokens",
    "embeddings",
    "position",
    "cache",
    "temperature",
    "rope_rows",
    "rope",
    "addend",
    "patches",
    "positions",
    "row",
]


# ----------------------------------------------------------------------------------------------- entry points


def mark_entry(function: Func, tokens: int) -> None:
    """Say that a function is called from outside, with `tokens` tokens a step."""
    function.set_attribute(ENTRY, IntegerAttr(tokens, i64))


def tokens_of(function: Func) -> int | None:
    """The tokens of a step of an entry point, None for other functions."""
    value = function.attributes.get(ENTRY)
    return value.value if isinstance(value, IntegerAttr) else None


def entry_points(module: Module) -> dict[int, Func]:
    """The entry points of a die's module, by the tokens of a step; `TyirError` when two share a number."""
    found: dict[int, Func] = {}
    for function in module.body:
        if isinstance(function, Func) and (tokens := tokens_of(function)) is not None:
            other = found.setdefault(tokens, function)
            if other is not function:
                raise TyirError(
                    f"@{other.sym_name} and @{function.sym_name} are both the entry point for {tokens} tokens"
                    f" ({ENTRY} = {tokens})"
                )
    return found


def entry_point(module: Module, tokens: int) -> Func:
    """The entry point for steps of `tokens` tokens; `TyirError` that names the lengths there are."""
    known = entry_points(module)
    if tokens not in known:
        lengths = ", ".join(map(str, known))
        raise TyirError(
            f"the module has no entry point for {tokens} tokens ({ENTRY} = {tokens})",
            help=f"sequence lengths here: {lengths}" if known else "specialize-seqlen makes entry points",
        )
    return known[tokens]


# ----------------------------------------------------------------------------------- arguments and results


def argument(name: str, role: Role) -> DictAttr:
    """What an argument's attributes say."""
    return DictAttr({_NAME: StringAttr(name), _ROLE: StringAttr(role)})


def result(name: str, alias: int | None = None) -> DictAttr:
    """What a result's attributes say; `alias`: the argument that it updates in place."""
    attributes = DictAttr({_NAME: StringAttr(name)})
    return attributes if alias is None else aliasing(attributes, alias)


def aliasing(attributes: DictAttr, argument: int) -> DictAttr:
    """Attributes of a result that updates another argument than before."""
    return attributes.with_entry(ALIAS, IntegerAttr(argument, i64))


def name_of(attributes: DictAttr) -> str | None:
    """The name of an argument or result, from its attributes."""
    value = attributes.get(_NAME)
    return value.value if isinstance(value, StringAttr) else None


def role_of(function: Func, index: int) -> str | None:
    """The role (`Role`) of an argument, None where nothing is said."""
    value = function.arg_attr(index).get(_ROLE)
    return value.value if isinstance(value, StringAttr) else None


def arguments(function: Func, role: Role) -> list[Value]:
    """The arguments of a role."""
    return [value for index, value in enumerate(function.args) if role_of(function, index) == role]


def alias_of(function: Func, index: int) -> int | None:
    """The argument that result `index` is, or None."""
    value = function.res_attr(index).get(ALIAS)
    return value.value if isinstance(value, IntegerAttr) else None
