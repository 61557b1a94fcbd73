"""`*.ir` files as tests.

A line `// RUN: tyir-opt --cse %s | filecheck %s` runs the tool in this process and checks its output against
the file's CHECK lines (LLVM's FileCheck language).  `| same` instead compares all of the output with the `//
OUT: ` lines that follow the RUN line; `pytest --bless-ir` rewrites those after a change that was meant.
`not` in front expects a failure, `2>&1` adds standard error to what is checked, `%t` is a temporary file,
`%S` the folder of the test; several RUN lines run in order.

Two filters keep what is compared short: `| part 'module @die0' 'func.func @main'` leaves of pretty text the
op that begins so (within the one named before it), and `| hide tyir.path` leaves those attributes out.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import io
import itertools
import re
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["IrFile", "IrTest", "IrTestFailure"]


class IrFile(pytest.File):
    """A file with RUN lines: one test."""

    def collect(self) -> Iterator[pytest.Item]:
        yield IrTest.from_parent(self, name="run")


_OUT = "// OUT:"


class IrTestFailure(Exception):
    """A RUN line did not do what it should."""


class IrTest(pytest.Item):
    def runtest(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        new = (
            [line for line in lines if not line.startswith(_OUT)]
            if self.config.getoption("--bless-ir")
            else None
        )
        with tempfile.TemporaryDirectory() as folder:
            for number, line in enumerate(lines):
                before, found, command = line.partition("// RUN:")
                if not found or before.strip():
                    continue
                expected = list(itertools.takewhile(lambda text: text.startswith(_OUT), lines[number + 1 :]))
                output = self._run(
                    command.strip(), folder, [text[len(_OUT) + 1 :] for text in expected], new is not None
                )
                if new is not None and output is not None:
                    place = new.index(line) + 1
                    new[place:place] = [f"{_OUT} {text}".rstrip() for text in output]
        if new is not None and new != lines:
            self.path.write_text("\n".join(new) + "\n", encoding="utf-8")

    def _run(self, command: str, folder: str, expected: list[str], bless: bool) -> list[str] | None:
        """Run one line; the output's lines when it ends in `| same`."""
        for name, path in (("%s", self.path), ("%S", self.path.parent), ("%t", Path(folder) / "t")):
            command = command.replace(name, shlex.quote(str(path)))
        text = ""
        for stage in command.split(" | "):
            if stage.strip() == "same":
                output = [line.rstrip() for line in text.splitlines()]
                if not bless and output != expected:
                    difference = "\n".join(
                        difflib.unified_diff(expected, output, "the OUT lines", "printed now", lineterm="")
                    )
                    raise IrTestFailure(
                        f"$ {command}\n{difference}\nif this is what should be printed: pytest --bless-ir"
                        f" {self.path}"
                    )
                return output
            words = shlex.split(stage)
            merge = "2>&1" in words
            words = [w for w in words if w != "2>&1"]
            expect_failure = words[0] == "not"
            code, out, err = _run_tool(words[1:] if expect_failure else words, text)
            if (code != 0) != expect_failure:
                raise IrTestFailure(f"$ {stage.strip()}\nexit code {code}\n{out}{err}")
            text = out + err if merge else out
        return None

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, IrTestFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.path.name


def _run_tool(words: list[str], stdin: str) -> tuple[int, str, str]:
    """Run a tool's `main` with redirected streams: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    old_stdin, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _FILTERS.get(words[0], _tool)(words)
    finally:
        sys.stdin = old_stdin
    return code, out.getvalue(), err.getvalue()


def _tool(words: list[str]) -> int:
    name = "tyir.tools." + words[0].replace("-", "_")
    if not words[0].startswith("tyir-") or importlib.util.find_spec(name) is None:
        print(f"{words[0]} is not a command of tyir and not a filter of .ir tests", file=sys.stderr)
        return 1
    module = importlib.import_module(name)
    code: int = module.main(words[1:])
    return code


def _filecheck(words: list[str]) -> int:
    try:
        from filecheck.matcher import Matcher
        from filecheck.options import parse_argv_options
    except ImportError:
        print("filecheck is not installed\nhelp: pip install filecheck", file=sys.stderr)
        return 1

    code: int = Matcher.from_opts(parse_argv_options(words)).run()
    return code


def _part(words: list[str]) -> int:
    """Print the lines of one op of pretty text, from the one that begins as said to the closing one."""
    lines = sys.stdin.read().splitlines()
    for head in words[1:]:
        start = next((i for i, line in enumerate(lines) if line.strip().startswith(head)), None)
        if start is None:
            print(f"no line begins with {head}", file=sys.stderr)
            return 1
        margin = " " * (len(lines[start]) - len(lines[start].lstrip()))
        end = start
        if lines[start].endswith("{"):
            end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(margin + "}"))
        lines = textwrap.dedent("\n".join(lines[start : end + 1])).splitlines()
    print("\n".join(lines))
    return 0


def _hide(words: list[str]) -> int:
    """Print text without the entries of these names in dictionaries."""
    text = sys.stdin.read()
    for key in words[1:]:
        entry = re.escape(key) + r'(?: = (?:"[^"]*"|[-\w.]+(?: : \w+)?))?(?=[,}])'
        text = re.sub(rf"(?: attributes)? \{{{entry}\}}", "", text)
        text = re.sub(rf"(?<=\{{){entry}, |, {entry}", "", text)
    print(text, end="")
    return 0


_FILTERS = {"filecheck": _filecheck, "part": _part, "hide": _hide}
