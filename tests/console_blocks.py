"""The ```console blocks of a page, run as a reader would: in a fresh clone with a fresh home, as printed.

    ```console                 commands behind `$ `, below each what it prints
    ```console slow            ... more than a few seconds
    ```console no-run          ... what needs the network or a device; only that the commands exist is tested

Below a command stands what it prints on standard output, or on standard error when it fails: `...` stands for
anything within a line, a line of `...` for any lines; nothing at all means that it is not said.  A block
```python file=NAME is a file that the reader writes.  `<!-- console: after README.md -->` begins a page whose
reader has followed the README, `<!-- console: in an empty folder -->` one that needs no clone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Page", "Step", "clone", "matches", "read_page", "run_page"]

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_START = re.compile(r"^<!-- console: (after (?P<after>\S+)|in an empty folder) -->$", re.MULTILINE)
_FILE = re.compile(r"\bfile=(\S+)")


@dataclass(frozen=True)
class Step:
    """A command of a page, at a line of it, and the lines that it should print."""

    line: int
    command: str
    expected: tuple[str, ...]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """What a reader types, and where: `after` another page, in an `empty` folder, or in a clone."""

    name: str
    files: dict[str, str]
    steps: tuple[Step, ...]
    after: str | None = None
    empty: bool = False

    @property
    def runnable(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if "no-run" not in step.marks)

    @property
    def slow(self) -> bool:
        return self.after is not None or any("slow" in step.marks for step in self.steps)


def read_page(text: str, name: str) -> Page:
    files: dict[str, str] = {}
    steps: list[Step] = []
    for match in _BLOCK.finditer(text):
        language, marks, body = match.groups()
        if language == "console":
            first = text.count("\n", 0, match.start(3)) + 1
            steps += _steps(body, first, tuple(marks.split()))
        elif found := _FILE.search(marks):
            files[found[1]] = body
    start = _START.search(text)
    after = start["after"] if start is not None else None
    return Page(name, files, tuple(steps), after, start is not None and after is None)


def _steps(body: str, first: int, marks: tuple[str, ...]) -> Iterator[Step]:
    lines = body.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        last = start
        while lines[last].endswith("\\"):
            last += 1
        command = "\n".join(lines[start : last + 1]).removeprefix("$ ")
        yield Step(first + start, command, tuple(lines[last + 1 : end]), marks)


def matches(expected: tuple[str, ...], printed: str) -> bool:
    """Whether the lines are what was printed, `...` standing for anything."""
    parts = [
        r"(?:.*\n)*?"
        if line == "..."
        else ".*".join(map(re.escape, line.rstrip().split("..."))) + r"[ \t]*\n"
        for line in expected
    ]
    text = printed if printed.endswith("\n") else printed + "\n"
    return re.fullmatch("".join(parts), text) is not None


def clone(target: Path) -> None:
    """The files of the checkout as they are now: what a clone would hold after a commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def run_page(page: Page, folder: Path, home: Path) -> list[str]:
    """Type the page's commands in a folder; what went otherwise than it says."""
    for name, text in page.files.items():
        if not (folder / name).exists():  # what exists is shown in parts
            (folder / name).write_text(text, encoding="utf-8")
    problems = []
    for step in page.runnable:
        code, out, error = run_command(step.command, folder, home)
        shown = out if code == 0 else error
        said_to_fail = any(line.startswith("error:") or ": error: " in line for line in step.expected)
        if (code != 0) != said_to_fail:
            problems.append(f"{page.name}:{step.line}: {step.command}\nexit code {code}\n{out}{error}")
        elif step.expected and not matches(step.expected, shown):
            wanted = "\n".join(step.expected)
            problems.append(
                f"{page.name}:{step.line}: {step.command}\n-- prints\n{shown}\n-- and should\n{wanted}"
            )
    return problems


def run_command(command: str, folder: Path, home: Path) -> tuple[int, str, str]:
    """Exit code and output of a shell line in the prepared environment, nothing of ours being set."""
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={"PATH": path, "HOME": str(home), "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stdout, done.stderr
