"""What tests of dies in several processes share: commands that are watched, and machines made of network
namespaces.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROMPT = "The old house stood at the end of the lane, and nobody had lived in it for years."


def command(tool: str, *arguments: object, inside: Sequence[str] = ()) -> list[str]:
    """A command of tyir, run `inside` of another."""
    return [*inside, sys.executable, "-m", f"tyir.tools.{tool}", *map(str, arguments)]


def alive(pid: int) -> bool:
    """Whether a process runs: one that is gone and not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: Sequence[int], seconds: float = 10.0) -> bool:
    """Whether all processes end by themselves."""
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


@dataclass
class Running:
    """A command in the background, whose standard error is read as it comes."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def until(self, text: str) -> str:
        """The line of standard error in which `text` is found."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if re.search(text, line):
                return line
        raise AssertionError(f"'{text}' was not said:\n{''.join(self.said)}")

    def pids(self) -> list[int]:
        """Of the processes that it said it has started."""
        return [int(pid) for line in self.said for pid in re.findall(r"process (\d+) on", line)]

    def end(self, seconds: float = 60) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        out, rest = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, "".join(self.said) + rest


@contextmanager
def running(words: Sequence[str], **environment: str) -> Iterator[Running]:
    """A command, which is killed at the block's end if it still runs."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield Running(process)
    finally:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------------ machines


@dataclass(frozen=True)
class Machine:
    """A network namespace with one address that the other reaches."""

    name: str
    address: str
    device: str

    @property
    def inside(self) -> list[str]:
        """What runs a command there."""
        return ["ip", "netns", "exec", self.name]

    def unplug(self) -> None:
        """Nothing reaches it any more, and nothing is told."""
        subprocess.run([*self.inside, "ip", "link", "set", self.device, "down"], check=True)


@contextmanager
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines with a cable between them; skips where network namespaces cannot be made."""
    serial = os.getpid()
    both = [Machine(f"tyir{n}-{serial}", f"10.77.0.{n}", f"ty{n}x{serial}") for n in (1, 2)]

    def ip(*words: str, inside: Sequence[str] = ()) -> None:
        subprocess.run([*inside, "ip", *words], check=True, capture_output=True)

    try:
        try:
            for machine in both:
                ip("netns", "add", machine.name)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("network namespaces cannot be made here (ip netns add, as root)")
        ip("link", "add", both[0].device, "type", "veth", "peer", "name", both[1].device)
        for machine in both:
            ip("link", "set", machine.device, "netns", machine.name)
            ip("addr", "add", f"{machine.address}/24", "dev", machine.device, inside=machine.inside)
            for device in ("lo", machine.device):
                ip("link", "set", device, "up", inside=machine.inside)
        yield both[0], both[1]
    finally:
        for machine in both:
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)


def listening(pids: Sequence[int]) -> list[str]:
    """TCP ports that are listened at by processes of these numbers."""
    found = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=False).stdout
    return [line for line in found.splitlines() if any(f"pid={pid}," in line for pid in pids)]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
