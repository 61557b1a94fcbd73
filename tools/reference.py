"""Writes the reference documentation from the declarations: `docs/ops.md`, `docs/passes.md` and
`docs/json.md`.

    python -m tyir.tools.reference            (in the checkout)

A test fails when the files differ from what this prints; nothing in them is written by hand.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tyir.opdef import AttrField, DeclaredOp
from tyir.pass_manager.options import describe_options
from tyir.pass_manager.registry import PassRegistry
from tyir.pipeline import Pass
from tyir.registry import dialect_names, dialect_ops
from tyir.stages import STAGES
from tyir.text.attribute_printer import attribute_text
from tyir.tools.cli import ToolParser, run_tool, write_output
from tyir.tools.commands.json_page import json_reference

__all__ = ["HEAD", "main", "ops_reference", "passes_reference"]

HEAD = "<!-- written by python -m tyir.tools.reference; do not edit -->\n"


def ops_reference() -> str:
    """The Markdown of all dialects that come with tyir."""
    dialects = [name for name in dialect_names() if dialect_ops(name) and _is_own(dialect_ops(name))]
    parts = [HEAD + "# Ops\n\nEvery op as declared; how to declare one: [tyir/README.md](../tyir/README.md)."]
    parts.append("Dialects: " + ", ".join(f"[{name}](#{name})" for name in dialects))
    for name in dialects:
        ops = dialect_ops(name)
        module = importlib.import_module(f"tyir.dialects.{name}")
        parts.append(f"## {name}\n\n{_text(module.__doc__)}")
        parts += [_op(cls) for _, cls in sorted(ops.items())]
    return "\n\n".join(parts) + "\n"


def _is_own(ops: dict[str, type[DeclaredOp]]) -> bool:
    return all(cls.__module__.startswith("tyir.") for cls in ops.values())


def _op(cls: type[DeclaredOp]) -> str:
    rows = [(f.name, "operand", _arity(f.arity), "") for f in cls.operand_fields]
    rows += [(f.key, "property", _property(f), _default(f)) for f in cls.attr_fields]
    rows += [(f.name, "region", "", "") for f in cls.region_fields]
    rows += [(f.name, "result", _arity(f.arity), "") for f in cls.result_fields]
    traits = ", ".join(sorted(t.__name__ for t in cls.traits))
    legal = [stage.name for stage in STAGES.values() if stage.culprit(cls.create()) is None]
    facts = [f"Traits: {traits}."] if traits else []
    if cls.infer is not DeclaredOp.infer and cls.result_fields:
        facts.append("Result types follow from the operands.")
    facts.append("Legal at every stage." if len(legal) == len(STAGES) else f"Legal at: {', '.join(legal)}.")
    parts = [
        f"### {cls.name}",
        _text(cls.__doc__),
        " ".join(facts),
        _table(("name", "what", "kind", "default"), rows),
    ]
    return "\n\n".join(part for part in parts if part)


def _arity(arity: str) -> str:
    return {"one": "", "optional": "may be absent", "variadic": "any number"}[arity]


def _property(field: AttrField) -> str:
    choices = f": {', '.join(field.choices)}" if field.choices else ""
    return f"{field.codec.kind}{choices}{', may be absent' if field.optional else ''}"


def _default(field: AttrField) -> str:
    if not field.has_default or field.default is None:
        return ""
    return f"`{attribute_text(field.codec.encode(field.default))}`"


def passes_reference() -> str:
    """The Markdown of all passes and named pipelines."""
    registry = PassRegistry()
    parts = [
        HEAD + "# Passes\n\nEvery pass as declared; how to write one: [writing-passes.md](writing-passes.md)."
    ]
    for name in registry.names():
        cls = registry.find(name)
        if cls is not None:
            parts.append(_pass(name, cls))
    parts.append(
        "# Pipelines\n\n"
        + _table(("name", "text"), [(f"`{n}`", f"`{t}`") for n, t in sorted(registry.pipelines().items())])
    )
    return "\n\n".join(parts) + "\n"


def _pass(name: str, cls: type[Pass]) -> str:
    module = sys.modules[cls.__module__]
    rows = [(f"`{option}`", kind, f"`{default}`") for option, kind, default in describe_options(cls)]
    anchor = "any op" if cls.anchor == "any" else f"`{cls.anchor}`"
    return "\n\n".join(
        part
        for part in (
            f"## {name}",
            f"{_text(cls.__doc__)} Runs on {anchor}{_stages(cls)}.",
            _text(module.__doc__),
            _table(("option", "kind", "default"), rows),
        )
        if part
    )


def _stages(cls: type[Pass]) -> str:
    """Where a pass may run, and where it leads."""
    where = f" at stage {' or '.join(cls.stage)}" if cls.stage else ""
    return where + (f", which becomes {cls.to_stage}" if cls.to_stage is not None else "")


def _text(docstring: str | None) -> str:
    """A docstring as Markdown: its indented examples become code blocks."""
    return inspect.cleandoc(docstring or "")


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return (
        "\n".join(
            [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles), *(f"| {line} |" for line in lines)]
        )
        if lines
        else ""
    )


@run_tool
def main(argv: Sequence[str]) -> int:
    """Write both files."""
    parser = ToolParser(
        prog="reference", description="Write docs/ops.md and docs/passes.md from the declarations."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), help="folder of the two files (default: docs)"
    )
    args: argparse.Namespace = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    write_output(ops_reference(), str(args.out / "ops.md"))
    write_output(passes_reference(), str(args.out / "passes.md"))
    write_output(HEAD + json_reference(), str(args.out / "json.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
