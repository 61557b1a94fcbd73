"""README and docs work as printed: every console block is typed in a fresh clone with a fresh home, and what
it prints is what the page says.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.console_blocks import ROOT, Page, Step, clone, matches, read_page, run_page
from tests.pictures import illegible

PAGES = {
    path.relative_to(ROOT).as_posix(): read_page(
        path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    )
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "examples" / "README.md",
    ]
}
TO_RUN = [page for page in PAGES.values() if page.runnable]


@pytest.fixture(scope="session")
def after_page() -> dict[str, Path]:
    """Where a reader stands after a page, for the pages that go on from there."""
    return {}


def start_of(page: Page, after_page: dict[str, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "tyir"
    if page.after is not None:
        if page.after not in after_page:
            before = tmp_path / "before"
            before.mkdir()
            first = PAGES[page.after]
            assert first.after is None
            after_page[page.after] = start_of(first, after_page, before)
            run_page(first, after_page[page.after], before)  # what goes otherwise fails that page's own test
        shutil.copytree(after_page[page.after], folder, symlinks=True)
        return folder
    folder.mkdir()
    if not page.empty:
        clone(folder)
    return folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.slow else [])
        for page in sorted(TO_RUN, key=lambda page: page.after is not None)
    ],
)
def test_commands_print_what_the_page_says(page: Page, after_page: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    folder = start_of(page, after_page, tmp_path)
    problems = run_page(page, folder, home)
    after_page.setdefault(page.name, folder)
    assert not problems, "\n\n".join(problems)


def test_only_what_cannot_run_is_not_run() -> None:
    """Installing needs the network; everything else is typed."""
    kept = [step.command for page in PAGES.values() for step in page.steps if "no-run" in step.marks]
    assert kept and all(
        "install" in c or "venv" in c or "git clone" in c or c.startswith("./tools/") for c in kept
    )
    assert {mark for page in PAGES.values() for step in page.steps for mark in step.marks} <= {
        "slow",
        "no-run",
    }
    assert len([step for page in TO_RUN for step in page.runnable]) > 25


def test_a_page_is_read() -> None:
    page = read_page(
        "<!-- console: in an empty folder -->\ntext\n```python file=a.py\nprint(1)\n```\n"
        "```console slow\n$ python a.py\n1\n$ echo a \\\n  b\n```\n```console no-run\n$ pip install x\n```\n",
        "page.md",
    )
    assert page.empty and page.after is None and page.slow and page.files == {"a.py": "print(1)\n"}
    assert page.runnable == (
        Step(7, "python a.py", ("1",), ("slow",)),
        Step(9, "echo a \\\n  b", (), ("slow",)),
    )
    assert read_page("<!-- console: after README.md -->\n", "x").after == "README.md"


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        (("a",), "a\n", True),
        (("a",), "a\nb\n", False),
        (("a", "..."), "a\nb\nc\n", True),
        (("...", "c"), "a\nb\nc\n", True),
        (("...", "b"), "a\nb\nc\n", False),
        (("in ... ms (x)",), "in 3.5 ms (x)\n", True),
        (("in ... ms",), "in 3.5 us\n", False),
        (("a.c",), "abc\n", False),
        (("", "a"), "\na", True),
    ],
)
def test_what_is_printed_is_held_against_the_page(
    expected: tuple[str, ...], printed: str, same: bool
) -> None:
    assert matches(expected, printed) == same


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("$ echo a\na\n", None),
        ("$ echo a\nb\n", "-- and should\nb"),
        ("$ false\n", "exit code 1"),
        ("$ echo error: no >&2; false\nerror: no\n", None),
        ("$ echo error: no\nerror: no\n", "exit code 0"),
        ("$ echo a > there.txt\n$ cat there.txt\na\n", None),
        ("$ cat there.txt\n", "exit code 1"),
        ("$ echo $HOME\n...\n$ ls -A $HOME\n", None),
    ],
)
def test_what_goes_otherwise_is_found(tmp_path: Path, text: str, problem: str | None) -> None:
    found = run_page(read_page(f"```console\n{text}```\n", "page.md"), tmp_path, tmp_path)
    assert len(found) == (problem is not None) and all(problem in message for message in found if problem)


def test_the_picture_of_the_stages_is_as_made() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "pictures" / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert (ROOT / "docs" / "pictures" / "stages.svg").read_text(encoding="utf-8") == make.stages()


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=lambda p: p.stem)
def test_pictures_can_be_read(path: Path) -> None:
    assert illegible(path.read_text(encoding="utf-8")) == []
