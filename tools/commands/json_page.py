"""`docs/json.md`: exit codes, and every form that a command prints with `--json`, from their declarations."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from tyir.runtime_sim.host.steps import HostPrediction
from tyir.runtime_sim.serving.benchmark import Request, Result, summary
from tyir.runtime_sim.timing.summary import Summary
from tyir.tools.cli import EXIT_CODES
from tyir.tools.commands.json_forms import FORMS

__all__ = ["json_reference"]

_HEAD = """\
# For machines: exit codes and JSON

`--json` makes a command print its result on standard output as one JSON value, and nothing else there;
messages stay on standard error.  Forms only grow: fields are added, never renamed.  Where the IR would go to
standard output as well (`tyir-import`, `tyir-reduce`), `-o FILE` is needed.  Older spellings that stay:
`tyir-sim --report json`, `tyir-opt --timing=json`, `--pass-statistics=json` and `--list-passes=json`, and
`tyir-bench-serving --result FILE`.

`-q` leaves out progress and notes, `-v` says more and lets other libraries speak, `NO_COLOR` turns colours
off.  On a terminal long work has bars; in a pipe there is nothing of them, with `-v` a line every ten
seconds."""

_SIM = "## tyir-sim\n\nTimes are in ms; an interval has the bounds of the assumed constants."


def json_reference() -> str:
    """The Markdown."""
    parts = [_HEAD, "## Exit codes\n\n| code | when |\n| --- | --- |"]
    parts[-1] += "".join(f"\n| {code} | {when} |" for code, when in EXIT_CODES.items())
    for command, forms in FORMS.items():
        parts.append(f"## {command}")
        parts += [_form(form) for form in forms]
    parts.append(_SIM)
    parts += [_form(form) for form in (*_reached(Summary), *_reached(HostPrediction))]
    parts.append(
        "## tyir-bench-serving\n\nThe names of vLLM's `vllm bench serve --save-result`, besides `artifacts`,"
        f" `engine` and `note`: {', '.join(f'`{key}`' for key in _serving_keys())}."
    )
    return "\n\n".join(parts) + "\n"


def _form(form: type[Any]) -> str:
    doc = " ".join((inspect.getdoc(form) or "").split())
    rows = [f"### {form.__name__}", "", doc, "", "| field | type | what |", "| --- | --- | --- |"]
    hints = typing.get_type_hints(form, include_extras=True)
    for field in dataclasses.fields(form):
        hint = hints[field.name]
        what = str(hint.__metadata__[0]) if hasattr(hint, "__metadata__") else ""
        rows.append(f"| `{field.name}` | {_type(hint)} | {what} |")
    return "\n".join(rows)


def _type(hint: Any) -> str:
    """A type as JSON has it."""
    if hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(a) for a in args)
    if origin is tuple:
        inner = args[:1] if args[-1] is Ellipsis else args
        return f"list of {_type(inner[0])}" if len({*inner}) == 1 else f"[{', '.join(map(_type, inner))}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"object of {_type(args[1])}"
    names: dict[Any, str] = {
        str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", Any: "any value"
    }  # fmt: skip
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _reached(form: type[Any]) -> Iterator[type[Any]]:
    """The form and those that its fields hold, in order."""
    waiting, seen = [form], set[type[Any]]()
    while waiting:
        current = waiting.pop(0)
        if current in seen:
            continue
        seen.add(current)
        yield current
        for hint in typing.get_type_hints(current).values():
            waiting += [t for t in _parts(hint) if dataclasses.is_dataclass(t) and isinstance(t, type)]


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in typing.get_args(hint):
        yield from _parts(inner)


def _serving_keys() -> list[str]:
    return list(summary([Result(Request(0.0, 1, 2), 0.0, (1.0, 2.0))]))
