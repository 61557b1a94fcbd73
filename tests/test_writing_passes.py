"""The worked example of docs/writing-passes.md: its files are written, its commands run, what they print is
what the page says.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tyir.pass_manager.registry import load_module_file
from tyir.registry import unload_dialect
from tyir.rewrite import rewrite_greedily

PAGE = (Path(__file__).resolve().parents[1] / "docs/writing-passes.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```\w+ file=(\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    part.partition("\n")
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES:
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    unload_dialect("mine")
    for name in ("mine", "clamp_silu", "patterns"):
        sys.modules.pop(name, None)


def test_the_page_has_files_and_commands() -> None:
    assert [name for name, _ in FILES] == ["mine.py", "clamp_silu.py", "in.ir", "patterns.py"]
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command, _, expected", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_print_what_the_page_says(folder: Path, command: str, _: str, expected: str) -> None:
    words = shlex.split(command)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = importlib.import_module("tyir.tools." + words[0].replace("-", "_")).main(words[1:])
    assert shown.getvalue() == expected
    assert code == ("error:" in expected)


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
