"""The commands as a user types them: exit codes, one-line errors, nothing left behind by an interrupt."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Artifacts = Callable[[int, str], Path]


def run(tool: str, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", f"tyir.tools.{tool}", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dies", "17"], "17 dies: a board has 1 to 16"),
        (["--dies", "x"], "argument --dies: invalid int value"),
        (["--seqlens", ""], "is an empty list"),
        (["--seqlens", "1,a"], "'a' in '1,a' is not a whole number"),
        (["--dies", "1", "--seqlens", "1", "--mcpu", "pentium9"], "pentium9"),
        (["--seqlens", "1,2000", "--max-kv", "100"], "2000 is larger than the cache of 100 tokens"),
    ],
)
def test_wrong_options(model: Path, tmp_path: Path, args: list[str], message: str) -> None:
    done = run("tyir_compile", model, "-o", "out", *args, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr and "help: " in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--plan", "-o", "out"], "-o out is not used: --plan writes nothing"),
        (["--plan", "-o", "out", "--json-log", "log"], "-o out, --json-log log are not used"),
        (
            ["-o", "out", "--dies", "1", "--seqlens", "1", "--max-kv", "16", "--host-activations", "int8"],
            "--host-activations int8 is not used: no weights have 4 bits",
        ),
    ],
)
def test_an_option_that_nothing_uses_is_warned_of(
    model: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    done = run("tyir_compile", model, *args, cwd=tmp_path)
    assert done.returncode == 0 and f"warning: {message}" in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if "--plan" not in args else [])


def test_run_continues_a_prompt(artifacts: Artifacts, tmp_path: Path) -> None:
    done = run("tyir_run", artifacts(2, "fp16"), "--prompt", "The old house", "--max-tokens", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The old house") and len(done.stdout.split()) > 5


def test_run_refuses_a_long_prompt_with_nothing_on_stdout(artifacts: Artifacts, tmp_path: Path) -> None:
    done = run("tyir_run", artifacts(2, "fp16"), "--prompt", "word " * 400, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "of the cache's 128 positions" in done.stderr and "Traceback" not in done.stderr


def test_sampling_is_repeatable_by_seed(artifacts: Artifacts, tmp_path: Path) -> None:
    args = (
        artifacts(2, "fp16"),
        "--prompt",
        "He said",
        "--temperature",
        1,
        "--top-k",
        50,
        "--seed",
        7,
        "--max-tokens",
        12,
    )
    first, second = (run("tyir_run", *args, cwd=tmp_path).stdout for _ in range(2))
    assert first == second != run("tyir_run", *args[:-3], 8, *args[-2:], cwd=tmp_path).stdout


def test_an_interrupt_leaves_nothing(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "tyir.tools.tyir_compile", str(model), "-o", "out", "-q"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's `&`
    )
    deadline = time.monotonic() + 900
    while process.poll() is None and not list(tmp_path.glob("out/.4die.*")) and time.monotonic() < deadline:
        time.sleep(0.002)  # some tens of milliseconds later there is a journal, which is left to go on from
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(model: Path, tmp_path: Path) -> None:
    done = run("tyir_compile", model, "-o", "out", "--dies", 17, "--debug", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr
