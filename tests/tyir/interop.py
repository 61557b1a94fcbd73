"""mlir-opt and xdsl-opt for the tests that hold tyir's text against theirs.

Where they come from: mlir-opt 19 is in Debian's and LLVM's packages (`apt-get install mlir-19-tools`),
xdsl-opt in `pip install xdsl`.  They are looked for on PATH and beside this Python; tests that need one skip
and say so where there is none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tyir.dialects.builtin import Module
from tyir.location import UNKNOWN
from tyir.parser import parse_module
from tyir.printer import print_op

SPLIT = "// -----"
_AFFINE = re.compile(r"affine_(map|set)<[^\n]*?>(?=[,}])")


@dataclass(frozen=True)
class _Tool:
    """How to call a tool."""

    spellings: tuple[str, ...]
    generic: str
    locations: str
    keeps_resources: bool = True  # False: resources met before in the same process are renamed


TOOLS = {
    "mlir-opt": _Tool(("mlir-opt", "mlir-opt-19"), "--mlir-print-op-generic", "--mlir-print-debuginfo"),
    "xdsl-opt": _Tool(("xdsl-opt",), "--print-op-generic", "--print-debuginfo", keeps_resources=False),
}


def find_tool(name: str) -> str | None:
    """The path of a tool, or None where it is not installed."""
    folders = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return next(
        (path for spelling in TOOLS[name].spellings if (path := shutil.which(spelling, path=folders))), None
    )


@dataclass(frozen=True)
class Answer:
    """What a tool made of one text: its own print of it, or its complaint."""

    text: str | None
    complaint: str = ""


def ask(name: str, texts: list[str], generic: bool) -> list[Answer]:
    """What a tool prints for texts, in the generic form or in its own; many go in one run of it, and when it
    refuses some, the answers say which.
    """
    flags = [TOOLS[name].locations, *([TOOLS[name].generic] if generic else [])]
    if TOOLS[name].keeps_resources:
        return _run(name, texts, flags)
    answers = {text: _run(name, [text], flags)[0] for text in texts if "{-#" in text}
    rest = [text for text in texts if text not in answers]
    answers.update(zip(rest, _run(name, rest, flags)))
    return [answers[text] for text in texts]


def _run(name: str, texts: list[str], flags: list[str]) -> list[Answer]:
    if not texts:
        return []
    tool = find_tool(name)
    assert tool is not None
    command = [tool, "--allow-unregistered-dialect", "--split-input-file", *flags]
    done = subprocess.run(
        command, input=f"\n{SPLIT}\n".join(texts), capture_output=True, text=True, check=False
    )
    parts = done.stdout.split(SPLIT)
    if done.returncode == 0 and len(parts) == len(texts):
        return [Answer(part) for part in parts]
    if len(texts) == 1:
        return [Answer(None, done.stderr or f"{len(parts)} texts came back")]
    half = len(texts) // 2
    return [*_run(name, texts[:half], flags), *_run(name, texts[half:], flags)]


def differences(ours: Iterable[str], theirs: Iterable[Answer]) -> list[str]:
    """One entry for every text that a tool refused, or whose print is not the same IR."""
    found = []
    for text, answer in zip(ours, theirs, strict=True):
        if answer.text is None:
            found.append(f"refused: {answer.complaint[:1000]}\n{text[:1000]}")
            continue
        mine, other = parse_module(text), parse_module(answer.text)
        _forget_invented(mine, other)
        a, b = _comparable(mine), _comparable(other)
        if a != b:
            found.append(
                "\n".join(
                    [
                        "different:",
                        *[f"{x}\n{y}" for x, y in zip(a.splitlines(), b.splitlines()) if x != y][:3],
                    ]
                )
            )
    return found


def _forget_invented(mine: Module, other: Module) -> None:
    """mlir-opt gives every op that has no location its place in the file."""
    for ours, theirs in zip(mine.walk(), other.walk()):
        if ours.loc is UNKNOWN:
            theirs.loc = UNKNOWN


def _comparable(module: Module) -> str:
    """The text of a module with values and blocks numbered: what other tools must not change."""
    for op in module.walk():
        for block in (block for region in op.regions for block in region.blocks):
            block.label, block.arg_locs = None, ()
            for value in block.args:
                value.name = None
        for value in op.results:
            value.name = None
    return _AFFINE.sub(
        lambda match: match[0].replace("(", "").replace(")", ""), print_op(module)
    )  # xDSL puts every sum into parentheses
