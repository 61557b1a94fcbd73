"""The pattern of docs/writing-passes.md; its commands are run by `tests/test_console_blocks.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.console_blocks import read_page
from tyir.pass_manager.registry import load_module_file
from tyir.registry import unload_dialect
from tyir.rewrite import rewrite_greedily

PAGE = (Path(__file__).resolve().parents[1] / "docs/writing-passes.md").read_text(encoding="utf-8")
FILES = read_page(PAGE, "writing-passes.md").files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    unload_dialect("mine")
    for name in ("mine", "clamp_silu", "patterns"):
        sys.modules.pop(name, None)


def test_the_pattern(folder: Path) -> None:
    from tyir.parser import parse_module
    from tyir.printer import print_op
    from tyir.registry import load_dialect_module

    load_dialect_module(load_module_file("mine.py"))
    module = parse_module(
        "func.func @f(%x: f16) -> f16 {\n"
        '%c = mine.clamp %x {limit = 1.0} : f16 loc("a")\n%y = ty.silu %c : f16 loc("b")\nreturn %y : f16\n}'
    )
    assert rewrite_greedily(module, [load_module_file("patterns.py").silu_of_clamp]) == 2
    assert '"ty.silu"(%x) : (f16) -> f16 loc(fused["a", "b"])' in print_op(module)
