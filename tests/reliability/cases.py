"""Cases of the breaking programs: run, judged and counted by area.

A case survives when the tool ends by itself with an exit code of its own, and what it cannot do is said in
one message with no word of an internal error and no traceback.  `ProcessTally` counts, and a test fails with
everything that did not survive.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.tally import Tally

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / "tests" / "models" / "tiny-qwen2"
LIMIT = 240.0  # seconds after which a case is a hang: the machine may be busy with others
CODES = {0, 1, 2, 130, 141, 143}
_T = TypeVar("_T")
BAD_WORDS = ("internal error", "Traceback (most recent call last)", "Segmentation fault", "terminate called")


@dataclass(frozen=True)
class Case:
    """A tool's module (`module:function`, `main` by default) with its arguments.

    `wanted`: the exit codes that fit; `says`: what standard error must hold; `prints`: how standard output
    must begin when the tool succeeds.
    """

    name: str
    tool: str
    arguments: tuple[str | bytes | Path, ...] = ()
    wanted: frozenset[int] = frozenset((0, 1))
    says: str = ""
    stdin: Path | None = None
    prints: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a tool ended; `code` is None for one that was killed, negative for a signal."""

    code: int | None
    out: str
    err: str
    seconds: float

    def problem(self, wanted: Iterable[int], says: str = "") -> str | None:
        """Why the case did not survive."""
        if self.code is None:
            return f"still running after {self.seconds:.0f} s"
        if self.code < 0:
            return f"ended by signal {-self.code}: {self.err[-300:]}"
        if (word := next((w for w in BAD_WORDS if w in self.err), None)) is not None:
            return f"'{word}': {self.err[-700:]}"
        if self.code not in wanted:
            return f"exit code {self.code}, not one of {sorted(wanted)}: {self.err[-500:]}"
        if self.code == 1 and "error:" not in self.err:
            return f"exit code 1 without a message: {self.err[-300:]!r}"
        if says not in self.err:
            return f"'{says}' is not in: {self.err[-500:]}"
        return None


class Zygote:
    """The forking process of `zygote.py`; one for all cases of a test."""

    def __init__(self, preload: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py"), *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            text=True,
        )

    def run(self, case: Case) -> Outcome:
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {
            "tool": case.tool,
            "arguments": [os.fsencode(a).hex() for a in case.arguments],
            "folder": str(self.folder),
            "stdin": None if case.stdin is None else str(case.stdin),
            "limit": LIMIT,
        }
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return Outcome(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


def run_process(
    command: Sequence[str | bytes | Path],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    remove: Iterable[str] = (),
    shell: str = "",
    limit: float = LIMIT,
) -> Outcome:
    """A real process, for what a forked child shares with its parent: limits, locale, streams.

    `shell` is a line of bash in which "$@" is the command.
    """
    import time

    env = {k: v for k, v in os.environ.items() if k not in set(remove)} | dict(environment or {})
    words = ["bash", "-c", shell, "bash", *command] if shell else list(command)
    began = time.monotonic()
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=env,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, "", "", time.monotonic() - began)
    code = done.returncode
    if shell and code > 128 and code not in CODES:  # bash's way to say that a signal ended the command
        code = 128 - code
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    return Outcome(code, out, err, time.monotonic() - began)


class ProcessTally(Tally):
    """Counts cases of an area that are tools, run as processes."""

    def add(self, name: str, outcome: Outcome, wanted: Iterable[int] = (0, 1), says: str = "") -> None:
        self.count(name, outcome.problem(wanted, says), outcome.seconds)

    def run(self, zygote: Zygote, cases: Iterable[Case]) -> None:
        for case in cases:
            found = zygote.run(case)
            problem = found.problem(case.wanted, case.says)
            if problem is None and found.code == 0 and not found.out.startswith(case.prints):
                problem = f"printed {found.out[:100]!r}, not {case.prints[:100]!r}"
            self.count(case.name, problem, found.seconds)


def sample(cases: Iterable[_T], slow: bool, most: int) -> list[_T]:
    """All cases with --slow, otherwise `most` of them, evenly spread."""
    found = list(cases)
    if slow or len(found) <= most:
        return found
    return [found[i * len(found) // most] for i in range(most)]
