"""What `tyir-opt --list-passes` and `--show-dialects` print, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from tyir.pass_manager.options import describe_options
from tyir.registry import dialect_names, dialect_ops
from tyir.tools.commands.json_forms import (
    DialectEntry,
    DialectList,
    OpEntry,
    PassEntry,
    PassList,
    PassOption,
)

if TYPE_CHECKING:
    from tyir.pass_manager.registry import PassRegistry

__all__ = ["dialect_list", "pass_list"]


def pass_list(registry: PassRegistry, form: str) -> str:
    """Every pass with its options, and the named pipelines."""
    found = {name: cls for name in registry.names() if (cls := registry.find(name)) is not None}
    pipelines = dict(sorted(registry.pipelines().items()))
    if form == "json":
        passes = (
            PassEntry(
                name=name,
                summary=_summary(cls),
                anchor=cls.anchor,
                options=tuple(PassOption(*option) for option in describe_options(cls)),
            )
            for name, cls in found.items()
        )
        return json.dumps(asdict(PassList(tuple(passes), pipelines)), indent=2)
    lines = ["passes:"]
    for name, cls in found.items():
        lines.append(f"  --{name:<24} {_summary(cls)}")
        lines += [
            f"      {option}=<{kind}>, default {default}" for option, kind, default in describe_options(cls)
        ]
    lines.append("pipelines:")
    lines += [f"  --{name:<24} {text}" for name, text in pipelines.items()]
    return "\n".join(lines)


def dialect_list(form: str) -> str:
    """Every dialect with its ops."""
    if form == "json":
        dialects = (
            DialectEntry(
                name, tuple(OpEntry(op, _summary(cls)) for op, cls in sorted(dialect_ops(name).items()))
            )
            for name in dialect_names()
        )
        return json.dumps(asdict(DialectList(tuple(dialects))), indent=2)
    return "\n".join(f"{name:<12} {len(dialect_ops(name))} ops" for name in dialect_names())


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]
