"""What the documents say is so: examples in docstrings run, commands in READMEs exist with the flags they are
given, links lead somewhere.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
SCRIPTS: dict[str, str] = PYPROJECT["project"]["scripts"]


def module_files() -> dict[str, Path]:
    """Import name to file of every module; the six roots are named because nothing walks across
    `package-dir`.
    """
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


MODULES = module_files()
READMES = sorted(
    {
        ROOT / "README.md",
        *(path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("README.md")),
    }
)


@pytest.mark.parametrize(
    "name", [name for name, file in MODULES.items() if ">>> " in file.read_text(encoding="utf-8")]
)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_module_says_what_it_is() -> None:
    silent = []
    for name, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            silent.append(name)
    assert not silent, f"without a docstring at the top: {silent}"


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_every_folder_has_a_readme(folder: str) -> None:
    assert (ROOT / folder / "README.md").is_file()


def console_commands(text: str) -> list[str]:
    """The lines typed at a `$ ` prompt in ```console blocks, continuation lines joined."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@cache
def help_flags(script: str) -> frozenset[str]:
    """Every flag that `script --help` shows."""
    done = subprocess.run([Path(sys.executable).parent / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", done.stdout))


def unknown_parts(command: str) -> list[str]:
    """The tools and flags of a shell line that do not exist; a pipe starts a new tool."""
    unknown: list[str] = []
    script = ""
    for position, word in enumerate(words := shlex.split(command, comments=True)):
        if position == 0 or words[position - 1] in ("|", "&&", ";"):
            script = word
            if (script.startswith("tyir-") and script not in SCRIPTS) or (
                script.startswith("./") and not (ROOT / script).is_file()
            ):
                unknown.append(script)
        elif (
            script in SCRIPTS
            and word.startswith("-")
            and word != "-"
            and word.partition("=")[0] not in help_flags(script)
        ):
            unknown.append(f"{script} {word}")
    return unknown


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_readme_exist(readme: Path) -> None:
    commands = console_commands(readme.read_text(encoding="utf-8"))
    assert [part for command in commands for part in unknown_parts(command)] == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_in_readme_lead_somewhere(readme: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", readme.read_text(encoding="utf-8"))
    assert [link for link in links if not (readme.parent / link).exists()] == []


def test_console_commands_are_found() -> None:
    text = (
        "text\n```console\n$ tyir-opt a.ir \\\n    --timing\noutput\n$ ./tools/test\n```\n```python\n$"
        " no\n```\n"
    )
    assert console_commands(text) == ["tyir-opt a.ir --timing", "./tools/test"]
    assert unknown_parts("tyir-nothing a.ir && ./tools/nothing") == ["tyir-nothing", "./tools/nothing"]
