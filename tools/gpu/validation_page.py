"""The performance page: validation tables, fitted constants, and what is weak and why.

Its prose stands in the `performance.*.md` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tyir.runtime_sim.gpu.accelerator import Accelerator
from tyir.tools.gpu.validation_table import Line

__all__ = ["markdown"]

_FOLDER: Final = Path(__file__).parent


def _prose(name: str) -> str:
    """The text of one part of the page."""
    return (_FOLDER / f"performance.{name}.md").read_text(encoding="utf-8")


def markdown(
    found: Mapping[str, Sequence[Line]], machines: Mapping[str, Accelerator], engine: Sequence[str] = ()
) -> str:
    """The page: the engine's table if there is one, the kernels' tables, each with its fitted constants."""
    parts = [_prose("head")]
    if engine:
        parts.append(_prose("engine").replace("{table}", "\n".join(engine)))
    for name, lines in found.items():
        parts.append(
            f"## {name}\n\n| kind | M | n | MAPE | median | p90 | max | bias | held out | roofline | affine |"
            " floor |\n| --- " + "| ---: " * 11 + "|"
        )
        for x in lines:
            kind = f"**{x.kind}**" if x.bucket == "all" else ""
            unseen, floor = ("" if value is None else f"{value:.1f}" for value in (x.held_out, x.floor))
            parts.append(
                f"| {kind} | {x.bucket} | {x.count} | {x.mape:.1f} | {x.median:.1f} | {x.p90:.1f} |"
                f" {x.max:.0f} | {x.bias:+.1f} | {unseen} | {x.roofline:.1f} | {x.affine:.1f} | {floor} |"
            )
        fitted = [f"| `{n}` | {c.value:.4g} | {c.source} |" for n, c in machines[name].fitted.items()]
        parts.append(
            "\n".join(["", "| fitted constant | value | fitted on |", "| --- | ---: | --- |", *fitted, ""])
        )
    return "\n".join([*parts, _prose("weak")])
