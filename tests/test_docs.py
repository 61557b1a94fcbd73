"""What the documents say is so: examples in docstrings run, commands in READMEs exist with the flags they are
given, links lead somewhere, files that are named exist, excerpts are what the files hold.
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
READ_FIRST = re.compile(r"\b(?:Read first:|Start with) ")
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


def test_every_package_has_a_readme_that_says_what_to_read_first() -> None:
    folders = sorted({file.parent for file in MODULES.values()})
    assert len(folders) > 20
    texts = {
        folder.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") if page.is_file() else ""
        for folder in folders
        for page in [folder / "README.md"]
    }
    assert [folder for folder, text in texts.items() if not READ_FIRST.search(text)] == []


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


PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")),
]
# Commands with passes of the reader's own; tests/test_writing_passes.py runs them.
OWN_COMMANDS = ("writing-passes.md",)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in OWN_COMMANDS], ids=lambda path: path.name)
def test_commands_in_docs_exist(page: Path) -> None:
    commands = console_commands(page.read_text(encoding="utf-8"))
    assert [part for command in commands for part in unknown_parts(command)] == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_readme_exist(readme: Path) -> None:
    commands = console_commands(readme.read_text(encoding="utf-8"))
    assert [part for command in commands for part in unknown_parts(command)] == []


@pytest.mark.parametrize("readme", READMES + PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
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


@pytest.mark.parametrize("page", ["finding-your-way.md", "backends.md", "style.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = {
        word
        for code in re.findall(r"`([^`\n]+)`", text)
        for word in [code.partition(" ")[0]]
        if word.partition("/")[0] in (*FOLDERS.values(), "docs", "tests") and "/" in word and "<" not in word
    }
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_way_names_every_room() -> None:
    text = (ROOT / "docs" / "finding-your-way.md").read_text(encoding="utf-8")
    assert [folder for folder in FOLDERS.values() if f"(../{folder}/README.md)" not in text] == []
    things = (
        "op",
        "pass",
        "model family",
        "quantisation format",
        "command of the chip",
        "machine",
        "back end",
    )
    assert [t for t in (*things, "report") if f"\n## A new {t}\n" not in text] == []


def excerpts(page: Path) -> list[tuple[str, list[str]]]:
    """The files that a page shows lines of (```mlir file=...), with those lines."""
    blocks = re.findall(
        r"^```mlir file=(\S+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [(file, [line.strip() for line in text.splitlines()]) for file, text in blocks]


def missing_line(excerpt: list[str], lines: list[str]) -> str | None:
    """The first line of an excerpt that the file does not have where it should: next to the one before, or
    somewhere behind it when a `...` line stands between.  `...` within a line stands for anything.
    """
    position, anywhere = 0, True
    for wanted in excerpt:
        if wanted == "...":
            anywhere = True
            continue
        pattern = re.compile(".*".join(map(re.escape, wanted.split("..."))))
        places = range(position, len(lines) if anywhere else min(position + 1, len(lines)))
        found = next((i for i in places if pattern.fullmatch(lines[i])), None)
        if found is None:
            return wanted
        position, anywhere = found + 1, False
    return None


@pytest.mark.parametrize(
    ("file", "excerpt"), [pytest.param(*e, id=e[0]) for e in excerpts(ROOT / "docs" / "tour.md")]
)
def test_the_tour_shows_what_the_files_hold(file: str, excerpt: list[str]) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = [line.removeprefix("// OUT:").strip() for line in text.splitlines()]
    assert missing_line(excerpt, lines) is None


def test_the_tour_goes_through_every_pass_of_the_pipeline() -> None:
    from tyir.manifest import BuildOptions
    from tyir.passes.pipelines import PIPELINES, remaining_pipeline

    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    options = BuildOptions(weights="int4", batch=2, output="topk=2")
    pipeline = re.sub(r"\{.*?\}", "", remaining_pipeline("ty", options))
    names = [n for name in pipeline.split(",") for n in PIPELINES.get(name, name).split(",")]
    assert len(names) > 7
    assert [name for name in (*names, "lower-edge10") if name not in text] == []


def test_excerpts_are_held_to_the_order_of_the_file() -> None:
    lines = ["a = 1", "b = 2", "c = 3"]
    assert missing_line(["a ...", "...", "c = 3"], lines) is None
    assert missing_line(["a = 1", "c = 3"], lines) == "c = 3"
    assert missing_line(["b = 2", "...", "a = 1"], lines) == "a = 1"
