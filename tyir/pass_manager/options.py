"""Options of a pass: the fields of its frozen dataclass, from text and back.

`max_kv: int = 1024` is the option `max-kv`.  Kinds: int, float, str, bool, tuple[int, ...], tuple[str, ...],
each perhaps with `| None`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Final

from tyir.diagnostics import TyirError, did_you_mean
from tyir.pass_manager.text import OptionText, PassText, pipeline_error

__all__ = ["describe_options", "make_pass", "options_text"]

MAX_VALUES: Final = 1000  # of a list
_MAX_INT: Final = (1 << 63) - 1  # what the IR's i64 holds
_TRUE: Final = {"true": True, "1": True, "false": False, "0": False}


def _kinds(pass_class: type) -> dict[str, Any]:
    """Option name to type."""
    hints = typing.get_type_hints(pass_class)
    return {
        f.name.replace("_", "-"): _without_none(hints[f.name])
        for f in dataclasses.fields(pass_class)
        if f.init
    }


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        rest = [k for k in typing.get_args(kind) if k is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return kind


def make_pass(pass_class: type[Any], text: PassText) -> Any:
    """The pass with the options of the text; errors point at the option."""
    kinds = _kinds(pass_class)
    values: dict[str, Any] = {}
    for option in text.options:
        kind = kinds.get(option.name.replace("_", "-"))  # xDSL writes underscores
        if kind is None:
            known = f"options of {text.name}: {', '.join(kinds)}" if kinds else f"{text.name} has no options"
            hint = did_you_mean(option.name, kinds) or known
            raise pipeline_error(
                text.source,
                option.start,
                option.end,
                f"pass '{text.name}' has no option '{option.name}'",
                hint,
            )
        field = option.name.replace("-", "_")
        if field in values:
            raise pipeline_error(
                text.source,
                option.start,
                option.end,
                f"option '{option.name}' is given twice",
                "give it once",
            )
        values[field] = _value(kind, option, text, pass_class)
    missing = [
        f.name.replace("_", "-")
        for f in dataclasses.fields(pass_class)
        if f.init
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in values
    ]
    if missing:
        raise pipeline_error(
            text.source,
            text.start,
            text.end,
            f"pass '{text.name}' needs the option{'s' * (len(missing) > 1)} {', '.join(missing)}",
            _options_help(pass_class, text.name),
        )
    try:
        return pass_class(**values)
    except TyirError:
        raise
    except ValueError as error:
        raise pipeline_error(
            text.source,
            text.start,
            text.end,
            f"pass '{text.name}': {error}",
            _options_help(pass_class, text.name),
        ) from None


def _options_help(pass_class: type[Any], name: str) -> str:
    """`options of 'kv-materialize': max-kv=<integer>, default 1024; ...`"""
    rows = describe_options(pass_class)
    return f"options of '{name}': " + "; ".join(f"{o}=<{kind}>, default {d}" for o, kind, d in rows)


def _value(kind: Any, option: OptionText, text: PassText, pass_class: type[Any]) -> Any:
    try:
        if typing.get_origin(kind) is tuple and len(option.values) <= MAX_VALUES:
            return tuple(_scalar(typing.get_args(kind)[0], word) for word in option.values)
        if not option.values and kind is bool:
            return True
        if kind is str:
            return ",".join(option.values)
        if len(option.values) != 1:
            raise ValueError("one value")
        return _scalar(kind, option.values[0])
    except ValueError:
        got = ",".join(option.values) or "nothing"
        got = got if len(got) <= 100 else f"{got[:100]}..."
        message = f"option '{option.name}' of '{text.name}' takes {_kind_text(kind)}, got '{got}'"
        help = _options_help(pass_class, text.name)
        raise pipeline_error(text.source, option.start, option.end, message, help) from None


def _scalar(kind: Any, word: str) -> Any:
    if kind is bool:
        if word not in _TRUE:
            raise ValueError(word)
        return _TRUE[word]
    if typing.get_origin(kind) is typing.Literal:
        if word not in typing.get_args(kind):
            raise ValueError(word)
        return word
    if kind is int:
        value = int(word)
        if not -_MAX_INT <= value <= _MAX_INT:
            raise ValueError(word)
        return value
    return float(word) if kind is float else word


def _kind_text(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        what = "integers" if typing.get_args(kind)[0] is int else "values"
        return f"a list of {what} such as 1,8"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(kind, str(kind))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    text = str(value)
    return f"'{text}'" if not text or any(c in text for c in " ,{}[]'\"") else text


def options_text(instance: Any) -> str:
    """`{a=1 b=[1,8]}` with every option whose value is not None; empty when the pass has none."""
    shown = [
        (f.name.replace("_", "-"), getattr(instance, f.name)) for f in dataclasses.fields(instance) if f.init
    ]
    parts = [f"{name}={_text(value)}" for name, value in shown if value is not None]
    return "{" + " ".join(parts) + "}" if parts else ""


def describe_options(pass_class: type[Any]) -> list[tuple[str, str, str]]:
    """Name, kind and default of each option, as text."""
    kinds = _kinds(pass_class)
    rows = []
    for f in dataclasses.fields(pass_class):
        if f.init:
            name = f.name.replace("_", "-")
            default = (
                "required"
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
                else _text(f.default)
            )
            rows.append((name, _kind_text(kinds[name]), default))
    return rows
