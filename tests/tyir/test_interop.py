"""Other tools read what tyir prints, and tyir reads what they print; skipped where they are not installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.tools.bench_ir import decoder_text

GENERIC = (Path(__file__).parent / "generic.ir").read_text(encoding="utf-8")
FLAGS = {"xdsl-opt": "--print-op-generic", "mlir-opt": "--mlir-print-op-generic"}


@pytest.mark.parametrize("text", [GENERIC, decoder_text(150)], ids=["generic", "decoder"])
@pytest.mark.parametrize("tool", sorted(FLAGS))
def test_same_ir_through_another_tool(tool: str, text: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    printed = print_op(parse_module(text), locations=False)
    done = subprocess.run([tool, "--allow-unregistered-dialect", FLAGS[tool]], input=printed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = print_op(parse_module(done.stdout), locations=False)
    assert _facts(theirs) == _facts(printed)


def _facts(text: str) -> list[tuple[object, ...]]:
    """What must not change: names, types, attributes (affine maps may be written differently)."""
    ops = [o for o in parse_module(text).walk() if o.name != "x.text"]
    return [(o.name, o.properties, o.attributes, [v.type for v in o.operands], [v.type for v in o.results]) for o in ops]
