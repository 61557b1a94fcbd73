"""Work in a copy of the process.  Each case is a process of its own: this one has threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import os, signal, sys, threading, time
from tyir.process.beside import Beside, Lost, possible
assert possible()
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def gone(process: int) -> bool:
    """Whether a process ends, and is not only about to."""
    for _ in range(500):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_it_has_what_was_in_memory_and_gives_what_it_made() -> None:
    said = run("""
held = list(range(1000))
with Beside.start(lambda: (os.getpid(), sum(held), bytes(1 << 20))) as beside:
    held.clear()
    process, total, data = beside.result()
print(process != os.getpid(), total, len(data))
""")
    assert said.split() == ["True", "499500", "1048576"]


def test_what_it_raises_is_raised_here() -> None:
    said = run("""
from tyir.diagnostics import TyirError
def refuse():
    raise TyirError("it does not fit", help="use more dies")
with Beside.start(refuse) as beside:
    try:
        beside.result()
    except TyirError as error:
        print(error)
""")
    assert said == "error: it does not fit\nhelp: use more dies\n"


@pytest.mark.parametrize(
    "what",
    ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(3)", "(lambda: lambda: 0)()"],
    ids=["killed", "ended", "no answer that can be sent"],
)
def test_one_that_is_lost(what: str) -> None:
    said = run(f"""
with Beside.start(lambda: {what}) as beside:
    try:
        print(beside.result())
    except Lost:
        print("lost")
""")
    assert said == "lost\n"


def test_it_is_gone_behind_the_block() -> None:
    process = int(
        run("""
try:
    with Beside.start(lambda: time.sleep(1000)) as beside:
        print(beside._process)
        raise KeyError
except KeyError:
    pass
""")
    )
    assert gone(process)


def test_it_ends_with_its_original() -> None:
    code = """
with Beside.start(lambda: time.sleep(1000)) as beside:
    print(beside._process, flush=True)
    time.sleep(1000)
"""
    command = [sys.executable, "-c", BEGIN + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as original:
        assert original.stdout is not None
        process = int(original.stdout.readline())
        os.kill(process, 0)  # it is there
        original.send_signal(signal.SIGKILL)
    assert gone(process)


def test_a_process_with_threads_is_not_copied() -> None:
    said = run("""
sys.modules["tvm"] = None
print(possible())
sys.modules["tvm"] = sys
print(possible())
del sys.modules["tvm"]
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print(possible())
""")
    assert said.split() == ["True", "False", "False"]
