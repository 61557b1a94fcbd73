"""A process with the tools loaded that forks a child for each case: what a tool does with hostile input costs
milliseconds instead of the seconds of a start.

Reads a JSON line for each case on standard input and answers with one: see `tests.reliability.cases.Case` for
what is in them.  Run as a script, never imported by pytest: its children must not share pytest's state.
Modules that a child had to import are imported here as well, so that no later child pays for them again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY = 8 << 30  # bytes of address space
ROOT = str(Path(__file__).resolve().parents[2])
OURS = (ROOT, *filter(None, sys.path))  # where modules are learnt from; what a case brings is elsewhere
UNLEARNT = ("torch._inductor", "torch._dynamo")  # imports of theirs start threads and processes


def serve(preload: list[str]) -> None:
    for name in preload:
        importlib.import_module(name)
    from tyir.process.collector import collector_paused

    with collector_paused():  # children write to as few pages of the parent as can be
        requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
        for line in requests:
            print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


def _run(case: dict[str, Any]) -> dict[str, Any]:
    known = frozenset(sys.modules)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as new:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = _child(case, out.fileno(), err.fileno())
            except BaseException:
                os.write(2, traceback.format_exc().encode("utf-8", "replace"))
            finally:
                os.write(new.fileno(), "\n".join(_imported(known)).encode())
                os._exit(code)
        status = _wait(child, began + case["limit"])
        seconds = time.monotonic() - began
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(200_000).decode("utf-8", "replace"))
        new.seek(0)
        _learn(new.read().decode().split())
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return {"code": code, "out": texts[0], "err": texts[1], "seconds": seconds}


def _imported(known: frozenset[str]) -> list[str]:
    """Modules of installed packages that are not among `known`, in order of their import."""
    return [
        name
        for name, module in list(sys.modules.items())
        if name not in known
        and not name.startswith(UNLEARNT)
        and str(getattr(module, "__file__", None)).startswith(OURS)
    ]


def _learn(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):  # some exist only inside of what imports them
            importlib.import_module(name)


def _wait(child: int, end: float) -> int | None:
    """The child's status; None if it had to be killed."""
    pause = 0.001
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _child(case: dict[str, Any], out: int, err: int) -> int:
    os.chdir(case["folder"])
    given = os.open(case["stdin"] or os.devnull, os.O_RDONLY)
    for source, target in ((given, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    module, _, function = case["tool"].partition(":")
    sys.argv = [case["tool"], *(os.fsdecode(bytes.fromhex(a)) for a in case["arguments"])]
    code = getattr(importlib.import_module(module), function or "main")()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return int(code)


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    serve(sys.argv[1:])
